"""Clipped tokens are counted right, over steps, runs and algorithms, in memory that does not grow with the steps."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from images import is_drawn

from sluice.analysis.clipped_tokens import Clipping, Pool, analyse
from sluice.config import TrainConfig
from sluice.configfile import load
from sluice.errors import DataError
from sluice.tracking import ledger
from sluice.tracking.rundir import RunDir
from sluice.types import Completion, Group, Prompt, Sample, Trajectory, Turn
from small_runs import sluice

A, B, C = 5, 6, 7
PIECES = {0: "<bos>", A: r"$\a$", B: " 水", C: "[red]\x1b"}
"""What a font, a formula, the console's markup and a terminal would stumble over among them."""


class Seen(NamedTuple):
    """A token as an update saw it."""

    id: int
    ratio: float = 1.0
    clipped: bool = False
    weight: float = 1.0


def sample(index: int, update: int, advantage: float, *tokens: Seen) -> Sample:
    """A prompt of one token, then the tokens."""
    ids, zeros = [0, *(t.id for t in tokens)], [0.0] * (len(tokens) + 1)
    versions = [-1] + [0] * len(tokens)
    made = Sample(ids, [0.0, *(t.weight for t in tokens)], zeros, versions, 1.0, 0, index)
    made.advantages, made.old_logprobs, made.current_logprobs = [0.0] + [advantage] * len(tokens), zeros, zeros
    made.update, made.ratios = update, [1.0, *(t.ratio for t in tokens)]
    made.clipped = [False, *(t.clipped for t in tokens)]
    return made


def write_step(rundir: RunDir, step: int, samples: Sequence[Sample], rejected: str = "") -> Path:
    """The samples as one group, with a sample that has no score, and so is not trained on."""
    turn = Turn([0], Completion([A], [0.0], "stop", [0], 1.0, "a"))
    scored = [Trajectory([turn], "stop", "scored", 1.0) for _ in samples]
    group = Group(0, Prompt("p", []), [*scored, Trajectory([turn], "stop", "timeout")], rejected)
    return ledger.write_step(rundir, step, [group], samples, lambda ids: [PIECES[i] for i in ids])


def make_run(folder: Path, name: str, algorithm: str = "{name: grpo, clip_high: null, old_logprobs: engine}") -> RunDir:
    rundir = RunDir.create(folder, name)
    rundir.config.write_text(f"run: {{seed: 0}}\nalgorithm: {algorithm}\n")
    return rundir


HIGH, LOW = Seen(A, 2.0, True), Seen(A, 0.25, True)
STEP_1 = [
    sample(0, 0, 1.0, Seen(A), Seen(B), HIGH),
    sample(1, 1, -1.0, LOW, Seen(B, 0.5, True), Seen(A, 0.9)),
    sample(2, 1, 0.0, Seen(C), Seen(C, 4.0, True, weight=0.0)),  # no loss token, whatever the mark says
]
STEP_2 = [sample(0, 1, 1.0, Seen(A, 4.0, True), Seen(B), Seen(B))]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    rundir = make_run(tmp_path, "one")
    write_step(rundir, 1, STEP_1)
    write_step(rundir, 2, STEP_2)
    return rundir


def counts(clipping: Clipping) -> tuple[int, int]:
    return clipping.clipped, clipping.occurrences


def by_text(pool: Pool) -> dict[str, tuple[int, int]]:
    return {token.token: counts(token.total) for token in pool.tokens}


# What is counted


def test_a_ledger_of_known_counts(run: RunDir):
    (pool,) = analyse([run.path])
    assert (pool.algorithm, pool.runs, pool.num_steps) == ("grpo", [str(run.path)], 2)
    assert counts(pool.total) == (4, 10)
    a, b = pool.tokens  # C was never clipped
    assert [(token.token_id, token.token) for token in (a, b)] == [(A, PIECES[A]), (B, PIECES[B])]
    log2 = math.log(2)
    assert a.total == Clipping(5, 3, 0.6, pytest.approx((log2 + 2 * log2 + 2 * log2) / 3), pytest.approx(2 * log2))  # type: ignore[arg-type]
    assert b.total == Clipping(4, 1, 0.25, pytest.approx(log2), pytest.approx(log2))  # type: ignore[arg-type]
    assert {update: counts(clipping) for update, clipping in a.by_update.items()} == {0: (1, 2), 1: (2, 3)}
    assert {update: counts(clipping) for update, clipping in pool.by_update.items()} == {0: (1, 3), 1: (3, 7)}
    signs = {"positive": (2, 6), "zero": (0, 1), "negative": (2, 3)}
    assert {sign: counts(clipping) for sign, clipping in pool.by_sign.items()} == signs
    assert pool.by_sign["zero"].mean_log_ratio is None
    assert pool.by_sign["negative"].max_log_ratio == pytest.approx(2 * log2)


