"""Without the peers nothing here is collected, and the header says why; after a comparison, how far apart the numbers were."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

import pytest

PEERS = ("trl", "verl")
MISSING = [name for name in PEERS if find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_report_header() -> str:
    if MISSING:
        return f"parity: {' and '.join(MISSING)} not installed here, so nothing is compared; run `make parity`"
    return "parity with " + ", ".join(f"{name} {version(name)}" for name in PEERS)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if MISSING:
        return
    from parity.compare import LARGEST

    terminalreporter.section("largest differences")
    for name, figures in LARGEST.items():
        measured = "  ".join(f"{dtype} {difference:.1e}" for dtype, difference in sorted(figures.items()))
        terminalreporter.write_line(f"{name:58} {measured}")
