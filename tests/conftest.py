"""Fixtures shared by all tests: real data, and small real models and tokenisers made on the spot."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as sluice does, but here torch may be imported before it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["RAY_AUTH_MODE"] = "disabled"  # for all clusters that a process of tests starts or joins: Ray reads it once

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


def shared_data(name: str) -> Path:
    """A file of the real data; skips the test where there is none, which CI must not."""
    path = SHARED / name
    if not path.exists():
        if os.environ.get("CI"):
            pytest.fail(f"CI must run with the real data: {path} does not exist")
        pytest.skip(f"needs the real data file {path}")
    return path
