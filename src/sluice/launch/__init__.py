"""From a config to a run: the only room that knows every other."""

from sluice.launch.checked import check, check_sft
from sluice.launch.replaying import replay, score_again
from sluice.launch.resuming import resolve_resume
from sluice.launch.runs import sft, train

__all__ = ["check", "check_sft", "replay", "resolve_resume", "score_again", "sft", "train"]
