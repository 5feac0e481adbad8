"""Every row of the table gives the value and the gradient of its paper's formula, computed token by token in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import oracle
import pytest
import torch
from batches import Batch, batches, loss_of, modest
from hypothesis import given

from sluice.algorithms import ALGORITHMS, Algorithm, compute_advantages, resolve

MAX_TOKENS = 48
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}

ORACLES: dict[str, tuple[str, dict[str, Any], Callable[..., Any]]] = {
    "cispo": ("cispo", {}, oracle.cispo),
    "grpo": ("grpo", {}, oracle.grpo),
    "dr_grpo": ("dr_grpo", {}, partial(oracle.dr_grpo, max_tokens=MAX_TOKENS)),
    "glm": ("glm", {}, oracle.glm),
    "dapo": ("dapo", {}, oracle.dapo),
    "gspo": ("gspo", {}, oracle.gspo),
    "reinforce": ("reinforce", {}, oracle.reinforce),
    "unified": ("cispo", {"mask": "trust_region"}, oracle.unified),
    "off_policy_reinforce": ("reinforce", {"ratio": "token"}, oracle.off_policy_reinforce),
    "sequence_cispo": ("cispo", {"ratio": "sequence", "ratio_min": 0.5}, oracle.sequence_cispo),
}
SURROGATES = ("grpo", "dr_grpo", "glm", "dapo", "gspo")


def spec_of(label: str) -> Algorithm:
    name, words, _ = ORACLES[label]
    return resolve(name, words, max_new_tokens=MAX_TOKENS, group_size=4)


def compare(label: str, batch: Batch, dtype: torch.dtype) -> None:
    """Loss and gradient against the oracle's."""
    responses, leaves = batch.responses([float(batch.advantages[t]) for t in first_own_tokens(batch)])
    objective = ORACLES[label][2](responses) if responses else 0.0
    expected = -torch.as_tensor(objective, dtype=torch.float64)  # with every token clipped it is a constant
    gradient = torch.zeros(len(leaves), dtype=torch.float64)
    if expected.requires_grad:
        found = torch.autograd.grad(expected, leaves, allow_unused=True)
        gradient = torch.stack([torch.zeros((), dtype=torch.float64) if g is None else g for g in found])
    output, actual = loss_of(spec_of(label), batch.to(dtype))
    tolerance = TOLERANCES[dtype]
    assert output.loss.dtype == dtype
    assert float(output.loss) == pytest.approx(oracle.sg(expected), rel=tolerance, abs=tolerance)
    scale = float(gradient.abs().max())
    torch.testing.assert_close(actual.double(), gradient, rtol=tolerance, atol=tolerance * scale)


def first_own_tokens(batch: Batch) -> list[int]:
    """Per sequence a token that bears its advantage; of a sequence without one, any."""
    firsts = []
    for i in range(int(batch.sequence_ids.max()) + 1):
        tokens = batch.sequence(i)
        own = tokens[batch.loss_weights[tokens] != 0]
        firsts.append(int(own[0]) if len(own) else int(tokens[0]))
    return firsts


def test_every_row_has_an_oracle():
    assert set(ALGORITHMS) <= set(ORACLES)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("label", ORACLES)
@modest
@given(batch=batches())
def test_loss_and_gradient_are_the_papers(label: str, dtype: torch.dtype, batch: Batch):
    compare(label, batch, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("label", ORACLES)
@modest
@given(batch=batches())
def test_advantages_are_the_papers(label: str, dtype: torch.dtype, batch: Batch):
    """With the eps of the row, given here by hand: 1e-6 outside the square root."""
    raw = label in ("reinforce", "off_policy_reinforce")
    by_group: dict[int, list[int]] = {}
    for i, group in enumerate(batch.groups.tolist()):
        by_group.setdefault(group, []).append(i)
    expected = [math.nan] * len(batch.rewards)
    for members in by_group.values():
        rewards = [float(batch.rewards[i]) for i in members]
        values = oracle.centre(rewards) if label in ("dr_grpo", "glm") else oracle.z_scores(rewards, 1e-6)
        for i, value in zip(members, rewards if raw else values, strict=True):
            expected[i] = value
    actual = compute_advantages(batch.rewards.to(dtype), batch.groups, spec_of(label))
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(
        actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


def one_token(log_ratio: float, advantage: float) -> Batch:
    """A sequence of one token beside an ordinary one of three, which keeps the mean from being trivial."""
    column = partial(torch.tensor, dtype=torch.float64)
    return Batch(
        logprobs=column([-0.5, -1.0, -2.0, -3.0]),
        old_logprobs=column([-0.5 - log_ratio, -1.1, -2.0, -2.9]),
        advantages=column([advantage, 0.5, 0.5, 0.5]),
        loss_weights=torch.ones(4, dtype=torch.float64),
        sequence_ids=torch.tensor([0, 1, 1, 1]),
        rewards=column([0, 0]),
        groups=torch.tensor([0, 0]),
    )


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("log_ratio", [math.log(1e8), 95.0, 1000.0], ids=["1e8", "over_float32", "over_float64"])
@pytest.mark.parametrize("label", [*SURROGATES, "cispo", "unified", "sequence_cispo", "reinforce"])
def test_a_clipped_token_stays_finite_however_large_its_ratio(label: str, log_ratio: float, dtype: torch.dtype):
    """exp(1000) is inf, and 0 · inf would be nan in the value or in the gradient of a token that the clip holds constant."""
    for log, advantage in ((log_ratio, 1.5), (-log_ratio, -1.5), (-log_ratio, 1.5)):
        compare(label, one_token(log, advantage), dtype)
        assert math.isfinite(float(loss_of(spec_of(label), one_token(log, advantage).to(dtype))[0].loss))


@pytest.mark.parametrize("label", SURROGATES)
def test_a_clipped_token_has_exactly_no_gradient(label: str):
    for log_ratio, advantage in ((1000.0, 1.5), (0.4, 1.5), (-0.4, -1.5)):
        output, gradient = loss_of(spec_of(label), one_token(log_ratio, advantage))
        assert float(gradient[0]) == 0.0
        assert output.clipped.tolist()[0] is True


@pytest.mark.parametrize("label", SURROGATES)
def test_the_unclipped_side_is_not_made_finite(label: str):
    """A negative advantage at an infinite ratio is an infinite loss, which the trainer refuses; a cap would hide it."""
    output, _ = loss_of(spec_of(label), one_token(1000.0, -1.5))
    assert float(output.loss) == math.inf
    assert output.clipped.tolist()[0] is False


@pytest.mark.parametrize("label", [label for label in ORACLES if label != "reinforce"])
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
