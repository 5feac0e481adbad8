"""The simulation of clusters: its clock is exact, what it drives is the real loop, and what can be computed by hand comes out."""

from __future__ import annotations

import asyncio
import importlib
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from conftest import ROOT

BENCHMARKS = ROOT / "benchmarks"
DECODE_S, TRAIN_S, PUBLICATION_S = 0.01, 0.6, 0.05
TOKENS, PROMPT, GROUPS, SIZE = 100, 8, 4, 4
ROLLOUT_S = TOKENS * DECODE_S


@pytest.fixture(scope="module")
def sim() -> Iterator[Any]:
    """The simulation's modules, as one namespace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.setattr(sys, "dont_write_bytecode", True)
        names: dict[str, Any] = {}
        for module in (
            "virtual_time",
            "distributions",
            "simulated_engine",
            "simulated_trainer",
            "simulated_run",
            "clusters",
        ):
            names |= vars(importlib.import_module(module))
        yield type("Simulation", (), {name: staticmethod(v) if callable(v) else v for name, v in names.items()})
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(f"{BENCHMARKS}/"):
            del sys.modules[name]


def setting(sim: Any, **changes: Any) -> Any:
    """One replica that has room for exactly one step's responses, all of one length."""
    engine = sim.EngineSetting(replicas=1, slots=GROUPS * SIZE, rates=sim.EngineRates(DECODE_S, 0.0))
    fixed = {
        "engine": engine,
        "trainer": sim.TrainerRates(token_s=0.0, update_s=TRAIN_S),
        "lengths": sim.Fixed(TOKENS),
        "groups_per_step": GROUPS,
        "group_size": SIZE,
        "max_staleness": 0,
        "num_steps": 12,
        "prompt_tokens": PROMPT,
    }
    return sim.Setting(**(fixed | changes))


# The clock


def test_hours_of_waiting_take_no_time_and_end_when_they_should(sim: Any):
    async def waits() -> list[tuple[str, float]]:
        loop, ended = asyncio.get_running_loop(), []

        async def one(name: str, seconds: float) -> None:
            await asyncio.sleep(seconds)
            ended.append((name, loop.time()))

        await asyncio.gather(one("b", 7200.0), one("a", 3600.5), one("c", 7200.5))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10.0):
                await asyncio.Event().wait()
        ended.append(("limit", loop.time()))
        return ended

    start = time.perf_counter()
    assert sim.run(waits()) == [("a", 3600.5), ("b", 7200.0), ("c", 7200.5), ("limit", 7210.5)]
    assert time.perf_counter() - start < 5.0


def test_work_in_a_thread_is_done_on_the_spot(sim: Any):
    async def work() -> tuple[int, float]:
        found = await asyncio.to_thread(sum, [1, 2])
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 / 0)
        return found, asyncio.get_running_loop().time()

    assert sim.run(work()) == (3, 0.0)


def test_a_loop_that_is_blocked_is_late(sim: Any):
    async def work() -> float:
        loop: Any = asyncio.get_running_loop()
        due = loop.create_future()
        loop.call_later(1.0, lambda: due.set_result(loop.time()))
        loop.block(5.0)
        return await due

    assert sim.run(work()) == 5.0


def test_a_standstill_is_an_error_and_no_endless_wait(sim: Any):
    with pytest.raises(sim.Stalled):
        sim.run(asyncio.Event().wait())


# What can be computed by hand


def test_without_staleness_a_step_takes_the_rollout_and_then_the_update(sim: Any):
    found = sim.simulate(setting(sim))
    assert found.step_s == pytest.approx([ROLLOUT_S + TRAIN_S] * len(found.step_s))
    assert found.tokens == len(found.step_s) * GROUPS * SIZE * TOKENS
    assert found.engine_busy == pytest.approx(ROLLOUT_S / (ROLLOUT_S + TRAIN_S))
    assert found.trainer_busy == pytest.approx(TRAIN_S / (ROLLOUT_S + TRAIN_S))
    assert set(found.ages) == {0}


@pytest.mark.parametrize("max_staleness", [1, 2])
@pytest.mark.parametrize("train_s", [0.6, 1.7])
def test_with_staleness_a_step_takes_the_longer_of_the_two(sim: Any, max_staleness: int, train_s: float):
    changed = setting(sim, max_staleness=max_staleness, trainer=sim.TrainerRates(token_s=0.0, update_s=train_s))
    found = sim.simulate(changed)
    assert found.step_s == pytest.approx([max(ROLLOUT_S, train_s)] * len(found.step_s))


