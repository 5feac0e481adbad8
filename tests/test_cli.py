"""The command line: what each command prints, its exit code, and that looking at something loads no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import ROOT
from sluice import __version__
from sluice.config import TrainConfig
from sluice.configfile import load
from small_runs import finished, set_up, sluice, workplace, write_rows

LIMIT_S = 60
RECIPE = ROOT / "recipes/gsm8k.yaml"
PATHS = ("model.path=model", "data.path=questions.jsonl")


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder, as the current one, with everything for `sluice train config.yaml`, and a question for the recipe."""
    with workplace(tmp_path, monkeypatch):
        set_up(tmp_path)
        write_rows("questions.jsonl", [{"question": "1 + 1?", "answer": "It is 2.\n#### 2"}])
        yield tmp_path


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]):
    """What `sluice WORDS` prints when all is well."""

    def run(*words: str | Path) -> str:
        assert sluice(*words) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return run


def test_help_and_version(output):
    assert output("--version") == f"sluice {__version__}\n"
    for command in ("train", "sft", "check", "report", "config"):
        assert command in output("--help")
        assert output(command, "--help").startswith(f"usage: sluice {command}")
    for action in ("show", "explain"):
        assert action in output("config", "--help")
        assert "CONFIG [KEY=VALUE]" in output("config", action, "--help")


@pytest.mark.parametrize("words", [[], ["trian", "c.yaml"], ["train"], ["config"], ["config", "show"], ["report"]])
def test_a_command_that_is_none_shows_the_usage(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert sluice(*words) == 2
    assert capsys.readouterr().err.startswith("usage: sluice")


def test_config_explain_says_the_arithmetic_and_the_loss(output):
    said = output("config", "explain", RECIPE, *PATHS, "rollout.groups_per_step=10", "rollout.group_size=3")
    assert said == (
        "a step     10 groups × 3 samples = 30 samples, sampled by the newest weights\n"
        "           4 optimiser updates, each of 7 or 8 samples, in micro-batches of at most 16384 tokens\n"
        "the run    200 steps = 6000 samples and 800 updates\n"
        "algorithm cispo: advantage z_score, ratio token, clip weight, mask none, aggregation token_mean\n"
        "  loss       J = mean over all loss tokens of the update of stop_gradient(clip(r, 0, 5))·A·logπ_t; the loss is -J\n"
        "  advantage  A = (R - mean of the group) / (std of the group, ddof 1, + 1e-06)\n"
        "  ratio      r_t = exp(logπ_t - logπ_old_t), one per token\n"
        "  π_old      the engine's log-probs\n"
        "  bounds     ratio in [0, 5]; a clipped token keeps its gradient, with the bound as weight\n"
        "  no effect  here, and so refused: gamma, gae_lambda, clip_low, clip_high, dual_clip, gate_positive, gate_negative, tv_low, tv_high,\n"
        "             loss_constant, token_share, kl, kl_estimator, correction_level, correction_max, correction_min, "
        "rejection_min, rejection_max\n"
    )


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (["algorithm.name=dapo"], "J = mean over all loss tokens of the update of min(r·A, clip(r, 0.8, 1.28)·A)"),
        (["algorithm.name=dapo"], "groups whose rewards are all equal are rejected and replaced"),
        (["algorithm.name=dr_grpo"], "J = 1 / (sequences × 1024) times the sum over all loss tokens"),
        (["algorithm.name=gspo"], "r = exp(mean over the response of logπ_t - logπ_old_t), one per sequence"),
        (["algorithm.mask=trust_region"], "stop_gradient(clip(r, 0, 5))·A·logπ_t·M_t"),
        (["algorithm.old_logprobs=recomputed"], "the trainer's own log-probs before the step's first update"),
        (
            ["engine={name: scripted, script: a:b}", "rollout.max_staleness=2", "algorithm.old_logprobs=recomputed"],
            "64 groups × 8 samples = 512 samples, at most 2 versions old",
        ),
        (
            ["engine={process: own, replicas: 2}", "placement.name=ray", "rollout.max_staleness=1"],
            "samples, at most 1 version old\n",
        ),
        (
            ["engine={process: own, replicas: 2}", "placement.name=ray"],
            "engines    2 in processes of their own; weights go by broadcast\nplacement  by Ray, disaggregated, pack, on this machine alone\n",
        ),
        (["engine.process=own"], "engines    1 in a process of its own; weights go by shared_memory\n"),
        (
            ["engine={name: vllm, python: p, publication_folder: /dev/shm/w}"],
            "engines    1 vllm server; weights go by disk\n",
        ),
        (
            ["engine={name: vllm, url: 'http://127.0.0.1:1'}"],
            "engines    the vllm server at http://127.0.0.1:1; weights go by disk\n",
        ),
        (
            ["rollout.environment=envs:play", "rollout.environment_workers=2"],
            "sampled by the newest weights\n           played in 2 environment processes\n",
        ),
        (["rollout.routing_replay=true"], "experts    of each token are those that the engine chose"),
    ],
)
def test_config_explain_follows_the_config(output, settings: list[str], part: str):
    assert part in output("config", "explain", RECIPE, *PATHS, *settings)


