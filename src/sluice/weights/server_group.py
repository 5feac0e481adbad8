"""The group of a server whose workers have no code of ours (SGLang's): they join it by torch's own means, and take one tensor after the other.

What a process of ours would say where it meets the trainer, the run's own process says for them; then it asks the server for their part.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sluice.errors import EngineError
from sluice.weights.group import GONE, SENDER, Address, Group, dist, wait_for_device

ARRIVAL_S = 1.0
"""For workers to get to the store, when they have been asked to join."""


def group_name(address: Address) -> str:
    """As both ends say it: of this engine's group, whatever the run."""
    return f"sluice-{address.engine}"


class ServerGroup(Group):
    """The trainer's end."""

    def __init__(self, address: Address, device: torch.device) -> None:
        super().__init__(address, SENDER)
        assert address.workers
        self._by_nccl = device.type == address.workers.device == "cuda"
        self._device = device if self._by_nccl else torch.device("cpu")
        """Where tensors are sent from."""
        self._workers: Any = None
        self.store.set("backend", "nccl" if self._by_nccl else "gloo")

    def join(self, device: torch.device) -> None:
        """By torch's own names, whatever `meet` has named."""
        self._workers = self._workers or self._joined_by_torch()

    def _joined_by_torch(self) -> Any:
        assert self.address.workers
        name, store = group_name(self.address), self.address.store_at(self.address.workers.port)
        for prefix in (name, f"{name}/", f"{self._device.type}/"):  # which torch puts before the keys of a group
            store = dist.PrefixStore(prefix, store)
        return self.nccl(store) if self._by_nccl else self.gloo(store, self.address.limit_s)

    @torch.no_grad()
    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, weight in weights:
            whole = weight.detach().to(self._device).contiguous()
            work = self._workers.broadcast(whole, SENDER)
            work.wait() if self._by_nccl else self.finish(self._workers, work)
            wait_for_device(whole)


class ServerInlet:
    """What the run's own process has for one server, as long as that lives."""

    def __init__(self, address: Address, rendezvous: Any) -> None:
        """`rendezvous` is the store of the workers, which they need while they join."""
        self.address, self.group_name = address, group_name(address)
        self.has_joined = False
        self._is_joining = self._is_broken_off = False
        self._rendezvous = rendezvous
        self._store = address.store()

    async def meet(self, version: int) -> None:
        """Go on when the trainer is there. Raises EngineError when it is said to be gone."""
        trainer = f"{version}/{SENDER}"
        assert self.address.workers
        for rank in self.address.ranks[1:]:
            self._store.set(f"{version}/{rank}", f"worker {self.address.workers.device}")
        await asyncio.to_thread(self._store.get, trainer)
        if self._store.get(trainer) == GONE:  # as it is now
            raise EngineError(f"the trainer was not there for the weights of version {version}")
        self._is_joining = not self.has_joined
        self._is_broken_off = False

    @property
    def backend(self) -> str:
        """By which trainer and workers talk; the trainer has said it before it came."""
        return self._store.get("backend").decode()

    def check_awaited(self) -> None:
        """Raises EngineError when nobody is there any more for the workers to join."""
        if self._is_broken_off:
            raise EngineError("the trainer was gone before the server had joined")

    def joined(self) -> None:
        self.has_joined, self._is_joining = True, False

    def break_off(self) -> None:
        """One end is gone: the other does not wait at the store for it."""
        self._is_broken_off = True
        if (
            self._is_joining
        ):  # workers that are on their way there would look for a store that is gone until their own limit
            asyncio.get_running_loop().call_later(ARRIVAL_S, self._drop)

    def _drop(self) -> None:
        self._rendezvous = None
