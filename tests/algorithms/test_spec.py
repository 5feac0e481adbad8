"""The table of algorithms says what its papers say, and a word that could not do anything is refused."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest

from sluice.algorithms import ALGORITHMS, Algorithm, explain, resolve
from sluice.algorithms.spec import SETTINGS
from sluice.configtraining import AlgorithmName, AlgorithmSection
from sluice.errors import ConfigError


def resolved(name: str, group_size: int = 8, **words: Any) -> Algorithm:
    return resolve(name, words, max_new_tokens=48, group_size=group_size)


PPO = {"clip_low": 0.2, "clip_high": 0.2}
Z_SCORE = {"std_eps": 1e-6, "std_ddof": 1}
WHITEN = {"normalise": "whiten", "std_ddof": 1}
WORDS = ("advantage", "ratio", "clip", "aggregation")
# What a row has where its paper says nothing.
PLAIN = {"mask": "none", "normalise": "none", "credit": "trajectory", "correction": "none", "rejection": "none"}
PLAIN |= {"kl_coef": 0.0, "entropy_coef": 0.0, "dynamic_sampling": False}
PUBLISHED: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "cispo": (("z_score", "token", "weight", "token_mean"), {**Z_SCORE, "ratio_max": 5.0}),
    "grpo": (("z_score", "token", "surrogate", "sequence_mean"), {**Z_SCORE, **PPO}),
    "dr_grpo": (("centred", "token", "surrogate", "constant"), {**PPO, "loss_constant": 48.0}),
    "glm": (("centred", "token", "surrogate", "token_mean"), PPO),
    "dapo": (
        ("z_score", "token", "surrogate", "token_mean"),
        {**Z_SCORE, "clip_low": 0.2, "clip_high": 0.28, "dynamic_sampling": True},
    ),
    "gspo": (
        ("z_score", "sequence", "surrogate", "sequence_mean"),
        {**Z_SCORE, "clip_low": 3e-4, "clip_high": 4e-4},
    ),
    "unified": (
        ("z_score", "token", "weight", "token_mean"),
        {**Z_SCORE, **PPO, "ratio_max": 5.0, "mask": "trust_region"},
    ),
    "sapo": (
        ("z_score", "token", "soft_gate", "sequence_mean"),
        {**Z_SCORE, "gate_positive": 1.0, "gate_negative": 1.05},
    ),
    "dppo": (
        ("centred", "token", "none", "constant"),
        {"mask": "tv", "tv_low": 0.15, "tv_high": 0.15, "loss_constant": 48.0},
    ),
    "reinforce": (("raw", "none", "none", "token_mean"), {}),
    "rloo": (("leave_one_out", "none", "none", "constant"), {"loss_constant": 1.0}),
    "reinforce_pp": (("raw", "token", "surrogate", "token_mean"), {**PPO, **WHITEN}),
    "reinforce_pp_baseline": (("centred", "token", "surrogate", "token_mean"), {**PPO, **WHITEN}),
    "ppo": (
        ("gae", "token", "surrogate", "token_mean"),
        {**PPO, **WHITEN, "dual_clip": 3.0, "gamma": 1.0, "gae_lambda": 1.0},
    ),
}
# Where the KL goes and how it is estimated, once it has a weight.
KL = {
    "rloo": ("reward", "k1"),
    "reinforce_pp": ("reward", "k1"),
    "ppo": ("reward", "k1"),
    "reinforce_pp_baseline": ("loss", "k2"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_are_as_published(name: str):
    row, (words, rest) = resolved(name), PUBLISHED[name]
    expected = dict.fromkeys(field.name for field in fields(Algorithm)) | PLAIN | dict(zip(WORDS, words)) | rest
    assert {word: getattr(row, word) for word in expected} == expected | {"name": name}


@pytest.mark.parametrize("name", PUBLISHED)
def test_kl_is_where_the_paper_has_it(name: str):
    row = resolved(name, kl_coef=0.1)
    assert (row.kl, row.kl_estimator) == KL.get(name, ("loss", "k3"))
    moved = resolved(name, kl_coef=0.1, kl="loss", kl_estimator="k3_st")
    assert (moved.kl, moved.kl_estimator) == ("loss", "k3_st")


def test_config_and_table_name_the_same_things():
    """A row or a word that the config does not offer could not be asked for; one that only the config has would do nothing."""
    assert set(get_args(AlgorithmName)) == set(ALGORITHMS) == set(PUBLISHED)
    assert all(name == row.name for name, row in ALGORITHMS.items())
    words = {field.name for field in fields(Algorithm)}
    assert set(AlgorithmSection.model_fields) - {"old_logprobs"} == words


def test_overrides_of_the_config_are_those_that_were_set():
    assert AlgorithmSection().overrides() == {}
    section = AlgorithmSection(name="grpo", clip_high=0.3, dynamic_sampling=False, old_logprobs="recomputed")
    assert section.overrides() == {"clip_high": 0.3, "dynamic_sampling": False}


CHOICES = ("advantage", "normalise", "credit", "ratio", "clip", "mask", "aggregation", "correction", "rejection")


@pytest.mark.parametrize("key", [*CHOICES, "kl", "kl_estimator", "correction_level"])
def test_config_offers_every_value_of_a_word(key: str):
    offered = values(AlgorithmSection.model_fields[key].annotation)
    assert offered == values(get_type_hints(Algorithm)[key])
    assert len(offered) > 1


def values(annotation: Any) -> list[str]:
    """Of a Literal, which may be optional."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    return [value for part in parts for value in get_args(part) or (part,)]


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
        (
            "ppo2",
            {},
            "algorithm.name='ppo2' is not a row; the rows are cispo, grpo, dr_grpo, glm, dapo, gspo, unified, sapo",
        ),
        ("glm", {"std_eps": 1e-6}, "std_eps=1e-06 has no effect: only advantage: z_score or normalise: batch_std uses"),
        ("glm", {"std_ddof": 0}, "algorithm.std_ddof=0 has no effect: only advantage: z_score or normalise uses it"),
        ("glm", {"gamma": 0.9}, "algorithm.gamma=0.9 has no effect: only advantage: gae or credit: turn uses it"),
        ("glm", {"gae_lambda": 0.9}, "algorithm.gae_lambda=0.9 has no effect: only advantage: gae uses it"),
        ("cispo", {"dual_clip": 2.0}, "algorithm.dual_clip=2.0 has no effect: only clip: surrogate uses it"),
        ("glm", {"gate_positive": 1.0}, "algorithm.gate_positive=1.0 has no effect: only clip: soft_gate uses it"),
        ("glm", {"tv_low": 0.1}, "algorithm.tv_low=0.1 has no effect: only mask: tv uses it"),
        ("glm", {"token_share": 0.5}, "algorithm.token_share=0.5 has no effect: only aggregation: blend uses it"),
        ("glm", {"kl": "loss"}, "algorithm.kl=loss has no effect: only kl_coef above 0 uses it"),
        (
            "glm",
            {"kl_estimator": "k1", "kl_coef": 0.0},
            "algorithm.kl_estimator=k1 has no effect: only kl_coef above 0",
        ),
        (
            "glm",
            {"correction_max": 2.0},
            "correction_max=2.0 has no effect: only correction: tis, mis or icepop uses it",
        ),
        (
            "glm",
            {"correction": "tis", "correction_min": 0.5},
            "correction_min=0.5 has no effect: only correction: mis or icepop uses it",
        ),
        (
            "glm",
            {"rejection_min": 0.5},
            "rejection_min=0.5 has no effect: only rejection: sequence or geometric uses it",
        ),
        ("grpo", {"dual_clip": 1.0}, "algorithm.dual_clip=1.0 bounds the ratio itself where the advantage is negative"),
        ("reinforce", {"clip": "soft_gate"}, "ratio none leaves clip: soft_gate nothing to bound; set clip: none, or"),
        ("reinforce", {"mask": "tv"}, "ratio none leaves mask: tv nothing to look at; set mask: none, or ratio: token"),
        (
            "grpo",
            {"correction": "icepop", "correction_min": 3.0},
            "algorithm.correction_min=3.0 bounds trainer / engine, which is 1 where the two agree",
        ),
        (
            "grpo",
            {"rejection": "sequence", "rejection_min": 3.0},
            "algorithm.rejection_min=3.0 bounds trainer / engine, which is 1 where the two agree",
        ),
        ("ppo", {"normalise": "batch_std"}, "batch_std divides one number per response, and advantage gae has one per"),
        (
            "ppo",
            {"credit": "turn"},
            "algorithm.credit has no effect: advantage gae gives each token the rewards",
        ),
        (
            "ppo",
            {"kl_coef": 0.1, "kl_estimator": "k1_st"},
            "kl_estimator k1_st differs from k1 by its gradient only, and kl: reward takes none",
        ),
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


