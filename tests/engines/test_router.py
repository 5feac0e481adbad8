"""Several engines as one: who gets what, and that nothing is lost, sampled by old weights, or left to timing, when engines come and go."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest

from dry_runs import GROUP_SIZE, GROUPS_PER_STEP, Notes, Timing, Workshop, finish
from sluice.engines import router as routing
from sluice.engines.router import Router
from sluice.engines.scripted import ScriptedEngine
from sluice.errors import EngineError, EngineGoneError, EngineLostError
from sluice.train import train
from sluice.types import Completion, Sampling

WEIGHTS: Any = None


class Replica(ScriptedEngine):
    """Answers with its number and says the version of its weights for a fingerprint. Can be lost, which it tells once at least, and
    comes back when it may."""

    def __init__(self, number: int, max_delay_s: float = 0.0, seed: int = 0) -> None:
        super().__init__(lambda prompt, sampling: [number], max_delay_s=max_delay_s, delay_seed=seed)
        self.asked: list[Sampling] = []
        self.lost = asyncio.Event()
        self.process = 1
        self.has_told = False
        self.may_return = asyncio.Event()
        self.may_return.set()
        self.returns_with: int | None = None
        """A version; None: the one that it had."""
        self.num_published = 0

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        self.asked.append(sampling)
        return await self._unless_lost(super().generate(prompt_ids, sampling))

    async def update_weights(self, weights: Any, version: int) -> int:
        self.num_published += 1
        return await self._unless_lost(super().update_weights(weights, version))

    async def fingerprint(self) -> str:  # type: ignore[override]
        if self.lost.is_set():
            self._tell_once()
            await self.may_return.wait()
            self.lost.clear()
            self.process += 1
            self.has_told = False
            self.version = self.version if self.returns_with is None else self.returns_with
        return f"weights {self.version}"

    def _tell_once(self) -> None:
        if not self.has_told:
            self.has_told = True
            raise EngineLostError("its process was killed", self.process)

    async def _unless_lost(self, work: Coroutine[Any, Any, Any]) -> Any:
        process = self.process
        doing, losing = asyncio.ensure_future(work), asyncio.ensure_future(self.lost.wait())
        try:
            await asyncio.wait([doing, losing], return_when=asyncio.FIRST_COMPLETED)
            if losing.done():  # also if it is back by now
                self.has_told = self.lost.is_set()
                raise EngineLostError("its process was killed", process)
            return await doing
        finally:
            for task in (doing, losing):
                task.cancel()
            await asyncio.gather(doing, losing, return_exceptions=True)


def router_over(
    engines: Sequence[Any], synchronous: bool = False, max_restarts: int = 3, group_size: int = 4
) -> Router:
    router = Router(engines, synchronous=synchronous, max_restarts=max_restarts, group_size=group_size)
    router.events = []  # type: ignore[attr-defined]
    router.tell = lambda kind, text: router.events.append((kind, text))  # type: ignore[attr-defined]
    return router


def sampling(ticket: int, index: int = 0, turn: int = 0) -> Sampling:
    return Sampling(4, seed=100 * ticket + 10 * index + turn, session=(ticket, index))


async def moment() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def sessions(engine: Replica) -> list[tuple[int, int]]:
    return [sampling.session for sampling in engine.asked]


def test_without_staleness_who_gets_a_request_depends_on_its_group_only():
    """Whatever takes how long, and however loaded they are; and each gets as many groups."""
    seen: list[list[set[tuple[int, int]]]] = []
    for seed in range(3):
        engines = [Replica(k, max_delay_s=0.02, seed=seed) for k in range(3)]
        router = router_over(engines, synchronous=True)

        async def run(router: Router = router, seed: int = seed) -> None:
            await router.update_weights(WEIGHTS, 0)
            order = [(ticket, index) for ticket in range(9) for index in range(4)]
            random.Random(seed).shuffle(order)
            await asyncio.gather(*(router.generate([1], sampling(*session)) for session in order))
            await router.close()

        finish(run())
        seen.append([set(sessions(engine)) for engine in engines])
    assert seen[0] == seen[1] == seen[2]
    assert [len(each) for each in seen[0]] == [12, 12, 12]


def test_the_least_loaded_gets_a_group_and_keeps_it_whole_and_a_turn_goes_where_the_last_one_was():
    engines = [Replica(k, max_delay_s=0.05) for k in range(2)]
    router = router_over(engines)

    async def run() -> None:
        await router.update_weights(WEIGHTS, 0)
        groups = [asyncio.create_task(router.generate([1], sampling(t, i))) for t in range(4) for i in range(4)]
        await asyncio.gather(*groups)
        assert sorted(Counter(ticket for ticket, _ in sessions(engines[0])).values()) == [4, 4]
        assert sorted(Counter(ticket for ticket, _ in sessions(engines[1])).values()) == [4, 4]
        first = {session: k for k in range(2) for session in sessions(engines[k])}
        for engine in engines:
            engine.asked.clear()
        for session in first:
            await router.generate([1], sampling(*session, turn=1))
        assert {session: k for k in range(2) for session in sessions(engines[k])} == first
        await router.close()

    finish(run())


def test_affinity_gives_way_to_load():
    """A group that is larger than the others' share goes on elsewhere."""
    engines = [Replica(k, max_delay_s=0.05) for k in range(2)]
    router = router_over(engines, group_size=4)

    async def run() -> None:
        await router.update_weights(WEIGHTS, 0)
        await asyncio.gather(*(router.generate([1], sampling(0, i)) for i in range(20)))
        await router.close()

    finish(run())
    assert sorted(len(engine.asked) for engine in engines) == [8, 12]


