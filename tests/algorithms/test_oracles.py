"""The oracles themselves against closed forms, so that an agreement with them means something."""

from __future__ import annotations

import math
from functools import partial

import oracle
import oracle_advantages as adv
import oracle_terms as terms
import pytest
import torch
from oracle import Response


def leaf(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def response(ratio: float, advantage: float, logprob: float = -1.0, group: int = 0) -> Response:
    return Response([leaf(logprob)], [logprob - math.log(ratio)], [advantage], [1.0], group)


def value_and_slope(term: oracle.Term, ratio: float, advantage: float) -> tuple[float, float]:
    o = response(ratio, advantage)
    value = torch.as_tensor(term(o, 0), dtype=torch.float64)
    if value.requires_grad:
        value.backward()
    return oracle.sg(value), float(o.logprobs[0].grad or 0.0)


@pytest.mark.parametrize(
    ("row", "ratio", "advantage", "value", "slope"),
    [
        # d r / d log π = r, so inside the region the slope is r·Â
        ("grpo", 1.1, 2.0, 2.2, 2.2),
        ("grpo", 1.5, 2.0, 2.4, 0.0),
        ("grpo", 1.5, -2.0, -3.0, -3.0),
        ("grpo", 0.5, -2.0, -1.6, 0.0),
        ("dapo", 1.25, 2.0, 2.5, 2.5),
        ("ppo", 2.9, -2.0, -5.8, -5.8),
        ("ppo", 3.1, -2.0, -6.0, 0.0),
        ("cispo", 7.0, 2.0, -10.0, 10.0),
        ("cispo", 0.1, 2.0, -0.2, 0.2),
        ("unified", 1.3, 2.0, 0.0, 0.0),
        ("unified", 1.3, -2.0, 2.6, -2.6),
        ("unified", 0.7, -2.0, 0.0, 0.0),
        # σ(0) = 1/2 and σ'(0) = 1/4: at r = 1 the value is 2·Â/τ and the slope Â
        ("sapo", 1.0, 2.0, 4.0, 2.0),
        ("sapo", 1.0, -2.0, -4.0 / 1.05, -2.0),
        # SAPO's eq. 8: the slope is 4·σ·(1 - σ)·r·Â
        ("sapo", 2.0, 2.0, 8 / (1 + math.exp(-1)), 4 * 2 * 2 * math.exp(-1) / (1 + math.exp(-1)) ** 2),
        # e^-1 · (1 - 1/r) is 0.08 at r = 1.3, and 0.18 at 2
        ("dppo", 1.3, 2.0, -2.6, 2.6),
        ("dppo", 2.0, 2.0, 0.0, 0.0),
        ("dppo", 2.0, -2.0, 4.0, -4.0),
        ("dppo", 0.5, -2.0, 0.0, 0.0),
        ("reinforce", 9.0, 2.0, -2.0, 2.0),
    ],
)
def test_terms_by_hand(row: str, ratio: float, advantage: float, value: float, slope: float):
    assert value_and_slope(oracle.ROWS[row][0], ratio, advantage) == pytest.approx((value, slope), rel=1e-14)


def test_means_by_hand():
    """Three responses of two prompts, with 1, 3 and 2 tokens that are worth 8, 2 and 5 each."""
    responses = [
        Response([leaf(0.0)] * n, [0.0] * n, [worth] * n, [1.0] * n, group)
        for n, worth, group in ((1, 8.0, 4), (3, 2.0, 4), (2, 5.0, 9))
    ]

    def worth(o: Response, t: int) -> float:
        return o.advantages[t]

    assert oracle.token_mean(responses, worth) == (8 + 6 + 10) / 6
    assert oracle.sequence_mean(responses, worth) == (8 + 2 + 5) / 3
    assert oracle.prompt_mean(responses, worth) == (14 / 4 + 5) / 2
    assert oracle.constant(responses, worth, 10.0) == pytest.approx(24 / 30, rel=1e-15)
    assert oracle.blend(responses, worth, 0.25) == 0.25 * 4 + 0.75 * 5


def test_kl_estimates_average_to_the_kl_and_k2_to_its_gradient():
    """Over all of a small vocabulary, with the policy's own weights."""
    logits, ref = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    logp, logq = logits.log_softmax(0), ref.log_softmax(0)
    exact = (logp.exp() * (logp - logq)).sum()
    (gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)
    weights = [oracle.sg(p) for p in logp.exp()]
    average = {name: sum(w * kl(p, float(q)) for w, p, q in zip(weights, logp, logq)) for name, kl in terms.KL.items()}
    for name in ("k1", "k3", "k1_st", "k3_st"):
        assert oracle.sg(average[name]) == pytest.approx(oracle.sg(exact), rel=1e-12)
    for name in ("k2", "k1_st", "k3_st"):
        found = torch.autograd.grad(average[name], logits, retain_graph=True)[0]
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-14)
    # k1 as a loss does nothing on average
    assert torch.autograd.grad(average["k1"], logits, retain_graph=True)[0].abs().max() < 1e-15


