"""From a config to the places of a run's processes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sluice.config import EmbeddedEngine, TrainConfig
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

    def engine(self, index: int, fds: Sequence[int]) -> Launch:
        """One on this machine inherits the descriptors; one on another can do without."""
        return self.at(f"engine-{index}") if self.at else partial(Process, pass_fds=fds)

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

    num_engines = (
        config.engine.replicas if isinstance(config.engine, EmbeddedEngine) and config.has_engine_apart() else 0
    )
    cluster = Cluster(
        settings.address,
        num_cpus=num_engines * settings.engine_cpus + config.reward_workers * settings.reward_cpus,
        variables=settings.env,
        start_limit_s=settings.start_limit_s,
        lost_after_s=settings.lost_after_s,
    )
    try:
        cluster.reserve(_places(config, settings, num_engines, cluster.has_gpus()), settings.strategy.upper())
        yield Placement(lambda name: partial(RayProcess, cluster, name), cluster.host)
    finally:
        cluster.close()


def _places(config: TrainConfig, settings: RayPlacement, num_engines: int, has_gpus: bool) -> list[Place]:
    from sluice.distributed.cluster import Place

    gpus = settings.engine_gpus
    if gpus is None:
        gpus = 1.0 if has_gpus and config.model.device != "cpu" else 0.0
    engines = [Place(f"engine-{index}", settings.engine_cpus, gpus) for index in range(num_engines)]
    rewards = [Place(f"reward-{index}", settings.reward_cpus) for index in range(config.reward_workers)]
    return engines + rewards
