"""What holds between losses, and what a loss must not depend on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import oracle_terms as terms
import pytest
import torch
from batches import JUNK, MASKABLE, WEIGHTS, Batch, batches, in_ranks, loss_of, modest, ragged, row
from hypothesis import given
from hypothesis import strategies as st
from words import BATCH

from sluice.algorithms import ALGORITHMS, Algorithm, policy_loss, token_coefficients
from sluice.tracking.metrics import Metrics

TIS = {"correction": "tis", "correction_level": "sequence", "correction_max": 2.0}
REJECTION = {"rejection": "geometric", "rejection_min": 0.5, "rejection_max": 2.0}
KL = {"kl": "loss", "kl_estimator": "k3", "kl_coef": 0.1, "entropy_coef": 0.01}
SPECS = {name: row(name) for name in ALGORITHMS} | {
    "sequence_cispo": row("cispo", ratio="sequence"),
    "gspo_token_mean": row("gspo", aggregation="token_mean"),
    "grpo_prompt_mean": row("grpo", aggregation="prompt_mean"),
    "cispo_blend_corrected": row("cispo", aggregation="blend", token_share=0.3, **TIS, **KL),
    "grpo_rejecting": row("grpo", **REJECTION, **KL),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def assert_same(first: Any, second: Any, tokens: torch.Tensor | None = None) -> None:
    """Two results of `loss_of`; the second's tokens may be some of the first's."""
    (a, a_gradient), (b, b_gradient) = first, second
    chosen = slice(None) if tokens is None else tokens
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a_gradient[chosen], b_gradient, rtol=1e-12, atol=1e-12)


def coefficients_of(spec: Algorithm, batch: Batch, **reduce: Any) -> torch.Tensor:
    return token_coefficients(spec, batch.loss_weights, batch.sequence_ids, batch.group_ids, **reduce)


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
    for spec in (*(row(name) for name in ALGORITHMS), row("reinforce", ratio="token")):
        output, gradient = loss_of(replace(spec, aggregation="token_mean"), fresh)
        if spec.ratio != "sequence":
            torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
        assert output.ratios.tolist() == [1.0] * len(expected)
        assert not output.clipped.any()


def test_a_sequence_ratio_on_fresh_samples_shares_the_gradient_among_its_tokens():
    """GSPO's eq. 14: with weights 1, sequence ratio and token ratio give one gradient on fresh samples."""
    batch = ragged([(3, 1.0), (1, -2.0)], log_ratio=0.0)
    assert_same(loss_of(row("gspo"), batch), loss_of(row("grpo"), batch))


@modest
@given(batch=batches(WEIGHTS))
def test_unified_with_an_infinite_region_is_cispo(batch: Batch):
    unified = row("unified", clip_low=1.0, clip_high=1e30)
    assert_same(loss_of(unified, batch), loss_of(row("cispo"), batch))


@modest
@given(batch=batches(WEIGHTS))
def test_dppo_that_may_move_by_any_probability_is_cispo(batch: Batch):
    """A difference of probabilities is at most 1; old log-probs above 0 are none."""
    batch = replace(batch, old_logprobs=torch.where(batch.own, batch.old_logprobs.clamp(max=0.0), batch.old_logprobs))
    dppo = row("dppo", tv_low=1.0, tv_high=1.0, clip="weight", ratio_max=5.0, aggregation="token_mean")
    assert_same(loss_of(dppo, batch), loss_of(row("cispo"), batch))


@modest
@given(batch=batches(WEIGHTS))
def test_cispo_without_bounds_is_off_policy_reinforce(batch: Batch):
    assert_same(loss_of(row("cispo", ratio_max=1e30), batch), loss_of(row("reinforce", ratio="token"), batch))


@modest
@given(batch=batches(WEIGHTS))
def test_ppo_with_a_dual_clip_that_nothing_reaches_is_reinforce_pp(batch: Batch):
    assert_same(loss_of(row("ppo", dual_clip=1e30), batch), loss_of(row("reinforce_pp"), batch))