def test_corrections_by_hand():
    o = Response([], [-1.0, -2.0], [], [], engine_logprobs=[-1.0 - math.log(4), -2.0 - math.log(0.25)])
    for level, expected in (("token", [4, 0.25]), ("sequence", [1, 1]), ("geometric", [1, 1])):
        assert [terms.importance(o, t, level) for t in (0, 1)] == pytest.approx(expected, rel=1e-14)
    o = Response([], [-1.0] * 2, [], [], engine_logprobs=[-1.0 - math.log(4)] * 2)
    assert [terms.importance(o, 0, level) for level in ("sequence", "geometric")] == pytest.approx([16, 4], rel=1e-14)
    assert [terms.tis(w, None, 2) for w in (0.1, 3.0)] == [0.1, 2]
    assert [terms.mis(w, low, 2) for w, low in ((0.1, None), (0.1, 0.5), (3.0, None))] == [0.1, 0, 0]
    assert [terms.icepop(w, 0.5, 2) for w in (0.1, 0.5, 1.5, 3.0)] == [0, 0.5, 1.5, 0]
    assert terms.accepted(o, "geometric", 0.5, 4.5)
    assert not terms.accepted(o, "sequence", 0.5, 4.5)


def test_the_effective_sample_size_of_equal_and_of_one_weight():
    assert terms.effective_sample_size([0.3] * 4) == pytest.approx(1.0)
    assert terms.effective_sample_size([1e-9, 5.0, 1e-9, 1e-9]) == pytest.approx(0.25)


def test_baselines_by_hand():
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert adv.centre(rewards) == pytest.approx([0.4, -0.6, -0.6, 0.4, 0.4])
    assert adv.leave_one_out(rewards) == pytest.approx([0.5, -0.75, -0.75, 0.5, 0.5])
    assert adv.z_scores(rewards, 0.0) == pytest.approx([c / math.sqrt(1.2 / 4) for c in (0.4, -0.6, -0.6, 0.4, 0.4)])
    assert adv.by_group(adv.centre, [3.0, 10.0, 6.0, 20.0], [4, 1, 4, 1]) == [-1.5, -5.0, 1.5, 5.0]


def test_whitening_by_hand():
    """The values 0, 0, 0, 4 as 0 three times and 4 once: mean 1, variance 12 / 3."""
    assert adv.whiten([0.0, 4.0], [3, 1]) == pytest.approx([-0.5, 1.5], rel=1e-8)
    assert adv.whiten([0.0, 4.0], [3, 1], ddof=0) == pytest.approx([-1 / math.sqrt(3), math.sqrt(3)], rel=1e-8)


