"""Whether the gold answers earn what they should: every reward scores them in its own process, as in a run."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sluice.config import TrainConfig
from sluice.configrewards import AnyReward, CustomReward, FormatReward, MatchReward
from sluice.data.chat import Chat
from sluice.data.prompts import PromptSet
from sluice.launch.checked import checked_reward
from sluice.preflight.findings import Item, listed, plural
from sluice.preflight.pattern import response_from
from sluice.rewards.rubric import Rubric
from sluice.rewards.spec import RewardSpec
from sluice.types import Completion, Outcome, Prompt, Trajectory, Turn

LIMIT_S = 60.0
"""For one reward; it looks at fewer rows when they take longer. Also the longest time that one score may take here."""
MAX_TIMEOUTS = 2
"""After which a reward is not asked again."""
FULL = 1.0
NO_REFERENCE = "The answer is 42."
"""What a reward of the user's scores where no column holds a reference."""


@dataclass
class Tried:
    """What one row's candidates were given, up to the first that earned all there is."""

    prompt: Prompt
    scores: list[float] = field(default_factory=list[float])
    error: str = ""
    outcome: Outcome = "scored"
    """Of the last candidate."""

    @property
    def full(self) -> bool:
        return FULL in self.scores

    def line(self) -> str:
        best = f"score {max(self.scores):g}" if self.scores else ""
        said = self.error.partition("): ")[2] or self.error
        return f"{self.prompt.where}: reference {_short(self.prompt.reference)}: {said or best}"


def check_gold(config: TrainConfig, prompts: PromptSet, chat: Chat, num_rows: int) -> Item:
    """Let each reward score gold responses of `num_rows` rows, evenly spread."""
    item = Item("rewards")
    rows = evenly_spread(len(prompts), num_rows)
    item.summary = f"gold answers of {len(rows)} of {len(prompts)} rows"
    for reward in config.rewards:
        with item.failing():
            _check_reward(item, reward, config, prompts, chat, rows)
    return item


def evenly_spread(total: int, count: int) -> list[int]:
    """`count` numbers below `total`, the first and the last among them."""
    if count >= total:
        return list(range(total))
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]


def _check_reward(
    item: Item, reward: AnyReward, config: TrainConfig, prompts: PromptSet, chat: Chat, rows: Sequence[int]
) -> None:
    spec = checked_reward(reward)
    if isinstance(reward, FormatReward) or (isinstance(reward, MatchReward) and reward.against == "nothing"):
        item.note(f"{spec.label}: compares with no reference")
        return
    limited = replace(spec, weight=FULL, timeout_s=min(spec.timeout_s, LIMIT_S))
    responses = _Responses(reward, config.data.reference, prompts, chat)
    tried, seconds = asyncio.run(_try_all(limited, responses, rows, min(config.reward_workers, os.cpu_count() or 1)))
    if isinstance(reward, CustomReward):
        said = _judge_custom(item, spec, limited, tried, config.rollout.environment != "single_turn")
    else:
        said = _judge_comparing(item, spec, tried, responses)
    step = seconds * config.rollout.groups_per_step * config.rollout.group_size / config.reward_workers
    few = f" (of {len(rows)}: no time for more)" if len(tried) < len(rows) else ""
    item.note(
        f"{spec.label}: {said}{few}; {_time(seconds)} a score, {_time(step)} a step with reward_workers={config.reward_workers}"
    )


class _Responses:
    """Gold responses of a row: what a policy that knows the answer might write."""

    def __init__(self, reward: AnyReward, reference: str | None, prompts: PromptSet, chat: Chat) -> None:
        self._reward, self._reference, self._prompts, self._chat = reward, reference, prompts, chat
        self.stop_at_full = not isinstance(reward, CustomReward)
        """One that earns all is enough; of a reward of the user's nobody knows what all is."""

    def of(self, row: int) -> tuple[Prompt, list[str]]:
        """The prompt, and responses that its tokeniser can write."""
        prompt = self._prompts[row]
        if self._reference is None:
            return prompt, [NO_REFERENCE]
        reference = str(prompt.reference)
        raw = self._prompts.rows[row][self._reference]
        texts = [self.made_from_pattern(prompt), f"\\boxed{{{reference}}}", str(raw), reference]
        return prompt, [text for text in dict.fromkeys(texts) if text and self._ids(text) is not None]

    def made_from_pattern(self, prompt: Prompt) -> str | None:
        pattern = self._reward.pattern if isinstance(self._reward, MatchReward) else None
        return None if pattern is None else response_from(pattern, str(prompt.reference).strip())

    def cannot_be_made(self, prompt: Prompt) -> bool:
        """Whether the pattern asks for more than can be written by rote."""
        pattern = self._reward.pattern if isinstance(self._reward, MatchReward) else None
        return pattern is not None and self.made_from_pattern(prompt) is None

    def trajectory(self, prompt: Prompt, text: str) -> Trajectory:
        """One turn with this response, of tokens that the tokeniser would write it with."""
        ids = [*(self._ids(text) or [0]), *self._chat.eos_ids]
        completion = Completion(ids, [0.0] * len(ids), "stop", [0] * len(ids), 1.0, text)
        return Trajectory([Turn([0], completion)], stop_reason="stop")

    def _ids(self, text: str) -> list[int] | None:
        """None for a text with characters that the tokeniser does not have."""
        try:
            return self._chat.tokenizer(text, add_special_tokens=False).input_ids
        except Exception:
            return None


