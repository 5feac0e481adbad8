"""CPU threads of a decode step: one, but for what is worth waking the others."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

WORTH = 7.5e6
"""Multiplications from which several threads are faster. Waking one takes up to 50 µs, more on a machine with neighbours, and
the hundred small operations of a step would each do it."""
CACHED = 2**17
"""Weights (of one product) that stay in a core's cache from step to step. To read one of those beyond takes as long as 16
multiplications."""
_AS_IT_IS = nullcontext()


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

    def product(self, rows: int, weights: int) -> AbstractContextManager[None]:
        """A product of so many rows by so many weights."""
        return self.work(rows * weights + 16 * max(0, weights - CACHED))

    def work(self, multiplications: float) -> AbstractContextManager[None]:
        """All threads inside, if that much work is worth them."""
        return _AS_IT_IS if self._all == 1 or multiplications < WORTH else self._all_threads()

    @contextmanager
    def _all_threads(self) -> Generator[None]:
        torch.set_num_threads(self._all)
        try:
            yield
        finally:
            torch.set_num_threads(1)
