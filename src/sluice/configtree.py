"""YAML as a tree of values that know where they were set: reading, merging, setting single keys, writing."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sluice.errors import ConfigError

KeyPath = tuple[str | int, ...]
COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Node:
    """A value of a config file, and where it was set."""

    value: Any
    """A dict of nodes, a list of nodes, or a scalar."""
    origin: str
    """`file.yaml:12`, or `command line`."""

    def plain(self) -> Any:
        """The value without origins."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        return [child.plain() for child in self.value] if isinstance(self.value, list) else self.value

    def find(self, path: KeyPath) -> Node | None:
        node = self
        for part in path:
            children: Any = dict(enumerate(node.value)) if isinstance(node.value, list) else node.value
            if not isinstance(children, dict) or part not in children:
                return None
            node = children[part]
        return node

    def nearest(self, path: KeyPath) -> Node:
        """What is at `path`, or else the innermost section around it."""
        return self.find(path) or self.nearest(path[:-1])


def read(file: str) -> Node:
    """The mapping in a YAML file; an empty one when the file holds nothing. Raises ConfigError with file and line."""
    path = Path(file)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = [str(path.parent / name) for name in difflib.get_close_matches(path.name, names)]
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"config file {file} does not exist{hint}") from None
    except OSError as error:
        raise ConfigError(f"config file {file} cannot be read: {error.strerror}") from None
    node = _parse(content, lambda line: f"{file}:{line}")
    if node is not None and not isinstance(node.value, dict):
        raise ConfigError(f"{node.origin}: a config file is a mapping of sections, not {shown(node.plain())}")
    return Node(node.value if node else {}, file)


def merge(old: Node, new: Node) -> Node:
    """`new` over `old`: mappings key by key, anything else replaced."""
    if not (isinstance(old.value, dict) and isinstance(new.value, dict)):
        return new
    both = {key: merge(old.value[key], new.value[key]) for key in old.value.keys() & new.value.keys()}
    return Node(old.value | new.value | both, new.origin)


def override(tree: Node, setting: str) -> Node:
    """The tree with `key.path=value` set; the value is YAML. Raises ConfigError when that cannot be done."""
    key, equals, text = setting.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        hint = "; config files come before key=value settings" if os.path.isfile(setting) else ""
        raise ConfigError(
            f"{COMMAND_LINE}: {setting!r} is not a setting: write key.path=value, "
            f"e.g. trainer.learning_rate=1e-5 or rewards.0.weight=0.5{hint}"
        )
    try:
        node = _parse(text, lambda line: COMMAND_LINE, comments=False)
    except ConfigError as error:
        raise ConfigError(f"{error}, in {setting}; put text in quotes: {key}='\"…\"'") from None
    return _assign(tree, (), key.split("."), node or Node(None, COMMAND_LINE))


