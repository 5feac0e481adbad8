"""From a config to a run: the only room that knows every other."""

from sluice.launch.checked import check, check_sft
from sluice.launch.resuming import resolve_resume
from sluice.launch.runs import sft, train

__all__ = ["check", "check_sft", "resolve_resume", "sft", "train"]
