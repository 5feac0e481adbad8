"""Advantages along one answer, and the critic that they need, against sums written out term by term."""

from __future__ import annotations

import math
from typing import Any

import oracle_advantages as adv
import oracle_terms as terms
import pytest
import torch
from agreement import TOLERANCES
from agreement import gradient as oracle_gradient
from batches import modest
from hypothesis import given
from hypothesis import strategies as st

from sluice.algorithms import gae, value_loss
from sluice.algorithms.advantages import discounted_sums
from sluice.algorithms.diagnostics import explained_variance

each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
small = st.integers(-300, 300).map(lambda i: i / 64)
factors = st.sampled_from([0.0, 0.5, 0.95, 1.0])
answers = st.lists(st.lists(st.tuples(small, small), min_size=1, max_size=7), min_size=1, max_size=4)


def columns(answers: list[Any], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """First and second numbers of all tokens, and which answer each is of."""
    first, second = torch.tensor([pair for answer in answers for pair in answer], dtype=dtype).unbind(1)
    return first, second, torch.tensor([i for i, answer in enumerate(answers) for _ in answer])


@each_dtype
@modest
@given(answers=answers, gamma=factors, lam=factors)
def test_gae_is_the_papers_sum(dtype: torch.dtype, answers: list[Any], gamma: float, lam: float):
    advantages, returns = gae(*columns(answers, dtype), gamma, lam)
    split = [([r for r, _ in answer], [v for _, v in answer]) for answer in answers]
    expected = [adv.gae(rewards, values, gamma, lam) for rewards, values in split]
    targets = [a + v for row, (_, values) in zip(expected, split) for a, v in zip(row, values)]
    scale = 30 * TOLERANCES[dtype]  # sums of up to 14 numbers of up to 4
    assert advantages.tolist() == pytest.approx([a for row in expected for a in row], rel=TOLERANCES[dtype], abs=scale)
    assert returns.tolist() == pytest.approx(targets, rel=TOLERANCES[dtype], abs=scale)


@each_dtype
@modest
@given(answers=answers, factor=factors)
def test_discounted_sums(dtype: torch.dtype, answers: list[Any], factor: float):
    values, _, ids = columns(answers, dtype)
    expected = [x for answer in answers for x in adv.discounted([v for v, _ in answer], factor)]
    found = discounted_sums(values, ids, factor).tolist()
    assert found == pytest.approx(expected, rel=TOLERANCES[dtype], abs=30 * TOLERANCES[dtype])


def test_discounted_sums_of_a_long_answer():
    """A factor to the power of a position underflows after some thousand tokens, and dividing by it would overflow."""
    values = torch.ones(20_000, dtype=torch.float64)
    found = discounted_sums(values, torch.zeros(20_000, dtype=torch.int64), 0.9)
    assert float(found[0]) == pytest.approx(10.0, rel=1e-12)
    assert float(found[-1]) == 1.0
    assert bool(torch.isfinite(found).all())


@modest
@given(answers=answers)
def test_with_lambda_1_an_advantage_is_return_minus_value(answers: list[Any]):
    rewards, values, ids = columns(answers)
    advantages, returns = gae(rewards, values, ids, 1.0, 1.0)
    to_come = discounted_sums(rewards, ids, 1.0)
    torch.testing.assert_close(advantages, to_come - values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, to_come, rtol=1e-12, atol=1e-12)


@modest
@given(answers=answers, gamma=factors)
def test_with_lambda_0_an_advantage_is_the_td_error(answers: list[Any], gamma: float):
    advantages, _ = gae(*columns(answers), gamma, 0.0)
    expected = [x for answer in answers for x in adv.td_errors(*map(list, zip(*answer)), gamma)]
    assert advantages.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@modest
@given(answers=answers, gamma=factors, lam=factors)
def test_answers_know_nothing_of_each_other(answers: list[Any], gamma: float, lam: float):
    """Packed or each by itself."""
    alone = [gae(*columns([answer]), gamma, lam)[0] for answer in answers]
    torch.testing.assert_close(gae(*columns(answers), gamma, lam)[0], torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_gae_of_nothing():
    empty = torch.zeros(0, dtype=torch.float64)
    advantages, returns = gae(empty, empty, torch.zeros(0, dtype=torch.int64), 1.0, 1.0)
    assert advantages.tolist() == returns.tolist() == []


# the critic's loss

tokens = st.lists(st.tuples(small, small, small, st.sampled_from([0.0, 0.25, 1.0])), min_size=1, max_size=8)


@each_dtype
@pytest.mark.parametrize("clip", [None, 0.2, 1.0])
@modest
@given(tokens=tokens)
def test_value_loss_and_gradient(clip: float | None, dtype: torch.dtype, tokens: list[tuple[float, ...]]):
    leaves = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v, *_ in tokens]
    parts = [c * terms.value_loss(leaf, o, r, clip) for leaf, (_, o, r, c) in zip(leaves, tokens)]
    expected = torch.as_tensor(sum(parts), dtype=torch.float64)
    values, old, returns, coefficients = (column.clone() for column in torch.tensor(tokens, dtype=dtype).unbind(1))
    values.requires_grad_()
    output = value_loss(values, old, returns, coefficients, clip)
    output.loss.backward()
    tolerance = TOLERANCES[dtype]
    assert output.loss.item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance)
    wanted = oracle_gradient(expected, leaves)
    torch.testing.assert_close(values.grad.double(), wanted, rtol=tolerance, atol=tolerance)
    for slope, clipped, (v, _, r, c) in zip(wanted.tolist(), output.clipped.tolist(), tokens):
        if v != r:  # else there is no slope to lose
            assert (clipped and c != 0) == (slope != pytest.approx(c * (v - r), rel=1e-4))


@pytest.mark.parametrize("clip", [None, 0.2])
def test_masked_values_leak_nothing(clip: float | None):
    values = torch.tensor([1.0, math.nan, 2.0, -math.inf], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([0.5, math.inf, 1.0, math.nan], dtype=torch.float64)
    output = value_loss(values, other, other, torch.tensor([0.5, 0.0, 0.5, 0.0], dtype=torch.float64), clip)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(0.5 * 0.125 + 0.5 * 0.5)
    assert values.grad.tolist() == [0.25, 0.0, 0.5, 0.0]
    assert all(math.isfinite(v) for v in output.metrics.values_by_name().values())


@modest
@given(pairs=st.lists(st.tuples(small, small), min_size=2, max_size=9))
def test_explained_variance(pairs: list[tuple[float, float]]):
    values, returns = map(list, zip(*pairs))
    found = explained_variance(*(torch.tensor(c, dtype=torch.float64) for c in (values, returns)))
    if len(set(returns)) == 1:
        assert math.isnan(found), "nothing varies that could be explained"
    else:
        assert found == pytest.approx(terms.explained_variance(values, returns), rel=1e-9, abs=1e-9)
