"""Every row of the table gives the value and the gradient of its paper's formula, computed token by token in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import oracle
import oracle_advantages as adv
import pytest
import torch
from agreement import TOLERANCES, compare
from batches import WEIGHTS, Batch, batches, loss_of, modest, row
from hypothesis import given

from sluice.algorithms import ALGORITHMS, Algorithm, compute_advantages

TOKEN_CISPO = partial(oracle.clipped_weight, low=0, high=5)
SEQUENCE_CISPO = partial(oracle.clipped_weight, low=0.5, high=5, ratio=oracle.sequence_ratio)

ORACLES: dict[str, tuple[str, dict[str, Any], oracle.Term, oracle.Aggregate]] = {
    name: (name, {}, term, aggregate) for name, (term, aggregate) in oracle.ROWS.items()
} | {
    "off_policy_reinforce": ("reinforce", {"ratio": "token"}, oracle.off_policy_reinforce, oracle.token_mean),
    "masked_cispo": ("cispo", {"mask": "trust_region"}, oracle.unified, oracle.token_mean),
    # GSPO's ratio under CISPO's weight, with a floor under it
    "sequence_cispo": ("cispo", {"ratio": "sequence", "ratio_min": 0.5}, SEQUENCE_CISPO, oracle.token_mean),
    "cispo_prompt_mean": ("cispo", {"aggregation": "prompt_mean"}, TOKEN_CISPO, oracle.prompt_mean),
    "cispo_blend": (
        "cispo",
        {"aggregation": "blend", "token_share": 0.3},
        TOKEN_CISPO,
        partial(oracle.blend, share=0.3),
    ),
    "grpo_dual_clip": (
        "grpo",
        {"dual_clip": 1.5},
        partial(oracle.dual_clipped, low=0.2, high=0.2, c=1.5),
        oracle.sequence_mean,
    ),
}
SURROGATES = ("grpo", "dr_grpo", "glm", "dapo", "gspo", "reinforce_pp", "reinforce_pp_baseline", "ppo")
DUAL = ("ppo", "grpo_dual_clip")
NO_RATIO = ("reinforce", "rloo")
BOUNDED = [
    label for label in ORACLES if label not in ("off_policy_reinforce", "dppo")
]  # what these weigh with is unbounded


def spec_of(label: str) -> Algorithm:
    name, words, *_ = ORACLES[label]
    return row(name, **words)


def objective(label: str) -> Any:
    *_, term, aggregate = ORACLES[label]
    return lambda responses: aggregate(responses, term)


def test_every_row_has_an_oracle():
    assert set(ALGORITHMS) == set(oracle.ROWS)
    assert set(ALGORITHMS) == set(BASELINES)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("label", ORACLES)
@modest
@given(batch=batches())
def test_loss_and_gradient_are_the_papers(label: str, dtype: torch.dtype, batch: Batch):
    compare(spec_of(label), objective(label), batch, dtype)


@pytest.mark.parametrize("label", ORACLES)
@modest
@given(batch=batches(WEIGHTS))
def test_loss_weights_weigh_the_papers_means(label: str, batch: Batch):
    compare(spec_of(label), objective(label), batch, torch.float64)


BASELINES: dict[str, adv.Baseline | None] = {
    "cispo": adv.z_scores,
    "grpo": adv.z_scores,
    "dr_grpo": adv.centre,
    "glm": adv.centre,
    "dapo": adv.z_scores,
    "gspo": adv.z_scores,
    "reinforce": adv.raw,
    "rloo": adv.leave_one_out,
    "reinforce_pp": adv.raw,
    "reinforce_pp_baseline": adv.centre,
    "ppo": None,  # GAE, which is along the tokens
    "unified": adv.z_scores,
    "sapo": adv.z_scores,
    "dppo": adv.centre,
}
WHITENED = ("reinforce_pp", "reinforce_pp_baseline")


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("label", [name for name, baseline in BASELINES.items() if baseline])
@modest
@given(batch=batches())
def test_advantages_are_the_papers(label: str, dtype: torch.dtype, batch: Batch):
    """With the eps of the row, given here by hand: 1e-6 outside the square root."""
    rewards = batch.rewards.tolist()
    expected = adv.by_group(BASELINES[label], rewards, batch.groups.tolist())
    # every sequence has a token, so that whitening has something to count; 1 + its index makes all counts differ
    counts = [1 + i for i in range(len(rewards))]
    if label in WHITENED and sum(counts) > 1:
        expected = adv.whiten(expected, counts)
    elif label in WHITENED:
        expected = [0.0]
    actual = compute_advantages(batch.rewards.to(dtype), batch.groups, spec_of(label), torch.tensor(counts))
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(
        actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


# where a ratio leaves the range of floats


def one_token(log_ratio: float, advantage: float) -> Batch:
    """A sequence of one token beside an ordinary one of three, which keeps the mean from being trivial."""
    column = partial(torch.tensor, dtype=torch.float64)
    return Batch(
        logprobs=column([-0.5, -1.0, -2.0, -3.0]),
        old_logprobs=column([-0.5 - log_ratio, -1.1, -2.0, -2.9]),
        advantages=column([advantage, 0.5, 0.5, 0.5]),
        engine_logprobs=column([-0.5 - log_ratio, -1.0, -2.1, -2.9]),
        ref_logprobs=column([-0.5, -1.2, -2.0, -2.5]),
        entropies=torch.ones(4, dtype=torch.float64),
        loss_weights=torch.ones(4, dtype=torch.float64),
        sequence_ids=torch.tensor([0, 1, 1, 1]),
        rewards=column([0, 0]),
        groups=torch.tensor([0, 0]),
    )


LARGE = pytest.mark.parametrize("log_ratio", [math.log(1e8), 95.0, 1000.0], ids=["1e8", "over_float32", "over_float64"])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@LARGE
@pytest.mark.parametrize("label", BOUNDED)
def test_a_clipped_token_stays_finite_however_large_its_ratio(label: str, log_ratio: float, dtype: torch.dtype):
    """exp(1000) is inf, and 0 · inf would be nan in the value or in the gradient of a token that the clip holds constant."""
    for log, advantage in ((log_ratio, 1.5), (-log_ratio, -1.5), (-log_ratio, 1.5)):
        batch = one_token(log, advantage)
        compare(spec_of(label), objective(label), batch, dtype)
        assert math.isfinite(float(loss_of(spec_of(label), batch.to(dtype))[0].loss))


def physical(batch: Batch) -> Batch:
    """With the same ratios and no log-prob above 0, since a difference of probabilities speaks of probabilities."""
    excess = torch.stack([batch.logprobs, batch.old_logprobs]).amax(0).clamp(min=0)
    return replace(batch, logprobs=batch.logprobs - excess, old_logprobs=batch.old_logprobs - excess)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@LARGE
@pytest.mark.parametrize("label", [label for label in BOUNDED if label not in SURROGATES or label in DUAL])
def test_a_bad_token_stays_finite_where_its_side_is_bounded(label: str, log_ratio: float, dtype: torch.dtype):
    """A negative advantage at a huge ratio, which PPO's clip alone would let through."""
    compare(spec_of(label), objective(label), one_token(log_ratio, -1.5), dtype)
    assert math.isfinite(float(loss_of(spec_of(label), one_token(log_ratio, -1.5).to(dtype))[0].loss))


