"""verl's functions, called on padded batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

from parity.ragged import Measured, Ragged

EPS = 1e-8
"""verl adds it to the number of tokens that a mean divides by."""


def verl_loss(name: str, batch: Ragged, aggregation: str, weights: Tensor | None = None, **settings: Any) -> Measured:
    """`rollout_is_weights` multiply each token's loss, so the gradient to them is the loss that each token contributes."""
    info = {"loss_scale_factor": settings.pop("loss_scale_factor", None)}
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, global_batch_info=info, **settings
    )
    logprobs = batch.logprobs.clone().requires_grad_()
    weights = (torch.ones_like(logprobs) if weights is None else weights).clone().requires_grad_()
    function = {"reinforce": core_algos.compute_policy_loss_reinforce}.get(name) or core_algos.get_policy_loss_fn(name)
    loss, _ = function(
        batch.old_logprobs,
        logprobs,
        batch.advantages,
        batch.mask,
        loss_agg_mode=aggregation,
        config=config,
        rollout_is_weights=weights,
    )
    gradient, per_weight = torch.autograd.grad(loss, [logprobs, weights])
    return Measured(loss.detach(), gradient, per_weight * weights.detach())


def means_of(batch: Ragged) -> Tensor:
    """[N] n / (n + 1e-8): what `seq-mean-token-mean` is of the mean over a sequence's n tokens."""
    return batch.lengths / (batch.lengths + EPS)
