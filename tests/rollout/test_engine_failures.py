"""Generations that fail are tried again; what an environment returns is looked at before it can harm a step."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from dry_runs import GROUPS_PER_STEP, Notes, Workshop, finish
from sluice.data.samples import to_samples
from sluice.engines.scripted import ScriptedEngine
from sluice.errors import EngineError, PromptTooLongError
from sluice.rollout.worker import rollout_group
from sluice.run import Run
from sluice.train import train
from sluice.types import Completion, Group, Prompt, Trajectory, Turn


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop.make(tmp_path_factory.mktemp("workshop"))


def played(run: Run, ticket: int = 3) -> Group:
    return finish(rollout_group(run, ticket, run.prompts[ticket]))


class Flaky(ScriptedEngine):
    """Fails the first `failures` tries of the requests whose seed is `bad`, and of all where there is none."""

    def __init__(self, workshop: Workshop, failures: int, error: Exception, bad: int | None = None) -> None:
        super().__init__(workshop.digits)
        self.failures, self.error, self.bad = failures, error, bad
        self.tries = Counter[int]()

    async def generate(self, prompt_ids: Any, sampling: Any) -> Completion:
        self.tries[sampling.seed] += 1
        await asyncio.sleep(0)
        if self.tries[sampling.seed] <= self.failures and self.bad in (None, sampling.seed):
            raise self.error
        return await super().generate(prompt_ids, sampling)


def seeds_of(workshop: Workshop) -> list[int]:
    engine = Flaky(workshop, 0, EngineError(""))
    played(workshop.run(engine=engine))
    return list(engine.tries)


@pytest.mark.parametrize("error", [EngineError("slot lost"), RuntimeError("slot lost")], ids=repr)
def test_a_generation_that_fails_is_tried_again_with_its_seed(workshop: Workshop, error: Exception):
    """So the group is the one that would have been; the event names ticket, prompt and cause. Any exception is the engine's."""
    undisturbed = played(workshop.run())
    engine = Flaky(workshop, 2, error, bad=seeds_of(workshop)[1])
    run = workshop.run(engine=engine)
    group = played(run)
    assert group == undisturbed
    assert sorted(engine.tries.values()) == [1, 3]
    notes: Any = run.tracker
    assert [kind for kind, _ in notes.events] == ["engine_retry"] * 2
    for part in ("rollout 3.1, turn 1", f"prompt {group.prompt.id}", "slot lost", "rollout.engine_retries"):
        assert part in notes.events[0][1]


@pytest.mark.parametrize("retries", [0, 1, 2])
def test_the_last_failure_is_an_error_of_the_attempt(workshop: Workshop, retries: int):
    """Never a zero: it has no reward, and the other attempt of its group is as it was."""
    undisturbed = played(workshop.run(group_size=3))
    engine = Flaky(workshop, 100, EngineError("slot lost"), bad=seeds_of(workshop)[1])
    run = workshop.run(engine=engine, group_size=3, engine_retries=retries)
    group = played(run)
    assert [t.outcome for t in group.trajectories] == ["scored", "error", "scored"]
    failed = group.trajectories[1]
    assert (failed.reward, failed.stop_reason, failed.turns) == (None, "engine", [])
    for part in (f"prompt {group.prompt.id}", "slot lost", f"tried {retries + 1} times", "rollout.engine_retries"):
        assert part in failed.error
    assert [group.trajectories[i] for i in (0, 2)] == [undisturbed.trajectories[i] for i in (0, 2)]
    assert not group.rejected
    assert [s.index for s in to_samples([group])] == [0, 2]
    assert engine.tries[seeds_of(workshop)[1]] == retries + 1


def test_a_failure_of_all_requests_is_told_once_per_try(workshop: Workshop):
    """A step of the engine that runs out of memory fails every request, and a run has hundreds."""
    run = workshop.run(engine=Flaky(workshop, 2, EngineError("out of memory")), group_size=8)
    assert {t.outcome for t in played(run).trajectories} == {"scored"}
    notes: Any = run.tracker
    assert [kind for kind, _ in notes.events] == ["engine_retry"] * 2


def test_a_prompt_without_room_is_not_tried_again(workshop: Workshop):
    engine = Flaky(workshop, 100, PromptTooLongError("no room"))
    assert played(workshop.run(engine=engine, long_prompts="skip")).rejected == "prompt too long: no room"
    assert set(engine.tries.values()) == {1}


def test_retries_end_with_the_attempts_time_limit(workshop: Workshop):
    class Slow(ScriptedEngine):
        async def generate(self, prompt_ids: Any, sampling: Any) -> Completion:
            await asyncio.sleep(0.05)
            raise EngineError("slow and broken")

    run = workshop.run(engine=Slow(workshop.digits), engine_retries=1000, attempt_timeout_s=0.3)
    assert {t.outcome for t in played(run).trajectories} == {"timeout"}


def test_a_run_with_failing_requests_trains_every_other_sample_once(workshop: Workshop):
    """One request in seven fails for good, in whole steps."""

    class OneInSeven(ScriptedEngine):
        async def generate(self, prompt_ids: Any, sampling: Any) -> Completion:
            if sampling.seed % 7 == 0:
                raise EngineError("slot lost")
            return await super().generate(prompt_ids, sampling)

    run = workshop.run(engine=OneInSeven(workshop.digits), group_size=4, num_steps=6)
    finish(train(run))
    notes: Notes = run.tracker  # type: ignore[assignment]
    groups = [group for step in sorted(notes.groups) for group in notes.groups[step]]
    scored = [
        f"{g.prompt.id}#{g.id}.{i}" for g in groups for i, t in enumerate(g.trajectories) if t.outcome == "scored"
    ]
    assert len(scored) < 4 * len(groups)
    assert [g.id for g in groups] == list(range(6 * GROUPS_PER_STEP))
    trained = [name for update in run.trainer.updates for name in update]  # type: ignore[attr-defined]
    assert sorted(trained) == sorted(scored)


