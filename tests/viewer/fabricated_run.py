"""A run folder with plausible numbers, written by the real tracker."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path

from sluice.tracking.rundir import RunDir, describe_environment
from sluice.tracking.tracker import FileTracker
from sluice.types import Completion, Group, Prompt, Sample, Trajectory, Turn

CONFIG = """\
run:
  name: null  # default
  seed: 7  # recheck.yaml:3
  num_steps: 20  # command line
model:
  path: runs/recheck/sft/checkpoints/step-000800  # recheck.yaml:6
data:
  path: runs/recheck/task/questions.jsonl  # recheck.yaml:9
rollout:
  groups_per_step: 4  # recheck.yaml:14
  group_size: 4  # recheck.yaml:15
  max_new_tokens: 96  # recheck.yaml:16
  temperature: 1.0  # default
  max_staleness: 0  # default
engine:
  name: embedded  # default
algorithm:
  name: cispo  # default
  ratio_max: null  # default
  old_logprobs: engine  # default
rewards:
- name: match  # recheck.yaml:20
  label: match  # default
  weight: 1.0  # default
- name: task:recheck  # recheck.yaml:22
  label: recheck  # recheck.yaml:23
  weight: 0.2  # recheck.yaml:24
trainer:
  name: local  # default
  learning_rate: 1e-05  # command line
  updates_per_batch: 4  # recheck.yaml:30
