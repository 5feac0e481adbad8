"""What flows through a run, from a prompt to a training sample. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal

FinishReason = Literal["stop", "length", "repetition", "abort"]
Outcome = Literal["pending", "scored", "error", "timeout"]
Message = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A task for the policy."""

    id: str
    """Stable across epochs and runs; names the row in errors and in the ledger."""
    messages: Sequence[Message]
    """The conversation so far, each a dict with `role` and `content`."""
    reference: Any = None
    """Gold answer, tests …: seen by rewards, never by the policy."""
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further columns of the data row, for rewards and for the ledger."""
    where: str = ""
    """`file:line` of the row, for error messages."""


@dataclass(frozen=True)
class Sampling:
    """How one completion is sampled."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy; training needs more than 0."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    stop: tuple[str, ...] = ()
    """Texts that end the completion; the tokens that complete one are kept."""
    stop_token_ids: frozenset[int] = frozenset()
    """Token ids that end the completion; the id is kept as the last token."""
    seed: int = 0
    """Seeds this completion alone: which draws it gets does not depend on what is sampled beside it."""
    session: tuple[int, int] = (0, 0)
    """Group and attempt that it is a turn of. Those of a group begin with one prompt, and those of an attempt go on where the last
    one ended: what has computed the one had best compute the other. It changes nothing in what is sampled."""
    num_drawn: int = 0
    """Of its draws, those that are used up: the last tokens of the prompt were drawn with them, and the completion goes on from there."""


@dataclass
class Completion:
    """What the engine made of one prompt: tokens, never re-tokenised text."""

    token_ids: list[int]  # [T]
    logprobs: list[float]  # [T]
    """Log-probability of each token under what it was drawn from: softmax(logits / temperature), over `kept_ids` only."""
    finish_reason: FinishReason
    policy_versions: list[int]  # [T]
    """Which weights made each token."""
    temperature: float
    text: str = ""
    """Decoded once, for rewards and readers; it is never tokenised again."""
    kept_ids: list[list[int]] = field(default_factory=list[list[int]])
    """[T] the ids that top-p and top-k left to draw each token from; an empty list where they dropped none, and empty
    altogether where they never did."""
    routed_experts: list[bytes] = field(default_factory=list[bytes])
    """[prompt + T] the experts that the routers of a mixture of experts chose for each token that was fed in: little-endian 16-bit
    numbers, layer after layer. b"" where that is not known, as of the last token; empty altogether where nothing is."""

    def __post_init__(self) -> None:
        _same_length(
            "Completion",
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            policy_versions=self.policy_versions,
            **({"kept_ids": self.kept_ids} if self.kept_ids else {}),
        )
        if self.routed_experts and len(self.routed_experts) < len(self.token_ids):
            raise ValueError(
                f"Completion: routed_experts of {len(self.routed_experts)} positions are fewer than its {len(self.token_ids)} "
                "tokens; they begin with the prompt"
            )
        for t, kept in enumerate(self.kept_ids):
            if kept and self.token_ids[t] not in kept:
                raise ValueError(
                    f"Completion: token {t} is {self.token_ids[t]}, which is not among its kept_ids; the engine must "
                    "report the ids that it drew from"
                )


@dataclass
class Turn:
    """One call of the engine: exactly the ids that it saw and gave."""

    prompt_ids: list[int]
    completion: Completion
    reward: float = 0.0
    """What the environment gave for this turn alone. If it gave any, the rubric's score is put on top at the last turn."""


@dataclass
class Trajectory:
    """One attempt at a prompt: a turn, or several with an environment between them."""

    turns: list[Turn]
    stop_reason: str = ""
    """Why the environment ended; for a single turn, the completion's finish reason."""
    outcome: Outcome = "pending"
    """`scored`, or why there is no score. An error is never a score."""
    reward: float | None = None
    reward_parts: dict[str, float] = field(default_factory=dict[str, float])
    error: str = ""
    """What went wrong, when `outcome` is error or timeout."""

    @property
    def response(self) -> str:
        """Text of the last completion, which is what most rewards look at."""
        return self.turns[-1].completion.text if self.turns else ""

    @property
    def num_response_tokens(self) -> int:
        return sum(len(turn.completion.token_ids) for turn in self.turns)


@dataclass
class Group:
    """All trajectories of one prompt: the unit of queueing, scoring, filtering and staleness."""

    id: int
    """The ticket under which the buffer admitted it; advantages are taken per id, never by position."""
    prompt: Prompt
    trajectories: list[Trajectory]
    rejected: str = ""
    """Why it is not trained on; empty when it is."""

    @property
    def scored(self) -> list[Trajectory]:
        return [t for t in self.trajectories if t.outcome == "scored"]

    @property
    def oldest_version(self) -> int:
        """The oldest weights that made any token of the group."""
        return min(v for t in self.trajectories for turn in t.turns for v in turn.completion.policy_versions)


