"""Environments in processes of their own: the same samples and the same errors as in this one, whatever becomes of the processes."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import users_environments

from dry_runs import GROUP_SIZE, GROUPS_PER_STEP, NUM_STEPS, Notes, Workshop, finish
from processes import children
from sluice.engines.scripted import ScriptedEngine
from sluice.environments import processes
from sluice.environments.processes import EnvironmentProcesses
from sluice.errors import EngineError, EngineGoneError, EnvironmentError_, PromptTooLongError
from sluice.processes import Process
from sluice.rollout.worker import rollout_group, rollout_workers
from sluice.run import Run
from sluice.train import train
from sluice.types import Group

T = TypeVar("T")
MODULE = "sluice.environments.serving"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop.make(tmp_path_factory.mktemp("workshop"))


def run_of(workshop: Workshop, name: str, num_workers: int, log: Path | None = None, **changes: Any) -> Run:
    """One with that environment of `users_environments`; 0 workers: in this process."""
    notes = Notes()
    there = EnvironmentProcesses(f"users_environments:{name}", num_workers, log, tell=notes.event)
    environment = there if num_workers else getattr(users_environments, name)
    return workshop.run(environment=environment, tracker=notes, **changes)


def through(run: Run, work: Awaitable[T]) -> T:
    """To its good or bad end, and that of the processes."""

    async def whole() -> T:
        try:
            return await work
        finally:
            if isinstance(run.environment, EnvironmentProcesses):
                await run.environment.close()
                await asyncio.sleep(0.01)

    try:
        return finish(whole(), limit_s=60.0)
    finally:
        assert children(MODULE) == []


def played(run: Run, ticket: int = 3) -> Group:
    return through(run, rollout_group(run, ticket, run.prompts[0]))


def counting(workshop: Workshop, **more: Any) -> ScriptedEngine:
    """Answers with how much it saw, and with its seed."""
    return ScriptedEngine(
        lambda ids, sampling: workshop.ids(f"{len(ids)}{sampling.seed % 1000}"), max_model_len=256, **more
    )


def without_timings(notes: Any) -> dict[int, dict[str, float]]:
    return {
        step: {name: value for name, value in metrics.items() if not name.startswith("perf/")}
        for step, metrics in notes.metrics.items()
    }


def assert_same(one: Run, other: Run) -> None:
    """Every group, sample and metric."""
    here: Any = one.tracker
    there: Any = other.tracker
    assert here.groups == there.groups
    assert here.samples == there.samples
    assert without_timings(here) == without_timings(there)


@pytest.mark.parametrize("name", ["three_turns", "side_by_side"])
def test_a_run_is_the_same_run_with_any_number_of_workers(workshop: Workshop, name: str):
    """Seeds stay with the run: every sample of every step is the same, its turns' rewards too."""
    runs = [run_of(workshop, name, num_workers, engine=counting(workshop)) for num_workers in (0, 1, 3)]
    for run in runs:
        through(run, train(run))
        assert run.step == NUM_STEPS
    notes: Any = runs[0].tracker
    assert len({tuple(s.token_ids) for samples in notes.samples.values() for s in samples}) >= (
        NUM_STEPS * GROUPS_PER_STEP * GROUP_SIZE
    )
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


MISBEHAVING = [
    *("raising", "raising_at_once", "exiting", "cancelling", "reporting", "returning_text", "without_a_turn"),
    *("editing", "talking_on", "saying_nonsense", "panicking", "without_a_list", "with_no_list_at_last"),
]


