"""From YAML files and `key.path=value` settings to a validated config that knows where each value came from.

`python -m sluice.configfile > docs/config.md` writes the reference of all keys from the classes in `sluice.config`.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sluice.config import SftConfig, TrainConfig
from sluice.configtree import COMMAND_LINE, KeyPath, Node, dotted, inline, leaves, merge, override, read, shown, write
from sluice.errors import ConfigError

Config = TypeVar("Config", bound=BaseModel)
Section = type[BaseModel]
DEFAULT = "default"


@dataclass(frozen=True)
class Resolved(Generic[Config]):
    """A config and where it came from."""

    config: Config
    origins: dict[str, str]
    """For every leaf, by key path (`rewards.0.weight`): `file.yaml:12`, `command line` or `default`."""


def load(root: type[Config], files: Sequence[str], overrides: Sequence[str] = ()) -> Resolved[Config]:
    """Read `files` over one another, then `overrides` (`key.path=value`), and validate the result as `root`.

    Mappings merge key by key, lists and single values are replaced; an override can set one item of a list
    (`rewards.0.weight=0.5`). Raises ConfigError with a line for everything that is wrong, saying where it was set.
    """
    tree = Node({}, COMMAND_LINE)
    for file in files:
        tree = merge(tree, read(file))
    for setting in overrides:
        tree = override(tree, setting)
    try:
        config = root.model_validate(_with_default_choices(root, tree.plain()))
    except ValidationError as error:
        raise ConfigError("\n".join(_messages(root, tree, error))) from None
    found = {path: tree.find(path) for path in leaves(config.model_dump())}
    return Resolved(config, {dotted(path): node.origin if node else DEFAULT for path, node in found.items()})


def dump(resolved: Resolved[Any]) -> str:
    """The whole tree as YAML, each leaf with its origin as a comment; `load` reads the same config from it."""
    return write(resolved.config.model_dump(), resolved.origins)


def _with_default_choices(root: Section, data: dict[str, Any]) -> dict[str, Any]:
    """`trainer.learning_rate` alone means the default trainer; pydantic wants the choice said in the data."""
    for key, field in root.model_fields.items():
        section = data.get(key)
        if isinstance(section, dict) and isinstance(field.default, BaseModel) and len(_sections(field.annotation)) > 1:
            section.setdefault("name", _choice(type(field.default)))
    return data


# What the classes say about a key


@dataclass(frozen=True)
class _Place:
    """A key of the tree."""

    path: KeyPath
    owners: list[Section]
    """The choices of the section that the key is in; a single one where there is no choice."""
    owner: Section
    """The one that was chosen."""
    options: list[Section]
    """The choices of the section that is at `path`; none for a leaf."""
    schema: dict[str, Any]
    """JSON schema of what may stand at `path`."""


def _place(root: Section, loc: KeyPath) -> _Place:
    """Follow the location of a pydantic error: keys, and pydantic's own names for the members of unions."""
    place, chosen = _Place((), [root], root, [root], {}), root
    for part in loc:
        path = (*place.path, part)
        if isinstance(part, int):
            schema = place.schema["items"] if "items" in place.schema else place.schema["prefixItems"][part]
            place = replace(place, path=path, schema=schema)
        elif place.options and chosen is None:
            chosen = next(option for option in place.options if _choice(option) == part)
        elif chosen is not None and place.options:
            field = chosen.model_fields.get(part)
            options = _sections(field.annotation) if field else []
            place = _Place(path, place.options, chosen, options, _schema(place.options, chosen, part))
            chosen = options[0] if len(options) == 1 else None
    return place


def _schema(owners: list[Section], owner: Section, key: str) -> dict[str, Any]:
    if key == "name" and len(owners) > 1:
        return {"anyOf": [each.model_json_schema()["properties"][key] for each in owners]}
    return owner.model_json_schema()["properties"].get(key, {})


