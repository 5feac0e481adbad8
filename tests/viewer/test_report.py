"""report.html holds the run, is bounded in size, opens anywhere, and runs nothing that a sample says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from chromium import Browser
from fabricated_run import fabricate_run

from sluice.errors import DataError
from sluice.tracking.ledger import read_step
from sluice.tracking.rundir import RunDir, append_line
from sluice.tracking.tracker import FileTracker
from sluice.types import Completion, Group, Prompt, Trajectory, Turn
from sluice.viewer import report
from sluice.viewer.report import write_report

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!--<script>\u2028\u202e\x00\x1b\"'&lt;"


@pytest.fixture(scope="module")
def fabricated(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    rundir = fabricate_run(tmp_path_factory.mktemp("runs"))
    write_report(rundir.path)
    return rundir


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def rundir(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, "run")


def embedded(page: Path) -> dict[str, Any]:
    """What the page was given to show."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def shown_groups(data: dict[str, Any]) -> dict[int, list[int]]:
    return {step["step"]: [group["group"] for group in step["groups"]] for step in data["steps"]}


def write_groups(rundir: RunDir, step: int, sizes: Sequence[int], num_tokens: int = 10, prompt: Prompt | None = None):
    """A step with a group of each size, of responses of `num_tokens` tokens."""

    def trajectory() -> Trajectory:
        ids = list(range(2, num_tokens + 2))
        completion = Completion(ids, [-0.001 * i for i in ids], "length", [step] * num_tokens, 1.0)
        return Trajectory([Turn([0, 1], completion)], "length", "scored", 1.0, {"a": 1.0})

    prompt = prompt or Prompt("p", [{"role": "user", "content": "question"}])
    groups = [Group(i, prompt, [trajectory() for _ in range(size)], "filter") for i, size in enumerate(sizes)]
    FileTracker(rundir, lambda ids: [f"t{i} " for i in ids]).log_groups(step, groups, [])


# In a browser


@pytest.mark.browser
def test_the_page_shows_curves_and_every_token_and_asks_the_network_for_nothing(fabricated: RunDir, browser: Browser):
    browser.open(fabricated.report)
    assert browser.run("document.querySelectorAll('figure svg path').length") > 100
    assert browser.run("document.querySelector('h1').innerText") == fabricated.path.name
    text = browser.run("document.body.innerText")
    for expected in ("Reward", "nats per token", "cispo", "trainer.learning_rate", "no_score", "of 20"):
        assert expected in text
    browser.run("document.querySelector('a[href=\"#samples\"]').click()")
    browser.wait_until("!document.querySelector('#samples-page').hidden")
    assert browser.run("document.querySelector('#run-page').checkVisibility()") is False
    last = embedded(fabricated.report)["steps"][-1]
    assert browser.run("document.querySelector('#step-number').innerText") == str(last["step"])
    assert browser.run("document.querySelectorAll('#groups button').length") == len(last["groups"])
    tokens = last["groups"][0]["samples"][0]["token_ids"]
    assert browser.run("document.querySelectorAll('#tokens .token').length") == len(tokens)
    assert browser.run("document.querySelector('#tokens').innerText").startswith("<think>⏎\n")
    requests = browser.seen("Network.requestWillBeSent")
    assert {request["request"]["url"] for request in requests} == {fabricated.report.as_uri()}
    assert browser.seen("Runtime.exceptionThrown") == []
    assert browser.seen("Log.entryAdded") == []


@pytest.mark.browser
def test_choices_lead_to_any_sample_and_colours_follow_the_chosen_quantity(fabricated: RunDir, browser: Browser):
    browser.open(fabricated.report, fragment="#samples")
    browser.run("document.querySelector('#step').value = 3")
    browser.run("document.querySelector('#step').dispatchEvent(new Event('input'))")
    browser.run("document.querySelectorAll('#groups button')[2].click()")
    browser.run("document.querySelectorAll('#chips button')[1].click()")
    step = embedded(fabricated.report)["steps"][3]
    group = step["groups"][2]
    sample = group["samples"][1]
    assert group["messages"][0]["content"] in browser.run("document.querySelector('#prompt').innerText")
    about = browser.run("document.querySelector('#about').innerText")
    assert re.search(rf"reward\s*{sample['reward']:g}\b", about)
    assert re.search(rf"weights of step\s*{step['step'] - 1}\b", about)

    def colours(mode: str) -> list[str]:
        browser.run(f"document.querySelector('input[value={mode}]').click()")
        return browser.run(
            "[...document.querySelectorAll('#tokens .token')].map(token => getComputedStyle(token).backgroundColor)"
        )

    least = min(range(len(sample["logprobs"])), key=lambda t: sample["logprobs"][t])
    assert len(set(colours("probability"))) > 10
    assert opacity(colours("probability")[least]) == max(map(opacity, colours("probability")))
    clipped = sample["clipped"] if isinstance(sample["clipped"], list) else [0] * len(sample["token_ids"])
    assert [opacity(colour) > 0 for colour in colours("clipped")] == [bool(flag) for flag in clipped]
    above = next(t for t, ratio in enumerate(sample["ratios"]) if ratio > 1.05)
    below = next(t for t, ratio in enumerate(sample["ratios"]) if ratio < 0.95)
    assert colours("ratio")[above].split()[:4] != colours("ratio")[below].split()[:4]


