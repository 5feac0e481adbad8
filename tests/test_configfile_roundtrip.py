"""What is set is read, and what is dumped reads back, for any values of any keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from sluice.config import (
    AlgorithmSection,
    CheckpointSection,
    LocalTrainer,
    ModelSection,
    PromptData,
    RolloutSection,
    ScriptedEngine,
    SftConfig,
    SftData,
    SftRun,
    SftTrainer,
    TrainConfig,
    TrainRun,
)
from sluice.configfile import dump, load
from sluice.configrewards import FormatReward
from sluice.errors import ConfigError

ASCII = st.characters(max_codepoint=127)
SPECIAL_TEXTS = ["", "no", "5e-5", "~", "1_0", "010", "1:30", " x ", "a #b", "a: b", "[", "'", '"', "é\n\x7f\u2028😀"]


def values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Everything that a leaf with this JSON schema may hold."""
    match schema:
        case {"anyOf": members}:
            return st.one_of([values(member) for member in members])
        case {"enum": choices}:
            return st.sampled_from(choices)
        case {"const": choice}:
            return st.just(choice)
        case {"type": "array", "prefixItems": items}:
            return st.tuples(*map(values, items)).map(list)
        case {"type": "array", "items": item}:
            return st.lists(values(item), max_size=3)
        case {"type": "integer"}:
            return st.integers(1, schema.get("maximum", 10**9))
        case {"type": "number"}:
            low, high = schema.get("minimum", 0), schema.get("maximum", schema.get("exclusiveMaximum"))
            ends = {"exclude_min": "minimum" not in schema, "exclude_max": high is not None}
            return st.floats(low, high, allow_infinity=False, **ends)
        case {"type": "string", "pattern": pattern}:
            return st.from_regex("[a-z]+:[a-z]+" if ":" in pattern else r"\w[\w.-]*", fullmatch=True, alphabet=ASCII)
        case {"type": "string"}:
            texts = st.text() | st.sampled_from(SPECIAL_TEXTS)
            return texts.filter(lambda text: len(text) >= schema.get("minLength", 0))
        case {"type": kind}:
            return {"null": st.none(), "boolean": st.booleans()}[kind]
    raise AssertionError(schema)


def random_settings(sections: dict[str, type[BaseModel]]) -> st.SearchStrategy[dict[str, Any]]:
    """Random values for some of the keys of these sections."""
    strategies = {
        f"{section}.{key}": values(schema)
        for section, model in sections.items()
        for key, schema in model.model_json_schema()["properties"].items()
    }
    keys = st.lists(st.sampled_from(sorted(strategies)), unique=True, max_size=8)
    return keys.flatmap(lambda keys: st.fixed_dictionaries({key: strategies[key] for key in keys}))


TRAIN_SECTIONS: dict[str, type[BaseModel]] = {
    "run": TrainRun,
    "model": ModelSection,
    "data": PromptData,
    "rollout": RolloutSection,
    "engine": ScriptedEngine,
    "algorithm": AlgorithmSection,
    "rewards.0": FormatReward,
    "trainer": LocalTrainer,
    "checkpoint": CheckpointSection,
}
SFT_SECTIONS: dict[str, type[BaseModel]] = {
    "run": SftRun,
    "model": ModelSection,
    "data": SftData,
    "trainer": SftTrainer,
}
TRAIN_BASE = {
    "model": {"path": "m"},
    "data": {"path": "d", "reference": "answer"},
    "engine": {"name": "scripted", "script": "a:b"},
    "rewards": [{"name": "format", "pattern": "x"}, {"name": "my:score"}],
}
SFT_BASE = {"model": {"path": "m"}, "data": {"path": "d"}}


@given(
    st.tuples(st.just(TrainConfig), st.just(TRAIN_BASE), random_settings(TRAIN_SECTIONS))
    | st.tuples(st.just(SftConfig), st.just(SFT_BASE), random_settings(SFT_SECTIONS))
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_set_is_read_and_a_dump_reads_back_as_the_same_config(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[type[TrainConfig | SftConfig], dict[str, Any], dict[str, Any]],
) -> None:
    monkeypatch.chdir(tmp_path)
    root, base, chosen = case
    Path("base.yaml").write_text(yaml.safe_dump(base))
    try:
        resolved = load(root, ["base.yaml"], [f"{key}={json_like(value)}" for key, value in chosen.items()])
    except ConfigError as error:
        assume(str(error).startswith("command line"))  # settings that cannot work together are another matter
        raise
    found = resolved.config.model_dump(mode="json")
    for key, value in chosen.items():
        section, _, leaf = key.rpartition(".")
        here = found["rewards"][0] if section == "rewards.0" else found[section]
        assert here[leaf] == value
        assert {origin for path, origin in resolved.origins.items() if f"{path}.".startswith(f"{key}.")} == {
            "command line"
        }

    Path("dump.yaml").write_text(dump(resolved), encoding="utf-8")
    again = load(root, ["dump.yaml"])
    assert again.config == resolved.config
    assert again.origins.keys() == resolved.origins.keys()
    assert len(set(again.origins.values())) == len(again.origins), "every leaf has a line of its own"


def json_like(value: Any) -> str:
    """YAML that means the same in every version, made without the code under test."""
    texts = any(isinstance(part, str) for part in (value if isinstance(value, list) else [value]))
    style = '"' if texts else None
    return yaml.safe_dump(value, default_style=style, default_flow_style=True, width=10**9).removesuffix("...\n")
