"""The table of algorithms says what its papers say, and a word that could not do anything is refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest

from sluice.algorithms import ALGORITHMS, Algorithm, explain, resolve
from sluice.config import AlgorithmName, AlgorithmSection
from sluice.errors import ConfigError


def resolved(name: str, group_size: int = 8, **words: Any) -> Algorithm:
    return resolve(name, words, max_new_tokens=48, group_size=group_size)


PPO = {"clip_low": 0.2, "clip_high": 0.2}
WORDS = ("advantage", "ratio", "clip", "aggregation", "mask")
BOUNDS = ("std_eps", "clip_low", "clip_high", "ratio_min", "ratio_max", "loss_constant")
PUBLISHED: dict[str, tuple[tuple[str, ...], dict[str, float]]] = {
    "cispo": (("z_score", "token", "weight", "token_mean", "none"), {"std_eps": 1e-6, "ratio_max": 5.0}),
    "grpo": (("z_score", "token", "surrogate", "sequence_mean", "none"), {"std_eps": 1e-6, **PPO}),
    "dr_grpo": (("centred", "token", "surrogate", "constant", "none"), {**PPO, "loss_constant": 48.0}),
    "glm": (("centred", "token", "surrogate", "token_mean", "none"), PPO),
    "dapo": (
        ("z_score", "token", "surrogate", "token_mean", "none"),
        {"std_eps": 1e-6, "clip_low": 0.2, "clip_high": 0.28},
    ),
    "gspo": (
        ("z_score", "sequence", "surrogate", "sequence_mean", "none"),
        {"std_eps": 1e-6, "clip_low": 3e-4, "clip_high": 4e-4},
    ),
    "reinforce": (("raw", "none", "none", "token_mean", "none"), {}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_are_as_published(name: str):
    row, (words, bounds) = resolved(name), PUBLISHED[name]
    assert row.name == name
    assert tuple(getattr(row, word) for word in WORDS) == words
    assert {bound: getattr(row, bound) for bound in BOUNDS} == {bound: bounds.get(bound) for bound in BOUNDS}
    assert row.dynamic_sampling is (name == "dapo")


def test_config_and_table_name_the_same_things():
    """A row or a word that the config does not offer could not be asked for; one that only the config has would do nothing."""
    assert set(get_args(AlgorithmName)) == set(ALGORITHMS) == set(PUBLISHED)
    assert all(name == row.name for name, row in ALGORITHMS.items())
    words = {field.name for field in fields(Algorithm)}
    assert set(AlgorithmSection.model_fields) - {"old_logprobs"} == words
    assert set(WORDS) | set(BOUNDS) | {"name", "dynamic_sampling"} == words


def test_overrides_of_the_config_are_those_that_were_set():
    assert AlgorithmSection().overrides() == {}
    section = AlgorithmSection(name="grpo", clip_high=0.3, dynamic_sampling=False, old_logprobs="recomputed")
    assert section.overrides() == {"clip_high": 0.3, "dynamic_sampling": False}


@pytest.mark.parametrize("key", ["clip", "mask", "ratio", "advantage", "aggregation"])
def test_config_offers_every_value_of_a_word(key: str):
    of_config, _none = get_args(AlgorithmSection.model_fields[key].annotation)
    assert get_args(of_config) == get_args(get_type_hints(Algorithm)[key])


# changing a word


def test_bounds_come_and_go_with_the_words_that_use_them():
    surrogate = resolved("cispo", clip="surrogate")
    assert (surrogate.clip_low, surrogate.clip_high, surrogate.ratio_max) == (0.2, 0.2, None)
    weight = resolved("dapo", clip="weight")
    assert (weight.clip_low, weight.clip_high, weight.ratio_min, weight.ratio_max) == (None, None, None, 5.0)
    masked = resolved("cispo", mask="trust_region")
    assert (masked.clip_low, masked.clip_high, masked.ratio_max) == (0.2, 0.2, 5.0)
    assert resolved("grpo", advantage="centred").std_eps is None
    assert resolved("glm", advantage="z_score").std_eps == 1e-6
    assert resolved("grpo", aggregation="constant").loss_constant == 48.0
    assert resolved("dr_grpo", aggregation="token_mean").loss_constant is None


def test_what_the_user_sets_is_kept():
    row = resolved(
        "cispo", mask="trust_region", clip_low=0.1, clip_high=0.4, ratio_min=0.5, ratio_max=2.0, std_eps=1e-3
    )
    assert (row.clip_low, row.clip_high, row.ratio_min, row.ratio_max, row.std_eps) == (0.1, 0.4, 0.5, 2.0, 1e-3)
    assert resolved("dr_grpo", loss_constant=1024.0).loss_constant == 1024.0
    assert resolved("gspo", clip_high=1e-3).clip_low == 3e-4
    assert resolved("grpo", ratio="sequence").ratio == "sequence"


def test_resolving_leaves_the_table_alone():
    before = dict(ALGORITHMS)
    resolved("cispo", ratio_max=3.0)
    assert dict(ALGORITHMS) == before
    with pytest.raises(TypeError):
        ALGORITHMS["mine"] = ALGORITHMS["cispo"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "words", "reason"),
    [
        ("ppo", {}, "algorithm.name='ppo' is not a row; the rows are cispo, grpo, dr_grpo, glm, dapo, gspo, reinforce"),
        ("glm", {"std_eps": 1e-6}, "algorithm.std_eps=1e-06 has no effect: only advantage: z_score uses it"),
        (
            "cispo",
            {"clip_low": 0.2},
            "algorithm.clip_low=0.2 has no effect: only clip: surrogate or mask: trust_region",
        ),
        ("cispo", {"clip_high": 0.2}, "algorithm.clip_high=0.2 has no effect: only clip: surrogate or mask: trust_reg"),
        ("grpo", {"ratio_min": 0.5}, "algorithm.ratio_min=0.5 has no effect: only clip: weight uses it"),
        ("grpo", {"ratio_max": 5.0}, "algorithm.ratio_max=5.0 has no effect: only clip: weight uses it"),
        ("reinforce", {"ratio_max": 5.0}, "algorithm.ratio_max=5.0 has no effect"),
        ("cispo", {"clip": "none", "ratio_max": 3.0}, "algorithm.ratio_max=3.0 has no effect"),
        ("grpo", {"loss_constant": 10.0}, "algorithm.loss_constant=10.0 has no effect: only aggregation: constant"),
        (
            "grpo",
            {"ratio": "none"},
            "ratio none leaves clip: surrogate nothing to bound; set clip: none, or ratio: tok",
        ),
        (
            "cispo",
            {"ratio": "none"},
            "ratio none leaves clip: weight nothing to bound; set clip: none, or ratio: token",
        ),
        (
            "reinforce",
            {"mask": "trust_region"},
            "ratio none leaves mask: trust_region nothing to look at; set mask: none",
        ),
        (
            "grpo",
            {"mask": "trust_region"},
            "clip surrogate already drops the gradient of the tokens that mask: trust_reg",
        ),
        ("cispo", {"ratio_min": 5.0}, "algorithm.ratio_min=5.0 must be below algorithm.ratio_max=5.0"),
        (
            "cispo",
            {"ratio_min": 3.0, "ratio_max": 2.0},
            "algorithm.ratio_min=3.0 must be below algorithm.ratio_max=2.0",
        ),
    ],
)
def test_words_without_effect_are_refused_with_the_reason(name: str, words: dict[str, Any], reason: str):
    with pytest.raises(ConfigError) as raised:
        resolved(name, **words)
    assert reason in str(raised.value)


def test_a_refusal_says_what_the_row_is():
    with pytest.raises(
        ConfigError, match="and this is advantage z_score, ratio token, clip surrogate, mask none, aggr"
    ):
        resolved("grpo", ratio_max=5.0)


@pytest.mark.parametrize("name", ["cispo", "grpo", "dr_grpo", "glm", "gspo"])
def test_a_group_of_one_has_nothing_to_compare(name: str):
    with pytest.raises(
        ConfigError, match=r"rollout\.group_size=1 leaves nothing to compare.*raise rollout\.group_size"
    ):
        resolved(name, group_size=1)
    assert resolved(name, group_size=2)
    assert resolved(name, group_size=1, advantage="raw").advantage == "raw"


# the explanation

TOKEN = "r_t = exp(logπ_t - logπ_old_t), one per token"
OVER_TOKENS = "mean over all loss tokens of the update"
OVER_SEQUENCES = "mean over sequences of the mean over each one's loss tokens"
Z_SCORE = "A = (R - mean of the group) / (std of the group, ddof 1, + 1e-06)"


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "cispo",
            [
                OVER_TOKENS,
                Z_SCORE,
                TOKEN,
                "stop_gradient(clip(r, 0, 5))·A·logπ_t",
                "ratio in [0, 5]; a clipped token keeps",
            ],
        ),
        (
            "grpo",
            [
                OVER_SEQUENCES,
                Z_SCORE,
                TOKEN,
                "min(r·A, clip(r, 0.8, 1.2)·A)",
                "no gradient above [0.8, 1.2] when A > 0",
            ],
        ),
        (
            "dr_grpo",
            ["1 / (sequences × 48) times the sum over all loss tokens", "A = R - mean of the group", "[0.8, 1.2]"],
        ),
        ("glm", [OVER_TOKENS, "A = R - mean of the group", "[0.8, 1.2]"]),
        ("dapo", [OVER_TOKENS, Z_SCORE, "[0.8, 1.28]", "groups whose rewards are all equal are rejected and replaced"]),
        ("gspo", [OVER_SEQUENCES, Z_SCORE, "[0.9997, 1.0004]", "one per sequence, shared by its tokens"]),
        ("reinforce", [OVER_TOKENS, "A = R\n", "of A·logπ_t; the loss is -J", "on-policy", "bounds     none"]),
    ],
)
def test_explain_gives_formula_bounds_and_denominators(name: str, lines: list[str]):
    """Bounds as intervals of the ratio itself, whatever form the setting has (A2)."""
    text = explain(resolved(name), "engine")
    for line in lines:
        assert line in text
    assert ("rejected" in text) is (name == "dapo")
    assert ("π_old" in text) is (name != "reinforce")


def test_explain_follows_the_words():
    text = explain(resolved("cispo", mask="trust_region", clip_high=0.3, ratio_min=0.5), "recomputed")
    assert "stop_gradient(clip(r, 0.5, 5))·A·logπ_t·M_t" in text
    assert "ratio in [0.5, 5]" in text
    assert "M_t = 0 above [0.8, 1.3] when A > 0 and below it when A < 0, else 1" in text
    assert "the trainer's own log-probs before the step's first update" in text
    assert "the engine's log-probs" in explain(resolved("cispo"), "engine")
    assert "of stop_gradient(r)·A·logπ_t; the loss" in explain(resolved("reinforce", ratio="token"), "engine")
    assert "+ 0.01)" in explain(resolved("grpo", std_eps=0.01), "engine")


def test_the_table_needs_no_torch():
    """`sluice config` and a dry check start without it."""
    code = (
        "import sys, sluice.algorithms as a\n"
        "a.explain(a.resolve('cispo', {}, max_new_tokens=8, group_size=4), 'engine')\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "assert a.policy_loss.__module__ == 'sluice.algorithms.losses' and 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_public_names():
    import sluice.algorithms as room

    assert all(getattr(room, name) is not None for name in room.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = room.nothing


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("cispo", {"ratio_max": 0.28}, "bounds the ratio itself.* set ratio_max=1.28"),
        ("reinforce", {"dynamic_sampling": True}, "with advantage raw they are not"),
    ],
)
def test_words_that_would_clip_everything_or_reject_for_nothing(name: str, words: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(name, words, max_new_tokens=8, group_size=4)