def test_publications_and_the_ledger_take_their_time(sim: Any):
    """The ledger is written while the next rollout runs already, a publication while nothing does."""
    base = setting(sim)
    moved = replace(base, engine=replace(base.engine, publication_s=PUBLICATION_S), record_s=0.4)
    assert sim.simulate(moved).step_s == pytest.approx([ROLLOUT_S + TRAIN_S + PUBLICATION_S] * 10)
    slow = replace(moved, record_s=ROLLOUT_S + 0.5)
    assert sim.simulate(slow).step_s == pytest.approx([ROLLOUT_S + 0.5 + TRAIN_S + PUBLICATION_S] * 10)


def test_sequences_slow_each_other_down_as_the_rates_say(sim: Any):
    """16 sequences on 8 slots are two rounds; each token waits for the sequences beside it and the cache, each prompt for itself."""
    rates = sim.EngineRates(0.004, 0.0005, 1e-6, prompt_token_s=0.0001, request_s=0.002)
    base = setting(sim, engine=sim.EngineSetting(1, 8, rates))
    admitted = 8 * (0.002 + PROMPT * 0.0001)
    decoded = TOKENS * (0.004 + 8 * 0.0005 + 8 * PROMPT * 1e-6) + 8 * 1e-6 * TOKENS**2 / 2
    assert sim.simulate(base).step_s == pytest.approx([2 * (admitted + decoded) + TRAIN_S] * 10)


def test_what_is_decoded_in_a_time_is_the_inverse_of_the_time_it_takes(sim: Any):
    for rates in (sim.EngineRates(0.01, 0.001), sim.EngineRates(0.01, 0.001, 1e-5)):
        for tokens in (0.25, 1.0, 37.5, 4000.0):
            assert rates.decoded(rates.decode_s(tokens, 7, 500.0), 7, 500.0) == pytest.approx(tokens)


def test_the_longest_sample_bounds_an_update(sim: Any):
    rates = sim.TrainerRates(token_s=0.001, squared_token_s=1e-6, ranks=4)
    assert rates.seconds([1000.0] * 8) == pytest.approx(2 * (1.0 + 1.0))
    assert rates.seconds([10.0, 4000.0]) == pytest.approx(4.0 + 16.0)


def test_a_token_has_the_version_of_the_weights_that_made_it(sim: Any):
    """Weights change after 30 and 80 of 100 tokens, each time for nothing: 30, 50 and 20 tokens."""

    async def work() -> Any:
        engine = sim.SimulatedEngine(sim.EngineSetting(1, 4, sim.EngineRates(1.0, 0.0)), lambda sampling: 100)
        completion = asyncio.ensure_future(engine.generate([PROMPT], sim.Sampling(max_new_tokens=100)))
        await asyncio.sleep(30)
        await engine.update_weights(None, 1)
        await asyncio.sleep(50)
        await engine.update_weights(None, 2)
        return await completion

    completion = sim.run(work())
    assert completion.token_ids == [30, 50, 20]
    assert completion.policy_versions == [0, 1, 2]


def test_an_engine_goes_on_while_the_loop_is_held_up(sim: Any):
    """Two of three sequences are decoded at once, the third follows the shorter one; a later one finds an empty cache."""
    rates = sim.EngineRates(0.01, 0.0, 0.001)

    async def work() -> Any:
        loop: Any = asyncio.get_running_loop()
        engine = sim.SimulatedEngine(sim.EngineSetting(1, 2, rates), lambda sampling: sampling.max_new_tokens)

        def ask(tokens: int) -> Any:
            return asyncio.ensure_future(engine.generate([0], sim.Sampling(max_new_tokens=tokens)))

        asked = [ask(tokens) for tokens in (10, 30, 20)]
        await asyncio.sleep(0)
        loop.block(5.0)
        await asyncio.gather(*asked)
        at_once = loop.time(), engine.busy_s()
        await ask(10)
        return at_once, loop.time() - at_once[0]

    (now, busy_s), alone_s = sim.run(work())
    assert now == pytest.approx(5.0)
    assert busy_s == pytest.approx(rates.decode_s(10, 2, 0.0) + rates.decode_s(20, 2, 10.0))
    assert alone_s == pytest.approx(rates.decode_s(10, 1, 0.0))


# Failures


def test_a_failed_engine_costs_what_it_had_decoded_and_its_restart(sim: Any):
    """Of two replicas one fails after 40 of 100 s: its two sequences begin anew on the other, beside the two there."""

    async def work() -> Any:
        failures = sim.EngineFailures(between_s=1e12, restart_s=1000.0)
        rates = sim.EngineRates(0.5, 0.25)
        engine = sim.SimulatedEngine(sim.EngineSetting(2, 4, rates, failures=failures), lambda sampling: 100)
        loop = asyncio.get_running_loop()

        async def one() -> float:
            await engine.generate([PROMPT], sim.Sampling(max_new_tokens=100))
            return loop.time()

        ends = [asyncio.ensure_future(one()) for _ in range(4)]
        await asyncio.sleep(40)
        engine._fail(0)
        found = await asyncio.gather(*ends)
        await engine.close()
        return sorted(found), engine.num_failures, engine.num_lost_tokens

    ends, failures, lost = sim.run(work())
    assert failures == 1
    assert lost == pytest.approx(80.0)
    # a step of two takes 1 s, of four 1.5 s: the two that were there have 60 tokens left, then the others 40, at 1 s again
    assert ends == pytest.approx([40 + 90, 40 + 90, 40 + 90 + 40, 40 + 90 + 40])


