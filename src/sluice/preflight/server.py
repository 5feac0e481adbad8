"""Whether an engine that is a server can be started, or is there."""

from __future__ import annotations

import subprocess
import urllib.request
from pathlib import Path

from sluice.configengines import ServerEngine
from sluice.preflight.findings import Item

LIMIT_S = 30.0


def check_server(settings: ServerEngine) -> Item:
    """Starts none: that takes a minute, which the trial does without."""
    item = Item("engine")
    if settings.url:
        _check_address(settings.url, item)
    elif settings.python:
        _check_python(settings.python, settings.package, item)
    if settings.publication_folder and not _writable(Path(settings.publication_folder)):
        item.fail(f"engine.publication_folder={settings.publication_folder} cannot be written")
    return item


def _check_python(python: str, package: str, item: Item) -> None:
    """The package is looked for and not imported, which would take many seconds."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, timeout=LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        item.fail(f"engine.python={python} does not run ({error}); name the Python that has {package} installed")
        return
    if found.returncode:
        item.fail(f"engine.python={python} has no package {package}; name the Python that has it installed")
    item.summary = f"{package} by {python}; it is not started"


def _check_address(url: str, item: Item) -> None:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=LIMIT_S):
            item.summary = f"a server answers at {url}"
    except OSError as error:
        item.fail(f"no server answers at engine.url={url} ({error}); start it first")


def _writable(folder: Path) -> bool:
    probe = folder / ".sluice-check"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True
