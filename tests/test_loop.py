"""The loop keeps its promises under random timing: the staleness bound, one sequence at 0, full batches, and an end."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dry_runs import GROUP_SIZE, GROUPS_PER_STEP, NUM_STEPS, Notes, TimedTrainer, Timing, Workshop, finish
from sluice.engines.scripted import ScriptedEngine
from sluice.errors import DataError, EngineError, EnvironmentError_, NonFiniteError, RewardError, RolloutError
from sluice.rollout.buffer import Limits
from sluice.run import Run
from sluice.train import train
from sluice.types import Completion, Group, Prompt, Trajectory


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop.make(tmp_path_factory.mktemp("workshop"))


TIMINGS = [
    Timing(),
    Timing(engine_s=0.003, seed=1),
    Timing(score_s=0.004, seed=2),
    Timing(train_s=0.002, seed=3),
    Timing(engine_s=0.002, score_s=0.002, train_s=0.001, seed=4),
    Timing(engine_s=0.001, score_s=0.004, seed=5),
]
SLOW_ROLLOUT = Timing(engine_s=0.006, score_s=0.002, seed=6)
SLOW_TRAINER = Timing(engine_s=0.0005, train_s=0.008, seed=7)


def odd_answers(group: Group) -> bool:
    return int(group.trajectories[0].response) % 2 == 1


def scenario(name: str, workshop: Workshop) -> dict[str, Any]:
    """What is rejected, as changes to a run."""
    return {
        "nothing": {},
        "equal rewards": {"algorithm": "dapo", "script": workshop.digits_or_nothing_new},
        "a filter": {"group_filter": odd_answers},
    }[name]


def played(run: Run) -> Notes:
    finish(train(run))
    return run.tracker  # type: ignore[return-value]


def staleness(notes: Notes) -> dict[int, int]:
    """Of each step, the largest distance in updates between a trained token and the weights that it trained."""
    return {
        step: step - 1 - min(v for s in samples for v, w in zip(s.policy_versions, s.loss_weights, strict=True) if w)
        for step, samples in notes.samples.items()
    }


def all_that_was_trained(run: Run) -> list[Any]:
    """Every update with its samples in order, and all that the trainer saw of each."""
    notes = played(run)
    return [run.trainer.updates, [vars(s) for step in sorted(notes.samples) for s in notes.samples[step]]]  # type: ignore[attr-defined]


@pytest.mark.parametrize("timing", [SLOW_ROLLOUT, SLOW_TRAINER], ids=["slow rollout", "slow trainer"])
@pytest.mark.parametrize("max_staleness", [0, 1, 2, 4])
def test_staleness_is_bounded_and_the_bound_is_reached(workshop: Workshop, max_staleness: int, timing: Timing):
    """Reached, or the test would show nothing; with a slow trainer in every step that is not one of the first."""
    notes = played(workshop.run(timing, max_staleness=max_staleness))
    measured = staleness(notes)
    assert len(measured) == NUM_STEPS
    assert max(measured.values()) == max_staleness
    assert {step: notes.metrics[step]["rollout/staleness/max"] for step in measured} == measured
    if timing is SLOW_TRAINER:
        assert set(list(measured.values())[max_staleness:]) == {max_staleness}


@pytest.mark.parametrize("rejected", ["nothing", "equal rewards", "a filter"])
def test_without_staleness_timing_changes_nothing(workshop: Workshop, rejected: str):
    """Z10: six timings, one sequence of samples."""
    runs = [all_that_was_trained(workshop.run(timing, **scenario(rejected, workshop))) for timing in TIMINGS]
    assert len(runs[0][1]) == NUM_STEPS * GROUPS_PER_STEP * GROUP_SIZE
    for timing, other in zip(TIMINGS[1:], runs[1:], strict=True):
        assert other == runs[0], timing


def test_seeds_make_different_runs(workshop: Workshop):
    first, again, other = (all_that_was_trained(workshop.run(seed=seed)) for seed in (1, 1, 2))
    assert first == again
    texts = [{tuple(sample["token_ids"]) for sample in run[1]} for run in (first, other)]
    assert len(texts[0] & texts[1]) < len(texts[0]) / 10


@pytest.mark.parametrize("timing", [SLOW_ROLLOUT, SLOW_TRAINER], ids=["slow rollout", "slow trainer"])
@pytest.mark.parametrize("max_staleness", [0, 1, 3])
@pytest.mark.parametrize("rejected", ["equal rewards", "a filter"])
def test_batches_stay_full_while_half_of_the_groups_are_rejected(
    workshop: Workshop, rejected: str, max_staleness: int, timing: Timing
):
    """Z11: within the bound, in ticket order, every ticket told once and in the step that passed it over."""
    notes = played(workshop.run(timing, max_staleness=max_staleness, **scenario(rejected, workshop)))
    told: list[int] = []
    for step in range(1, NUM_STEPS + 1):
        trained = [g.id for g in notes.groups[step] if not g.rejected]
        passed_over = [g.id for g in notes.groups[step] if g.rejected]
        assert len(trained) == GROUPS_PER_STEP
        assert trained == sorted(trained)
        assert [s.group for s in notes.samples[step]] == [g for g in trained for _ in range(GROUP_SIZE)]
        assert sorted(trained + passed_over) == list(range(len(told), trained[-1] + 1))
        assert notes.metrics[step]["rollout/rejected_groups"] == len(passed_over)
        told += trained + passed_over
    num_trained = NUM_STEPS * GROUPS_PER_STEP
    assert 0.25 < 1 - num_trained / len(told) < 0.75, "the test is about rejecting half"
    measured = staleness(notes)
    assert max(measured.values()) <= max_staleness
    assert max_staleness == 0 or max(measured.values()) > 0


def test_rejections_are_counted_per_step_however_far_rollout_is_ahead(workshop: Workshop):
    """With room for 18 more groups the workers reject more than a step's limit while the oldest group is unfinished."""

    class SlowFirstGroup(ScriptedEngine):
        async def generate(self, prompt_ids: Any, sampling: Any) -> Completion:
            if self.num_calls < GROUP_SIZE:
                self.num_calls += 1
                await asyncio.sleep(0.3)
            return await super().generate(prompt_ids, sampling)

        num_calls = 0

    run = workshop.run(
        max_staleness=6,
        engine=SlowFirstGroup(workshop.digits),
        limits=Limits(rejected=12, failed=4),
        group_filter=lambda group: group.id % 4 == 0,
        num_steps=6,
    )
    notes = played(run)
    assert [notes.metrics[step]["rollout/rejected_groups"] for step in range(2, 7)] == [9.0] * 5


