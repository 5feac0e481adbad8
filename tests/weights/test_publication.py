"""Each way in which weights reach an engine's process: what arrives is what was published, and who is gone is not waited for."""

from __future__ import annotations

import asyncio
import errno
import gc
import pickle
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from models import tiny_model
from sluice.errors import EngineError, TrainingError
from sluice.processes import Died
from sluice.trainers.model import PolicyModel
from sluice.weights import group
from sluice.weights.broadcast import Broadcast, Sender
from sluice.weights.disk import Disk
from sluice.weights.fingerprint import fingerprint
from sluice.weights.group import buckets
from sluice.weights.in_process import InProcessWeights, Updates
from sluice.weights.publication import Publication, WeightsMoved
from sluice.weights.shared_memory import SharedMemory

LIMIT_S = 20.0
WAYS: dict[str, Callable[[PolicyModel], Publication]] = {
    "shared memory": lambda model: SharedMemory(model.named_weights()),
    "broadcast": lambda model: Broadcast(model.named_weights(), limit_s=LIMIT_S),
    "disk": lambda model: Disk(None),
}


class Engine:
    """What the process of an engine does with its inlet, which came to it by pickle."""

    def __init__(self, publication: Publication, model: PolicyModel, name: str = "engine") -> None:
        self.link, self.model = publication.link(name), model
        self.inlet = pickle.loads(pickle.dumps(self.link.inlet))

    async def take(self, version: int) -> None:
        await self.link.deliver(version, lambda: asyncio.to_thread(self.inlet.read, self.model, version))

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.model.named_weights())


def move(model: PolicyModel) -> None:
    with torch.no_grad():
        for _, weight in model.named_weights():
            weight.add_(torch.randn_like(weight))


def whole(work: Awaitable[Any]) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(3 * LIMIT_S):
            return await work

    return asyncio.run(limited())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_what_arrives_is_what_was_published(
    way: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """To two engines, again and again, and to a process that takes the place of another in between. Bit for bit: tied weights too."""
    monkeypatch.setattr(group, "BUCKET_BYTES", 5000)  # no multiple of any tensor
    trainer = tiny_model(architecture)
    publication = WAYS[way](trainer)
    updates = Updates()

    async def run() -> None:
        publication.belongs_to(tmp_path)
        engines = [Engine(publication, tiny_model(architecture), name) for name in ("engine", "other")]
        moved = 0
        for version in range(4):
            move(trainer)
            if version == 2:
                engines[0] = Engine(publication, tiny_model(architecture))
            handle = InProcessWeights(trainer, updates)
            moved = await publication.publish(handle, version)
            await asyncio.gather(*(engine.take(version) for engine in engines))
            assert [engine.fingerprint for engine in engines] == 2 * [fingerprint(trainer.named_weights())]
        size = sum(weight.nbytes for _, weight in trainer.named_weights())
        assert size <= moved <= 1.2 * size + 10_000
        publication.close()

    whole(run())


def test_what_arrives_on_one_gpu_is_what_was_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where all share a bucket, here one in this process's memory, and gloo says whose turn it is."""
    shared: list[torch.Tensor] = []

    def exported(bucket: torch.Tensor) -> bytes:
        shared.append(bucket)
        return str(len(shared) - 1).encode()

    def joined(self: group.Group, device: torch.device) -> Any:
        store = group.dist.PrefixStore(self._wire_name, self.store)
        gloo = self.gloo(store, LIMIT_S)
        bucket = self._bucket_of_all(store, device)
        return group._OneMemory(gloo, bucket, self.rank == group.SENDER, partial(self.finish, gloo))

    monkeypatch.setattr(group, "exported", exported)
    monkeypatch.setattr(group, "imported", lambda handle, device: shared[int(handle)])
    monkeypatch.setattr(group.Group, "_joined", joined)
    test_what_arrives_is_what_was_published("broadcast", "qwen3", tmp_path, monkeypatch)
    assert shared


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_another_process_on_the_gpu_takes_what_was_published(tmp_path: Path):
    """By CUDA IPC: both see the bucket."""
    trainer = PolicyModel(tiny_model("qwen3").model.to("cuda"))
    publication = Broadcast(trainer.named_weights(), limit_s=60.0)
    link = publication.link("server")
    (tmp_path / "inlet").write_bytes(pickle.dumps(link.inlet))
    code = (
        "import pickle, sys, torch; from sluice.weights.fingerprint import fingerprint\n"
        "inlet = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(fingerprint(inlet.tensors(0, torch.device('cuda'), 0)), inlet._group._wire.buffer.device)"
    )

    async def run() -> bytes:
        await publication.publish(InProcessWeights(trainer), 0)
        taker = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, str(tmp_path / "inlet"), stdout=asyncio.subprocess.PIPE
        )
        said: list[bytes] = []

        async def take_over() -> None:
            said.append((await taker.communicate())[0])

        await link.deliver(0, take_over)
        return said[0]

    assert whole(run()).decode().split() == [fingerprint(trainer.named_weights()), "cuda:0"]


