"""Routing replay: the engine's experts with the trainer's gates, in every forward and backward; and what it is good for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranked import Setup, local_trainer, ranks, row, run, updated
from torch import Tensor, nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from models import MIXTURES, tiny_model
from sluice.data.batch import collate
from sluice.engines.embedded import EmbeddedEngine
from sluice.engines.routed import as_entries
from sluice.errors import ConfigError
from sluice.interfaces import Layout
from sluice.trainers.logprobs import token_logprobs
from sluice.trainers.lora import LoraModel
from sluice.trainers.model import PolicyModel, hidden_states_of
from sluice.trainers.routing import Gates, Routers, gates_of
from sluice.types import Completion, Sample, Sampling
from sluice.weights.in_process import InProcessWeights

LAYERS, TOP_K, EXPERTS = 2, 2, 8
each_mixture = pytest.mark.parametrize("architecture", MIXTURES)
each_layout = pytest.mark.parametrize("layout", ["rows", "packed"])


def mixture(architecture: str = "qwen3_moe", **settings: Any) -> PolicyModel:
    model = tiny_model(architecture, **settings)
    model.replay_routing()
    return model


def some_samples(
    lengths: Sequence[int] = (9, 6, 12, 7), groups: Sequence[int] = (0, 0, 1, 1), seed: int = 0
) -> list[Sample]:
    """Those of a group begin with the same three tokens, which took the same experts; of the last token of each nothing is known."""
    rng = np.random.default_rng(seed)
    prompts = {group: (rng.integers(3, 128, 3).tolist(), experts(rng, 3)) for group in sorted(set(groups))}
    samples = []
    for index, (length, group) in enumerate(zip(lengths, groups, strict=True)):
        prompt, routed = prompts[group]
        ids = prompt + rng.integers(3, 128, length - 3).tolist()
        weights = [0.0] * 3 + [1.0] * (length - 3)
        logprobs = [0.0] * 3 + rng.uniform(-6, -4, length - 3).tolist()
        sample = Sample(ids, weights, logprobs, [-1] * 3 + [0] * (length - 3), 0.8, group, index)
        sample.routed_experts = as_entries(np.concatenate([routed, experts(rng, length - 4)]), length)
        sample.advantages = [float(index - 1)] * length
        sample.old_logprobs = sample.logprobs
        samples.append(sample)
    return samples


def experts(rng: np.random.Generator, num: int) -> Any:
    """[num, layers, k] different ones for each token and layer, whatever any router says."""
    return np.argsort(rng.random((num, LAYERS, EXPERTS)), -1)[..., :TOP_K]


def without_routing(samples: Sequence[Sample]) -> list[Sample]:
    return [replace(sample, routed_experts=[]) for sample in samples]


def logprobs_of(model: PolicyModel, samples: Sequence[Sample], layout: Layout = "packed") -> list[list[float]]:
    """[loss tokens] of each sample."""
    batch = collate(samples, layout)
    with torch.no_grad():
        found = token_logprobs(model, hidden_states_of(model, batch), batch)
    return [found[batch.sequence_ids == i].tolist() for i in range(len(samples))]


# the formula


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@given(seed=st.integers(0, 1000), scale=st.sampled_from([1.0, 2.5]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_gates_are_those_of_the_paper(score: Any, seed: int, scale: float):
    """Ma et al. 2025, with the mask I of the engine and the trainer's logits s: g_i = I_i exp(s_i) / Σ_j I_j exp(s_j), in float64."""
    rng = np.random.default_rng(seed)
    logits, chosen = rng.normal(0, 3, (5, EXPERTS)), experts(rng, 5)[:, 0]
    mask = np.zeros_like(logits)
    np.put_along_axis(mask, chosen, 1.0, -1)
    values = np.exp(logits) if score == "softmax" else 1 / (1 + np.exp(-logits))
    everything = {True: (mask * values).sum(-1), False: values.sum(-1) if score == "softmax" else 1.0}
    for normalised, denominator in everything.items():
        gates = Gates(score, normalised, scale).of(torch.tensor(logits), torch.tensor(chosen)).double()
        spread = np.zeros_like(logits)
        np.put_along_axis(spread, chosen, gates.numpy(), -1)
        expected = scale * mask * values / np.broadcast_to(np.asarray(denominator), (5,))[:, None]
        np.testing.assert_allclose(spread, expected, rtol=1e-5)


