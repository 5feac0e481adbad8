"""A run that goes on from a checkpoint is the run that was never interrupted; one that cannot go on says why."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from same import assert_same_runs, consumed_prompts
from sluice.config import TrainConfig
from sluice.configfile import dump, load
from sluice.errors import ConfigError, TrainingError
from sluice.launch.resuming import resolve_resume
from small_runs import events_of, finished, metrics_of, set_up, sluice, started, workplace, write_rows

EVERY = ("checkpoint.every_steps=1", "checkpoint.keep_last=null")


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    set_up(tmp_path)
    with workplace(tmp_path, monkeypatch) as folder:
        yield folder


def forget_after(run: Path, step: int) -> None:
    """As if the process had been killed before it wrote another checkpoint."""
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


SEVERAL_UPDATES = ("trainer.updates_per_batch=4", "trainer.tokens_per_micro_batch=64")
VARIANTS = {
    "cispo, 4 updates in micro-batches": SEVERAL_UPDATES,
    "dynamic sampling, packed": ("algorithm.name=dapo", "rewards.0.name=users_code:any_a", "trainer.layout=packed"),
    "a schedule": ("trainer.schedule=linear", "trainer.warmup_updates=2"),
    "a critic of its own": ("algorithm.name=ppo", "critic.pretrain_steps=1"),
    "a critic's head": ("algorithm.name=ppo", "critic.model=head", *SEVERAL_UPDATES),
    "a reference that stays": ("algorithm.name=grpo", "algorithm.kl_coef=0.1"),
    "a reference that follows": ("algorithm.name=grpo", "algorithm.kl_coef=0.1", "reference.update_every_steps=2"),
    "adapters": ("trainer.lora_rank=4", "trainer.learning_rate=1e-2"),
    "bfloat16": ("model.dtype=bfloat16", "algorithm.old_logprobs=recomputed"),
    "random weights, top-p": ("model.random_weights=true", "rollout.top_p=0.9"),
    "an environment that draws": ("rollout.environment=users_code:draws",),
}
USERS = """
import random
from sluice.types import Trajectory

def any_a(prompt, trajectory):
    return float("a" in trajectory.response or "b" in trajectory.response)

async def draws(prompt, policy):
    said = await policy.respond([{"role": "user", "content": f"say {random.randrange(1000)}"}])
    return Trajectory(policy.turns, stop_reason="done")
