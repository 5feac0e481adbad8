"""One process at a time in a run folder."""

from __future__ import annotations

import os
import socket
from collections.abc import Generator
from contextlib import contextmanager

from sluice.errors import RunFolderError
from sluice.tracking.rundir import RunDir


@contextmanager
def locked(rundir: RunDir) -> Generator[None]:
    """Hold the run folder. The lock dies with this process, however that ends. Raises RunFolderError when it is held."""
    import fcntl  # not on Windows, where nothing holds two runs apart

    with open(rundir.path / ".lock", "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, a forked child does not keep it
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise RunFolderError(
                f"the run folder {rundir.path} is in use by {file.read().strip() or 'another process'}; wait until it has "
                "ended, or stop it"
            ) from None
        except OSError as error:
            raise RunFolderError(
                f"the run folder {rundir.path} cannot be locked ({error.strerror}): its file system knows no locks; choose another "
                "one with run.folder=…"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
