"""What holds between losses, and what a loss must not depend on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from batches import JUNK, Batch, batches, loss_of, modest
from hypothesis import given
from hypothesis import strategies as st

from sluice.algorithms import ALGORITHMS, Algorithm, resolve
from sluice.algorithms.aggregation import Totals
from sluice.tracking.metrics import Metrics

WEIGHTS = (1.0, 0.25, 3.0)


def row(name: str, **words: Any) -> Algorithm:
    return resolve(name, words, max_new_tokens=48, group_size=4)


SPECS = {name: row(name) for name in ALGORITHMS} | {
    "unified": row("cispo", mask="trust_region"),
    "sequence_cispo": row("cispo", ratio="sequence"),
    "gspo_token_mean": row("gspo", aggregation="token_mean"),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def assert_same(first: Any, second: Any, tokens: torch.Tensor | None = None) -> None:
    """Two results of `loss_of`; the second's tokens may be some of the first's."""
    (a, a_gradient), (b, b_gradient) = first, second
    chosen = slice(None) if tokens is None else tokens
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a_gradient[chosen], b_gradient, rtol=1e-12, atol=1e-12)


# identities


@modest
@given(batch=batches(WEIGHTS))
def test_dapo_with_equal_clips_and_sequence_mean_is_grpo(batch: Batch):
    dapo = row("dapo", clip_high=0.2, aggregation="sequence_mean", dynamic_sampling=False)
    assert_same(loss_of(dapo, batch), loss_of(row("grpo"), batch))


@modest
@given(batch=batches(longest=1))
def test_gspo_is_ppo_where_sequences_have_one_token(batch: Batch):
    ppo = row("glm", clip_low=3e-4, clip_high=4e-4)
    assert_same(loss_of(row("gspo"), batch), loss_of(ppo, batch))


@modest
@given(batch=batches(WEIGHTS))
def test_on_fresh_samples_all_losses_have_the_policy_gradient(batch: Batch):
    """With old = current the ratio is 1, nothing is clipped, and d loss / d log π is -w·A / Σw by hand."""
    fresh = replace(batch, old_logprobs=batch.logprobs)
    own = batch.loss_weights != 0
    expected = torch.where(own, -batch.advantages * batch.loss_weights / batch.loss_weights.sum(), 0.0)
    for spec in (*SPECS.values(), row("reinforce", ratio="token")):
        output, gradient = loss_of(replace(spec, aggregation="token_mean"), fresh)
        if spec.ratio != "sequence":
            torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
        assert output.ratios.tolist() == [1.0] * len(expected)
        assert not output.clipped.any()


def test_a_sequence_ratio_on_fresh_samples_shares_the_gradient_among_its_tokens():
    """GSPO's eq. 14: with weights 1, sequence ratio and token ratio give one gradient on fresh samples."""
    batch = ragged([(3, 1.0), (1, -2.0)], log_ratio=0.0)
    assert_same(loss_of(row("gspo"), batch), loss_of(row("grpo"), batch))


# what a loss must not depend on


@each_spec
@modest
@given(batch=batches(WEIGHTS), data=st.data())
def test_neither_the_order_of_sequences_nor_of_tokens_matters(spec: Algorithm, batch: Batch, data: st.DataObject):
    order = torch.tensor(data.draw(st.permutations(range(len(batch.logprobs)))))
    assert_same(loss_of(spec, batch), loss_of(spec, batch.select(order)), order)


@each_spec
@modest
@given(batch=batches(WEIGHTS), data=st.data())
def test_micro_batches_of_any_cut_add_up_to_the_update(spec: Algorithm, batch: Batch, data: st.DataObject):
    """Loss, gradients and metrics (Z3); the same goes for data-parallel ranks, which also share the totals."""
    totals = Totals.of(batch.loss_weights, batch.sequence_ids)
    num = len(batch.rewards)
    cut = data.draw(st.lists(st.integers(0, 3), min_size=num, max_size=num))
    whole, gradient = loss_of(spec, batch)
    loss, pieces, metrics = torch.zeros((), dtype=torch.float64), torch.full_like(gradient, math.nan), Metrics()
    for part in set(cut):
        tokens = batch.sequence(*(i for i in range(num) if cut[i] == part))
        output, pieces[tokens] = loss_of(spec, batch.select(tokens), totals)
        loss += output.loss
        metrics += output.metrics
    torch.testing.assert_close(loss, whole.loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pieces, gradient, rtol=1e-12, atol=1e-15)
    expected = whole.metrics.values_by_name()
    assert metrics.values_by_name() == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)


