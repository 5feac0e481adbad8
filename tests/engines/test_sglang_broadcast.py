"""Weights that are broadcast to SGLang's workers, which join by torch's own means: by a stand-in that joins as they do, over gloo."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import Served, logprobs_of, model, sampling, served
from test_servers import KEY, PROMPT, begun, by_hand, same, server_pids
from torch import Tensor

from sluice.engines import sglang
from sluice.errors import EngineError, EngineLostError, TrainingError
from sluice.trainers.model import PolicyModel
from sluice.types import Completion
from sluice.weights.broadcast import Broadcast
from sluice.weights.fingerprint import fingerprint
from sluice.weights.in_process import InProcessWeights
from sluice.weights.publication import WeightsMoved
from sluice.weights.server_group import ServerGroup

LIMIT_S = 60.0
SOON_S = 30.0
"""With a server that is started again."""


def broadcast(policy: PolicyModel | None = None) -> dict[str, Any]:
    return {"publication": Broadcast((policy or model(0)).named_weights(), limit_s=LIMIT_S)}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Of two workers."""
    with served("sglang", tmp_path_factory.mktemp("served"), tensor_parallel=2, **broadcast()) as made:
        yield made


def says(made: Served, policy: PolicyModel, version: int) -> None:
    """Whether it computes with the policy's weights, under that version, and its own reading says so."""
    assert made.run(made.engine.fingerprint()) == fingerprint(policy.named_weights())
    said = made.run(made.engine.generate(PROMPT, sampling()))
    assert same(said.logprobs, logprobs_of(policy, PROMPT, said))
    assert set(said.policy_versions) == {version}


def kill(made: Served) -> None:
    for pid in server_pids(made):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("portion_bytes", [1, 20_000, sglang.PORTION_BYTES])
def test_its_workers_have_what_was_broadcast(one: Served, portion_bytes: int, monkeypatch: pytest.MonkeyPatch):
    """Again and again, in one request or in several."""
    monkeypatch.setattr(sglang, "PORTION_BYTES", portion_bytes)
    for version in range(3):
        one.publish(model(version + 1), version)
        says(one, model(version + 1), version)


def test_portions_are_bounded_and_hold_everything_in_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sglang, "PORTION_BYTES", 16)
    sizes = [3, 1, 0, 9, 2, 2, 1]  # of 4 bytes each
    tensors = [(str(size), (size,), torch.float32) for size in sizes]
    found = list(sglang._portions(tensors))
    assert [[shape[0] for _, shape, _ in portion] for portion in found] == [[3, 1, 0], [9], [2, 2], [1]]


def test_completions_live_through_a_publication(tmp_path: Path):
    """Each token's log-prob is that of the weights that it names."""
    policies = [model(1), model(2)]
    with served("sglang", tmp_path, step_s=0.005, **broadcast()) as made:
        made.publish(policies[0], 0)

        async def through() -> list[Completion]:
            asked = await begun(made, [sampling(190, seed=seed, stop_token_ids=frozenset()) for seed in range(8)])
            await asyncio.sleep(0.1)
            await made.engine.update_weights(made.weights(policies[1]), 1)
            return await asyncio.gather(*asked)

        mixed = False
        for said in made.run(through()):
            assert len(said.token_ids) == 190
            assert said.policy_versions == sorted(said.policy_versions)
            mixed |= len({*said.policy_versions}) > 1
            for version in {*said.policy_versions}:
                own = [t for t, made_by in enumerate(said.policy_versions) if made_by == version]
                expected = logprobs_of(policies[version], PROMPT, said)
                assert same([said.logprobs[t] for t in own], [expected[t] for t in own], 1e-4)
        assert mixed


def test_weights_that_are_not_the_published_ones_show_in_its_fingerprint(one: Served):
    """Planted: those before are sent once more."""

    class Stale(InProcessWeights):
        async def broadcast(self, address: Any, version: int) -> None:
            await one.weights(model(1)).broadcast(address, version)

    one.publish(model(1), 10)
    assert one.run(one.engine.fingerprint()) == fingerprint(model(1).named_weights())
    one.run(one.engine.update_weights(Stale(model(2), one.updates), 11))
    assert one.run(one.engine.fingerprint()) != fingerprint(model(2).named_weights())
    one.publish(model(2), 12)
    says(one, model(2), 12)


def test_a_server_in_the_place_of_another_gets_what_was_broadcast_last(one: Served):
    one.publish(model(1), 20)
    kill(one)
    with pytest.raises(EngineLostError):
        one.run(one.engine.generate(PROMPT, sampling()))
    says(one, model(1), 20)