def test_experts_that_the_trainer_would_never_take_have_gates_that_are_numbers():
    logits = torch.tensor([[0.0, -300.0, -300.0]])
    assert torch.isfinite(Gates("softmax", True).of(logits, torch.tensor([[1, 2]]))).all()


@each_mixture
def test_the_formula_of_an_architecture_is_found(architecture: str):
    model = tiny_model(architecture)
    routers = [module for module in model.body.modules() if "Router" in type(module).__name__]
    gates = {
        "qwen3_moe": Gates("softmax", True),
        "mixtral": Gates("softmax", True),
        "glm4_moe": Gates("sigmoid", True),
    }
    assert {gates_of("it", router) for router in routers} == {gates.get(architecture, Gates("softmax", False))}


class TanhRouter(nn.Module):
    """Of no known kind."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k, self.num_experts = TOP_K, EXPERTS
        self.weight = nn.Parameter(torch.zeros(EXPERTS, 16))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = states @ self.weight.T
        scores, chosen = torch.tanh(logits).topk(self.top_k)
        return logits, scores, chosen


class SigmoidRouter(TanhRouter):
    """As GLM 4.5 and DeepSeek V3 have it: a bias chooses, and has no part in the gates."""

    routed_scaling_factor = 2.5

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Buffer(torch.randn(EXPERTS))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = states @ self.weight.T
        chosen = (logits.sigmoid() + self.bias).topk(self.top_k).indices
        scores = logits.sigmoid().gather(1, chosen)
        return logits, scores / (scores.sum(-1, keepdim=True) + 1e-20) * self.routed_scaling_factor, chosen


def test_gates_of_another_kind_are_known_or_refused():
    assert gates_of("it", SigmoidRouter()) == Gates("sigmoid", True, 2.5)
    with pytest.raises(
        ConfigError, match=r"the gates of layers\.0\.gate \(TanhRouter\) are neither softmax nor sigmoid"
    ):
        gates_of("layers.0.gate", TanhRouter())


def test_a_model_without_experts_is_refused():
    with pytest.raises(ConfigError, match="Qwen3Model has no routers of experts"):
        Routers(tiny_model("qwen3").body)


# forward and backward


@each_layout
@each_mixture
def test_replaying_ones_own_choice_changes_nothing(architecture: str, layout: Layout):
    """To the last bit: the same experts in the same order."""
    model, samples = mixture(architecture), without_routing(some_samples())
    own = logprobs_of(model, samples, "rows")
    assert model.routers
    chosen = model.routers.chosen().view(len(samples), -1, LAYERS * TOP_K)
    before = logprobs_of(model, samples, layout)
    for sample, routed in zip(samples, chosen, strict=True):
        sample.routed_experts = as_entries(routed[: len(sample) - 1].numpy(), len(sample))
    assert logprobs_of(model, samples, layout) == before
    assert logprobs_of(model, samples, "rows") == own
    assert model.routers.mismatch()["train/router_mismatch"].value() == 0


@each_mixture
def test_given_experts_are_those_that_compute(architecture: str, monkeypatch: pytest.MonkeyPatch):
    """Where they are known; elsewhere, as at the last token, the router's own."""
    model, samples = mixture(architecture), some_samples()[:1]
    seen: list[Tensor] = []
    for module in model.body.modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    logprobs_of(model, samples, "rows")
    assert model.routers
    own = model.routers.chosen().view(-1, LAYERS, TOP_K)
    given = np.frombuffer(b"".join(samples[0].routed_experts), "<u2").reshape(-1, LAYERS, TOP_K)
    took = torch.stack(seen, 1)
    assert took[:-1].tolist() == given.tolist()
    assert took[-1].tolist() == own[-1].tolist()
    different = (np.sort(own[:-1].numpy()) != np.sort(given)).any(-1).mean()
    assert model.routers.mismatch()["train/router_mismatch"].value() == pytest.approx(different)
    assert different > 0.5


