"""From a prompt to a scored group: what environments may do, what they may do wrong, and what becomes of it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest

from dry_runs import Notes, Timing, Workshop, finish
from sluice.algorithms import assign_advantages
from sluice.data.samples import to_samples
from sluice.engines.scripted import ScriptedEngine
from sluice.errors import EnvironmentError_, PromptTooLongError
from sluice.rollout.worker import rollout_group, rollout_workers
from sluice.run import Run
from sluice.train import train
from sluice.types import Completion, Group, Prompt, Sample, Trajectory


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop.make(tmp_path_factory.mktemp("workshop"))


def played(run: Run, ticket: int = 3) -> Group:
    return finish(rollout_group(run, ticket, run.prompts[0]))


def samples_with_advantages(run: Run, group: Group) -> list[Sample]:
    samples = to_samples([group])
    assign_advantages(run.algorithm, samples)
    return samples


async def raising(policy: Any) -> Trajectory:
    raise ValueError("bad state")


async def cancelling(policy: Any) -> Trajectory:
    """Waits for something that was cancelled, not for the run's end."""
    helper = asyncio.create_task(asyncio.sleep(60))
    asyncio.get_running_loop().call_soon(helper.cancel)
    await helper
    raise AssertionError


async def too_slow(policy: Any) -> Trajectory:
    async with asyncio.timeout(0.001):
        await asyncio.sleep(60)
    raise AssertionError


async def exiting(policy: Any) -> Trajectory:
    sys.exit(0)


async def reporting(policy: Any) -> Trajectory:
    return Trajectory(policy.turns, outcome="error", error="no such room")


async def returning_text(policy: Any) -> Any:
    return policy.turns[-1].completion.text


async def returning_nothing_new(policy: Any) -> Trajectory:
    return Trajectory([])


def sometimes(misbehave: Callable[[Any], Any], times: int) -> Callable[..., Any]:
    """An environment that misbehaves in its first trajectories, after the policy has answered."""
    num_calls = 0

    async def environment(prompt: Prompt, policy: Any) -> Trajectory:
        nonlocal num_calls
        num_calls += 1
        bad = num_calls <= times
        await policy.respond(prompt.messages)
        return await misbehave(policy) if bad else Trajectory(policy.turns, "answered")

    return environment


MISBEHAVIOUR = [
    (raising, "ValueError: bad state"),
    (cancelling, "CancelledError()"),
    (too_slow, "TimeoutError"),
    (exiting, "SystemExit(0)"),
    (reporting, "no such room"),
    (returning_text, "TypeError: returned str, not a Trajectory"),
    (returning_nothing_new, "without a token of the policy"),
]


@pytest.mark.parametrize(("misbehave", "text"), MISBEHAVIOUR)
def test_a_failing_attempt_is_an_error_and_the_others_are_trained(
    workshop: Workshop, misbehave: Callable[[Any], Any], text: str
):
    """Z7, Z15: never a zero reward, never the end of the run or of its worker; baselines are taken without it."""
    run = workshop.run(environment=sometimes(misbehave, 2), group_size=5)
    group = played(run)
    assert [t.outcome for t in group.trajectories] == ["error"] * 2 + ["scored"] * 3
    for failed in group.trajectories[:2]:
        assert failed.reward is None
        assert text in failed.error
        assert misbehave is reporting or group.prompt.id in failed.error
        assert len(failed.turns) == 1, "what was said stays on record"
    assert not group.rejected
    samples = samples_with_advantages(run, group)
    assert [s.index for s in samples] == [2, 3, 4]
    assert sum(s.advantages[-1] for s in samples) == pytest.approx(0, abs=1e-6)
    assert len({s.reward for s in samples}) == 3
    notes: Any = run.tracker
    ((kind, message),) = notes.events
    assert kind == "no_score"
    for part in (group.prompt.id, "2 of 5 samples", text):
        assert part in message


@pytest.mark.parametrize(("num_failed", "rejected"), [(1, "1 of 2 samples scored, 2 needed"), (2, "0 of 2")])
def test_a_group_with_too_few_scores_is_rejected(workshop: Workshop, num_failed: int, rejected: str):
    group = played(workshop.run(environment=sometimes(raising, num_failed)))
    assert rejected in group.rejected
    assert to_samples([group]) == []


def test_an_environment_that_is_cancelled_from_within_does_not_stall_the_run(workshop: Workshop):
    """Its worker would be gone, its ticket never handed in, and the run would wait for ever (Z18)."""
    run = workshop.run(environment=sometimes(cancelling, 3), num_steps=4)
    finish(train(run))
    assert run.step == 4


