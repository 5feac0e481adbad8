"""Whether there is room for the processes of a run, in the cluster or on this machine."""

from __future__ import annotations

from sluice.config import TrainConfig
from sluice.configplacement import RayPlacement
from sluice.errors import PlacementError
from sluice.launch.checked import check_ray, num_cores
from sluice.launch.placing import cpus_of, reserved
from sluice.preflight.findings import Item, plural

LIMIT_S = 30.0
"""For room in a cluster, which other runs may have; a run waits as long as placement.start_limit_s."""


def check_places(config: TrainConfig, settings: RayPlacement) -> Item:
    """A cluster of this machine alone is not started for it."""
    item = Item("places")
    with item.failing():
        check_ray(config)
        if settings.address:
            _check_cluster(config, settings, item)
        else:
            wanted = cpus_of(config, settings)
            item.summary = f"{wanted:g} CPUs of this machine's {num_cores()}, in a cluster that is started for the run"
            if wanted > num_cores():
                item.warn(
                    f"placement reserves {wanted:g} CPUs, and this machine has {num_cores()} cores, which the processes will share; lower "
                    "engine.replicas, trainer.num_ranks, reward_workers, rollout.environment_workers, or what placement reserves for each"
                )
    return item


def _check_cluster(config: TrainConfig, settings: RayPlacement, item: Item) -> None:
    limited = settings.model_copy(update={"start_limit_s": min(settings.start_limit_s, LIMIT_S)})
    try:
        with reserved(config, limited) as (_, bundles):
            places = [place for bundle in bundles for place in bundle]
            cpus, gpus = sum(place.cpus for place in places), sum(place.gpus for place in places)
    except PlacementError as error:
        item.fail(f"{error}; `ray status` shows who has the rest")
        return
    item.summary = f"room for {plural(len(places), 'place')} at {settings.address}: {cpus:g} CPUs, {gpus:g} GPUs"
