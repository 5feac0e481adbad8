"""Whether an engine that is a server can be started, or is there, and weights have a place: what is known before anything is started."""

from __future__ import annotations

import subprocess
import urllib.error
import urllib.request
from pathlib import Path

from sluice.config import TrainConfig
from sluice.configengines import ScriptedEngine, ServerEngine
from sluice.errors import ConfigError

LIMIT_S = 30.0


def check_engine(config: TrainConfig) -> str:
    """What is there of it, in words. Starts nothing, which would take a minute. Raises ConfigError."""
    engine = config.engine
    if isinstance(engine, ScriptedEngine):
        return ""
    if engine.publication_folder is not None:
        _check_folder(Path(engine.publication_folder))
    if not isinstance(engine, ServerEngine):
        return f"weights go by {config.weights_go_by()}"
    if engine.url:
        return _check_address(engine.url)
    assert engine.python  # one of the two is there
    return _check_python(engine.python, engine.package)


def _check_folder(folder: Path) -> None:
    probe = folder / ".sluice-check"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"engine.publication_folder={folder} cannot be written ({error}); name a folder that can be made, and that the engine sees"
        ) from None


def _check_python(python: str, package: str) -> str:
    """The package is looked for and not imported, which would take many seconds."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, timeout=LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"engine.python={python} does not run ({error}); name the Python that has {package} installed"
        ) from None
    if found.returncode:
        raise ConfigError(f"engine.python={python} has no package {package}; name the Python that has it installed")
    return f"{package} by {python}; it is not started"


def _check_address(url: str) -> str:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=LIMIT_S):
            return f"a server answers at {url}"
    except urllib.error.HTTPError as error:
        raise ConfigError(f"what answers at engine.url={url} is no such server ({error} for /health)") from None
    except OSError as error:
        raise ConfigError(f"no server answers at engine.url={url} ({error}); start it first") from None
