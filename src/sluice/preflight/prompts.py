"""Every prompt as the policy will see it: does the template take it, has it room, does it come twice, can a response end?"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from sluice.config import SftConfig, TrainConfig
from sluice.data.chat import Chat
from sluice.data.prompts import PromptSet, SftSet
from sluice.errors import ConfigError, DataError
from sluice.launch.checked import window_of
from sluice.preflight.findings import Item, listed
from sluice.preflight.folder import ModelFolder
from sluice.types import Message

NUM_LONGEST = 3
NO_LIMIT = 2**31
"""Positions of a model that is not there to say how many it has."""
_CONVERSATION = ({"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"})


@dataclass
class Encoded:
    """What came of encoding the rows."""

    lengths: array[int] = field(default_factory=lambda: array("q"))
    """Tokens of each row that could be encoded."""
    rows: array[int] = field(default_factory=lambda: array("q"))
    """Their numbers."""
    repeats: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """(row, the first row with the same tokens)"""
    unroled: list[int] = field(default_factory=list[int])
    """Rows whose roles are lost, for want of a template."""

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def describe(self, where: Callable[[int], str]) -> tuple[str, str]:
        """How long they are, and which are the longest."""
        ordered = sorted(self.lengths)
        top = sorted(range(len(self.lengths)), key=lambda k: -self.lengths[k])[:NUM_LONGEST]
        longest = ", ".join(f"{where(self.rows[k])} ({self.lengths[k]})" for k in top)
        if ordered[0] == ordered[-1]:
            return f"{ordered[0]} tokens each", f"the longest: {longest}"
        spread = f"{ordered[0]} to {ordered[-1]} tokens, half of the rows at most {ordered[len(ordered) // 2]}"
        return spread, f"the longest: {longest}"


def check_prompts(config: TrainConfig, prompts: PromptSet, chat: Chat, model: ModelFolder | None) -> tuple[Item, int]:
    """And the tokens of the longest prompt; 0 when none could be encoded."""
    item, where, total = Item("prompts"), prompts.rows.where, len(prompts)
    messages = (prompts[i].messages for i in range(total))
    encoded = _encode(item, messages, total, where, chat)
    if not encoded.lengths:
        return item, 0
    item.summary, longest = encoded.describe(where)
    item.note(longest)
    window = window_of(config, model.max_length if model else NO_LIMIT)
    _check_room(item, encoded, where, config.rollout.max_new_tokens, window, config.data.long_prompts == "skip")
    if encoded.repeats:
        lines = [f"{where(again)} is {where(first)} again" for again, first in encoded.repeats]
        item.warn(
            f"{len(lines)} of {total} prompts have come before, so they would be sampled more often than others; "
            f"remove what is not meant:\n{listed(lines)}"
        )
    if encoded.unroled:
        item.warn(
            f"{len(encoded.unroled)} of {total} prompts have messages in roles, and the tokeniser has no chat template: "
            "their texts are joined with newlines and their roles are lost. Take a model whose tokeniser has a template, or "
            f"write the prompts as texts. The first: {where(encoded.unroled[0])}"
        )
    return item, encoded.longest


def check_pairs(config: SftConfig, pairs: SftSet, chat: Chat, model: ModelFolder) -> tuple[Item, int]:
    """And the tokens of the longest prompt and response together; 0 when none could be encoded."""
    item, where, total = Item("pairs"), pairs.rows.where, len(pairs)
    messages = (pairs[i].messages for i in range(total))
    encoded = _encode(item, messages, total, where, chat, (pairs[i].response for i in range(total)))
    if not encoded.lengths:
        return item, 0
    item.summary, longest = encoded.describe(where)
    item.note(longest)
    long = [k for k, length in enumerate(encoded.lengths) if length > model.max_length]
    if long:
        lines = [f"{where(encoded.rows[k])}: {encoded.lengths[k]} tokens" for k in long]
        item.fail(
            f"{len(long)} of {total} rows have more tokens, prompt and response, than the {model.max_length} positions "
            f"of the model; shorten or remove them:\n{listed(lines)}"
        )
    return item, encoded.longest


def check_ends(item: Item, config: TrainConfig, chat: Chat, own_eos_ids: frozenset[int]) -> None:
    """Whether a response can end, and what ends it. `own_eos_ids` are those that the model's folder names."""
    rollout = config.rollout
    ends = chat.eos_ids | own_eos_ids | frozenset(rollout.stop_token_ids)
    if not ends and not rollout.stop:
        item.warn(
            "no response can end: neither tokeniser nor model names an end-of-sequence token, and rollout.stop is empty, so each "
            f"would have rollout.max_new_tokens={rollout.max_new_tokens} tokens; set rollout.stop or rollout.stop_token_ids"
        )
    if chat.eos_ids and own_eos_ids and not chat.eos_ids & own_eos_ids:
        item.warn(
            f"the tokeniser ends a text with {_tokens(chat, chat.eos_ids)} and the model's config with "
            f"{_tokens(chat, own_eos_ids)}; both will end a response. If that is not meant, correct eos_token in tokenizer_config.json or "
            "eos_token_id in generation_config.json"
        )
    closing = _end_of_turn(chat)
    if ends and closing is not None and closing not in ends and not rollout.stop:
        item.warn(
            f"the chat template ends what the assistant says with {_tokens(chat, {closing})}, and that ends no response here: "
            f"the policy would go on after its turn. Set rollout.stop_token_ids=[{closing}]"
        )