def opacity(colour: str) -> float:
    """Of `color(srgb r g b / a)`, the browser's word for a mixture with transparent."""
    assert "/" in colour or colour.startswith("rgba"), colour
    return float(re.split(r"[/,]", colour)[-1].strip(" )"))


@pytest.mark.browser
def test_pointing_at_a_token_tells_all_that_is_known_of_it(fabricated: RunDir, browser: Browser):
    browser.open(fabricated.report, fragment="#samples")
    sample = embedded(fabricated.report)["steps"][-1]["groups"][0]["samples"][0]
    assert browser.run("document.querySelector('#tip').checkVisibility()") is False
    box = browser.run("(box => [box.x + 3, box.y + 5])(document.querySelectorAll('.token')[4].getBoundingClientRect())")
    browser.point_at(*box)
    assert browser.run("document.querySelector('#tip').checkVisibility()") is True
    rows = browser.run(
        "[...document.querySelectorAll('#tip tr')].map(row => [...row.cells].map(cell => cell.innerText))"
    )
    told = dict(rows)
    assert told["id"] == str(sample["token_ids"][4])
    assert float(told["log-prob (engine)"]) == sample["logprobs"][4]
    assert float(told["log-prob (at update)"]) == sample["current_logprobs"][4]
    assert float(told["ratio"]) == sample["ratios"][4]
    assert float(told["probability (engine)"]) == pytest.approx(math.exp(sample["logprobs"][4]), rel=1e-3)
    assert told["clipped"] in ("yes", "no")
    assert told["policy version"] == "11"
    assert told["loss weight"] == "1"
    browser.point_at(1, 1)
    assert browser.run("document.querySelector('#tip').checkVisibility()") is False


@pytest.mark.browser
def test_a_hostile_sample_is_text_and_nothing_of_it_runs(rundir: RunDir, browser: Browser):
    """Wherever a sample, a data row, an error, a reward's name or a config can put a text."""
    prompt = Prompt(HOSTILE, [{"role": HOSTILE, "content": HOSTILE}], HOSTILE, {HOSTILE: HOSTILE}, HOSTILE)
    trajectory = Trajectory([Turn([1], Completion([2], [-1.0], "stop", [0], 1.0, HOSTILE))], HOSTILE, "scored", 1.0)
    trajectory.reward_parts, trajectory.error = {HOSTILE: 0.5, "__proto__": 1.0}, HOSTILE
    tracker = FileTracker(rundir, lambda ids: [HOSTILE for _ in ids])
    tracker.log_groups(1, [Group(1, prompt, [trajectory], HOSTILE)], [])
    tracker.log(1, {"rollout/reward": 1.0, f"rollout/reward/{HOSTILE}": 0.5, "rollout/reward/_$x$": 1.0})
    tracker.event(HOSTILE, HOSTILE)
    rundir.config.write_text(json.dumps({"algorithm": {"name": HOSTILE}, "rewards": [{"name": HOSTILE}]}))
    rundir.environment.write_text(json.dumps({"versions": HOSTILE}))
    browser.open(write_report(rundir.path), fragment="#samples")
    assert browser.run("document.images.length") == 0
    assert browser.run("document.scripts.length") == 2
    assert browser.run("document.title") == "run – sluice"
    for place in ("#prompt", "#about", "#groups", "#tokens", ".events", ".legend"):
        text = browser.run(f"document.querySelector('{place}').textContent").replace("·", " ")  # how tokens show spaces
        assert "<img src=x onerror=" in text, place
    assert browser.run("document.querySelector('#tokens').textContent").endswith("⟨2028⟩⟨202E⟩⟨0000⟩⟨001B⟩\"'&lt;")
    assert browser.seen("Runtime.exceptionThrown") == []
    assert browser.seen("Log.entryAdded") == []


