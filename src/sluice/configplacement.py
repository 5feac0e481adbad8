"""The sections of the config that say where the processes of a run are."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat

from sluice.configbase import FinitePositive, NonNegativeFloat, Section
from sluice.configengines import ServerEngine


class LocalPlacement(Section):
    name: Literal["local"] = "local"
    """All processes are on the machine of the run."""


class RayPlacement(Section):
    name: Literal["ray"] = "ray"
    """Ray puts engines, trainer ranks and reward processes on machines of a cluster; pip install 'sluice[ray]'."""
    address: str | None = Field(default=None, pattern=r"^(auto|[^/]+:\d+)$")
    """Of the cluster's head, HOST:PORT, or auto for the cluster that this machine belongs to; left out, a cluster of this machine alone
    is started, and ends with the run."""
    strategy: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"
    """How the processes lie on the machines. pack: on few. spread: on many. strict_pack: on one. strict_spread: each on another."""
    engine_cpus: PositiveFloat = 1.0
    """Reserved for an engine's own process (engine.process=own), or for a server. Rounded down it is also the number of its threads, if
    engine.num_threads is left out."""
    engine_gpus: NonNegativeFloat | None = None
    """Reserved for an engine's own process or for a server, or a share of one; left out, 1, or engine.tensor_parallel for a server, if
    the cluster has GPUs and model.device is not cpu."""
    rank_cpus: PositiveFloat = 1.0
    """Reserved for each rank of trainer.name=fsdp. Rounded down it is also the number of its threads, if trainer.num_threads is left
    out."""
    rank_gpus: NonNegativeFloat | None = None
    """Reserved for each rank of trainer.name=fsdp; left out, 1 if the cluster has GPUs and model.device is not cpu."""
    reward_cpus: PositiveFloat = 1.0
    """Reserved for a reward process."""
    env: dict[str, str] = Field(default={}, strict=False)
    """Environment variables of the processes, over those that their machines have."""
    start_limit_s: FinitePositive = 300.0
    """Longest wait for room in the cluster, and for a process to start there."""
    lost_after_s: FinitePositive = 20.0
    """A machine that has not answered for so long is lost; its processes are started elsewhere."""

    def check_fits(self, engine_apart: bool, has_ranks: bool, weights_go_by: str) -> None:
        """Raises ValueError for what cannot work, and for what would have no effect."""
        if engine_apart and weights_go_by == "shared_memory":
            raise ValueError(
                "engine.publication=shared_memory cannot work with placement.name=ray, where an engine may be on another machine; set "
                "engine.publication=broadcast, or leave it out"
            )
        for name in ("engine_cpus", "engine_gpus"):
            if not engine_apart and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"placement.{name} has no effect: no process is started for the engine; set engine.process=own, or leave it out"
                )
        for name in ("rank_cpus", "rank_gpus"):
            if not has_ranks and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"placement.{name} has no effect without trainer.name=fsdp; leave it out")

    def check_server(self, engine: ServerEngine) -> None:
        """Raises ValueError for what cannot work with a server."""
        if engine.gpus:
            raise ValueError(
                "engine.gpus cannot work with placement.name=ray, which chooses GPUs of whatever machine a server is on; leave it out, and "
                "say with placement.engine_gpus how many each takes"
            )
        if self.engine_gpus and engine.tensor_parallel > 1 and self.engine_gpus != engine.tensor_parallel:
            raise ValueError(
                f"placement.engine_gpus={self.engine_gpus:g} cannot work with engine.tensor_parallel={engine.tensor_parallel}, for which a "
                "server takes as many GPUs; leave it out"
            )
