"""What a check finds is told once, ends the run or not, costs its own time, and is remembered across a resume."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import sluice.train as loop
from dry_runs import SEVERITIES, Notes, Workshop, finish
from sluice.checks import CHECKS, Checker
from sluice.checks.checker import STEPS_BETWEEN_PROBES, answers_by_layout, probe_of
from sluice.config import TrainConfig
from sluice.configfile import dump, load
from sluice.data.batch import Packing
from sluice.data.samples import to_samples
from sluice.engines.embedded import EmbeddedEngine
from sluice.errors import CheckError, ConfigError
from sluice.run import Run, Timer
from sluice.tracking.ledger import read_fingerprint
from sluice.tracking.rundir import RunDir
from sluice.trainers.local import LocalTrainer
from sluice.types import Sample
from sluice.waits import Waits
from sluice.weights.fingerprint import fingerprint
from small_runs import events_of, finished, ledger_of, metrics_of, set_up, sluice, workplace, write_config


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop.make(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checks")
    set_up(folder)
    with pytest.MonkeyPatch.context() as patch, workplace(folder, patch):
        write_config("dry.yaml", engine={"name": "scripted", "script": "my_script:answer"}, trainer={"name": "dry"})
    return folder


@pytest.fixture
def here(furnished: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with workplace(furnished, monkeypatch):
        yield furnished


def checker(**severities: Any) -> Checker:
    return Checker({**SEVERITIES, **severities}, logprob_tolerance=2e-4, max_error_share=0.5)


def ill_at(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, steps: set[int], severity: str) -> Run:
    """A run whose samples have a wrong temperature in some of its six steps."""
    run = workshop.run(num_steps=6, checks=checker(groups_whole=severity))

    def made(groups: Any) -> list[Sample]:
        return [replace(s, temperature=2.0) if run.step + 1 in steps else s for s in to_samples(groups)]

    monkeypatch.setattr(loop, "to_samples", made)
    return run


def test_a_warning_is_told_once_until_the_check_passes_again(workshop: Workshop, monkeypatch: pytest.MonkeyPatch):
    run = ill_at(workshop, monkeypatch, {2, 3, 5}, "warn")
    finish(loop.train(run))
    notes: Notes = run.tracker  # type: ignore[assignment]
    assert [kind for kind, _ in notes.events] == ["check", "check"]
    assert ["groups_whole, step 2:" in notes.events[0][1], "groups_whole, step 5:" in notes.events[1][1]] == [True] * 2
    assert "see docs/checks.md#groups_whole" in notes.events[0][1]
    assert sorted(notes.metrics) == [1, 2, 3, 4, 5, 6]


def test_a_check_that_stops_ends_the_run_before_the_update(workshop: Workshop, monkeypatch: pytest.MonkeyPatch):
    run = ill_at(workshop, monkeypatch, {2, 3, 5}, "stop")
    with pytest.raises(CheckError, match=r"^check groups_whole, step 2: sample q\d+#3.0: its temperature is 2.0"):
        finish(loop.train(run))
    notes: Notes = run.tracker  # type: ignore[assignment]
    assert len(run.trainer.updates) == 2, "those of the first step"  # type: ignore[attr-defined]
    assert sorted(notes.groups) == [1, 2]
    assert sorted(notes.metrics) == [1]


def test_a_check_that_is_off_is_not_made(workshop: Workshop, monkeypatch: pytest.MonkeyPatch):
    run = ill_at(workshop, monkeypatch, {2, 3, 5}, "off")
    monkeypatch.setitem(CHECKS, "groups_whole", lambda *_: 1 / 0)
    finish(loop.train(run))
    assert run.tracker.events == []  # type: ignore[attr-defined]


def test_what_is_remembered_fits_into_json_and_goes_on(workshop: Workshop):
    """Whole and cut in two, a run of the same metrics says the same."""
    values = {"rollout/reward": 0.5, "rollout/equal_reward_groups": 0.2}
    curve = [dict(values, **{"rollout/repetition": 0.05 + 0.05 * step}) for step in range(20)]

    def told(cut: int | None) -> tuple[list[str], dict[str, Any]]:
        run, checks = workshop.run(), checker()
        for step, metrics in enumerate(curve, start=1):
            run.step = step
            checks.after_step(run, metrics)
            if step == cut:
                state = json.loads(json.dumps(checks.state_dict()))
                checks = checker()
                checks.load_state_dict(state)
        return [message for _, message in run.tracker.events], checks.state_dict()  # type: ignore[attr-defined]

    whole = told(None)
    assert [message.partition(":")[0] for message in whole[0]] == ["repetition, step 13"]
    assert all(told(cut) == whole for cut in (3, 7, 12, 13, 18))


def test_a_phase_inside_another_counts_for_itself_only(monkeypatch: pytest.MonkeyPatch):
    now = iter([0.0, 10.0, 11.0, 12.0, 14.0, 20.0, 30.0, 31.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    timer = Timer(Waits(), lambda: "step 1")
    with timer("train"):
        with timer("checks"):
            pass
        with timer("checks"):
            pass
    with timer("record"):
        pass
    assert timer.drain().values_by_name() == {"perf/checks_s": 3.0, "perf/train_s": 17.0, "perf/record_s": 1.0}


def test_the_ledger_says_which_weights_a_step_left(here: Path):
    """Read again from what was saved: not the trainer's word, but a model of its own."""
    run = finished("train", "config.yaml", "checkpoint.every_steps=1", name="fingerprints")
    saved = [
        fingerprint(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
        for folder in sorted((run / "checkpoints").iterdir())
    ]
    assert [read_fingerprint(RunDir(run), step) for step in (1, 2, 3)] == saved
    assert len(set(saved)) == 3
    assert all(0 < line["perf/checks_s"] < line["perf/step_s"] for line in metrics_of(run))


def test_a_batch_that_was_refused_bears_no_fingerprint(here: Path, monkeypatch: pytest.MonkeyPatch):
    async def another(self: EmbeddedEngine) -> str:
        return "0123456789abcdef" if self.version == 2 else fingerprint(self.model.named_weights())

    monkeypatch.setattr(EmbeddedEngine, "fingerprint", another)
    assert sluice("train", "config.yaml", "run.name=refused") == 1
    run = Path("runs/refused")
    assert [e["details"]["check"] for e in events_of(run) if e["kind"] == "check"] == ["weights_match"]
    assert read_fingerprint(RunDir(run), 1)
    assert read_fingerprint(RunDir(run), 2) is None
    assert all(row["trained"] for row in ledger_of(run, 2))
    assert len(metrics_of(run)) == 1


def test_a_probe_is_of_short_samples_of_different_lengths():
    def of(length: int) -> Sample:
        return Sample([1] * length, [0.0, *[1.0] * (length - 1)], [-1.0] * length, [0] * length, 1.0, 0, length)

    samples = [of(length) for length in (30, 7, 5, 5, 9, 12, 6, 40)]
    assert [len(sample) for sample in probe_of(samples)] == [5, 6, 7, 9]
    assert [len(sample) for sample in probe_of([of(5), of(5), of(50)])] == [5, 5, 50]
    assert not {id(sample) for sample in probe_of(samples)} & {id(sample) for sample in samples}


def test_a_probe_leaves_the_samples_alone_and_comes_rarely(monkeypatch: pytest.MonkeyPatch):
    """At the first step of a process, whichever that is, and every so many after it."""
    asked: list[tuple[int, str]] = []

    class Answers:
        async def forward(self, samples: Any, output: str, layout: str) -> None:
            asked.append((len(samples), layout))
            for sample in samples:
                sample.old_logprobs = [0.0] * len(sample)

    sample = Sample([1, 2], [0.0, 1.0], [0.0, -1.0], [-1, 0], 1.0, 0, 0, old_logprobs=[0.0, -2.0])
    assert list(finish(answers_by_layout(Answers(), probe_of([sample])))) == ["alone", "rows", "packed"]  # type: ignore[arg-type]
    assert sample.old_logprobs == [0.0, -2.0]
    off: Any = dict.fromkeys(CHECKS, "off")
    checks = Checker({**off, "padded_packed": "stop"}, logprob_tolerance=1.0, max_error_share=0.5)
    run: Any = SimpleNamespace(step=41, trainer=Answers(), algorithm=None, tracker=None)
    asked.clear()
    for run.step in range(41, 41 + 2 * STEPS_BETWEEN_PROBES):
        finish(checks.assigned(run, [sample], []))
    assert asked == [(1, "rows"), (1, "rows"), (1, "packed")] * 2


def test_a_trainer_answers_in_the_layout_that_it_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    layouts: list[str] = []
    trainer = LocalTrainer.__new__(LocalTrainer)
    trainer.packing = Packing(1, 64, "rows")

    def noted(samples: Any, layout: str) -> Any:
        layouts.append(layout)
        raise StopIteration

    monkeypatch.setattr("sluice.trainers.local.collate", noted)
    sample = Sample([1, 2], [0.0, 1.0], [0.0, -1.0], [-1, 0], 1.0, 0, 0)
    for layout in (None, "packed", "rows"):
        with pytest.raises(RuntimeError):
            finish(trainer.forward([sample], "old_logprobs", layout))
    assert layouts == ["rows", "packed", "rows"]


# The config


@pytest.mark.parametrize(
    ("file", "settings", "said"),
    [
        ("dry.yaml", ["checks.weights_match=warn"], "checks.weights_match=warn has no effect: engine.name=scripted"),
        ("dry.yaml", ["checks.first_update_ratio=warn"], "checks.first_update_ratio=warn has no effect"),
        ("dry.yaml", ["checks.padded_packed=warn"], "checks.padded_packed=warn has no effect: trainer.name=dry"),
        ("dry.yaml", ["checks.entropy=stop"], "checks.entropy=stop has no effect: trainer.name=dry"),
        (
            "config.yaml",
            ["algorithm.name=reinforce", "rollout.group_size=1", "checks.equal_rewards=stop"],
            "rollout.group_size=1 makes",
        ),
        (
            "config.yaml",
            ["checks.outcome_budget=off", "checks.max_error_share=0.5"],
            "checks.max_error_share has no effect with",
        ),
        ("dry.yaml", ["checks.logprob_tolerance=0.1"], "checks.logprob_tolerance has no effect: neither"),
        ("config.yaml", ["checks.loss_mask=ignore"], "checks.loss_mask: should be off, warn or stop, not 'ignore'"),
        ("config.yaml", ["checks.los_mask=off"], "did you mean 'checks.loss_mask'?"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(here: Path, file: str, settings: list[str], said: str):
    with pytest.raises(ConfigError) as error:
        load(TrainConfig, [file], settings)
    assert said in str(error.value)


def test_defaults_that_are_idle_are_let_be_and_can_be_read_again(here: Path, tmp_path: Path):
    resolved = load(TrainConfig, ["dry.yaml"], ["checks.staleness=off"])
    assert resolved.config.idle_checks().keys() == {"weights_match", "first_update_ratio", "padded_packed", "entropy"}
    again = tmp_path / "again.yaml"
    again.write_text(dump(resolved))
    assert load(TrainConfig, [str(again)]).config == resolved.config
    assert resolved.config.checks.severities()["staleness"] == "off"


def test_off_is_a_word_in_a_file_too(here: Path, tmp_path: Path):
    write_config(tmp_path / "off.yaml", checks={"entropy": "off"})
    (tmp_path / "bare.yaml").write_text("checks: {repetition: off}\n")
    checks = load(TrainConfig, [str(tmp_path / "off.yaml"), str(tmp_path / "bare.yaml")]).config.checks
    assert (checks.entropy, checks.repetition) == ("off", "off")


def test_a_setting_reaches_the_run(here: Path):
    settings = ["rewards=[{name: users_code:share_of_a}]", "checks.logprob_tolerance=1e-12", "model.dtype=bfloat16"]
    assert sluice("train", "config.yaml", *settings, "run.name=strict") == 1
    # by which check depends on the processor's way with BF16
    assert re.search(r"\(at most \de-12\)", events_of(Path("runs/strict"))[-1]["message"])
