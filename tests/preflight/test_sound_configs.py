"""`sluice check` passes what is sound: every recipe, SFT, a run without a model; and `--offline` loads no torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import ROOT, shared_data
from makers import CHAT_TEMPLATE, make_bpe_tokenizer
from models import CONFIGS
from small_runs import set_up, sluice, workplace, write_config

LIMIT_S = 120
ITEMS = ["config", "data", "model", "prompts", "rewards", "memory", "disk", "trial"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with workplace(tmp_path, monkeypatch):
        yield tmp_path


@pytest.fixture
def task(here: Path) -> Path:
    """The recheck task, as the recipes name it."""
    command = [sys.executable, ROOT / "examples/recheck/task.py", "runs/recheck/task", "--demonstrations", "32"]
    subprocess.run(command, check=True, timeout=LIMIT_S)
    return Path("runs/recheck/task")


def levels(printed: str) -> dict[str, str]:
    """Of each item."""
    heads = [line.split() for line in printed.splitlines() if not line.startswith(" ")]
    return {words[0]: words[1] for words in heads[:-1]}


def without_sizes_and_times(text: str) -> str:
    return re.sub(r"[\d.]+ (?:[KMG]iB|ms|s)\b", "N", text)


def test_the_recheck_recipe_passes_and_prints_what_the_page_shows(task: Path, capsys: pytest.CaptureFixture[str]):
    """Its questions are drawn with replacement, and some come twice."""
    model = [f"model.path={task / 'model'}", "model.random_weights=true"]
    assert sluice("check", ROOT / "recipes/recheck.yaml", *model) == 0
    printed = capsys.readouterr().out
    assert levels(printed) == dict.fromkeys(ITEMS, "ok") | {"prompts": "warning"}
    shown = re.findall(r"^```\n(config .*?)```", (ROOT / "docs/check.md").read_text(), re.MULTILINE | re.DOTALL)
    assert without_sizes_and_times(printed) == without_sizes_and_times(shown[0])
    assert [path.name for path in Path("runs").iterdir()] == ["recheck"]


def test_the_recipe_of_its_base_model_passes(task: Path, capsys: pytest.CaptureFixture[str]):
    assert sluice("check", "--sft", ROOT / "recipes/recheck_base.yaml") == 0
    printed = capsys.readouterr().out
    assert levels(printed) == dict.fromkeys(["data", "model", "pairs", "memory", "disk", "trial"], "ok")
    assert "64 rows of runs/recheck/task/demonstrations.jsonl" in printed


def test_the_gsm8k_recipe_passes_on_the_real_questions(here: Path, capsys: pytest.CaptureFixture[str]):
    data = shared_data("gsm8k/train.jsonl")
    texts = [row["question"] for row in map(json.loads, data.read_text().splitlines()[:1000])]
    make_bpe_tokenizer("model", texts, 768, CHAT_TEMPLATE)
    config = CONFIGS["qwen3"]()
    config.update({"vocab_size": 768, "max_position_embeddings": 4096})
    config.save_pretrained("model")
    words = ["model.path=model", "model.random_weights=true", f"data.path={data}"]
    assert sluice("check", "--rows", "60", ROOT / "recipes/gsm8k.yaml", *words) == 0
    printed = capsys.readouterr().out
    assert levels(printed) == dict.fromkeys(ITEMS, "ok") | {"prompts": levels(printed)["prompts"]}
    assert "7473 rows of" in printed
    assert "math: 60 of 60 earn all; " in printed


def test_a_run_without_a_model_passes(here: Path, capsys: pytest.CaptureFixture[str]):
    """Scripted engine and dry trainer: the folder has a tokeniser only."""
    set_up(here)
    for file in ("config.json", "model.safetensors", "generation_config.json"):
        Path("model", file).unlink()
    script = "\ndef answer(prompt_ids, sampling):\n    return [70 + sampling.seed % 5, 1]\n"
    Path("users_code.py").write_text(Path("users_code.py").read_text() + script)
    write_config(engine={"name": "scripted", "script": "users_code:answer"}, trainer={"name": "dry"})
    assert sluice("check", "config.yaml") == 0
    assert levels(capsys.readouterr().out) == dict.fromkeys(ITEMS, "ok") | {"memory": "skipped"}


LOADED = """\
import sys
from sluice.cli import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(code)
"""


def test_offline_loads_no_torch_and_needs_no_weights(here: Path):
    set_up(here)
    Path("model/model.safetensors").unlink()
    command = [sys.executable, "-c", LOADED, "check", "--offline", "config.yaml", "model.random_weights=true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stderr) == (0, "")
    assert levels(done.stdout) == dict.fromkeys(ITEMS, "ok") | {"trial": "skipped"}
