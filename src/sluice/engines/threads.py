"""CPU threads of a decode step: one, but for what is worth waking the others."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

WORTH = 1e7
"""Multiplications from which several threads are faster. Waking one takes up to 50 µs, more on a machine with neighbours, and
the hundred small operations of a step would each do it."""


class StepThreads:
    def __init__(self, device: torch.device) -> None:
        self._is_cpu = device.type == "cpu"
        self._all = 1

    @contextmanager
    def step(self) -> Generator[None]:
        """One thread inside, and afterwards as many as before."""
        before = torch.get_num_threads()
        if not self._is_cpu or before == 1:
            yield
            return
        self._all = before
        torch.set_num_threads(1)
        try:
            yield
        finally:
            self._all = 1
            torch.set_num_threads(before)

    @contextmanager
    def work(self, multiplications: float) -> Generator[None]:
        """All threads inside, if that much work is worth them."""
        if self._all == 1 or multiplications < WORTH:
            yield
            return
        torch.set_num_threads(self._all)
        try:
            yield
        finally:
            torch.set_num_threads(1)
