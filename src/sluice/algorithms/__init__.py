"""Policy-optimisation algorithms as pure functions of tensors: no I/O, no config, no devices.

`ALGORITHMS` and `resolve` need no torch; the functions load it when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sluice.algorithms.explain import explain, explain_unused
from sluice.algorithms.spec import ALGORITHMS, Algorithm, resolve

if TYPE_CHECKING:
    from sluice.algorithms.advantages import assign_advantages, compute_advantages, gae, why_rejected
    from sluice.algorithms.aggregation import token_coefficients
    from sluice.algorithms.losses import LossOutput, policy_loss, value_loss

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "LossOutput",
    "assign_advantages",
    "compute_advantages",
    "explain",
    "explain_unused",
    "gae",
    "policy_loss",
    "resolve",
    "token_coefficients",
    "value_loss",
    "why_rejected",
]

_HOMES = {
    "assign_advantages": "advantages",
    "compute_advantages": "advantages",
    "gae": "advantages",
    "LossOutput": "losses",
    "policy_loss": "losses",
    "token_coefficients": "aggregation",
    "value_loss": "losses",
    "why_rejected": "advantages",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