@pytest.mark.parametrize("name", MISBEHAVING)
def test_what_goes_wrong_there_is_told_as_if_it_went_wrong_here(workshop: Workshop, name: str):
    """Outcome, turns and words, with the file and the line."""
    here, there = (played(run_of(workshop, name, num_workers)) for num_workers in (0, 2))
    assert here == there
    assert all(t.error and t.outcome == "error" for t in there.trajectories)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_place_in_the_users_code_is_named(workshop: Workshop, num_workers: int):
    group = played(run_of(workshop, "raising", num_workers))
    assert f"ValueError: bad state\nof two lines at {users_environments.__file__}:" in group.trajectories[0].error


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_prompt_without_room_is_skipped_or_ends_the_run(workshop: Workshop, num_workers: int):
    group = played(run_of(workshop, "too_long_at_once", num_workers, long_prompts="skip"))
    assert group.rejected.startswith("prompt too long: ")
    with pytest.raises(PromptTooLongError, match=r"prompt q\d+ .*data.long_prompts=skip"):
        played(run_of(workshop, "too_long_at_once", num_workers))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_engines_that_fail_and_engines_that_are_gone_are_told_apart(workshop: Workshop, num_workers: int):
    class Failing:
        def __init__(self, error: Exception) -> None:
            self.error = error

        async def generate(self, *_: Any) -> Any:
            raise self.error

    group = played(run_of(workshop, "three_turns", num_workers, engine=Failing(EngineError("no memory"))))
    assert [t.stop_reason for t in group.trajectories] == ["engine"] * GROUP_SIZE
    assert "no memory; tried 3 times (rollout.engine_retries)" in group.trajectories[0].error
    with pytest.raises(EngineGoneError, match="all dead"):
        played(run_of(workshop, "three_turns", num_workers, engine=Failing(EngineGoneError("all dead"))))
    group = played(run_of(workshop, "heeding_errors", num_workers, engine=Failing(EngineError("no memory"))))
    assert "LookupError: in the policy, EngineError at " in group.trajectories[0].error


def test_what_cannot_be_sent_back_is_an_error_of_its_sample(workshop: Workshop):
    group = played(run_of(workshop, "returning_a_function", 1))
    assert "what it returned cannot be sent to the process of the run" in group.trajectories[0].error
    assert len(group.trajectories[0].turns) == 1, "what was said stays on record"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_call_that_is_not_waited_for_is_cancelled_in_the_engine(workshop: Workshop, num_workers: int):
    class Slow(ScriptedEngine):
        cancelled = 0

        async def generate(self, prompt_ids: Any, sampling: Any) -> Any:
            try:
                if asyncio.get_running_loop().time() and len(calls) < GROUP_SIZE:
                    calls.append(sampling.seed)
                    await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            return await super().generate(prompt_ids, sampling)

    calls: list[int] = []
    engine = Slow(workshop.digits, max_model_len=256)
    group = played(run_of(workshop, "impatient", num_workers, engine=engine))
    assert engine.cancelled == GROUP_SIZE
    assert [len(t.turns) for t in group.trajectories] == [1] * GROUP_SIZE
    assert [t.outcome for t in group.trajectories] == ["scored"] * GROUP_SIZE


