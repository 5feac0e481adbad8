"""Z-score against centred advantages: figures worked out by hand, the rounding of rates, and what the command writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from images import is_drawn

from sluice.analysis.binary_reward import analyse, default_rates
from sluice.errors import ConfigError
from small_runs import sluice


def test_a_group_of_four_by_hand():
    """1 right: mean 1/4, variance 3/4 / 3, so std 1/2. 2 right: variance 1 / 3. The std_eps of 1e-6 is in the z-score."""
    one, two, three = analyse(4, [0.25, 0.5, 0.75]).rates
    std = 0.5 + 1e-6
    assert (one.centred_right, one.centred_wrong) == (0.75, -0.25)
    assert (one.z_score_right, one.z_score_wrong) == pytest.approx((0.75 / std, -0.25 / std), rel=1e-12)
    assert one.amplification == pytest.approx(1 / std, rel=1e-12)
    assert two.amplification == pytest.approx(1 / (math.sqrt(1 / 3) + 1e-6), rel=1e-12)
    assert (one.relative, two.relative) == pytest.approx((2 / math.sqrt(3), 1), abs=1e-5)
    assert (three.z_score_right, three.z_score_wrong) == pytest.approx((-one.z_score_wrong, -one.z_score_right))
    # ΣA² of 1, 2 and 3 right is 3/4, 1 and 3/4 when centred, and 3 whatever is right with the z-score
    norms = [math.sqrt(0.75), 1, math.sqrt(0.75)]
    assert [r.centred_share for r in (one, two, three)] == pytest.approx([norm / sum(norms) for norm in norms])
    assert [r.z_score_share for r in (one, two, three)] == pytest.approx([1 / 3] * 3, abs=1e-6)


def test_the_nine_rates_of_32_samples():
    """The figures that docs/analyze.md quotes: 2.3 to 3.0 at a quarter and an eighth, and 5.7 at one of 32."""
    result = analyse(32)
    assert [r.num_right for r in result.rates] == [1, 4, 8, 12, 16, 20, 24, 28, 31]
    assert [round(r.amplification, 2) for r in result.rates[:5]] == [5.66, 2.98, 2.27, 2.03, 1.97]
    assert [round(r.relative, 2) for r in result.rates[:5]] == [2.87, 1.51, 1.15, 1.03, 1.0]
    mirrored = [r.amplification for r in result.rates]
    assert mirrored == pytest.approx(mirrored[::-1])
    tenths = analyse(32, [i / 10 for i in range(1, 10)]).rates
    assert [round(r.amplification, 2) for r in tenths[:5]] == [3.38, 2.52, 2.12, 2.0, 1.97]
    assert result.notes == []


@pytest.mark.parametrize(
    ("rate", "num_right", "note"),
    [
        (0.1, 3, "a rate of 0.1 is taken as 3 of 32 = 0.09375"),
        (0.11, 4, "a rate of 0.11 is taken as 4 of 32 = 0.125"),
        (0.0, 1, "a rate of 0 is taken as 1 of 32 = 0.03125"),
        (1.0, 31, "a rate of 1 is taken as 31 of 32 = 0.96875"),
        (0.09375, 3, None),
    ],
)
def test_a_rate_is_rounded_to_a_group_that_has_a_gradient_and_this_is_said(rate: float, num_right: int, note: str):
    result = analyse(32, [rate])
    assert [r.num_right for r in result.rates] == [num_right]
    assert result.notes == ([note] if note else [])


def test_rates_that_are_the_same_group_are_listed_once():
    """Twice the same group would take a share of the gradient twice."""
    result = analyse(8, default_rates(8))
    assert [r.num_right for r in result.rates] == list(range(1, 8))
    assert result.notes == [f"2 of the rates are {k} of 8 = {k / 8}, which is listed once" for k in (1, 7)]
    assert sum(r.centred_share for r in result.rates) == pytest.approx(1)


@pytest.mark.parametrize(
    ("group_size", "rates", "message"),
    [
        (1, None, "--group-size 1: .* give at least 2"),
        (8, [10.0], "--rates 10: .*for 10 % give 0.1"),
        (8, [-0.1], "between 0 and 1"),
        (8, [math.nan], "between 0 and 1"),
    ],
)
def test_what_is_no_group_or_no_rate_is_refused(group_size: int, rates: list[float] | None, message: str):
    with pytest.raises(ConfigError, match=message):
        analyse(group_size, rates)


def test_the_command_prints_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "rates.json"
    assert sluice("analyze", "binary-reward", "--group-size", 4, "--rates", 0.3, 0.5, "--json", path) == 0
    printed = capsys.readouterr().out
    assert "2.00" in printed
    assert "note: a rate of 0.3 is taken as 1 of 4 = 0.25" in printed
    written = json.loads(path.read_text())
    assert written.keys() == {"group_size", "rates", "notes"}
    assert (written["group_size"], written["notes"]) == (4, ["a rate of 0.3 is taken as 1 of 4 = 0.25"])
    advantages = {"z_score_right", "z_score_wrong", "centred_right", "centred_wrong"}
    factors = {"amplification", "relative", "z_score_share", "centred_share"}
    assert all(rate.keys() == {"num_right", "rate"} | advantages | factors for rate in written["rates"])
    assert [(rate["num_right"], rate["rate"], rate["centred_right"]) for rate in written["rates"]] == [
        (1, 0.25, 0.75),
        (2, 0.5, 0.5),
    ]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_plot_is_an_image(tmp_path: Path, suffix: str):
    path = tmp_path / f"rates.{suffix}"
    assert sluice("analyze", "binary-reward", "--plot", path) == 0
    assert is_drawn(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--plot", "rates.jpg", "'rates.jpg' is no image that can be drawn; end it in .png or .svg"),
        ("--json", "absent/rates.json", "there is no folder 'absent' to write 'absent/rates.json' to"),
        ("--plot", "absent/rates.png", "there is no folder 'absent'"),
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_the_work(
    capsys: pytest.CaptureFixture[str], option: str, name: str, message: str
):
    assert sluice("analyze", "binary-reward", option, name) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""
