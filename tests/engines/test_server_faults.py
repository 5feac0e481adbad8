"""Servers that stand still, are started again by their owner, or are left in the middle of a publication."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import KINDS, Served, logprobs_of, model, sampling, served
from test_servers import KEY, PROMPT, by_hand, free_port, instead, same, server_pids, until

from processes import children
from sluice.engines.http import HttpClient
from sluice.engines.router import Router
from sluice.errors import EngineError, EngineLostError
from sluice.types import Completion
from sluice.weights.in_process import InProcessWeights


def in_proof(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.proof)


LONG = sampling(150, stop_token_ids=frozenset())


def stop_computing(made: Served) -> None:
    """What listens goes on."""
    if made.kind == "real vllm":
        (core,) = children("VLLM::EngineCore", min(server_pids(made)))
        os.kill(core, signal.SIGSTOP)
    else:
        toggle(made)


def toggle(made: Served) -> None:
    """Whether a stand-in computes."""
    os.kill(min(server_pids(made)), signal.SIGUSR1)


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_answers_and_does_not_compute_is_killed(kind: str, tmp_path: Path):
    with served(kind, tmp_path, hang_timeout_s=2.0, step_s=0.02) as made:
        made.publish(model(1), 0)

        async def through() -> None:
            asked = asyncio.ensure_future(made.engine.generate(PROMPT, LONG))
            await until(lambda: made.num_running() == 1)
            stop_computing(made)
            await asked

        with pytest.raises(EngineLostError, match=r"no sign of life for 2 s \(engine.hang_timeout_s\)"):
            made.run(through())
        made.run(until(lambda: not server_pids(made)))


@pytest.mark.parametrize("kind", ["vllm", in_proof("sglang")])
def test_one_long_step_is_no_death(kind: str, tmp_path: Path):
    """Of several ticks of the limit; nor is a publication that takes longer than all of them."""
    with served(kind, tmp_path, hang_timeout_s=1.5, step_s=0.005) as made:
        made.publish(model(1), 0)
        load = made.engine._dialect.load

        async def slow(http: Any, inlet: Any, version: int) -> None:
            toggle(made)
            await asyncio.sleep(2.0)
            toggle(made)
            await load(http, inlet, version)

        async def through() -> Completion:
            asked = asyncio.ensure_future(made.engine.generate(PROMPT, LONG))
            await until(lambda: made.num_running() == 1)
            toggle(made)
            await asyncio.sleep(0.8)
            toggle(made)
            return await asked

        assert made.run(through()).policy_versions == [0] * 150
        made.engine._dialect.load = slow
        made.publish(model(2), 1)
        assert made.engine._deaths.num_started == 1


@pytest.mark.parametrize("kind", ["vllm", in_proof("sglang"), in_proof("real vllm")])
def test_one_that_stands_still_in_a_publication_is_started_again(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with served(kind, tmp_path) as made:
        made.publish(model(1), 0)
        stop_computing(made)
        with monkeypatch.context() as patch:
            patch.setattr(f"sluice.engines.{kind.removeprefix('real ')}.PUBLISH_LIMIT_S", 0.5)
            with pytest.raises(EngineLostError, match="did not carry out an order about its weights in time"):
                made.publish(model(2), 1)
        made.publish(model(2), 1)
        said = made.run(made.engine.generate(PROMPT, sampling()))
        assert same(said.logprobs, logprobs_of(model(2), PROMPT, said))
        assert len(server_pids(made)) == 1


def fails(guest: Served) -> None:
    async def load(http: Any, inlet: Any, version: int) -> None:
        raise EngineError("no such weights")

    guest.engine._dialect.load = load
    with pytest.raises(EngineError, match="no such weights"):
        guest.publish(model(2), 1)


def is_cancelled(guest: Served) -> None:
    async def load(http: Any, inlet: Any, version: int) -> None:
        await asyncio.sleep(100)

    async def cancelled() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(guest.engine.update_weights(InProcessWeights(model(2)), 1), 0.5)

    guest.engine._dialect.load = load
    guest.run(cancelled())


def takes_too_long(guest: Served) -> None:
    """So it is lost, and not looked for any more."""

    async def load(http: Any, inlet: Any, version: int) -> None:
        raise TimeoutError("no answer within 600 s")

    guest.engine._dialect.load = load
    with pytest.raises(EngineLostError, match=r"in time \(no answer within 600 s\), and was given up"):
        guest.publish(model(2), 1)


@pytest.mark.parametrize(
    ("kind", "breaks_off"),
    [
        ("vllm", is_cancelled),
        ("vllm", takes_too_long),
        ("sglang", fails),
        in_proof("vllm", fails),
        in_proof("sglang", is_cancelled),
    ],
)
def test_a_users_server_goes_on_after_a_publication_that_broke_off(
    kind: str, breaks_off: Callable[[Served], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SLUICE_ENGINE_KEY", KEY)
    with by_hand(kind, tmp_path) as url:
        with served(kind, tmp_path, url=url) as guest:
            guest.publish(model(1), 0)
            breaks_off(guest)

        async def asked() -> None:
            client = HttpClient(url, KEY)
            await asyncio.wait_for(guest.engine._dialect.generate(client, PROMPT, sampling()), 10)
            await client.close()

        asyncio.run(asked())


@pytest.mark.parametrize("kind", ["vllm", in_proof("sglang")])
def test_a_server_that_its_owner_starts_again_has_died_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """However long nothing answers there, up to the limit; what was asked meanwhile is answered."""
    monkeypatch.setenv("SLUICE_ENGINE_KEY", KEY)
    port = free_port()
    with served(kind, tmp_path, url=f"http://127.0.0.1:{port}", start_limit_s=60.0) as guest:
        router = Router([guest.engine], synchronous=True, max_restarts=1, group_size=4)

        async def lost() -> asyncio.Task[Completion]:
            asked = asyncio.create_task(router.generate(PROMPT, sampling()))
            await asyncio.sleep(1.0)
            assert not asked.done()
            assert "which is looked for; that may take 60 s (engine.start_limit_s)" in router.status()
            return asked

        async def answered(asked: asyncio.Task[Completion]) -> Completion:
            return await asked

        with by_hand(kind, tmp_path, port=port):
            guest.run(router.update_weights(guest.weights(model(1)), 0))
        asked = guest.run(lost())
        with by_hand(kind, tmp_path, port=port):
            said = guest.run(answered(asked))
            assert same(said.logprobs, logprobs_of(model(1), PROMPT, said))
        assert router.drain_metrics().values_by_name()["perf/lost_engines"] == 1


def test_how_long_a_start_may_take_is_said_while_it_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with served("vllm", tmp_path, start_limit_s=1.0) as made:
        instead("import time; time.sleep(600)", monkeypatch, made)

        async def through() -> None:
            publishing = asyncio.create_task(made.engine.update_weights(InProcessWeights(model(1)), 0))
            await asyncio.sleep(0.7)
            assert made.engine.status().endswith("which is starting; that may take 1 s (engine.start_limit_s)")
            with pytest.raises(EngineError):
                await publishing

        assert "may take" not in made.engine.status()
        made.run(through())
        assert "may take" not in made.engine.status()
