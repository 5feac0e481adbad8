"""A response that a regular expression would find a reference in, written from the expression where that is simple."""

from __future__ import annotations

import re

_WRITTEN = {"s": " ", "n": "\n", "t": "\t"}
_NOTHING = "AbBZ"


def response_from(pattern: str, reference: str) -> str | None:
    """The pattern's literals, with the reference in place of its one group; without a group, the reference.

    None where the pattern asks for more than that: classes, alternatives, several groups, look-around, counted repeats.
    `pattern` compiles.
    """
    groups = re.compile(pattern).groups
    if groups != 1:
        return None if groups else reference
    parts: list[str] = []
    i = 0
    while i < len(pattern):
        start, is_group = len(parts), pattern[i] == "("
        if is_group and pattern.startswith("(?", i) and not pattern.startswith("(?P<", i):
            return None
        written, i = (reference, _closing(pattern, i) + 1) if is_group else _written(pattern, i)
        if written is None:
            return None
        parts.append(written)
        repeat, i = _repeat(pattern, i)
        if repeat == "{" or (repeat and is_group):
            return None
        if repeat in ("*", "?"):
            del parts[start:]
    return "".join(parts)


def _written(pattern: str, i: int) -> tuple[str | None, int]:
    """What stands for the element at i, None where that takes more than a literal; and where it ends."""
    char = pattern[i]
    if char == "\\":
        escaped = pattern[i + 1]
        if escaped in _WRITTEN or not escaped.isalnum():
            return _WRITTEN.get(escaped, escaped), i + 2
        return "" if escaped in _NOTHING else None, i + 2
    if char in "^$":
        return "", i + 1
    if char == ".":
        return "" if pattern[i + 1 : i + 2] in ("*", "?") else None, i + 1
    return None if char in "[|" else char, i + 1


def _closing(pattern: str, start: int) -> int:
    """Where the parenthesis at `start` closes."""
    depth, i = 0, start
    while True:
        if pattern[i] == "\\":
            i += 1
        elif pattern[i] == "[":
            i = pattern.index("]", i + 2)  # a bracket that comes first is a member
        else:
            depth += {"(": 1, ")": -1}.get(pattern[i], 0)
            if depth == 0:
                return i
        i += 1


def _repeat(pattern: str, i: int) -> tuple[str, int]:
    """The quantifier at i, if there is one, and the position after it and its lazy or possessive mark."""
    mark = pattern[i : i + 1]
    if not mark or mark not in "*+?{":
        return "", i
    return mark, i + 1 + (pattern[i + 1 : i + 2] in ("?", "+"))
