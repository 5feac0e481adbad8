"""Advantages from the rewards of groups, from values, and for the tokens of samples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from sluice.algorithms.aggregation import Reduce, one_rank, sums_by
from sluice.algorithms.kl import kl_estimates
from sluice.algorithms.spec import Algorithm
from sluice.types import Group, Sample

WHITEN_EPS = 1e-8
"""Added to the variance, under the root."""


def compute_advantages(
    rewards: Tensor, group_ids: Tensor, spec: Algorithm, counts: Tensor | None = None, reduce: Reduce = one_rank
) -> Tensor:
    """[N] rewards and the group of each → [N] advantages. Groups are told apart by id; order and sizes do not matter.

    raw: R. centred: R - mean of the group (Dr. GRPO, arXiv 2503.20783). z_score: centred / (std + std_eps), with the
    standard deviation of the group over n - std_ddof (GRPO, arXiv 2402.03300, section 4.1.2). leave_one_out: R - mean of
    the others of the group (RLOO, arXiv 2402.14740). A group of one has nothing to compare with, so all but raw give
    it 0; so they do to a group whose rewards are all equal.
    Then, over the whole batch, batch_std: divided by the standard deviation of all N advantages + std_eps (ScaleRL, arXiv
    2510.13786); whiten: see `whiten`, each advantage counting `counts` [N] times, its number of tokens; left out, once.
    `reduce` sums over data-parallel ranks; a group lies whole on one of them. Raises ValueError for gae, which needs values.
    """
    if spec.needs_values:
        raise ValueError(
            "advantage gae comes from values, not from rewards alone: see sluice.algorithms.advantages.gae"
        )
    rewards = rewards if rewards.is_floating_point() else rewards.double()
    advantages = rewards.clone() if spec.advantage == "raw" else _within_groups(rewards, group_ids, spec)
    if spec.normalise == "whiten":
        assert spec.std_ddof is not None
        return whiten(advantages, torch.ones_like(rewards) if counts is None else counts, spec.std_ddof, reduce)
    if spec.normalise == "batch_std":
        assert spec.std_ddof is not None
        _, variance = _moments(advantages, torch.ones_like(advantages), spec.std_ddof, reduce)
        return advantages / (variance.sqrt() + (spec.std_eps or 0.0))
    return advantages


def _within_groups(rewards: Tensor, group_ids: Tensor, spec: Algorithm) -> Tensor:
    _, group = torch.unique(group_ids, return_inverse=True)
    count = sums_by(group, torch.ones_like(rewards))
    mean = sums_by(group, rewards) / count
    # equal rewards are compared, not subtracted: their mean may be off by a rounding, which z_score would blow up
    lowest = torch.zeros_like(mean).scatter_reduce(0, group, rewards, "amin", include_self=False)
    highest = torch.zeros_like(mean).scatter_reduce(0, group, rewards, "amax", include_self=False)
    centred = torch.where((lowest == highest)[group], 0.0, rewards - mean[group])
    if spec.advantage == "centred":
        return centred
    if spec.advantage == "leave_one_out":  # R - (n·mean - R) / (n - 1) = (R - mean)·n / (n - 1)
        return centred * (count / (count - 1).clamp(min=1))[group]
    assert spec.std_ddof is not None
    variance = sums_by(group, centred.square()) / (count - spec.std_ddof).clamp(min=1)
    return centred / (variance.sqrt() + (spec.std_eps or 0.0))[group]


def whiten(values: Tensor, weights: Tensor, ddof: int, reduce: Reduce = one_rank) -> Tensor:
    """(x - μ) / sqrt(σ² + 1e-8), [T] → [T], with the statistics of the values counted `weights` [T] times, over all ranks.

    REINFORCE++ (arXiv 2501.03262) and PPO as it is practised; σ² is over Σ weights - ddof.
    """
    mean, variance = _moments(values, weights, ddof, reduce)
    return (values - mean) * torch.rsqrt(variance + WHITEN_EPS)


def _moments(values: Tensor, weights: Tensor, ddof: int, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Two passes: the mean of squares minus the square of the mean would cancel."""
    count, total = reduce(torch.stack([weights.sum(), (weights * values).sum()])).unbind()
    mean = total / count.clamp(min=1)
    return mean, reduce((weights * (values - mean).square()).sum()) / (count - ddof).clamp(min=1)