CORRECTIONS: list[dict[str, Any]] = [
    {"correction": word, "correction_level": level, "correction_max": 2.0}
    for word in ("tis", "mis", "icepop")
    for level in ("token", "sequence", "geometric")
] + [{"rejection": "sequence"}, {"rejection": "geometric", "rejection_min": 0.9, "rejection_max": 1.1}]


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("words", [{}, KL, *CORRECTIONS], ids=lambda words: "-".join(map(str, words.values())))
def test_a_cut_through_sequences_changes_the_loss_exactly_where_the_row_couples_tokens(
    name: str, words: dict[str, Any]
):
    """Halves of every sequence, apart, with the coefficients of the whole."""
    spec = row(name, **words)
    coefficients = coefficients_of(spec, BATCH)
    whole, gradient = loss_of(spec, BATCH, coefficients)
    tokens = torch.arange(len(gradient))
    halves = [tokens[tokens % 2 == side] for side in (0, 1)]
    parts = [loss_of(spec, BATCH.select(half), coefficients[half]) for half in halves]
    loss = sum(output.loss for output, _ in parts)
    assert (loss - whole.loss).abs() > 1e-6 if spec.couples_tokens else (loss - whole.loss).abs() < 1e-12
    same = all(torch.equal(part, gradient[half]) for (_, part), half in zip(parts, halves, strict=True))
    assert same is not spec.couples_tokens


def test_sapo_is_steepest_at_1_and_flat_far_away():
    """SAPO's fig. 1: the gradient to log π is Â at r = 1, a fifth of it at r = 5, none at 30 (τ = 1)."""
    slopes = []
    for ratio in (1.0, 5.0, 30.0):
        _, gradient = loss_of(row("sapo"), ragged([(1, 2.0)], math.log(ratio)))
        slopes.append(-float(gradient[0]))
    sigmoid = 1 / (1 + math.exp(-4.0))
    assert slopes == pytest.approx([2.0, 2 * 5 * 4 * sigmoid * (1 - sigmoid), 0.0], abs=1e-10)


@pytest.mark.parametrize(("share", "end"), [(0.0, "sequence_mean"), (1.0, "token_mean")])
@modest
@given(batch=batches(WEIGHTS))
def test_a_blend_reaches_both_its_ends(share: float, end: str, batch: Batch):
    blend = replace(row("grpo", aggregation="blend", token_share=0.5), token_share=share)
    assert_same(loss_of(blend, batch), loss_of(row("grpo", aggregation=end), batch))


@modest
@given(batch=batches(WEIGHTS))
def test_prompt_mean_lies_between_the_other_means(batch: Batch):
    """With one sequence per prompt it is sequence_mean; with one prompt token_mean."""
    each, one = torch.arange(len(batch.rewards)), torch.zeros(len(batch.rewards), dtype=torch.int64)
    spec = row("grpo", aggregation="prompt_mean")
    for groups, aggregation in ((each, "sequence_mean"), (one, "token_mean")):
        grouped = replace(batch, groups=groups, group_ids=groups[batch.sequence_ids])
        assert_same(loss_of(spec, grouped), loss_of(row("grpo", aggregation=aggregation), batch))


@each_spec
@modest
@given(batch=batches(WEIGHTS))
def test_a_loss_is_its_coefficients_times_its_tokens(spec: Algorithm, batch: Batch):
    output, _ = loss_of(spec, batch)
    coefficients = coefficients_of(spec, batch)
    policy_part = (coefficients * output.per_token).sum()
    assert output.metrics["train/pg_loss"].value() == pytest.approx(float(policy_part), rel=1e-12, abs=1e-12)
    if not spec.kl and not spec.entropy_coef:
        torch.testing.assert_close(output.loss, policy_part, rtol=1e-12, atol=1e-12)
    if spec.aggregation in ("token_mean", "sequence_mean", "prompt_mean", "blend") and batch.own.any():
        assert float(coefficients.sum()) == pytest.approx(1.0, rel=1e-12)


# what a loss must not depend on


@each_spec
@modest
@given(batch=batches(WEIGHTS), data=st.data())
def test_neither_the_order_of_sequences_nor_of_tokens_matters(spec: Algorithm, batch: Batch, data: st.DataObject):
    order = torch.tensor(data.draw(st.permutations(range(len(batch.logprobs)))))
    assert_same(loss_of(spec, batch), loss_of(spec, batch.select(order)), order)


