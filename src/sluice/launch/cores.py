"""Which processes of a run share the cores of this machine, and how many threads each has."""

from __future__ import annotations

from sluice.config import EmbeddedEngine, FsdpTrainer, ScriptedEngine, TrainConfig
from sluice.configengines import ServerEngine
from sluice.configplacement import RayPlacement
from sluice.launch.checked import num_cores


def engines_here(config: TrainConfig) -> EmbeddedEngine | ServerEngine | None:
    """Engines whose own processes share this machine with the trainer."""
    engine, placement = config.engine, config.placement
    elsewhere = isinstance(placement, RayPlacement) and placement.address
    if isinstance(engine, ScriptedEngine) or not config.num_engines_apart() or elsewhere:
        return None
    return engine


def engine_threads(config: TrainConfig) -> int:
    """Of each engine's own process."""
    engine, placement = config.engine, config.placement
    assert not isinstance(engine, ScriptedEngine)
    on_ray = isinstance(placement, RayPlacement)
    cores = int(placement.engine_cpus) if on_ray else num_cores() // 2 // engine.replicas
    return engine.num_threads or max(1, cores)


def trainer_threads(config: TrainConfig) -> int | None:
    """Of the trainer's process: those that engines beside it leave; None: as many as torch takes, which is all cores."""
    engine = engines_here(config)
    if config.run.num_threads or engine is None:
        return config.run.num_threads
    return max(1, num_cores() - engine.replicas * engine_threads(config))


def ranks_elsewhere(config: TrainConfig) -> bool:
    """Whether the trainer's ranks are on machines of a cluster."""
    return isinstance(config.trainer, FsdpTrainer) and bool(getattr(config.placement, "address", None))


def rank_threads(config: TrainConfig) -> int:
    """Of each rank of the trainer."""
    settings, placement = config.trainer, config.placement
    assert isinstance(settings, FsdpTrainer)
    if isinstance(placement, RayPlacement):
        return settings.num_threads or max(1, int(placement.rank_cpus))
    engine = engines_here(config)
    used = engine.replicas * engine_threads(config) if engine else 0
    return settings.num_threads or max(1, (num_cores() - used) // settings.num_ranks)


def crowding(config: TrainConfig) -> str | None:
    """What is to be said of more threads of engines and trainer than this machine has cores."""
    engine = engines_here(config)
    if engine is None:
        return None
    own = engine_threads(config)
    if not isinstance(config.trainer, FsdpTrainer):
        trainer, whose = trainer_threads(config) or 1, "of the trainer"
    elif ranks_elsewhere(config):
        return None
    else:
        trainer = config.trainer.num_ranks * rank_threads(config)
        whose = f"of {config.trainer.num_ranks} ranks"
    if engine.replicas * own + trainer <= num_cores():
        return None
    return (
        f"{engine.replicas * own} threads of engines (engine.replicas, engine.num_threads) and {trainer} {whose} are more than the "
        f"{num_cores()} cores that this process may use, and threads that share a core wait for each other; lower one of them"
    )
