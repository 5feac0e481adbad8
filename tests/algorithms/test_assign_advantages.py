"""From samples to the advantage of each token: KL in the reward, rewards of turns, the critic's values, whitening."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import oracle_advantages as adv
import pytest
from batches import modest, row
from hypothesis import given
from hypothesis import strategies as st

from sluice.algorithms import Algorithm, assign_advantages
from sluice.types import Sample


@dataclass
class Answer:
    """What the policy wrote in one trajectory, token by token, for the oracle."""

    group: int
    old: list[float]
    ref: list[float]
    values: list[float]
    turns: list[int]
    turn_rewards: list[float]
    advantages: list[float] = field(default_factory=list[float])

    @property
    def reward(self) -> float:
        return math.fsum(self.turn_rewards)

    @property
    def k1(self) -> list[float]:
        return [o - r for o, r in zip(self.old, self.ref)]

    def sample(self, index: int) -> Sample:
        """With a token of the prompt in front and one of the environment before each further turn: junk, and masked."""
        columns: list[tuple[Any, ...]] = [(0.0, math.nan, math.nan, math.inf, -1)]
        for t in range(len(self.old)):
            if t and self.turns[t] != self.turns[t - 1]:
                columns.append((0.0, math.nan, math.nan, math.inf, -1))
            columns.append((1.0, self.old[t], self.ref[t], self.values[t], self.turns[t]))
        weights, old, ref, values, turns = map(list, zip(*columns))
        n = len(weights)
        return Sample(
            list(range(n)),
            weights,
            old,
            [0] * n,
            1.0,
            self.group,
            index,
            self.reward,
            turn_ids=turns,
            turn_rewards=list(self.turn_rewards),
            old_logprobs=old,
            ref_logprobs=ref,
            values=values,
        )


small = st.floats(-3, 3, width=32)


@st.composite
def batches_of_answers(draw: Any, turns: int = 3) -> list[Answer]:
    """Of 1 to 4 groups; each answer with 1 to `turns` turns of 1 to 3 tokens."""
    answers = []
    for _ in range(draw(st.integers(1, 7))):
        lengths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=turns))
        ids = [k for k, length in enumerate(lengths) for _ in range(length)]
        old, ref, values = (draw(st.lists(small, min_size=len(ids), max_size=len(ids))) for _ in range(3))
        rewards = [draw(st.sampled_from([0.0, 1.0, 0.5, -0.25])) for _ in lengths]
        answers.append(Answer(draw(st.integers(0, 2)), old, ref, values, ids, rewards))
    return answers


def assigned(spec: Algorithm, answers: list[Answer]) -> tuple[list[list[float]], list[Sample]]:
    """Advantages of the policy's tokens, answer by answer; everywhere else they must be 0."""
    samples = [answer.sample(i) for i, answer in enumerate(answers)]
    rewards = [s.reward for s in samples]
    assign_advantages(spec, samples)
    assert [s.reward for s in samples] == rewards, "a reward is never overwritten by an advantage"
    for s in samples:
        assert not any(a for a, w in zip(s.advantages, s.loss_weights, strict=True) if w == 0)
    return [[a for a, w in zip(s.advantages, s.loss_weights) if w] for s in samples], samples


def flat(rows: list[list[float]]) -> list[float]:
    return [x for row in rows for x in row]


def agree(found: list[list[float]], expected: list[list[float]]) -> None:
    assert [len(f) for f in found] == [len(e) for e in expected]
    assert flat(found) == pytest.approx(flat(expected), rel=1e-9, abs=1e-9)


def whitened(rows: list[list[float]]) -> list[list[float]]:
    tokens = flat(rows)
    values = iter([0.0] * len(tokens) if adv.nothing_to_compare(tokens) else adv.whiten(tokens, [1] * len(tokens)))
    return [[next(values) for _ in row] for row in rows]


def spread(values: list[float], answers: list[Answer]) -> list[list[float]]:
    return [[v] * len(answer.old) for v, answer in zip(values, answers)]