@dataclass
class Sample:
    """One token sequence to train on. Fields of length T speak of token t given the tokens before it."""

    token_ids: list[int]  # [T] prompt, response and whatever the environment said between
    loss_weights: list[float]  # [T] 0.0: not the policy's; 1.0: the policy's; any other value weighs the loss
    logprobs: list[float]  # [T] the engine's word, of what it drew from; 0.0 where the policy did not write
    policy_versions: list[int]  # [T] -1 where the policy did not write
    temperature: float
    group: int
    index: int
    """Which trajectory of the group; several samples of one trajectory share it."""
    reward: float = 0.0
    """Never overwritten by an advantage."""
    prompt_id: str = ""
    turn_ids: list[int] = field(default_factory=list[int])  # [T] which turn wrote it, -1 for none; empty: one turn
    turn_rewards: list[float] = field(default_factory=list[float])
    """Reward of each turn of the trajectory, the rubric's at the last; they add up to `reward`. Empty: one turn."""
    kept_ids: list[list[int]] = field(default_factory=list[list[int]])
    """[T] as in a completion, with an empty list where the policy did not write."""
    routed_experts: list[bytes] = field(default_factory=list[bytes])  # [T] as in a completion

    advantages: list[float] = field(default_factory=list[float])  # [T] filled by `assign_advantages`
    old_logprobs: list[float] = field(
        default_factory=list[float]
    )  # [T] what the ratio divides by, filled before the first update
    ref_logprobs: list[float] = field(default_factory=list[float])  # [T] of the reference policy, where KL needs them
    values: list[float] = field(default_factory=list[float])  # [T] of the critic before the first update, for `gae`
    returns: list[float] = field(default_factory=list[float])  # [T] what the critic learns: advantage + value
    update: int = -1
    """Which optimiser update of the step used it; the next three are as the policy stood at that update."""
    current_logprobs: list[float] = field(default_factory=list[float])  # [T]
    ratios: list[float] = field(default_factory=list[float])  # [T]
    clipped: list[bool] = field(default_factory=list[bool])  # [T]

    def __post_init__(self) -> None:
        _same_length(
            f"Sample {self.name}",
            token_ids=self.token_ids,
            loss_weights=self.loss_weights,
            logprobs=self.logprobs,
            policy_versions=self.policy_versions,
            **({"kept_ids": self.kept_ids} if self.kept_ids else {}),
            **({"routed_experts": self.routed_experts} if self.routed_experts else {}),
        )
        if self.loss_weights and self.loss_weights[0]:
            raise ValueError(
                f"Sample {self.name}: the first token has no tokens before it, so its loss weight must be 0"
            )

    @property
    def name(self) -> str:
        return f"{self.prompt_id or 'group'}#{self.group}.{self.index}"

    def __len__(self) -> int:
        return len(self.token_ids)


def join_kept_ids(*parts: tuple[list[list[int]], int]) -> list[list[int]]:
    """`kept_ids` of stretches of tokens that follow each other, each with its length, as one."""
    if not any(kept for kept, _ in parts):
        return []
    return [ids for kept, length in parts for ids in (kept or [[]] * length)]


def join_routed_experts(first: Sequence[bytes], then: Sequence[bytes], length: int) -> list[bytes]:
    """`routed_experts` of a sequence of this length that was computed in two goes, each from its beginning: what was chosen first made
    the log-probs that are on record, and what was chosen then stands where nothing was known."""
    if not first and not then:
        return []
    return [a or b for a, b, _ in zip_longest(first, then, range(length), fillvalue=b"")]


def pack_routed_experts(entries: Sequence[bytes]) -> bytes:
    """`routed_experts` as one: as many bytes for each entry, which are all set where nothing is known; none where nothing is at all."""
    width = max(map(len, entries), default=0)
    return b"".join(entry or b"\xff" * width for entry in entries)


def unpack_routed_experts(packed: bytes, count: int) -> list[bytes]:
    """The entries again, of which there are so many."""
    if not packed:
        return []
    width = len(packed) // count
    entries = (packed[start : start + width] for start in range(0, len(packed), width))
    return [b"" if entry == b"\xff" * width else entry for entry in entries]


def _same_length(owner: str, **columns: Sequence[Any]) -> None:
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{owner}: fields must have one length, got {lengths}")
