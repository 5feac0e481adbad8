"""The routers of a mixture of experts: what they choose is recorded where the model generates, and replayed where it is trained.

Engine and trainer compute a token's router logits in other batches and precisions. Where two experts are close, the trainer would take
another one than the engine, and its log-prob would be that of another network. With rollout routing replay (R3; Ma et al. 2025, arXiv
2510.11370) the trainer takes the engine's experts, in every forward and backward, and weighs them by its own logits.
"""

from __future__ import annotations

from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sluice.errors import ConfigError
from sluice.tracking.metrics import Mean, Metrics

MOST_EXPERTS = 2**15
"""That 16 bits with a sign can number."""


@dataclass(frozen=True)
class Gates:
    """What an architecture makes of its router's logits."""

    score: Literal["softmax", "sigmoid"]
    normalised: bool
    """Whether the gates of a token's experts sum to `scale`."""
    scale: float = 1.0

    def of(self, logits: Tensor, experts: Tensor) -> Tensor:
        """[T, E] logits s and [T, k] chosen experts → their gates g [T, k], in FP32.

        With I = 1 for the chosen experts and 0 for all others, a normalised softmax is the formula of R3:
        g_i = I_i exp(s_i) / Σ_j I_j exp(s_j). Otherwise g_i = scale · I_i f(s)_i, over Σ_j I_j f(s)_j where it is normalised.
        """
        logits = logits.float()
        scores = torch.softmax(logits, -1) if self.score == "softmax" else torch.sigmoid(logits)
        gates = scores.gather(-1, experts)
        if self.normalised:
            gates = gates / gates.sum(-1, keepdim=True).clamp(min=torch.finfo(gates.dtype).tiny)
        return gates * self.scale


class Routers:
    """Those of a model, one for each layer that has experts, in the order of the layers."""

    def __init__(self, model: nn.Module) -> None:
        """Raises ConfigError for a model that has none, or others than we understand."""
        found: list[tuple[str, Any]] = [(name, module) for name, module in model.named_modules() if _is_router(module)]
        shapes = {(router.top_k, router.num_experts) for _, router in found}
        if len(shapes) != 1:
            why = "no routers of experts that sluice can tell" if not found else "routers of different sizes"
            raise ConfigError(
                f"rollout.routing_replay replays what the routers of a mixture of experts choose, and {type(model).__name__} has {why}; "
                "leave it out"
            )
        ((self.top_k, self.num_experts),) = shapes
        if self.num_experts > MOST_EXPERTS:
            raise ConfigError(f"rollout.routing_replay: {self.num_experts} experts are more than {MOST_EXPERTS}")
        self.num_layers = len(found)
        self.layers = [next(int(part) for part in name.split(".") if part.isdecimal()) for name, _ in found]
        """Of the model's layers, those that have experts."""
        self.num_chosen = self.num_layers * self.top_k
        """Experts of one token, in all layers."""
        self._own = [torch.empty(0)] * len(found)
        self._given: Tensor | None = None
        for layer, (name, router) in enumerate(found):
            router.register_forward_hook(partial(self._route, layer, gates_of(name, router)))

    def begin(self, experts: Tensor | None) -> None:
        """A forward, in which all routers take these experts ([T, layers · k], -1 for their own choice), or choose themselves. So they do
        until the next one: a backward may compute layers again."""
        self._given = experts if experts is not None and experts.numel() else None

    def chosen(self) -> Tensor:
        """[T, layers · k] what the routers chose themselves in the last forward."""
        return torch.cat(self._own, -1).to(torch.int16)

    def mismatch(self) -> Metrics:
        """How often, over tokens and layers of the last forward, another set of experts was given than the router's own choice."""
        if self._given is None:
            return Metrics()
        shape = (len(self._given), self.num_layers, self.top_k)
        given, own = (x.view(shape).sort(-1).values for x in (self._given, self.chosen()))
        known = given[..., 0] >= 0
        others = (given != own).any(-1) & known
        return Metrics({"train/router_mismatch": Mean(others.sum(), known.sum())})

    def _route(self, layer: int, gates: Gates, _: Any, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        """Called with what a router gives: logits, gates, experts. What it returns takes their place."""
        logits, scores, own = output
        self._own[layer] = own
        if self._given is None:
            return output
        given = self._given[:, layer * self.top_k : (layer + 1) * self.top_k].to(own.dtype)
        experts = torch.where(given >= 0, given, own)
        return logits, gates.of(logits, experts).to(scores.dtype), experts


def _is_router(module: nn.Module) -> bool:
    """By the parts that `transformers` gives them."""
    numbers = (getattr(module, "top_k", None), getattr(module, "num_experts", None))
    return "Router" in type(module).__name__ and all(isinstance(number, int) for number in numbers)


@torch.no_grad()
def gates_of(name: str, router: Any) -> Gates:
    """The formula of a router, of which random weights and states are tried. Raises ConfigError where none gives what it gives."""
    tried = deepcopy(router).to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    for weight in tried.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator))
    for buffer in tried.buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=generator))  # a bias that is in the gates is to show
    with suppress(Exception):  # one that wants more than the states
        width = router.weight.shape[-1]
        logits, scores, experts = tried(torch.randn(64, width, generator=generator) / width**0.5)
        scale = float(getattr(router, "routed_scaling_factor", 1.0))
        for score, normalised in product(("softmax", "sigmoid"), (True, False)):
            gates = Gates(score, normalised, scale)
            if torch.allclose(gates.of(logits, experts), scores, rtol=1e-4):
                return gates
    raise ConfigError(
        f"rollout.routing_replay: the gates of {name} ({type(router).__name__}) are neither softmax nor sigmoid of its logits, over all "
        "experts or over those that were chosen, so they cannot be computed for other experts than its own; leave it out"
    )
