"""What README and docs say is true: every command runs, every config and every code block works, every name and link exists."""

from __future__ import annotations

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from conftest import ROOT
from makers import CHAT_TEMPLATE, make_bpe_tokenizer
from models import CONFIGS
from sluice.algorithms.spec import ALGORITHMS, Algorithm, resolve
from sluice.config import SftConfig, TrainConfig
from sluice.configfile import _key_paths, load
from sluice.configtraining import AlgorithmSection
from sluice.viewer import report
from small_runs import (
    DRY_ONLY,
    documented_metrics,
    finished,
    make_model,
    make_stand_in_python,
    metrics_of,
    sluice,
    workplace,
    write_config,
    write_rows,
)

ALGORITHM_PAGES = sorted((ROOT / "docs/algorithms").glob("*.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *ALGORITHM_PAGES]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SMALL = ["rollout.groups_per_step=2", "rollout.group_size=4", "rollout.max_new_tokens=8", "trainer.updates_per_batch=2"]
SMALL += ["run.num_steps=2", "run.num_threads=1", "run.name=test"]
VARIED = "rewards=[{name: my_rewards:shorter_is_better}]"
"""A reward that even a tiny model gets in different sizes."""
SMALL_SFT = ["run.num_threads=1", "run.name=test", "trainer.samples_per_update=32"]
HELP_LIMIT_S = 60

_HAS_TEST = "needs a cluster; tests/e2e/test_ray.py and tests/proof/test_lost_machine.py have one"
EXCEPTIONS: dict[str, str] = dict.fromkeys(
    (
        "ray start --head                              # on the machine of the run",
        "ray start --address=HEAD:6379                 # on every other",
        "sluice train CONFIG placement.name=ray placement.address=auto engine.process=own",
    ),
    _HAS_TEST,
)
"""Commands that no test runs, and why."""


class Found(NamedTuple):
    page: str
    text: str


def named(found: Found) -> str:
    return f"{found.page}: {found.text.splitlines()[0]}"


def blocks(language: str) -> list[Found]:
    """Fenced code blocks of all pages."""
    fence = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [Found(label(page), text) for page in PAGES for text in fence.findall(page.read_text())]


def label(page: Path) -> str:
    """Its path from the root, without `docs/`."""
    return str(page.relative_to(ROOT)).removeprefix("docs/")


def commands() -> list[Found]:
    """Lines of shell blocks, `sluice …` with arguments inside a sentence, and those in the comments of recipes."""
    in_blocks = [
        Found(block.page, line.strip())
        for language in ("bash", "sh")
        for block in blocks(language)
        for line in block.text.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    inline = re.compile(r"`(sluice (?:train|sft|check|report|replay|config \w+|analyze [\w-]+) [^`\n]+)`")
    in_text = [Found(label(page), text) for page in PAGES for text in inline.findall(page.read_text())]
    comment = re.compile(r"^# .*?((?:sluice|python) .+)$", re.MULTILINE)
    in_recipes = [Found(path.name, text) for path in RECIPES for text in comment.findall(path.read_text())]
    return list(dict.fromkeys(in_blocks + in_text + in_recipes))


# A folder in which everything that the pages speak of is there, and small

BASE = {
    "data": {"path": "train.jsonl", "prompt": "question", "reference": "answer", "reference_pattern": "#### (.+)"},
    "rewards": [{"name": "match"}],
    "rollout": {"max_new_tokens": 8},
    "trainer": {},
    "run": {},
}


def write_users_code(folder: Path) -> None:
    """The functions of the pages in the modules by whose names the pages call them; those without code are written here."""
    text = "\n".join(page.read_text() for page in PAGES)
    modules = {
        "my_filter": ["def keep(group):\n    return len(group.trajectories) == 4\n"],
        "my_script": ["def answer(prompt_ids, sampling):\n    return [10 + sampling.seed % 5, 1]\n"],
    }
    for block in blocks("python"):
        for name in re.findall(r"^(?:async )?def (\w+)", block.text, re.MULTILINE):
            called = set(re.findall(rf"(\w+):{name}\b", text))
            assert len(called) == 1, (
                f"{named(block)}: no dotted path in the pages names {name}, or several do: {called}"
            )
            modules.setdefault(called.pop(), []).append(block.text)
    for module, codes in modules.items():
        (folder / f"{module}.py").write_text("\n\n".join(codes))


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    rows = [
        {"question": f"{a} + {b}?", "answer": f"It is {a + b}.\n#### {a + b}", "level": a, "subject": "sums"}
        for a in range(4)
        for b in range(4)
    ]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "pairs.jsonl", [{"prompt": row["question"], "response": row["answer"]} for row in rows])
    model = make_bpe_tokenizer(folder / "model", [row["answer"] for row in rows], 300, CHAT_TEMPLATE)
    config = CONFIGS["qwen3"]()
    config.update({"vocab_size": 320, "max_position_embeddings": 512})
    config.save_pretrained(model)
    (folder / "sft.yaml").write_text("model: {path: model, random_weights: true}\ndata: {path: pairs.jsonl}\n")
    (folder / "longer.yaml").write_text("rollout: {max_new_tokens: 12}\n")
    write_users_code(folder)
    for name in ("vllm", "sglang"):
        make_stand_in_python(folder / f".venv-{name}/bin/python")
    for link in ("recipes", "examples"):
        (folder / link).symlink_to(ROOT / link)
    task = [sys.executable, "examples/recheck/task.py", "runs/recheck/task", "--demonstrations", "32"]
    subprocess.run(task, cwd=folder, check=True, timeout=HELP_LIMIT_S)
    with pytest.MonkeyPatch.context() as patch, workplace(folder, patch):
        base = finished("sft", "sft.yaml", name="base")
        checkpoint = next((base / "checkpoints").iterdir())
        write_config("base.yaml", **BASE, model={"path": str(checkpoint)})
        finished("train", "base.yaml", *SMALL, name="NAME")
    return folder


@pytest.fixture
def here(furnished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The furnished folder as the current one; runs go elsewhere, and only runs/NAME has a report, which takes time."""
    write = report.write_report
    monkeypatch.setattr(report, "write_report", lambda run: write(run) if str(run) == "runs/NAME" else None)
    with workplace(furnished, monkeypatch):
        yield furnished


def checkpoint_of(run: str) -> str:
    return str(max(Path(run, "checkpoints").iterdir()))


# Commands


def test_every_kind_of_command_is_found():
    """The pages have not changed their form under this file."""
    said = " ".join(found.text for found in commands())
    ours = (f"sluice {name}" for name in ("train", "train --resume", "sft", "report", "replay", "check", "analyze"))
    for word in ("make demo", "pip install", *ours):
        assert word in said
    assert not EXCEPTIONS.keys() - {found.text for found in commands()}, "exceptions of commands that are gone"


@pytest.mark.parametrize("command", commands(), ids=named)
def test_the_command_works(here: Path, tmp_path: Path, command: Found):
    if command.text in EXCEPTIONS:
        pytest.skip(EXCEPTIONS[command.text])
    program, *words = shlex.split(command.text, comments=True)
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words
        assert set(words) <= set(targets)
    elif program == "pip":
        check_pip(words)
    elif program.rpartition("/")[2] in ("python", "python3"):
        check_script(words)
    else:
        assert program == "sluice", f"nothing here runs {program}: give it a home, or name it in EXCEPTIONS"
        assert sluice(*filled_in(words, tmp_path)) == 0


def check_pip(words: list[str]) -> None:
    """An editable install of this project, with extras that it has, or a package of one of them."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if words[1:2] != ["-e"]:
        (package,) = words[1:]
        assert package in {re.split(r"[>=\[]", needed)[0] for extra in extras.values() for needed in extra}
        return
    (target,) = words[2:]
    found = re.fullmatch(r"\.(?:\[([\w,]+)\])?", target)
    assert found
    assert set((found[1] or "").split(",")) - {""} <= extras.keys()


def check_script(words: list[str]) -> None:
    """A script of the repository that knows the options; the scripts themselves have tests of their own."""
    script, *options = words
    if script == "-m":
        assert (ROOT / "src" / f"{options[0].replace('.', '/')}.py").exists()
        return
    assert (ROOT / script).is_file()
    done = subprocess.run(
        [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, timeout=HELP_LIMIT_S, check=True
    )
    for option in options:
        if option.startswith("--"):
            assert option.partition("=")[0] in done.stdout


def filled_in(words: list[str], elsewhere: Path) -> list[str]:
    """The words with real things for the placeholders, and settings behind them that make the run small."""
    is_sft = words[0] == "sft" or "--sft" in words or "recipes/recheck_base.yaml" in words
    places = {
        "CONFIG": "sft.yaml" if is_sft else "base.yaml",
        "runs/OTHER": "runs/NAME",
        "model.path=MODEL_FOLDER": f"model.path={checkpoint_of('runs/base')}",
        "model.path=FOLDER_OF_THE_BASE_MODEL": f"model.path={checkpoint_of('runs/base')}",
    }
    words = [places.get(word, word) for word in words]
    if "--resume" in words:
        run = shutil.copytree("runs/NAME", elsewhere / "NAME")
        return [str(run) if word == "runs/NAME" else re.sub(r"(num_steps)=\d+", r"\1=3", word) for word in words]
    if words[0] in ("train", "sft", "check"):
        words += [*(SMALL_SFT if is_sft else SMALL), f"run.folder={elsewhere}"]
    return words


# Code


@pytest.mark.parametrize("block", blocks("yaml"), ids=named)
def test_the_config_block_runs(here: Path, tmp_path: Path, block: Found):
    """Each over the base config, with the functions that it names."""
    fragment = tmp_path / "fragment.yaml"
    fragment.write_text(block.text)
    files = ["base.yaml", str(fragment)]
    rewards = yaml.safe_load(block.text).get("rewards", [])
    varied = [] if rewards else [VARIED]
    assert sluice("train", *files, *SMALL, *varied, f"run.folder={tmp_path}") == 0
    logged = metrics_of(tmp_path / "test")[0].keys()
    for reward in rewards:
        name = reward["name"].rpartition(":")[2]
        assert any(f"{metric}/".startswith(f"rollout/reward/{name}/") for metric in logged)


def test_whole_configs_are_valid(tmp_path: Path):
    """For more GPUs and machines than there are here, so they are only read."""
    page = (ROOT / "docs/scaling.md").read_text()
    found = re.findall(r"```text\n(model: .*?)```", page, re.DOTALL)
    assert len(found) == 4
    for number, text in enumerate(found):
        (tmp_path / f"{number}.yaml").write_text(text)
        load(TrainConfig, [str(tmp_path / f"{number}.yaml")])


@pytest.mark.parametrize(
    "setting",
    [
        "rollout.environment=my_env:play",
        "rollout.environment=my_env:ask_twice",
        "rollout.filter=my_filter:keep",
        "algorithm.dynamic_sampling=true",
    ],
)
def test_what_the_pages_say_to_set_runs(here: Path, tmp_path: Path, setting: str):
    key, _, value = setting.partition("=")
    page = (ROOT / "docs/howto.md").read_text()
    assert f"`{key}: {value}`" in page or f"{key.partition('.')[2]}: {value}\n" in page
    assert sluice("train", "base.yaml", setting, VARIED, *SMALL, f"run.folder={tmp_path}") == 0


@pytest.mark.parametrize("block", [b for b in blocks("python") if "def " not in b.text], ids=named)
def test_the_code_block_runs(here: Path, block: Found):
    step = checkpoint_of("runs/NAME").rpartition("/")[2]
    names: dict[str, object] = {}
    exec(re.sub(r"step-(?!000001)\d+", step, block.text), names)
    if "rows" in names:
        assert len(names["rows"]) == 8  # type: ignore[arg-type]
    if "model" in names:
        assert names["model"].num_parameters() > 0  # type: ignore[attr-defined]


# Names and links


ALL_TERMS = (
    "algorithm={old_logprobs: recomputed, correction: tis, rejection: geometric, kl_coef: 0.01, entropy_coef: 0.01}"
)


def test_the_metrics_of_the_table_are_those_that_are_logged(here: Path, tmp_path: Path):
    """Of every run, and of those whose algorithm has all there is: terms and corrections, and a critic."""
    write_config(tmp_path / "dry.yaml", **BASE, model={"path": "model"})
    settings = ["engine={name: scripted, script: my_script:answer}", "trainer={name: dry}"]
    make_model(tmp_path / "mixture", "qwen3_moe")
    mixture = [f"model.path={tmp_path / 'mixture'}", "rollout.routing_replay=true"]
    dry, terms, critic, apart, routed = (
        logged_by(tmp_path / name, config, *words)
        for name, config, words in (
            ("dry", tmp_path / "dry.yaml", settings),
            ("terms", "base.yaml", [ALL_TERMS]),
            ("critic", "base.yaml", ["algorithm.name=ppo"]),
            ("apart", "base.yaml", ["engine.process=own", "engine.replicas=2", "rollout.max_staleness=1"]),
            ("routed", "base.yaml", mixture),
        )
    )
    trained, tuned = (set(metrics_of(Path(run))[0]) - {"step"} for run in ("runs/NAME", "runs/base"))
    table, further = documented_metrics(), documented_metrics(some_runs=True)
    assert table - trained == {"rollout/reward/LABEL", DRY_ONLY}
    assert DRY_ONLY in dry
    free = re.compile(r"rollout/reward/|rollout/finish/|perf/\w+_(s|bytes)$")
    assert {name for name in trained | tuned | dry if not free.match(name)} <= table
    assert {name for name in (terms | critic | apart | routed) - trained if not free.match(name)} == further


def logged_by(folder: Path, config: str | Path, *settings: str) -> set[str]:
    assert sluice("train", config, *settings, *SMALL, f"run.folder={folder}") == 0
    return set(metrics_of(folder / "test")[0]) - {"step"}


def test_metrics_that_pages_name_are_logged(here: Path):
    known = documented_metrics() | documented_metrics(some_runs=True) | metrics_of(Path("runs/NAME"))[0].keys()
    known.add("rollout/reward/turns")  # see tests of the worker
    for page in PAGES:
        for name in re.findall(r"`((?:rollout|train|perf)/[\w/*]+)`", page.read_text()):
            assert fnmatch.filter(known, name), f"{label(page)}: {name}"


def test_settings_that_pages_name_exist():
    keys = {*_key_paths(TrainConfig), *_key_paths(SftConfig)}
    sections = {key.partition(".")[0] for key in keys if "." in key}
    setting = re.compile(rf"`((?:{'|'.join(sections)})\.\w[\w.]*)(?:[:=][^`]*)?`")
    files = (".yaml", ".py", ".md", ".json", ".jsonl", ".log")
    for page in PAGES:
        for name in setting.findall(page.read_text()):
            known = re.sub(r"\.\d+\.", ".0.", name)
            assert known in keys or name.endswith(files), f"{label(page)}: {name}"


# Algorithms


def test_the_table_of_algorithms_is_that_of_the_code():
    page = (ROOT / "docs/algorithms/README.md").read_text()
    rows = re.findall(r"^\| \[`(\w+)`\]\((\w+)\.md\)(.*?) \| (.*) \|$", page, re.MULTILINE)
    assert [name for name, *_ in rows] == list(ALGORITHMS)
    for name, file, remark, cells in rows:
        row = ALGORITHMS[name]
        assert file == name
        assert ("default" in remark) == (name == AlgorithmSection().name)
        assert ("dynamic sampling" in remark) == row.dynamic_sampling
        assert cells.split(" | ") == cells_of(row), name


def cells_of(row: Algorithm) -> list[str]:
    """Advantage, ratio, clip, mask, aggregation."""
    trust = f" {row.clip_low:g} / {row.clip_high:g}" if row.clip_low else ""
    bounds = {
        "surrogate": trust + (f", dual {row.dual_clip:g}" if row.dual_clip else ""),
        "weight": f": ratio ≤ {row.ratio_max or 0:g}",
        "soft_gate": f" {row.gate_positive or 0:g} / {row.gate_negative or 0:g}",
        "none": "",
    }
    moved = f" {row.tv_low:g} / {row.tv_high:g}" if row.tv_low else ""
    return [
        f"`{row.advantage}`" + ("" if row.normalise == "none" else f", then `{row.normalise}`"),
        f"`{row.ratio}`",
        f"`{row.clip}`{bounds[row.clip]}",
        f"`{row.mask}`" + {"trust_region": trust, "tv": moved, "none": ""}[row.mask],
        f"`{row.aggregation}`" + (f" {row.loss_constant:g}" if row.loss_constant else ""),
    ]


SOURCES = {
    "cispo": "2506.13585",
    "grpo": "2402.03300",
    "dr_grpo": "2503.20783",
    "glm": "2508.06471",
    "dapo": "2503.14476",
    "gspo": "2507.18071",
    "unified": "2506.13585",
    "sapo": "2511.20347",
    "dppo": "2602.04879",
    "reinforce": "Machine Learning 8",  # 1992
    "rloo": "2402.14740",
    "reinforce_pp": "2501.03262",
    "reinforce_pp_baseline": "2501.03262",
    "ppo": "1707.06347",
}


def test_each_row_has_a_page():
    assert {page.stem for page in ALGORITHM_PAGES} == {*ALGORITHMS, "README"}
    assert SOURCES.keys() == ALGORITHMS.keys()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_page_of_a_row_says_what_the_row_is(name: str):
    """Its first config says every word and every bound that the row has, and nothing that the row has not."""
    text = (ROOT / f"docs/algorithms/{name}.md").read_text()
    assert text.startswith(f"# `{name}`\n")
    assert f"{SOURCES[name]}]" in text or SOURCES[name] in text.partition("```yaml")[0]
    for part in ("## Elsewhere", "## Metrics", "## No signal"):
        assert part in text
    row = resolve(name, {}, max_new_tokens=256, group_size=8)
    config = AlgorithmSection.model_validate(
        yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])["algorithm"]
    )
    assert config.name == name
    assert resolve(name, config.overrides(), max_new_tokens=256, group_size=8) == row
    told = {
        field.name for field in fields(row) if field.default is MISSING or getattr(row, field.name) != field.default
    }
    if ALGORITHMS[name].loss_constant is None:
        told.discard("loss_constant")  # rollout.max_new_tokens
    assert config.model_fields_set == told - {"kl", "kl_estimator"}


def test_papers_are_linked_by_their_number():
    for page in PAGES:
        for number, target in re.findall(r"\[arXiv ([\d.]+)\]\((\S+?)\)", page.read_text()):
            assert target == f"https://arxiv.org/abs/{number}", label(page)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{label(page)}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{label(page)}: {target}"


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    for page in PAGES[1:]:
        if page not in ALGORITHM_PAGES:
            assert f"](docs/{page.name})" in readme
    assert "](docs/algorithms/README.md)" in readme