def test_steps_are_chosen_both_ends_included(run: RunDir):
    write_step(run, 3, STEP_2)
    found = {
        steps: analyse([run.path], steps)[0].num_steps for steps in ((None, None), (2, None), (None, 2), (2, 2), (3, 9))
    }
    assert list(found.values()) == [3, 2, 2, 1, 1]
    assert by_text(analyse([run.path], (2, 2))[0]) == {PIECES[A]: (1, 1)}


def test_rare_tokens_are_left_out_and_counted(run: RunDir, capsys: pytest.CaptureFixture[str]):
    (pool,) = analyse([run.path], min_count=5)
    assert by_text(pool) == {PIECES[A]: (3, 5)}
    assert pool.num_rare == 1
    assert sluice("analyze", "clipped-tokens", run.path, "--min-count", 5) == 0
    assert "also clipped: 1 below --min-count" in capsys.readouterr().out
    assert counts(pool.total) == (4, 10)


def test_equal_shares_are_ranked_by_how_hard(tmp_path: Path):
    rundir = make_run(tmp_path, "run")
    write_step(rundir, 1, [sample(0, 0, 1.0, Seen(A, 2.0, True), Seen(B, 0.25, True), Seen(C, 3.0, True), Seen(C))])
    assert [token.token_id for token in analyse([rundir.path])[0].tokens] == [B, A, C]


def test_a_ratio_of_zero_is_infinitely_hard(tmp_path: Path):
    rundir = make_run(tmp_path, "run")
    write_step(rundir, 1, [sample(0, 0, -1.0, Seen(A, 0.0, True))])
    out = tmp_path / "out.json"
    assert analyse([rundir.path])[0].total.max_log_ratio == math.inf
    assert sluice("analyze", "clipped-tokens", rundir.path, "--json", out) == 0
    assert json.loads(out.read_text())[0]["total"]["max_log_ratio"] is None


# Runs and algorithms


def test_runs_of_one_algorithm_are_pooled_and_others_stand_beside(run: RunDir, tmp_path: Path):
    second = make_run(tmp_path, "second")
    other = make_run(tmp_path, "other", "{name: cispo, ratio: sequence, dynamic_sampling: false}")
    write_step(second, 7, STEP_2)
    write_step(other, 1, [sample(0, 3, 1.0, Seen(A), Seen(C, 9.0, True))])
    grpo, cispo = analyse([run.path, other.path, second.path, run.path / "." / ".." / "one"])
    assert grpo.runs == [str(path) for path in (tmp_path / "one" / ".." / "one", second.path)]
    assert (grpo.num_steps, by_text(grpo)) == (3, {PIECES[A]: (4, 6), PIECES[B]: (1, 6)})
    assert cispo.algorithm == "cispo, ratio: sequence, dynamic_sampling: false"
    assert (by_text(cispo), list(cispo.by_update)) == ({"[red]\x1b": (1, 1)}, [3])


def test_a_config_that_changes_no_word_is_named_by_its_row(tmp_path: Path):
    """Also when `algorithm` gets a new key whose value is not null."""
    settings = ["model.path=m", "data.path=d", "data.prompt=q", "rewards=[{name: format, pattern: x}]"]
    config = load(TrainConfig, [], settings).config
    rundir = make_run(tmp_path, "run", json.dumps(config.algorithm.model_dump()))
    write_step(rundir, 1, STEP_1)
    assert analyse([rundir.path])[0].algorithm == config.algorithm.name


# Memory


