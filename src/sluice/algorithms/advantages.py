"""Advantages from the rewards of groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sluice.algorithms.spec import Algorithm
from sluice.types import Group, Sample


def compute_advantages(rewards: Tensor, group_ids: Tensor, spec: Algorithm) -> Tensor:
    """[N] rewards and the group of each → [N] advantages. Groups are told apart by id; order and sizes do not matter.

    raw: R. centred: R - mean of the group (Dr. GRPO, arXiv 2503.20783). z_score: centred / (std + std_eps), with the
    sample standard deviation (ddof 1) of the group (GRPO, arXiv 2402.03300, section 4.1.2). A group of one has no
    spread to speak of, so `centred` and `z_score` give it 0; so they do to a group whose rewards are all equal.
    """
    if spec.advantage == "raw":
        return rewards.clone()
    _, group = torch.unique(group_ids, return_inverse=True)
    zeros = torch.zeros(int(group.max()) + 1 if len(group) else 0, dtype=rewards.dtype, device=rewards.device)
    count = zeros.index_add(0, group, torch.ones_like(rewards))
    mean = zeros.index_add(0, group, rewards) / count
    # equal rewards are compared, not subtracted: their mean may be off by a rounding, which z_score would blow up
    lowest = zeros.scatter_reduce(0, group, rewards, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, group, rewards, "amax", include_self=False)
    centred = torch.where((lowest == highest)[group], 0.0, rewards - mean[group])
    if spec.advantage == "centred":
        return centred
    variance = zeros.index_add(0, group, centred.square()) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + (spec.std_eps or 0.0))[group]


def assign_advantages(spec: Algorithm, samples: Sequence[Sample]) -> None:
    """Fill `advantages` of every sample: its trajectory's advantage at each token that the policy wrote, 0 elsewhere.

    A trajectory counts once in its group, however many samples it was cut into.
    """
    trajectories = {(s.group, s.index): s.reward for s in samples}
    rewards = torch.tensor(list(trajectories.values()), dtype=torch.float64)
    groups = torch.tensor([group for group, _ in trajectories])
    advantages = dict(zip(trajectories, compute_advantages(rewards, groups, spec).tolist(), strict=True))
    for sample in samples:
        advantage = advantages[sample.group, sample.index]
        sample.advantages = [advantage if weight else 0.0 for weight in sample.loss_weights]


def why_rejected(spec: Algorithm, group: Group) -> str:
    """Why a group carries nothing to learn from; empty when it does."""
    rewards = [t.reward for t in group.scored]
    needed = 1 if spec.advantage == "raw" else 2
    if len(rewards) < needed:
        return f"{len(rewards)} of {len(group.trajectories)} samples scored, {needed} needed"
    if spec.dynamic_sampling and len(set(rewards)) == 1:
        return f"all rewards equal ({rewards[0]:g})"
    return ""
