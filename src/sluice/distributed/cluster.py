"""A Ray cluster that is joined, or started for the run, and the places that the run has there."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sluice.errors import PlacementError, boundary

if TYPE_CHECKING:
    from sluice.distributed.actors import Actor

_OBJECT_STORE_BYTES = 100 * 2**20
"""Of a cluster of our own: nothing that is large goes through Ray, and by default it would take a third of the memory."""
_PROBE_LIMIT_S = 10.0
_PIECE_S = 1.0
_USERS_LIMIT_S = 60.0
"""For the calls of Ray that other threads make, each of which has a limit below this one."""


@dataclass(frozen=True)
class Place:
    """What is reserved for one process, from the beginning of the run to its end."""

    name: str
    """engine-0, reward-3 …"""
    cpus: float
    gpus: float = 0.0
    shares_gpus: bool = False
    """It has none of its own, and sees those of the places beside it."""

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
        _tame()
        self._folder: str | None = None
        """Of a cluster of our own."""
        with boundary(PlacementError, where), self._left_when_it_fails():
            if address:
                _probe(address)
                ray.init(address=address, log_to_driver=False, configure_logging=False)
            else:
                self._start(num_cpus)
        self.host = ray.util.get_node_ip_address() if address else "127.0.0.1"
        self._group: Any = None
        self.actors: set[Actor] = set()
        """That hold on to Ray."""
        self._users, self._closed = 0, False
        self._changed = threading.Condition()
        self._places: dict[str, tuple[int, Place]] = {}
        self._devices: dict[int, str] = {}
        """CUDA_VISIBLE_DEVICES of whoever has all GPUs of a bundle, by its number."""

    def _start(self, num_cpus: float) -> None:
        """A cluster that nobody else finds, by its folder."""
        self._folder = tempfile.mkdtemp(
            prefix="ray-", dir="/tmp" if os.path.isdir("/tmp") else None
        )  # of short sockets
        ray.init(
            address="local",
            num_cpus=max(len(os.sched_getaffinity(0)), -int(-num_cpus // 1)),  # as many processes as are asked for
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            # As on one machine without Ray: a process is ended by the system when memory is short, and not before.
            _system_config={"memory_monitor_refresh_ms": 0},
            _temp_dir=self._folder,
        )

    def has_gpus(self) -> bool:
        return ray.cluster_resources().get("GPU", 0) > 0

    def reserve(self, bundles: Sequence[Sequence[Place]], strategy: str) -> None:
        """All places at once, those of a bundle on one machine. `strategy` is Ray's word for how bundles lie on the machines: PACK, SPREAD,
        STRICT_PACK, STRICT_SPREAD.

        Raises PlacementError when there is no room in time.
        """
        self._places = {place.name: (index, place) for index, bundle in enumerate(bundles) for place in bundle}
        amounts = [_added(bundle) for bundle in bundles]
        with boundary(PlacementError, "Ray could not reserve resources"):
            self._group = placement_group(amounts, strategy=strategy)
            has_room = self._has_room(0.0 if self._can_never_hold(amounts, strategy) else self.start_limit_s)
            shared = [index for index, bundle in enumerate(bundles) if any(place.shares_gpus for place in bundle)]
            if has_room:
                self._devices = self._devices_of({index: amounts[index].get("GPU", 0.0) for index in shared})
        if not has_room:
            wanted = "; ".join(
                f"{' + '.join(place.name for place in bundle)}: {_amounts(amount)}"
                for bundle, amount in zip(bundles, amounts, strict=True)
            )
            there = "; ".join(f"{node['NodeManagerAddress']}: {_amounts(node['Resources'])}" for node in _live_nodes())
            apart = ", each on a machine of its own" if strategy == "STRICT_SPREAD" else ""
            raise PlacementError(
                f"the Ray cluster has no room for the run (placement.strategy={strategy.lower()}, waited for "
                f"placement.start_limit_s={self.start_limit_s:g} s). Wanted: {_amounts(_summed(amounts))} in {len(amounts)} places{apart}: "
                f"{wanted}. Its machines: {there}. Lower what placement reserves for each, or have fewer engines, ranks, reward_workers or "
                "environment_workers"
            )

    def _has_room(self, limit_s: float) -> bool:
        """Waits for it in short pieces, within each of which Ray lets no signal be handled."""
        end = time.monotonic() + limit_s
        while not self._group.wait(min(_PIECE_S, max(0.0, end - time.monotonic()))):
            if time.monotonic() >= end:
                return False
        return True

    def _devices_of(self, gpus: Mapping[int, float]) -> dict[int, str]:
        """Of bundles with so many GPUs, as Ray tells whoever asks for all of them."""
        asked = {
            index: ray.remote(_visible_devices).options(num_cpus=0, num_gpus=count, **self._where(index)).remote()
            for index, count in gpus.items()
            if count
        }
        return {index: ray.get(answer, timeout=self.start_limit_s) for index, answer in asked.items()}

    def _can_never_hold(self, amounts: Sequence[Mapping[str, float]], strategy: str) -> bool:
        """No machine comes to a cluster of this machine alone; to another one may."""
        gpus = _summed(amounts).get("GPU", 0.0)
        wants_more = gpus > ray.cluster_resources().get("GPU", 0) or (strategy == "STRICT_SPREAD" and len(amounts) > 1)
        return self.address is None and wants_more

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
        return {"num_cpus": place.cpus, "num_gpus": place.gpus, **self._where(index)}

    def _where(self, bundle: int) -> dict[str, Any]:
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        return {"scheduling_strategy": strategy}

    def devices(self, name: str) -> dict[str, str]:
        """Variables by which a process at the place of that name sees its GPUs: none where Ray sets them itself."""
        index, place = self._places[name]
        return {} if place.gpus else {"CUDA_VISIBLE_DEVICES": self._devices.get(index, "") if place.shares_gpus else ""}

    def close(self) -> None:
        """Ends whatever still runs at its places."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._users, _USERS_LIMIT_S)
        for actor in list(self.actors):
            actor.let_go()
        self._group = None
        self._leave()

    def _leave(self) -> None:
        ray.shutdown()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def _left_when_it_fails(self) -> Generator[None]:
        """Nothing of a start of Ray that was broken off stays."""
        try:
            yield
        except BaseException:
            self._leave()
            raise


def _tame() -> None:
    """Ray prints nothing of its own, and leaves SIGTERM to us."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    # It prints there of every actor that dies, whatever `log_to_driver` is; we tell of it in our own words.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None  # pyright: ignore
    ray._private.utils.set_sigterm_handler = lambda *_: None  # pyright: ignore


def _probe(address: str) -> None:
    """Raises OSError when nobody listens there, for which Ray would wait many minutes."""
    host, _, port = (address if address != "auto" else os.environ.get("RAY_ADDRESS", "")).rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _PROBE_LIMIT_S).close()


def _visible_devices() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "")


def _added(places: Sequence[Place]) -> dict[str, float]:
    """The resources of all of them."""
    return _summed([place.resources() for place in places])


def _summed(amounts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    kinds = [name for name in ("CPU", "GPU") if any(name in of for of in amounts)]
    return {name: sum(of.get(name, 0.0) for of in amounts) for name in kinds}


def _live_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)) or "nothing"
