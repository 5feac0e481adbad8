"""Prompts and SFT pairs from rows: every row is checked before the first is used."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from sluice.data.sources import Row, Rows, did_you_mean
from sluice.errors import ConfigError, DataError
from sluice.types import Message, Prompt

T = TypeVar("T")
SHOWN_BAD_ROWS = 5


class BadRow(DataError):
    """A row that cannot be used; `lacks` are the columns that it should have had."""

    def __init__(self, reason: str, lacks: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.lacks = lacks


class _BuiltOnDemand(Sequence[T]):
    """What rows become, one at a time; nothing that is built is kept."""

    def __init__(self, rows: Rows, columns: Sequence[str]) -> None:
        self.rows = rows
        self._columns = columns

    @abstractmethod
    def _build(self, i: int, row: Row) -> T:
        """`row` has all the columns that are needed."""

    @property
    def fingerprint(self) -> str:
        """Identifies the data; see `Rows`."""
        return self.rows.fingerprint

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> T:  # type: ignore[override]  # slices are not needed
        i = range(len(self))[i]
        row = self.rows[i]
        if lacks := [name for name in self._columns if name not in row]:
            raise BadRow(f"{self.rows.where(i)}: lacks {_listed(lacks)}", lacks)
        try:
            return self._build(i, row)
        except BadRow as bad:
            raise BadRow(f"{self.rows.where(i)}: {bad}") from None


class PromptSet(_BuiltOnDemand[Prompt]):
    """The prompts of a table; made by `load_prompts`."""

    def __init__(
        self,
        rows: Rows,
        *,
        prompt: str,
        reference: str | None,
        reference_pattern: re.Pattern[str] | None,
        id: str | None,
        metadata: Collection[str],
        system_prompt: str | None,
    ) -> None:
        super().__init__(rows, [name for name in (prompt, reference, id, *metadata) if name is not None])
        self._prompt, self._reference, self._pattern = prompt, reference, reference_pattern
        self._id, self._metadata, self._system_prompt = id, metadata, system_prompt
        self._digits = len(str(len(rows)))

    def _build(self, i: int, row: Row) -> Prompt:
        return Prompt(
            id=self._id_of(i, row),
            messages=_messages(row[self._prompt], f"column {self._prompt!r}", self._system_prompt),
            reference=self._reference_of(row),
            metadata={name: row[name] for name in self._metadata},
            where=self.rows.where(i),
        )

    def _id_of(self, i: int, row: Row) -> str:
        if self._id is None:
            return f"{self.rows.name}-{i + 1:0{self._digits}d}"
        value = row[self._id]
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise BadRow(f"column {self._id!r} is {_kind(value)}, and an id is a text or a whole number")
        return _text(str(value), f"column {self._id!r}")

    def _reference_of(self, row: Row) -> Any:
        if self._reference is None:
            return None
        what = f"column {self._reference!r}"
        value = row[self._reference]
        if value is None:
            raise BadRow(f"{what} is null, and it is the reference")
        if self._pattern is None:
            return _text(value, what) if isinstance(value, str) else value
        found = self._pattern.search(_text(value, what))
        if found is None:
            raise BadRow(f"reference_pattern {self._pattern.pattern!r} is not found in {what}: {_short(value)}")
        answer = (found[1] or "").strip()
        if not answer:
            raise BadRow(f"reference_pattern {self._pattern.pattern!r} finds an empty reference in {what}")
        return answer


class SftRow(NamedTuple):
    """What to learn: the response to the messages."""

    messages: list[Message]
    response: str
    where: str


class SftSet(_BuiltOnDemand[SftRow]):
    """The prompt-response pairs of a table; made by `load_sft_rows`."""

    def __init__(self, rows: Rows, *, prompt: str, response: str, system_prompt: str | None) -> None:
        super().__init__(rows, [prompt, response])
        self._prompt, self._response, self._system_prompt = prompt, response, system_prompt

    def _build(self, i: int, row: Row) -> SftRow:
        messages = _messages(row[self._prompt], f"column {self._prompt!r}", self._system_prompt)
        response = _text(row[self._response], f"column {self._response!r}")
        return SftRow(messages, response, self.rows.where(i))


def load_prompts(
    rows: Rows,
    *,
    prompt: str,
    reference: str | None = None,
    reference_pattern: str | None = None,
    id: str | None = None,
    metadata: Collection[str] = (),
    system_prompt: str | None = None,
) -> PromptSet:
    """Check every row, then give the prompts by number; the arguments are the fields of `config.PromptData`.

    Raises DataError that lists the first bad rows with their places and reasons, and ConfigError for a pattern
    that cannot be used.
    """
    pattern = None if reference_pattern is None else _compiled(reference_pattern, reference)
    prompts = PromptSet(
        rows,
        prompt=prompt,
        reference=reference,
        reference_pattern=pattern,
        id=id,
        metadata=metadata,
        system_prompt=system_prompt,
    )
    row_of_id: dict[str, int] = {}

    def check(i: int) -> None:
        name = prompts[i].id
        if id is not None and (first := row_of_id.setdefault(name, i)) != i:
            raise BadRow(f"{rows.where(i)}: column {id!r} is {name!r}, as in {rows.where(first)}; an id names one row")

    _check_all(rows, check)
    return prompts


def load_sft_rows(rows: Rows, *, prompt: str, response: str, system_prompt: str | None = None) -> SftSet:
    """Check every row, then give the pairs by number; the arguments are the fields of `config.SftData`.

    Raises DataError that lists the first bad rows with their places and reasons.
    """
    pairs = SftSet(rows, prompt=prompt, response=response, system_prompt=system_prompt)
    _check_all(rows, pairs.__getitem__)
    return pairs


class PromptStream:
    """Prompts without end, by their position: epoch after epoch, each a permutation of its own."""

    def __init__(self, prompts: PromptSet, seed: int, shuffle: bool) -> None:
        self._prompts, self._seed, self._shuffle = prompts, seed, shuffle
        self._order: tuple[int, Sequence[int] | np.ndarray] = (-1, ())

    def __getitem__(self, position: int) -> Prompt:
        epoch, place = divmod(position, len(self._prompts))
        return self._prompts[int(self._order_of(epoch)[place])]

    def identity(self) -> dict[str, Any]:
        """Whatever the order depends on."""
        return {
            "length": len(self._prompts),
            "fingerprint": self._prompts.fingerprint,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def changed(self) -> str:
        """Which data file has other content than when the run began; empty when none has."""
        return self._prompts.rows.changed()

    def check_identity(self, identity: dict[str, Any]) -> None:
        """Raises DataError when it is of other data or of another order, so that positions there mean nothing here."""
        for name, now in self.identity().items():
            if identity[name] != now:
                raise DataError(
                    f"the prompts cannot be resumed: their {name} was {identity[name]!r} and is now {now!r}, so the old "
                    "position means nothing; resume with the data and seed of the run, or start a new run"
                )

    def _order_of(self, epoch: int) -> Sequence[int] | np.ndarray:
        if not self._shuffle:
            return range(len(self._prompts))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))
        return self._order[1]


def _check_all(rows: Rows, check: Callable[[int], Any]) -> None:
    """One pass over all rows; what `check` raises is collected into one error."""
    bad_rows = 0
    shown: list[str] = []
    lacking: dict[str, None] = {}
    for i in range(len(rows)):
        try:
            check(i)
        except DataError as error:
            bad_rows += 1
            if len(shown) < SHOWN_BAD_ROWS:
                shown.append(str(error))
            if isinstance(error, BadRow):
                lacking |= dict.fromkeys(error.lacks)
    if not bad_rows:
        return
    lines = [f"{bad_rows} of {len(rows)} rows of {rows.path} cannot be used:", *(f"  {line}" for line in shown)]
    if bad_rows > len(shown):
        lines.append(f"  … and {bad_rows - len(shown)} more")
    if lacking:
        lines.append("The columns are: " + ", ".join(rows.columns))
        unknown = [name for name in lacking if name not in rows.columns]
        lines += [f"No column {name!r}{hint}" for name in unknown if (hint := did_you_mean(name, rows.columns))]
    raise DataError("\n".join(lines))


def _compiled(pattern: str, reference: str | None) -> re.Pattern[str]:
    if reference is None:
        raise ConfigError("data.reference_pattern has no effect without data.reference, the column it is searched in")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"data.reference_pattern {pattern!r} is no regular expression: {error}") from None
    if not compiled.groups:
        raise ConfigError(
            f"data.reference_pattern {pattern!r} has no group; put the part that is the reference in parentheses, "
            "e.g. '#### (.+)'"
        )
    return compiled


def _messages(value: Any, what: str, system_prompt: str | None) -> list[Message]:
    if isinstance(value, list):
        messages = [_message(message, f"{what}, message {i + 1}") for i, message in enumerate(value)]
        if not messages:
            raise BadRow(f"{what} is an empty list of messages")
        if messages[-1]["role"] == "assistant":
            raise BadRow(f"{what} ends with an assistant message, so there is nothing to respond to")
        _text(messages[-1]["content"], f"the content of {what}, message {len(messages)}")
    elif isinstance(value, str):
        messages = [{"role": "user", "content": _text(value, what)}]
    else:
        raise BadRow(f"{what} is {_kind(value)}, and a prompt is a text or a list of messages")
    if system_prompt is None:
        return messages
    if messages[0]["role"] == "system":
        raise BadRow(f"{what} begins with a system message, and data.system_prompt would put another before it")
    return [{"role": "system", "content": system_prompt}, *messages]


def _message(value: Any, what: str) -> Message:
    if not isinstance(value, dict):
        raise BadRow(f"{what} is {_kind(value)}, not an object with role and content")
    for key in ("role", "content"):
        if not isinstance(value.get(key), str):
            raise BadRow(f"{what} has {_kind(value[key]) if key in value else 'nothing'} as {key}, not a text")
    _refuse_surrogates(value["content"], what)
    # Arrow gives every message of a table the keys of all others, as nulls, and templates ask whether a key is there.
    return {key: item for key, item in value.items() if item is not None}


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{what} is {_kind(value)}, not a text")
    if not value.strip():
        raise BadRow(f"{what} is blank")
    _refuse_surrogates(value, what)
    return value


def _refuse_surrogates(text: str, what: str) -> None:
    """JSON can spell half a character, which no tokeniser and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{what} has half a surrogate pair, {text[error.start]!a}, which is no character") from None


def _listed(columns: Sequence[str]) -> str:
    return ("the column " if len(columns) == 1 else "the columns ") + ", ".join(map(repr, columns))


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else "…" + text[-60:])
