"""The whole of CISPO in one file computes what the library computes: loss, gradient, and the curve of twenty steps."""

from __future__ import annotations

import ast
import asyncio
import copy
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, pstdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sluice.algorithms import LossOutput, assign_advantages, policy_loss, resolve
from sluice.data.batch import MicroBatch, Packing, pack
from sluice.trainers.local import LocalTrainer
from sluice.trainers.model import PolicyModel
from sluice.trainers.optim import Optimizer, OptimizerSettings
from sluice.types import Sample

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import cispo_minimal  # noqa: E402
from cispo_minimal import Rollout, Settings  # noqa: E402

SETTINGS = Settings(prompts_per_step=3, group_size=5, temperature=0.8, updates_per_batch=2)
"""15 samples in updates of 7 and 8, which cuts through a group."""
CISPO = resolve("cispo", {}, max_new_tokens=SETTINGS.max_new_tokens, group_size=SETTINGS.group_size)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# the library's side


def packing(layout: Any = "rows", budget: int = 60) -> Packing:
    """So small a budget that an update is several micro-batches."""
    return Packing(SETTINGS.updates_per_batch, budget, layout)


def trainer_of(model: Any, packing: Packing) -> LocalTrainer:
    """With the paper's optimiser, as the config has it by default."""
    adamw = OptimizerSettings(SETTINGS.learning_rate, 0, "constant", 0.0, (0.9, 0.95), 1e-15, 0.0, 1.0)
    return LocalTrainer(PolicyModel(model), None, Optimizer(model, adamw, 1000), packing)


def samples_of(batch: Sequence[Rollout]) -> list[Sample]:
    """Tokens, log-probs and rewards of the rollouts; advantages are the library's own."""
    samples = []
    for i, rollout in enumerate(batch):
        given, written = len(rollout.prompt), len(rollout.response)
        sample = Sample(
            rollout.prompt + rollout.response,
            [0.0] * given + [1.0] * written,
            [0.0] * given + rollout.logprobs,
            [-1] * given + [0] * written,
            SETTINGS.temperature,
            *divmod(i, SETTINGS.group_size),
            reward=rollout.reward,
        )
        sample.old_logprobs = sample.logprobs
        samples.append(sample)
    assign_advantages(CISPO, samples)
    return samples


def loss(logprobs: Tensor, entropies: Tensor, batch: MicroBatch) -> LossOutput:
    """As the loop gives it to the trainer."""
    columns = batch.old_logprobs, batch.advantages, batch.loss_weights, batch.sequence_ids
    return policy_loss(CISPO, logprobs, *columns, coefficients=batch.coefficients)


def library_trains_on(trainer: LocalTrainer, batch: Sequence[Rollout]) -> list[float]:
    losses = []
    for minibatch in pack(samples_of(batch), trainer.packing, CISPO):
        stats = asyncio.run(trainer.forward_backward(minibatch, loss))
        stats += asyncio.run(trainer.optim_step())
        losses.append(stats.values_by_name()["train/loss"])
    return losses


# what both are given


def random_model() -> Any:
    """Its predictions are not flat: the weights are larger than at initialisation."""
    torch.manual_seed(0)
    model = cispo_minimal.load_model(None)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3.0)
    return model


def some_batch(model: Any, step: int = 0) -> list[Rollout]:
    """Prompts and draws depend on the step alone."""
    rng, generator = random.Random(step), torch.Generator().manual_seed(step)
    prompts = [cispo_minimal.random_prompt(rng, 16) for _ in range(SETTINGS.prompts_per_step)]
    return cispo_minimal.sample_batch(model, prompts, SETTINGS, generator)


def stale_batch(model: Any) -> list[Rollout]:
    """The log-probs moved, as updates would have moved them: ratios on both sides of 1, some above the bound."""
    rng = random.Random(0)
    batch = some_batch(model, step=6)
    for rollout in batch:
        rollout.logprobs = [logprob + rng.gauss(-0.5, 1.5) for logprob in rollout.logprobs]
    return batch


def gradient_of(model: Any) -> dict[str, Tensor]:
    """And start anew."""
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return gradients


# loss and gradient


def assert_same_losses_and_gradients(layout: Any = "rows") -> None:
    """Of each update of a batch, from the same weights."""
    model = random_model()
    batch, trainer = stale_batch(model), trainer_of(model, packing(layout))
    updates = pack(samples_of(batch), trainer.packing, CISPO)
    start = 0
    for minibatch in updates:
        size = sum(len(m.samples) for m in minibatch.micro_batches)
        expected = asyncio.run(trainer.forward_backward(minibatch, loss)).values_by_name()["train/loss"]
        expected_gradient = gradient_of(model)
        actual = cispo_minimal.loss_of(model, batch[start : start + size], SETTINGS)
        actual.backward()
        assert actual.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
        gradient = gradient_of(model)
        scale = max(float(g.abs().max()) for g in expected_gradient.values())
        assert gradient.keys() == expected_gradient.keys()
        for name, wanted in expected_gradient.items():
            assert float((gradient[name] - wanted).abs().max()) <= 1e-5 * scale, name
        start += size
    assert start == len(batch)


