"""Processes that are killed, and parents that are: real ones, with kill -9."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rubrics import a_prompt, an_answer, rubric_of, score, score_all, users

from sluice.rewards.rubric import Rubric
from sluice.rewards.spec import RewardSpec
from sluice.types import Trajectory
from sluice.waits import Wait


def wait_for(condition, seconds: float, what: str):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.02)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids_in(folder: Path, count: int) -> list[int]:
    def written() -> list[int] | None:
        pids = (folder / "pids").read_text().split() if (folder / "pids").exists() else []
        return [int(pid) for pid in pids] if len(pids) >= count else None

    return wait_for(written, 15, f"a reward writing {count} process ids")


async def score_and_kill(rubric: Rubric, folder: Path, kills: int) -> Trajectory:
    """Score a sample and kill its process, and the next one, as often as said."""
    trajectory = an_answer("")
    task = asyncio.create_task(rubric.score(a_prompt(folder=str(folder), kills=kills), trajectory))
    for count in range(1, kills + 1):
        os.kill((await asyncio.to_thread(pids_in, folder, count))[-1], signal.SIGKILL)
    await asyncio.wait_for(task, 15)
    return trajectory


@pytest.mark.parametrize(("kills", "outcome", "reward"), [(1, "scored", 1.0), (2, "scored", 1.0), (3, "error", None)])
def test_a_killed_process_is_replaced_and_its_sample_tried_once_more(
    kills: int, outcome: str, reward: float | None, tmp_path: Path
):
    with rubric_of(users("waits_then_one", timeout_s=30)) as rubric:
        trajectory = asyncio.run(score_and_kill(rubric, tmp_path, kills))
        assert (trajectory.outcome, trajectory.reward) == (outcome, reward)
        if kills == 3:
            assert "reward 'part', prompt row-7 (data.jsonl:7): its process was killed (SIGKILL" in trajectory.error
            assert trajectory.error.endswith("3 times")
        assert score(rubric, a_prompt(folder=str(tmp_path), kills=0)).reward == 1.0


def test_a_process_killed_while_idle_costs_no_sample_its_second_try(tmp_path: Path):
    with rubric_of(users("waits_then_one", timeout_s=30)) as rubric:
        (tmp_path / "idle").mkdir()
        score(rubric, a_prompt(folder=str(tmp_path / "idle"), kills=0))
        os.kill(pids_in(tmp_path / "idle", 1)[0], signal.SIGKILL)
        time.sleep(0.1)
        assert asyncio.run(score_and_kill(rubric, tmp_path, kills=1)).outcome == "scored"


def test_scoring_goes_on_when_all_processes_are_killed_at_once():
    with rubric_of(users("where", "at"), num_workers=2) as rubric:
        first = {int(t.reward_parts["at/pid"]) for t in score_all(rubric, [(a_prompt(), "")] * 40)}
        assert len(first) == 2
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        second = score_all(rubric, [(a_prompt(), "")] * 40)
        assert {t.outcome for t in second} == {"scored"}
        assert not first & {int(t.reward_parts["at/pid"]) for t in second}


def test_a_reward_that_ends_its_process_is_an_error_with_the_exit_code():
    with rubric_of(users("ends_its_process")) as rubric:
        trajectory = score(rubric, a_prompt())
    assert (trajectory.outcome, trajectory.reward) == ("error", None)
    assert "exit code 7, 3 times" in trajectory.error


def test_ctrl_c_does_not_reach_reward_processes():
    with rubric_of(users("where", "at")) as rubric:
        pid = int(score(rubric, a_prompt()).reward_parts["at/pid"])
        assert os.getpgid(pid) != os.getpgid(0)
        os.kill(pid, signal.SIGINT)
        time.sleep(0.1)
        assert score(rubric, a_prompt()).reward_parts["at/pid"] == pid


def test_close_and_time_limits_kill_also_what_a_reward_started(tmp_path: Path):
    with rubric_of(users("busy_with_a_child", timeout_s=0.5)) as rubric:
        assert score(rubric, a_prompt(folder=str(tmp_path))).outcome == "timeout"
        pids = pids_in(tmp_path, 2)
    wait_for(lambda: not any(alive(pid) for pid in pids), 3, "the end of the reward and its child")


PARENT = """
import sys
sys.path.insert(0, {here!r})
from rubrics import a_prompt, rubric_of, score, users
with rubric_of(users({function!r}, timeout_s=2.0)) as rubric:
    score(rubric, a_prompt(folder={folder!r}))
    import time; time.sleep(60)
