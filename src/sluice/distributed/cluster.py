"""A Ray cluster that is joined, or started for the run, and the places that the run has there."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sluice.errors import PlacementError, boundary

_OBJECT_STORE_BYTES = 100 * 2**20
"""Of a cluster of our own: nothing that is large goes through Ray, and by default it would take a third of the memory."""
_PROBE_LIMIT_S = 10.0
_USERS_LIMIT_S = 60.0
"""For the calls of Ray that other threads make, each of which has a limit below this one."""


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
        self._users, self._closed = 0, False
        self._changed = threading.Condition()
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

    @contextmanager
    def in_use(self) -> Generator[None]:
        """Around everything that touches Ray, which ends this process when it is touched while it shuts down. Raises PlacementError
        once it does."""
        with self._changed:
            if self._closed:
                raise PlacementError("the run has left the Ray cluster")
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def options(self, name: str) -> dict[str, Any]:
        """Of Ray, for an actor at the place of that name."""
        index, place = self._places[name]
        where = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        return {"num_cpus": place.cpus, "num_gpus": place.gpus, "scheduling_strategy": where}

    def close(self) -> None:
        """Ends whatever still runs at its places."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._users, _USERS_LIMIT_S)
        ray.shutdown()


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