BASELINES = {"grpo": adv.z_scores, "dr_grpo": adv.centre, "rloo": adv.leave_one_out}


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("coef", [0.0, 0.125])
@modest
@given(answers=batches_of_answers())
def test_kl_is_taken_from_a_reward_before_it_is_compared(name: str, coef: float, answers: list[Answer]):
    spec = row(name, kl="reward", kl_estimator="k1", kl_coef=coef) if coef else row(name)
    rewards = [adv.with_kl_of_the_answer(a.reward, a.k1, coef) for a in answers]
    agree(
        assigned(spec, answers)[0],
        spread(adv.by_group(BASELINES[name], rewards, [a.group for a in answers]), answers),
    )


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("coef", [0.0, 0.125])
@modest
@given(answers=batches_of_answers())
def test_without_a_baseline_a_token_pays_for_the_kl_to_come(whiten: bool, coef: float, answers: list[Answer]):
    name = "reinforce_pp" if whiten else "reinforce"
    spec = row(name, kl="reward", kl_estimator="k1", kl_coef=coef) if coef else row(name)
    expected = [adv.with_kl_to_come(a.reward, a.k1, coef) for a in answers]
    agree(assigned(spec, answers)[0], whitened(expected) if whiten else expected)


@modest
@given(answers=batches_of_answers())
def test_a_baseline_and_whitening_over_tokens(answers: list[Answer]):
    centred = adv.by_group(adv.centre, [a.reward for a in answers], [a.group for a in answers])
    agree(assigned(row("reinforce_pp_baseline"), answers)[0], whitened(spread(centred, answers)))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_reward_takes_each_estimator(estimator: str):
    """Of old - ref = 0.5 and -1."""
    answer = Answer(0, [-1.0, -3.0], [-1.5, -2.0], [0.0, 0.0], [0, 0], [2.0])
    kl = {"k1": [0.5, -1.0], "k2": [0.125, 0.5], "k3": [math.exp(-0.5) - 1 + 0.5, math.exp(1) - 1 - 1]}[estimator]
    spec = row("reinforce", kl="reward", kl_estimator=estimator, kl_coef=0.1)
    agree(assigned(spec, [answer])[0], [adv.with_kl_to_come(2.0, kl, 0.1)])


@pytest.mark.parametrize("coef", [0.0, 0.125])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.5), (1.0, 0.0)])
@modest
@given(answers=batches_of_answers(turns=1))
def test_gae_with_kl_in_each_tokens_reward(gamma: float, lam: float, coef: float, answers: list[Answer]):
    words = {"gamma": gamma, "gae_lambda": lam} | ({"kl_coef": coef} if coef else {})
    expected = [adv.gae(adv.with_kl_per_token(a.reward, a.k1, coef), a.values, gamma, lam) for a in answers]
    found, samples = assigned(row("ppo", **words), answers)
    agree(found, whitened(expected))
    agree(assigned(row("ppo", normalise="none", **words), answers)[0], expected)
    # what the critic learns knows nothing of whitening
    returns = [[r for r, w in zip(s.returns, s.loss_weights, strict=True) if w] for s in samples]
    agree(returns, [[x + v for x, v in zip(e, a.values)] for e, a in zip(expected, answers)])


@modest
@given(answers=batches_of_answers())
def test_gae_over_turns_gives_each_turns_reward_at_its_end(answers: list[Answer]):
    """The tokens of the environment are no steps: the next thing after the last token of a turn is the next turn's first."""
    expected = []
    for a in answers:
        last = {turn: t for t, turn in enumerate(a.turns)}
        rewards = [a.turn_rewards[turn] if last[turn] == t else 0.0 for t, turn in enumerate(a.turns)]
        expected.append(adv.gae(rewards, a.values, 0.9, 0.5))
    agree(assigned(row("ppo", normalise="none", gamma=0.9, gae_lambda=0.5), answers)[0], expected)


# rewards of turns


@pytest.mark.parametrize("gamma", [1.0, 0.5])
@modest
@given(answers=batches_of_answers())
def test_a_turn_gets_the_rewards_from_it_on(gamma: float, answers: list[Answer]):
    expected = [[adv.discounted(a.turn_rewards, gamma)[turn] for turn in a.turns] for a in answers]
    agree(assigned(row("reinforce", credit="turn", gamma=gamma), answers)[0], expected)


@pytest.mark.parametrize("name", BASELINES)
@modest
@given(answers=batches_of_answers())
def test_turns_are_compared_with_the_same_turn_of_the_group(name: str, answers: list[Answer]):
    """Rewards-to-go of turn k against those of the others that came as far."""
    to_go = {(i, k): r for i, a in enumerate(answers) for k, r in enumerate(adv.discounted(a.turn_rewards, 1.0))}
    keys = list(to_go)
    found = adv.by_group(BASELINES[name], [to_go[k] for k in keys], [10 * answers[i].group + k for i, k in keys])
    of = dict(zip(keys, found))
    agree(
        assigned(row(name, credit="turn"), answers)[0],
        [[of[i, turn] for turn in a.turns] for i, a in enumerate(answers)],
    )


