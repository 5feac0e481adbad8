"""AdamW with a schedule, clipping, and FP32 gradients and master weights whatever the model's dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from sluice.errors import NonFiniteError
from sluice.tracking.metrics import Last, Mean, Metrics


@dataclass(frozen=True)
class OptimizerSettings:
    learning_rate: float
    warmup_updates: int
    schedule: Literal["constant", "linear", "cosine"]
    final_learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    max_grad_norm: float

    def learning_rate_at(self, update: int, num_updates: int) -> float:
        """Of the update with this number, counted from 0, in a run of `num_updates`."""
        if update < self.warmup_updates:
            return self.learning_rate * (update + 1) / self.warmup_updates
        if self.schedule == "constant":
            return self.learning_rate
        progress = min(1.0, (update - self.warmup_updates) / max(1, num_updates - self.warmup_updates))
        left = 1 - progress if self.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * left


class Optimizer:
    """Steps FP32 weights. For a BF16 model these are masters of their own, to which every micro-batch's gradients are
    added in FP32 and from which the model's weights are rounded; for an FP32 model they are the model's."""

    def __init__(self, model: nn.Module, settings: OptimizerSettings, num_updates: int, owner: str = "policy") -> None:
        """`owner` is whose weights these are, for messages."""
        self.owner = owner
        self.settings = settings
        self.num_updates = num_updates
        self.update = 0
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.own_masters = any(p.dtype != torch.float32 for p in self.params)
        self.masters = self._make_masters()
        matrices = [p for p in self.masters if p.dim() >= 2]
        vectors = [p for p in self.masters if p.dim() < 2]
        self.adamw = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )

    def _make_masters(self) -> list[torch.Tensor]:
        return [p.detach().clone().float() for p in self.params] if self.own_masters else [*self.params]

    def use(self, settings: OptimizerSettings) -> None:
        """From the next update on; the moments stay as they are."""
        self.settings = settings
        for group, decay in zip(self.adamw.param_groups, (settings.weight_decay, 0.0), strict=True):
            group.update(betas=settings.betas, eps=settings.eps, weight_decay=decay)

    def gradient_of(self, param: torch.Tensor) -> torch.Tensor | None:
        """The FP32 sum of the gradients of a weight, to add to; None for one that is not trained."""
        for own, master in zip(self.params, self.masters, strict=True):
            if own is param:
                master.grad = torch.zeros_like(master) if master.grad is None else master.grad
                return master.grad
        return None

    def drop_gradients(self) -> None:
        """Of an update that is refused."""
        self.adamw.zero_grad()

    def collect_gradients(self) -> None:
        """After each backward: add the model's gradients to the masters' FP32 ones."""
        if not self.own_masters:
            return
        for param, master in zip(self.params, self.masters, strict=True):
            if param.grad is not None:
                gradient = param.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                param.grad = None

    def clip(self) -> torch.Tensor:
        """Scale the gradient down to the largest norm and give its norm before. Raises NonFiniteError, with weights and state
        untouched, when that is not finite."""
        norm = self._clipped_norm()
        if not torch.isfinite(norm):
            self.drop_gradients()
            raise NonFiniteError(
                f"gradient norm of the {self.owner} is {float(norm)} at update {self.update}; the update was refused"
            )
        return norm

    def _clipped_norm(self) -> torch.Tensor:
        return nn.utils.clip_grad_norm_(self.masters, self.settings.max_grad_norm)

    def step(self, norm: torch.Tensor) -> Metrics:
        """One update with the clipped gradient, whose norm before is reported."""
        learning_rate = self.settings.learning_rate_at(self.update, self.num_updates)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad()
        if self.own_masters:
            with torch.no_grad():
                for param, master in zip(self.params, self.masters, strict=True):
                    param.copy_(master)
        self.update += 1
        return Metrics({"train/grad_norm": Mean(norm), "train/learning_rate": Last(learning_rate)})

    def state_dict(self) -> dict[str, Any]:
        """All that the model does not hold."""
        state: dict[str, Any] = {"update": self.update, "adamw": self.adamw.state_dict()}
        return state | ({"masters": self.masters} if self.own_masters else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The model's weights are loaded first; those of masters of their own are rounded from these."""
        self.update = state["update"]
        self.adamw.load_state_dict(state["adamw"])
        with torch.no_grad():
            for param, master, saved in zip(self.params, self.masters, state.get("masters", self.masters), strict=True):
                master.copy_(saved)
                param.copy_(master)
