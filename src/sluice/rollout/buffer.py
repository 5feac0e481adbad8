"""The bounded queue between rollout workers and the trainer. Staleness is bounded by its structure.

It has (max_staleness + 1) · groups_per_step slots. A slot is taken when a prompt is admitted and given back when the
engine holds weights that were trained on its group, or when the group is rejected. Groups are taken in the order of
their tickets. So no group is older than max_staleness versions when it is trained, whatever the timing.

With max_staleness 0 nothing at all depends on timing: the slots of rejected groups come back together, when no ticket is
out, so that even which sequences the engine decodes side by side, and with it the last bit of their log-probs, is fixed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from sluice.errors import RolloutError, RunStopped
from sluice.rollout.calls import Call, Calls
from sluice.types import Group


@dataclass(frozen=True)
class Limits:
    """What may be rejected before the run ends."""

    rejected: int
    """Groups, while one step is filled."""
    failed: int
    """Groups in a row in which nothing could be scored."""


@dataclass(frozen=True)
class BufferState:
    """Between two steps: what was handed in and what is still out."""

    head: int = 0
    """The oldest ticket that has not been taken."""
    next_ticket: int = 0
    """All from `head` on below it that are not in `done` are out: their groups are sampled (again)."""
    failed_in_a_row: int = 0
    done: dict[int, Group] = field(default_factory=dict[int, Group])
    calls: dict[int, Call] = field(default_factory=dict[int, Call])
    """What the engine has made for those that are out, by seed."""


class GroupBuffer:
    def __init__(
        self, groups_per_step: int, max_staleness: int, limits: Limits, state: BufferState | None = None
    ) -> None:
        """With a `state` it goes on where that was taken."""
        state = state or BufferState()
        self.num_slots = (max_staleness + 1) * groups_per_step
        self.synchronous = max_staleness == 0
        self.limits = limits
        self.head, self.next_ticket = state.head, state.next_ticket
        self.done = dict(state.done)  # behind the head
        self.calls = Calls(state.calls)
        self._again = deque(t for t in range(state.head, state.next_ticket) if t not in state.done)
        self._free = self.num_slots - len(self._again) - sum(not group.rejected for group in self.done.values())
        self._rejected_slots = 0  # of rejected groups, not given back yet
        self._rejected: list[Group] = []  # taken, not yet reported
        self._failed_in_a_row = state.failed_in_a_row
        self._stopped = False
        self._lock = asyncio.Lock()
        self._handed_in = asyncio.Condition(self._lock)
        self._slots_free = asyncio.Condition(self._lock)
        """Apart, and told of as many as there are: with thousands of slots most workers wait for one most of the time."""

    def state(self) -> BufferState:
        """From which a new buffer goes on, whatever is out or handed in at the moment.

        A synchronous one samples a whole step again, however much of it was there: which sequences are decoded side by
        side decides the last bit of their log-probs.
        """
        if self.synchronous:
            return BufferState(self.head, self.head, self._failed_in_a_row)
        out = set(range(self.head, self.next_ticket)) - self.done.keys()
        return BufferState(self.head, self.next_ticket, self._failed_in_a_row, dict(self.done), self.calls.state(out))

    async def admit(self) -> int:
        """Wait for a slot, then take the next ticket: the position of a prompt."""
        async with self._lock:
            if self._again:  # its slot was never given back
                return self._again.popleft()
            await self._slots_free.wait_for(self._may_admit)
            self._free -= 1
            self.next_ticket += 1
            return self.next_ticket - 1

    async def put(self, group: Group) -> None:
        """Hand in the group of a ticket; a rejected one gives its slot back."""
        async with self._lock:
            if group.id in self.done or not self.head <= group.id < self.next_ticket:
                raise ValueError(f"ticket {group.id} is not out")
            self.done[group.id] = group
            self.calls.forget(group.id)
            self._rejected_slots += bool(group.rejected)
            num_out = self.next_ticket - self.head - len(self.done)
            if not self.synchronous or num_out == 0:
                self._free += self._rejected_slots
                self._rejected_slots = 0
            self._handed_in.notify_all()
            self._slots_free.notify(self._free)

    async def take(self, count: int) -> list[Group]:
        """Wait for the `count` oldest groups that were not rejected. Their slots stay taken until `release`.

        Nothing is taken before all are there. Raises RolloutError when it comes past more groups that were rejected, or
        that failed in a row, than the limits allow: counted in the order of tickets, as everything here, and not in the
        order in which they were handed in. Raises RunStopped after `stop`.
        """
        async with self._lock:
            while self._stopped or (groups := self._oldest(count)) is None:
                if self._stopped:
                    raise RunStopped
                await self._handed_in.wait()
        for group in groups:
            del self.done[group.id]
            self._failed_in_a_row = self._failures_after(group, self._failed_in_a_row)
        self.head += len(groups)
        self._rejected += [group for group in groups if group.rejected]
        return [group for group in groups if not group.rejected]

    async def release(self, count: int) -> None:
        """Give back the slots of taken groups, once the engine holds the weights that were trained on them."""
        async with self._lock:
            self._free += count
            self._slots_free.notify(self._free)

    async def stop(self) -> None:
        """Whoever takes groups, now or later, is told to leave."""
        async with self._lock:
            self._stopped = True
            self._handed_in.notify_all()

    def status(self) -> str:
        """What it holds at the moment, for people."""
        out = sorted(set(range(self.head, self.next_ticket)) - self.done.keys())
        return (
            f"{self._free} of {self.num_slots} slots free; tickets from {self.head} on below {self.next_ticket}: "
            f"handed in {sorted(self.done)}, out {out}"
        )

    def drain_rejected(self) -> list[Group]:
        """Rejected groups that are older than the last one taken, each told once."""
        rejected, self._rejected = self._rejected, []
        return rejected

    def _oldest(self, count: int) -> list[Group] | None:
        """All groups up to the `count`-th that was not rejected; None while one of them is out."""
        groups: list[Group] = []
        num_rejected, failed_in_a_row = 0, self._failed_in_a_row
        while len(groups) - num_rejected < count:
            group = self.done.get(self.head + len(groups))
            if group is None:
                return None
            groups.append(group)
            num_rejected += bool(group.rejected)
            failed_in_a_row = self._failures_after(group, failed_in_a_row)
            if failed_in_a_row >= self.limits.failed or num_rejected > self.limits.rejected:
                self._rejected += [group for group in groups if group.rejected]
                raise self._over_limit(group, num_rejected, failed_in_a_row)
        return groups

    def _may_admit(self) -> bool:
        """A slot is free, and there are not so many rejected groups that nobody has taken yet that the next `take` may end
        the run for them: while the trainer is busy, what fails at once would fail without end."""
        return self._free > 0 and sum(bool(g.rejected) for g in self.done.values()) <= self.limits.rejected

    @staticmethod
    def _failures_after(group: Group, before: int) -> int:
        """Groups in a row, up to this one, in which nothing could be scored; one that was never sampled is no failure."""
        return 0 if group.scored else before + bool(group.trajectories)

    def _over_limit(self, group: Group, num_rejected: int, failed_in_a_row: int) -> RolloutError:
        errors = [t.error for t in group.trajectories if t.error]
        if failed_in_a_row >= self.limits.failed:
            return RolloutError(
                f"{failed_in_a_row} groups in a row without a single score; the last was prompt {group.prompt.id}: "
                f"{errors[-1] if errors else group.rejected} (limit: rollout.max_failed_groups)"
            )
        return RolloutError(
            f"{num_rejected} groups were rejected while one step was filled (limit: rollout.max_rejected_groups); "
            f"the last was prompt {group.prompt.id}: {group.rejected}"
            + (f"; its last error: {errors[-1]}" if errors else "")
        )