class Stuck(TimedTrainer):
    """Busy for longer than any test runs, from its second update on."""

    async def forward_backward(self, minibatch: Any, loss: Callable[..., Any] | None) -> Any:
        if self.updates:
            await asyncio.sleep(3600)
        return await super().forward_backward(minibatch, loss)


def counted(workshop: Workshop) -> tuple[ScriptedEngine, list[int]]:
    seeds: list[int] = []

    def script(prompt_ids: Any, sampling: Any) -> list[int]:
        seeds.append(sampling.seed)
        return workshop.digits(prompt_ids, sampling)

    return ScriptedEngine(script), seeds


@pytest.mark.parametrize("max_staleness", [0, 2])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"algorithm": "dapo", "reward": lambda *_: 1.0}, "all rewards equal (1)"),
        ({"group_filter": lambda group: False}, "rollout.filter"),
    ],
)
def test_a_run_in_which_everything_is_rejected_ends(
    workshop: Workshop, changes: dict[str, Any], reason: str, max_staleness: int
):
    """Z16: it says why and which setting bounds it, after about as many groups as that."""
    engine, seeds = counted(workshop)
    limits = Limits(rejected=20, failed=4)
    with pytest.raises(RolloutError) as error:
        finish(train(workshop.run(engine=engine, max_staleness=max_staleness, limits=limits, **changes)))
    assert "21 groups were rejected" in str(error.value)
    assert "rollout.max_rejected_groups" in str(error.value)
    assert reason in str(error.value)
    assert len(seeds) <= (21 + 3 * GROUPS_PER_STEP * (max_staleness + 1)) * GROUP_SIZE


def test_a_run_in_which_every_prompt_is_too_long_ends_even_when_they_are_skipped(workshop: Workshop):
    engine = ScriptedEngine(workshop.digits, max_model_len=20)
    with pytest.raises(RolloutError, match=r"31 groups were rejected .*prompt too long: a prompt of \d+ tokens"):
        finish(train(workshop.run(engine=engine, long_prompts="skip")))


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_run_in_which_every_sample_fails_ends(workshop: Workshop, max_staleness: int):
    """Z7, Z15: nothing is trained, and the error of the samples is told."""

    async def broken(prompt: Prompt, policy: Any) -> Trajectory:
        await policy.respond(prompt.messages)
        raise ConnectionError("no such host")

    run = workshop.run(environment=broken, max_staleness=max_staleness)
    with pytest.raises(RolloutError, match=r"4 groups in a row .*ConnectionError: no such host.*max_failed_groups"):
        finish(train(run))
    assert run.trainer.updates == []  # type: ignore[attr-defined]