def test_config_show_names_origins_and_can_be_read_again(ready: Path, output):
    said = output("config", "show", RECIPE, *PATHS, "trainer.learning_rate=3e-6")
    shown = [" ".join(line.split()) for line in said.splitlines()]
    line = 1 + RECIPE.read_text().splitlines().index("  groups_per_step: 64")
    assert f"groups_per_step: 64 # {RECIPE}:{line}" in shown
    assert any(line.startswith("learning_rate: ") and line.endswith("# command line") for line in shown)
    assert "temperature: 1.0 # default" in shown
    Path("again.yaml").write_text(said)
    settings = [*PATHS, "trainer.learning_rate=3e-6"]
    assert load(TrainConfig, ["again.yaml"]).config == load(TrainConfig, [str(RECIPE)], settings).config


def test_config_show_of_sft(ready: Path, output):
    write_rows("pairs.jsonl", [{"prompt": "a", "response": "b"}])
    Path("sft.yaml").write_text("model: {path: model}\ndata: {path: pairs.jsonl}\n")
    assert "samples_per_update: 64" in output("config", "show", "--sft", "sft.yaml")


def test_later_files_and_settings_override_earlier_ones(ready: Path, output):
    Path("more.yaml").write_text("rollout: {group_size: 2}\n")
    said = output("config", "explain", "config.yaml", "more.yaml", "rollout.groups_per_step=5")
    assert "a step     5 groups × 2 samples = 10 samples" in said


def test_a_word_with_an_equals_sign_is_a_setting_whatever_its_length(ready: Path, capsys: pytest.CaptureFixture[str]):
    """A file system has no name of 300 letters, and asking for one raises."""
    assert sluice("config", "show", "config.yaml", f"data.systm_prompt={'x' * 300}") == 2
    assert "did you mean 'data.system_prompt'?" in capsys.readouterr().err


def test_train_says_what_it_will_do_and_where_it_did_it(ready: Path, output):
    said = output("train", "config.yaml", "run.num_steps=1", "run.name=here")
    assert said.startswith("a step     4 groups × 4 samples = 16 samples, sampled by the newest weights\n")
    assert said.endswith(
        "run folder: runs/here\nreport:     runs/here/report.html\ncheckpoint: runs/here/checkpoints/step-000001\n"
    )
    assert Path("runs/here/report.html").exists()


def test_a_run_without_a_name_has_that_of_its_config_and_the_time(ready: Path, output):
    output("train", "config.yaml", "run.num_steps=1")
    (run,) = Path("runs").iterdir()
    assert run.match("config-2???????-??????")


def test_report_writes_the_page_again(ready: Path, output):
    run = finished("train", "config.yaml", "run.num_steps=1")
    page = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert output("report", run).splitlines()[-1] == "runs/test/report.html"
    assert (run / "report.html").read_text() == page


# Processes of their own

LOADED = """\
import json, sys
from sluice.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(json.dumps(sorted({"torch", "transformers", "datasets", "matplotlib", "math_verify"} & sys.modules.keys())))
"""


@pytest.mark.parametrize(
    ("command", "loaded"),
    [
        (["--help"], []),
        (["train", "--help"], []),
        (["config", "show", "config.yaml"], []),
        (["config", "explain", "config.yaml"], []),
        (["check", "--help"], []),
        (["report", "runs/test"], ["matplotlib"]),
    ],
)
def test_looking_loads_no_torch(ready: Path, command: list[str], loaded: list[str]):
    if command[0] == "report":
        finished("train", "config.yaml", "run.num_steps=1")
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *command], capture_output=True, text=True, timeout=LIMIT_S, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == loaded


def test_as_a_module_and_as_a_command(ready: Path):
    words = ["config", "explain", "config.yaml"]
    for command in ([sys.executable, "-m", "sluice.cli"], [Path(sys.executable).with_name("sluice")]):
        done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=LIMIT_S)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("a step     4 groups × 4 samples = 16 samples")
        assert subprocess.run([*command, "train", "no.yaml"], capture_output=True, timeout=LIMIT_S).returncode == 2