@pytest.mark.parametrize("name", [name for name, (words, _) in PUBLISHED.items() if words[0] not in ("raw", "gae")])
def test_a_group_of_one_has_nothing_to_compare(name: str):
    with pytest.raises(
        ConfigError, match=r"rollout\.group_size=1 leaves nothing to compare.*raise rollout\.group_size"
    ):
        resolved(name, group_size=1)
    assert resolved(name, group_size=2)
    assert resolved(name, group_size=1, advantage="raw", dynamic_sampling=False).advantage == "raw"


# the explanation

Z_SCORE_LINE = "A = (R - mean of the group) / (std of the group, ddof 1, + 1e-06)"
TOKEN = "r_t = exp(logπ_t - logπ_old_t), one per token"
WHITENED = "(A - μ) / sqrt(σ² + 1e-8), over all loss tokens of the batch, ddof 1"
OVER_TOKENS = "mean over all loss tokens of the update"
OVER_SEQUENCES = "mean over sequences of the mean over each one's loss tokens"


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "cispo",
            [
                OVER_TOKENS,
                Z_SCORE_LINE,
                TOKEN,
                "stop_gradient(clip(r, 0, 5))·A·logπ_t",
                "ratio in [0, 5]; a clipped token keeps",
            ],
        ),
        (
            "grpo",
            [
                OVER_SEQUENCES,
                Z_SCORE_LINE,
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
        (
            "dapo",
            [OVER_TOKENS, Z_SCORE_LINE, "[0.8, 1.28]", "groups whose rewards are all equal are rejected and replaced"],
        ),
        ("gspo", [OVER_SEQUENCES, Z_SCORE_LINE, "[0.9997, 1.0004]", "one per sequence, shared by its tokens"]),
        ("reinforce", [OVER_TOKENS, "A = R\n", "of A·logπ_t; the loss is -J", "on-policy", "bounds     none"]),
        ("rloo", ["1 / (sequences × 1) times the sum", "A = R - mean of the others of the group", "on-policy"]),
        ("reinforce_pp", [OVER_TOKENS, "A = R\n", WHITENED, "[0.8, 1.2]"]),
        ("reinforce_pp_baseline", [OVER_TOKENS, "A = R - mean of the group\n", WHITENED, "[0.8, 1.2]"]),
        ("ppo", [OVER_TOKENS, "Σ_k (γλ)^k·(r_t+k + γ·V_t+k+1 - V_t+k), γ = 1, λ = 1", WHITENED, "max(that, 3·A)"]),
        ("unified", [OVER_TOKENS, Z_SCORE_LINE, "ratio in [0, 5]", "M_t = 0 above [0.8, 1.2] when A > 0"]),
        ("sapo", [OVER_SEQUENCES, Z_SCORE_LINE, "4/τ·σ(τ·(r - 1))·A", "τ = 1 when A > 0, else 1.05"]),
        ("dppo", ["A = R - mean of the group", "M_t = 0 when A > 0 and π_t - π_old_t > 0.15"]),
    ],
)
def test_explain_gives_formula_bounds_and_denominators(name: str, lines: list[str]):
    """Bounds as intervals of the ratio itself, whatever form the setting has (A2)."""
    text = unwrapped(explain(resolved(name), "engine"))
    for line in lines:
        assert line in text
    assert ("rejected" in text) is (name == "dapo")
    assert ("π_old" in text) is (name not in ("reinforce", "rloo"))