def test_an_environment_is_cancelled_with_the_run(workshop: Workshop):
    """What it does then is not taken for a failure of its own."""
    cancelled: list[str] = []

    async def waits(prompt: Prompt, policy: Any) -> Trajectory:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(prompt.id)
            raise
        raise AssertionError

    async def work(run: Run) -> None:
        async with rollout_workers(run):
            await asyncio.sleep(0.01)

    run = workshop.run(environment=waits)
    finish(work(run))
    assert len(cancelled) == 6
    assert run.tracker.events == []  # type: ignore[attr-defined]


def counting(workshop: Workshop) -> ScriptedEngine:
    """Answers with how many end-of-sequence tokens it saw, so that every turn differs, and with its seed."""
    return ScriptedEngine(lambda ids, sampling: workshop.ids(f"{ids.count(1)}{sampling.seed % 1000}"))


async def two_turns(prompt: Prompt, policy: Any) -> Trajectory:
    messages = [*prompt.messages]
    messages += [await policy.respond(messages), {"role": "user", "content": "go on"}]
    await policy.respond(messages)
    return Trajectory(policy.turns, "done")


def test_two_turns_are_one_sample_and_only_the_answers_bear_a_loss(workshop: Workshop):
    """Z9: the sample is exactly the ids that the engine saw and gave."""
    run = workshop.run(environment=two_turns, engine=counting(workshop))
    group = played(run)
    samples = samples_with_advantages(run, group)
    assert [s.index for s in samples] == [0, 1]
    for sample, trajectory in zip(samples, group.trajectories, strict=True):
        first, second = trajectory.turns
        assert sample.token_ids == second.prompt_ids + second.completion.token_ids
        answers = first.completion.token_ids + second.completion.token_ids
        own = [w != 0 for w in sample.loss_weights]
        assert [t for t, mine in zip(sample.token_ids, own, strict=True) if mine] == answers
        n, m = len(first.prompt_ids), len(first.completion.token_ids)
        between = len(second.prompt_ids) - n - m
        assert between > 0
        weights = [0.0] * n + [1.0] * m + [0.0] * between + [1.0] * len(second.completion.token_ids)
        assert sample.loss_weights == weights
        assert sample.policy_versions == [0 if mine else -1 for mine in own]
        assert [a != 0 for a in sample.advantages] == own


def test_an_edited_history_gives_two_samples_with_one_advantage(workshop: Workshop):
    """And the trajectory counts once in its group: a baseline over samples would be another number."""

    async def forgetful(prompt: Prompt, policy: Any) -> Trajectory:
        await policy.respond(prompt.messages)
        if not forgotten:
            forgotten.append(prompt.id)
            await policy.respond([*prompt.messages, {"role": "user", "content": "now without your answer"}])
        return Trajectory(policy.turns, "done")

    forgotten: list[str] = []
    rewards = iter([1.0, 0.0, 0.0])
    run = workshop.run(environment=forgetful, group_size=3, algorithm="dr_grpo", reward=lambda *_: next(rewards))
    group = played(run)
    samples = samples_with_advantages(run, group)
    assert [len(t.turns) for t in group.trajectories] == [2, 1, 1]
    assert [s.index for s in samples] == [0, 0, 1, 2]
    for sample, turn in zip(samples[:2], group.trajectories[0].turns, strict=True):
        assert sample.token_ids == turn.prompt_ids + turn.completion.token_ids
    rewards_of = {s.index: s.reward for s in samples}
    mean = sum(rewards_of.values()) / 3
    for sample in samples:
        assert sample.advantages[-1] == pytest.approx(rewards_of[sample.index] - mean)


@pytest.mark.parametrize("edited", [0, 1], ids=["the task", "the answer"])
def test_a_message_edited_in_place_is_an_edited_history(workshop: Workshop, edited: int):
    """As when an environment strips the thinking from an answer: the policy must see what the environment says."""

    async def edits(prompt: Prompt, policy: Any) -> Trajectory:
        messages = [dict(message) for message in prompt.messages]
        messages += [await policy.respond(messages), {"role": "user", "content": "go on"}]
        messages[edited]["content"] = "edited"
        await policy.respond(messages)
        seen.append(messages)
        return Trajectory(policy.turns)

    seen: list[Any] = []
    group = played(workshop.run(environment=edits))
    for trajectory, messages in zip(group.trajectories, seen, strict=True):
        assert trajectory.turns[1].prompt_ids == workshop.chat.encode(messages)
    assert [s.index for s in to_samples([group])] == [0, 0, 1, 1]


