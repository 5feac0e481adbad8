"""What Ray knows of one process: an actor with its resources, which starts the process as a child of its own and waits for its end.

Ray starts no actor again by itself: how often that may happen is decided by those who talk to the process, here as on one machine.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from sluice.distributed.calling_back import Number
from sluice.distributed.cluster import Cluster
from sluice.errors import PlacementError, SluiceError, boundary
from sluice.processes import Died, cause_of, kill_group, spawn

_CALL_LIMIT_S = 30.0
"""For the actor to reach the driver."""
_ASK_LIMIT_S = 5.0
"""For it to say how its process ended; one on a lost machine never does."""


class Actor:
    """The driver's end of one. Its references to Ray are let go in `kill`, or before Ray shuts down, and by no garbage collector: that might
    be at work when this process has joined another cluster, where actors get the same ids again."""

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        number: Number,
        module: str,
        path: Sequence[str],
        folder: str,
        variables: Mapping[str, str],
    ) -> None:
        self._cluster, self._name = cluster, name
        with cluster.in_use():
            self._handle: Any = ray.remote(_Host).options(max_restarts=0, **cluster.options(name)).remote()
            self._start: Any = self._handle.start.remote(number, module, list(path), folder, dict(variables))
            cluster.actors.add(self)

    def started(self) -> tuple[str, int] | None:
        """Node and number of the process, once it runs. Raises Died when the actor has died, PlacementError when it could not start it."""
        failure: SluiceError | None = None
        with self._cluster.in_use():
            start = self._start
            if start is None:
                raise self._closed_early()
            if not ray.wait([start], timeout=0)[0]:
                return None
            try:
                return ray.get(start, timeout=_ASK_LIMIT_S)
            except RayActorError as error:
                died = Died(f"the Ray actor of {self._name} died while it started it: {_reason(error)}")
                failure = self._closed_early() if self._start is None else died  # `kill` is called by other threads
            except RayError as error:
                cause = getattr(error, "cause", error)
                is_ours = isinstance(cause, SluiceError)
                failure = cause if is_ours else PlacementError(f"{self._name} could not be started: {cause}")
            start = None  # this frame lives as long as the error that it raises
        raise failure  # without the one of Ray behind it, which would hold on to Ray

    def cause_of_death(self) -> tuple[str, bool]:
        """As `Child.cause_of_death`."""
        with suppress(PlacementError), self._cluster.in_use():
            if (handle := self._handle) is None:
                return "it was closed", False
            try:
                return cause_of(ray.get(handle.exit_code.remote(1.0), timeout=_ASK_LIMIT_S))
            except GetTimeoutError:
                return "its machine does not answer", True
            except RayError as error:
                closed = self._handle is None
                return ("it was closed", False) if closed else (f"its Ray actor died: {_reason(error)}", True)
        return "the run has left the Ray cluster", False

    def _closed_early(self) -> PlacementError:
        return PlacementError(f"{self._name} was closed while it started")

    def kill(self) -> None:
        with suppress(PlacementError), self._cluster.in_use():
            handle = self._handle
            self.let_go()
            if handle is not None:
                ray.kill(handle)

    def let_go(self) -> None:
        self._handle = self._start = None
        self._cluster.actors.discard(self)


class _Host:
    """The actor: on its machine, the parent of the process."""

    def start(
        self, number: Number, module: str, path: list[str], folder: str, variables: dict[str, str]
    ) -> tuple[str, int]:
        node = ray.util.get_node_ip_address()
        if not os.path.isdir(folder):
            raise PlacementError(
                f"the folder {folder}, in which the run was started, does not exist on node {node}; start the run in a folder that "
                "all machines share"
            )
        with boundary(PlacementError, f"node {node} cannot reach the run's own at {number.host}:{number.port}"):
            self._talk = number.call("talk", _CALL_LIMIT_S)
            output = number.call("output", _CALL_LIMIT_S)
        with output:
            self._process = spawn(module, self._talk, output.fileno(), path, folder, variables)
        threading.Thread(target=self._end, daemon=True).start()
        return node, self._process.pid

    def _end(self) -> None:
        """Whatever the process has forked holds the connection too, and goes with it."""
        self._process.wait()
        kill_group(self._process)
        with suppress(OSError):
            self._talk.shutdown(socket.SHUT_RDWR)

    def exit_code(self, limit_s: float) -> int | None:
        with suppress(Exception):
            self._process.wait(limit_s)
        return self._process.returncode


def _reason(error: RayError) -> str:
    """The one sentence of Ray's page that says why."""
    text = str(error)
    _, found, reason = text.partition("The actor is dead because ")
    return (reason if found else text).split(". ")[0].splitlines()[0]