def test_all_workers_of_a_server_get_all_tensors(monkeypatch: pytest.MonkeyPatch):
    """As new ones, whole, in buckets that cut through them."""
    monkeypatch.setattr(group, "BUCKET_BYTES", 5000)
    trainer, updates = tiny_model("qwen3"), Updates()
    publication = Broadcast(trainer.named_weights(), limit_s=LIMIT_S)
    link = publication.link("server", 3)
    inlets = [pickle.loads(pickle.dumps(link.inlet)) for _ in range(3)]

    def taken(number: int, version: int) -> str:
        return fingerprint(inlets[number].tensors(version, torch.device("cpu"), number))

    async def run() -> None:
        for version in range(2):
            move(trainer)
            await publication.publish(InProcessWeights(trainer, updates), version)
            found: list[str] = []

            async def take_over(version: int = version, found: list[str] = found) -> None:
                found += await asyncio.gather(*(asyncio.to_thread(taken, k, version) for k in range(3)))

            await link.deliver(version, take_over)
            assert found == 3 * [fingerprint(trainer.named_weights())]

    whole(run())


def test_a_version_that_is_there_is_not_published_twice(tmp_path: Path):
    """Several engines share one publication, and each asks for it."""
    for way in ("shared memory", "disk"):
        trainer = tiny_model("qwen3")
        publication = WAYS[way](trainer)
        publication.belongs_to(tmp_path)
        moved = [whole(publication.publish(InProcessWeights(trainer), 1)) for _ in range(2)]
        assert moved[0] > 0
        assert moved[1] == 0


def test_buckets_are_bounded_and_hold_everything_in_order():
    parts = [torch.arange(n, dtype=torch.uint8) for n in (3, 0, 10, 1, 7, 4)]
    found = list(buckets(parts, 4))
    assert all(sum(map(len, bucket)) == 4 for bucket in found[:-1])
    assert torch.cat([part for bucket in found for part in bucket]).equal(torch.cat(parts))


def test_a_version_on_disk_appears_whole_and_the_one_before_goes(tmp_path: Path):
    trainer, disk = tiny_model("qwen3"), Disk(tmp_path / "shared")
    disk.belongs_to(Path("runs/some"))
    folder = disk.folder
    assert folder.parent == tmp_path / "shared"
    seen: list[list[str]] = []

    class Watched(InProcessWeights):
        async def save(self, to: str, **words: Any) -> None:
            await super().save(to, **words)
            seen.append(sorted(path.name for path in folder.iterdir()))

    for version in range(3):
        whole(disk.publish(Watched(trainer), version))
    assert seen[2] == [".version-000002.partial", "version-000001"]
    assert [path.name for path in folder.iterdir()] == ["version-000002"]
    disk.close()
    assert not folder.exists()


