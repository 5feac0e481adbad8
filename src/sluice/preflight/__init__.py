"""`sluice check`: what can be known of a run before it is paid for."""

from sluice.preflight.findings import Item
from sluice.preflight.items import check_sft, check_training

__all__ = ["Item", "check_sft", "check_training"]
