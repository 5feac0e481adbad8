"""Config files: what is read from where, and that every mistake is answered with place, key, value and remedy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import ROOT
from sluice.config import DryTrainer, LocalTrainer, ScriptedEngine, SftConfig, TrainConfig
from sluice.configfile import Resolved, dump, load, reference
from sluice.configrewards import CustomReward
from sluice.errors import ConfigError

BASE = """\
model:
  path: tiny
data:
  path: prompts.jsonl
  reference: answer
rewards:
  - name: math
  - name: format
    pattern: '<think>.*'
    weight: 0.25
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test stands in a folder of its own, so that files have short names."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)


def train(extra: str = "", *overrides: str) -> Resolved[TrainConfig]:
    """The base file, then the YAML text `extra` as a second file, then overrides."""
    Path("extra.yaml").write_text(extra)
    return load(TrainConfig, ["base.yaml", "extra.yaml"], overrides)


def refusal(extra: str = "", *overrides: str) -> str:
    """What `train` says when it refuses."""
    with pytest.raises(ConfigError) as caught:
        train(extra, *overrides)
    return str(caught.value)


# Reading


def test_later_files_override_earlier_ones_and_settings_override_files() -> None:
    """Mappings merge deeply, lists are replaced, and every leaf knows its line."""
    resolved = train(
        "data:\n  shuffle: false\nrewards:\n  - {name: match}\ntrainer:\n  learning_rate: 2e-5\n  eps: 1e-8\n",
        "trainer.learning_rate=5e-5",
        "rollout.stop=[a, b]",
    )
    config, origins = resolved.config, resolved.origins
    assert (config.data.path, config.data.shuffle) == ("prompts.jsonl", False)
    assert [reward.name for reward in config.rewards] == ["match"]
    assert isinstance(config.trainer, LocalTrainer)
    assert (config.trainer.learning_rate, config.trainer.eps) == (5e-5, 1e-8)
    assert origins["data.path"] == "base.yaml:4"
    assert origins["data.shuffle"] == "extra.yaml:2"
    assert origins["rewards.0.name"] == "extra.yaml:4"
    assert origins["rewards.0.weight"] == "default"
    assert origins["trainer.learning_rate"] == "command line"
    assert origins["trainer.eps"] == "extra.yaml:7"
    assert origins["trainer.name"] == "default"
    assert origins["rollout.stop.1"] == "command line"
    assert origins["rollout.stop_token_ids"] == "default"


def test_origins_name_exactly_the_leaves_of_the_config() -> None:
    def leaves(value: Any, path: str) -> list[str]:
        below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else ()
        found = [leaf for key, child in below for leaf in leaves(child, f"{path}.{key}")]
        return found or [path[1:]]

    resolved = train()
    assert list(resolved.origins) == leaves(resolved.config.model_dump(), "")


def test_settings_reach_into_lists_and_later_ones_win() -> None:
    config = train("", "rewards.1.weight=0.5", "rewards.1.weight=0.75", "rewards.0={weight: 2}").config
    assert [(reward.name, reward.weight) for reward in config.rewards] == [("math", 2.0), ("format", 0.75)]


def test_a_setting_makes_the_sections_above_it() -> None:
    """Also below a section that the file names without giving it keys."""
    assert train("checkpoint:\n", "checkpoint.every_steps=5", "run.seed=3").config.checkpoint.every_steps == 5


def test_a_choice_that_is_not_said_is_the_default_one() -> None:
    assert isinstance(train("", "trainer.updates_per_batch=2").config.trainer, LocalTrainer)


def test_a_choice_can_be_changed_by_a_later_source() -> None:
    config = train("engine:\n  name: scripted\n  script: my:script\n", "trainer.name=dry").config
    assert isinstance(config.engine, ScriptedEngine)
    assert isinstance(config.trainer, DryTrainer)


def test_a_reward_of_ones_own() -> None:
    (reward,) = train("rewards:\n  - name: my.rewards:score\n    label: mine\n").config.rewards
    assert reward == CustomReward(name="my.rewards:score", label="mine")


def test_files_may_be_empty_or_hold_only_comments() -> None:
    assert train("").config == train("# nothing\n").config


def test_an_anchor_is_read_where_it_is_used() -> None:
    resolved = train("model:\n  path: &name gpt\nrun:\n  folder: *name\n")
    assert resolved.config.run.folder == "gpt"
    assert resolved.origins["run.folder"] == "extra.yaml:4"


def test_sft_configs_are_read_by_the_same_rules() -> None:
    Path("sft.yaml").write_text("model: {path: tiny}\ndata: {path: d.jsonl}\ntrainer: {learning_rate: 1e-4}\n")
    resolved = load(SftConfig, ["sft.yaml"], ["data.response=answer"])
    assert resolved.config.trainer.learning_rate == 1e-4
    assert resolved.origins["data.response"] == "command line"


# Mistakes