@pytest.mark.browser
def test_a_run_without_samples_shows_curves_alone(rundir: RunDir, browser: Browser):
    """Supervised fine-tuning, and a single step of it."""
    append_line(rundir.metrics, {"step": 10, "train/loss": 1.5, "perf/step_s": 75.0})
    browser.open(write_report(rundir.path), fragment="#samples")
    assert browser.run("document.querySelector('figure svg').checkVisibility()") is True
    assert browser.run("document.querySelector('nav').innerText") == "Run"
    assert "1.5" in browser.run("document.querySelector('.tiles').innerText")
    assert "update" in browser.run("document.querySelector('figure svg').textContent")
    assert browser.seen("Runtime.exceptionThrown") == []


@pytest.mark.browser
def test_the_page_follows_the_colour_scheme(fabricated: RunDir, browser: Browser):
    def colours() -> list[str]:
        look = "getComputedStyle(document.querySelector('{}')).{}"
        places = [("body", "backgroundColor"), ("figure svg text", "fill"), ("h2", "color")]
        return [browser.run(look.format(*place)) for place in places]

    browser.open(fabricated.report)
    light = colours()
    browser.open(fabricated.report, dark=True)
    dark = colours()
    assert all(a != b for a, b in zip(light, dark, strict=True))


# What is in it


def test_the_file_refers_to_nothing_outside_itself(fabricated: RunDir):
    page = fabricated.report.read_text()
    assert not re.search(r"\b(?:src|action)\s*=|<link|<iframe|<object|<base|@import|url\((?!#)|https?://", page)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))


def test_which_samples_are_shown_is_bounded_and_said(fabricated: RunDir):
    data = embedded(fabricated.report)
    assert "160 of 192 samples are shown, from 10 of 12 steps" in fabricated.report.read_text()
    shown = shown_groups(data)
    assert len(shown) == 10
    assert (min(shown), max(shown)) == (1, 12)
    assert all(len(group["samples"]) == 4 for step in data["steps"] for group in step["groups"])


def test_groups_stay_whole_until_one_alone_is_too_large(rundir: RunDir):
    for step in range(1, 31):
        write_groups(rundir, step, [6, 8, 7, 8, 5])
    append_line(rundir.metrics, {"step": 30, "rollout/reward": 1.0})
    few = embedded(write_report(rundir.path, max_samples=40))
    assert (few["num_samples"], few["num_steps"]) == (30 * 34, 30)
    assert few["num_shown"] <= 40
    assert len(few["steps"]) == 5  # 40 samples are 5 groups of the largest size
    assert [s["step"] for s in few["steps"]][:: len(few["steps"]) - 1] == [1, 30]
    sizes = [6, 8, 7, 8, 5]
    for step in few["steps"]:
        assert all(len(group["samples"]) == sizes[group["group"]] for group in step["groups"])
    one = embedded(write_report(rundir.path, max_samples=3))
    assert (one["num_shown"], shown_groups(one)) == (3, {30: [4]})


def test_long_responses_are_cut_and_few_are_shown_to_keep_the_file_small(
    rundir: RunDir, monkeypatch: pytest.MonkeyPatch
):
    """Fewer groups first; only where a step's one group is too long are its responses cut."""
    monkeypatch.setattr(report, "MAX_TOKENS", 2000)
    write_groups(rundir, 1, [4] * 10, num_tokens=50)
    append_line(rundir.metrics, {"step": 1})
    data = embedded(write_report(rundir.path))
    assert shown_groups(data) == {1: [0, 1, 2, 3, 4, 6, 7, 8, 9]}  # 10 groups have 2080 tokens with their prompts
    assert {len(s["token_ids"]) for g in data["steps"][0]["groups"] for s in g["samples"]} == {50}
    write_groups(rundir, 1, [4, 4], num_tokens=2100)
    data = embedded(write_report(rundir.path))
    assert [len(s["token_ids"]) for g in data["steps"][0]["groups"] for s in g["samples"]] == [262] * 4
    assert {s["num_tokens"] for g in data["steps"][0]["groups"] for s in g["samples"]} == {2100}


def test_numbers_of_tokens_are_those_of_the_ledger(fabricated: RunDir):
    """To five digits; the prompt's tokens are told apart from the response's."""
    data = embedded(fabricated.report)
    sample = data["steps"][0]["groups"][0]["samples"][0]
    row = read_step(fabricated, 1).to_pylist()[0]
    start = len(data["prompts"][sample["prompt"]])
    assert row["policy_versions"][:start] == [-1] * start
    assert row["policy_versions"][start] >= 0
    assert data["prompts"][sample["prompt"]] + sample["token_ids"] == row["token_ids"]
    assert [data["pieces"][str(i)] for i in sample["token_ids"]] == row["tokens"][start:]
    for name in ("logprobs", "current_logprobs", "ratios"):
        assert sample[name] == pytest.approx(row[name][start:], rel=1e-4)
    assert sample["loss_weights"] == 1