"""


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_is_uninterrupted_to_the_last_bit(ready: Path, variant: str):
    """From a checkpoint in the middle, with steps recorded after it, which are set aside and made again."""
    with open("users_code.py", "a") as file:
        file.write(USERS)
    whole = finished("train", "config.yaml", "run.num_steps=5", *EVERY, *VARIANTS[variant], name="whole")
    killed = Path(shutil.copytree(whole, "runs/killed"))
    forget_after(killed, 2)
    assert sluice("train", "--resume", killed) == 0
    assert_same_runs(whole, killed, 5)
    aside = killed / "set-aside-001"
    assert [line["step"] for line in metrics_of(aside)] == [3, 4, 5]
    assert sorted(path.name for path in (aside / "ledger").iterdir()) == [f"step-{n:06d}.parquet" for n in (3, 4, 5)]
    assert [event["kind"] for event in events_of(killed)].count("resumed") == 1


def test_without_a_checkpoint_it_begins_again_in_the_same_folder(ready: Path):
    whole = finished("train", "config.yaml", *EVERY, name="whole")
    killed = Path(shutil.copytree(whole, "runs/killed"))
    forget_after(killed, 0)
    assert sluice("train", "--resume", killed) == 0
    assert_same_runs(whole, killed, 3)


def test_more_steps_go_on_from_the_end(ready: Path, capsys: pytest.CaptureFixture[str]):
    whole = finished("train", "config.yaml", *EVERY, "run.num_steps=5", name="whole")
    short = finished("train", "config.yaml", *EVERY, "run.num_steps=2", name="short")
    assert sluice("train", "--resume", short) == 0
    assert "runs/short has ended after 2 steps; with a higher run.num_steps it would go on" in capsys.readouterr().out
    assert events_of(short) == []
    assert sluice("train", "--resume", short, "run.num_steps=5") == 0
    assert_same_runs(whole, short, 5)
    assert sluice("train", "--resume", short) == 0, "the config in the folder knows of the new end"
    assert "ended after 5 steps" in capsys.readouterr().out


def test_a_run_that_stopped_at_its_reward_has_ended(ready: Path, capsys: pytest.CaptureFixture[str]):
    run = finished("train", "config.yaml", *EVERY, "run.num_steps=9", "run.stop_at_reward=0.0")
    assert sluice("train", "--resume", run) == 0
    assert (
        "has ended after 1 steps, which reached run.stop_at_reward=0; with a higher one, or null"
        in capsys.readouterr().out
    )
    assert sluice("train", "--resume", run, "run.stop_at_reward=null", "run.num_steps=3") == 0
    assert len(metrics_of(run)) == 3


REFUSED = {
    "a schedule of another length": (["run.num_steps=9"], "run.num_steps was 3 and is 9: with trainer.schedule=linear"),
    "another learning rate": (["trainer.learning_rate=1e-4"], "trainer.learning_rate was 0.001 and is 0.0001"),
    "a section that is another": (["rewards=[{name: 'users_code:share_of_a'}]"], "rewards.0.name was"),
    "a file": (["config.yaml"], "config.yaml has no effect"),
    "another trainer": (
        ["trainer.name=fsdp", "trainer.num_ranks=4"],
        "trainer.name was local and is fsdp. Only run.num_steps",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_make_it_another_run_is_refused(ready: Path, capsys: pytest.CaptureFixture[str], what: str):
    settings, said = REFUSED[what]
    schedule = ["trainer.schedule=linear"] if "schedule" in what else []
    run = finished("train", "config.yaml", *EVERY, *schedule)
    before = (run / "config.yaml").read_bytes()
    assert sluice("train", "--resume", run, *settings) == 2
    assert said in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before


def test_a_folder_that_is_no_run_is_refused(ready: Path, capsys: pytest.CaptureFixture[str]):
    assert sluice("train", "--resume", "model") == 2
    assert "model is no run folder: config.yaml is missing" in capsys.readouterr().err
    assert sluice("train", "--resume", "nowhere") == 2


def test_data_that_changed_is_refused(ready: Path, capsys: pytest.CaptureFixture[str]):
    """A position in other data is another prompt."""
    run = finished("train", "config.yaml", *EVERY)
    write_rows("prompts.jsonl", [{"prompt": f"other {i}"} for i in range(20)])
    assert sluice("train", "--resume", run, "run.num_steps=5") == 2
    assert "the prompts cannot be resumed: their fingerprint was" in capsys.readouterr().err


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", flip_a_byte),
        ("trainer_state.pt", cut_in_half),
        ("run_state.json", flip_a_byte),
        ("checksums.json", Path.unlink),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_loudly(
    ready: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Any
):
    whole = finished("train", "config.yaml", *EVERY, "run.num_steps=4", name="whole")
    run = Path(shutil.copytree(whole, "runs/damaged"))
    forget_after(run, 3)
    damage(run / "checkpoints/step-000003" / name)
    capsys.readouterr()
    assert sluice("train", "--resume", run) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "checkpoint_damaged: runs/damaged/checkpoints/step-000003 cannot be used" in said
    assert name in said
    assert_same_runs(whole, run, 4)
    assert (run / "set-aside-001/checkpoints/step-000003").is_dir()


def test_when_no_checkpoint_is_whole_nothing_is_thrown_away(ready: Path, capsys: pytest.CaptureFixture[str]):
    run = finished("train", "config.yaml", *EVERY)
    for folder in (run / "checkpoints").iterdir():
        flip_a_byte(folder / "model.safetensors")
    assert sluice("train", "--resume", run) == 1
    assert "none of the 3 checkpoints" in capsys.readouterr().err
    assert len(metrics_of(run)) == 3


def test_the_last_and_the_best_are_kept(ready: Path):
    settings = ("checkpoint.keep_last=2", "checkpoint.best_metric=rollout/reward", "checkpoint.best=min")
    run = finished("train", "config.yaml", "checkpoint.every_steps=1", *settings, "run.num_steps=8", "run.seed=3")
    rewards = {line["step"]: line["rollout/reward"] for line in metrics_of(run)}
    worst = min(rewards, key=lambda step: rewards[step])
    assert worst < 7, "the test shows nothing"
    kept = sorted(int(folder.name[5:]) for folder in (run / "checkpoints").iterdir())
    assert kept == [worst, 7, 8]


def test_auto_resume_begins_goes_on_and_refuses_another_config(ready: Path, capsys: pytest.CaptureFixture[str]):
    words = ["train", "config.yaml", "run.name=job", "checkpoint.auto_resume=true", *EVERY, "run.num_threads=1"]
    whole = finished("train", "config.yaml", *EVERY, "run.num_steps=4", name="whole")
    assert sluice(*words, "run.num_steps=2") == 0
    assert sluice(*words, "run.num_steps=4") == 0
    assert_same_runs(whole, Path("runs/job"), 4)
    assert sluice(*words, "run.num_steps=4", "run.seed=5") == 2
    assert "runs/job was run with another config: run.seed was 0 and is 5" in capsys.readouterr().err
    assert sluice("train", "config.yaml", "checkpoint.auto_resume=true") == 2
    assert "checkpoint.auto_resume needs run.name" in capsys.readouterr().err


def test_where_a_run_computes_may_be_other_when_it_goes_on(ready: Path):
    """A server that has moved, or fewer machines, are no reason to begin again."""
    server = ["engine.name=vllm", "engine.url=http://127.0.0.1:1", "rollout.max_staleness=1"]
    run = Path("runs/moved")
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump(load(TrainConfig, ["config.yaml"], server)))
    moved = ["engine.url=http://far:2", "engine.publication_folder=/shared", "engine.max_restarts=9"]
    assert resolve_resume(str(run), moved)[0].config.engine.url == "http://far:2"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match=r"engine\.on_new_weights was continue and is finish"):
        resolve_resume(str(run), ["engine.on_new_weights=finish"])


def test_fewer_steps_than_there_are_leave_nothing_to_do(ready: Path, capsys: pytest.CaptureFixture[str]):
    run = finished("train", "config.yaml", *EVERY)
    forget_after(run, 2)
    assert sluice("train", "--resume", run, "run.num_steps=1") == 0
    assert (
        "runs/test has made 2 of its 3 steps, and run.num_steps=1 asks for no more: nothing was done"
        in capsys.readouterr().out
    )


def origins_of(run: Path) -> dict[str, str]:
    """By line of config.yaml, without indentation."""
    lines = [line.strip().partition("  # ") for line in (run / "config.yaml").read_text().splitlines()]
    return {setting: origin for setting, _, origin in lines if origin}


def test_settings_of_a_run_that_goes_on_are_told_beside_those_it_had(ready: Path):
    run = finished("train", "config.yaml", *EVERY)
    began, explained = origins_of(run), (run / "explained.txt").read_text()
    assert began["learning_rate: 0.001"].startswith("config.yaml:")
    assert sluice("train", "--resume", run, "run.num_steps=5") == 0
    assert sluice("train", "--resume", run, "checkpoint.keep_last=2", "run.num_steps=6") == 0
    now = origins_of(run)
    assert now["num_steps: 6"] == "command line, from step 6 on"
    assert now["keep_last: 2"] == "command line, from step 6 on"
    others = began.keys() - {"num_steps: 3", "keep_last: null"}
    assert {setting: now[setting] for setting in others} == {setting: began[setting] for setting in others}
    first, then, last = (run / "explained.txt").read_text().split("\nfrom step ")
    assert first == explained
    assert then == f"4 on\n{explained}".replace(
        "3 steps = 48 samples and 3 updates", "5 steps = 80 samples and 5 updates"
    )
    assert last.startswith("6 on\na step ")
    assert sluice("train", "--resume", run, "run.num_steps=7") == 0
    assert origins_of(run)["keep_last: 2"] == "command line, from step 6 on"
    assert "num_steps was 3 and is 5" in next(e["message"] for e in events_of(run) if e["kind"] == "resumed")


def test_a_try_that_made_no_step_leaves_the_settings_as_they_were(ready: Path, monkeypatch: pytest.MonkeyPatch):
    run = finished("train", "config.yaml", *EVERY)
    before = {name: (run / name).read_bytes() for name in ("config.yaml", "explained.txt")}

    async def fails(*_: object) -> None:
        raise TrainingError("no update today")

    with monkeypatch.context() as patched:
        patched.setattr("sluice.train.learn", fails)
        assert sluice("train", "--resume", run, "run.num_steps=5", "checkpoint.keep_last=2") == 1
    assert {name: (run / name).read_bytes() for name in before} == before
    assert sluice("train", "--resume", run, "run.num_steps=4") == 0
    assert "keep_last: null" in origins_of(run)


def test_another_placement_begins_with_no_key_of_the_old_one(ready: Path):
    run = Path("runs/placed")
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(
        dump(load(TrainConfig, ["config.yaml"], ["placement.name=ray", "placement.reward_cpus=0.5"]))
    )
    assert resolve_resume(str(run), ["placement.name=local"])[0].config.placement.name == "local"
    assert resolve_resume(str(run), [])[0].config.placement.name == "ray"


def wait_for_steps(process: subprocess.Popen[str], run: Path, count: int) -> None:
    end = time.monotonic() + 90
    while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= count):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


LONG = ("run.name=job", "run.num_threads=1", "run.num_steps=100000", "checkpoint.every_steps=1000")


def test_sigterm_leaves_a_checkpoint_and_two_runs_are_kept_apart(ready: Path):
    """One process, two questions: a second run in the folder of the first is refused; SIGTERM saves what was done."""
    process = started("train", "config.yaml", *LONG)
    try:
        wait_for_steps(process, Path("runs/job"), 3)
        command = [Path(sys.executable).with_name("sluice"), "train", "--resume", "runs/job", "reward_workers=3"]
        config = Path("runs/job/config.yaml").read_bytes()
        second = subprocess.run(command, capture_output=True, text=True)
        assert Path("runs/job/config.yaml").read_bytes() == config
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert second.returncode == 1
    assert f"the run folder runs/job is in use by process {process.pid} on" in second.stderr
    assert process.returncode == 143
    steps = len(metrics_of(Path("runs/job")))
    assert said == f"stopped by SIGTERM after step {steps}; to go on: sluice train --resume runs/job\n"
    assert events_of(Path("runs/job"))[-1]["kind"] == "stopped"
    assert (Path("runs/job") / f"checkpoints/step-{steps:06d}").is_dir()
    assert sluice("train", "--resume", "runs/job", f"run.num_steps={steps + 2}", "checkpoint.every_steps=10") == 0
    whole = finished("train", "config.yaml", f"run.num_steps={steps + 2}", "checkpoint.every_steps=10", name="whole")
    assert_same_runs(whole, Path("runs/job"), steps + 2)


def test_the_lock_dies_with_its_owner(ready: Path):
    process = started("train", "config.yaml", *LONG)
    try:
        wait_for_steps(process, Path("runs/job"), 1)
    finally:
        process.kill()
        process.communicate()
    assert sluice("train", "--resume", "runs/job", "run.num_steps=2") == 0
    assert len(consumed_prompts(Path("runs/job"), 2)) == 8


def test_data_that_change_under_a_run_stop_it_and_the_old_ones_let_it_go_on(
    ready: Path, capsys: pytest.CaptureFixture[str]
):
    """In place, by a reward of the second step: real files, a real run."""
    (ready / "edits.py").write_text(
        "import os\nfrom users_code import share_of_small_letters as f\n"
        "def edit(prompt, trajectory):\n"
        "    if os.path.exists('runs/test/metrics.jsonl'):\n"
        "        text = open('prompts.jsonl').read().replace('task 19', 'task 91')\n"
        "        open('prompts.jsonl', 'w').write(text)\n"
        "    return f(prompt, trajectory)\n"
    )
    before = Path("prompts.jsonl").read_text()
    words = [
        "run.name=test",
        "run.num_threads=1",
        "checkpoint.auto_resume=true",
        "rewards=[{name: 'edits:edit'}]",
        *EVERY,
    ]
    assert sluice("train", "config.yaml", *words) == 1
    said = capsys.readouterr().err
    # of the second step, or of the third where the metrics of the first were written late
    assert re.search("check data_unchanged, step [23]: prompts.jsonl has other content since the run began", said)
    assert [event["details"]["check"] for event in events_of(Path("runs/test")) if event["kind"] == "check"] == [
        "data_unchanged"
    ]
    Path("prompts.jsonl").write_text(before)
    Path("edits.py").write_text("from users_code import share_of_small_letters as edit\n")
    assert sluice("train", "config.yaml", *words) == 0
    assert [line["step"] for line in metrics_of(Path("runs/test"))] == [1, 2, 3]


def test_a_best_metric_that_is_none_is_told_in_the_first_step(ready: Path, capsys: pytest.CaptureFixture[str]):
    assert sluice("train", "config.yaml", "run.name=test", "checkpoint.best_metric=rollout/rewards") == 2
    said = capsys.readouterr().err
    assert "checkpoint.best_metric=rollout/rewards is no metric of this run; did you mean 'rollout/reward'?" in said


def test_a_second_sigterm_ends_what_does_not_listen(ready: Path):
    """An environment that blocks the event loop, for ever."""
    (ready / "blocks.py").write_text(
        "import time\nasync def play(prompt, policy):\n    open('begun', 'w').close()\n    time.sleep(600)\n"
    )
    process = started("train", "config.yaml", *LONG, "rollout.environment=blocks:play")
    try:
        end = time.monotonic() + 90
        while not Path("begun").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGTERM


def test_a_reference_that_changed_is_refused(ready: Path, capsys: pytest.CaptureFixture[str]):
    """The KL term would be against another policy from then on, and nobody would be told."""
    from safetensors.torch import load_file, save_file

    run = finished("train", "config.yaml", *EVERY, *VARIANTS["a reference that stays"])
    weights = {name: 1.5 * tensor for name, tensor in load_file("model/model.safetensors").items()}
    save_file(weights, "model/model.safetensors", metadata={"format": "pt"})
    assert sluice("train", "--resume", run, "run.num_steps=5") == 2
    assert "the reference policy has other weights than when the run began" in capsys.readouterr().err


def test_what_else_lies_in_a_run_folder_is_left_alone(ready: Path):
    """Copies that people make."""
    run = finished("train", "config.yaml", *EVERY)
    shutil.copytree(run / "checkpoints/step-000002", run / "checkpoints/step-000002-backup")
    (run / "set-aside-001-old").mkdir()
    forget = run / "checkpoints/step-000003"
    shutil.rmtree(forget)
    assert sluice("train", "--resume", run) == 0
    assert forget.is_dir()
    assert (run / "checkpoints/step-000002-backup").is_dir()
    assert (run / "set-aside-001").is_dir()