def test_runs_of_one_name_do_not_meet_in_a_folder(tmp_path: Path):
    trainer, disks = tiny_model("qwen3"), [Disk(tmp_path), Disk(tmp_path)]
    for disk, run in zip(disks, ["mine/runs/some", "yours/runs/some"], strict=True):
        disk.belongs_to(Path(run))
        whole(disk.publish(InProcessWeights(trainer), 0))
    disks[0].close()
    assert disks[1].of(0).is_dir()
    disks[1].close()
    assert not any(tmp_path.iterdir())


def test_what_is_not_ours_stays_in_the_folder(tmp_path: Path):
    """A folder of that name was there before."""
    trainer, disk = tiny_model("qwen3"), Disk(tmp_path)
    disk.belongs_to(Path("runs/some"))
    folder = disk.folder
    folder.mkdir()
    (folder / "config.json").touch()
    whole(disk.publish(InProcessWeights(trainer), 0))
    disk.close()
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_a_version_that_finds_no_room_leaves_nothing(tmp_path: Path):
    class TooLarge(InProcessWeights):
        async def save(self, to: str, **words: Any) -> None:
            await super().save(to, **words)
            raise OSError(errno.ENOSPC, "No space left on device")

    disk = Disk(tmp_path / "shared")
    disk.belongs_to(Path("runs/some"))
    with pytest.raises(EngineError, match=r"cannot be published in .*No space left on device"):
        whole(disk.publish(TooLarge(tiny_model("qwen3")), 0))
    assert not any(disk.folder.iterdir())
    disk.close()
    assert not disk.folder.exists()


def test_an_engine_that_does_not_see_the_folder_says_so(tmp_path: Path):
    disk = Disk(tmp_path)
    disk.belongs_to(Path("runs/some"))
    engine = Engine(disk, tiny_model("qwen3"))
    with pytest.raises(EngineError, match=r"does not see .*version-000000; set engine\.publication_folder"):
        whole(engine.take(0))


def test_weights_that_a_rank_has_written_on_another_machine_are_missed(tmp_path: Path):
    class Elsewhere(InProcessWeights):
        async def save(self, folder: str, **words: Any) -> None:
            await super().save(str(tmp_path / "of another machine"))

    disk = Disk(tmp_path)
    disk.belongs_to(Path("runs/some"))
    with pytest.raises(EngineError, match=r"is empty here; set engine\.publication_folder"):
        whole(disk.publish(Elsewhere(tiny_model("qwen3")), 0))


def test_weights_are_not_written_while_an_engine_reads_them():
    """One that was started again reads the last version while the next one is published to the others."""
    trainer = tiny_model("qwen3")
    publication = SharedMemory(trainer.named_weights())
    order: list[str] = []

    async def run() -> None:
        await publication.publish(InProcessWeights(trainer), 0)

        async def read() -> None:
            await asyncio.sleep(0.05)
            order.append("read")

        reading = asyncio.create_task(publication.link("engine").deliver(0, read))
        await asyncio.sleep(0.01)
        await publication.publish(InProcessWeights(trainer), 1)
        order.append("written")
        await reading

    whole(run())
    assert order == ["read", "written"]


def test_other_weights_are_refused_by_name():
    publication = Broadcast(tiny_model("qwen3").named_weights(), limit_s=LIMIT_S)
    engine = Engine(publication, tiny_model("llama"))

    async def run() -> None:
        await publication.publish(InProcessWeights(tiny_model("qwen3")), 0)
        await engine.take(0)

    start = time.monotonic()
    with pytest.raises(
        EngineError, match=r"other weights than the trainer's: model\.layers\.0\.mlp\.gate_proj\.weight \[64, 32\]"
    ):
        whole(run())
    assert time.monotonic() - start < LIMIT_S / 2, "the trainer waited for it"


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_they_meet_at_an_address_of_ipv6():
    trainer = tiny_model("qwen3")
    publication = Broadcast(trainer.named_weights(), limit_s=LIMIT_S, host="::1")
    engine = Engine(publication, tiny_model("qwen3"))

    async def run() -> None:
        await publication.publish(InProcessWeights(trainer), 0)
        await engine.take(0)

    whole(run())
    assert engine.fingerprint == fingerprint(trainer.named_weights())