def test_memory_does_not_grow_with_the_steps(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    """While a step is read, no earlier one is held: only the sums are, which are of a few tokens here."""
    long = [sample(0, 0, 1.0, *([HIGH, Seen(B)] * 5000))]
    for step in range(1, 13):
        write_step(run, step, long)
    held, read = [], ledger.read_step

    def measured(*args: object) -> pa.Table:
        held.append(pa.total_allocated_bytes())
        return read(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(ledger, "read_step", measured)
    (pool,) = analyse([run.path])
    assert counts(pool.total) == (60_000, 120_000)
    assert len(held) == 12
    one_step = read(run, 1, ["token_ids", "tokens", "ratios"]).nbytes
    assert held[-1] - held[1] < one_step  # eleven, if they were held


# Errors


def broken_file(run: RunDir) -> None:
    (run.ledger / "step-000002.parquet").write_bytes(b"PAR1 torn")


def foreign_file(run: RunDir) -> None:
    pq.write_table(pa.table({"trained": [True], "update": [0]}), run.ledger / "step-000002.parquet")


def no_ledger(run: RunDir) -> None:
    for path in run.ledger.iterdir():
        path.unlink()


def nothing_trained(run: RunDir) -> None:
    for step in (1, 2):
        write_step(run, step, [], "all rewards equal (1)")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (broken_file, "cannot read .*step-000002.parquet: .*the other steps can be read when it is removed"),
        (foreign_file, "step-000002.parquet is not as this version writes it .*environment.json"),
        (no_ledger, "one has no ledger: .*`sluice sft`.*; give a run of `sluice train`"),
        (nothing_trained, "no sample of .*one was trained on in 2 steps from 1 to 2; give steps with an update"),
        (lambda run: run.config.unlink(), "one/config.yaml does not say the algorithm .FileNotFoundError.*; give a"),
        (lambda run: run.config.write_text("run: {}"), "does not say the algorithm .KeyError: 'algorithm'"),
        (lambda run: run.config.write_text("a: ]"), "does not say the algorithm .ParserError"),
        (lambda run: run.path.rename(run.path.with_name("gone")), "there is no run folder .*one; give the folder"),
    ],
)
def test_a_run_that_cannot_be_counted_says_what_to_do(run: RunDir, spoil, message: str):
    spoil(run)
    with pytest.raises(DataError, match=message):
        analyse([run.path])


def test_steps_that_are_not_there_are_told(run: RunDir):
    with pytest.raises(DataError, match="has none of these steps, but 1 to 2; give others with --steps"):
        analyse([run.path], (3, 5))


@pytest.mark.parametrize(
    "words", [["--steps", "3"], ["--steps", "a:b"], ["--top", "0"], ["--min-count", "x"], ["--plot", "x.pdf"]]
)
def test_options_that_say_nothing_are_refused(run: RunDir, capsys: pytest.CaptureFixture[str], words: list[str]):
    assert sluice("analyze", "clipped-tokens", run.path, *words) == 2
    assert f"argument {words[0]}: {words[1]!r} is no" in capsys.readouterr().err


# The command


def test_the_command_prints_and_writes_json(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = make_run(tmp_path, "other", "{name: cispo}")
    write_step(other, 1, [sample(0, 3, 1.0, Seen(C, 9.0, True))])
    out = tmp_path / "out.json"
    words = ("--top", 1, "--min-count", 1, "--steps", "1:", "--json", out)
    assert sluice("analyze", "clipped-tokens", run.path, other.path, *words) == 0
    printed = capsys.readouterr().out
    assert "1 run(s), 2 steps: 4 of 10 loss tokens clipped (40.000%)" in printed
    assert repr(PIECES[A]) in printed
    assert PIECES[B] not in printed
    assert "also clipped: 1 below --top" in printed
    assert r"'[red]\x1b'" in printed
    grpo, cispo = json.loads(out.read_text())
    assert grpo.keys() == {
        *("algorithm", "runs", "num_steps", "total", "by_update", "by_sign", "tokens", "num_rare"),
    }
    assert (grpo["algorithm"], cispo["algorithm"]) == ("grpo", "cispo")
    a, b = grpo["tokens"]  # all, whatever the table shows
    assert a.keys() == {"token_id", "token", "total", "by_update"}
    assert (a["token"], list(a["by_update"]), b["token"]) == (PIECES[A], ["0", "1"], PIECES[B])
    fields = {"occurrences", "clipped", "share", "mean_log_ratio", "max_log_ratio"}
    assert all(clipping.keys() == fields for clipping in (grpo["total"], a["total"], *grpo["by_sign"].values()))
    assert (a["total"]["occurrences"], a["total"]["clipped"], a["total"]["share"]) == (5, 3, 0.6)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_plot_is_an_image(run: RunDir, tmp_path: Path, suffix: str):
    other = make_run(tmp_path, "other", "{name: cispo}")
    write_step(other, 1, [sample(0, 3, 1.0, Seen(C, 1.0))])  # nothing clipped
    path = tmp_path / f"tokens.{suffix}"
    assert sluice("analyze", "clipped-tokens", run.path, other.path, "--min-count", 1, "--plot", path) == 0
    assert is_drawn(path)