def test_unknown_key_near_one_of_its_section() -> None:
    assert refusal("trainer:\n  eps: 1e-8\n  lerning_rate: 1e-5\n") == (
        "extra.yaml:3: unknown key 'trainer.lerning_rate'; did you mean 'trainer.learning_rate'?"
    )
    assert refusal("", "modle.path=x") == "command line: unknown key 'modle'; did you mean 'model'?"
    assert "did you mean 'rewards.1.pattern'?" in refusal("", "rewards.1.patern=x")


def test_unknown_key_that_belongs_to_another_choice() -> None:
    assert refusal("engine:\n  script: my:script\n") == (
        "extra.yaml:2: unknown key 'engine.script': 'script' belongs to engine.name=scripted, "
        "but engine.name=embedded (default)"
    )
    assert refusal("rewards:\n  - name: math\n    pattern: x\n") == (
        "extra.yaml:3: unknown key 'rewards.0.pattern': 'pattern' belongs to rewards.0.name=match or format, "
        "but rewards.0.name=math (extra.yaml:2)"
    )


def test_keys_of_a_former_choice_are_refused_where_they_were_set() -> None:
    message = refusal("engine:\n  num_slots: 8\n", "engine.name=scripted", "engine.script=my:script")
    assert message == (
        "extra.yaml:2: unknown key 'engine.num_slots': 'num_slots' belongs to engine.name=embedded or vllm or sglang, "
        "but engine.name=scripted (command line)"
    )


def test_unknown_key_near_one_of_another_choice() -> None:
    assert refusal("engine:\n  scripts: my:script\n") == (
        "extra.yaml:2: unknown key 'engine.scripts'; did you mean 'engine.script'? It belongs to engine.name=scripted."
    )


def test_unknown_key_that_another_section_has() -> None:
    assert refusal("learning_rate: 1e-5\n") == (
        "extra.yaml:1: unknown key 'learning_rate': 'learning_rate' is set under critic and trainer: critic.learning_rate, trainer.learning_rate"
    )
    assert refusal("", "path=x") == (
        "command line: unknown key 'path': 'path' is set under model and data and reference and critic: "
        "model.path, data.path, reference.path, critic.path"
    )
    assert "'against' is set under rewards.0: rewards.0.against" in refusal("run:\n  against: nothing\n")
    assert "'num_steps' is set under run: run.num_steps" in refusal("checkpoint:\n  num_step: 1\n")


def test_unknown_key_near_nothing() -> None:
    assert refusal("model:\n  colour: red\n") == (
        "extra.yaml:2: unknown key 'model.colour'; the keys of model are path, random_weights, dtype, device"
    )


def test_dotted_key_in_a_file() -> None:
    assert refusal("trainer.learning_rate: 1e-5\n") == (
        "extra.yaml:1: unknown key 'trainer.learning_rate': dots are for the command line; in a file, write the keys "
        "below one another"
    )


def test_missing_keys_are_said_one_by_one_with_their_meaning() -> None:
    Path("only.yaml").write_text("data:\n  shuffle: true\n")
    with pytest.raises(ConfigError) as caught:
        load(TrainConfig, ["only.yaml"])
    assert str(caught.value).splitlines() == [
        "only.yaml: missing key 'model.path' (Hugging Face model folder with a tokeniser.): "
        "set it in the file or as model.path=… on the command line",
        "only.yaml:1: missing key 'data.path' "
        "(JSONL file, Parquet file, or folder written by `datasets.save_to_disk`.): "
        "set it in the file or as data.path=… on the command line",
        "only.yaml: missing key 'rewards' (What a response is worth: the weighted sum of these.): "
        "set it in the file or as rewards=… on the command line",
    ]