def _encode(
    item: Item,
    rows: Iterator[Sequence[Message]],
    total: int,
    where: Callable[[int], str],
    chat: Chat,
    responses: Iterator[str] | None = None,
) -> Encoded:
    """Encode all rows, and their responses where they have any; those that cannot be are a failure."""
    encoded, bad, first = Encoded(), list[str](), dict[int, int]()
    for i, messages in enumerate(rows):
        response = next(responses) if responses else None
        try:
            ids = chat.encode(messages)
            ids += chat.encode_response(response) if response is not None else []
        except DataError as error:
            bad.append(f"{where(i)}: {error}")
            continue
        except ConfigError as error:  # of the tokeniser, so it would be said of every row
            item.fail(f"{where(i)}: {error}")
            return Encoded()
        encoded.lengths.append(len(ids))
        encoded.rows.append(i)
        if (earlier := first.setdefault(hash(tuple(ids)), i)) != i:
            encoded.repeats.append((i, earlier))
        if not chat.tokenizer.chat_template and [message["role"] for message in messages] != ["user"]:
            encoded.unroled.append(i)
    if bad:
        item.fail(f"{len(bad)} of {total} rows cannot be encoded; correct or remove them:\n{listed(bad)}")
    return encoded


def _check_room(
    item: Item, encoded: Encoded, where: Callable[[int], str], max_new_tokens: int, window: int, skip: bool
) -> None:
    room = window - max_new_tokens
    lines = [f"{where(encoded.rows[k])}: {n} tokens" for k, n in enumerate(encoded.lengths) if n > room]
    if not lines:
        return
    text = (
        f"{len(lines)} of {len(encoded.lengths)} prompts have more than the {room} tokens that the window of {window} "
        f"leaves beside rollout.max_new_tokens={max_new_tokens}"
    )
    if len(lines) == len(encoded.lengths):
        item.fail(f"{text}, so there is nothing to train on; lower rollout.max_new_tokens:\n{listed(lines)}")
    elif skip:
        item.warn(f"{text}, and will be skipped (data.long_prompts=skip):\n{listed(lines)}")
    else:
        item.fail(
            f"{text}; shorten or remove them, lower rollout.max_new_tokens, or set data.long_prompts=skip:\n{listed(lines)}"
        )


def _end_of_turn(chat: Chat) -> int | None:
    """The special token that the template puts after what the assistant said; None where it puts none, or refuses to say."""
    if not chat.tokenizer.chat_template:
        return None
    try:
        text = chat.tokenizer.apply_chat_template(list(_CONVERSATION), tokenize=False)
    except Exception:  # some templates want a system message, tools or alternating turns
        return None
    ids = chat.tokenizer(str(text).rpartition("answer")[2].strip(), add_special_tokens=False).input_ids
    return ids[0] if ids and ids[0] in chat.tokenizer.all_special_ids else None


def _tokens(chat: Chat, ids: frozenset[int] | set[int]) -> str:
    return " and ".join(f"{chat.pieces([i])[0]!r} ({i})" for i in sorted(ids))