def test_a_layer_and_its_gradient_are_those_of_the_formula():
    """y = Σ_i g_i E_i(x) over the given experts, in float64; the gradient goes through the trainer's router."""
    config = MIXTURES["qwen3_moe"]()
    torch.manual_seed(0)
    block = Qwen3MoeSparseMoeBlock(config)
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.3)
    body = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": block})])})
    routers = Routers(body)
    x, slopes = torch.randn(1, 7, config.hidden_size), torch.randn(7, config.hidden_size)
    given = torch.from_numpy(experts(np.random.default_rng(1), 7)[:, 0].astype(np.int16))
    routers.begin(given)
    y = block(x)[0]
    (y * slopes).sum().backward()

    router, gate_up, down = (
        w.detach().double().requires_grad_()
        for w in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    )
    rows = []
    for state, chosen in zip(x[0].double(), given.tolist(), strict=True):
        weights = torch.exp(router @ state)[chosen]
        gates = weights / weights.sum()
        outputs = []
        for expert in chosen:
            gate, up = (gate_up[expert] @ state).chunk(2)
            outputs.append(down[expert] @ (gate * torch.sigmoid(gate) * up))
        rows.append((gates[:, None] * torch.stack(outputs)).sum(0))
    expected = torch.stack(rows)
    (expected * slopes).sum().backward()
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
    for found, right in (
        (block.gate.weight, router),
        (block.experts.gate_up_proj, gate_up),
        (block.experts.down_proj, down),
    ):
        assert found.grad is not None
        assert right.grad is not None
        assert float(right.grad.abs().max()) > 1e-3
        torch.testing.assert_close(found.grad.double(), right.grad, rtol=1e-3, atol=1e-5)


