"""A process on a machine of the cluster, as those who talk to it see it: no other than one on their own machine."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from sluice.distributed.actors import Actor
from sluice.distributed.calling_back import Listener
from sluice.distributed.cluster import Cluster
from sluice.errors import PlacementError

_LAST_WORDS_S = 1.0
_LONGEST_LINE = 2**16


class RayProcess:
    """A child wherever Ray puts it: as `sluice.processes.Process` in all else."""

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        module: str,
        *,
        path: Sequence[str],
        folder: str,
        log: Path | None,
        variables: Mapping[str, str],
    ) -> None:
        """At the place of that name, where nothing else may run."""
        self._name, self._log = name, log
        self._where = "a machine that Ray has not chosen yet"
        self._limit_s = cluster.start_limit_s
        self._killed = False
        self._socket: socket.socket | None = None
        self._printing: threading.Thread | None = None
        self._listener = Listener(cluster.host, cluster.lost_after_s)
        everything = {**cluster.devices(name), **variables, **cluster.variables}
        self._actor = Actor(cluster, name, self._listener.number, module, path, folder, everything)

    def __str__(self) -> str:
        return f"{self._name} on {self._where}"

    def connect(self) -> socket.socket:
        try:
            lines, (node, pid) = self._listener.both(self._limit_s, self._actor.started)
        except TimeoutError:
            raise PlacementError(
                f"{self._name} did not start within {self._limit_s:g} s (placement.start_limit_s); is there room for it in the "
                f"cluster, and do its machines reach {self._listener.number.host}?"
            ) from None
        self._where = f"node {node}, process {pid}"
        self._socket = lines["talk"]
        prefix = f"({self}) ".encode()
        self._printing = threading.Thread(target=_print, args=(lines["output"], self._log, prefix), daemon=True)
        self._printing.start()
        return self._socket

    def is_running(self) -> bool:
        """As far as the connection tells; a machine that is lost takes its time to be."""
        if self._socket is None or self._killed:
            return False
        try:
            poll = select.poll()  # a socket with a time limit waits for as long before it reads, even with MSG_DONTWAIT
            poll.register(self._socket, select.POLLIN)
            return not poll.poll(0) or self._socket.recv(1, socket.MSG_PEEK) != b""
        except (OSError, ValueError):  # ValueError: closed
            return False

    def cause_of_death(self) -> tuple[str, bool]:
        cause, by_signal = self._actor.cause_of_death()
        if self._printing:
            self._printing.join(_LAST_WORDS_S)
        self.kill()
        return f"{cause} ({self})", by_signal

    def kill(self) -> None:
        self._killed = True
        if self._socket:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
        self._actor.kill()


def _print(output: socket.socket, log: Path | None, prefix: bytes) -> None:
    """What a process says, line by line behind its name, until it ends or its machine is lost."""
    with open(log or os.devnull, "ab", buffering=0) as file, output, output.makefile("rb") as lines, suppress(OSError):
        while line := lines.readline(_LONGEST_LINE):
            with suppress(OSError):  # a full disk must not stop the process, which waits until its words are read
                file.write(prefix + line)
