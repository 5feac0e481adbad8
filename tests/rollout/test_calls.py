"""Half a completion survives a checkpoint: what was begun is continued, what was finished is not asked again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dry_runs import Workshop
from sluice import checkpoint
from sluice.engines.scripted import ScriptedEngine
from sluice.rollout.buffer import BufferState
from sluice.rollout.calls import Call, Calls, joined, rest_of
from sluice.rollout.worker import rollout_group
from sluice.run import Run
from sluice.types import Completion, Sampling, Trajectory

SIZE = 4
PROMPT = [3, 4]
SAMPLING = Sampling(max_new_tokens=8, seed=7)


def completion(*ids: int, version: int = 0, kept: bool = False) -> Completion:
    kept_ids = [[i, i + 1] for i in ids] if kept else []
    return Completion([*ids], [-0.5] * len(ids), "abort", [version] * len(ids), 1.0, kept_ids=kept_ids)


def begun(made: Completion, sampling: Sampling = SAMPLING) -> Completion | None:
    """What a call finds of an unfinished one in a checkpoint."""
    return Calls({sampling.seed: Call(0, PROMPT, made)}).begin(0, PROMPT, sampling)[0]


def test_two_parts_are_one_completion():
    whole = joined(completion(1, 2), replace(completion(3, version=4, kept=True), finish_reason="stop"))
    assert whole.token_ids == [1, 2, 3]
    assert whole.policy_versions == [0, 0, 4]
    assert whole.kept_ids == [[], [], [3, 4]]
    assert whole.finish_reason == "stop"
    rest = rest_of(SAMPLING, completion(1, 2, 3))
    assert (rest.max_new_tokens, rest.num_drawn, rest.seed) == (5, 3, 7)


def test_an_attempt_that_is_played_again_is_answered_what_it_was_answered():
    calls = Calls()
    assert calls.begin(3, PROMPT, SAMPLING) == (None, False)
    calls.finish(SAMPLING.seed, completion(1, 2))
    assert calls.begin(3, PROMPT, SAMPLING) == (completion(1, 2), True)
    assert calls.begin(3, [*PROMPT, 5], SAMPLING) == (None, False), "it says something else"
    calls.finish(SAMPLING.seed, completion(6))
    calls.forget(3)
    assert calls.begin(3, PROMPT, SAMPLING) == (None, False)


def test_the_experts_of_what_was_begun_stay():
    """What goes on computes all before it again, perhaps with other weights; the last token that was there is fed in only then."""
    first = replace(completion(1, 2), routed_experts=[b"p", b"q", b"a", b""])
    rest = replace(completion(3, version=4), routed_experts=[b"P", b"Q", b"A", b"B", b""])
    assert joined(first, rest).routed_experts == [b"p", b"q", b"a", b"B", b""]
    assert joined(first, completion(3)).routed_experts == [b"p", b"q", b"a", b"", b""]
    assert joined(completion(1, 2), rest).routed_experts == rest.routed_experts
    whole = replace(completion(*range(8)), routed_experts=[bytes([t]) for t in range(9)] + [b""])
    found = begun(whole)
    assert found is not None
    assert found.routed_experts == whole.routed_experts[: len(PROMPT) + 7]


def test_a_text_to_stop_at_may_begin_in_what_is_there():
    """Its last tokens are made again, since texts are searched in what is made anew."""
    made = completion(*range(10, 30))
    stopping = replace(SAMPLING, max_new_tokens=100, stop=("</a>", "x"))
    found = begun(made, stopping)
    assert found is not None
    assert found.token_ids == made.token_ids[: 20 - 8]
    assert begun(completion(1, 2, 3), stopping) is None
    full = begun(completion(*range(8)))
    assert full is not None
    assert len(full.token_ids) == 7, "there is something left to ask for"


def test_an_environment_that_says_something_else_begins_from_nothing():
    calls = Calls({7: Call(0, [9, 9], completion(1))})
    assert calls.begin(0, PROMPT, SAMPLING) == (None, False)
    assert calls.state([0]) == {}


def test_what_is_noted_is_of_open_calls_and_stays_what_the_engine_said():
    """An environment may edit what it was given; a later checkpoint holds what the one before it held, and what has come since."""
    calls = Calls({7: Call(0, PROMPT, completion(1)), 8: Call(1, PROMPT, completion(5))})
    given, _ = calls.begin(0, PROMPT, SAMPLING)
    assert given is not None
    given.token_ids.clear()
    calls.note({7: completion(2, version=1), 99: completion(3)})
    calls.note({7: completion(2, 3, version=1)})
    state = calls.state([0, 1])
    assert state[7].made == joined(completion(1), completion(2, 3, version=1))
    assert state[8].made == completion(5), "its worker has not come to it yet"
    assert calls.state([1]).keys() == {8}
    calls.finish(7, completion(1, 2, 3, 4))
    calls.note({7: completion(9)})
    assert calls.state([0])[7].is_finished
    calls.forget(0)
    assert calls.state([0, 1]).keys() == {8}
    calls.finish(7, completion(1))
    assert calls.state([0, 1]).keys() == {8}


class SlowEngine(ScriptedEngine):
    """Notes what it is asked. Of the second turn's answers two stay unfinished until it is `released`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: list[tuple[list[int], Sampling]] = []
        self.open: dict[int, Completion] = {}
        self.both_open, self.released = asyncio.Event(), asyncio.Event()

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        self.asked.append(([*prompt_ids], sampling))
        whole = await super().generate(prompt_ids, sampling)
        second = [ids for ids, _ in self.asked if len(ids) > len(self.asked[0][0])]
        if len(second) > SIZE - 2 and len(prompt_ids) > len(self.asked[0][0]):
            self.open[sampling.seed] = replace(
                whole, **{k: getattr(whole, k)[:2] for k in COLUMNS}, finish_reason="abort"
            )
            if len(self.open) == 2:
                self.both_open.set()
            await self.released.wait()
        return whole

    async def unfinished(self) -> dict[int, Completion]:
        return self.open


