"""Every row trains through the one command, and what it needs beyond the rest comes with it: reference, critic, corrections."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from makers import make_char_tokenizer
from sluice.algorithms import ALGORITHMS
from sluice.viewer import report
from small_runs import ALPHABET, events_of, finished, ledger_of, make_model, metrics_of, set_up, sluice, workplace


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(report, "write_report", lambda run: None)
    with workplace(tmp_path, monkeypatch):
        set_up(tmp_path)
        yield tmp_path


def trained(*words: str, name: str = "test") -> Path:
    return finished("train", "config.yaml", *words, name=name)


def assert_sound(run: Path) -> None:
    for line in metrics_of(run):
        assert all(value is None or math.isfinite(value) for value in line.values()), line
        assert line["train/grad_norm"] > 0


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_trains(ready: Path, name: str):
    run = trained(f"algorithm.name={name}", "trainer.updates_per_batch=2", "algorithm.dynamic_sampling=false")
    assert_sound(run)
    lines = metrics_of(run)
    assert len(lines) == 3
    first = lines[0]
    assert first["train/first_update/ppo_kl"] == pytest.approx(0, abs=1e-5)
    assert first["train/first_update/pg_clipfrac"] == 0
    shares = [value for key, value in first.items() if key.startswith("train/ratio/share/")]
    assert sum(shares) == pytest.approx(1.0)
    assert 0 < first["train/ratio/ess"] <= 1 + 1e-6


@pytest.mark.parametrize("critic", [["critic.model=head"], ["critic.model=own", "critic.value_clip=null"]])
def test_a_critic_is_trained_beside_the_policy(ready: Path, critic: list[str]):
    run = trained("algorithm.name=ppo", "critic.learning_rate=1e-2", *critic)
    assert_sound(run)
    lines = metrics_of(run)
    assert all(line["train/critic/grad_norm"] > 0 for line in lines)
    assert lines[0]["train/explained_variance"] == pytest.approx(0.0, abs=1e-9)  # it has said 0 for all
    assert lines[2]["train/value_loss"] != lines[0]["train/value_loss"]
    for step, line in enumerate(lines, 1):
        rows = ledger_of(run, step)
        for row in rows:
            own = [t for t, weight in enumerate(row["loss_weights"]) if weight]
            assert len(row["values"]) == len(row["returns"]) == len(row["token_ids"])
            # γ = λ = 1: the return of every token is the reward
            assert [row["returns"][t] for t in own] == pytest.approx([row["reward"]] * len(own), abs=1e-5)
        assert any(value for row in rows for value in row["values"]) is (step > 1)
        whitened = [row["advantages"][t] for row in rows for t, w in enumerate(row["loss_weights"]) if w]
        assert sum(whitened) / len(whitened) == pytest.approx(0, abs=1e-5)
        assert line["train/value_clipfrac"] >= 0


def test_pretraining_leaves_the_policy_as_it_was(ready: Path):
    run = trained("algorithm.name=ppo", "critic.pretrain_steps=2", "checkpoint.every_steps=1")
    start = AutoModelForCausalLM.from_pretrained("model").state_dict()
    for step, moved in ((1, False), (2, False), (3, True)):
        weights = AutoModelForCausalLM.from_pretrained(run / f"checkpoints/step-{step:06d}").state_dict()
        assert any(not torch.equal(weights[name], start[name]) for name in start) is moved
        line = metrics_of(run)[step - 1]
        assert ("train/pg_loss" in line) is moved
        assert line["train/critic/grad_norm"] > 0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k1_st", "k3_st"])
def test_kl_in_the_loss_is_0_at_the_start_and_grows(ready: Path, estimator: str):
    """R2: against the policy as the run begins, the first update sees no divergence."""
    run = trained("algorithm.kl_coef=0.1", f"algorithm.kl_estimator={estimator}")
    lines = metrics_of(run)
    assert lines[0]["train/kl_loss"] == pytest.approx(0, abs=1e-6)
    assert abs(lines[2]["train/kl_loss"]) > 1e-6
    row = ledger_of(run, 1)[0]
    assert row["ref_logprobs"] == pytest.approx(row["logprobs"], abs=1e-4)


def test_kl_in_the_reward_pulls_back(ready: Path):
    """With a coefficient that outweighs the reward, the policy stays nearer to the reference than with a slight one."""
    distances = {}
    for name, coefficient in (("free", "1e-9"), ("held", "10")):
        run = trained(
            "algorithm.name=reinforce_pp",
            f"algorithm.kl_coef={coefficient}",
            "trainer.learning_rate=3e-3",
            "run.num_steps=8",
            name=name,
        )
        lines = metrics_of(run)
        assert lines[0]["train/ref_kl"] == pytest.approx(0, abs=1e-6)
        distances[name] = lines[-1]["train/ref_kl"]
        rows = ledger_of(run, 8)
        pairs = [
            (old, ref)
            for row in rows
            for old, ref, weight in zip(row["old_logprobs"], row["ref_logprobs"], row["loss_weights"], strict=True)
            if weight
        ]
        mean = sum(old - ref for old, ref in pairs) / len(pairs)
        assert distances[name] == pytest.approx(mean, rel=1e-4, abs=1e-6)
    assert abs(distances["held"]) < abs(distances["free"]) / 2


def test_the_reference_follows_when_it_is_told_to(ready: Path):
    run = trained("algorithm.kl_coef=0.1", "reference.update_every_steps=2", "run.num_steps=4")
    kl = [line["train/kl_loss"] for line in metrics_of(run)]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[2] == pytest.approx(0, abs=1e-6)  # it was made the policy after step 2
    assert kl[1] > 1e-6
    assert kl[3] > 1e-6
    assert [e["kind"] for e in events_of(run)] == ["reference_updated", "reference_updated"]


@pytest.mark.parametrize("correction", ["tis", "mis", "icepop"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_corrections_are_measured_and_drop_nothing_where_engine_and_trainer_agree(
    ready: Path, correction: str, level: str
):
    run = trained(
        "algorithm.old_logprobs=recomputed",
        f"algorithm.correction={correction}",
        f"algorithm.correction_level={level}",
        "algorithm.rejection=geometric",
        "run.num_steps=1",
    )
    (line,) = metrics_of(run)
    assert line["train/correction/dropped"] == 0
    assert line["train/mismatch/ess"] == pytest.approx(1.0, abs=1e-5)
    assert line["train/mismatch/kl"] == pytest.approx(0.0, abs=1e-5)
    assert line["train/mismatch/share/0.95-1.05"] == 1.0


PER_TURN = """\
from sluice.types import Trajectory