def test_a_failed_sample_is_no_zero_and_its_group_is_trained_without_it(workshop: Workshop):
    """Z7, Z15: with a reward of 5 for all that is scored, any error that became a score would move the mean."""
    num_calls = 0

    async def fails_every_third_time(prompt: Prompt, policy: Any) -> Trajectory:
        nonlocal num_calls
        num_calls += 1
        failing = num_calls % 3 == 0
        await policy.respond(prompt.messages)
        if failing:
            raise ValueError("bad state")
        return Trajectory(policy.turns)

    run = workshop.run(environment=fails_every_third_time, reward=lambda *_: 5.0, group_size=3, num_steps=4)
    notes = played(run)
    for step in range(1, 5):
        assert [s.reward for s in notes.samples[step]] == [5.0] * 2 * GROUPS_PER_STEP
        assert all(s.advantages == [0.0] * len(s) for s in notes.samples[step])
        assert notes.metrics[step]["rollout/reward"] == 5.0
        assert notes.metrics[step]["rollout/outcome/error"] == GROUPS_PER_STEP
    kinds = [kind for kind, message in notes.events if "1 of 3 samples have no score" in message]
    assert kinds == ["no_score"] * 4 * GROUPS_PER_STEP


def failing_from(call: int, error: BaseException) -> Callable[..., None]:
    """A function that raises `error` at that call and every later one."""
    num_calls = 0

    def step(*_: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls >= call:
            raise error

    return step


def failing_environment(fails: Callable[[], None]) -> Callable[..., Any]:
    async def environment(prompt: Prompt, policy: Any) -> Trajectory:
        fails()
        await policy.respond(prompt.messages)
        return Trajectory(policy.turns)

    return environment


def broken_run(workshop: Workshop, what: str, error: Exception, **changes: Any) -> Run:
    """Fine for the first steps, then `what` raises `error`."""
    fails = failing_from(11, error)

    parts = {
        "environment": lambda: {"environment": failing_environment(fails)},
        "rubric": lambda: {"reward": lambda prompt, t: fails() or float(t.response)},
        "filter": lambda: {"group_filter": lambda group: fails() or True},
    }
    return workshop.run(Timing(engine_s=0.001), **(parts[what]() | changes))


FAILURES = [
    ("environment", DataError("no such table"), DataError, "no such table"),
    ("rubric", RewardError("no process"), RewardError, "no process"),
    ("rubric", RuntimeError("a bug"), RuntimeError, "a bug"),
    ("filter", KeyError("depth"), EnvironmentError_, "rollout.filter, on the group of prompt"),
]


@pytest.mark.parametrize("busy", [False, True], ids=["", "trainer busy"])
@pytest.mark.parametrize(("what", "error", "expected", "text"), FAILURES)
def test_what_ends_a_worker_is_what_the_caller_sees(
    workshop: Workshop, what: str, error: Exception, expected: type[Exception], text: str, busy: bool
):
    """At once, whatever the trainer does; and what caused it is still attached, for the traceback."""
    changes: dict[str, Any] = {"trainer": Stuck(), "max_staleness": 3} if busy else {}
    start = time.monotonic()
    with pytest.raises(Exception) as caught:
        finish(train(broken_run(workshop, what, error, **changes)))
    assert time.monotonic() - start < 5
    assert type(caught.value) is expected
    assert text in str(caught.value)
    assert error in (caught.value, caught.value.__cause__)


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_an_engine_that_only_fails_ends_the_run(workshop: Workshop, max_staleness: int):
    """By the limit for groups without a score, and with the engine's own words."""
    fails = failing_from(11, ValueError("boom"))
    run = workshop.run(script=lambda ids, s: fails() or workshop.digits(ids, s), max_staleness=max_staleness)
    with pytest.raises(RolloutError, match=r"4 groups in a row .*the script of the scripted engine: ValueError: boom"):
        finish(train(run))


def test_weights_that_cannot_be_published_end_the_run(workshop: Workshop):
    """An engine that went on with old weights would be one whose samples nobody could trust."""

    class Engine(ScriptedEngine):
        async def update_weights(self, weights: Any, version: int) -> int:
            if version == 2:
                raise EngineError("no room for the weights")
            return await super().update_weights(weights, version)

    run = workshop.run(engine=Engine(workshop.digits))
    with pytest.raises(EngineError, match="no room for the weights"):
        finish(train(run))
    assert run.step == 2


def test_what_fails_at_once_does_not_fail_without_end_while_the_trainer_is_busy(workshop: Workshop):
    """A rejected group gives its slot back, so workers would go through all prompts before anyone looks at a limit."""
    fails, rejected = failing_from(GROUPS_PER_STEP * GROUP_SIZE + 1, OSError("gone")), 12
    run = workshop.run(
        environment=failing_environment(fails),
        trainer=Stuck(),
        max_staleness=3,
        limits=Limits(rejected=rejected, failed=1000),
    )

    async def busy() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await train(run)

    finish(busy())
    assert rejected < run.buffer.next_ticket < rejected + 5 * GROUPS_PER_STEP


def test_prompts_that_end_are_an_error_of_the_run(workshop: Workshop):
    run = workshop.run()
    fails, prompts = failing_from(5, DataError("the file is gone")), run.prompts

    class Ending:
        def __getitem__(self, position: int) -> Prompt:
            fails()
            return prompts[position]

        def changed(self) -> str:
            return ""

    run.prompts = Ending()
    with pytest.raises(DataError, match="the file is gone"):
        finish(train(run))


class Refusing(TimedTrainer):
    """Refuses the fourth update, while the workers play on."""

    async def optim_step(self) -> Any:
        if len(self.updates) == 4:
            await asyncio.sleep(0.01)
            raise NonFiniteError("the gradient norm is nan")
        return await super().optim_step()


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_refused_update_ends_the_run_and_leaves_its_batch_on_record(workshop: Workshop, max_staleness: int):
    run = workshop.run(trainer=Refusing(), max_staleness=max_staleness)
    with pytest.raises(NonFiniteError, match="the gradient norm is nan"):
        finish(train(run))
    notes: Any = run.tracker
    assert notes.events == [("non_finite", "the gradient norm is nan")]
    assert list(notes.metrics) == [1]
    assert list(notes.groups) == [1, 2]
    assert len(notes.samples[2]) == GROUPS_PER_STEP * GROUP_SIZE


@pytest.fixture
def _heeds_ctrl_c() -> Iterator[None]:
    """A process that a shell started in the background ignores the signal, and asyncio then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heeds_ctrl_c")
@pytest.mark.parametrize("max_staleness", [0, 2])
def test_ctrl_c_leaves_nothing_behind(workshop: Workshop, max_staleness: int):
    """A real signal, while workers and trainer are all in the middle of something."""

    async def interrupted() -> None:
        asyncio.get_running_loop().call_later(0.03, signal.raise_signal, signal.SIGINT)
        await train(workshop.run(SLOW_ROLLOUT, trainer=Stuck(), max_staleness=max_staleness))

    with pytest.raises(KeyboardInterrupt):
        finish(interrupted())


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_cancelled_run_is_cancelled_and_not_failed(workshop: Workshop, max_staleness: int):
    async def cancelled() -> None:
        task = asyncio.create_task(train(workshop.run(SLOW_ROLLOUT, max_staleness=max_staleness)))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    finish(cancelled())


def test_the_next_groups_are_sampled_while_the_ledger_is_written(workshop: Workshop):
    """With no staleness too: a slow disk holds nobody up."""
    asked = threading.Semaphore(0)

    class SlowDisk(Notes):
        def log_groups(self, step: int, *args: Any) -> None:
            for _ in range(0 if step == NUM_STEPS else GROUPS_PER_STEP * GROUP_SIZE):
                assert asked.acquire(timeout=10), f"nothing was sampled while step {step} was written"
            super().log_groups(step, *args)

    def script(*args: Any) -> list[int]:
        asked.release()
        return workshop.digits(*args)

    run = workshop.run(script=script, tracker=SlowDisk())
    take = run.buffer.take

    async def taken(*args: Any) -> list[Group]:
        groups = await take(*args)
        while run.step == 0 and asked.acquire(blocking=False):
            pass  # those of the first step, which no ledger waits for
        return groups

    run.buffer.take = taken  # type: ignore[method-assign]
    assert len(played(run).groups) == NUM_STEPS


def test_rewards_are_computed_while_others_of_the_group_and_other_groups_are_sampled(workshop: Workshop):
    """The last sample of each step is answered only when all others have their reward."""
    others = GROUPS_PER_STEP * GROUP_SIZE - 1
    scored = asyncio.Semaphore(0)
    started = 0

    async def environment(prompt: Prompt, policy: Any) -> Trajectory:
        nonlocal started
        started += 1
        is_last = started % (others + 1) == 0
        for _ in range(others if is_last else 0):
            await scored.acquire()
        await policy.respond(prompt.messages)
        return Trajectory(policy.turns, "last" if is_last else "answered")

    def reward(prompt: Prompt, trajectory: Trajectory) -> float:
        if trajectory.stop_reason != "last":
            scored.release()
        return float(trajectory.response)

    assert len(played(workshop.run(environment=environment, reward=reward)).groups) == NUM_STEPS
