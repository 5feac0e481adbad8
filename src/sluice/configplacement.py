"""The sections of the config that say where the processes of a run are."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sluice.configbase import FinitePositive, NonNegativeFloat, Section
from sluice.configengines import ServerEngine


class LocalPlacement(Section):
    name: Literal["local"] = "local"
    """All processes are on the machine of the run."""


class RayPlacement(Section):
    name: Literal["ray"] = "ray"
    """Ray puts engines, trainer ranks, reward and environment processes on machines of a cluster; pip install ray."""
    address: str | None = Field(default=None, pattern=r"^(auto|[^/]+:\d+)$")
    """Of the cluster's head, HOST:PORT, or auto for the cluster that this machine belongs to; left out, a cluster of this machine alone
    is started, and ends with the run."""
    strategy: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"
    """How the processes lie on the machines. pack: on few. spread: on many. strict_pack: on one. strict_spread: each on another."""
    layout: Literal["disaggregated", "colocated"] = "disaggregated"
    """Engines beside ranks of trainer.name=fsdp. disaggregated: each process has a place and GPUs of its own. colocated: each engine is on the
    machine and on the GPUs of its ranks, which are as many as it takes GPUs: engine.tensor_parallel of a server, else one."""
    engine_cpus: FinitePositive = 1.0
    """Reserved for an engine's own process (engine.process=own), or for a server. Rounded down it is also the number of its threads, if
    engine.num_threads is left out."""
    engine_gpus: NonNegativeFloat | None = None
    """Reserved for an engine's own process or for a server, or a share of one; left out, 1, or engine.tensor_parallel for a server, if
    the cluster has GPUs and model.device is not cpu."""
    rank_cpus: FinitePositive = 1.0
    """Reserved for each rank of trainer.name=fsdp. Rounded down it is also the number of its threads, if trainer.num_threads is left
    out."""
    rank_gpus: NonNegativeFloat | None = None
    """Reserved for each rank of trainer.name=fsdp; left out, 1 if the cluster has GPUs and model.device is not cpu."""
    reward_cpus: FinitePositive = 1.0
    """Reserved for a reward process."""
    environment_cpus: FinitePositive = 1.0
    """Reserved for an environment process (rollout.environment_workers)."""
    env: dict[str, str] = Field(default={}, strict=False)
    """Environment variables of the processes, over those that their machines have."""
    start_limit_s: FinitePositive = 300.0
    """Longest wait for room in the cluster, and for a process to start there."""
    lost_after_s: FinitePositive = 20.0
    """A machine that has not answered for so long is lost; its processes are started elsewhere."""

    def check_fits(self, engine_apart: bool, has_ranks: bool, has_environments: bool, weights_go_by: str) -> None:
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
        if not has_environments and self.environment_cpus != type(self).model_fields["environment_cpus"].default:
            raise ValueError(
                "placement.environment_cpus has no effect without rollout.environment_workers; leave it out"
            )

    def check_layout(self, num_ranks: int, num_engines: int, gpus_of_each: int) -> None:
        """Raises ValueError for what cannot work with layout=colocated, and for what would have no effect."""
        if self.layout == "disaggregated":
            return
        if not num_ranks or not num_engines:
            raise ValueError(
                "placement.layout=colocated has no effect without trainer.name=fsdp and engines in processes of their own; leave it out"
            )
        if num_ranks != num_engines * gpus_of_each:
            of_each = f" of {gpus_of_each} GPUs each (engine.tensor_parallel)" if gpus_of_each > 1 else ""
            raise ValueError(
                f"placement.layout=colocated cannot work with trainer.num_ranks={num_ranks} and engine.replicas={num_engines}{of_each}: every "
                "rank shares its GPU with one engine; let engines take as many GPUs as there are ranks"
            )
        if self.engine_gpus is not None:
            raise ValueError(
                "placement.engine_gpus has no effect with placement.layout=colocated, where an engine has the GPUs of its ranks; leave it "
                "out"
            )
        if self.rank_gpus not in (None, 0.0, 1.0):
            raise ValueError(
                f"placement.rank_gpus={self.rank_gpus:g} cannot work with placement.layout=colocated, where an engine has the whole GPUs of "
                "its ranks; set 0 or 1, or leave it out"
            )

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
