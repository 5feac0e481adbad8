"""What fails in the embedded engine fails for those it concerns, and the engine can be used again."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from models import tiny_model
from sluice.engines import slots
from sluice.engines.embedded import EmbeddedEngine
from sluice.engines.packed import PackedDecoder
from sluice.errors import EngineError
from sluice.trainers.model import PolicyModel
from sluice.types import Completion, Sampling

PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10, 11, 12, 13, 14], [15]]
ASKED = [(PROMPTS[k % 3], Sampling(max_new_tokens=8 + k, seed=k, stop=("#",))) for k in range(9)]


def letters(ids: Sequence[int]) -> str:
    return "".join(chr(97 + i % 26) for i in ids)


def engine_of(model: PolicyModel, decode: Callable[..., str] = letters, num_slots: int = 4) -> EmbeddedEngine:
    return EmbeddedEngine(model, decode, vocab_size=128, num_slots=num_slots)


async def answers(engine: EmbeddedEngine, asked: Sequence[tuple[Any, Sampling]] = ASKED) -> list[Any]:
    """A completion or an exception for each."""
    return await asyncio.gather(*(engine.generate(*one) for one in asked), return_exceptions=True)


def tokens(completions: Sequence[Completion]) -> list[list[int]]:
    return [c.token_ids for c in completions]


def is_empty(engine: EmbeddedEngine) -> bool:
    return not (engine._active or engine._waiting or engine._wanted or engine._prefixes or engine._driver)


@pytest.fixture(scope="module")
def model() -> PolicyModel:
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def undisturbed(model: PolicyModel) -> list[Completion]:
    return asyncio.run(answers(engine_of(model)))


@pytest.mark.parametrize("broken", [0, 4, 8])
def test_a_text_that_cannot_be_decoded_fails_its_request_alone(
    model: PolicyModel, undisturbed: list[Completion], broken: int
):
    """In the first slots, in the middle and in one that is filled later; its slot goes to the next request."""
    beginning = undisturbed[broken].token_ids[:3]

    def decode(ids: Sequence[int]) -> str:
        if list(ids[-3:]) == beginning:
            raise UnicodeError("no such bytes")
        return letters(ids)

    async def twice() -> None:
        engine = engine_of(model, decode)
        for _ in range(2):
            got = await answers(engine)
            assert isinstance(got[broken], EngineError)
            assert "stop strings: UnicodeError: no such bytes" in str(got[broken])
            assert isinstance(got[broken].__cause__, UnicodeError)
            others = [k for k in range(len(ASKED)) if k != broken]
            assert tokens([got[k] for k in others]) == tokens([undisturbed[k] for k in others])
            assert is_empty(engine)

    asyncio.run(twice())


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([3, 128], "the token id 128: the model has the ids 0 to 127"),
        ([-1, 3], "the token id -1"),
        ([3, "a"], "holds a str"),
        ([3, 4.0], "holds a float"),
        ([], "an empty prompt"),
    ],
)
def test_foreign_ids_fail_their_request_alone(
    model: PolicyModel, undisturbed: list[Completion], ids: list[Any], text: str
):
    """They are looked up side by side with those of other prompts."""

    async def among_others() -> None:
        engine = engine_of(model)
        got = await answers(engine, [*ASKED[:5], (ids, ASKED[0][1]), *ASKED[5:]])
        failed = got.pop(5)
        assert isinstance(failed, EngineError)
        assert text in str(failed)
        assert tokens(got) == tokens(undisturbed)
        assert is_empty(engine)

    asyncio.run(among_others())


CAT = torch.cat


def failing_once(real: Callable[..., Any], call: int) -> Callable[..., Any]:
    """`real`, but its `call`-th call runs out of memory."""
    num_calls = 0

    def function(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        # of `torch.cat`, which models call too, the calls that add a row to the stop table
        num_calls += real is not CAT or args[0][0].dtype == torch.bool
        if num_calls == call:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return real(*args, **kwargs)

    return function


@pytest.mark.parametrize(
    ("where", "name", "call"),
    [
        ("model", "hidden_states", 1),  # a prompt
        ("decoder", "hidden", 5),  # a decode step
        ("model", "logits", 5),
        ("slots", "_grown", 2),  # the keys of one layer have grown and those of the next have not
        ("torch", "cat", 1),  # a row of the stop table has its number and is not there
    ],
)
def test_a_step_that_fails_fails_all_in_flight_and_the_engine_works_again(
    monkeypatch: pytest.MonkeyPatch,
    model: PolicyModel,
    undisturbed: list[Completion],
    where: str,
    name: str,
    call: int,
):
    owner = {"model": model, "decoder": PackedDecoder, "slots": slots, "torch": torch}[where]
    fails = failing_once(getattr(owner, name), call)

    async def twice() -> None:
        engine = engine_of(model)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            failed = await answers(engine)
        assert all(isinstance(error, EngineError) for error in failed)
        assert len(set(map(id, failed))) == len(failed), "each its own, or their tracebacks pile up"
        assert "OutOfMemoryError: tried to allocate 2 GiB (9 completions were in flight)" in str(failed[0])
        assert is_empty(engine)
        assert tokens(await answers(engine)) == tokens(undisturbed)

    asyncio.run(twice())


def test_what_a_failed_step_held_is_freed_before_the_next_try(monkeypatch: pytest.MonkeyPatch, model: PolicyModel):
    """A traceback holds every local variable on its way, and after out of memory there is no room for them."""
    held: list[weakref.ref[torch.Tensor]] = []

    def runs_out(*args: Any, **kwargs: Any) -> Any:
        large = torch.zeros(1000)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("no room")

    engine = engine_of(model)

    async def once() -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(model, "hidden_states", runs_out)
            return (await answers(engine))[0]

    error = asyncio.run(once())
    gc.collect()
    assert error.__cause__.__traceback__ is not None
    assert [ref() for ref in held] == [None]


def test_a_closed_engine_refuses_at_once(model: PolicyModel):
    async def closed() -> None:
        engine = engine_of(model)
        waiting = asyncio.create_task(engine.generate(*ASKED[0]))
        await asyncio.sleep(0)
        await engine.close()
        for call in (waiting, engine.generate(*ASKED[0])):
            with pytest.raises(EngineError, match="closed"):
                await asyncio.wait_for(call, 5)

    asyncio.run(closed())
