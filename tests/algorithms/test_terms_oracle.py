"""KL, entropy, corrections for the sampler and rejection: alone and together, against the papers' formulas."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import oracle
import oracle_terms as terms
import pytest
import torch
from agreement import TOLERANCES, compare
from batches import WEIGHTS, Batch, batches, loss_and_gradients, loss_of, modest, row
from hypothesis import given
from hypothesis import strategies as st
from words import BATCH

from sluice.algorithms import policy_loss
from sluice.algorithms.kl import kl_estimates
from sluice.algorithms.ratios import correction_weights

LEVELS = ("token", "sequence", "geometric")
BOUNDS = {
    "tis": {"correction_max": 1.3},
    "mis": {"correction_max": 1.3},
    "icepop": {"correction_min": 0.8, "correction_max": 1.3},
}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def corrected(method: str, level: str, low: float | None, high: float) -> Any:
    return lambda o, t: terms.CORRECTIONS[method](terms.importance(o, t, level), low, high)


def rejecting(level: str, low: float, high: float) -> Any:
    return lambda o, t: 1.0 if terms.accepted(o, level, low, high) else 0.0


def of_row(name: str, **parts: Any) -> Any:
    return lambda responses: terms.objective(responses, *oracle.ROWS[name], **parts)


# one at a time


@each_dtype
@pytest.mark.parametrize("estimator", terms.KL)
@pytest.mark.parametrize("name", ["grpo", "cispo"])
@modest
@given(batch=batches())
def test_kl_in_the_loss(name: str, estimator: str, dtype: torch.dtype, batch: Batch):
    """Inside the mean of the row, with the gradient that its estimator says."""
    spec = row(name, kl="loss", kl_estimator=estimator, kl_coef=0.125)
    compare(spec, of_row(name, kl=terms.KL[estimator], kl_coef=0.125), batch, dtype)


@each_dtype
@pytest.mark.parametrize("name", ["glm", "sapo", "dr_grpo"])
@modest
@given(batch=batches())
def test_entropy_bonus(name: str, dtype: torch.dtype, batch: Batch):
    compare(row(name, entropy_coef=0.03125), of_row(name, entropy_coef=0.03125), batch, dtype)


@each_dtype
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("method", BOUNDS)
@pytest.mark.parametrize("name", ["cispo", "gspo"])
@modest
@given(batch=batches())
def test_corrections(name: str, method: str, level: str, dtype: torch.dtype, batch: Batch):
    """Each token's own term times its factor, while the means divide by what they divided by before."""
    bounds = BOUNDS[method]
    spec = row(name, correction=method, correction_level=level, **bounds)
    factor = corrected(method, level, bounds.get("correction_min"), bounds["correction_max"])
    compare(spec, of_row(name, correction=factor), batch, dtype)


@each_dtype
@modest
@given(batch=batches())
def test_mis_with_a_floor(dtype: torch.dtype, batch: Batch):
    spec = row("cispo", correction="mis", correction_level="token", correction_min=0.9, correction_max=1.3)
    compare(spec, of_row("cispo", correction=corrected("mis", "token", 0.9, 1.3)), batch, dtype)


@each_dtype
@pytest.mark.parametrize("level", ["sequence", "geometric"])
@modest
@given(batch=batches())
def test_rejection(level: str, dtype: torch.dtype, batch: Batch):
    spec = row("grpo", rejection=level, rejection_min=0.8, rejection_max=1.3)
    compare(spec, of_row("grpo", correction=rejecting(level, 0.8, 1.3)), batch, dtype)


# together


@st.composite
def everything(draw: Any) -> tuple[dict[str, Any], str, dict[str, Any], Any]:
    """Words, the row they change, and what the oracle needs for the same."""
    name = draw(st.sampled_from(list(oracle.ROWS)))
    method, level = draw(st.sampled_from(list(BOUNDS))), draw(st.sampled_from(LEVELS))
    rejection = draw(st.sampled_from(["sequence", "geometric"]))
    estimator = draw(st.sampled_from(list(terms.KL)))
    words = {"correction": method, "correction_level": level, **BOUNDS[method], "rejection": rejection}
    words |= {"rejection_min": 0.6, "rejection_max": 1.7, "entropy_coef": 0.03125}
    words |= {"kl": "loss", "kl_estimator": estimator, "kl_coef": 0.125}
    weigh = corrected(method, level, BOUNDS[method].get("correction_min"), BOUNDS[method]["correction_max"])
    accept = rejecting(rejection, 0.6, 1.7)
    parts = {"correction": lambda o, t: weigh(o, t) * accept(o, t), "kl": terms.KL[estimator]}
    parts |= {"kl_coef": 0.125, "entropy_coef": 0.03125}
    aggregations: dict[str, Any] = {
        "token_mean": oracle.token_mean,
        "sequence_mean": oracle.sequence_mean,
        "prompt_mean": oracle.prompt_mean,
        "constant": partial(oracle.constant, size=16.0),
        "blend": partial(oracle.blend, share=0.25),
    }
    aggregation = draw(st.sampled_from(list(aggregations)))
    words["aggregation"] = aggregation
    words |= {"constant": {"loss_constant": 16.0}, "blend": {"token_share": 0.25}}.get(aggregation, {})
    return words, name, parts, aggregations[aggregation]


