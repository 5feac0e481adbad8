"""The packed decoder computes what the model does, is used where it does, and never with old weights."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import torch

from models import CONFIGS, tiny_model
from sluice.engines import decoders
from sluice.engines.decoders import ModelDecoder, decoder_for
from sluice.engines.embedded import EmbeddedEngine
from sluice.engines.graphs import GraphedDecoder, rounded
from sluice.engines.packed import PackedDecoder
from sluice.engines.slots import SlotCache, spans
from sluice.engines.threads import StepThreads
from sluice.trainers.model import PolicyModel
from sluice.types import Completion, Sampling
from sluice.weights.in_process import InProcessWeights

CPU = torch.device("cpu")


def with_biases(model: PolicyModel) -> PolicyModel:
    """At initialisation they are 0, which hides one that is forgotten."""
    with torch.no_grad():
        for name, weight in model.named_weights():
            if name.endswith("bias") or "norm" in name:
                weight.add_(0.3 * torch.randn(weight.shape))
    return model


def completions_of(engine: EmbeddedEngine, num: int = 24, longest: int = 90) -> list[Completion]:
    """Prompts of several lengths, and completions that are mostly short and sometimes long."""
    lengths = random.Random(0)

    async def all_of_them() -> list[Completion]:
        asked = []
        for i in range(num):
            new = longest if i % 6 == 0 else lengths.randrange(1, 12)
            prompt = [3 + (i // 4 + t) % 100 for t in range(1 + i // 4)]
            asked.append(engine.generate(prompt, Sampling(max_new_tokens=new, seed=i)))
        return await asyncio.gather(*asked)

    return asyncio.run(all_of_them())


def engine_of(model: PolicyModel, num_slots: int = 10, cache_bytes: int | None = None) -> EmbeddedEngine:
    return EmbeddedEngine(model, lambda ids: "", vocab_size=128, num_slots=num_slots, cache_bytes=cache_bytes)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_models_built_like_a_llama_are_decoded_packed(architecture: str) -> None:
    expected = (
        PackedDecoder
        if architecture in ("qwen3", "qwen3_all_heads", "qwen2", "llama", "mistral_window")
        else ModelDecoder
    )
    assert type(decoder_for(tiny_model(architecture), StepThreads(CPU))) is expected


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama", "mistral_window"])
def test_packed_decoder_gives_what_the_models_own_forward_gives(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With slots that are freed, moved, sorted and cut into spans."""
    model = with_biases(tiny_model(architecture))
    packed = engine_of(model)
    assert isinstance(packed._decoder, PackedDecoder)
    packed._decoder.span_cost = 1.0  # as many spans as there can be
    monkeypatch.setattr(decoders, "is_llama_like", lambda model: False)
    own = engine_of(model)
    for a, b in zip(completions_of(packed), completions_of(own), strict=True):
        assert a.token_ids == b.token_ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_steps_rounded_up_for_a_gpus_graphs_give_the_same() -> None:
    """Without a GPU the graphs are left out, and the shapes are as there."""
    model = tiny_model("qwen3")
    graphed, plain = engine_of(model), engine_of(model)
    assert isinstance(graphed._decoder, PackedDecoder)
    graphed._decoder = decoder = GraphedDecoder(graphed._decoder)
    graphed._empty()
    for a, b in zip(completions_of(graphed), completions_of(plain), strict=True):
        assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    assert asyncio.run(graphed.fingerprint()) == asyncio.run(plain.fingerprint())
    assert len(decoder._steps) < 12
    assert {rounded(n, 128) for n in range(1, 1025)} == {128, 192, 256, 384, 512, 768, 1024}
    assert all(n <= rounded(n, 128) <= max(128, 1.5 * n) for n in range(1, 5000))


def test_a_decoder_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """An architecture may have the parts of a llama and compute something else with them."""
    real = PackedDecoder._through_mlp
    monkeypatch.setattr(PackedDecoder, "_through_mlp", lambda self, layer, x: real(self, layer, x) * 1.1)
    assert type(decoder_for(tiny_model("qwen3"), StepThreads(CPU))) is ModelDecoder


def test_publication_renews_the_packed_weights() -> None:
    model = tiny_model("qwen3")
    engine = engine_of(model)
    before = asyncio.run(engine.fingerprint())
    with torch.no_grad():
        for _, weight in model.named_weights():
            weight.mul_(0.9)
    stale = asyncio.run(engine.fingerprint())
    asyncio.run(engine.update_weights(InProcessWeights(model), 1))
    renewed = asyncio.run(engine.fingerprint())
    assert len({before, stale, renewed}) == 3
    fresh = engine_of(model)
    assert renewed == asyncio.run(fresh.fingerprint())
    assert [c.token_ids for c in completions_of(engine)] == [c.token_ids for c in completions_of(fresh)]


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
def test_fingerprint_is_of_what_is_decoded_with(part: str) -> None:
    """A copy that was not renewed is seen, whichever weight it is of."""
    model = tiny_model("qwen3")
    engine = engine_of(model)
    trainers = asyncio.run(engine.fingerprint())
    with torch.no_grad():
        next(weight for name, weight in model.named_weights() if part in name).add_(1.0)
    assert asyncio.run(engine.fingerprint()) == trainers, "the copy is as it was"
    asyncio.run(engine.update_weights(InProcessWeights(model), 1))
    assert asyncio.run(engine.fingerprint()) != trainers