def _sections(annotation: Any) -> list[Section]:
    """The sections that an annotation names: none for a leaf, several for a choice by `name`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _choice(option: Section) -> str:
    """The `name` that chooses this section."""
    return next(iter(get_args(option.model_fields["name"].annotation)), "module:function")


def _key_paths(section: Section, prefix: str = "") -> Iterator[str]:
    for key, field in section.model_fields.items():
        yield prefix + key
        item = "0." if get_origin(field.annotation) is tuple else ""
        for option in _sections(field.annotation):
            yield from _key_paths(option, f"{prefix}{key}.{item}")


_BOUNDS = {"exclusiveMinimum": "above", "minimum": "of at least", "exclusiveMaximum": "below", "maximum": "at most"}
_PATTERNS = {
    r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$": "text that looks like module:function",
    r"^(auto|[^/]+:\d+)$": "auto, HOST:PORT",
    r"^\w[\w.-]*$": "text of letters, digits and _ . - (neither . nor - first)",
    r"^https?://[\w.\-\[\]:]+$": "text that looks like http://host:port",
}


def _alternatives(schema: dict[str, Any]) -> list[str]:
    """What a value may be, in plain words."""
    match schema:
        case {"anyOf": members}:
            return [words for member in members for words in _alternatives(member)]
        case {"enum": choices}:
            return [str(choice) for choice in choices]
        case {"const": choice}:
            return [choice]
        case {"type": "integer" | "number" as kind}:
            bounds = [f"{words} {schema[bound]:g}" for bound, words in _BOUNDS.items() if bound in schema]
            return [" ".join(["a whole number" if kind == "integer" else "a number", " and ".join(bounds)]).strip()]
        case {"type": "object", "additionalProperties": item}:
            return [f"a mapping of names, each to {_any_of(_alternatives(item))}"]
        case {"type": "array"}:
            least, most = schema.get("minItems"), schema.get("maxItems")
            size = "" if least is None else f" of {least}" if least == most else f" of at least {least}"
            item = schema["items"] if "items" in schema else schema["prefixItems"][0]
            return [f"a list{size}, each {_any_of(_alternatives(item))}"]
        case {"type": "string"}:
            plain = "non-empty text" if schema.get("minLength") else "text"
            return [_PATTERNS[schema["pattern"]] if "pattern" in schema else plain]
        case {"type": kind}:
            return {"boolean": ["true", "false"], "null": ["null"]}[kind]
    return ["a section with keys"]


def _any_of(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


# Messages


def _messages(root: Section, tree: Node, error: ValidationError) -> list[str]:
    lines: dict[KeyPath, str] = {}
    for fault in error.errors(include_url=False):
        kind, loc = fault["type"], fault["loc"]
        if kind == "value_error":  # a check across fields, which names them itself
            lines[()] = str(fault.get("ctx", {})["error"])
            continue
        if kind == "union_tag_invalid":
            loc = (*loc, _choice(_place(root, loc).options[0]), "name")
        elif kind == "missing" and isinstance(loc[-1], int):  # a tuple that is too short
            kind, loc = "too_short", loc[:-1]
        place = _place(root, loc)
        describe = {"extra_forbidden": _unknown, "missing": _missing}.get(kind, _wrong)
        origin = tree.nearest(place.path).origin
        lines[place.path] = "\n".join(f"{origin}: {line}" for line in describe(root, tree, place))
    # pydantic calls a list too short when one of its items is wrong: only the inner fault is one
    return [line for path, line in lines.items() if not any(p != path and p[: len(path)] == path for p in lines)]


def _wrong(root: Section, tree: Node, place: _Place) -> list[str]:
    value, wanted = tree.nearest(place.path).plain(), _alternatives(place.schema)
    hint = ""
    if isinstance(value, str) and (near := difflib.get_close_matches(value.lower(), wanted, 1)):
        hint = f"; did you mean {near[0]!r}?"
    elif isinstance(value, (int, float)) and any("text" in words for words in wanted):
        hint = "; put it in quotes"
    return [f"{dotted(place.path)}: should be {_any_of(wanted)}, not {shown(value)}{hint}"]


def _missing(root: Section, tree: Node, place: _Place) -> list[str]:
    field = place.owner.model_fields[str(place.path[-1])]
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
        required = [key for key, inner in field.annotation.model_fields.items() if inner.is_required()]
        return [line for key in required for line in _missing(root, tree, _place(root, (*place.path, key)))]
    choice = place.path[-1] == "name" and len(place.owners) > 1
    key, meaning = dotted(place.path), _any_of(_alternatives(place.schema)) if choice else field.description
    return [f"missing key '{key}' ({meaning}): set it in the file or as {key}=… on the command line"]


def _unknown(root: Section, tree: Node, place: _Place) -> list[str]:
    above, key = place.path[:-1], str(place.path[-1])
    prefix = "".join(f"{part}." for part in above)
    said = f"unknown key '{prefix}{key}'"
    if "." in key:
        return [f"{said}: dots are for the command line; in a file, write the keys below one another"]

    def choice(key: str) -> str:
        names = [_choice(option) for option in place.owners if key in option.model_fields]
        return f"{prefix}name={' or '.join(names)}"

    keys = dict.fromkeys(key for option in (place.owner, *place.owners) for key in option.model_fields)
    if key in keys:
        name = tree.find((*above, "name")) or Node(_choice(place.owner), DEFAULT)
        return [f"{said}: '{key}' belongs to {choice(key)}, but {prefix}name={name.value} ({name.origin})"]
    if near := difflib.get_close_matches(key, keys, 1, cutoff=0.75):
        other = "" if near[0] in place.owner.model_fields else f" It belongs to {choice(near[0])}."
        return [f"{said}; did you mean '{prefix}{near[0]}'?{other}"]
    elsewhere: dict[str, dict[str, str]] = {}  # leaf -> path -> section
    for path in _key_paths(root):
        section, _, leaf = path.rpartition(".")
        elsewhere.setdefault(leaf, {})[path] = section or "the top level"
    if near := difflib.get_close_matches(key, elsewhere, 1, cutoff=0.75):
        paths = elsewhere[near[0]]
        return [f"{said}: '{near[0]}' is set under {' and '.join(paths.values())}: {', '.join(paths)}"]
    return [f"{said}; the keys {f'of {prefix[:-1]}' if prefix else 'there'} are {', '.join(keys)}"]


# Reference

_HOW_TO = """\
# Configuration