"""


class Words:
    """A tokeniser of words and signs; what it has not seen gets the next id."""

    def __init__(self) -> None:
        self.texts: list[str] = ["<pad>", "<eos>"]

    def encode(self, text: str) -> list[int]:
        ids = []
        for piece in re.findall(r" ?\w{1,5}| ?[^\w\s]|\s", text):
            if piece not in self.texts:
                self.texts.append(piece)
            ids.append(self.texts.index(piece))
        return ids

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self.texts[i] for i in ids]


class Fabricator:
    """Makes groups and samples as a run of arithmetic with rechecking would."""

    def __init__(self, rundir: RunDir, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.words = Words()
        self.tracker = FileTracker(rundir, self.words.pieces)

    def response(self, a: int, b: int, skill: float) -> tuple[str, bool]:
        answer = a + b if self.random.random() < 0.3 + 0.5 * skill else a + b + self.random.choice((-10, -1, 1, 10))
        text = f"<think>\n{a} + {b}: units {a % 10} + {b % 10} = {a % 10 + b % 10}, tens {a // 10} + {b // 10}.\nSo {answer}."
        if self.random.random() < skill:
            text += f"\nWait, let me check: {answer} - {b} = {answer - b}"
            text += ", right." if answer == a + b else f", not {a}. So {a + b}."
            answer = a + b
        return f"{text}\n</think>\nThe answer is {answer}", answer == a + b

    def completion(self, text: str, version: int, skill: float) -> Completion:
        ids = [*self.words.encode(text), 1]
        logprobs = [-self.random.expovariate(1) * (0.25 if self.random.random() < 0.8 else 2.5 - skill) for _ in ids]
        return Completion(ids, logprobs, "stop", [version] * len(ids), 1.0, text)

    def group(self, id: int, step: int, skill: float, size: int) -> Group:
        a, b = self.random.randint(11, 989), self.random.randint(11, 989)
        question = [{"role": "user", "content": f"What is {a} + {b}? Recheck your answer before you give it."}]
        prompt = Prompt(f"questions-{id:05d}", question, str(a + b), {"digits": 3}, f"questions.jsonl:{id + 1}")
        trajectories = []
        for _ in range(size):
            text, right = self.response(a, b, skill)
            turn = Turn(self.words.encode(str(question[0]["content"]) + "\n"), self.completion(text, step - 1, skill))
            parts = {"match": float(right), "recheck": float("check" in text)}
            trajectories.append(Trajectory([turn], "stop", "scored", parts["match"] + 0.2 * parts["recheck"], parts))
        return Group(id, prompt, trajectories)

    def samples(self, group: Group) -> list[Sample]:
        rewards = [t.reward or 0.0 for t in group.trajectories]
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) + 1e-6
        return [self.sample(group, i, (rewards[i] - mean) / std) for i in range(len(rewards))]

    def sample(self, group: Group, index: int, advantage: float) -> Sample:
        turn, reward = group.trajectories[index].turns[0], group.trajectories[index].reward or 0.0
        given, made = turn.prompt_ids, turn.completion
        none = [0.0] * len(given)
        shift = [self.random.gauss(0, 0.08) for _ in made.token_ids]
        return Sample(
            token_ids=given + made.token_ids,
            loss_weights=none + [1.0] * len(made.token_ids),
            logprobs=none + made.logprobs,
            policy_versions=[-1] * len(given) + made.policy_versions,
            temperature=1.0,
            group=group.id,
            index=index,
            reward=reward,
            prompt_id=group.prompt.id,
            advantages=none + [advantage] * len(made.token_ids),
            old_logprobs=none + made.logprobs,
            update=index,
            current_logprobs=none + [old + change for old, change in zip(made.logprobs, shift)],
            ratios=[1.0] * len(given) + [math.exp(change) for change in shift],
            clipped=[False] * len(given) + [change > 0.17 for change in shift],
        )

    def metrics(self, step: int, groups: Sequence[Group], skill: float) -> dict[str, float]:
        trajectories = [t for group in groups for t in group.trajectories]
        gauss = self.random.gauss

        def mean(values: Sequence[float]) -> float:
            return sum(values) / len(values) if values else math.nan

        return {
            "rollout/reward": mean([t.reward for t in trajectories if t.reward is not None]),
            "rollout/reward/match": mean([t.reward_parts["match"] for t in trajectories if t.reward_parts]),
            "rollout/reward/recheck": mean([t.reward_parts["recheck"] for t in trajectories if t.reward_parts]),
            "rollout/response_len/mean": mean([float(t.num_response_tokens) for t in trajectories]),
            "rollout/response_len/max": max((t.num_response_tokens for t in trajectories), default=0),
            "rollout/num_tokens": sum(t.num_response_tokens for t in trajectories),
            "rollout/finish/length": 0.0,
            "rollout/outcome/error": sum(t.outcome == "error" for t in trajectories),
            "rollout/rejected_groups": sum(bool(group.rejected) for group in groups),
            "rollout/equal_reward_groups": mean([float(len({t.reward for t in g.scored}) == 1) for g in groups]),
            "rollout/staleness/max": 0,
            "train/loss": gauss(0, 0.01),
            "train/pg_loss": gauss(0, 0.01),
            "train/ppo_kl": abs(gauss(0, 8e-4)),
            "train/pg_clipfrac": abs(gauss(0, 0.02)),
            "train/ratio/max": 1.2 + abs(gauss(0, 0.2)),
            "train/entropy": 1.4 - 0.9 * skill + gauss(0, 0.03),
            "train/grad_norm": 0.6 + abs(gauss(0, 0.1)),
            "train/learning_rate": 1e-5,
            "train/engine_logprob_diff/mean": 2e-7,
            "train/engine_logprob_diff/max": math.nan if step == 5 else 3e-6,
            "perf/rollout_s": 0.8 + abs(gauss(0, 0.05)),
            "perf/train_s": 0.5 + abs(gauss(0, 0.05)),
            "perf/step_s": 1.4 + abs(gauss(0, 0.1)),
            "perf/tokens_per_s": 9000 + gauss(0, 400),
        }


def fabricate_run(folder: Path, *, num_steps: int = 12, num_groups: int = 4, group_size: int = 4) -> RunDir:
    """A run that learns to recheck; its last step has a sample without a score, and a rejected group."""
    rundir = RunDir.create(folder, "recheck-20260314-091500")
    rundir.config.write_text(CONFIG)
    rundir.environment.write_text(json.dumps(describe_environment()))
    make = Fabricator(rundir)
    for step in range(1, num_steps + 1):
        skill = 1 / (1 + math.exp(6 - 12 * step / num_steps))
        groups = [make.group((step - 1) * num_groups + i, step, skill, group_size) for i in range(num_groups)]
        if step == num_steps:
            groups[-1].rejected = "all rewards equal (1.2)"
            broken = groups[0].trajectories[-1]
            broken.outcome, broken.reward, broken.reward_parts = "timeout", None, {}
            broken.error = f"reward 'recheck', prompt {groups[0].prompt.id}: no score after 10 s"
            make.tracker.event(
                "no_score", f"prompt {groups[0].prompt.id}: 1 of 4 samples have no score: {broken.error}"
            )
        samples = [sample for group in groups if not group.rejected for sample in make.samples(group)]
        samples = [s for s in samples if groups[s.group % num_groups].trajectories[s.index].outcome == "scored"]
        make.tracker.log_groups(step, groups, samples)
        make.tracker.log(step, make.metrics(step, groups, skill))
    return rundir