def test_an_attempt_that_is_given_up_is_cancelled_there(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With its time, and with the run: it hears of it, and no process is lost for it."""
    monkeypatch.chdir(tmp_path)
    run = run_of(workshop, "waiting", 1, attempt_timeout_s=1.5)
    prompt = run.prompts[0].messages[0]["content"]

    async def work() -> Group:
        group = await rollout_group(run, 3, run.prompts[0])
        await until(lambda: Path(f"{prompt}-cancelled").exists())
        run.attempt_timeout_s = 60.0
        async with rollout_workers(run):
            await until(lambda: len([*tmp_path.glob("*-begun")]) == GROUPS_PER_STEP)
        await until(lambda: len([*tmp_path.glob("*-cancelled")]) == GROUPS_PER_STEP)
        return group

    group = through(run, work())
    assert [t.outcome for t in group.trajectories] == ["timeout"] * GROUP_SIZE
    assert [kind for kind, _ in run.tracker.events] == ["no_score"]  # type: ignore[attr-defined]


def test_a_busy_run_is_not_taken_for_a_process_that_does_not_answer(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As while the trainer computes in the event loop: that the attempt has ended is heard late."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "LEAVE_LIMIT_S", 0.5)
    run = run_of(workshop, "waiting", 1)

    async def work() -> None:
        group = asyncio.create_task(rollout_group(run, 3, run.prompts[0]))
        await until(lambda: [*tmp_path.glob("*-begun")])
        group.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        time.sleep(1.0)  # noqa: ASYNC251
        await asyncio.sleep(1.0)

    through(run, work())
    assert [*tmp_path.glob("*-cancelled")]
    assert run.tracker.events == []  # type: ignore[attr-defined]


async def until(condition: Callable[[], Any], limit_s: float = 10.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_processes_that_are_killed_again_and_again_cost_no_sample(workshop: Workshop):
    """The run is the run without kills, and no completion that was there is asked for again."""
    asked = Counter[int]()

    def script(ids: Any, sampling: Any) -> list[int]:
        asked[sampling.seed] += 1
        return workshop.ids(f"{len(ids)}{sampling.seed % 1000}")

    def one() -> ScriptedEngine:
        return ScriptedEngine(script, max_model_len=256)

    async def work() -> int:
        training, kills, rng = asyncio.create_task(train(killed)), 0, random.Random(0)
        while not training.done():
            for _ in range(2):  # no attempt sees more
                await asyncio.sleep(rng.uniform(0, 0.4))
                if (pids := children(MODULE)) and not training.done():
                    os.kill(rng.choice(pids), signal.SIGKILL)
                    kills += 1
            step = killed.step
            await until(lambda: training.done() or killed.step > step)  # noqa: B023
        await training
        return kills

    undisturbed = run_of(workshop, "slow_turns", 2, engine=one())
    through(undisturbed, train(undisturbed))
    before, asked = asked, Counter[int]()
    killed = run_of(workshop, "slow_turns", 2, engine=one())
    kills = through(killed, work())
    assert_same(undisturbed, killed)
    assert asked == before
    died = [message for kind, message in killed.tracker.events if kind == "environment_died"]  # type: ignore[attr-defined]
    assert kills >= 5
    assert 3 <= len(died) <= kills, "some died before they had started"
    assert "its process was killed (SIGKILL, perhaps for want of memory); attempts that were played there: " in died[0]


def test_an_attempt_with_which_three_processes_die_is_an_error_and_spoils_no_other(workshop: Workshop, tmp_path: Path):
    """In one process, which all share. Where it crashed is in the log."""
    log = tmp_path / "environments.log"
    run = run_of(workshop, "deadly", 1, log)

    async def work() -> list[Group]:
        prompts = [run.prompts[position] for position in range(8)]
        return await asyncio.gather(*(rollout_group(run, k, prompt) for k, prompt in enumerate(prompts)))

    groups = through(run, work())
    assert sum(group.prompt.id == "q11" for group in groups) == 1
    for group in groups:
        for trajectory in group.trajectories:
            if group.prompt.id == "q11":
                assert trajectory.outcome == "error"
                assert "prompt q11: its process was killed (SIGSEGV), 3 times" in trajectory.error
            else:
                assert trajectory.outcome == "scored", trajectory.error
    said = log.read_text()
    assert "Fatal Python error: Segmentation fault" in said
    assert " in deadly" in said


@pytest.mark.parametrize("name", ["ending_all", "ending_all_from_a_task"])
def test_one_that_ends_its_process_spoils_no_other(workshop: Workshop, name: str):
    """However long those that it plays beside take to be cancelled, and though what they say then would be heard."""
    run = run_of(workshop, name, 1)

    async def work() -> list[Group]:
        return await asyncio.gather(*(rollout_group(run, k, run.prompts[k]) for k in range(4)))

    for group in through(run, work()):
        wanted = "error" if group.prompt.id == "q11" else "scored"
        assert [(t.outcome, t.error) for t in group.trajectories if t.outcome != wanted] == []
    (died, *_) = [message for kind, message in run.tracker.events if kind == "environment_died"]  # type: ignore[attr-defined]
    assert "its process ended with exit code 1" in died


def test_what_cannot_be_read_here_is_an_error_of_its_sample(workshop: Workshop):
    group = played(run_of(workshop, "returning_what_cannot_be_read", 1))
    what = (
        "what it returned cannot be read in the process of the run (rollout.environment_workers): ValueError: not twice"
    )
    assert all(what in t.error and "users_environments.py:" in t.error for t in group.trajectories)


def test_they_tidy_up_at_the_end(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    played(run_of(workshop, "tidy", 1))
    assert (tmp_path / "tidied up").exists()


def test_one_that_does_not_end_by_itself_is_killed(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "FINISH_LIMIT_S", 0.5)
    run = run_of(workshop, "blocking_once", 1, attempt_timeout_s=1.0)
    played(run)


@pytest.mark.parametrize("name", ["blocking_once", "deaf"])
def test_a_process_that_does_not_heed_a_cancellation_is_killed(
    workshop: Workshop, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An attempt that holds up its process has its time limit and does not hold up other processes; what was begun later is played again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "LEAVE_LIMIT_S", 0.5)
    run = run_of(workshop, name, 2, attempt_timeout_s=2.0)
    events: list[tuple[str, str]] = run.tracker.events  # type: ignore[attr-defined]

    async def work() -> tuple[list[Group], bool]:
        await run.environment.start()  # type: ignore[attr-defined]
        first = asyncio.create_task(rollout_group(run, 0, run.prompts[0]))
        await until(lambda: (tmp_path / "blocked").exists() or (tmp_path / "deaf").exists())
        run.attempt_timeout_s = 30.0
        later = [asyncio.create_task(rollout_group(run, k, run.prompts[k])) for k in range(1, 5)]
        await asyncio.sleep(0.5)
        held_up = [not group.done() for group in (first, *later)]
        groups = await asyncio.gather(first, *later)
        await until(lambda: "environment_died" in [kind for kind, _ in events])
        return groups, held_up

    (first, *later), held_up = through(run, work())
    assert held_up[0]
    assert any(held_up[1:]) == (name == "blocking_once"), "those in its process"
    assert sorted(t.outcome for t in first.trajectories) == ["scored", "timeout"]
    assert all(t.outcome == "scored" for group in later for t in group.trajectories)
    (died,) = [message for kind, message in events if kind == "environment_died"]
    assert "did not end within 0.5 s, and its process was killed" in died


def test_what_they_print_is_in_the_log(workshop: Workshop, tmp_path: Path):
    log = tmp_path / "environments.log"
    played(run_of(workshop, "printing", 2, log))
    assert log.read_text().splitlines() == ["played q11"] * GROUP_SIZE


def test_where_an_event_loop_is_blocked_is_in_the_log(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without being asked: a process that blocks cannot be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "LEAVE_LIMIT_S", 0.1)
    log = tmp_path / "environments.log"
    run = run_of(workshop, "blocking_once", 1, log, attempt_timeout_s=2.0)
    for worker in run.environment._workers:  # type: ignore[attr-defined]
        worker._launch = lambda module, **more: Process("impatient_serving", **more)
    played(run)
    said = log.read_text()
    assert "Timeout (0:00:00.5" in said
    assert 'users_environments.py", line' in said
    assert "in blocking_once" in said


def test_one_that_cannot_be_imported_there_ends_the_start(workshop: Workshop, tmp_path: Path):
    environment = EnvironmentProcesses("users_environments:nothing", 2, tmp_path / "environments.log")
    with pytest.raises(EnvironmentError_, match=r"could not start: .*has no 'nothing'.*environments.log"):
        finish(environment.start())
    assert children(MODULE) == []


def test_the_state_of_each_is_told(workshop: Workshop):
    run = run_of(workshop, "three_turns", 2, engine=counting(workshop, max_delay_s=0.5))
    environment: Any = run.environment

    async def work() -> list[str]:
        said = [environment.status()]
        starting = asyncio.create_task(environment.start())
        await asyncio.sleep(0.01)
        said.append(environment.status())
        await starting
        playing = asyncio.create_task(rollout_group(run, 0, run.prompts[0]))
        await asyncio.sleep(0.1)
        said.append(environment.status())
        await playing
        return said

    none, starting, playing = (said.splitlines() for said in through(run, work()))
    assert none == ["no process"] * 2
    assert starting == ["a process that is starting"] * 2
    pattern = r"process \d+: 1 attempts, 1 of them wait for the policy; last heard of 0\.\d s ago"
    assert all(re.fullmatch(pattern, line) for line in playing)