<!-- Generated from src/sluice/config.py; to write it anew: python -m sluice.configfile > docs/config.md -->

A run is described by YAML files and by settings on the command line:

```sh
sluice train base.yaml longer.yaml trainer.learning_rate=1e-5 rewards.0.weight=0.5 'rollout.stop=["\\n\\n"]'
```

- **Files** come first. A later file overrides an earlier one: sections merge key by key, lists and single values are
  replaced. YAML is read as version 1.2: `1e-5` is a number, and only `true` and `false` are booleans.
- **Settings**, `key.path=value`, override the files. The value is YAML; nothing after the `=` is null. Items of a list
  are counted from 0. Text with signs of YAML (`#`, `: `, or `[`, `{`, `*`, `&` … in front) needs quotes inside those of
  the shell: `'data.reference_pattern="#### (.+)"'`.
- **Defaults** hold for what neither sets. A key that does not exist is refused, and so is a setting that cannot work
  together with another. A section that is a choice by `name` has the keys of the chosen table and no others.
- **Origins**: `sluice config show` prints the whole config with the place where each value was set: a file and its
  line, the command line, or the default. What it prints can be read as a config file again.
"""


def reference() -> str:
    """Markdown of every key: type, default and meaning. It is docs/config.md."""
    lines: list[str] = [_HOW_TO]
    written: set[Section] = set()
    for root in (TrainConfig, SftConfig):
        lines += [f"## {root.__doc__}", "", *_table(root)]
        for key, field in root.model_fields.items():
            options = _sections(field.annotation)
            if not options:
                continue
            lines += [f"### {key}", ""]
            if get_origin(field.annotation) is tuple:
                lines += [f"{field.description} It is {_any_of(_alternatives(_schema([root], root, key)))}.", ""]
            if len(options) > 1:
                for option in options:
                    default = " (default)" if isinstance(field.default, option) else ""
                    meaning = option.model_fields["name"].description
                    lines += [
                        f"#### {key} with `name: {_choice(option)}`{default}",
                        "",
                        f"{meaning}",
                        "",
                        *_table(option, "name"),
                    ]
            elif options[0] in written:
                lines += [f"As [above](#{key}).", ""]
            else:
                lines += _table(options[0])
            written.update(options)
    return "\n".join(lines)


def _table(section: Section, without: str = "") -> list[str]:
    rows = [
        [f"`{key}`", _any_of(_alternatives(_schema([section], section, key))), _default(field), field.description or ""]
        for key, field in section.model_fields.items()
        if key != without and not _sections(field.annotation)
    ]
    cells = [["key", "type", "default", "meaning"], ["---"] * 4, *rows]
    lines = ["| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in row) + " |" for row in cells]
    return [*lines, ""] if rows else []


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else f"`{inline(field.default)}`"


if __name__ == "__main__":
    sys.stdout.write(reference())