def test_seeds_are_distinct_over_ticket_attempt_and_call(workshop: Workshop):
    """Also when an environment asks several times at once; and they depend on nothing else."""

    async def side_by_side(prompt: Prompt, policy: Any) -> Trajectory:
        await asyncio.gather(*(policy.respond(prompt.messages) for _ in range(3)))
        return Trajectory(policy.turns)

    def seeds(run_seed: int, timing: Timing) -> set[int]:
        seen: list[int] = []
        run = workshop.run(timing, environment=side_by_side, seed=run_seed, group_size=4)
        run.engine.script = lambda ids, sampling: seen.append(sampling.seed) or workshop.digits(ids, sampling)  # type: ignore[attr-defined]
        for ticket in range(5):
            played(run, ticket)
        assert len(set(seen)) == len(seen) == 5 * 4 * 3
        return set(seen)

    one, again, other = seeds(1, Timing()), seeds(1, Timing(engine_s=0.002)), seeds(2, Timing())
    assert one == again
    assert not one & other


def test_an_attempt_without_end_is_a_timeout_of_its_own(workshop: Workshop):
    """Z18: the others of its group are trained, the event names the setting, and the run goes on."""

    async def hangs(policy: Any) -> Trajectory:
        await asyncio.sleep(60)
        raise AssertionError

    run = workshop.run(environment=sometimes(hangs, 1), attempt_timeout_s=0.1, group_size=3)
    group = played(run)
    assert [t.outcome for t in group.trajectories] == ["timeout", "scored", "scored"]
    assert [s.index for s in to_samples([group])] == [1, 2]
    ((kind, message),) = run.tracker.events  # type: ignore[attr-defined]
    assert kind == "no_score"
    for part in (group.prompt.id, "after 0.1 s", "rollout.timeout_s"):
        assert part in message


@pytest.mark.parametrize("long_prompts", ["error", "skip"])
def test_a_conversation_that_outgrows_the_window_fails_alone(workshop: Workshop, long_prompts: str):
    """Its prompt had room, so neither is the prompt skipped nor does the run end."""

    async def talks_on(policy: Any) -> Trajectory:
        await policy.respond([{"role": "user", "content": "more " * 60}])
        raise AssertionError

    group = played(workshop.run(environment=sometimes(talks_on, 1), group_size=3, long_prompts=long_prompts))
    assert [t.outcome for t in group.trajectories] == ["error", "scored", "scored"]
    assert "window of 256" in group.trajectories[0].error
    assert group.prompt.id in group.trajectories[0].error


@dataclass
class LongNow:
    """The prompts of a stream, some of which are longer than the window."""

    prompts: Any
    too_long: Callable[[int], bool]

    def changed(self) -> str:
        return ""

    def __getitem__(self, position: int) -> Prompt:
        prompt = self.prompts[position]
        if self.too_long(position):
            return replace(prompt, messages=[{"role": "user", "content": "long " * 60}])
        return prompt


def test_a_prompt_without_room_ends_the_run(workshop: Workshop):
    """Naming the row, the lengths, and the option to go on without it."""
    run = workshop.run(max_staleness=1)
    run.prompts = LongNow(run.prompts, lambda number: number == 7)
    row = workshop.run().prompts[7]
    with pytest.raises(PromptTooLongError) as error:
        finish(train(run))
    for part in (f"prompt {row.id} ", f"({row.where})", "window of 256", "data.long_prompts=skip"):
        assert part in str(error.value)
    assert "tasks.jsonl:" in row.where


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_skipped_prompt_is_told_and_replaced(workshop: Workshop, max_staleness: int):
    """Steps stay full, and the prompts that are trained are all others in their order."""
    run = workshop.run(Timing(engine_s=0.001), max_staleness=max_staleness, long_prompts="skip", num_steps=4)
    run.prompts = LongNow(run.prompts, lambda number: number % 4 == 1)
    finish(train(run))
    stream = workshop.run().prompts
    rows = [stream[i] for i in range(20)]
    notes: Notes = run.tracker  # type: ignore[assignment]
    trained = [g.prompt.id for step in sorted(notes.groups) for g in notes.groups[step] if not g.rejected]
    assert trained == [row.id for i, row in enumerate(rows) if i % 4 != 1][: 4 * run.groups_per_step]
    skipped = [message for kind, message in notes.events if kind == "prompt_skipped"]
    for row in rows[1:14:4]:
        assert any(f"prompt {row.id} ({row.where}): a prompt of" in message for message in skipped)
    rejected = [g for step in sorted(notes.groups) for g in notes.groups[step] if g.rejected]
    assert all(g.rejected.startswith("prompt too long: ") and g.trajectories == [] for g in rejected)