def test_a_publication_that_is_cancelled_tells_both_ends():
    """An engine that waits for the trainer, in a thread or in another process, need not wait for the end of the run."""
    model, ended = tiny_model("qwen3"), threading.Event()

    class Busy(InProcessWeights):
        async def broadcast(self, address: group.Address, version: int) -> None:
            await asyncio.sleep(LIMIT_S)

    def taken(inlet: Any) -> None:
        with suppress(EngineError):
            inlet.read(model, 0)
        ended.set()

    async def run() -> None:
        publication = Broadcast(model.named_weights(), limit_s=LIMIT_S)
        link = publication.link("engine")
        await publication.publish(Busy(model), 0)
        delivering = asyncio.create_task(link.deliver(0, lambda: asyncio.to_thread(taken, link.inlet)))
        await asyncio.sleep(0.5)
        delivering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await delivering
        assert await asyncio.to_thread(ended.wait, LIMIT_S / 4)
        publication.close()

    whole(run())


def test_a_dead_engine_does_not_hold_the_trainer_up():
    """It dies before it has read anything: what the trainer waits for is told it."""
    trainer = tiny_model("qwen3")
    publication = Broadcast(trainer.named_weights(), limit_s=LIMIT_S)

    async def run() -> None:
        await publication.publish(InProcessWeights(trainer), 0)

        async def dies() -> None:
            await asyncio.sleep(0.2)
            raise EngineError("it has died")

        await publication.link("engine").deliver(0, dies)

    start = time.monotonic()
    with pytest.raises(EngineError, match="it has died"):
        whole(run())
    assert time.monotonic() - start < LIMIT_S / 2


@pytest.mark.parametrize("dead", ["engine", "trainer"])
def test_of_an_end_that_dies_on_the_way_the_end_itself_is_believed(dead: str, monkeypatch: pytest.MonkeyPatch):
    """Both ends see their connection break off, and only one of them is dead."""
    trainer = tiny_model("qwen3")
    publication = Broadcast(trainer.named_weights(), limit_s=LIMIT_S)
    engine = Engine(publication, tiny_model("qwen3"))
    error = Died("its process was killed") if dead == "engine" else TrainingError("rank 0 was killed")

    def breaks_off(self: Any, num_bytes: int) -> None:
        raise RuntimeError("connection closed by peer")

    async def seen(work: Awaitable[None], end: str) -> None:
        with pytest.raises(EngineError, match="broke off: RuntimeError"):
            await work
        raise error if end == dead else EngineError("it saw no more than that")

    class Sent(InProcessWeights):
        async def broadcast(self, address: Any, version: int) -> None:
            await seen(super().broadcast(address, version), "trainer")

    async def run() -> None:
        await publication.publish(Sent(trainer), 0)
        take = asyncio.to_thread(engine.inlet.read, engine.model, 0)
        await engine.link.deliver(0, lambda: seen(take, "engine"))

    monkeypatch.setattr(group._Collective, "pass_on", breaks_off)
    with pytest.raises(type(error), match="was killed"):
        whole(run())


@pytest.mark.parametrize("dead", ["engine", "trainer"])
def test_an_end_that_gloo_does_not_miss_holds_nobody_up(dead: str, monkeypatch: pytest.MonkeyPatch):
    """It has died, but nothing is seen of that at the other end of its connections, nor when these are dropped."""
    trainer = tiny_model("qwen3")
    publication = Broadcast(trainer.named_weights(), limit_s=LIMIT_S)
    engine = Engine(publication, tiny_model("qwen3"))
    left: list[group.Group] = []

    def dies(self: group.Group, *arguments: Any) -> Any:
        left.append(self)
        raise Died("it was killed") if dead == "engine" else TrainingError("it was killed")

    async def run() -> None:
        await publication.publish(InProcessWeights(trainer), 0)
        await engine.take(0)

    monkeypatch.setattr(group.Group, "receive" if dead == "engine" else "send", dies)
    start = time.monotonic()
    with pytest.raises((Died, TrainingError), match="it was killed"):
        whole(run())
    monkeypatch.undo()
    if dead == "engine":  # one in its place
        engine = Engine(publication, tiny_model("qwen3"))
    whole(run())  # the same version once more
    gc.collect()
    assert time.monotonic() - start < LIMIT_S / 2
    assert engine.fingerprint == fingerprint(trainer.named_weights())