"""


@pytest.mark.parametrize(("function", "count"), [("idle", 1), ("busy_with_a_child", 2), ("busy_holding_the_gil", 1)])
def test_no_process_outlives_a_killed_parent(function: str, count: int, tmp_path: Path):
    """Idle, busy in Python with a process of its own, and busy in C where no thread of the process gets to run."""
    here = str(Path(__file__).parent)
    script = PARENT.format(here=here, function=function, folder=str(tmp_path))
    parent = subprocess.Popen([sys.executable, "-c", script])
    pids = pids_in(tmp_path, count)
    try:
        assert all(alive(pid) for pid in pids)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        wait_for(lambda: not any(alive(pid) for pid in pids), 2.0 + 3.0, "the end of the orphans")
    finally:
        parent.kill()
        parent.wait()
        for pid in pids:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_child_that_a_reward_forks_answers_for_no_sample():
    """Its answer would be taken for that of the next sample, and every later score would belong to another."""
    with rubric_of(users("forks")) as rubric:
        scored = score_all(rubric, [(a_prompt(), "x" * n) for n in range(12)])
    assert [t.reward for t in scored] == list(range(12))


DIES_AT_IMPORT = """\
import os, signal
from pathlib import Path

starts = Path(__file__).with_name("starts")
with starts.open("a") as file:
    file.write("x")
if {parent} != os.getpid() and len(starts.read_text()) <= {deaths} + 1:  # the first import is the check of the config
    os.kill(os.getpid(), signal.SIGKILL)


def one(prompt, trajectory):
    return 1.0
"""


@pytest.mark.parametrize(("deaths", "outcome"), [(2, "scored"), (100, "error")])
def test_a_process_killed_while_it_starts_is_started_again_so_many_times(
    deaths: int, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As when memory is short for a moment; and not for ever."""
    module = f"dies_{deaths}"
    (tmp_path / f"{module}.py").write_text(DIES_AT_IMPORT.format(parent=os.getpid(), deaths=deaths))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with rubric_of(RewardSpec("part", f"{module}:one")) as rubric:
        trajectory = score(rubric, a_prompt())
    assert trajectory.outcome == outcome
    assert len((tmp_path / "starts").read_text()) == 1 + 3
    if outcome == "error":
        assert "a reward process could not start: its process was killed (SIGKILL" in trajectory.error


def test_it_says_what_each_process_does(tmp_path: Path):
    async def look() -> tuple[str, str]:
        task = asyncio.create_task(
            rubric.score(a_prompt(folder=str(tmp_path)), an_answer(""), Wait("rollout 3.1", "prompt p"))
        )
        pid = (await asyncio.to_thread(pids_in, tmp_path, 2))[0]
        while_busy = rubric.status()
        os.kill(pid, signal.SIGKILL)
        for _ in range(2):
            (tmp_path / "pids").unlink()
            os.kill((await asyncio.to_thread(pids_in, tmp_path, 2))[0], signal.SIGKILL)
        await asyncio.wait_for(task, 15)
        return str(pid), while_busy

    with rubric_of(users("busy_with_a_child", timeout_s=30)) as rubric:
        assert rubric.status() == "no process: idle"
        pid, busy = asyncio.run(look())
    assert busy.startswith(f"process {pid}: reward part for rollout 3.1, prompt p, for ")