def test_missing_name_of_a_reward_lists_the_choices() -> None:
    assert refusal("rewards:\n  - weight: 2\n") == (
        "extra.yaml:2: missing key 'rewards.0.name' (math, match, format or text that looks like module:function): "
        "set it in the file or as rewards.0.name=… on the command line"
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("trainer.learning_rate=fast", "should be a number above 0, not 'fast'"),
        ("trainer.learning_rate=-1", "should be a number above 0, not -1"),
        ("rollout.top_p=1.5", "should be a number above 0 and at most 1, not 1.5"),
        ("run.num_steps=2.5", "should be a whole number above 0, not 2.5"),
        ("run.seed=true", "should be a whole number of at least 0 and below 9.22337e+18, not true"),
        ("run.num_threads=many", "should be a whole number of at least 1 and at most 1024 or null, not 'many'"),
        ("data.shuffle=no", "should be true or false, not 'no'"),
        ("model.path=7", "should be text, not 7; put it in quotes"),
        ("model.path=", "should be text, not null"),
        ("model.dtype=float16", "should be float32 or bfloat16, not 'float16'; did you mean 'bfloat16'?"),
        ("model.device=CUDA", "should be auto, cpu or cuda, not 'CUDA'; did you mean 'cuda'?"),
        ("trainer.name=locl", "should be local, fsdp or dry, not 'locl'; did you mean 'local'?"),
        ("trainer.name=[local]", "should be local, fsdp or dry, not [local]"),
        ("rollout.filter=my_filter", "should be text that looks like module:function or null, not 'my_filter'"),
        (
            "rollout.environment=single",
            "should be single_turn or text that looks like module:function, not 'single'; did you mean 'single_turn'?",
        ),
        (
            "rewards.1.name=maths",
            "should be math, match, format or text that looks like module:function, not 'maths'; did you mean 'math'?",
        ),
        ("run.name=../x", "should be text of letters, digits and _ . - (neither . nor - first) or null, not '../x'"),
        ("run.name=..", "should be text of letters, digits and _ . - (neither . nor - first) or null, not '..'"),
        ("rewards.0.weight=.nan", "should be a number, not .nan"),
        ("trainer.betas=[0.9]", "should be a list of 2, each a number of at least 0 and below 1, not [0.9]"),
        ("trainer.betas=[0, 0, 0]", "should be a list of 2, each a number of at least 0 and below 1, not [0, 0, 0]"),
        ("rewards=[]", "should be a list of at least 1, each a section with keys, not []"),
        ("rewards={name: math}", "should be a list of at least 1, each a section with keys, not {name: math}"),
        ("trainer=local", "should be a section with keys, not 'local'"),
        ("model=", "should be a section with keys, not null"),
    ],
)  # fmt: skip
def test_wrong_values_say_what_was_wanted(setting: str, message: str) -> None:
    key = setting.partition("=")[0]
    assert f"command line: {key}: {message}" in refusal("", setting).splitlines()


def test_wrong_items_of_lists_are_the_only_fault_of_their_list() -> None:
    """pydantic also calls a list of wrong items too short."""
    assert refusal("rewards:\n  - math\n") == "extra.yaml:2: rewards.0: should be a section with keys, not 'math'"
    assert refusal("rollout:\n  stop:\n    - ok\n    - 5\n") == (
        "extra.yaml:4: rollout.stop.1: should be non-empty text, not 5; put it in quotes"
    )
    assert refusal("trainer:\n  betas: [0.9, 1.0]\n") == (
        "extra.yaml:2: trainer.betas.1: should be a number of at least 0 and below 1, not 1.0"
    )


def test_names_of_choices_inside_the_data_do_not_confuse_the_path() -> None:
    """pydantic puts the choice's name into its locations, where a key may have the same one."""
    assert "unknown key 'trainer.local'" in refusal("trainer:\n  name: local\n  local: {local: 1}\n")


def test_all_faults_are_told_at_once() -> None:
    assert len(refusal("run:\n  sed: 1\n", "model.dtype=fp32", "rollout.top_k=-1").splitlines()) == 3


def test_faults_across_fields_are_passed_as_they_are() -> None:
    assert refusal("", "rollout.max_staleness=2").startswith(
        "rollout.max_staleness=2 cannot work with engine.process=trainer"
    )
    assert refusal("data:\n  reference: null\n").startswith("rewards.0 (math) compares with the reference")


# Writing


def test_dump_writes_every_leaf_with_its_origin() -> None:
    lines = dump(train("run:\n  seed: 3\n", 'rollout.stop=["\\n", done]', "run.name='007'")).splitlines()
    assert lines[:3] == ["run:", "  name: '007'  # command line", "  folder: runs  # default"]
    assert "  seed: 3  # extra.yaml:2" in lines
    at = lines.index("  stop:")
    assert lines[at + 1 : at + 3] == ['    - "\\n"  # command line', "    - done  # command line"]
    assert "  stop_token_ids: []  # default" in lines
    assert "  - weight: 0.25  # base.yaml:10" in lines
    assert "    pattern: <think>.*  # base.yaml:9" in lines


def test_other_readers_of_yaml_read_the_same_from_a_dump() -> None:
    """PyYAML's own rules are those of version 1.1; scripts of users will read config.yaml with them."""
    resolved = train("", "trainer.learning_rate=5e-5", "run.name=no", "data.prompt='5e-5'", "data.id='010'")
    assert yaml.safe_load(dump(resolved)) == resolved.config.model_dump(mode="json")


# The reference, and the price of the import


def test_the_reference_in_docs_is_up_to_date() -> None:
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == reference(), (
        "docs/config.md is not what the classes say; regenerate it: python -m sluice.configfile > docs/config.md"
    )


def test_the_reference_explains_every_key() -> None:
    """A field without a docstring would have an empty cell."""
    rows = [line.split(" | ") for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert all(len(row) == 4 and all(cell.strip("| ") for cell in row) for row in rows)


def test_the_module_prints_the_reference_and_imports_nothing_heavy() -> None:
    """Help and config errors must come at once: torch alone takes seconds to import."""
    printed = subprocess.run([sys.executable, "-m", "sluice.configfile"], capture_output=True, check=True, text=True)
    assert printed.stdout == reference()
    heavy = "import sys, sluice.configfile; print({'torch', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, check=True, text=True).stdout == "set()\n"