@pytest.mark.parametrize("synchronous", [True, False])
def test_what_a_lost_engine_had_not_answered_is_asked_of_another(synchronous: bool):
    engines = [Replica(k, max_delay_s=0.05) for k in range(2)]
    engines[0].may_return.clear()
    router = router_over(engines, synchronous)

    async def run() -> None:
        publishing = asyncio.create_task(router.update_weights(WEIGHTS, 0))
        engines[0].may_return.set()
        await publishing
        engines[0].may_return.clear()
        asked = [asyncio.create_task(router.generate([1], sampling(t, i))) for t in range(2) for i in range(4)]
        await moment()
        before = list(engines[0].asked)
        assert before
        engines[0].lost.set()
        completions = await asyncio.gather(*asked)
        assert [completion.token_ids for completion in completions] == [[1]] * 8
        assert {s.seed for s in before} <= {s.seed for s in engines[1].asked}, "another seed is another sample"
        metrics = router.drain_metrics().values_by_name()
        assert metrics["perf/resent_requests"] == len(before)
        assert metrics["perf/lost_engines"] == 1
        assert metrics["perf/engine_requests/1"] == 8
        assert (await router.generate([1], sampling(2))).token_ids == [1], "it is not in rotation"
        engines[0].may_return.set()
        await moment()
        engines[1].asked.clear()
        await router.generate([1], sampling(4))
        assert not engines[1].asked, "it is back"
        await router.close()

    finish(run())
    kinds = [kind for kind, _ in router.events]  # type: ignore[attr-defined]
    assert kinds == ["engine_died", "engine_returned"]
    assert "engine 0: its process was killed; 4 completions" in router.events[0][1]  # type: ignore[attr-defined]


def test_one_that_comes_back_with_old_weights_stays_out_until_it_has_new_ones():
    engines = [Replica(k) for k in range(2)]
    router = router_over(engines)

    async def run() -> None:
        await router.update_weights(WEIGHTS, 0)
        await router.update_weights(WEIGHTS, 1)
        engines[0].lost.set()
        engines[0].returns_with = 0
        for ticket in range(6):
            assert (await router.generate([1], sampling(ticket))).policy_versions == [1]
            await moment()
        assert engines[0].version == 0
        await router.update_weights(WEIGHTS, 2)
        versions = [await router.generate([1], sampling(ticket)) for ticket in range(6)]
        assert {completion.policy_versions[0] for completion in versions} == {2}
        assert engines[0].version == 2
        await router.close()

    finish(run())


def test_one_that_is_lost_while_it_takes_weights_over_is_given_them_again():
    """It has them, dies, is told of by a request, and is back with old ones, all before it is asked for its fingerprint."""
    asked: list[asyncio.Task[Completion]] = []

    class Interrupted(Replica):
        async def update_weights(self, weights: Any, version: int) -> int:
            await super().update_weights(weights, version)
            if self.num_published == 2:
                asked.append(asyncio.create_task(router.generate([1], sampling(0))))
                await moment()
                self.returns_with = 0
                self.lost.set()
                await moment()
            return 0

    engine = Interrupted(0, max_delay_s=0.5)
    router = router_over([engine])

    async def run() -> None:
        await router.update_weights(WEIGHTS, 0)
        await router.update_weights(WEIGHTS, 1)
        assert engine.num_published == 3
        assert await router.fingerprint() == "weights 1"
        assert (await asked[0]).policy_versions == [1]
        await router.close()

    finish(run())


def test_bytes_of_a_publication_are_those_of_all_engines():
    """Whichever of them is the first to have its weights."""

    class Moving(Replica):
        async def update_weights(self, weights: Any, version: int) -> int:
            await asyncio.sleep(0.001 * ((self.number + version) % 3))
            return 10**self.number

        def __init__(self, number: int) -> None:
            super().__init__(number)
            self.number = number

    router = router_over([Moving(k) for k in range(3)])

    async def run() -> None:
        assert [await router.update_weights(WEIGHTS, version) for version in range(3)] == [111] * 3
        await router.close()

    finish(run())