def test_an_engine_that_learns_late_who_is_done_gives_the_same() -> None:
    """As on a GPU: sequences that are done stand still for a step or two before their slots are freed."""
    model = tiny_model("qwen3")
    late = engine_of(model)
    late._lags = True
    for a, b in zip(completions_of(late), completions_of(engine_of(model)), strict=True):
        assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


@pytest.mark.parametrize("cost", [0.0, 0.01, 10.0])
def test_spans_cover_every_slot_once_and_every_length(cost: float) -> None:
    draw = random.Random(0)
    for _ in range(50):
        lengths = [draw.randrange(1, 400) for _ in range(draw.randrange(1, 70))]
        found = spans(lengths, cost)
        assert [s.start for s in found] == [0, *(s.stop for s in found[:-1])]
        assert found[-1].stop == len(lengths)
        assert all(s.length == max(lengths[s.start : s.stop]) for s in found)
        if cost == 0:
            assert len(found) == 1


def test_threads_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products run on one thread; training goes on with all of them, also after a failure."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    engine = engine_of(tiny_model("qwen3"))
    completions_of(engine, num=2)
    assert set(told) == {1, 2}
    assert told[-1] == 2

    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._decoder, "hidden", broken)
    with pytest.raises(Exception, match="out of memory"):
        completions_of(engine, num=2)
    assert told[-1] == 2


@pytest.mark.parametrize("positions", [10, 400, 1500])
def test_a_bounded_cache_gives_the_same_with_fewer_sequences_at_once(
    positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences that no longer fit as they grow are asked again later; one alone may pass the bound."""
    model = tiny_model("qwen3")
    position_bytes = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head size, FP32
    bound = positions * position_bytes
    sizes: list[tuple[int, int]] = []
    write = SlotCache.write

    def noted(self: SlotCache, layer: int, *rest: Any) -> None:
        write(self, layer, *rest)
        sizes.append((sum(x.nbytes for x in (*self.keys, *self.values)), len(self.values[0])))

    engine = engine_of(model, cache_bytes=bound)
    monkeypatch.setattr(SlotCache, "write", noted)
    bounded = completions_of(engine)
    assert all(size <= bound or slots == 1 for size, slots in sizes)
    assert max(slots for _, slots in sizes) > 1 or positions == 10
    for a, b in zip(bounded, completions_of(engine_of(model)), strict=True):
        assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_a_longer_request_may_follow_when_few_slots_are_left() -> None:
    """Its state is wider than that of all before, and fewer slots are asked for than there are."""
    engine = engine_of(tiny_model("qwen3"))

    async def one_after_the_others() -> Completion:
        first = [engine.generate([3, 4], Sampling(max_new_tokens=30 if i < 2 else 3, seed=i)) for i in range(10)]
        others = [asyncio.create_task(request) for request in first]
        await asyncio.gather(*others[2:])
        last = await engine.generate([5, 6], Sampling(max_new_tokens=60, seed=9))
        await asyncio.gather(*others)
        return last

    assert len(asyncio.run(one_after_the_others()).token_ids) == 60


def test_a_bounded_cache_holds_for_prompts_that_are_longer_than_all_before() -> None:
    """Short ones come first and fill the slots; then the rows grow, and there must be fewer of them."""
    model = tiny_model("qwen3")
    position_bytes = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head size, FP32
    bound = 600 * position_bytes
    engine = engine_of(model, cache_bytes=bound)
    largest = 0
    decode = engine._decode

    def watched() -> None:
        nonlocal largest
        decode()
        cache = engine._active.cache
        largest = max(largest, sum(x.nbytes for x in (*cache.keys, *cache.values)))

    engine._decode = watched  # type: ignore[method-assign]

    async def all_of_them() -> list[Completion]:
        asked = [engine.generate([3, 4], Sampling(max_new_tokens=4 + 2 * i, seed=i)) for i in range(10)]
        asked += [engine.generate([7] * 180, Sampling(max_new_tokens=8, seed=i)) for i in range(6)]
        return await asyncio.gather(*asked)

    assert len(asyncio.run(all_of_them())) == 16
    assert 0 < largest <= bound