@each_spec
@modest
@given(batch=batches(WEIGHTS), shift=st.integers(1, 5))
def test_names_of_groups_do_not_matter(spec: Algorithm, batch: Batch, shift: int):
    """Groups are told apart by id, whatever the ids are and in whatever order (Z2)."""
    renamed = replace(batch, group_ids=100 - shift * batch.group_ids)
    assert_same(loss_of(spec, batch), loss_of(spec, renamed))


@each_spec
@modest
@given(batch=batches(WEIGHTS), data=st.data())
def test_micro_batches_of_any_cut_add_up_to_the_update(spec: Algorithm, batch: Batch, data: st.DataObject):
    """Loss, gradients and metrics (Z3), and no matter whether a prompt's answers lie in one micro-batch."""
    coefficients = coefficients_of(spec, batch)
    num = len(batch.rewards)
    cut = data.draw(st.lists(st.integers(0, 3), min_size=num, max_size=num))
    whole, gradient = loss_of(spec, batch)
    loss, pieces, metrics = torch.zeros((), dtype=torch.float64), torch.full_like(gradient, math.nan), Metrics()
    for part in set(cut):
        tokens = batch.sequence(*(i for i in range(num) if cut[i] == part))
        output, pieces[tokens] = loss_of(spec, batch.select(tokens), coefficients[tokens])
        loss += output.loss
        metrics += output.metrics
    torch.testing.assert_close(loss, whole.loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pieces, gradient, rtol=1e-12, atol=1e-15)
    expected = whole.metrics.values_by_name()
    assert metrics.values_by_name() == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)


@each_spec
@modest
@given(batch=batches(WEIGHTS), size=st.sampled_from([2, 3]))
def test_ranks_of_any_number_add_up_to_one_process(spec: Algorithm, batch: Batch, size: int):
    """Z3: groups whole on a rank, coefficients with sums over all ranks; a rank may have nothing to do."""
    whole, gradient = loss_of(spec, batch)
    groups = sorted(set(batch.groups.tolist()))
    ours = [[i for i, g in enumerate(batch.groups.tolist()) if groups.index(g) % size == rank] for rank in range(size)]

    def work(rank: int, reduce: Any) -> Any:
        tokens = batch.sequence(*ours[rank]) if ours[rank] else torch.zeros(0, dtype=torch.int64)
        mine = batch.select(tokens)
        return tokens, *loss_of(spec, mine, coefficients_of(spec, mine, reduce=reduce))

    pieces, loss = torch.full_like(gradient, math.nan), torch.zeros((), dtype=torch.float64)
    for tokens, output, part in in_ranks(size, work):
        pieces[tokens] = part
        loss += output.loss
    torch.testing.assert_close(loss, whole.loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pieces, gradient, rtol=1e-12, atol=1e-15)


@each_spec
@modest
@given(batch=batches(WEIGHTS), seed=st.integers(0, 2**32 - 1))
def test_masked_tokens_leak_nothing(spec: Algorithm, batch: Batch, seed: int):
    """Whatever stands at a weight of 0, nan and inf included (Z4): no number changes in the least, and no gradient arises."""
    own = batch.loss_weights != 0
    rng = np.random.default_rng(seed)
    other = {k: torch.where(own, getattr(batch, k), torch.tensor(rng.choice(JUNK, len(own)))) for k in MASKABLE}
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


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"aggregation": "token_mean"}, (3 * 6 + 1 * 2) / 4),
        ({"aggregation": "sequence_mean"}, (6 + 2) / 2),
        ({"aggregation": "constant", "loss_constant": 10.0}, (3 * 6 + 1 * 2) / (2 * 10)),
        ({"aggregation": "blend", "token_share": 0.25}, 0.25 * (3 * 6 + 1 * 2) / 4 + 0.75 * (6 + 2) / 2),
        ({"aggregation": "prompt_mean"}, (3 * 6 + 1 * 2) / 4),
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