async def _try_all(
    spec: RewardSpec, responses: _Responses, rows: Sequence[int], num_workers: int
) -> tuple[list[Tried], float]:
    """As many rows as the time allows, in order, and the mean seconds of a score."""
    rubric = Rubric([spec], num_workers)
    todo: Iterator[int] = iter(rows)
    tried: dict[int, Tried] = {}
    seconds: list[float] = []
    deadline = time.monotonic() + LIMIT_S

    async def work() -> None:
        for row in todo:
            prompt, texts = responses.of(row)
            now = tried[row] = Tried(prompt)
            if not texts:
                now.outcome, now.error = "error", "the tokeniser cannot write the reference"
            for text in texts:
                trajectory, start = responses.trajectory(prompt, text), time.perf_counter()
                await rubric.score(prompt, trajectory)
                seconds.append(time.perf_counter() - start)
                now.outcome = trajectory.outcome
                if trajectory.reward is None:
                    now.error = trajectory.error
                    break
                now.scores.append(trajectory.reward)
                if now.full and responses.stop_at_full:
                    break
            if sum(t.outcome == "timeout" for t in tried.values()) >= MAX_TIMEOUTS or time.monotonic() > deadline:
                return

    try:
        await rubric.start()
        await asyncio.gather(*(work() for _ in range(num_workers)))
    finally:
        rubric.close()
    return [tried[row] for row in sorted(tried)], statistics.fmean(seconds or [0.0])


def _judge_comparing(item: Item, spec: RewardSpec, tried: Sequence[Tried], responses: _Responses) -> str:
    missed = [t for t in tried if not t.full]
    bad = [t for t in missed if t.error or not responses.cannot_be_made(t.prompt)]
    if len(missed) > len(bad):
        item.warn(
            f"reward {spec.label!r}: its pattern asks for more than can be written by rote, so {len(missed) - len(bad)} gold "
            "answers could not be tried; try it on a response of your own"
        )
    if bad:
        text = (
            f"reward {spec.label!r}: {len(bad)} of {len(tried)} gold answers do not earn all, written as the pattern asks, in "
            "\\boxed{}, as the whole column, and alone: perhaps no response can. Correct the rows, "
            f"data.reference_pattern or the reward:\n{listed([t.line() for t in bad])}"
        )
        (item.fail if len(bad) == len(tried) and spec.weight else item.warn)(text)
    return f"{len(tried) - len(missed)} of {len(tried)} earn all"


def _judge_custom(
    item: Item, spec: RewardSpec, limited: RewardSpec, tried: Sequence[Tried], has_environment: bool
) -> str:
    patient = spec.timeout_s > limited.timeout_s
    errors = [t for t in tried if t.outcome == "error"]
    timeouts = [t for t in tried if t.outcome == "timeout"]
    if errors:
        hint = ""
        if has_environment:
            hint = "; the responses were single turns, which rollout.environment may never give"
        (item.warn if has_environment else item.fail)(
            f"reward {spec.label!r}: no score for the gold answers of {len(errors)} of {len(tried)} rows{hint}. "
            f"An error is never a score; correct the function or the rows:\n{listed([t.line() for t in errors])}"
        )
    if timeouts:
        what = f"{limited.timeout_s:g} s, and was not waited for" if patient else f"its timeout_s={spec.timeout_s:g}"
        (item.warn if patient else item.fail)(
            f"reward {spec.label!r} took longer than {what}; make it faster or raise its timeout_s:\n"
            f"{listed([t.line() for t in timeouts])}"
        )
    scores = [score for t in tried for score in t.scores]
    if not scores:
        return f"no score for {plural(len(tried), 'row')}"
    return f"scores from {min(scores):g} to {max(scores):g} for {plural(len(tried), 'row')}"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