def test_without_the_process_of_the_run_an_engine_does_not_wait_for_weights(monkeypatch: pytest.MonkeyPatch):
    publication = Broadcast(tiny_model("qwen3").named_weights(), limit_s=LIMIT_S)
    link = publication.link("engine")
    inlet = pickle.loads(pickle.dumps(link.inlet))
    trainer = group.Group(link.inlet.address, group.SENDER)
    finish, waits = group.Group.finish, threading.Event()

    def only_meet() -> None:
        trainer.meet(0, torch.device("cpu"))
        trainer.join(torch.device("cpu"))

    def told(self: group.Group, *arguments: Any) -> None:
        waits.set()
        finish(self, *arguments)

    monkeypatch.setattr(group.Group, "finish", told)

    async def run() -> None:
        reading = asyncio.create_task(asyncio.to_thread(inlet.read, tiny_model("qwen3"), 0))
        await asyncio.to_thread(only_meet)
        assert await asyncio.to_thread(waits.wait, LIMIT_S)
        publication.close()  # as its process does when it is killed
        with pytest.raises(EngineError, match=r"the weights of version 0 broke off: DistNetworkError"):
            await reading

    start = time.monotonic()
    whole(run())
    assert time.monotonic() - start < LIMIT_S / 2


def test_an_end_that_is_another_one_is_noticed_by_the_other():
    """As the worker of a server that has had weights of another run in between, and the trainer after a failure of its own."""
    trainer, updates = tiny_model("qwen3"), Updates()
    publication = Broadcast(trainer.named_weights(), limit_s=LIMIT_S)
    engine = Engine(publication, tiny_model("qwen3"))

    async def run() -> None:
        for version in range(4):
            move(trainer)
            if version == 1:
                engine.inlet = pickle.loads(pickle.dumps(engine.link.inlet))
            if version == 3:
                updates.sender = Sender()
            await publication.publish(InProcessWeights(trainer, updates), version)
            await engine.take(version)
            assert engine.fingerprint == fingerprint(trainer.named_weights())

    start = time.monotonic()
    whole(run())
    assert time.monotonic() - start < LIMIT_S / 2


def test_weights_that_have_moved_are_not_sent_and_the_engine_is_told():
    """An engine that is started while the trainer updates must not get half an update under the name of the last version."""
    trainer, updates = tiny_model("qwen3"), Updates()
    publication = Broadcast(trainer.named_weights(), limit_s=LIMIT_S)
    engine = Engine(publication, tiny_model("qwen3"))
    before = engine.fingerprint

    async def run() -> None:
        await publication.publish(InProcessWeights(trainer, updates, updates.count), 0)
        async with updates.another():
            move(trainer)
        with pytest.raises(WeightsMoved):
            await engine.take(0)
        assert engine.fingerprint == before
        await publication.publish(InProcessWeights(trainer, updates, updates.count), 1)
        await engine.take(1)
        assert engine.fingerprint == fingerprint(trainer.named_weights())

    start = time.monotonic()
    whole(run())
    assert time.monotonic() - start < LIMIT_S / 2


def test_an_update_waits_for_weights_that_are_being_sent():
    trainer, updates = tiny_model("qwen3"), Updates()
    publication = Broadcast(trainer.named_weights(), limit_s=LIMIT_S)
    engine = Engine(publication, tiny_model("qwen3"))
    published = fingerprint(trainer.named_weights())

    async def run() -> None:
        await publication.publish(InProcessWeights(trainer, updates, updates.count), 0)
        taking = asyncio.create_task(engine.take(0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # now it has the lock
        async with updates.another():
            move(trainer)
        await taking

    whole(run())
    assert engine.fingerprint == published