@each_spec
@modest
@given(batch=batches(WEIGHTS), seed=st.integers(0, 2**32 - 1))
def test_masked_tokens_leak_nothing(spec: Algorithm, batch: Batch, seed: int):
    """Whatever stands at a weight of 0, nan and inf included (Z4): no number changes in the least, and no gradient arises."""
    own = batch.loss_weights != 0
    rng = np.random.default_rng(seed)
    other = {
        k: torch.where(own, getattr(batch, k), torch.tensor(rng.choice(JUNK, len(own))))
        for k in ("logprobs", "old_logprobs", "advantages")
    }
    (output, gradient), (changed, changed_gradient) = loss_of(spec, batch), loss_of(spec, replace(batch, **other))
    for column in ("loss", "per_token", "ratios", "clipped"):
        assert torch.equal(getattr(output, column), getattr(changed, column)), column
    assert torch.equal(gradient, changed_gradient)
    assert str(output.metrics.values_by_name()) == str(changed.metrics.values_by_name())
    assert not gradient[~own].any()
    assert output.per_token[~own].tolist() == [0.0] * int((~own).sum())
    assert output.ratios[~own].tolist() == [1.0] * int((~own).sum())
    assert not output.clipped[~own].any()


@each_spec
@modest
@given(batch=batches(WEIGHTS))
def test_masked_tokens_and_fully_masked_sequences_count_nowhere(spec: Algorithm, batch: Batch):
    own = torch.nonzero(batch.loss_weights)[:, 0]
    if len(own):
        assert_same(loss_of(spec, batch), loss_of(spec, batch.select(own)), own)


# denominators, by hand


def ragged(sequences: list[tuple[int, float]], log_ratio: float, weights: list[float] | None = None) -> Batch:
    """(length, advantage) each; all log-probs -1."""
    lengths = torch.tensor([length for length, _ in sequences])
    total = int(lengths.sum())
    return Batch(
        logprobs=torch.full((total,), -1.0, dtype=torch.float64),
        old_logprobs=torch.full((total,), -1.0 - log_ratio, dtype=torch.float64),
        advantages=torch.repeat_interleave(torch.tensor([a for _, a in sequences], dtype=torch.float64), lengths),
        loss_weights=torch.tensor(weights or [1.0] * total, dtype=torch.float64),
        sequence_ids=torch.repeat_interleave(torch.arange(len(sequences)), lengths),
        rewards=torch.zeros(len(sequences), dtype=torch.float64),
        groups=torch.zeros(len(sequences), dtype=torch.int64),
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"aggregation": "token_mean"}, (3 * 6 + 1 * 2) / 4),
        ({"aggregation": "sequence_mean"}, (6 + 2) / 2),
        ({"aggregation": "constant", "loss_constant": 10.0}, (3 * 6 + 1 * 2) / (2 * 10)),
    ],
)
def test_who_divides_by_what(words: dict[str, Any], expected: float):
    """Three tokens with advantage 6 and one with 2; at ratio 1 the loss of a token is -A."""
    output, _ = loss_of(row("grpo", **words), ragged([(3, 6.0), (1, 2.0)], log_ratio=0.0))
    assert float(output.loss) == pytest.approx(-expected, rel=1e-15)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", (1 * 6 + 0.5 * 6 + 2 * 2) / 3.5),
        ("sequence_mean", ((1 * 6 + 0.5 * 6) / 1.5 + 2 * 2 / 2) / 2),
    ],
)
def test_loss_weights_give_the_weighted_mean(aggregation: str, expected: float):
    """Σ w·L / Σ w; a weight of 0 takes its token out."""
    batch = ragged([(3, 6.0), (2, 2.0)], 0.0, [1.0, 0.0, 0.5, 2.0, 0.0])
    output, _ = loss_of(row("grpo", aggregation=aggregation), batch)
    assert float(output.loss) == pytest.approx(-expected, rel=1e-15)


