"""The command line. Nothing here loads torch before a run starts."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sluice import __version__
from sluice.errors import ConfigError, SluiceError


def main(argv: Sequence[str] | None = None) -> int:
    """0 when all went well, 2 when the input was wrong, 1 when the run failed, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show × or π does not end a run
    args = _parser().parse_args(argv)
    try:
        args.command(args)
    except SluiceError as error:
        from sluice.errors import DataError

        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | DataError) else 1
    except OSError as error:  # a full disk, a folder without permission: not the program's fault
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was written until now is whole", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sluice", description="Reinforcement-learning post-training for language models."
    )
    parser.add_argument("--version", action="version", version=f"sluice {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, action: Any, help: str, parent: Any = commands) -> argparse.ArgumentParser:
        sub = parent.add_parser(name, help=help, description=help)
        sub.set_defaults(command=action)
        return sub

    def takes_config(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "config",
            nargs="+",
            metavar="CONFIG [KEY=VALUE]",
            help="YAML files, later ones over earlier ones, then settings such as trainer.learning_rate=1e-5",
        )

    takes_config(command("train", _train, "train a policy by reinforcement learning"))
    takes_config(command("sft", _sft, "fine-tune a model on given responses"))
    report = command("report", _report, "write report.html of a run folder again")
    report.add_argument("run", help="run folder")

    config = commands.add_parser("config", help="look at a config without running it")
    actions = config.add_subparsers(required=True, metavar="ACTION")
    for name, action, help in (
        ("show", _show, "print every setting and where it comes from"),
        ("check", _check, "resolve every name and read every data row"),
        ("explain", _explain, "print the batch arithmetic, and the loss with its bounds and denominators"),
    ):
        sub = command(name, action, help, actions)
        takes_config(sub)
        if name != "explain":
            sub.add_argument("--sft", action="store_true", help="the config is for `sluice sft`")
    return parser


def _load(args: argparse.Namespace, sft: bool) -> Any:
    from sluice.config import SftConfig, TrainConfig
    from sluice.configfile import load

    files = [word for word in args.config if "=" not in word]
    settings = [word for word in args.config if "=" in word]
    return load(SftConfig if sft else TrainConfig, files, settings)


def _name(args: argparse.Namespace) -> str:
    return Path(args.config[0]).stem if "=" not in args.config[0] else "run"


def _train(args: argparse.Namespace) -> None:
    resolved = _load(args, sft=False)
    from sluice.describe import describe
    from sluice.launch import train

    print(describe(resolved.config), flush=True)
    _done(train(resolved, _name(args)))


def _sft(args: argparse.Namespace) -> None:
    resolved = _load(args, sft=True)
    from sluice.launch import sft

    _done(sft(resolved, _name(args)))


def _done(run: Path) -> None:
    print(f"run folder: {run}\nreport:     {run / 'report.html'}")
    if checkpoints := sorted((run / "checkpoints").glob("step-*")):
        print(f"checkpoint: {checkpoints[-1]}")


def _report(args: argparse.Namespace) -> None:
    from sluice.viewer.report import write_report

    print(write_report(args.run))


def _show(args: argparse.Namespace) -> None:
    from sluice.configfile import dump

    print(dump(_load(args, args.sft)), end="")


def _check(args: argparse.Namespace) -> None:
    resolved = _load(args, args.sft)
    from sluice.launch import check, check_sft

    rows = len(check_sft(resolved.config) if args.sft else check(resolved.config).prompts)
    print(f"the config is sound, and so are all {rows} rows of {resolved.config.data.path}")


def _explain(args: argparse.Namespace) -> None:
    resolved = _load(args, sft=False)
    from sluice.describe import describe

    print(describe(resolved.config))


if __name__ == "__main__":
    sys.exit(main())
