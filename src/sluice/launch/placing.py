"""From a config to the places of a run's processes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sluice.config import FsdpTrainer, TrainConfig
from sluice.configengines import ServerEngine
from sluice.configplacement import RayPlacement
from sluice.errors import ConfigError, RunStopped
from sluice.processes import Launch, Process

if TYPE_CHECKING:
    from sluice.distributed.cluster import Cluster, Place


@dataclass(frozen=True)
class Placement:
    """How the processes of a run are started."""

    at: Callable[[str], Launch] | None = None
    """What starts processes at the place of a name; None: all are on this machine."""
    host: str = "127.0.0.1"
    """Address of this machine, as the processes see it."""
    ranks_have_gpus: bool = False
    """Where they are elsewhere."""

    def engine(self, index: int, fds: Sequence[int] = ()) -> Launch:
        """One on this machine inherits the descriptors; one on another can do without."""
        return self.at(f"engine-{index}") if self.at else partial(Process, pass_fds=fds)

    def rank(self, index: int) -> Launch:
        return self.at(f"trainer-{index}") if self.at else Process

    def reward(self, index: int) -> Launch:
        return self.at(f"reward-{index}") if self.at else Process

    def environment(self, index: int) -> Launch:
        return self.at(f"environment-{index}") if self.at else Process


@contextmanager
def placement_of(config: TrainConfig) -> Generator[Placement]:
    """Joins the cluster, if there is one, and leaves it. Raises PlacementError when that cannot be, RunStopped after a SIGTERM."""
    settings = config.placement
    if not isinstance(settings, RayPlacement):
        yield Placement()
        return

    from sluice.distributed.process import RayProcess

    with reserved(config, settings) as (cluster, bundles):
        on_gpus = any(place.gpus for bundle in bundles for place in bundle if place.name.startswith("trainer-"))
        yield Placement(lambda name: partial(RayProcess, cluster, name), cluster.host, on_gpus)


@contextmanager
def reserved(config: TrainConfig, settings: RayPlacement) -> Generator[tuple[Cluster, list[list[Place]]]]:
    """The cluster, and what the run has there. Raises as `placement_of`."""
    from sluice.distributed.cluster import Cluster

    cluster = None
    try:
        with _stopped_by_sigterm():
            cluster = Cluster(
                settings.address,
                num_cpus=cpus_of(config, settings),
                variables=settings.env,
                start_limit_s=settings.start_limit_s,
                lost_after_s=settings.lost_after_s,
            )
        with _stopped_by_sigterm():
            bundles = bundles_of(config, settings, cluster.has_gpus())
            cluster.reserve(bundles, settings.strategy.upper())
        yield cluster, bundles
    finally:
        if cluster:
            cluster.close()


def cpus_of(config: TrainConfig, settings: RayPlacement) -> float:
    """Of all places."""
    return (
        config.num_engines_apart() * settings.engine_cpus
        + _num_ranks(config) * settings.rank_cpus
        + config.reward_workers * settings.reward_cpus
        + config.rollout.environment_workers * settings.environment_cpus
    )


@contextmanager
def _stopped_by_sigterm() -> Generator[None]:
    """While Ray starts or has no room yet, for which it may take minutes."""
    asked = threading.Event()

    def stop(*_: object) -> None:
        asked.set()
        raise InterruptedError("SIGTERM")

    if threading.current_thread() is not threading.main_thread():  # only the main thread may have handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if asked.is_set():  # whatever became of the exception: Ray catches some
            raise RunStopped("stopped by SIGTERM before the first step") from None


def bundles_of(config: TrainConfig, settings: RayPlacement, has_gpus: bool) -> list[list[Place]]:
    """What lies on one machine. Raises ConfigError for what cannot work on GPUs."""
    from sluice.distributed.cluster import Place

    default = 1.0 if has_gpus and config.model.device != "cpu" else 0.0
    rank_gpus = default if settings.rank_gpus is None else settings.rank_gpus
    engine_gpus = default * config.gpus_of_engine() if settings.engine_gpus is None else settings.engine_gpus
    shares = settings.layout == "colocated"
    _check_room_beside(config, shares and rank_gpus > 0)
    ranks = [Place(f"trainer-{index}", settings.rank_cpus, rank_gpus) for index in range(_num_ranks(config))]
    engines = [
        Place(f"engine-{index}", settings.engine_cpus, 0.0 if shares else engine_gpus, shares_gpus=shares)
        for index in range(config.num_engines_apart())
    ]
    users = [Place(f"reward-{index}", settings.reward_cpus) for index in range(config.reward_workers)]
    users += [
        Place(f"environment-{index}", settings.environment_cpus) for index in range(config.rollout.environment_workers)
    ]
    if not shares:
        return [[place] for place in ranks + engines + users]
    of_each = config.gpus_of_engine()
    together = [[*ranks[k * of_each : (k + 1) * of_each], engine] for k, engine in enumerate(engines)]
    return together + [[place] for place in users]


def _check_room_beside(config: TrainConfig, shares_gpus: bool) -> None:
    engine = config.engine
    if shares_gpus and isinstance(engine, ServerEngine) and engine.memory_fraction is None:
        raise ConfigError(
            f"placement.layout=colocated needs engine.memory_fraction with engine.name={engine.name}: by itself the server takes nearly all "
            "memory of GPUs on which ranks are too"
        )


def _num_ranks(config: TrainConfig) -> int:
    return config.trainer.num_ranks if isinstance(config.trainer, FsdpTrainer) else 0