def test_the_batch_is_one_in_which_mistakes_show():
    """Ragged prompts and responses, ratios beyond the bound, groups with different rewards, updates of several micro-batches."""
    model = random_model()
    batch = stale_batch(model)
    assert len({len(r.prompt) for r in batch}) > 1
    assert len({len(r.response) for r in batch}) > 4
    old = torch.tensor([logprob for r in batch for logprob in r.logprobs])
    with torch.no_grad():
        ratio = torch.exp(cispo_minimal.response_logprobs(model, batch, SETTINGS.temperature) - old)
    assert 0.05 < (ratio > SETTINGS.ratio_max).float().mean() < 0.5
    assert (ratio < 0.8).any()
    assert len({r.advantage for r in batch}) > 4
    updates = pack(samples_of(batch), packing(), CISPO)
    assert [sum(len(m.samples) for m in u.micro_batches) for u in updates] == [7, 8]
    assert all(len(u.micro_batches) > 1 for u in updates)


@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_loss_and_gradient_of_every_parameter_are_the_librarys(layout: str):
    assert_same_losses_and_gradients(layout)


def test_advantages_are_the_librarys():
    """Also where all rewards of a group are equal, though their sum is rounded: 0, and no rounding blown up by a tiny std."""
    batch = some_batch(random_model())
    for rollout in batch[:5]:
        rollout.reward = 0.1
    cispo_minimal.set_advantages(batch[:5])
    assert {r.advantage for r in batch[:5]} == {0.0}
    for rollout, sample in zip(batch, samples_of(batch), strict=True):
        assert sample.advantages[-1] == pytest.approx(rollout.advantage, rel=1e-9, abs=1e-12)


def test_the_samplers_logprobs_are_those_that_the_library_computes():
    """So the ratio is 1 at the first update: of the tempered policy, with a cache or without, padded or alone."""
    model = random_model()
    samples = samples_of(some_batch(model))
    asyncio.run(trainer_of(model, packing()).forward(samples, "old_logprobs"))
    for sample in samples:
        assert sample.old_logprobs == pytest.approx(sample.logprobs, abs=1e-5)


def test_a_response_ends_with_its_first_end_token():
    """Which belongs to it; without one it is as long as it may be."""
    end, ended = 1, 0
    for rollout in (r for step in range(4) for r in some_batch(random_model(), step)):
        assert end not in rollout.response[:-1]
        assert len(rollout.response) == SETTINGS.max_new_tokens or rollout.response[-1] == end
        ended += rollout.response[-1] == end
    assert ended > 0


# the curve


def assert_same_curves(num_steps: int = 20) -> list[float]:
    """Two copies of one model, each sampling with its own weights and the same draws: what differs at one step differs on.

    Gives the rewards, which are equal.
    """
    model = random_model()
    its_copy, before = copy.deepcopy(model), copy.deepcopy(model)
    optimizer, trainer = cispo_minimal.make_optimizer(model, SETTINGS), trainer_of(its_copy, packing())
    rewards = []
    for step in range(num_steps):
        batch, its_batch = some_batch(model, step), some_batch(its_copy, step)
        assert [r.response for r in batch] == [r.response for r in its_batch], f"step {step}"
        rewards.append(mean(r.reward for r in batch))
        losses = cispo_minimal.train_on(model, optimizer, batch, SETTINGS)
        assert losses == pytest.approx(library_trains_on(trainer, its_batch), rel=1e-3, abs=1e-5), f"step {step}"
        assert furthest(model, its_copy) < 1e-5, f"step {step}"
    assert furthest(model, before) > 2e-3 * num_steps, "the weights hardly moved, so that their equality says little"
    return rewards


