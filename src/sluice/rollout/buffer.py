"""The bounded queue between rollout workers and the trainer. Staleness is bounded by its structure.

It has (max_staleness + 1) · groups_per_step slots. A slot is taken when a prompt is admitted and given back when the
engine holds weights that were trained on its group, or when the group is rejected. Groups are taken in the order of
their tickets. So no group is older than max_staleness updates when it is trained, whatever the timing.

With max_staleness 0 nothing at all depends on timing: the slots of rejected groups come back together, when no ticket is
out, so that even which sequences the engine decodes side by side, and with it the last bit of their log-probs, is fixed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from sluice.errors import RolloutError
from sluice.types import Group, Prompt


@dataclass(frozen=True)
class Limits:
    """What may be rejected before the run ends."""

    rejected: int
    """Groups, while one step is filled."""
    failed: int
    """Groups in a row in which nothing could be scored."""


class GroupBuffer:
    def __init__(self, groups_per_step: int, max_staleness: int, limits: Limits) -> None:
        self.num_slots = (max_staleness + 1) * groups_per_step
        self.synchronous = max_staleness == 0
        self.limits = limits
        self.next_ticket = 0
        self._free = self.num_slots
        self._rejected_slots = 0  # of rejected groups, not given back yet
        self._head = 0  # the oldest ticket that has not been taken
        self._done: dict[int, Group] = {}
        self._rejected: list[Group] = []  # behind the head, not yet reported
        self._failed_in_a_row = 0
        self._changed = asyncio.Condition()

    async def admit(self, next_prompt: Callable[[], Prompt]) -> tuple[int, Prompt]:
        """Wait for a slot, then take the next ticket and the next prompt for it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._free > 0)
            self._free -= 1
            ticket = self.next_ticket
            self.next_ticket += 1
            return ticket, next_prompt()

    async def put(self, group: Group) -> None:
        """Hand in the group of a ticket; a rejected one gives its slot back."""
        async with self._changed:
            if group.id in self._done or not self._head <= group.id < self.next_ticket:
                raise ValueError(f"ticket {group.id} is not out")
            self._done[group.id] = group
            self._rejected_slots += bool(group.rejected)
            num_out = self.next_ticket - self._head - len(self._done)
            if not self.synchronous or num_out == 0:
                self._free += self._rejected_slots
                self._rejected_slots = 0
            self._changed.notify_all()

    async def take(self, count: int) -> list[Group]:
        """Wait for the `count` oldest groups that were not rejected. Their slots stay taken until `release`.

        Raises RolloutError when it comes past more groups that were rejected, or that failed in a row, than the limits
        allow: counted in the order of tickets, as everything here, and not in the order in which they were handed in.
        """
        taken: list[Group] = []
        num_rejected = 0
        async with self._changed:
            while len(taken) < count:
                await self._changed.wait_for(lambda: self._head in self._done)
                group = self._done.pop(self._head)
                self._head += 1
                if group.scored:
                    self._failed_in_a_row = 0
                if group.rejected:
                    self._rejected.append(group)
                    num_rejected += 1
                    self._check_limits(group, num_rejected)
                else:
                    taken.append(group)
        return taken

    async def release(self, count: int) -> None:
        """Give back the slots of taken groups, once the engine holds the weights that were trained on them."""
        async with self._changed:
            self._free += count
            self._changed.notify_all()

    def drain_rejected(self) -> list[Group]:
        """Rejected groups that are older than the last one taken, each told once."""
        rejected, self._rejected = self._rejected, []
        return rejected

    def _check_limits(self, group: Group, num_rejected: int) -> None:
        self._failed_in_a_row += bool(group.trajectories) and not group.scored
        errors = [t.error for t in group.trajectories if t.error]
        if self._failed_in_a_row >= self.limits.failed:
            raise RolloutError(
                f"{self._failed_in_a_row} groups in a row without a single score; the last was prompt {group.prompt.id}: "
                f"{errors[-1] if errors else group.rejected} (limit: rollout.max_failed_groups)"
            )
        if num_rejected > self.limits.rejected:
            raise RolloutError(
                f"{num_rejected} groups were rejected while one step was filled (limit: rollout.max_rejected_groups); "
                f"the last was prompt {group.prompt.id}: {group.rejected}"
                + (f"; its last error: {errors[-1]}" if errors else "")
            )