# What an environment returns


def edits(edit: Callable[[list[Turn]], Any]) -> Callable[..., Any]:
    """An environment whose first trajectory is edited before it is returned."""
    num_calls = 0

    async def environment(prompt: Prompt, policy: Any) -> Trajectory:
        nonlocal num_calls
        num_calls += 1
        first = num_calls == 1
        messages = list(prompt.messages)
        messages += [await policy.respond(messages), {"role": "user", "content": "go on"}]
        await policy.respond(messages)
        if first:
            edit(policy.turns)
        return Trajectory(policy.turns, "done")

    return environment


def keeps(completion: Completion, foreign: int) -> None:
    completion.kept_ids = [[token, foreign] for token in completion.token_ids]


def routes(turn: Turn, *experts: bytes) -> None:
    """The first tokens of a turn, by a model whose tokens take two experts of four."""
    turn.completion.routed_experts = [*experts, *[b""] * (len(turn.prompt_ids) + len(turn.completion.token_ids))]
    del turn.completion.routed_experts[-len(experts) :]


VOCAB_SIZE = 259
ROUTING = (2, 4)
EDITS = [
    ("an empty prompt", lambda turns: turns[0].prompt_ids.clear(), "turn 1 cannot be trained on: its prompt is empty"),
    ("a foreign id", lambda turns: turns[1].prompt_ids.append(VOCAB_SIZE), "turn 2 .* prompt_ids hold 259"),
    ("a negative id", lambda turns: turns[0].completion.token_ids.__setitem__(0, -100), "token_ids hold -100"),
    ("an id of text", lambda turns: turns[0].prompt_ids.append("7"), "prompt_ids hold a str"),
    ("ids of text", lambda turns: setattr(turns[0], "prompt_ids", "12"), "prompt_ids are of type str"),
    ("a token more", lambda turns: turns[1].completion.token_ids.append(5), "turn 2 .* fields must have one length"),
    ("a log-prob less", lambda turns: turns[0].completion.logprobs.pop(), "fields must have one length"),
    (
        "no number",
        lambda turns: turns[0].completion.logprobs.__setitem__(0, float("nan")),
        "logprobs are not all finite",
    ),
    (
        "a version to come",
        lambda turns: turns[0].completion.policy_versions.__setitem__(0, 9),
        "policy_versions hold 9",
    ),
    ("no temperature", lambda turns: setattr(turns[0].completion, "temperature", 0.0), "temperature is 0.0"),
    ("a foreign kept id", lambda turns: keeps(turns[0].completion, 999), "kept_ids hold 999"),
    (
        "a foreign expert",
        lambda turns: routes(turns[0], bytes([1, 0, 4, 0])),
        "routed_experts hold 4, and a layer has 4 experts",
    ),
    ("an expert too few", lambda turns: routes(turns[1], bytes([1, 0])), "2 experts as bytes, or none"),
    ("experts of no bytes", lambda turns: routes(turns[1], (1, 2)), "2 experts as bytes, or none"),
    (
        "experts of a longer prompt",
        lambda turns: (routes(turns[0], bytes(4)), turns[0].prompt_ids.append(5)),
        "routed_experts are not [0-9]+ times, for each token of prompt and response",
    ),
    ("no text", lambda turns: setattr(turns[0].completion, "text", None), "text is of type NoneType"),
    ("too much", lambda turns: turns[0].prompt_ids.extend([5] * 300), "more than the 256 positions"),
    ("no turn", lambda turns: turns.append("turn"), "turns are not a list of Turn"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("edit", "text"), [case[1:] for case in EDITS], ids=[case[0] for case in EDITS])
def test_what_cannot_be_trained_on_is_an_error_of_its_attempt(workshop: Workshop, edit: Callable[..., Any], text: str):
    """Z9, Z15: in the trainer, the ledger or the metrics it would be an error of the whole step, and end the run."""
    sizes = {"vocab_size": VOCAB_SIZE, "max_length": 256, "routing": ROUTING}
    run = workshop.run(environment=edits(edit), group_size=3, num_steps=2, **sizes)
    finish(train(run))
    notes: Notes = run.tracker  # type: ignore[assignment]
    group = notes.groups[1][0]
    assert [t.outcome for t in group.trajectories] == ["error", "scored", "scored"]
    failed = group.trajectories[0]
    assert failed.reward is None
    assert group.prompt.id in failed.error
    assert re.search(text, failed.error), failed.error
    for turn in failed.turns:  # what stays on record can be written
        assert all(type(i) is int and 0 <= i < VOCAB_SIZE for i in turn.prompt_ids + turn.completion.token_ids)
    assert [s.index for s in notes.samples[1][:2]] == [1, 2]
    assert len(notes.samples[1]) == 3 * GROUPS_PER_STEP - 1
    assert run.step == 2


def test_experts_without_replay_are_an_error(workshop: Workshop):
    environment = edits(lambda turns: routes(turns[0], bytes(4)))
    run = workshop.run(environment=environment, group_size=3, vocab_size=VOCAB_SIZE, max_length=256)
    failed, *_ = played(run).trajectories
    assert "rollout.routing_replay is off" in failed.error


def test_a_sound_conversation_passes(workshop: Workshop):
    run = workshop.run(environment=edits(lambda turns: None), group_size=3, vocab_size=VOCAB_SIZE, max_length=256)
    assert {t.outcome for t in played(run).trajectories} == {"scored"}