@each_dtype
@modest
@given(what=everything(), batch=batches(WEIGHTS))
def test_all_of_it_at_once(dtype: torch.dtype, what: Any, batch: Batch):
    words, name, parts, aggregate = what
    term, _ = oracle.ROWS[name]
    compare(row(name, **words), lambda rs: terms.objective(rs, term, aggregate, **parts), batch, dtype)


# where numbers leave their range, by hand


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("method", "factors"), [("tis", [1.3, 0.0, 1.0]), ("mis", [0.0, 0.0, 1.0]), ("icepop", [0.0, 0.0, 1.0])]
)
def test_weights_beyond_all_floats(method: str, factors: list[float], level: str):
    """exp(1000), exp(-1000) and exp(0), each in a sequence of its own."""
    old = torch.tensor([0.0, 0.0, -1.0], dtype=torch.float64)
    engine = torch.tensor([-1000.0, 1000.0, -1.0], dtype=torch.float64)
    spec = row("grpo", correction=method, correction_level=level, **BOUNDS[method])
    found = correction_weights(spec, old, engine, torch.ones(3, dtype=torch.float64), torch.arange(3))
    assert found.tolist() == pytest.approx(factors, rel=1e-15)


def test_the_three_levels_by_hand():
    """Ratios 4 and 0.5 of one sequence, a masked nan between them, and 1.5 of another."""
    ratios = torch.tensor([4.0, math.nan, 0.5, 1.5], dtype=torch.float64)
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    ids = torch.tensor([0, 0, 0, 1])
    expected = {"token": [4, 0.5, 1.5], "sequence": [2, 2, 1.5], "geometric": [math.sqrt(2)] * 2 + [1.5]}
    for level in LEVELS:
        spec = row("grpo", correction="tis", correction_level=level, correction_max=100.0)
        found = correction_weights(spec, ratios.log(), torch.zeros_like(ratios), weights, ids)
        assert found[[0, 2, 3]].tolist() == pytest.approx(expected[level], rel=1e-14)
        assert math.isfinite(float(found[1]))


@pytest.mark.parametrize("method", BOUNDS)
def test_bounds_belong_to_what_they_bound(method: str):
    """A weight exactly at a bound stays."""
    spec = row("grpo", correction=method, correction_level="token", **BOUNDS[method])
    edge = torch.tensor([BOUNDS[method].get("correction_min", 0.8), 1.3], dtype=torch.float64)
    # exp(log(x)) is x to a rounding, so the bound moves by as much
    slack = {k: v * (1 + (1e-15 if k.endswith("max") else -1e-15)) for k, v in BOUNDS[method].items()}
    found = correction_weights(
        replace(spec, **slack), edge.log(), torch.zeros(2).double(), torch.ones(2).double(), torch.arange(2)
    )
    assert found.tolist() == pytest.approx(edge.tolist(), rel=1e-14)