@given(
    lengths=st.lists(st.integers(5, 14), min_size=1, max_size=5),
    seed=st.integers(0, 100),
    forget=st.integers(0, 3),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_it_does_not_matter_what_stands_beside_a_sample(lengths: list[int], seed: int, forget: int):
    """Padded, packed with a shared prompt, or alone."""
    samples = some_samples(lengths, [i // 2 for i in range(len(lengths))], seed)
    for sample in samples[:forget]:
        sample.routed_experts[3] = b""
    alone = [logprobs_of(MODEL, [sample], "rows")[0] for sample in samples]
    for layout in ("rows", "packed"):
        for found, expected in zip(logprobs_of(MODEL, samples, layout), alone, strict=True):
            assert found == pytest.approx(expected, abs=1e-5)


MODEL = mixture()


def test_a_prompt_that_took_other_experts_is_not_shared():
    """Each answer to it is trained with those that it was made with."""
    samples = some_samples()
    assert collate(samples, "packed").input_ids.numel() == sum(map(len, samples)) - 6
    samples[1].routed_experts[1] = samples[0].routed_experts[2]
    assert collate(samples, "packed").input_ids.numel() == sum(map(len, samples)) - 3 - 1
    assert logprobs_of(MODEL, samples) == [pytest.approx(logprobs_of(MODEL, [s])[0], abs=1e-5) for s in samples]


def gradients(setup: Setup, samples: Sequence[Sample], layout: Layout = "packed") -> dict[str, Tensor]:
    """What each weight moves by in one update."""
    trainer = local_trainer(setup)
    before = {name: w.detach().clone() for name, w in trainer.model.named_weights()}
    run(updated(trainer, samples, setup, layout, setup.algorithm))
    return {name: w.detach() - before[name] for name, w in trainer.model.named_weights()}


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.allclose(found[name], moved, rtol=1e-3, atol=1e-5) for name, moved in expected.items())


def test_micro_batches_and_recomputed_activations_have_one_gradient():
    """A recomputed forward takes the given experts, too."""
    setup = Setup("qwen3_moe", routing=True, budget=1000)
    samples = some_samples()
    expected = gradients(setup, samples)
    assert all(float(expected[name].abs().max()) > 0 for name in expected if name.endswith("mlp.gate.weight"))
    assert not same_gradients(gradients(setup, without_routing(samples)), expected), "the experts should matter"
    assert same_gradients(gradients(replace(setup, budget=12), samples), expected)
    assert same_gradients(gradients(replace(setup, recompute=True), samples), expected)
    assert same_gradients(gradients(replace(setup, recompute=True), samples, "rows"), expected)


def test_ranks_replay_as_the_local_trainer():
    setup = Setup("qwen3_moe", routing=True, recompute=True)
    samples, others = some_samples(), some_samples()
    local = local_trainer(setup)
    expected = run(updated(local, others, setup, "packed", setup.algorithm))

    async def on_ranks() -> dict[str, float]:
        async with ranks(setup, 2) as trainer:
            return await updated(trainer, samples, setup, "packed", setup.algorithm)

    found = run(on_ranks())
    assert found["train/router_mismatch"] == pytest.approx(expected["train/router_mismatch"])
    assert found["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-4)
    for sample, other in zip(samples, others, strict=True):
        assert sample.current_logprobs == pytest.approx(other.current_logprobs, abs=1e-5)


def test_only_the_policy_replays():
    """The reference and a critic of its own take the experts that their own routers choose."""
    setup = Setup("qwen3_moe", row("ppo"), routing=True, reference=True, critic="own")
    trainer, plain = local_trainer(setup), local_trainer(replace(setup, routing=False))
    samples, others = some_samples(), some_samples()
    for output in ("ref_logprobs", "values", "old_logprobs"):
        asyncio.run(trainer.forward(samples, output))
        asyncio.run(plain.forward(others, output))
    assert [s.ref_logprobs for s in samples] == [pytest.approx(s.ref_logprobs, abs=1e-5) for s in others]
    assert [s.values for s in samples] == [pytest.approx(s.values, abs=1e-5) for s in others]
    assert [s.old_logprobs for s in samples] != [pytest.approx(s.old_logprobs, abs=1e-3) for s in others]


def test_adapters_replay_as_their_base():
    samples = some_samples()
    expected = logprobs_of(mixture(), samples)
    adapted = LoraModel(mixture(), rank=2, alpha=4.0, targets=(), seed=0)
    assert logprobs_of(adapted, samples) == [pytest.approx(own, abs=1e-5) for own in expected]


# the engine


PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10, 11, 12, 13, 14], [15]]


def engine_of(model: PolicyModel, **settings: Any) -> EmbeddedEngine:
    return EmbeddedEngine(model, lambda ids: "", vocab_size=128, **settings)


def sampled(engine: EmbeddedEngine, num: int = 4, **changes: Any) -> list[tuple[list[int], Completion]]:
    async def all_of_them() -> list[Completion]:
        wants = [
            (p, Sampling(12 + 5 * j, stop_token_ids=frozenset([1, 50]), seed=10 * i + j, **changes))
            for i, p in enumerate(PROMPTS)
            for j in range(num)
        ]
        return await asyncio.gather(*(engine.generate(p, sampling) for p, sampling in wants))

    prompts = [p for p in PROMPTS for _ in range(num)]
    return list(zip(prompts, asyncio.run(all_of_them()), strict=True))


def choice_of(model: PolicyModel, ids: list[int]) -> list[bytes]:
    """By one forward of the whole."""
    with torch.no_grad():
        model.hidden_states(torch.tensor([ids]), torch.arange(len(ids))[None])
    assert model.routers
    return as_entries(model.routers.chosen().numpy(), len(ids))


@each_mixture
def test_the_engine_reports_what_its_routers_chose(architecture: str):
    """In slots that are reused, sorted and moved, for completions of uneven lengths; the last token was never fed in."""
    model = mixture(architecture)
    said = sampled(engine_of(model, num_slots=5))
    assert len({len(c.token_ids) for _, c in said}) > 4
    for prompt, completion in said:
        *known, last = choice_of(model, prompt + completion.token_ids)
        assert completion.routed_experts == [*known, b""]
        assert last != b""


def test_an_engine_without_replay_reports_nothing():
    assert all(c.routed_experts == [] for _, c in sampled(engine_of(tiny_model("qwen3_moe"))))


async def after_steps(engine: EmbeddedEngine, num: int) -> None:
    for _ in range(1000):
        if engine.num_steps >= num:
            return
        await asyncio.sleep(0)
    raise AssertionError(f"{engine.num_steps} steps were made")


def test_what_is_unfinished_says_its_experts_so_far():
    async def looked() -> tuple[Completion, Completion]:
        engine = engine_of(mixture())
        asked = asyncio.create_task(engine.generate(PROMPTS[0], Sampling(30, seed=7)))
        await after_steps(engine, 6)
        (unfinished,) = (await engine.unfinished()).values()
        return unfinished, await asked

    unfinished, whole = asyncio.run(looked())
    num = len(PROMPTS[0]) + len(unfinished.token_ids)
    assert 3 < num < len(whole.routed_experts)
    assert unfinished.routed_experts == [*whole.routed_experts[: num - 1], b""]


def test_weights_that_change_in_flight_leave_what_was_chosen():
    """Each token keeps the experts that it took when it was fed in."""
    model = mixture()

    async def moved() -> Completion:
        engine = engine_of(model, in_flight=True)
        asked = asyncio.create_task(engine.generate(PROMPTS[1], Sampling(30, seed=7)))
        await after_steps(engine, 6)
        async with engine.paused():
            with torch.no_grad():
                for name, weight in model.named_weights():
                    if name.endswith("gate.weight"):
                        weight.neg_()
            await engine.update_weights(InProcessWeights(model), 1)
        return await asked

    before = mixture()
    completion = asyncio.run(moved())
    fed_before = len(PROMPTS[1]) + completion.policy_versions.index(1) - 1
    ids = PROMPTS[1] + completion.token_ids
    assert 0 < fed_before < len(ids) - 2
    assert completion.routed_experts[:fed_before] == choice_of(before, ids)[:fed_before]
    assert completion.routed_experts[fed_before] != choice_of(before, ids)[fed_before]


# what it is for


@pytest.mark.parametrize("what", ["rounded", "stale"])
def test_engine_and_trainer_differ_less_with_it(what: str):
    """An engine in BF16 under a trainer in FP32, or one whose weights are a little older: where a router chose otherwise, log-probs are
    far apart without replay."""
    trainer = mixture(dtype=torch.float32)
    engine = mixture(dtype=torch.bfloat16 if what == "rounded" else torch.float32)
    torch.manual_seed(3)
    with torch.no_grad():
        for (_, theirs), (_, own) in zip(engine.named_weights(), trainer.named_weights(), strict=True):
            theirs.copy_(own * (1 + 0.02 * torch.randn_like(own)) if what == "stale" else own)
            own.copy_(theirs) if what == "rounded" else None
    samples = []
    for i, (prompt, completion) in enumerate(sampled(engine_of(engine), num=16)):
        n = len(prompt)
        samples.append(
            Sample(
                prompt + completion.token_ids,
                [0.0] * n + [1.0] * len(completion.token_ids),
                [0.0] * n + completion.logprobs,
                [-1] * n + completion.policy_versions,
                1.0,
                i,
                0,
                routed_experts=completion.routed_experts,
            )
        )

    def mismatch(samples: Sequence[Sample]) -> Any:
        said = np.array([x for s in samples for x, w in zip(s.logprobs, s.loss_weights, strict=True) if w])
        found = np.array([x for own in logprobs_of(trainer, samples) for x in own])
        return np.abs(found - said)

    without, replayed = mismatch(without_routing(samples)), mismatch(samples)
    assert trainer.routers
    share = trainer.routers.mismatch()["train/router_mismatch"].value()
    for name, found in (("without", without), ("with replay", replayed)):
        print(f"{what}, routers differ at {share:.1%}, {name}: at most {found.max():.3f}, mean {found.mean():.4f}")
    assert 0 < share < 0.3
    assert replayed.mean() < 0.85 * without.mean()
    assert replayed.max() < 0.5 * without.max()
