"""The value model of `advantage: gae`: what a response is worth, as seen before each of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sluice.algorithms.losses import value_loss
from sluice.data.batch import MicroBatch
from sluice.errors import NonFiniteError
from sluice.tracking.metrics import Metrics
from sluice.trainers.model import PolicyModel, hidden_states_of
from sluice.trainers.optim import Optimizer, OptimizerSettings


def raised(error: NonFiniteError) -> None:
    raise error


class Critic:
    """A linear head in FP32, on a model of its own or on the policy's hidden states, which its gradient then leaves alone."""

    def __init__(
        self,
        policy: PolicyModel,
        own_model: PolicyModel | None,
        settings: OptimizerSettings,
        num_updates: int,
        value_clip: float | None,
        make_optimizer: Callable[[nn.Module, OptimizerSettings, int, str], Optimizer] = Optimizer,
    ) -> None:
        self.own_model = own_model
        self.value_clip = value_clip
        self.head = nn.Linear((own_model or policy).head.in_features, 1, device=policy.device)
        nn.init.zeros_(self.head.weight)  # values of 0: the first advantages are the returns themselves
        nn.init.zeros_(self.head.bias)
        trained = [self.head] if own_model is None else [own_model.body, self.head]
        self.optimizer = make_optimizer(nn.ModuleList(trained), settings, num_updates, "critic")

    def values(self, batch: MicroBatch, policy_hidden: Tensor | None) -> Tensor:
        """[T] of the tokens that bear a loss; `policy_hidden` [T, H] is needed by a critic without a model of its own."""
        if self.own_model is not None:
            hidden = hidden_states_of(self.own_model, batch)
        else:
            assert policy_hidden is not None
            hidden = policy_hidden.detach()
        return self.head(hidden.float())[:, 0]

    def forward_backward(
        self, batch: MicroBatch, policy_hidden: Tensor | None, refuse: Callable[[NonFiniteError], None] = raised
    ) -> Metrics:
        """Add the gradient of one micro-batch, or of a loss of 0 where `refuse` takes that of one that is not finite and returns."""
        values = self.values(batch, policy_hidden)
        output = value_loss(values, batch.values, batch.returns, batch.coefficients, self.value_clip)
        if not torch.isfinite(output.loss):
            refuse(NonFiniteError(f"loss of the critic is {float(output.loss.detach())}; the update was refused"))
            output = replace(output, loss=0.0 * torch.nan_to_num(values).sum())
        output.loss.backward()
        self.optimizer.collect_gradients()
        return output.metrics

    def optim_step(self, norm: Tensor) -> Metrics:
        return Metrics({name.replace("train/", "train/critic/"): m for name, m in self.optimizer.step(norm).items()})

    def state_dict(self) -> dict[str, Any]:
        own = {} if self.own_model is None else {"model": self.own_model.model.state_dict()}
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.head.load_state_dict(state["head"])
        if self.own_model is not None:
            self.own_model.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