@pytest.mark.parametrize("synchronous", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_who_is_asked_after_a_publication_has_its_weights(
    seed: int, synchronous: bool, monkeypatch: pytest.MonkeyPatch
):
    """While engines are lost at random, also as they take weights over, and come back with old ones or with random delays."""
    monkeypatch.setattr(routing, "LONGEST_PAUSE_S", 0.001)
    rng = random.Random(seed)
    engines = [Replica(k, max_delay_s=0.01, seed=seed + k) for k in range(3)]
    router = router_over(engines, synchronous, max_restarts=10**6)
    published = 0

    async def ask(ticket: int) -> None:
        at_least = published
        completion = await router.generate([1], sampling(ticket))
        assert completion.policy_versions[0] >= at_least

    async def disturb() -> None:
        while True:
            await asyncio.sleep(rng.uniform(0, 0.01))
            engine = rng.choice(engines[1:])  # were all left with old weights, the run would end
            engine.returns_with = rng.choice([None, 0])
            engine.may_return.clear()
            engine.lost.set()
            await asyncio.sleep(rng.uniform(0, 0.01))
            engine.may_return.set()

    async def run() -> None:
        nonlocal published
        await router.update_weights(WEIGHTS, 0)
        disturbing, asked = asyncio.create_task(disturb()), []
        try:
            for version in range(1, 20):
                asked = [asyncio.create_task(ask(10 * version + i)) for i in range(6)]
                if synchronous:
                    await asyncio.gather(*asked)
                await router.update_weights(WEIGHTS, version)
                published = version
                await asyncio.gather(*asked)
        finally:
            for task in (disturbing, *asked):
                task.cancel()
            await asyncio.gather(disturbing, *asked, return_exceptions=True)
            await router.close()

    finish(run())


@pytest.mark.parametrize(("synchronous", "count", "waits"), [(True, 2, True), (False, 2, False), (False, 1, True)])
def test_a_publication_waits_for_a_lost_engine_where_it_must(synchronous: bool, count: int, waits: bool):
    """Without staleness the same engines get the next groups as in a run without losses; else only if there is no other."""
    engines = [Replica(k) for k in range(count)]
    router = router_over(engines, synchronous)

    async def run() -> None:
        await router.update_weights(WEIGHTS, 0)
        engines[0].may_return.clear()
        engines[0].lost.set()
        publishing = asyncio.create_task(router.update_weights(WEIGHTS, 1))
        await moment()
        assert publishing.done() != waits
        engines[0].may_return.set()
        await publishing
        await moment()
        completions = await asyncio.gather(*(router.generate([1], sampling(ticket)) for ticket in range(4)))
        assert {completion.policy_versions[0] for completion in completions} == {1}
        assert await router.fingerprint() == "weights 1"
        if synchronous:
            assert sessions(engines[0]) == [(0, 0), (2, 0)]
        await router.close()

    finish(run())


def test_a_stale_engine_shows_in_the_fingerprint_with_its_name():
    """Z6. Planted: one says that it took the weights over, and has the old ones."""

    class Forgetful(Replica):
        async def update_weights(self, weights: Any, version: int) -> int:
            return 0 if version == 1 else await super().update_weights(weights, version)

    router = router_over([Replica(0), Forgetful(1), Replica(2)])

    async def run() -> None:
        await router.update_weights(WEIGHTS, 0)
        assert await router.fingerprint() == "weights 0"
        await router.update_weights(WEIGHTS, 1)
        assert await router.fingerprint() == "weights 1 (engine 0), weights 0 (engine 1), weights 1 (engine 2)"
        await router.close()

    finish(run())


@pytest.mark.parametrize("is_heard_twice", [False, True])
def test_each_death_is_told_once_whoever_hears_of_it(is_heard_twice: bool):
    """Also the death of the second process of an engine while weights are still on their way to the first one."""

    class Unlucky(Replica):
        """Its first process dies under requests, and its second one, of which the publication hears, and who asks whether it is back."""

        async def update_weights(self, weights: Any, version: int) -> int:
            if version == 1:
                await asyncio.sleep(0.05)
                raise EngineLostError("its process was killed", 2)
            return await super().update_weights(weights, version)

        async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
            await self.lost.wait()
            raise EngineLostError("its process was killed", 1)

        async def fingerprint(self) -> str:  # type: ignore[override]
            if self.lost.is_set():
                await asyncio.sleep(0.1)
                self.process = 3
                self.lost.clear()
                if is_heard_twice:
                    raise EngineLostError("its process was killed", 2)
            return await super().fingerprint()

    engines = [Unlucky(0), Replica(1)]
    router = router_over(engines, max_restarts=5)

    async def run() -> None:
        await router.update_weights(WEIGHTS, 0)
        requests = [asyncio.create_task(router.generate([1], sampling(ticket))) for ticket in range(4)]
        await moment()
        publishing = asyncio.create_task(router.update_weights(WEIGHTS, 1))
        await moment()
        engines[0].lost.set()
        await asyncio.gather(publishing, *requests)
        await asyncio.sleep(0.2)
        await router.close()

    finish(run())
    died = [text for kind, text in router.events if kind == "engine_died"]  # type: ignore[attr-defined]
    assert [f"{left} more left" in text for text, left in zip(died, (4, 3), strict=True)] == [True, True], died


def test_one_that_dies_again_as_it_starts_is_counted_each_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(routing, "LONGEST_PAUSE_S", 0.001)

    class Frail(Replica):
        async def fingerprint(self) -> str:  # type: ignore[override]
            if self.lost.is_set() and self.process < 3:
                self.process += 1
                raise EngineLostError("it does not start", self.process)
            return await super().fingerprint()

    engines = [Frail(0), Replica(1)]
    router = router_over(engines, max_restarts=5)

    async def run() -> None:
        await router.update_weights(WEIGHTS, 0)
        engines[0].lost.set()
        await asyncio.gather(*(router.generate([1], sampling(ticket)) for ticket in range(4)))
        await asyncio.sleep(0.1)
        assert router.drain_metrics().values_by_name()["perf/lost_engines"] == 3
        await router.close()

    finish(run())
    kinds = [kind for kind, _ in router.events]  # type: ignore[attr-defined]
    assert kinds == [*3 * ["engine_died"], "engine_returned"]


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_run_without_any_engine_left_ends_at_once_and_says_why(workshop: Workshop, max_staleness: int):
    class Dying(Replica):
        async def fingerprint(self) -> str:
            if self.lost.is_set():
                self.process += 1
                raise EngineLostError("it does not start", self.process)
            return await super().fingerprint()

    engines = [Dying(k) for k in range(2)]
    router = router_over(engines, synchronous=not max_staleness, max_restarts=0)
    run = workshop.run(engine=router, max_staleness=max_staleness)

    async def whole() -> None:
        task = asyncio.create_task(train(run))
        while not engines[0].asked or not engines[1].asked:  # noqa: ASYNC110
            await asyncio.sleep(0)
        for engine in engines:
            engine.lost.set()
        try:
            await task
        finally:
            await router.close()

    with pytest.raises(EngineGoneError, match=r"engine 0 died once .*engine.max_restarts.*; engine 1 died once"):
        finish(whole())


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_a_run_whose_engines_come_and_go_trains_every_sample_once(
    workshop: Workshop, max_staleness: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(routing, "LONGEST_PAUSE_S", 0.001)
    engines = [Replica(k, max_delay_s=0.01, seed=k) for k in range(3)]
    for engine in engines:
        engine.script = workshop.digits
    router = router_over(engines, synchronous=not max_staleness, max_restarts=10**6, group_size=GROUP_SIZE)
    run = workshop.run(Timing(train_s=0.01, score_s=0.01), engine=router, max_staleness=max_staleness)
    rng = random.Random(max_staleness)

    async def whole() -> None:
        task = asyncio.create_task(train(run))
        while not task.done():
            await asyncio.sleep(rng.uniform(0, 0.02))
            rng.choice(engines).lost.set()
        await task
        await router.close()

    finish(whole())
    notes: Notes = run.tracker  # type: ignore[assignment]
    groups = [group for step in sorted(notes.groups) for group in notes.groups[step]]
    assert [group.id for group in groups] == list(range(GROUPS_PER_STEP * run.num_steps))
    trained = [name for update in run.trainer.updates for name in update]  # type: ignore[attr-defined]
    assert sorted(trained) == sorted(f"{g.prompt.id}#{g.id}.{i}" for g in groups for i in range(GROUP_SIZE))
    assert any(kind == "engine_returned" for kind, _ in router.events)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop.make(tmp_path_factory.mktemp("workshop"))


def test_one_that_cannot_take_the_weights_ends_the_run():
    class Broken(Replica):
        async def update_weights(self, weights: Any, version: int) -> int:
            raise EngineError("other weights than the trainer's")

    router = router_over([Replica(0), Broken(1)])

    async def run() -> None:
        try:
            await router.update_weights(WEIGHTS, 0)
        finally:
            await router.close()

    with pytest.raises(EngineError, match="other weights"):
        finish(run())