def test_a_sequence_ratio_is_the_plain_mean_over_loss_tokens():
    """Loss weights weigh the loss and not the ratio: (2 · 8) to the power 1/2, whatever the weights."""
    batch = ragged([(3, 1.0), (1, 1.0)], 0.0, [3.0, 0.0, 0.25, 1.0])
    ratios = torch.tensor([2.0, 50.0, 8.0, 0.1], dtype=torch.float64)
    output, _ = loss_of(row("gspo"), replace(batch, old_logprobs=batch.logprobs - ratios.log()))
    assert output.ratios.tolist() == pytest.approx([4.0, 1.0, 4.0, 0.1])


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_a_common_factor_of_the_loss_weights_changes_nothing(aggregation: str):
    first = ragged([(3, 6.0), (2, 2.0)], 0.1, [1.0, 0.0, 0.5, 2.0, 0.0])
    assert_same(
        loss_of(row("grpo", aggregation=aggregation), first),
        loss_of(row("grpo", aggregation=aggregation), replace(first, loss_weights=7 * first.loss_weights)),
    )


# what is recorded


def test_metrics_by_hand():
    """Four loss tokens with ratios 1.1, 1.1, 8 and 0.1, two of them clipped."""
    batch = ragged([(3, 1.0), (2, -1.0)], 0.0, [1.0, 1.0, 0.0, 1.0, 1.0])
    ratios = torch.tensor([1.1, 1.1, 100.0, 8.0, 0.1], dtype=torch.float64)
    output, _ = loss_of(row("grpo"), replace(batch, old_logprobs=batch.logprobs - ratios.log()))
    metrics = output.metrics.values_by_name()
    assert output.ratios.tolist() == pytest.approx([1.1, 1.1, 1.0, 8.0, 0.1])
    assert output.clipped.tolist() == [False, False, False, False, True]
    assert metrics["train/ppo_kl"] == pytest.approx(-math.log(1.1 * 1.1 * 8 * 0.1) / 4)
    assert metrics["train/pg_clipfrac"] == 0.25
    assert metrics["train/ratio/max"] == pytest.approx(8.0)
    assert metrics["train/pg_loss"] == pytest.approx(-(1.1 + (-8.0 - 0.8) / 2) / 2)


def test_the_largest_ratio_is_that_of_a_loss_token():
    """The 1 that stands at a masked token is not one of the policy's."""
    batch = ragged([(3, 1.0)], math.log(0.5), [1.0, 0.0, 1.0])
    assert loss_of(row("grpo"), batch)[0].metrics["train/ratio/max"].value() == pytest.approx(0.5)


def test_a_masked_token_is_not_clipped_by_a_floor_above_1():
    batch = ragged([(3, 1.0)], 0.0, [1.0, 0.0, 1.0])
    output, _ = loss_of(row("cispo", ratio_min=1.5), batch)
    assert output.clipped.tolist() == [True, False, True]
    assert output.metrics["train/pg_clipfrac"].value() == 1.0


BOUNDED = {
    "grpo": (row("grpo"), {"clip_low": 1.0, "clip_high": 1e30}),
    "gspo": (row("gspo"), {"clip_low": 1.0, "clip_high": 1e30}),
    "cispo": (row("cispo"), {"ratio_max": 1e30}),
    "unified": (row("cispo", mask="trust_region"), {"ratio_max": 1e30, "mask": "none"}),
    "mask_only": (row("cispo", mask="trust_region", clip="none"), {"mask": "none"}),
}


@pytest.mark.parametrize(("spec", "unbounded"), BOUNDED.values(), ids=BOUNDED)
@modest
@given(batch=batches())
def test_clipped_says_where_a_bound_changed_the_gradient(spec: Algorithm, unbounded: dict[str, Any], batch: Batch):
    """Against the same loss with bounds that nothing reaches."""
    output, gradient = loss_of(spec, batch)
    _, free = loss_of(replace(spec, **unbounded), batch)
    assert output.clipped.tolist() == (gradient != free).tolist()