@pytest.mark.parametrize("label", SURROGATES)
def test_a_clipped_token_has_exactly_no_gradient(label: str):
    for log_ratio, advantage in ((1000.0, 1.5), (0.4, 1.5), (-0.4, -1.5)):
        output, gradient = loss_of(spec_of(label), one_token(log_ratio, advantage))
        assert float(gradient[0]) == 0.0
        assert output.clipped.tolist()[0] is True


@pytest.mark.parametrize("label", [label for label in SURROGATES if label not in DUAL])
def test_the_unclipped_side_is_not_made_finite(label: str):
    """A negative advantage at an infinite ratio is an infinite loss, which the trainer refuses; a cap would hide it."""
    output, _ = loss_of(spec_of(label), one_token(1000.0, -1.5))
    assert float(output.loss) == math.inf
    assert output.clipped.tolist()[0] is False


@pytest.mark.parametrize("label", DUAL)
def test_the_dual_clip_bounds_the_other_side(label: str):
    output, gradient = loss_of(spec_of(label), one_token(1000.0, -1.5))
    assert float(output.per_token[0]) == pytest.approx(1.5 * spec_of(label).dual_clip)
    assert float(gradient[0]) == 0.0
    assert output.clipped.tolist()[0] is True


@pytest.mark.parametrize("label", [label for label in ORACLES if label not in NO_RATIO])
@pytest.mark.parametrize("log_ratio", [1000.0, -1000.0])
def test_a_token_without_advantage_adds_nothing_whatever_its_ratio(label: str, log_ratio: float):
    """0 · r is 0 for every finite r, so also where r left the float range."""
    odd, plain = one_token(log_ratio, 0.0), one_token(0.0, 0.0)
    (first, first_gradient), (second, second_gradient) = loss_of(spec_of(label), odd), loss_of(spec_of(label), plain)
    assert float(first.loss) == float(second.loss)
    assert first_gradient.tolist() == second_gradient.tolist()
    assert float(first_gradient[0]) == 0.0


@pytest.mark.parametrize("label", ORACLES)
def test_masked_tokens_may_hold_minus_infinity(label: str):
    batch = one_token(0.1, 1.0)
    clean = batch.select(torch.tensor([0, 1, 3]))
    batch.loss_weights[2] = 0.0
    batch.logprobs[2] = batch.old_logprobs[2] = -math.inf
    (output, gradient), (expected, expected_gradient) = loss_of(spec_of(label), batch), loss_of(spec_of(label), clean)
    assert float(output.loss) == pytest.approx(float(expected.loss), rel=1e-14)
    torch.testing.assert_close(gradient[[0, 1, 3]], expected_gradient, rtol=1e-14, atol=0)
    assert float(gradient[2]) == 0.0


@pytest.mark.parametrize("label", ORACLES)
def test_a_batch_without_a_loss_token_has_loss_0(label: str):
    batch = replace(one_token(0.1, 1.0), loss_weights=torch.zeros(4, dtype=torch.float64))
    output, gradient = loss_of(spec_of(label), batch)
    assert float(output.loss) == 0.0
    assert gradient.tolist() == [0.0] * 4
