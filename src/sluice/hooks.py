"""User code named by a dotted path: found, imported and checked before a run starts, not at step 40."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from sluice.errors import ConfigError


def resolve(dotted: str, arguments: tuple[str, ...], *, awaited: bool = False) -> Callable[..., Any]:
    """The callable at `module:function`, looked for in the current folder first.

    `arguments` names the positional arguments it will be called with, and `awaited` says whether it must be an
    `async def`. Raises ConfigError saying what is wrong with the path, the module or the signature.
    """
    module_name, _, name = dotted.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise ConfigError(f"{dotted!r} is no path to a function; write it as module:function, e.g. my_rewards:length")
    module = _import(dotted, module_name)
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, [n for n, value in vars(module).items() if callable(value)], n=1)
        hint = f"did you mean {module_name}:{near[0]}?" if near else f"define {name} there, or name another function"
        raise ConfigError(f"{dotted}: module {module_name} ({module.__file__}) has no {name!r}; {hint}")
    function = getattr(module, name)
    if not callable(function) or inspect.isclass(function):
        raise ConfigError(
            f"{dotted} is a {type(function).__name__}, not a function; "
            f"name a function that takes ({', '.join(arguments)})"
        )
    _check_signature(dotted, function, arguments)
    call = getattr(function, "__call__", None)  # noqa: B004  # an object may have an async __call__
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)
    if is_async and not awaited:  # its coroutine would pass for true, or for a score
        raise ConfigError(f"{dotted} is an `async def`; write a plain `def`: nothing awaits it")
    if awaited and not is_async:
        raise ConfigError(f"{dotted} is a plain `def`; write `async def`: it is awaited")
    return function


def raised_at(error: BaseException) -> str:
    """` at file:line` of the last frame in the user's own code, not Python's nor sluice's; empty if there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename}:{error.lineno}"
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    frames = [(file, line) for file, line in frames if not file.startswith((_OWN_FOLDER, "<frozen "))]
    users = [(file, line) for file, line in frames if not file.startswith(_LIBRARY_FOLDERS)]
    return " at {}:{}".format(*(users or frames)[-1]) if frames else ""


def innermost_place(frame: FrameType | None) -> str:
    """`file:line` of the innermost frame of the user's code or of sluice, of those from `frame` outwards; empty if there is none."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OWN_FOLDER) or not file.startswith((*_LIBRARY_FOLDERS, "<")):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def first_line(error: BaseException) -> str:
    """`Type: first line of its message`; the message is the user's own and may itself raise."""
    try:
        message = str(error).strip()
    except Exception:
        message = ""
    return f"{type(error).__name__}: {message.splitlines()[0]}" if message else type(error).__name__


def _import(dotted: str, module_name: str) -> ModuleType:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()  # the file may have been written a moment ago
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script without a main guard may well call sys.exit
        if isinstance(error, ModuleNotFoundError) and _is_or_holds(error.name, module_name):
            near = difflib.get_close_matches(module_name, [path.stem for path in Path(folder).glob("*.py")], n=1)
            hint = f"did you mean {near[0]}?" if near else "start sluice in the folder that holds it, or install it"
            raise ConfigError(
                f"{dotted}: no module {error.name!r} in {folder} or among the installed packages; {hint}"
            ) from error
        raise ConfigError(
            f"{dotted}: importing {module_name} raised {first_line(error)}{raised_at(error)}; "
            f"`python -c 'import {module_name}'` shows the whole traceback"
        ) from error


def _is_or_holds(missing: str | None, module_name: str) -> bool:
    """Whether the module that was not found is the one asked for or a package above it, not one that it imports."""
    return missing is not None and f"{module_name}.".startswith(f"{missing}.")


def _check_signature(dotted: str, function: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some callables written in C do not tell
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
        takes = inspect.Signature(bare)
        called = ", ".join(arguments)
        raise ConfigError(f"{dotted} takes {takes}; it is called with ({called}): {error}; give it these") from error


_OWN_FOLDER = str(Path(__file__).parent) + os.sep
_LIBRARY_FOLDERS = tuple({sysconfig.get_path(key) + os.sep for key in ("stdlib", "purelib", "platlib")})
