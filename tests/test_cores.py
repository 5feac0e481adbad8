"""More threads than cores: told at the start of a run, and by `sluice check`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sluice.launch.checked import num_cores
from sluice.preflight.findings import Item
from sluice.viewer import report
from small_runs import set_up, sluice, workplace


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(report, "write_report", lambda run: None)
    with workplace(tmp_path, monkeypatch):
        set_up(tmp_path)
        yield tmp_path


FSDP = ("trainer.name=fsdp", "trainer.num_ranks=2")


@pytest.mark.parametrize(
    ("words", "who"),
    [
        ((), None),
        (("engine.process=own", "run.num_threads=1", "engine.num_threads=1"), None),
        (
            ("engine.process=own", "engine.replicas=3", "run.num_threads=2", "engine.num_threads={cores}"),
            "and 2 of the trainer",
        ),
        (("engine.process=own", "engine.num_threads={cores}", *FSDP), "and 2 of 2 ranks"),
        (
            ("engine.process=own", "engine.num_threads={cores}", *FSDP, "placement.name=ray", "placement.address=auto"),
            None,
        ),
    ],
)
def test_check_warns_of_threads_that_share_cores(
    ready: Path,
    words: tuple[str, ...],
    who: str | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    if num_cores() < 2:
        pytest.skip("one core is shared in any case")
    words = tuple(word.format(cores=num_cores()) for word in words)
    if "placement.name=ray" in words:
        monkeypatch.setattr("sluice.preflight.items.check_places", lambda *_: Item("places"))
    assert sluice("check", "--offline", "config.yaml", *words) == 0
    said = capsys.readouterr().out
    assert ("threads that share a core wait for each other" in said) == (who is not None)
    assert (who or "") in said


def test_a_run_says_it_when_it_starts(ready: Path, capsys: pytest.CaptureFixture[str]):
    words = ("engine.process=own", f"engine.num_threads={num_cores()}", "run.num_threads=1", "run.num_steps=1")
    assert sluice("train", "config.yaml", *words) == 0
    assert f"warning: {num_cores()} threads of engines" in capsys.readouterr().err