@torch.no_grad()
def furthest(model: Any, other: Any) -> float:
    """The largest difference of any weight."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((p - q).abs().max()) for p, q in pairs)


def test_twenty_steps_are_the_librarys():
    """Tokens, rewards, losses and weights, while the reward rises."""
    rewards = assert_same_curves()
    assert mean(rewards[-3:]) > mean(rewards[:3]) + 0.2


# planted mistakes: the comparisons above notice each

Plant = Callable[[pytest.MonkeyPatch], None]


def without_stop_gradient(patch: pytest.MonkeyPatch) -> None:
    def wrong(logprobs: Tensor, old: Tensor, advantages: Tensor, ratio_max: float) -> Tensor:
        return -(torch.exp(logprobs - old).clamp(max=ratio_max) * advantages * logprobs).mean()

    patch.setattr(cispo_minimal, "cispo_loss", wrong)


def surrogate_of_ppo(patch: pytest.MonkeyPatch) -> None:
    def wrong(logprobs: Tensor, old: Tensor, advantages: Tensor, ratio_max: float) -> Tensor:
        ratio = torch.exp(logprobs - old)
        return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()

    patch.setattr(cispo_minimal, "cispo_loss", wrong)


def ratio_to_the_current_policy(patch: pytest.MonkeyPatch) -> None:
    """As if log-probs were computed anew at each update."""
    right = cispo_minimal.cispo_loss
    patch.setattr(cispo_minimal, "cispo_loss", lambda logprobs, old, *rest: right(logprobs, logprobs.detach(), *rest))


def without_a_bound(patch: pytest.MonkeyPatch) -> None:
    right = cispo_minimal.cispo_loss
    patch.setattr(cispo_minimal, "cispo_loss", lambda *columns: right(*columns[:3], ratio_max=torch.inf))


def sequence_mean(patch: pytest.MonkeyPatch) -> None:
    right = cispo_minimal.loss_of

    def wrong(model: Any, rollouts: list[Rollout], settings: Settings) -> Tensor:
        return torch.stack([right(model, [rollout], settings) for rollout in rollouts]).mean()

    patch.setattr(cispo_minimal, "loss_of", wrong)


def std_over_n(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cispo_minimal, "stdev", pstdev)


def training_at_temperature_1(patch: pytest.MonkeyPatch) -> None:
    right = cispo_minimal.response_logprobs
    patch.setattr(cispo_minimal, "response_logprobs", lambda model, rollouts, temperature: right(model, rollouts, 1.0))


def one_position_off(patch: pytest.MonkeyPatch) -> None:
    """Padding on the left, which the positions do not know of."""
    right = cispo_minimal.pad_sequence
    patch.setattr(cispo_minimal, "pad_sequence", lambda rows, **words: right(rows, **words, padding_side="left"))


@pytest.mark.parametrize(
    "plant",
    [
        without_stop_gradient,
        surrogate_of_ppo,
        ratio_to_the_current_policy,
        without_a_bound,
        sequence_mean,
        std_over_n,
        training_at_temperature_1,
        one_position_off,
    ],
)
def test_loss_and_gradient_notice(plant: Plant, monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        assert_same_losses_and_gradients()


def adamw_of_torch(patch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any, settings: Settings) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)

    patch.setattr(cispo_minimal, "make_optimizer", wrong)


def without_gradient_clipping(patch: pytest.MonkeyPatch) -> None:
    utils = SimpleNamespace(clip_grad_norm_=lambda parameters, norm: None)
    patch.setattr(cispo_minimal, "nn", SimpleNamespace(utils=utils))


def one_update(patch: pytest.MonkeyPatch) -> None:
    right = cispo_minimal.train_on

    def wrong(model: Any, optimizer: Any, batch: list[Rollout], settings: Settings) -> list[float]:
        return right(model, optimizer, batch, replace(settings, updates_per_batch=1)) * settings.updates_per_batch

    patch.setattr(cispo_minimal, "train_on", wrong)


@pytest.mark.parametrize(
    "plant", [without_stop_gradient, ratio_to_the_current_policy, adamw_of_torch, without_gradient_clipping, one_update]
)
def test_the_curve_notices(plant: Plant, monkeypatch: pytest.MonkeyPatch):
    """Within three steps."""
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=r"step [012]"):
        assert_same_curves(3)


# the script


def test_the_script_learns(capsys: pytest.CaptureFixture[str]):
    rewards = cispo_minimal.main(["--num-steps", "12", "--learning-rate", "3e-3"])
    assert mean(rewards[:2]) < 0.6
    assert mean(rewards[-2:]) > 0.8
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert f"reward {rewards[-1]:.3f}" in lines[-1]


def test_the_script_trains_a_model_from_a_folder(tmp_path: Path):
    cispo_minimal.load_model(None).save_pretrained(tmp_path)
    assert len(cispo_minimal.main(["--model", str(tmp_path), "--num-steps", "1", "--prompts-per-step", "1"])) == 1


def test_it_stands_alone():
    """Only torch, transformers and the standard library."""
    tree = ast.walk(ast.parse(Path(cispo_minimal.__file__).read_text()))
    names = [a.name for n in tree if isinstance(n, ast.Import | ast.ImportFrom) for a in _imported(n)]
    roots = {name.partition(".")[0] for name in names}
    assert roots - sys.stdlib_module_names == {"torch", "transformers"}


def _imported(node: ast.Import | ast.ImportFrom) -> list[ast.alias]:
    return node.names if isinstance(node, ast.Import) else [ast.alias(node.module or ".")]