def test_gae_is_its_recursion_and_its_ends():
    rewards, values = [0.5, -1.0, 0.0, 2.0], [0.3, 0.1, -0.4, 1.2]
    ahead, expected = 0.0, []
    for delta in reversed(adv.td_errors(rewards, values, 0.9)):
        ahead = delta + 0.9 * 0.7 * ahead
        expected.insert(0, ahead)
    assert adv.gae(rewards, values, 0.9, 0.7) == pytest.approx(expected, rel=1e-13)
    assert adv.gae(rewards, values, 0.9, 0.0) == adv.td_errors(rewards, values, 0.9)
    returns = adv.discounted(rewards, 0.9)
    assert adv.gae(rewards, values, 0.9, 1.0) == pytest.approx([g - v for g, v in zip(returns, values)], rel=1e-13)


def test_kl_in_the_reward_by_hand():
    kl = [0.5, 0.25, 1.0]
    assert adv.with_kl_to_come(2.0, kl, 0.1) == pytest.approx([2 - 0.175, 2 - 0.125, 2 - 0.1])
    assert adv.with_kl_per_token(2.0, kl, 0.1) == pytest.approx([-0.05, -0.025, 1.9])
    assert adv.with_kl_of_the_answer(2.0, kl, 0.1) == pytest.approx(2 - 0.175)
    # the same thing said twice: what is to come of the penalised rewards
    assert adv.discounted(adv.with_kl_per_token(2.0, kl, 0.1), 1.0) == pytest.approx(adv.with_kl_to_come(2.0, kl, 0.1))


@pytest.mark.parametrize(
    ("value", "clip", "expected", "slope"),
    [
        (2.0, None, 4.5, -3.0),
        # 1 + 0.5 is farther from 5 than 2 is: the clipped one counts, and is flat
        (2.0, 0.5, 6.125, 0.0),
        # from below, 0 is farther than 1 - 0.5
        (0.0, 0.5, 12.5, -5.0),
        (1.2, 0.5, 7.22, -3.8),
    ],
)
def test_value_loss_by_hand(value: float, clip: float | None, expected: float, slope: float):
    v = leaf(value)
    loss = torch.as_tensor(terms.value_loss(v, 1.0, 5.0, clip), dtype=torch.float64)
    if loss.requires_grad:
        loss.backward()
    assert (oracle.sg(loss), float(v.grad or 0.0)) == pytest.approx((expected, slope))


def test_explained_variance_of_perfect_and_of_blind_critics():
    assert terms.explained_variance([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1
    assert terms.explained_variance([7.0, 7.0, 7.0], [1.0, 2.0, 3.0]) == 0
    assert terms.explained_variance([0.5, 1.0, 1.5], [1.0, 2.0, 3.0]) == pytest.approx(0.75)


def test_the_objective_puts_terms_together():
    o = response(1.0, 2.0)
    o.engine_logprobs, o.ref_logprobs, o.entropies = [-1.0 - math.log(3)], [-1.5], [leaf(0.7)]
    value = terms.objective(
        [o],
        oracle.reinforce,
        oracle.token_mean,
        correction=lambda o, t: terms.tis(terms.importance(o, t, "token"), None, 2.0),
        kl=terms.k2,
        kl_coef=0.1,
        entropy_coef=0.01,
    )
    assert oracle.sg(value) == pytest.approx(2.0 * 2.0 * -1.0 - 0.1 * 0.125 + 0.01 * 0.7)
    value.backward()
    assert float(o.logprobs[0].grad) == pytest.approx(2.0 * 2.0 - 0.1 * 0.5)
    assert float(o.entropies[0].grad) == 0.01


def test_sequence_ratios_are_geometric_means():
    ratios = [2.0, 8.0]
    o = Response([leaf(-1.0), leaf(-1.0)], [-1.0 - math.log(r) for r in ratios], [1.0] * 2, [1.0] * 2)
    assert oracle.sg(oracle.sequence_ratio(o)) == pytest.approx(4.0)
    term = partial(oracle.surrogate, low=1.0, high=9.0, ratio=oracle.sequence_ratio)
    oracle.sequence_mean([o], term).backward()
    assert [float(x.grad) for x in o.logprobs] == pytest.approx([2.0, 2.0])
