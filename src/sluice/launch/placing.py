"""From a config to the places of a run's processes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sluice.config import FsdpTrainer, TrainConfig
from sluice.configengines import ServerEngine
from sluice.configplacement import RayPlacement
from sluice.processes import Launch, Process

if TYPE_CHECKING:
    from sluice.distributed.cluster import Place


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


@contextmanager
def placement_of(config: TrainConfig) -> Generator[Placement]:
    """Joins the cluster, if there is one, and leaves it. Raises PlacementError when that cannot be."""
    settings = config.placement
    if not isinstance(settings, RayPlacement):
        yield Placement()
        return

    from sluice.distributed.cluster import Cluster
    from sluice.distributed.process import RayProcess

    num_cpus = (
        config.num_engines_apart() * settings.engine_cpus
        + _num_ranks(config) * settings.rank_cpus
        + config.reward_workers * settings.reward_cpus
    )
    cluster = Cluster(
        settings.address,
        num_cpus=num_cpus,
        variables=settings.env,
        start_limit_s=settings.start_limit_s,
        lost_after_s=settings.lost_after_s,
    )
    try:
        places = _places(config, settings, cluster.has_gpus())
        cluster.reserve(places, settings.strategy.upper())
        on_gpus = any(place.gpus for place in places if place.name.startswith("trainer-"))
        yield Placement(lambda name: partial(RayProcess, cluster, name), cluster.host, on_gpus)
    finally:
        cluster.close()


def _places(config: TrainConfig, settings: RayPlacement, has_gpus: bool) -> list[Place]:
    from sluice.distributed.cluster import Place

    default = 1.0 if has_gpus and config.model.device != "cpu" else 0.0
    of_engine = config.engine.tensor_parallel if isinstance(config.engine, ServerEngine) else 1
    engine_gpus = default * of_engine if settings.engine_gpus is None else settings.engine_gpus
    rank_gpus = default if settings.rank_gpus is None else settings.rank_gpus
    ranks = [Place(f"trainer-{index}", settings.rank_cpus, rank_gpus) for index in range(_num_ranks(config))]
    engines = [
        Place(f"engine-{index}", settings.engine_cpus, engine_gpus) for index in range(config.num_engines_apart())
    ]
    rewards = [Place(f"reward-{index}", settings.reward_cpus) for index in range(config.reward_workers)]
    return ranks + engines + rewards


def _num_ranks(config: TrainConfig) -> int:
    return config.trainer.num_ranks if isinstance(config.trainer, FsdpTrainer) else 0