def test_a_failed_trainer_does_the_steps_since_its_checkpoint_again(sim: Any, monkeypatch: pytest.MonkeyPatch):
    """At 3.0 s, in the second update, which began at 2.6; the checkpoint is of 1.6: 7 s of restart, and 1.4 s again."""
    failures = sim.TrainerFailures(between_s=1e12, restart_s=7.0, checkpoint_every_steps=1)
    module = sys.modules["simulated_trainer"]
    monkeypatch.setattr(
        module.SimulatedTrainer, "_after", lambda self, now: 3.0 if now == 0.0 else float("inf"), raising=True
    )
    found = sim.simulate(setting(sim, trainer_failures=failures, num_steps=4), warm_up=0)
    usual = ROLLOUT_S + TRAIN_S
    assert found.failures == 1
    assert found.step_s == pytest.approx([usual, usual + 7.0 + (3.0 - usual), usual, usual])


# The real loop in it


def mixed(sim: Any, **changes: Any) -> Any:
    """Everything by chance."""
    rates = sim.EngineRates(0.01, 0.0005, 1e-7, 1e-5)
    engine = sim.EngineSetting(3, 8, rates, 0.5, sim.EngineFailures(between_s=40.0, restart_s=5.0))
    varied = {
        "engine": engine,
        "lengths": sim.LogNormal(40, 400, 1000),
        "reward_s": sim.LogNormal(0.1, 2.0),
        "agent": sim.Agent(3, sim.LogNormal(0.5, 5.0), 20, workers=4),
        "trainer_failures": sim.TrainerFailures(60.0, 5.0, 2),
        "num_steps": 14,
    }
    return setting(sim, **(varied | changes))


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 4])
def test_the_bound_of_staleness_holds_and_is_reached(sim: Any, max_staleness: int):
    """By the run's own check too, which would stop it."""
    found = sim.simulate(mixed(sim, max_staleness=max_staleness))
    assert max(found.ages) == max_staleness
    assert found.failures > 1
    assert found.lost_tokens > 0


def test_a_seed_makes_one_run(sim: Any):
    first, again, other = (sim.simulate(mixed(sim, max_staleness=1, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first.step_s != other.step_s


def test_fewer_workers_than_tools_hold_the_engines_up(sim: Any):
    many, one = (
        sim.simulate(
            mixed(sim, max_staleness=1, trainer_failures=None, agent=sim.Agent(3, sim.Fixed(1.0), 20, workers=n))
        )
        for n in (None, 1)
    )
    assert one.tokens_per_s < 0.5 * many.tokens_per_s
    per_step = GROUPS * SIZE * 2 * 1.0  # seconds of tools, one after the other
    assert sum(one.step_s) / len(one.step_s) >= 0.9 * per_step


# Clusters


@pytest.mark.parametrize(("sequences", "measured"), [(64, 14_300), (256, 35_400)])
def test_decoding_on_a_gpu_is_as_fast_as_it_was_measured(sim: Any, sequences: int, measured: float):
    """docs/performance.md, 4B: prompts of 16 tokens in the mean, and 256 new ones."""
    rates = sim.engine_rates(sim.MODELS["4B"], sim.H200_MEASURED, 1)
    seconds = rates.decode_s(256, sequences, sequences * 16)
    assert sequences * 256 / seconds == pytest.approx(measured, rel=0.1)


def test_lengths_are_as_they_are_said_to_be(sim: Any):
    lengths = sim.LENGTHS["reasoning"]
    drawn = sorted(lengths.length(sim.Sampling(1, seed=(i * 2**63) // 1000)) for i in range(1000))
    assert drawn[500] == pytest.approx(4000, rel=0.01)
    assert drawn[990] == pytest.approx(32_000, rel=0.02)
    assert sum(drawn) / 1000 == pytest.approx(lengths.mean(), rel=0.01)


def test_a_large_cluster_is_simulated_in_seconds(sim: Any):
    cluster = sim.Cluster(sim.MODELS["4B"], 1024, 128, 1, groups=16, steps=4)
    start = time.process_time()
    found = sim.simulate(cluster.setting())
    assert found.seconds > 60
    assert time.process_time() - start < 30