def gae(
    rewards: Tensor, values: Tensor, sequence_ids: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [T] of the tokens that the policy wrote, in order, from the reward and the value of each [T].

    A_t = Σ_k (γλ)^k δ_t+k with δ_t = r_t + γ·V_t+1 - V_t and V = 0 after a sequence's last token (arXiv 1506.02438, eq. 16);
    the returns are A + V. Tokens of the environment are not among them: from one turn's end to the next turn's start is
    one step.
    """
    place = _places(sequence_ids)
    padded_rewards, padded_values = _pad(rewards, place), _pad(values, place)
    following = torch.cat([padded_values[1:], torch.zeros_like(padded_values[:1])])
    errors = padded_rewards + gamma * following - padded_values
    advantages = _accumulate(errors, gamma * gae_lambda)[place]
    return advantages, advantages + values


def discounted_sums(values: Tensor, sequence_ids: Tensor, factor: float) -> Tensor:
    """y_t = x_t + factor · y_t+1 inside each sequence, [T] → [T]; the tokens of a sequence are in order."""
    place = _places(sequence_ids)
    return _accumulate(_pad(values, place), factor)[place]


def _places(sequence_ids: Tensor) -> tuple[Tensor, Tensor]:
    """[T] positions in the sequence, and [T] numbers of the sequence: indices into a padded [longest, sequences]."""
    _, ids, lengths = torch.unique(sequence_ids, return_inverse=True, return_counts=True)
    order = torch.argsort(ids, stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(len(ids), device=ids.device) - (lengths.cumsum(0) - lengths)[ids[order]]
    return position, ids


def _pad(values: Tensor, place: tuple[Tensor, Tensor]) -> Tensor:
    longest, num = (int(index.max()) + 1 if len(index) else 1 for index in place)
    padded = values.new_zeros(longest, num)
    padded[place] = values
    return padded


def _accumulate(padded: Tensor, factor: float) -> Tensor:
    """In place: each row takes on `factor` times the row after it, from the last one on."""
    for t in reversed(range(len(padded) - 1)):
        padded[t] += factor * padded[t + 1]
    return padded


def assign_advantages(spec: Algorithm, samples: Sequence[Sample]) -> None:
    """Fill `advantages` of every sample (and `returns`, for gae): at each token that the policy wrote, 0 elsewhere.

    A trajectory counts once in its group, and what is summed along it goes on from sample to sample, however many it was cut
    into. With KL in the reward, each token costs kl_coef times its divergence from the reference: gae takes it token by
    token, raw from the token on (REINFORCE++, arXiv 2501.03262, eq. 8), and what compares a group takes it from the
    trajectory's reward (RLOO, arXiv 2402.14740). Raises ValueError for samples without the values or log-probs that it needs.
    """
    if not samples:
        return
    own = [[t for t, weight in enumerate(sample.loss_weights) if weight] for sample in samples]
    names: dict[tuple[int, int], int] = {}
    trajectories = torch.tensor([names.setdefault((sample.group, sample.index), len(names)) for sample in samples])
    trajectory = torch.repeat_interleave(trajectories, torch.tensor([len(tokens) for tokens in own]))
    penalties = _penalties(spec, samples, own)
    if not spec.needs_values:
        to_come = discounted_sums(penalties, trajectory, 1.0) if spec.kl_in_reward else penalties
        _spread(samples, own, "advantages", _from_rewards(spec, samples, own, to_come))
        return
    assert spec.gamma is not None
    assert spec.gae_lambda is not None
    rewards = _token_rewards(samples, own) - penalties
    advantages, returns = gae(rewards, _column(samples, own, "values"), trajectory, spec.gamma, spec.gae_lambda)
    _spread(samples, own, "advantages", _whitened(spec, advantages))
    _spread(samples, own, "returns", returns)


def _from_rewards(spec: Algorithm, samples: Sequence[Sample], own: list[list[int]], penalties: Tensor) -> Tensor:
    """[T] advantages of the own tokens; `penalties` [T] are those from each token on.

    What is compared is a unit: a trajectory, or with credit: turn one of its turns, with the same turn of the others.
    """
    units: dict[tuple[int, int, int], int] = {}
    rewards: list[float] = []
    runs: list[tuple[int, int]] = []  # (unit, number of tokens)
    first_token: dict[int, int] = {}
    position = 0
    for sample, tokens in zip(samples, own, strict=True):
        for turn, length in _runs(sample, tokens) if spec.credit == "turn" else [(0, len(tokens))]:
            unit = units.setdefault((sample.group, sample.index, turn), len(units))
            if unit == len(rewards):
                rewards.append(_reward_from(spec, sample, turn))
            if length:
                first_token.setdefault(unit, position)
            runs.append((unit, length))
            position += length
    unit = torch.repeat_interleave(*torch.tensor(runs).unbind(1))
    reward = torch.tensor(rewards, dtype=torch.float64)
    if spec.advantage == "raw" and spec.kl_in_reward:
        return _whitened(spec, reward[unit] - penalties)
    reward[list(first_token)] -= penalties[list(first_token.values())]
    names: dict[tuple[int, int], int] = {}
    groups = torch.tensor([names.setdefault((group, turn), len(names)) for group, _, turn in units])
    return compute_advantages(reward, groups, spec, torch.bincount(unit, minlength=len(units)).double())[unit]


def _reward_from(spec: Algorithm, sample: Sample, turn: int) -> float:
    if spec.credit == "trajectory":
        return sample.reward
    assert spec.gamma is not None
    return sum(spec.gamma**k * reward for k, reward in enumerate(_turn_rewards(sample)[turn:]))


def _turn_rewards(sample: Sample) -> list[float]:
    return sample.turn_rewards or [sample.reward]


def _runs(sample: Sample, tokens: list[int]) -> list[tuple[int, int]]:
    """The turns of the own tokens, each with how many it has; one without tokens is compared all the same."""
    return [(turn, len(list(run))) for turn, run in groupby(_turns(sample, tokens))] or [(0, 0)]


def _turns(sample: Sample, tokens: list[int]) -> list[int]:
    return [sample.turn_ids[t] for t in tokens] if sample.turn_ids else [0] * len(tokens)


def _token_rewards(samples: Sequence[Sample], own: list[list[int]]) -> Tensor:
    """[T] each turn's reward at its last token; that of a turn without one at the last token before it."""
    rewards = [0.0] * sum(map(len, own))
    last_of: dict[tuple[int, int], dict[int, int]] = {}
    position = 0
    for sample, tokens in zip(samples, own, strict=True):
        for turn in _turns(sample, tokens):
            last_of.setdefault((sample.group, sample.index), {})[turn] = position
            position += 1
    turn_rewards = {(sample.group, sample.index): _turn_rewards(sample) for sample in samples}
    for trajectory, last in last_of.items():
        at = last[min(last)]
        for turn, reward in enumerate(turn_rewards[trajectory]):
            at = last.get(turn, at)
            rewards[at] += reward
    return torch.tensor(rewards, dtype=torch.float64)


def _penalties(spec: Algorithm, samples: Sequence[Sample], own: list[list[int]]) -> Tensor:
    """[T] what each own token costs when the divergence from the reference is in the reward."""
    if not spec.kl_in_reward:
        return torch.zeros(sum(map(len, own)), dtype=torch.float64)
    old, ref = _column(samples, own, "old_logprobs"), _column(samples, own, "ref_logprobs")
    return spec.kl_coef * kl_estimates(str(spec.kl_estimator), old, ref)


def _whitened(spec: Algorithm, advantages: Tensor) -> Tensor:
    if spec.normalise != "whiten":
        return advantages
    assert spec.std_ddof is not None
    return whiten(advantages, torch.ones_like(advantages), spec.std_ddof)


def _column(samples: Sequence[Sample], own: list[list[int]], name: str) -> Tensor:
    for sample, tokens in zip(samples, own, strict=True):
        if tokens and not getattr(sample, name):
            raise ValueError(f"sample {sample.name} has no {name}, which these advantages need")
    rows = zip((getattr(sample, name) for sample in samples), own, strict=True)
    return torch.tensor([row[t] for row, tokens in rows for t in tokens], dtype=torch.float64)


def _spread(samples: Sequence[Sample], own: list[list[int]], name: str, values: Tensor) -> None:
    numbers = iter(values.tolist())
    for sample, tokens in zip(samples, own, strict=True):
        row = [0.0] * len(sample)
        for t in tokens:
            row[t] = next(numbers)
        setattr(sample, name, row)


def why_rejected(spec: Algorithm, group: Group) -> str:
    """Why a group carries nothing to learn from; empty when it does."""
    rewards = [t.reward for t in group.scored]
    needed = 2 if spec.compares_group else 1
    if len(rewards) < needed:
        return f"{len(rewards)} of {len(group.trajectories)} samples scored, {needed} needed"
    by_turn = {tuple(turn.reward for turn in t.turns) for t in group.scored} if spec.credit == "turn" else {()}
    if spec.dynamic_sampling and len(set(rewards)) == len(by_turn) == 1:
        return f"all rewards equal ({rewards[0]:g})"
    return ""
