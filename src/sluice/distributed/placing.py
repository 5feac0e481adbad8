"""Ray decides on which machine a process runs. The process itself, and what is said to it, is the same as on one machine.

For each there is an actor with its resources, which starts the process as a child of its own and waits for its end. Ray starts no
actor again by itself: how often that may happen is decided by those who talk to the process, here as on one machine.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sluice.distributed.calling_back import Listener, Number
from sluice.errors import PlacementError, SluiceError, boundary
from sluice.processes import Died, Launch, cause_of, kill_group, spawn

_OBJECT_STORE_BYTES = 100 * 2**20
"""Of a cluster of our own: nothing that is large goes through Ray, and by default it would take a third of the memory."""
_PROBE_LIMIT_S = 10.0
_CALL_LIMIT_S = 30.0
_ASK_LIMIT_S = 5.0
"""For an actor to say how its process ended; one on a lost machine never does."""
_LAST_WORDS_S = 1.0
_LONGEST_LINE = 2**16


@dataclass(frozen=True)
class Place:
    """What is reserved for one process, from the beginning of the run to its end."""

    name: str
    """engine-0, reward-3 …"""
    cpus: float
    gpus: float = 0.0

    def resources(self) -> dict[str, float]:
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}


class Cluster:
    """A Ray cluster that this process has joined, and the places that it has there."""

    def __init__(
        self,
        address: str | None,
        *,
        num_cpus: float,
        variables: Mapping[str, str],
        start_limit_s: float,
        lost_after_s: float,
    ) -> None:
        """Without an address a cluster of this machine alone is started, with so many CPUs at least, and ends with `close`.

        `variables` are put into the environment of every process. `start_limit_s` bounds the wait for room and for the start of a
        process; a machine that has not answered for `lost_after_s` is lost. Raises PlacementError when there is no cluster.
        """
        self.address = address
        self.variables = dict(variables)
        self.start_limit_s, self.lost_after_s = start_limit_s, lost_after_s
        where = (
            f"placement.address={address}: no Ray cluster could be joined" if address else "Ray could not be started"
        )
        with _quiet(), boundary(PlacementError, where):
            if address:
                _probe(address)
                ray.init(address=address, log_to_driver=False, configure_logging=False)
            else:
                ray.init(
                    address="local",
                    num_cpus=max(
                        len(os.sched_getaffinity(0)), -int(-num_cpus // 1)
                    ),  # as many processes as are asked for
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    configure_logging=False,
                    # As on one machine without Ray: a process is ended by the system when memory is short, and not before.
                    _system_config={"memory_monitor_refresh_ms": 0},
                )
        self.host = ray.util.get_node_ip_address() if address else "127.0.0.1"
        self._group: Any = None
        self._places: dict[str, tuple[int, Place]] = {}

    def has_gpus(self) -> bool:
        return ray.cluster_resources().get("GPU", 0) > 0

    def reserve(self, places: Sequence[Place], strategy: str) -> None:
        """All places at once. `strategy` is Ray's word for how they lie on the machines: PACK, SPREAD, STRICT_PACK, STRICT_SPREAD.

        Raises PlacementError when there is no room in time.
        """
        self._places = {place.name: (index, place) for index, place in enumerate(places)}
        with boundary(PlacementError, "Ray could not reserve resources"):
            self._group = placement_group([place.resources() for place in places], strategy=strategy)
            has_room = self._group.wait(0 if self._can_never_hold(places) else self.start_limit_s)
        if not has_room:
            wanted = "; ".join(f"{place.name}: {_amounts(place.resources())}" for place in places)
            there = "; ".join(f"{node['NodeManagerAddress']}: {_amounts(node['Resources'])}" for node in _live_nodes())
            raise PlacementError(
                f"the Ray cluster has no room for the run (placement.strategy={strategy.lower()}, waited for "
                f"placement.start_limit_s={self.start_limit_s:g} s). Wanted: {wanted}. Its machines: {there}"
            )

    def _can_never_hold(self, places: Sequence[Place]) -> bool:
        """No machine comes to a cluster of this machine alone; to another one may."""
        gpus = sum(place.gpus for place in places)
        return self.address is None and gpus > ray.cluster_resources().get("GPU", 0)

    def launch(self, name: str) -> Launch:
        """Starts processes, one at a time, at the place of that name."""
        index, place = self._places[name]
        return partial(RayProcess, self, index, place)

    def actor(self, index: int, place: Place) -> Any:
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        options = {"num_cpus": place.cpus, "num_gpus": place.gpus, "max_restarts": 0, "scheduling_strategy": strategy}
        return ray.remote(_Host).options(**options).remote()

    def close(self) -> None:
        """Ends whatever still runs at its places."""
        ray.shutdown()


class RayProcess:
    """A child wherever Ray puts it: as `sluice.processes.Process` in all else."""

    def __init__(
        self,
        cluster: Cluster,
        index: int,
        place: Place,
        module: str,
        *,
        path: Sequence[str],
        folder: str,
        log: Path | None,
        variables: Mapping[str, str],
    ) -> None:
        self._name, self._log = place.name, log
        self._where = "a machine that Ray has not chosen yet"
        self._limit_s = cluster.start_limit_s
        self._killed = False
        self._socket: socket.socket | None = None
        self._printing: threading.Thread | None = None
        self._listener = Listener(cluster.host, cluster.lost_after_s)
        no_gpu = {} if place.gpus else {"CUDA_VISIBLE_DEVICES": ""}  # else it would see those of others
        everything = {**no_gpu, **variables, **cluster.variables}
        self._actor = cluster.actor(index, place)
        self._started = self._actor.start.remote(self._listener.number, module, list(path), folder, everything)

    def __str__(self) -> str:
        return f"{self._name} on {self._where}"

    def connect(self) -> socket.socket:
        try:
            lines = self._listener.both(self._limit_s, self._look)
            node, pid = ray.get(self._started, timeout=_CALL_LIMIT_S)
        except TimeoutError:  # of both kinds
            raise PlacementError(
                f"{self._name} did not start within {self._limit_s:g} s (placement.start_limit_s); is there room for it in the "
                f"cluster, and do its machines reach {self._listener.number.host}?"
            ) from None
        except RayError as error:
            raise self._not_started(error) from error
        self._where = f"node {node}, process {pid}"
        self._socket = lines["talk"]
        self._printing = threading.Thread(target=self._print, args=(lines["output"],), daemon=True)
        self._printing.start()
        return self._socket

    def _look(self) -> None:
        if self._killed:
            raise PlacementError(f"{self._name} was closed while it started")
        if ray.wait([self._started], timeout=0)[0]:
            try:
                ray.get(self._started)
            except RayError as error:
                raise self._not_started(error) from error

    def _not_started(self, error: RayError) -> SluiceError:
        if isinstance(error, RayActorError):
            return Died(f"the Ray actor of {self._name} died while it started it: {_reason(error)}")
        cause = getattr(error, "cause", error)
        return (
            cause if isinstance(cause, SluiceError) else PlacementError(f"{self._name} could not be started: {cause}")
        )

    def _print(self, output: socket.socket) -> None:
        """What the process says, line by line under its name, until it ends or its machine is lost."""
        prefix = f"({self}) ".encode()
        with (
            open(self._log or os.devnull, "ab", buffering=0) as file,
            output,
            output.makefile("rb") as lines,
            suppress(OSError),
        ):
            while line := lines.readline(_LONGEST_LINE):
                with suppress(OSError):  # a full disk must not stop the process, which waits until its words are read
                    file.write(prefix + line)

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
        try:
            cause = cause_of(ray.get(self._actor.exit_code.remote(1.0), timeout=_ASK_LIMIT_S))
        except GetTimeoutError:
            cause = "its machine does not answer", True
        except RayError as error:
            cause = f"its Ray actor died: {_reason(error)}", True
        if self._printing:
            self._printing.join(_LAST_WORDS_S)
        self.kill()
        return f"{cause[0]} ({self})", cause[1]

    def kill(self) -> None:
        self._killed = True
        if self._socket:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
        with suppress(Exception):  # Ray has been shut down, or has lost the actor
            ray.kill(self._actor)


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


@contextmanager
def _quiet() -> Generator[None]:
    """Ray prints nothing of its own, and leaves SIGTERM to us."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    # It prints there of every actor that dies, whatever `log_to_driver` is; we tell of it in our own words.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None  # pyright: ignore
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _probe(address: str) -> None:
    """Raises OSError when nobody listens there, for which Ray would wait many minutes."""
    host, _, port = (address if address != "auto" else os.environ.get("RAY_ADDRESS", "")).rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _PROBE_LIMIT_S).close()


def _live_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)) or "nothing"


def _reason(error: RayError) -> str:
    """The one sentence of Ray's page that says why."""
    text = str(error)
    _, found, reason = text.partition("The actor is dead because ")
    return (reason if found else text).split(". ")[0].splitlines()[0]