def test_missing_numbers_leave_gaps_and_a_torn_line_is_left_out(rundir: RunDir):
    for step, value in enumerate((1.0, None, math.nan, math.inf, 2.0), start=1):
        append_line(rundir.metrics, {"step": step, "rollout/reward": value, "train/never": math.nan})
    append_line(rundir.metrics, {"step": 5, "rollout/reward": 3.0})  # a step done again after a resume
    with rundir.metrics.open("a") as file:
        file.write('{"step": 6, "rollout/rew')
    page = write_report(rundir.path).read_text()
    assert "from 1.000" in page
    assert "<strong>3.000</strong>" in page
    assert "train/never" not in page
    assert not re.search(r"(?i)\bnan\b", re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL))


def test_a_long_run_does_not_make_a_large_page(rundir: RunDir):
    lines = [
        json.dumps({"step": i, "rollout/reward": math.sin(i * i), "train/loss": math.cos(i)}) for i in range(20_000)
    ]
    rundir.metrics.write_text("\n".join(lines) + "\n")
    assert write_report(rundir.path).stat().st_size < 300_000


def test_metrics_of_any_name_are_drawn(rundir: RunDir):
    append_line(
        rundir.metrics, {"step": 1, "train/mine": 1.0, "perf/mine": 1.0, "eval/pass@1": 0.5, "rollout/mine": 2.0}
    )
    page = write_report(rundir.path).read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Rollout", "Training", "Speed", "Other"]
    assert re.findall(r"<h3>(.*?)</h3>", page) == ["rollout/mine", "train/mine", "perf/mine", "eval/pass@1"]


def test_events_are_shown_the_latest_when_there_are_many(rundir: RunDir):
    append_line(rundir.metrics, {"step": 1})
    tracker = FileTracker(rundir, lambda ids: [])
    assert "Events" not in write_report(rundir.path).read_text()
    for i in range(report.MAX_EVENTS + 3):
        tracker.event("kind", f"message {i}.")
    page = write_report(rundir.path).read_text()
    assert f"The last {report.MAX_EVENTS} of {report.MAX_EVENTS + 3}" in page
    assert "message 2." not in page
    assert "message 3." in page
    assert f"message {report.MAX_EVENTS + 2}." in page


@pytest.mark.parametrize("config", ["a: [", "just text", "- 1", ""])
def test_a_config_that_says_nothing_does_not_hide_the_run(rundir: RunDir, config: str):
    append_line(rundir.metrics, {"step": 1, "train/loss": 1.0})
    rundir.config.write_text(config)
    rundir.environment.write_text("{")
    assert config in write_report(rundir.path).read_text()


def test_steps_without_any_sample_do_not_matter(rundir: RunDir):
    write_groups(rundir, 1, [])
    append_line(rundir.metrics, {"step": 1, "train/loss": 1.0})
    assert embedded(write_report(rundir.path))["steps"] == []
    write_groups(rundir, 2, [2], prompt=Prompt("p", []))
    assert shown_groups(embedded(write_report(rundir.path))) == {2: [0]}


def test_untrained_samples_have_no_ratios(rundir: RunDir):
    write_groups(rundir, 1, [1])
    append_line(rundir.metrics, {"step": 1, "train/loss": 1.0})
    (sample,) = embedded(write_report(rundir.path))["steps"][0]["groups"][0]["samples"]
    assert (sample["ratios"], sample["advantages"], sample["clipped"], sample["trained"]) == (None, None, None, False)
    assert len(sample["logprobs"]) == 10


def test_a_written_report_takes_the_place_of_the_old_one(rundir: RunDir):
    append_line(rundir.metrics, {"step": 1, "train/loss": 1.0})
    write_report(str(rundir.path))
    append_line(rundir.metrics, {"step": 2, "train/loss": 0.125})
    assert "0.125" in write_report(str(rundir.path)).read_text()


# What cannot be shown


def test_what_is_no_run_is_said_with_what_to_do(tmp_path: Path, rundir: RunDir):
    with pytest.raises(DataError, match=r"there is no run folder .*nowhere; give the folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"metrics\.jsonl has no steps.*has not finished a step"):
        write_report(rundir.path)
    assert not rundir.report.exists()


def test_broken_files_are_named(rundir: RunDir):
    append_line(rundir.metrics, {"step": 1})
    write_groups(rundir, 1, [1])
    (rundir.ledger / "step-000001.parquet").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"step-000001\.parquet"):
        write_report(rundir.path)
    rundir.metrics.write_text("broken\n{}\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:1"):
        write_report(rundir.path)