@modest
@given(answers=batches_of_answers(turns=1))
def test_with_one_turn_credit_by_turn_is_credit_by_trajectory(answers: list[Answer]):
    agree(assigned(row("grpo", credit="turn"), answers)[0], assigned(row("grpo"), answers)[0])


# a trajectory in several samples


def cut(sample: Sample) -> list[Sample]:
    """One sample per turn, as when an agent edits its history: each with a masked token in front."""
    columns = (
        "token_ids",
        "loss_weights",
        "logprobs",
        "policy_versions",
        "turn_ids",
        "old_logprobs",
        "ref_logprobs",
        "values",
    )
    pieces = []
    for turn in sorted(set(sample.turn_ids) - {-1}):
        own = [t for t, k in enumerate(sample.turn_ids) if k == turn]
        own.insert(0, own[0] - 1)
        pieces.append(replace(sample, **{name: [getattr(sample, name)[t] for t in own] for name in columns}))
    return pieces


CUT = {
    "z_score": ("grpo", {}),
    "turns": ("grpo", {"credit": "turn", "gamma": 0.5}),
    "kl_in_the_reward": ("rloo", {"kl_coef": 0.125}),
    "kl_to_come": ("reinforce", {"kl": "reward", "kl_estimator": "k1", "kl_coef": 0.125}),
    "whiten": ("reinforce_pp", {"kl_coef": 0.125}),
    "gae": ("ppo", {"gamma": 0.9, "gae_lambda": 0.5, "kl_coef": 0.125}),
}


@pytest.mark.parametrize(("name", "words"), CUT.values(), ids=CUT)
@modest
@given(answers=batches_of_answers())
def test_a_trajectory_is_worth_the_same_in_one_sample_and_in_several(
    name: str, words: dict[str, Any], answers: list[Answer]
):
    spec = row(name, **words)
    expected, _ = assigned(spec, answers)
    pieces = [cut(answer.sample(i)) for i, answer in enumerate(answers)]
    assign_advantages(spec, [s for samples in pieces for s in samples])
    found = [[a for s in samples for a, w in zip(s.advantages, s.loss_weights) if w] for samples in pieces]
    agree(found, expected)


def test_a_cut_trajectory_counts_once_and_whitening_sees_all_its_tokens():
    """Rewards 1 and 0: ±0.5. Three tokens in two samples against one token."""
    first, second = Answer(0, [0.0], [0.0], [0.0], [0], [1.0]), Answer(0, [0.0], [0.0], [0.0], [0], [0.0])
    long = Answer(0, [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0, 0], [1.0])
    samples = [first.sample(0), long.sample(0), second.sample(1)]
    assign_advantages(row("reinforce_pp_baseline"), samples)
    expected = adv.whiten([0.5, -0.5], [3, 1])
    assert [[a for a in s.advantages if a] for s in samples] == [
        pytest.approx([expected[0]]),
        pytest.approx([expected[0]] * 2),
        pytest.approx([expected[1]]),
    ]


@pytest.mark.parametrize("name", ["reinforce", "grpo", "reinforce_pp"])
def test_a_sample_without_a_token_of_the_policy_is_no_obstacle(name: str):
    full, empty = (
        Answer(0, [0.0], [0.0], [0.0], [0], [1.0]).sample(0),
        Answer(0, [0.0], [0.0], [0.0], [0], [0.0]).sample(1),
    )
    empty.loss_weights = [0.0, 0.0]
    assign_advantages(row(name), [full, empty])
    assert empty.advantages == [0.0, 0.0]
    assert all(math.isfinite(a) for a in full.advantages)


@pytest.mark.parametrize(
    ("name", "words", "missing"),
    [("ppo", {}, "values"), ("reinforce_pp", {"kl_coef": 0.1}, "old_logprobs")],
)
def test_what_advantages_need_and_samples_lack_is_named(name: str, words: dict[str, Any], missing: str):
    sample = Sample([1, 2], [0.0, 1.0], [0.0, -1.0], [-1, 0], 1.0, 3, 0, 1.0, "p")
    with pytest.raises(ValueError, match=rf"sample p#3\.0 has no {missing}"):
        assign_advantages(row(name, **words), [sample])
