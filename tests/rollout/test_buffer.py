"""The buffer never has more groups out than its slots, loses no wake-up, and gives groups in ticket order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sluice.errors import RolloutError
from sluice.rollout.buffer import GroupBuffer, Limits
from sluice.types import Group, Prompt, Trajectory

NO_LIMITS = Limits(rejected=10**6, failed=10**6)


def group(ticket: int, rejected: str = "", *, outcomes: Sequence[str] = ("scored",), error: str = "") -> Group:
    trajectories = [Trajectory([], outcome=outcome, error=error) for outcome in outcomes]
    return Group(ticket, Prompt(f"p{ticket}", []), trajectories, rejected)


class BufferMachine(RuleBasedStateMachine):
    """Any order of admit, put, take and release, beside a model that counts."""

    @initialize(groups_per_step=st.integers(1, 3), max_staleness=st.integers(0, 2))
    def build(self, groups_per_step: int, max_staleness: int) -> None:
        self.runner = asyncio.Runner()
        self.buffer = GroupBuffer(groups_per_step, max_staleness, NO_LIMITS)
        self.num_slots = groups_per_step * (max_staleness + 1)
        self.synchronous = max_staleness == 0
        self.admitting: list[asyncio.Task] = []
        self.taking: asyncio.Task | None = None
        self.admitted: list[int] = []
        self.handed_in: dict[int, bool] = {}  # ticket → whether it was rejected
        self.num_taken = self.num_released = self.head = 0
        self.num_given_back = 0  # slots of rejected groups

    def start(self, work) -> asyncio.Task:
        async def begin() -> asyncio.Task:
            return asyncio.create_task(work)

        return self.runner.run(begin())

    def settle(self) -> None:
        async def turns() -> None:
            for _ in range(12):  # more than three waiters need, one after the other
                await asyncio.sleep(0)

        self.runner.run(turns())
        for task in [task for task in self.admitting if task.done()]:
            self.admitted.append(task.result())
            self.admitting.remove(task)

    @property
    def playing(self) -> list[int]:
        return [ticket for ticket in self.admitted if ticket not in self.handed_in]

    @precondition(lambda self: len(self.admitting) < 3)
    @rule()
    def admit(self) -> None:
        self.admitting.append(self.start(self.buffer.admit()))
        self.settle()

    @precondition(lambda self: self.playing)
    @rule(data=st.data(), rejected=st.booleans())
    def put(self, data: st.DataObject, rejected: bool) -> None:
        ticket = data.draw(st.sampled_from(self.playing))
        self.runner.run(self.buffer.put(group(ticket, "dull" if rejected else "")))
        self.handed_in[ticket] = rejected
        if not (self.synchronous and self.playing):
            self.num_given_back = sum(self.handed_in.values())
        self.settle()

    @rule(ticket=st.integers(-1, 9))
    def put_what_is_not_out(self, ticket: int) -> None:
        if ticket not in self.playing:
            with pytest.raises(ValueError, match=f"ticket {ticket} is not out"):
                self.runner.run(self.buffer.put(group(ticket)))

    @precondition(lambda self: self.taking is None)
    @rule(count=st.integers(1, 3))
    def take(self, count: int) -> None:
        self.count = count
        self.taking = self.start(self.buffer.take(count))
        self.settle()

    @precondition(lambda self: self.num_taken > self.num_released)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, self.num_taken - self.num_released))
        self.runner.run(self.buffer.release(count))
        self.num_released += count
        self.settle()

    @invariant()
    def slots_are_never_exceeded_and_never_idle(self) -> None:
        self.take_by_the_model()
        outstanding = len(self.admitted) - self.num_given_back - self.num_released
        assert outstanding <= self.num_slots
        assert not self.admitting or outstanding == self.num_slots, "a slot is free, and an admission waits"
        assert sorted(self.admitted) == list(range(len(self.admitted)))

    def take_by_the_model(self) -> None:
        if self.taking is None:
            return
        head, taken, rejected = self.head, [], []
        while len(taken) < self.count and head in self.handed_in:
            (rejected if self.handed_in[head] else taken).append(head)
            head += 1
        assert self.taking.done() == (len(taken) == self.count)
        if self.taking.done():
            assert [g.id for g in self.taking.result()] == taken
            self.taking, self.head = None, head
            self.num_taken += len(taken)
            assert [g.id for g in self.buffer.drain_rejected()] == rejected

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.runner.close()  # cancels what still waits


TestBuffer = BufferMachine.TestCase
TestBuffer.settings = settings(max_examples=150, stateful_step_count=30, deadline=None, derandomize=True)


def hand_in(*groups: Group, take: int, limits: Limits) -> list[int]:
    """Put the groups, of tickets 0, 1, 2 …, in the order given; then take."""

    async def work() -> list[int]:
        buffer = GroupBuffer(len(groups), 0, limits)
        for _ in groups:
            await buffer.admit()
        for one in groups:
            await buffer.put(one)
        async with asyncio.timeout(5):
            return [g.id for g in await buffer.take(take)]

    return asyncio.run(work())


def test_too_many_rejected_groups_end_the_run():
    """Naming the limit, the prompt, the reason and what went wrong in it."""
    groups = [group(i, "1 of 2 samples scored", outcomes=["scored", "error"], error="no such host") for i in range(3)]
    with pytest.raises(RolloutError) as error:
        hand_in(*groups, take=1, limits=Limits(rejected=2, failed=9))
    for part in ("3 groups", "rollout.max_rejected_groups", "prompt p2", "1 of 2 samples scored", "no such host"):
        assert part in str(error.value)


def test_rejected_groups_of_a_step_are_counted_apart_from_the_next():
    """At the limit in each of two steps is not over it."""

    async def work() -> None:
        buffer = GroupBuffer(1, 0, Limits(rejected=2, failed=9))
        for step in range(2):
            for ticket in range(3 * step, 3 * step + 3):
                await buffer.admit()
                await buffer.put(group(ticket, "" if ticket % 3 == 2 else "dull"))
            assert [g.id for g in await buffer.take(1)] == [3 * step + 2]
            await buffer.release(1)

    asyncio.run(work())


def test_failed_groups_in_a_row_end_the_run():
    failed = {"outcomes": ["error", "timeout"], "error": "no such host"}
    with pytest.raises(RolloutError) as error:
        hand_in(*(group(i, "0 of 2 samples scored", **failed) for i in range(3)), take=1, limits=Limits(9, 3))
    for part in ("3 groups in a row", "rollout.max_failed_groups", "prompt p2", "no such host"):
        assert part in str(error.value)


@pytest.mark.parametrize("between", [group(2), group(2, "all rewards equal")])
def test_a_score_between_failures_starts_the_count_anew(between: Group):
    """Also when its group is rejected: the reward works."""
    failed = [group(i, "0 of 1 samples scored", outcomes=["error"]) for i in (0, 1, 3, 4)]
    trained = [5] if between.rejected else [2, 5]
    groups = [*failed[:2], between, *failed[2:], group(5)]
    assert hand_in(*groups, take=len(trained), limits=Limits(9, 3)) == trained


def test_a_skipped_prompt_is_no_failure():
    skipped = [group(i, "prompt too long", outcomes=[]) for i in range(4)]
    assert hand_in(*skipped, group(4), take=1, limits=Limits(9, 3)) == [4]


@pytest.mark.parametrize(("max_staleness", "comes_back"), [(0, "together"), (1, "at once")])
def test_when_the_slots_of_rejected_groups_come_back(max_staleness: int, comes_back: str) -> None:
    """Synchronous runs refill in waves, so that what is decoded side by side does not depend on who is scored first."""

    async def scenario() -> None:
        buffer = GroupBuffer(3 // (max_staleness + 1) + max_staleness, max_staleness, NO_LIMITS)
        for _ in range(buffer.num_slots):
            await buffer.admit()
        await buffer.put(group(1, "rejected"))
        admission = asyncio.create_task(buffer.admit())
        await asyncio.sleep(0.01)
        assert admission.done() == (comes_back == "at once")
        for ticket in (0, *range(2, buffer.num_slots)):
            await buffer.put(group(ticket))
        await asyncio.wait_for(admission, 1)

    asyncio.run(scenario())


def test_a_free_slot_wakes_one_worker_and_not_all():
    """With thousands of them each group that is handed in would else wake every one, to find that it has no slot."""
    looks = 0

    class Counting(GroupBuffer):
        def _may_admit(self) -> bool:
            nonlocal looks
            looks += 1
            return super()._may_admit()

    async def scenario() -> None:
        nonlocal looks
        buffer = Counting(4, 1, NO_LIMITS)
        for _ in range(buffer.num_slots):
            await buffer.admit()
        workers = [asyncio.create_task(buffer.admit()) for _ in range(200)]
        await asyncio.sleep(0.01)
        looks = 0
        for ticket in range(4):
            await buffer.put(group(ticket))
        await buffer.take(4)
        await asyncio.sleep(0.01)
        assert looks == 0
        await buffer.release(4)
        await asyncio.sleep(0.01)
        assert sorted(w.result() for w in workers if w.done()) == [8, 9, 10, 11]
        assert looks == 4
        for worker in workers:
            worker.cancel()

    asyncio.run(scenario())