def unwrapped(text: str) -> str:
    return text.replace("\n" + 13 * " ", " ")


def test_explain_follows_the_words():
    text = unwrapped(explain(resolved("cispo", mask="trust_region", clip_high=0.3, ratio_min=0.5), "recomputed"))
    assert "stop_gradient(clip(r, 0.5, 5))·A·logπ_t·M_t" in text
    assert "ratio in [0.5, 5]" in text
    assert "M_t = 0 above [0.8, 1.3] when A > 0 and below it when A < 0, else 1" in text
    assert "the trainer's own log-probs before the step's first update" in text
    assert "the engine's log-probs" in explain(resolved("cispo"), "engine")
    assert "of stop_gradient(r)·A·logπ_t; the loss" in explain(resolved("reinforce", ratio="token"), "engine")
    assert "+ 0.01)" in explain(resolved("grpo", std_eps=0.01), "engine")


def test_explain_gives_the_parts_beside_the_policys_own_term():
    words = {"correction": "icepop", "rejection": "geometric", "kl_coef": 0.1, "entropy_coef": 0.01}
    words |= {"aggregation": "blend", "credit": "turn", "gamma": 0.9, "normalise": "batch_std"}
    text = unwrapped(explain(resolved("cispo", **words), "recomputed"))
    for line in (
        "J = 0.5 × the mean over all loss tokens of the update + 0.5 × the mean over sequences",
        "[w_t·stop_gradient(clip(r, 0, 5))·A·logπ_t - 0.1·KL_t + 0.01·entropy_t]; the loss is -J",
        "R_k = Σ_j≥k γ^(j-k)·(reward of turn j), γ = 0.9",
        "then divided by the std of all A of the batch (ddof 1, + 1e-06)",
        "0 outside of [0.5, 5] (icepop); 0 for a response whose geometric mean of ρ lies outside of [0.99, 1.01]",
        "k3: exp(-d) - 1 + d, d = logπ_t - logπ_ref_t",
    ):
        assert line in text
    for name, more, cost in (
        ("ppo", {}, "r_t loses KL_t, times 0.1 and undiscounted"),
        ("reinforce_pp", {}, "A_t loses the sum of KL_t from the token on, times 0.1"),
        ("rloo", {}, "R loses the sum of KL_t from the response's start on, before it is compared, times 0.1"),
        ("rloo", {"credit": "turn"}, "R loses the sum of KL_t from its own start on, before it is compared"),
    ):
        assert cost in unwrapped(explain(resolved(name, kl_coef=0.1, **more), "engine"))