def leaves(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Paths of everything in a plain tree that has nothing below it."""
    if not _has_children(value):
        yield path
        return
    for key, child in _children(value):
        yield from leaves(child, (*path, key))


def write(value: Any, origins: Mapping[str, str]) -> str:
    """A plain tree as YAML, each leaf on a line of its own with its origin, looked up by dotted path, as a comment."""
    return "".join(f"{line}\n" for line in _block(value, (), origins))


def inline(value: Any) -> str:
    """A plain value as YAML on one line."""
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, default_style=style, width=math.inf, allow_unicode=True
    )
    return text.removesuffix("...\n").rstrip("\n")


def shown(value: Any) -> str:
    """A plain value as error messages show it."""
    text = repr(value) if isinstance(value, str) else inline(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


# PyYAML follows YAML 1.1, in which 5e-5 is a text, `no` is false, 1:30 is 90 and 010 is 8; YAML 1.2 ended that.

_TAG = "tag:yaml.org,2002:"
_DIGITS = list("-+0123456789")
_PLAIN_SCALARS: dict[str, tuple[str, list[str]]] = {  # regular expression, and the characters it can begin with
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", ["t", "T", "f", "F"]),
    "int": (r"[-+]?[0-9]+(_[0-9]+)*", _DIGITS),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*_DIGITS, "."],
    ),
}
_CONSTRUCT: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": int,
    "float": lambda text: float(re.sub(r"\.(?=[inIN])", "", text)),  # .inf and .nan
    "str": str,
}


class _Loader(yaml.SafeLoader):
    """Knows the plain scalars of YAML 1.2 and no others."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - where PyYAML looks for them


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would take for something else, so that other readers agree with us."""


for _kind, (_pattern, _first) in _PLAIN_SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _kind, re.compile(f"^(?:{_pattern})$"), _first)


def _parse(content: bytes | str, origin: Callable[[int], str], comments: bool = True) -> Node | None:
    """The one YAML document in `content`; None when there is nothing in it."""
    try:
        root = yaml.compose(content, _Loader)
        if not comments and content[root.end_mark.index if root else 0 :].strip():
            raise ConfigError(f"{origin(1)}: '#' begins a comment")
        return root and _node(root, root, origin)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where, why = origin(mark.line + 1 if mark else 1), ", ".join(filter(None, [error.context, error.problem]))
        raise ConfigError(f"{where}: not YAML: {why}") from None
    except yaml.reader.ReaderError as error:
        line = len(content[: error.position + 1].splitlines())
        raise ConfigError(f"{origin(line)}: not YAML: {error.reason}, in byte {error.position}") from None
    except RecursionError:
        raise ConfigError(f"{origin(1)}: nested too deeply, or an anchor that contains itself") from None


def _node(node: yaml.Node, at: yaml.Node, origin: Callable[[int], str]) -> Node:
    """`at` is the node whose line is the origin: for the values of a mapping, their keys."""
    where = origin(at.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        return Node([_node(child, child, origin) for child in node.value], where)
    if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
        children: dict[str, Node] = {}
        for key, child in node.value:
            here = origin(key.start_mark.line + 1)
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{here}: a key must be a word, not a list or a mapping")
            if key.value in children:
                raise ConfigError(f"{here}: {key.value!r} is already set at {children[key.value].origin}")
            children[key.value] = _node(child, key, origin)
        return Node(children, where)
    if isinstance(node, yaml.ScalarNode):
        with suppress(KeyError, ValueError):
            return Node(_CONSTRUCT[node.tag.removeprefix(_TAG)](node.value), where)
    raise ConfigError(f"{where}: this cannot be read as {node.tag.replace(_TAG, '!!')}")


def _assign(node: Node, path: KeyPath, keys: list[str], new: Node) -> Node:
    """`node`, which is at `path`, with `new` set below it under `keys`."""
    if not keys:
        return merge(node, new)
    key, value, here = keys[0], node.value, dotted(path)
    there = f"{COMMAND_LINE}: {dotted((*path, *keys))}"
    if isinstance(value, list):
        if not key.isdecimal() or int(key) >= len(value):
            raise ConfigError(f"{there}: {here} has {len(value)} items, counted from 0, and no {key}")
        items = list(value)
        items[int(key)] = _assign(items[int(key)], (*path, int(key)), keys[1:], new)
        return Node(items, node.origin)
    if value is None and key.isdecimal():
        raise ConfigError(f"{there}: {here} is not set, so it has no item {key}; set the list: {here}=[…]")
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{there}: {here} is {shown(value)} ({node.origin}) and has no keys")
    children = value or {}
    child = children.get(key, Node(None, COMMAND_LINE))
    return Node({**children, key: _assign(child, (*path, key), keys[1:], new)}, node.origin)


def _has_children(value: Any) -> bool:
    return isinstance(value, (dict, list, tuple)) and len(value) > 0


def _children(value: Any) -> Any:
    return value.items() if isinstance(value, dict) else enumerate(value)


def _block(value: Any, path: KeyPath, origins: Mapping[str, str]) -> list[str]:
    lines: list[str] = []
    for key, child in _children(value):
        at = (*path, key)
        nested = _has_children(child)
        inner = _block(child, at, origins) if nested else [f"{inline(child)}  # {origins[dotted(at)]}"]
        if isinstance(key, int):
            lines += [f"{'  ' if i else '- '}{line}" for i, line in enumerate(inner)]
        elif nested:
            lines += [f"{key}:", *(f"  {line}" for line in inner)]
        else:
            lines.append(f"{key}: {inner[0]}")
    return lines
