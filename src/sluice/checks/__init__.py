"""Invariants of a run, always on: each a small function with a name that says what is wrong, or nothing.

`docs/checks.md` has a section for each; how severe one is, and its default, is in `sluice.configsafety.ChecksSection`.
"""

from sluice.checks.checker import CHECKS, Checker

__all__ = ["CHECKS", "Checker"]