async def play(prompt, policy):
    messages = list(prompt.messages)
    for _ in range(2):
        messages.append(await policy.respond(messages))
        policy.turns[-1].reward = policy.turns[-1].completion.text.count("a")
        messages.append({"role": "user", "content": "again"})
    return Trajectory(policy.turns, stop_reason="played")
"""


@pytest.mark.parametrize(
    "words", [["algorithm.credit=turn"], ["algorithm.name=ppo"], ["algorithm.name=reinforce", "algorithm.credit=turn"]]
)
def test_turns_are_worth_their_own_reward_and_what_follows(ready: Path, words: list[str]):
    (ready / "turns_env.py").write_text(PER_TURN)
    make_char_tokenizer(ready / "model", ALPHABET[:-1] + "\n")  # messages are joined by new lines
    run = trained("rollout.environment=turns_env:play", "run.num_steps=1", *words)
    rows = ledger_of(run, 1)
    assert any(row["reward_parts"].get("turns") for row in rows)
    for row in rows:
        letters = row["reward_parts"].get("turns", 0.0)
        assert row["reward"] == pytest.approx(letters + row["reward_parts"]["share_of_small_letters"])
        assert set(row["turn_ids"]) <= {-1, 0, 1}
        if words[0] == "algorithm.name=reinforce":
            worth = {turn: row["advantages"][t] for t, turn in enumerate(row["turn_ids"]) if turn >= 0}
            assert worth.get(0, row["reward"]) == pytest.approx(row["reward"], rel=1e-5)
            first = sum(row["tokens"][t] == "a" for t, turn in enumerate(row["turn_ids"]) if turn == 0)
            assert worth.get(1, row["reward"] - first) == pytest.approx(row["reward"] - first, rel=1e-5, abs=1e-6)


BAD_TURN = """\
from decimal import Decimal