def test_prompt_mean_by_hand():
    """Two sequences of one prompt, one of another: each prompt's own token mean, and a prompt without a loss token is none."""
    batch = ragged([(3, 6.0), (1, 2.0), (2, 5.0), (2, 9.0)], 0.0, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    groups = torch.tensor([7, 7, 3, 5])
    batch = replace(batch, groups=groups, group_ids=groups[batch.sequence_ids])
    output, _ = loss_of(row("grpo", aggregation="prompt_mean"), batch)
    assert float(output.loss) == pytest.approx(-((3 * 6 + 2) / 4 + 5) / 2, rel=1e-15)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "prompt_mean", "blend"])
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
    assert metrics["train/ratio/ess"] == pytest.approx(terms.effective_sample_size([1.1, 1.1, 8.0, 0.1]))


def test_the_mismatch_with_the_engine_is_recorded():
    """Weights 2, 0.5 and 1, of the sampler's tokens: how far it is from the trainer, and what a correction leaves of them."""
    batch = ragged([(2, 1.0), (2, -1.0)], 0.0, [1.0, 1.0, 0.0, 1.0])
    weights = torch.tensor([2.0, 0.5, 100.0, 1.0], dtype=torch.float64)
    spec = row("grpo", correction="icepop", correction_level="token", correction_min=0.8, correction_max=3.0)
    output, _ = loss_of(spec, replace(batch, engine_logprobs=batch.old_logprobs - weights.log()))
    metrics = output.metrics.values_by_name()
    assert metrics["train/mismatch/kl"] == pytest.approx(0.0, abs=1e-15)
    assert metrics["train/mismatch/k3"] == pytest.approx(sum(w - 1 - math.log(w) for w in (2.0, 0.5, 1.0)) / 3)
    assert metrics["train/mismatch/ess"] == pytest.approx(terms.effective_sample_size([2.0, 0.5, 1.0]))
    assert metrics["train/correction/dropped"] == pytest.approx(1 / 3)


def test_ppo_kl_is_not_0_by_construction():
    """Z14: it is measured against the old policy, and so is 0 on fresh samples and nowhere else."""
    for log_ratio in (0.0, 0.3, -0.2):
        output, _ = loss_of(row("grpo"), ragged([(3, 1.0)], log_ratio))
        assert output.metrics["train/ppo_kl"].value() == pytest.approx(-log_ratio)


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
    "dual_clip": (row("ppo"), {"clip_low": 1.0, "clip_high": 1e30, "dual_clip": 1e30}),
    "dppo": (row("dppo"), {"mask": "none"}),
}


@pytest.mark.parametrize(("spec", "unbounded"), BOUNDED.values(), ids=BOUNDED)
@modest
@given(batch=batches(same=True))
def test_clipped_says_where_a_bound_changed_the_gradient(spec: Algorithm, unbounded: dict[str, Any], batch: Batch):
    """Against the same loss with bounds that nothing reaches.

    With one advantage per sequence: else a bound on one token of a shared ratio changes the gradient of the others.
    """
    output, gradient = loss_of(spec, batch)
    _, free = loss_of(replace(spec, **unbounded), batch)
    assert output.clipped.tolist() == (gradient != free).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("spec", "advantage"),
    [
        (row("dppo"), 1.0),
        (row("unified", clip="none"), 1.0),
        (row("sapo", mask="trust_region"), 1.0),
        (row("grpo", rejection="sequence"), -1.0),
        (row("cispo", correction="mis"), -1.0),
        (row("reinforce", ratio="token", correction="icepop"), -1.0),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_what_a_mask_or_a_rejection_takes_out_leaves_no_nan_behind(
    spec: Algorithm, advantage: float, dtype: torch.dtype
):
    """Its ratio is infinite: times a mask of 0 it would be 0 in the loss and nan in the gradient."""
    logprobs = torch.tensor([-0.1, -1.0], dtype=dtype, requires_grad=True)
    old = torch.tensor([-1000.0, -1.0], dtype=dtype)
    engine = torch.tensor([-2000.0, -1.0], dtype=dtype)
    weights, ids = torch.ones(2, dtype=dtype), torch.tensor([0, 1])
    output = policy_loss(
        spec, logprobs, old, torch.tensor([advantage, 1.0], dtype=dtype), weights, ids, engine_logprobs=engine
    )
    output.loss.backward()
    assert logprobs.grad is not None
    assert float(logprobs.grad[0]) == 0.0
    assert float(logprobs.grad[1]) < 0
    assert torch.isfinite(output.loss)