@pytest.mark.parametrize(
    "words",
    [
        {"correction": "tis", "correction_max": 0.28},
        {"correction": "mis", "correction_min": 1.5},
        {"rejection": "sequence", "rejection_min": 1.5},
        {"rejection": "geometric", "rejection_max": 0.9},
    ],
)
def test_bounds_that_would_act_where_engine_and_trainer_agree(words: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"which is 1 where the two agree.*keep 1 within the bounds"):
        resolved("cispo", **words)


def test_a_dual_clip_of_0_is_none():
    """The row ppo has one, and null would mean the row's."""
    assert resolved("ppo", dual_clip=0.0).dual_clip is None
    assert resolved("ppo").dual_clip == 3.0


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
        ("ppo", {"dynamic_sampling": True}, "with advantage gae they are not"),
    ],
)
def test_words_that_would_clip_everything_or_reject_for_nothing(name: str, words: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(name, words, max_new_tokens=8, group_size=4)


# what scripts use


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_row_of_the_table_is_whole_as_it_stands(name: str):
    """Scripts take it from there; only Dr. GRPO's and DPPO's constant, the longest response, is for whoever knows it."""
    row, resolved_row = ALGORITHMS[name], resolved(name)
    for setting in SETTINGS.keys() - {"loss_constant", "kl", "kl_estimator"}:
        assert getattr(row, setting) == getattr(resolved_row, setting), setting
    assert (row.kl_in_loss, row.kl_in_reward) == (False, False)


def test_resolve_needs_no_more_than_a_row():
    assert resolve("grpo") == resolved("grpo")
    assert resolve("dapo", {"clip_high": 0.3}).clip_high == 0.3
    with pytest.raises(ConfigError, match=r"needs algorithm\.loss_constant: the longest response"):
        resolve("dr_grpo")
    with pytest.raises(ConfigError, match=r"algorithm\.clip_hihg is not a word; the words are advantage, aggregation"):
        resolve("dapo", {"clip_hihg": 0.3})


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("grpo", {}, ("loss", "k3")),
        ("grpo", {"kl": "reward"}, ("reward", "k1")),
        ("grpo", {"kl": "reward", "kl_estimator": "k3"}, ("reward", "k3")),
        ("reinforce_pp_baseline", {}, ("loss", "k2")),
        ("reinforce_pp_baseline", {"kl": "reward"}, ("reward", "k1")),
        ("ppo", {}, ("reward", "k1")),
    ],
)
def test_where_kl_goes_decides_how_it_is_estimated(name: str, words: dict[str, Any], expected: tuple[str, str]):
    """k1 in the loss has no gradient on average, and in the reward it is the one without bias."""
    row = resolved(name, kl_coef=0.1, **words)
    assert (row.kl, row.kl_estimator) == expected


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"ratio": "seq"}, "should be token or sequence or none"),
        ({"correction": "TIS"}, "should be none or tis or mis or icepop"),
        ({"kl_coef": 0.1, "kl": "rewards"}, "should be loss or reward"),
        ({"kl_estimator": "k4", "kl_coef": 0.1}, "should be k1 or k2 or k3 or k1_st or k3_st"),
        ({"kl_coef": math.nan}, "should be a finite number of at least 0"),
        ({"kl_coef": -1.0}, "should be a finite number of at least 0"),
        ({"clip_high": math.inf}, "should be a finite number of at least 0"),
        ({"clip_low": -0.5}, "should be a finite number of at least 0"),
        ({"clip_low": True}, "should be a finite number of at least 0"),
        ({"std_ddof": 7}, "should be at most 1"),
        ({"dynamic_sampling": "no"}, "should be True or False"),
    ],
)
def test_scripts_are_told_of_a_value_that_a_word_cannot_have(words: dict[str, Any], reason: str):
    with pytest.raises(ConfigError, match=reason):
        resolve("grpo", words)


@pytest.mark.parametrize("words", [{"kl_coef": 0.1, "kl": "reward"}, {"normalise": "whiten"}])
def test_dynamic_sampling_does_not_reject_what_carries_a_gradient(words: dict[str, Any]):
    with pytest.raises(ConfigError, match="they are not; set dynamic_sampling=false"):
        resolved("dapo", **words)
    assert resolved("dapo", dynamic_sampling=False, **words)
