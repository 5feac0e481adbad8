"""The command line. Nothing here loads torch before a run starts."""

from __future__ import annotations

import argparse
import io
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sluice import __version__
from sluice.errors import ConfigError, DataError, ReplayError, RunStopped, SluiceError, notes


def main(argv: Sequence[str] | None = None) -> int:
    """0 when all went well, 2 when the input was wrong, 1 when the run failed, 130 after Ctrl-C, 143 after SIGTERM."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show × or π does not end a run
    args = _parser().parse_args(argv)
    try:
        return args.command(args) or 0
    except RunStopped as stopped:
        print(stopped, file=sys.stderr)
        return 143
    except SluiceError as error:
        print("\n".join([f"error: {error}", *notes(error)]), file=sys.stderr)
        return 2 if isinstance(error, ConfigError | DataError) else 1
    except OSError as error:  # a full disk, a folder without permission: not the program's fault
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was written until now is whole", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sluice", description="Reinforcement-learning post-training for language models."
    )
    parser.add_argument("--version", action="version", version=f"sluice {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, action: Any, help: str, parent: Any = commands) -> argparse.ArgumentParser:
        sub = parent.add_parser(name, help=help, description=help)
        sub.set_defaults(command=action, refuse=sub.error)
        return sub

    def takes_config(sub: argparse.ArgumentParser, required: bool = True) -> None:
        sub.add_argument(
            "config",
            nargs="+" if required else "*",
            metavar="CONFIG [KEY=VALUE]",
            help="YAML files, later ones over earlier ones, then settings such as trainer.learning_rate=1e-5",
        )

    train = command("train", _train, "train a policy by reinforcement learning")
    takes_config(train, required=False)
    train.add_argument(
        "--resume",
        metavar="RUN",
        help="go on in this run folder from its newest checkpoint; instead of config files, perhaps with settings",
    )
    takes_config(command("sft", _sft, "fine-tune a model on given responses"))
    _add_replay(command)
    report = command("report", _report, "write report.html of a run folder again")
    report.add_argument("run", help="run folder")

    check = command("check", _check, "look for whatever would end or spoil a run, before it is paid for")
    takes_config(check)
    check.add_argument("--sft", action="store_true", help="the config is for `sluice sft`")
    check.add_argument("--offline", action="store_true", help="leave out the trial: no torch, and no weights needed")
    check.add_argument(
        "--rows", type=_count, default=500, metavar="N", help="rows whose gold answers are scored (default: 500)"
    )
    config = commands.add_parser("config", help="look at a config without running it")
    actions = config.add_subparsers(required=True, metavar="ACTION")
    for name, action, help in (
        ("show", _show, "print every setting and where it comes from"),
        ("explain", _explain, "print the batch arithmetic, and the loss with its bounds and denominators"),
    ):
        sub = command(name, action, help, actions)
        takes_config(sub)
        if name != "explain":
            sub.add_argument("--sft", action="store_true", help="the config is for `sluice sft`")

    _add_analyses(commands, command)
    return parser


def _add_replay(command: Callable[..., argparse.ArgumentParser]) -> None:
    replay = command("replay", _replay, "make recorded steps again and compare every number")
    replay.add_argument("run", help="run folder")
    replay.add_argument("--step", type=_step_or_steps, required=True, metavar="N|A:B", help="a step, or from A to B")
    replay.add_argument("--algorithm", metavar="NAME", help="what if: another row of the table for the last step")
    replay.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="what if: other settings of algorithm and trainer for the last step",
    )
    replay.add_argument("--rewards", action="store_true", help="score the recorded responses again instead")


def _add_analyses(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    analyze = commands.add_parser("analyze", help="figures about algorithms and finished runs")
    analyses = analyze.add_subparsers(required=True, metavar="ANALYSIS")
    rates = command("binary-reward", _binary_reward, "z-score against centred advantages under 0/1 rewards", analyses)
    rates.add_argument("--group-size", type=int, default=32, metavar="G", help="samples per prompt (default: 32)")
    rates.add_argument(
        "--rates", type=float, nargs="+", metavar="P", help="success rates (default: 1/G, the eighths, 1 - 1/G)"
    )
    clipped = command(
        "clipped-tokens", _clipped_tokens, "rank tokens by how often and how hard they were clipped", analyses
    )
    clipped.add_argument("runs", nargs="+", metavar="RUN", help="run folders; those of one algorithm are pooled")
    clipped.add_argument("--top", type=_count, default=20, metavar="N", help="tokens to show (default: 20)")
    clipped.add_argument(
        "--min-count", type=_count, default=10, metavar="N", help="rank tokens that occur as often (default: 10)"
    )
    clipped.add_argument("--steps", type=_steps, default=(None, None), metavar="A:B", help="from A to B, both included")
    for sub in (rates, clipped):
        sub.add_argument("--json", type=_output, metavar="FILE", help="write all figures there too")
        sub.add_argument("--plot", type=_image, metavar="FILE", help="draw them there: .png or .svg")


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def _steps(text: str) -> tuple[int | None, int | None]:
    first, colon, last = text.partition(":")
    if not colon or not all(part.isdecimal() or not part for part in (first, last)):
        raise argparse.ArgumentTypeError(f"{text!r} is no range of steps; write A:B, A: or :B, both ends included")
    return int(first) if first else None, int(last) if last else None


def _step_or_steps(text: str) -> tuple[int, int]:
    first, last = _steps(text) if ":" in text else (_count(text), _count(text))
    if first is None or last is None or not 1 <= first <= last:
        raise argparse.ArgumentTypeError(f"{text!r} is no step and no range of steps; write N or A:B, counted from 1")
    return first, last


def _output(text: str) -> Path:
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(Path(text).parent)!r} to write {text!r} to")
    return Path(text)


def _image(text: str) -> Path:
    if Path(text).suffix.lower() not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"{text!r} is no image that can be drawn; end it in .png or .svg")
    return _output(text)


def _load(args: argparse.Namespace, sft: bool) -> Any:
    from sluice.config import SftConfig, TrainConfig
    from sluice.configfile import load

    files = [word for word in args.config if "=" not in word]
    settings = [word for word in args.config if "=" in word]
    return load(SftConfig if sft else TrainConfig, files, settings)


def _name(args: argparse.Namespace) -> str:
    return Path(args.config[0]).stem if args.config and "=" not in args.config[0] else "run"


def _train(args: argparse.Namespace) -> None:
    from sluice.describe import describe
    from sluice.launch import resolve_resume, train

    if args.resume:
        if files := [word for word in args.config if "=" not in word]:
            raise ConfigError(
                f"--resume goes on with the config in the run folder, so {files[0]} has no effect; leave it out"
            )
        resolved, resume = resolve_resume(args.resume, args.config)
    elif not args.config:
        args.refuse("the following arguments are required: CONFIG [KEY=VALUE], or else --resume RUN")
    else:
        resolved, resume = _load(args, sft=False), None
    print(describe(resolved.config), flush=True)
    with _deaf_to_sigusr1():
        run = train(resolved, resume.path.name if resume else _name(args), resume)
    _done(run)


@contextmanager
def _deaf_to_sigusr1() -> Generator[None]:
    """The watchdog takes it as long as there is one; before and after it must not end the process."""
    if not hasattr(signal, "SIGUSR1") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def _sft(args: argparse.Namespace) -> None:
    resolved = _load(args, sft=True)
    from sluice.launch import sft

    _done(sft(resolved, _name(args)))


def _done(run: Path) -> None:
    print(f"run folder: {run}")
    if (run / "report.html").exists():
        print(f"report:     {run / 'report.html'}")
    if checkpoints := sorted((run / "checkpoints").glob("step-*")):
        print(f"checkpoint: {checkpoints[-1]}")


def _replay(args: argparse.Namespace) -> None:
    from sluice.launch import replay, score_again

    first, last = args.step
    what_if = args.algorithm is not None or args.set
    if args.rewards:
        if what_if:
            raise ConfigError(
                "--rewards scores what was recorded, so an algorithm or a setting has no effect; leave it out"
            )
        count, lines = score_again(args.run, first, last)
        print("\n".join([*lines, f"{len(lines)} of {count} scores are other than recorded"]))
        return
    outcomes = replay(args.run, first, last, args.algorithm, args.set)
    for outcome in outcomes[: -1 if what_if else None]:
        print(f"step {outcome.step}: {outcome.difference or f'identical ({outcome.num_samples} samples)'}")
    if what_if:
        print(f"step {outcomes[-1].step}".ljust(32), "recorded".rjust(13), "now".rjust(13))
        for name, (was, now) in outcomes[-1].metrics.items():
            print(name.ljust(32), f"{was:13.6g}", f"{now:13.6g}")
    elif different := [outcome for outcome in outcomes if outcome.difference]:
        raise ReplayError(f"{len(different)} of {len(outcomes)} steps are not as they were recorded")


def _report(args: argparse.Namespace) -> None:
    from sluice.viewer.report import write_report

    print(write_report(args.run))


def _show(args: argparse.Namespace) -> None:
    from sluice.configfile import dump

    print(dump(_load(args, args.sft)), end="")


def _check(args: argparse.Namespace) -> int:
    config = _load(args, args.sft).config
    from sluice.preflight import check_sft, check_training
    from sluice.preflight.findings import plural

    start = time.monotonic()
    items = check_sft(config, args.offline) if args.sft else check_training(config, args.rows, args.offline)
    levels: list[str] = []
    for item in items:
        print(item.text(), flush=True)
        levels += [level for level, _ in item.findings]
    failures, warnings = (plural(levels.count(level), level) for level in ("failure", "warning"))
    print(f"{failures}, {warnings}, {time.monotonic() - start:.0f} s")
    return 2 if "failure" in levels else 0


def _explain(args: argparse.Namespace) -> None:
    resolved = _load(args, sft=False)
    from sluice.describe import describe, unused_settings

    print(describe(resolved.config))
    print(unused_settings(resolved.config))


def _binary_reward(args: argparse.Namespace) -> None:
    from sluice.analysis import binary_reward, output

    result = binary_reward.analyse(args.group_size, args.rates)
    output.show(binary_reward.show(result))
    if args.json:
        output.write_json(args.json, result)
    if args.plot:
        from sluice.analysis.plots import draw_binary_reward

        draw_binary_reward(result, args.plot)


def _clipped_tokens(args: argparse.Namespace) -> None:
    from sluice.analysis import clipped_tokens, output

    pools = clipped_tokens.analyse(args.runs, args.steps, args.min_count)
    output.show(clipped_tokens.show(pools, args.top))
    if args.json:
        output.write_json(args.json, pools)
    if args.plot:
        from sluice.analysis.plots import draw_clipped_tokens

        draw_clipped_tokens(pools, args.top, args.plot)


if __name__ == "__main__":
    sys.exit(main())