COLUMNS = ("token_ids", "logprobs", "policy_versions")


async def asks_twice(prompt: Any, policy: Any) -> Trajectory:
    messages = [*prompt.messages, await policy.respond(prompt.messages)]
    await policy.respond([*messages, {"role": "user", "content": "again"}])
    return Trajectory(policy.turns, stop_reason="asked twice")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop.make(tmp_path_factory.mktemp("workshop"))


def test_a_run_that_goes_on_asks_for_the_rest_only(workshop: Workshop, monkeypatch: pytest.MonkeyPatch):
    """Through the JSON of a checkpoint; the group is the one of an uninterrupted run."""

    def digits(prompt_ids: Sequence[int], sampling: Sampling) -> list[int]:
        """Always the same seven, from wherever it goes on."""
        return workshop.ids("1234567")[sampling.num_drawn :]

    def run_of(engine: ScriptedEngine, state: BufferState | None = None) -> Run:
        run = workshop.run(max_staleness=1, group_size=SIZE, engine=engine, environment=asks_twice)
        if state:
            run.buffer.__init__(run.groups_per_step, 1, run.buffer.limits, state)
        return run

    async def interrupted() -> dict[str, Any]:
        engine = SlowEngine(digits)
        run = run_of(engine)
        ticket = await run.buffer.admit()
        playing = asyncio.create_task(rollout_group(run, ticket, run.prompts[ticket]))
        async with asyncio.timeout(10):
            await engine.both_open.wait()
        await checkpoint.note_unfinished(run)
        playing.cancel()
        run.prompts.identity = dict  # type: ignore[attr-defined]
        return checkpoint.position_of(run, None)

    position = asyncio.run(interrupted())
    saved = checkpoint.Saved(Path(), 0, json.loads(json.dumps(position)), {}, {})

    async def resumed() -> tuple[SlowEngine, Any, Any]:
        engine, fresh = SlowEngine(digits), ScriptedEngine(digits)
        engine.released.set()
        run, other = run_of(engine, saved.buffer_state(SimpleNamespace(__getitem__=None))), run_of(fresh)
        ticket = await run.buffer.admit()
        group = await rollout_group(run, ticket, run.prompts[ticket])
        await run.buffer.put(group)
        assert run.buffer.state().calls == {}, "handed in"
        return engine, group, await rollout_group(other, ticket, other.prompts[ticket])

    engine, group, expected = asyncio.run(resumed())
    assert group.trajectories == expected.trajectories
    assert [sampling.num_drawn for _, sampling in engine.asked] == [2, 2], "the others were all finished"
    for prompt_ids, _ in engine.asked:
        assert prompt_ids[-2:] == workshop.ids("12")[:2]