def test_a_server_that_is_started_while_the_trainer_updates_waits_for_the_next_weights(one: Served):
    """It must not get half an update under the name of the last version, and goes on to live."""
    one.publish(model(1), 30)
    kill(one)
    with pytest.raises(EngineLostError):
        one.run(one.engine.generate(PROMPT, sampling()))

    async def update() -> None:
        async with one.updates.another():
            pass

    one.run(update())
    with pytest.raises(WeightsMoved):
        one.run(one.engine.fingerprint())
    pids = server_pids(one)
    one.updates.count = 0  # that of `Served.weights`
    one.publish(model(2), 31)
    assert server_pids(one) == pids
    says(one, model(2), 31)


@pytest.mark.parametrize("moment", ["as it joins", "between two tensors"])
def test_a_server_that_dies_while_it_takes_weights_is_lost_and_holds_nobody_up(
    one: Served, moment: str, monkeypatch: pytest.MonkeyPatch
):
    join, send, told = ServerGroup.join, ServerGroup.send, list[Exception]()

    def at_join(self: ServerGroup, device: torch.device) -> None:
        kill(one)
        try:
            join(self, device)
        except Exception as error:
            told.append(error)
            raise

    def on_the_way(self: ServerGroup, weights: Iterable[tuple[str, Tensor]]) -> None:
        def until_it_is_killed() -> Iterator[tuple[str, Tensor]]:
            for number, pair in enumerate(weights):
                if number == 2:
                    kill(one)
                yield pair

        try:
            send(self, until_it_is_killed())
        except Exception as error:
            told.append(error)
            raise

    one.publish(model(1), 40)
    if moment == "as it joins":  # which only a new one does
        kill(one)
        with pytest.raises(EngineLostError):
            one.run(one.engine.generate(PROMPT, sampling()))
    start = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(ServerGroup, *(("join", at_join) if moment == "as it joins" else ("send", on_the_way)))
        with pytest.raises(EngineLostError, match="SIGKILL"):
            one.publish(model(2), 41)
    assert told, "the trainer waits for it"
    assert time.monotonic() - start < SOON_S
    one.publish(model(3), 42)
    says(one, model(3), 42)


@pytest.mark.parametrize("moment", ["join", "send"])
def test_a_trainer_that_dies_does_not_hold_the_server_up(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What became of it is told, and the server listens again: it may belong to somebody else."""

    def dies(self: ServerGroup, *arguments: Any) -> None:
        if moment == "send":
            self._workers = None  # its end of the connections
        raise TrainingError("rank 0 was killed")

    with served("sglang", tmp_path, **broadcast()) as made:
        made.run(made.engine._connected())  # its start takes its time
        monkeypatch.setattr(ServerGroup, moment, dies)
        start = time.monotonic()
        with pytest.raises(TrainingError, match="rank 0 was killed"):
            made.publish(model(1), 0)
        assert time.monotonic() - start < SOON_S
        assert made.engine._server
        made.run(made.engine._server.http.post("/weights_checker", {"action": "checksum"}, SOON_S))


def test_a_server_that_refuses_weights_says_why_and_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Here of another shape than its own; the trainer is at the tensors behind them. The server goes on: it is not ours."""
    other = model(0)
    other.model.resize_token_embeddings(60)
    monkeypatch.setattr(sglang, "PORTION_BYTES", 1)
    monkeypatch.setenv("SLUICE_ENGINE_KEY", KEY)
    with by_hand("sglang", tmp_path) as url:
        start = time.monotonic()
        with (
            served("sglang", tmp_path, url=url, **broadcast(other)) as guest,
            pytest.raises(EngineError, match=r"HTTP 400: Failed to update parameter online: The size of tensor"),
        ):
            guest.publish(other, 0)
        assert time.monotonic() - start < SOON_S


def test_a_server_whose_workers_would_share_a_rank_is_refused(tmp_path: Path):
    with (
        served("sglang", tmp_path, arguments=("--dp-size", "2"), **broadcast()) as made,
        pytest.raises(EngineError, match=r"--dp-size above 1.*set engine\.publication=disk"),
    ):
        made.publish(model(1), 0)


def test_a_server_that_runs_takes_the_weights_of_one_run_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each in a group of its own: that of the run before is left behind."""
    monkeypatch.setenv("SLUICE_ENGINE_KEY", KEY)
    with by_hand("sglang", tmp_path) as url:
        for version in (5, 6):
            with served("sglang", tmp_path, url=url, **broadcast()) as guest:
                guest.publish(model(version), version)
                said = guest.run(guest.engine.generate(PROMPT, sampling()))
                assert same(said.logprobs, logprobs_of(model(version), PROMPT, said))
                assert said.policy_versions == [version] * len(said.token_ids)