def test_a_run_can_end_while_a_prompt_is_being_skipped(workshop: Workshop):
    """Up to Python 3.12 a TaskGroup that is ending on an error swallows a cancellation; the worker would wait for ever."""

    class SlowToStop(ScriptedEngine):
        num_calls = 0

        async def generate(self, prompt_ids: Any, sampling: Any) -> Completion:
            self.num_calls += 1
            if self.num_calls % 2:
                raise PromptTooLongError("no room")
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.02)
            raise AssertionError

    async def work(run: Run) -> None:
        async with rollout_workers(run):
            await asyncio.sleep(0.01)

    finish(work(workshop.run(engine=SlowToStop(workshop.digits), long_prompts="skip")), limit_s=2)


def test_a_filter_sees_scored_groups_that_carry_a_signal_and_rejects_by_name(workshop: Workshop):
    seen: list[Group] = []

    def group_filter(group: Group) -> bool:
        seen.append(group)
        return False

    assert played(workshop.run(group_filter=group_filter)).rejected == "rollout.filter"
    assert [t.outcome for t in seen[0].trajectories] == ["scored", "scored"]
    dull = workshop.run(group_filter=group_filter, algorithm="dapo", reward=lambda *_: 0.5)
    assert played(dull).rejected == "all rewards equal (0.5)"
    assert len(seen) == 1


def test_a_filter_that_raises_is_named_with_the_prompt(workshop: Workshop):
    run = workshop.run(group_filter=lambda group: SimpleNamespace().depth)
    prompt = run.prompts[0]
    with pytest.raises(EnvironmentError_, match=f"rollout.filter, on the group of prompt {prompt.id}: AttributeError"):
        finish(rollout_group(run, 0, prompt))


def test_attempts_share_nothing(workshop: Workshop):
    """Every attempt of every ticket has a policy, turns and seeds of its own, however they interleave."""
    run = workshop.run(Timing(engine_s=0.003), environment=two_turns, group_size=4)

    async def work() -> list[Group]:
        prompt = run.prompts[0]
        return await asyncio.gather(*(rollout_group(run, ticket, prompt) for ticket in range(3)))

    groups = finish(work())
    texts = [[turn.completion.text for turn in t.turns] for g in groups for t in g.trajectories]
    assert all(len(turns) == 2 for turns in texts)
    for one, other in product(range(12), repeat=2):
        assert one == other or texts[one] != texts[other]


async def talkative(prompt: Prompt, policy: Any) -> Trajectory:
    messages = list(prompt.messages)
    for _ in range(100):
        messages += [await policy.respond(messages), {"role": "user", "content": "go on"}]
    raise AssertionError


def test_a_conversation_that_outgrows_the_window_is_one_attempt_without_a_score(workshop: Workshop):
    """The prompt had room: neither is its row at fault, nor does the run end."""
    group = played(workshop.run(environment=talkative))
    assert {t.outcome for t in group.trajectories} == {"error"}
    assert all(t.stop_reason == "window" and len(t.turns) > 1 for t in group.trajectories)
    assert "leaves" in group.trajectories[0].error


async def waiting_for_ever(prompt: Prompt, policy: Any) -> Trajectory:
    await policy.respond(prompt.messages)
    await asyncio.Event().wait()
    raise AssertionError


def test_an_attempt_has_a_time_limit(workshop: Workshop):
    """Z18: a tool that never answers costs its attempt and says so; it does not hold the run."""
    group = played(workshop.run(environment=waiting_for_ever, attempt_timeout_s=0.2))
    assert {t.outcome for t in group.trajectories} == {"timeout"}
    assert "no end after 0.2 s (rollout.timeout_s), 1 turns" in group.trajectories[0].error


def test_an_error_of_an_environment_names_the_users_line(workshop: Workshop):
    async def broken(prompt: Prompt, policy: Any) -> Trajectory:
        raise ValueError("bad state")

    assert "test_worker.py:" in played(workshop.run(environment=broken)).trajectories[0].error