from sluice.types import Trajectory


async def play(prompt, policy):
    await policy.respond(prompt.messages)
    policy.turns[-1].reward = {reward}
    return Trajectory(policy.turns * {times}, stop_reason="played")
"""


@pytest.mark.parametrize("reward", ["None", "'1'", "[1.0]", "float('nan')", "1e400", "2j"])
def test_a_turn_reward_that_is_no_number_costs_the_sample_its_score_and_not_the_run(ready: Path, reward: str):
    (ready / f"bad_{abs(hash(reward))}.py").write_text(BAD_TURN.format(reward=reward, times=1))
    words = [f"rollout.environment=bad_{abs(hash(reward))}:play", "rollout.max_failed_groups=1", "run.num_steps=1"]
    assert sluice("train", "config.yaml", "run.name=test", *words) == 1
    assert "do not add up to a finite number" in str(events_of(Path("runs/test")))


def test_a_turn_that_is_listed_twice_has_its_score_once(ready: Path):
    (ready / "twice.py").write_text(BAD_TURN.format(reward="Decimal('0.5')", times=2))
    run = trained("rollout.environment=twice:play", "run.num_steps=1", "algorithm.name=reinforce")
    for row in ledger_of(run, 1):
        assert row["reward"] == pytest.approx(1.0 + row["reward_parts"]["share_of_small_letters"])


def test_the_reward_to_stop_at_waits_until_the_policy_learns(ready: Path):
    run = trained("algorithm.name=ppo", "critic.pretrain_steps=2", "run.stop_at_reward=0", "run.num_steps=5")
    assert len(metrics_of(run)) == 3


def test_a_second_model_sees_the_policys_tokens(ready: Path, capsys: pytest.CaptureFixture[str]):
    make_model("reversed")
    make_char_tokenizer("reversed", ALPHABET[::-1])
    for words in (["algorithm.kl_coef=0.1", "reference.path=reversed"], ["algorithm.name=ppo", "critic.path=reversed"]):
        assert sluice("train", "config.yaml", *words) == 2
        assert f"{words[1].partition('.')[0]}.path=reversed: its tokeniser has other tokens" in capsys.readouterr().err
    assert not (ready / "runs").exists()


def test_what_a_loss_needs_and_what_would_have_no_effect_is_said_before_the_run(
    ready: Path, capsys: pytest.CaptureFixture[str]
):
    make_model(ready / "other", "llama")
    for words, reason in (
        (["algorithm.correction=tis"], "set algorithm.old_logprobs=recomputed"),
        (["reference.update_every_steps=3"], "only a KL term needs a reference"),
        (["critic.learning_rate=1e-3"], "only advantage: gae has a critic"),
        (["algorithm.name=ppo", "critic.pretrain_steps=3"], "leaves the policy none of the 3 steps"),
        (["algorithm.name=ppo", "critic.model=head", "critic.path=x"], "critic.path has no effect"),
        (["algorithm.kl=reward"], "only kl_coef above 0 uses it"),
        (["algorithm.kl_coef=0.1", "reference.path=nowhere"], "reference.path=nowhere: no model folder there"),
        (["algorithm.name=ppo", "critic.path=nowhere"], "critic.path=nowhere: no model folder there"),
        (
            ["algorithm.kl_coef=0.1", "reference.path=other", "reference.update_every_steps=2"],
            "reference.path=other has another architecture",
        ),
    ):
        assert sluice("train", "config.yaml", *words) == 2
        assert reason in capsys.readouterr().err, words
    assert not (ready / "runs").exists()
