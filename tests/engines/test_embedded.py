"""The embedded engine gives what the model says: same log-probs as the trainer, whatever is batched beside it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from models import CONFIGS, tiny_model
from sluice.data.batch import MicroBatch, Packing
from sluice.engines import embedded
from sluice.engines.embedded import EmbeddedEngine
from sluice.engines.sampling import sample_tokens
from sluice.errors import EngineError, PromptTooLongError
from sluice.trainers import local
from sluice.trainers.local import LocalTrainer
from sluice.trainers.model import PolicyModel
from sluice.trainers.optim import Optimizer, OptimizerSettings
from sluice.types import Completion, Sample, Sampling
from sluice.weights.in_process import InProcessWeights

PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10, 11, 12, 13, 14], [15]]
SETTINGS = OptimizerSettings(1e-4, 0, "constant", 0.0, (0.9, 0.95), 1e-15, 0.0, 1.0)
TRUNCATED = {"temperature": 0.7, "top_p": 0.9, "top_k": 20}
each_layout = pytest.mark.parametrize("layout", ["rows", "packed"])


def engine_of(model: PolicyModel, decode: Callable[..., str] = lambda ids: "", **settings: int) -> EmbeddedEngine:
    return EmbeddedEngine(model, decode, vocab_size=128, **settings)


def sampling(i: int, j: int, **changes: object) -> Sampling:
    settings: dict = {"max_new_tokens": 12 + 5 * j, "temperature": 0.6 + 0.2 * j, "seed": 100 * i + j}
    return Sampling(**(settings | {"stop_token_ids": frozenset([1, 50])} | changes))


def generate(engine: EmbeddedEngine, num: int = 4, **changes: object) -> list[Completion]:
    async def all_of_them() -> list[Completion]:
        asked = [engine.generate(p, sampling(i, j, **changes)) for i, p in enumerate(PROMPTS) for j in range(num)]
        return await asyncio.gather(*asked)

    return asyncio.run(all_of_them())


def samples_of(completions: list[Completion], num: int = 4) -> list[Sample]:
    samples = []
    for k, c in enumerate(completions):
        prompt, n = PROMPTS[k // num], len(PROMPTS[k // num])
        weights, logprobs = [0.0] * n + [1.0] * len(c.token_ids), [0.0] * n + c.logprobs
        versions = [-1] * n + c.policy_versions
        samples.append(Sample(prompt + c.token_ids, weights, logprobs, versions, c.temperature, k // num, k % num))
        samples[-1].kept_ids = [[]] * n + c.kept_ids if c.kept_ids else []
    return samples


def differences(model: PolicyModel, samples: list[Sample], layout: str) -> list[float]:
    """Trainer's minus engine's log-prob of each token."""
    trainer = LocalTrainer(model, None, Optimizer(model.model, SETTINGS, 1), Packing(1, 120, layout), reference=model)  # type: ignore[arg-type]
    asyncio.run(trainer.forward(samples, "old_logprobs"))
    asyncio.run(trainer.forward(samples, "ref_logprobs"))
    assert [s.ref_logprobs for s in samples] == [s.old_logprobs for s in samples], "the reference is the policy here"
    return [a - b for s in samples for a, b, w in zip(s.old_logprobs, s.logprobs, s.loss_weights, strict=True) if w]


@each_layout
@pytest.mark.parametrize("architecture", CONFIGS)
def test_trainer_and_engine_agree_on_every_token(architecture: str, layout: str) -> None:
    """R2, first half: decode through the slot cache = one forward over uneven lengths, to 1e-4 per token."""
    model = tiny_model(architecture)
    model.check()
    samples = samples_of(generate(engine_of(model, num_slots=5)))
    assert len({len(s) for s in samples}) > 4, "lengths should be uneven"
    errors = differences(model, samples, layout)
    assert max(map(abs, errors)) < 1e-4
    assert abs(sum(errors) / len(errors)) < 1e-5
    lowest = min(min(s.logprobs) for s in samples)
    assert lowest < -0.5, "a model that is sure of everything would hide a wrong log-prob"


def test_a_completion_does_not_depend_on_slots_or_neighbours() -> None:
    """Continuous batching changes who is decoded beside whom, and nothing else."""
    model = tiny_model("qwen3")
    wide = generate(engine_of(model, num_slots=64))
    for engine in (engine_of(model, num_slots=3), engine_of(model, num_slots=1, prefill_tokens=1)):
        for a, b in zip(wide, generate(engine), strict=True):
            assert a.token_ids == b.token_ids
            assert a.finish_reason == b.finish_reason
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_same_seed_same_completion_other_seed_other() -> None:
    engine = engine_of(tiny_model("qwen3"))
    first, second = generate(engine), generate(engine)
    assert [c.token_ids for c in first] == [c.token_ids for c in second]
    assert len({tuple(c.token_ids[:6]) for c in first}) > 6


def test_greedy_is_what_transformers_generates() -> None:
    model = tiny_model("llama")
    completions = generate(engine_of(model), temperature=0.0, stop_token_ids=frozenset())
    for k, completion in enumerate(completions):
        ids = torch.tensor([PROMPTS[k // 4]])
        n = len(completion.token_ids)
        expected = model.model.generate(ids, do_sample=False, max_new_tokens=n, min_new_tokens=n, eos_token_id=None)
        assert completion.token_ids == expected[0, ids.shape[1] :].tolist()


def test_prompt_is_computed_once_per_group(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    engine = engine_of(model, num_slots=5)
    rows = []
    real = model.hidden_states

    def counting(input_ids: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if input_ids.shape[1] > 1 or "cache" in kwargs:
            rows.append(len(input_ids))
        return real(input_ids, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "hidden_states", counting)
    generate(engine, num=8)  # 24 requests for 3 prompts, in several admissions
    assert sum(rows) == 3


def test_stop_ids_end_a_completion_and_are_kept() -> None:
    completions = generate(engine_of(tiny_model("qwen3")), stop_token_ids=frozenset(range(0, 128, 8)))
    for c in completions:
        stops = [i for i, token in enumerate(c.token_ids) if token % 8 == 0]
        assert stops == ([len(c.token_ids) - 1] if c.finish_reason == "stop" else [])
    assert any(c.finish_reason == "stop" for c in completions)


def test_stop_strings_end_a_completion() -> None:
    def letters(ids: list[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids)

    model = tiny_model("qwen3")
    free = generate(engine_of(model, letters), stop_token_ids=frozenset())
    target = letters(free[7].token_ids)[4:6]
    stopped = generate(engine_of(model, letters), stop_token_ids=frozenset(), stop=(target,))
    for before, after in zip(free, stopped, strict=True):
        text = letters(before.token_ids)
        end = text.find(target)
        assert letters(after.token_ids) == (text if end < 0 else text[: end + 2])
        assert after.finish_reason == ("length" if end < 0 else "stop")
    assert stopped[7].finish_reason == "stop"


def test_top_k_and_top_p_bound_what_is_sampled() -> None:
    model = tiny_model("qwen3")
    greedy = generate(engine_of(model), temperature=0.0)
    for changes in ({"top_k": 1}, {"top_p": 1e-6}, {"top_p": 1e-50}):
        completions = generate(engine_of(model), **changes)
        assert [c.token_ids for c in completions] == [c.token_ids for c in greedy]


def kept_naively(
    logits: torch.Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> tuple[list[int], float]:
    """Ids from the likeliest on until there are k or their probability reaches p, and that probability; float64 [V]."""
    probs = torch.softmax(logits.double() / temperature, -1)
    kept: list[int] = []
    for i in probs.argsort(descending=True).tolist():
        if (top_k and len(kept) == top_k) or (top_p < 1 and float(probs[kept].sum()) >= top_p):
            break
        kept.append(i)
    return kept, float(probs[kept].sum())


@pytest.mark.parametrize("truncation", [{"top_p": 0.8}, {"top_k": 5}, TRUNCATED], ids=str)
@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_logprobs_are_of_the_truncated_distribution(architecture: str, truncation: dict[str, Any]) -> None:
    """What the token was drawn from, renormalised, by the definition in float64; and exactly those ids are reported."""
    model = tiny_model(architecture)
    completions = generate(engine_of(model, num_slots=5), **truncation)
    sizes = []
    for k, c in enumerate(completions):
        prompt = PROMPTS[k // 4]
        settings = {"temperature": c.temperature} | truncation
        logits = model.model(input_ids=torch.tensor([prompt + c.token_ids])).logits[0, len(prompt) - 1 :].detach()
        assert len(c.kept_ids) == len(c.token_ids)
        for t, token in enumerate(c.token_ids):
            kept, total = kept_naively(logits[t], **settings)
            assert c.kept_ids[t] == sorted(kept)
            assert token in kept
            whole = torch.log_softmax(logits[t].double() / c.temperature, -1)[token]
            assert c.logprobs[t] == pytest.approx(float(whole) - math.log(total), abs=1e-4)
            sizes.append(len(kept))
    assert max(sizes) > 2, "a set of one has the log-prob 0, whatever is done"


@each_layout
@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_trainer_and_engine_agree_on_truncated_distributions(architecture: str, layout: str) -> None:
    """The ratio is 1 before the weights move, with top-p and top-k too; the reference looks at the same ids."""
    model = tiny_model(architecture)
    samples = samples_of(generate(engine_of(model, num_slots=5), **TRUNCATED))
    assert max(map(abs, differences(model, samples, layout))) < 1e-4
    assert min(min(s.logprobs) for s in samples) < -0.5


@pytest.mark.parametrize("mistake", ["other temperature", "no kept ids"])
def test_a_trainer_with_another_distribution_than_the_sampler_is_caught(
    monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    """Z19, planted: the measurement above can fail."""
    real = local.token_logprobs

    def wrong(model: Any, hidden: Any, batch: MicroBatch) -> Any:
        if mistake == "other temperature":
            return real(model, hidden, replace(batch, temperatures=torch.ones_like(batch.temperatures)))
        return real(model, hidden, replace(batch, kept_ids=batch.kept_ids[:0], kept_counts=batch.kept_counts[:0]))

    model = tiny_model("qwen3")
    samples = samples_of(generate(engine_of(model), **TRUNCATED))
    monkeypatch.setattr(local, "token_logprobs", wrong)
    assert max(map(abs, differences(model, samples, "rows"))) > 0.05


def test_truncated_and_whole_neighbours_do_not_touch() -> None:
    """Rows of one decode step may differ; a slot's kept ids move with it; what is drawn from whole has none."""
    model = tiny_model("qwen3")
    whole, truncated = generate(engine_of(model)), generate(engine_of(model), top_p=0.8)

    async def mixed() -> list[Completion]:
        engine = engine_of(model, num_slots=3)
        settings = [(i, j, {} if (i + j) % 2 else {"top_p": 0.8}) for i in range(3) for j in range(4)]
        return await asyncio.gather(*(engine.generate(PROMPTS[i], sampling(i, j, **s)) for i, j, s in settings))

    completions = asyncio.run(mixed())
    assert all(c.kept_ids == [] for c in whole)
    for k, c in enumerate(completions):
        alone = (whole if (k // 4 + k) % 2 else truncated)[k]
        assert (c.token_ids, c.kept_ids) == (alone.token_ids, alone.kept_ids)
        assert c.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
    assert sum(bool(c.kept_ids) for c in completions) == 6


def test_nothing_is_listed_where_nothing_is_truncated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without top-p and top-k there is no work per token; a top-k beyond the vocabulary gives the same completions."""
    model = tiny_model("qwen3")
    all_kept = generate(engine_of(model), top_k=128)
    monkeypatch.delattr(embedded, "kept_lists")
    whole = generate(engine_of(model))
    assert [(c.token_ids, c.kept_ids) for c in all_kept] == [(c.token_ids, []) for c in whole]


def test_a_running_sum_that_rises_on_a_dropped_token_draws_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As rounding does on a GPU: the log-prob of such a token would be -inf."""
    real = torch.Tensor.cumsum
    generator = torch.Generator().manual_seed(0)

    def rising(self: torch.Tensor, dim: int) -> torch.Tensor:
        sums = real(self, dim)
        return sums + 0.1 * torch.rand(sums.shape, generator=generator)

    monkeypatch.setattr(torch.Tensor, "cumsum", rising)
    rows = torch.ones(64)
    logits = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    drawn, logprobs, kept = sample_tokens(logits, torch.linspace(0, 0.99, 64), rows, top_p=rows, top_k=3 * rows.long())
    assert kept is not None
    assert kept.gather(1, drawn[:, None]).all()
    assert torch.isfinite(logprobs).all()


@pytest.mark.parametrize("vocabulary", [3, 64, 65, 500])
def test_what_is_drawn_is_the_inverse_of_the_cumulative_distribution(vocabulary: int) -> None:
    """In float64 and without blocks; where a draw lies on an edge either side is right."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, vocabulary, generator=generator)
    uniform = torch.rand(200, generator=generator)
    uniform[0] = 0.0
    uniform[1] = 1 - 2**-24
    drawn, logprobs, _ = sample_tokens(logits, uniform)
    probs = logits.double().softmax(-1)
    upper = probs.cumsum(-1).gather(1, drawn[:, None])[:, 0]
    lower = upper - probs.gather(1, drawn[:, None])[:, 0]
    assert (lower - 1e-6 <= uniform).all()
    assert (uniform <= upper + 1e-6).all()
    expected = probs.log().gather(1, drawn[:, None])[:, 0]
    assert logprobs.double() == pytest.approx(expected, abs=1e-5)


def test_a_prompt_without_room_is_refused_with_the_numbers() -> None:
    engine = engine_of(tiny_model("qwen3"), max_model_len=20)
    with pytest.raises(PromptTooLongError, match="prompt of 15 tokens leaves 5 of the window of 20 tokens, and 6 new"):
        asyncio.run(engine.generate(list(range(3, 18)), Sampling(max_new_tokens=6)))
    assert len(asyncio.run(engine.generate(list(range(3, 18)), Sampling(max_new_tokens=5))).token_ids) == 5


def test_another_models_weights_are_refused() -> None:
    """Z6: an engine that goes on with weights of its own would train on stale samples without a word."""
    engine = engine_of(tiny_model("qwen3"))
    with pytest.raises(EngineError, match="another one's weights"):
        asyncio.run(engine.update_weights(InProcessWeights(tiny_model("qwen3")), 1))


def test_new_weights_change_what_is_sampled_and_its_version() -> None:
    model = tiny_model("qwen3")
    engine = engine_of(model)
    before = generate(engine)
    with torch.no_grad():
        model.head.weight.mul_(-1.0)
    asyncio.run(engine.update_weights(InProcessWeights(model), 7))
    after = generate(engine)
    assert {v for c in after for v in c.policy_versions} == {7}
    assert [c.token_ids for c in before] != [c.token_ids for c in after]


@pytest.mark.parametrize("changes", [{}, TRUNCATED], ids=["plain", "truncated"])
def test_what_was_begun_is_continued_with_the_draws_that_come_next(changes: dict[str, Any]) -> None:
    """R8: from any token on, what comes is what would have come, and its log-probs are those of the whole sequence."""
    engine = engine_of(tiny_model("qwen3"))
    whole = generate(engine, **changes)

    async def rests(share: float) -> list[tuple[int, Completion]]:
        asked = []
        for k, completion in enumerate(whole):
            num = int(share * len(completion.token_ids))
            settings = sampling(k // 4, k % 4, **changes)
            rest = replace(settings, max_new_tokens=settings.max_new_tokens - num, num_drawn=num)
            asked.append((num, engine.generate(PROMPTS[k // 4] + completion.token_ids[:num], rest)))
        return [(num, await rest) for num, rest in asked]

    for share in (0.01, 0.4, 0.9):
        for completion, (num, rest) in zip(whole, asyncio.run(rests(share)), strict=True):
            assert rest.token_ids == completion.token_ids[num:]
            assert rest.finish_reason == completion.finish_reason
            assert rest.logprobs == pytest.approx(completion.logprobs[num:], abs=1e-4)
            assert rest.kept_ids == completion.kept_ids[num:]


def test_what_is_unfinished_is_the_beginning_of_what_comes_of_it() -> None:
    """At every moment, over a change of weights, and with more requests than slots."""
    model = tiny_model("qwen3")
    engine = EmbeddedEngine(model, lambda ids: "", vocab_size=128, num_slots=5, in_flight=True)
    changes = {"max_new_tokens": 30, **TRUNCATED}

    async def watched() -> tuple[list[Completion], list[dict[int, Completion]]]:
        asked = [
            asyncio.create_task(engine.generate(p, sampling(i, j, **changes)))
            for i, p in enumerate(PROMPTS)
            for j in range(4)
        ]
        seen: list[dict[int, Completion]] = []
        while not all(task.done() for task in asked):
            seen.append(await engine.unfinished())
            if len(seen) == 20:
                await engine.update_weights(InProcessWeights(model), 1)
            await asyncio.sleep(0)
        return [task.result() for task in asked], seen

    completions, seen = asyncio.run(watched())
    by_seed = dict(zip([100 * i + j for i in range(3) for j in range(4)], completions, strict=True))
    assert any(len(moment) == 5 for moment in seen)
    assert asyncio.run(engine.unfinished()) == {}
    for moment in seen:
        for seed, made in moment.items():
            whole, num = by_seed[seed], len(made.token_ids)
            assert 0 < num < len(whole.token_ids)
            assert made.finish_reason == "abort"
            assert made.token_ids == whole.token_ids[:num]
            assert made.logprobs == whole.logprobs[:num]
            assert made.policy_versions == whole.policy_versions[:num]
            assert made.kept_ids == whole.kept_ids[:num]
    assert any(len(set(whole.policy_versions)) == 2 for whole in completions)


def test_a_failing_model_fails_every_waiting_request(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")

    def broken(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    engine = engine_of(model)
    monkeypatch.setattr(model, "hidden_states", broken)
    with pytest.raises(EngineError, match="decoding failed: RuntimeError: out of memory"):
        generate(engine)


def test_cancelled_requests_give_their_slots_back() -> None:
    async def scenario() -> Completion:
        engine = engine_of(tiny_model("qwen3"), num_slots=2)
        long = Sampling(max_new_tokens=200)
        tasks = [asyncio.create_task(engine.generate([3, i], long)) for i in range(5)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return await asyncio.wait_for(engine.generate([4], Sampling(max_new_tokens=3)), 10)

    assert len(asyncio.run(scenario()).token_ids) == 3