@each_dtype
@pytest.mark.parametrize("estimator", terms.KL)
@given(pairs=st.lists(st.tuples(st.floats(-12, 0, width=32), st.floats(-12, 0, width=32)), min_size=1, max_size=8))
@modest
def test_estimates_token_by_token(estimator: str, dtype: torch.dtype, pairs: list[tuple[float, float]]):
    leaves = [torch.tensor(p, dtype=torch.float64, requires_grad=True) for p, _ in pairs]
    values = [terms.KL[estimator](leaf, q) for leaf, (_, q) in zip(leaves, pairs)]
    gradients = torch.autograd.grad(sum(values), leaves)
    logprobs = torch.tensor([p for p, _ in pairs], dtype=dtype, requires_grad=True)
    found = kl_estimates(estimator, logprobs, torch.tensor([q for _, q in pairs], dtype=dtype))
    found.sum().backward()
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(found.detach().double(), torch.stack(values).detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(logprobs.grad.double(), torch.stack(gradients), rtol=tolerance, atol=tolerance)


@each_dtype
@given(pairs=st.lists(st.tuples(st.floats(-30, 0, width=32), st.floats(-30, 0, width=32)), min_size=1, max_size=8))
@modest
def test_k3_is_never_negative(dtype: torch.dtype, pairs: list[tuple[float, float]]):
    """Up to the rounding of exp(-d) - 1 + d where d is small."""
    logprobs, ref = torch.tensor(pairs, dtype=dtype).unbind(1)
    assert float(kl_estimates("k3", logprobs, ref).min()) >= -2 * torch.finfo(dtype).eps * 30
    assert kl_estimates("k3", logprobs, logprobs).tolist() == [0.0] * len(pairs)


@pytest.mark.parametrize(
    "words",
    [
        {"kl": "loss", "kl_estimator": "k3", "kl_coef": 0.5},
        {"entropy_coef": 0.5},
        {"correction": "tis", "correction_level": "sequence", "correction_max": 2.0},
        {"correction": "icepop", "correction_level": "token", "correction_min": 0.5, "correction_max": 2.0},
        {"rejection": "geometric", "rejection_min": 0.5, "rejection_max": 2.0},
    ],
    ids=["kl", "entropy", "tis", "icepop", "rejection"],
)
@modest
@given(batch=batches(), junk=st.sampled_from([math.nan, math.inf, -math.inf, 0.0]))
def test_masked_tokens_leak_through_none_of_it(words: dict[str, Any], batch: Batch, junk: float):
    columns = ("logprobs", "old_logprobs", "advantages", "engine_logprobs", "ref_logprobs", "entropies")
    dirty = replace(batch, **{k: torch.where(batch.own, getattr(batch, k), junk) for k in columns})
    clean = replace(batch, **{k: torch.where(batch.own, getattr(batch, k), -1.0) for k in columns})
    for first, second in zip(
        loss_and_gradients(row("grpo", **words), dirty), loss_and_gradients(row("grpo", **words), clean)
    ):
        if isinstance(first, torch.Tensor):
            assert torch.equal(first, second)
        else:
            assert torch.equal(first.loss, second.loss)
            assert str(first.metrics.values_by_name()) == str(second.metrics.values_by_name())


# identities


@modest
@given(batch=batches(WEIGHTS))
def test_tis_without_a_cap_is_the_plain_importance_weight(batch: Batch):
    """REINFORCE with sg(π_old / π_engine) in front, here by hand."""
    spec = row("reinforce", correction="tis", correction_level="token", correction_max=1e30)
    own = batch.own
    weights = torch.where(own, (batch.old_logprobs - batch.engine_logprobs).exp(), 0.0)
    plain = replace(batch, advantages=torch.where(own, batch.advantages * weights, 0.0))
    for found, expected in zip(loss_and_gradients(spec, batch), loss_and_gradients(row("reinforce"), plain)):
        if isinstance(found, torch.Tensor):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        else:
            torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", BOUNDS)
@pytest.mark.parametrize("level", LEVELS)
@modest
@given(batch=batches(WEIGHTS))
def test_an_engine_that_agrees_needs_no_correction(level: str, method: str, batch: Batch):
    batch = replace(batch, engine_logprobs=batch.old_logprobs)
    spec = row("grpo", correction=method, correction_level=level, **BOUNDS[method])
    (first, gradient), (second, expected) = loss_of(spec, batch), loss_of(row("grpo"), batch)
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(gradient, expected)


@modest
@given(batch=batches(longest=1))
def test_at_length_1_the_three_levels_are_one(batch: Batch):
    found = [
        loss_of(row("grpo", correction="icepop", correction_level=level, **BOUNDS["icepop"]), batch) for level in LEVELS
    ]
    for output, gradient in found[1:]:
        torch.testing.assert_close(output.loss, found[0][0].loss, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-12, atol=1e-14)


def test_coefficients_of_0_turn_a_term_off():
    assert row("grpo").kl_coef == 0.0
    assert row("grpo").kl is None
    assert row("grpo").kl_estimator is None
    assert row("grpo", kl_coef=0.1).kl == "loss"
    assert row("grpo", kl_coef=0.1).kl_estimator == "k3"


NEEDS = {
    "ref_logprobs": {"kl_coef": 0.1},
    "entropies": {"entropy_coef": 0.1},
    "engine_logprobs": {"correction": "tis"},
    "group_ids": {"aggregation": "prompt_mean"},
}


@pytest.mark.parametrize(("column", "words"), NEEDS.items(), ids=NEEDS)
def test_a_term_whose_numbers_are_missing_is_refused_and_one_that_is_off_looks_at_none(column: str, words: Any):
    """Z13: to leave the term out without a word would be an option that does nothing."""
    batch = BATCH
    columns = (batch.logprobs, batch.old_logprobs, batch.advantages, batch.loss_weights, batch.sequence_ids)
    with pytest.raises(ValueError, match=column):
        policy_loss(row("grpo", **words), *columns)
    everything = {name: getattr(batch, name) for name in NEEDS}
    assert torch.equal(policy_loss(row("grpo"), *columns, **everything).loss, policy_loss(row("grpo"), *columns).loss)
