"""How weights reach a server besides by a folder: broadcast to its workers, and adapters as such. Real vLLM in `make proof`, and a
stand-in always."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import Served, logprobs_of, model, sampling, served
from test_servers import KEY, PROMPT, begun, by_hand, same, server_pids
from torch import Tensor

from sluice.engines.vllm import Vllm
from sluice.errors import EngineError, EngineLostError
from sluice.trainers.lora import LoraModel
from sluice.trainers.model import PolicyModel
from sluice.types import Completion
from sluice.weights import group
from sluice.weights.broadcast import Broadcast
from sluice.weights.disk import Disk
from sluice.weights.fingerprint import fingerprint
from sluice.weights.in_process import InProcessWeights
from sluice.weights.publication import WeightsMoved

KINDS = ["vllm", pytest.param("real vllm, 2 workers", marks=pytest.mark.proof)]


def workers(kind: str) -> int:
    return 2 if "workers" in kind else 1


@pytest.fixture(scope="module", params=KINDS)
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """That takes weights by broadcast."""
    kind: str = request.param
    publication = Broadcast(model(0).named_weights(), limit_s=60.0)
    folder = tmp_path_factory.mktemp("served")
    with served(kind, folder, publication=publication, tensor_parallel=workers(kind)) as made:
        yield made


def says(made: Served, policy: PolicyModel, version: int) -> None:
    """Whether it computes with the policy's weights, under that version, and with no keys and values of others."""
    prompt = 16 * PROMPT  # several blocks of the cache
    said = made.run(made.engine.generate(prompt, sampling(seed=1)))
    assert same(said.logprobs, logprobs_of(policy, prompt, said))
    assert set(said.policy_versions) == {version}


# Broadcast


def test_its_workers_have_what_was_broadcast(one: Served):
    for version in range(3):
        one.publish(model(version + 1), version)
        assert one.run(one.engine.fingerprint()) == fingerprint(model(version + 1).named_weights())
        says(one, model(version + 1), version)


def test_a_server_in_the_place_of_another_gets_what_was_broadcast_last(one: Served):
    one.publish(model(1), 10)
    for pid in server_pids(one):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineLostError):
        one.run(one.engine.generate(PROMPT, sampling()))
    assert one.run(one.engine.fingerprint()) == fingerprint(model(1).named_weights())
    says(one, model(1), 10)


def test_a_server_that_is_started_while_the_trainer_updates_waits_for_the_next_weights(one: Served):
    """It must not get half an update under the name of the last version, and goes on to live."""
    one.publish(model(1), 20)
    for pid in server_pids(one):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineLostError):
        one.run(one.engine.generate(PROMPT, sampling()))

    async def update() -> None:
        async with one.updates.another():
            pass

    one.run(update())
    with pytest.raises(WeightsMoved):
        one.run(one.engine.fingerprint())
    handle = InProcessWeights(model(2), one.updates, one.updates.count)
    one.run(one.engine.update_weights(handle, 21))
    assert one.run(one.engine.fingerprint()) == fingerprint(model(2).named_weights())
    says(one, model(2), 21)


def test_a_server_that_dies_while_it_takes_weights_is_lost_and_holds_nobody_up(
    one: Served, monkeypatch: pytest.MonkeyPatch
):
    send, start = group.Group.send, time.monotonic()

    def killing(self: group.Group, weights: Iterable[tuple[str, Tensor]]) -> None:
        for pid in server_pids(one):
            os.kill(pid, signal.SIGKILL)
        send(self, weights)

    handle = InProcessWeights(model(1), one.updates, one.updates.count)
    one.run(one.engine.update_weights(handle, 30))
    with monkeypatch.context() as patch:
        patch.setattr(group.Group, "send", killing)
        with pytest.raises(EngineLostError, match="SIGKILL"):
            one.run(one.engine.update_weights(handle, 31))
    assert time.monotonic() - start < 40
    one.run(one.engine.update_weights(handle, 32))
    says(one, model(1), 32)


def test_weights_that_are_not_the_published_ones_show_in_its_fingerprint(one: Served):
    """Planted: others are sent than were published."""

    class Stale(InProcessWeights):
        async def broadcast(self, address: Any, version: int) -> None:
            await one.weights(model(1)).broadcast(address, version)

    count = one.updates.count
    one.updates.count = 0  # that of `Served.weights`
    one.run(one.engine.update_weights(Stale(model(2), one.updates), 40))
    assert one.run(one.engine.fingerprint()) == fingerprint(model(1).named_weights())
    one.updates.count = count


@pytest.mark.parametrize("way", ["broadcast", "disk"])
def test_a_server_that_another_run_publishes_to_is_refused_until_that_has_ended(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def publication() -> Broadcast:
        return Broadcast(model(0).named_weights(), limit_s=60.0)

    monkeypatch.setenv("SLUICE_ENGINE_KEY", KEY)
    start = time.monotonic()
    with by_hand("vllm", tmp_path) as url:
        with served("vllm", tmp_path, url=url, publication=publication()) as first:
            first.publish(model(1), 5)
            second = publication() if way == "broadcast" else Disk(None)
            with (
                served("vllm", tmp_path, url=url, publication=second) as other,
                pytest.raises(
                    EngineError, match=r"another run publishes its weights to this server, from 127\.0\.0\.1"
                ),
            ):
                other.publish(model(2), 0)
            first.publish(model(3), 6)
            says(first, model(3), 6)
        with served("vllm", tmp_path, url=url, publication=publication()) as other:
            other.publish(model(2), 0)
            says(other, model(2), 0)
    assert time.monotonic() - start < 40


# Adapters


def policy(seed: int, dtype: torch.dtype = torch.float32, targets: tuple[str, ...] = ()) -> LoraModel:
    """`model(0)` with an adapter that does something, at a scale that is no power of two."""
    base = PolicyModel(model(0).model.to(dtype))
    made = LoraModel(base, rank=3, alpha=10.0, targets=targets, seed=seed, apart=True)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in made.model.named_parameters():
            if ".lora_B." in name:
                weight.normal_(0, 0.3)
    return made


def merged(adapted: LoraModel) -> PolicyModel:
    """The model without adapters that computes the same."""
    plain = model(0)
    with torch.no_grad():
        own = dict(plain.named_weights())
        for name, weight in adapted._merged(adapted.model.named_parameters()):
            own[name].copy_(weight)
    return plain


def taking_adapters(dtype: str) -> Callable[[Vllm], Vllm]:
    def change(dialect: Vllm) -> Vllm:
        assert dialect._server
        return Vllm(replace(dialect._server, lora_rank=8, dtype=dtype), adapter=True)

    return change


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_computes_with_the_adapter_that_was_published_last(kind: str, tmp_path: Path):
    """Only that is published. Its own reading of the weights under it and of the adapter is the trainer's; completions go on with the next
    one; and so does a server in the place of one that was killed."""
    one_of = {"publication": Disk(None, adapter=True), "change": taking_adapters("float32")}
    policies = [policy(1), policy(2, targets=("q_proj", "down_proj")), policy(3)]
    with served(kind, tmp_path, tensor_parallel=workers(kind), step_s=0.005, **one_of) as made:
        for version, adapted in enumerate(policies):
            made.publish(adapted, version)
            assert made.run(made.engine.fingerprint()) == fingerprint(adapted.named_weights())
            says(made, merged(adapted), version)
        assert [path.name for path in (tmp_path / "run/weights/version-000002").iterdir()] == ["adapter"]

        wants = [sampling(190, seed=seed, stop_token_ids=frozenset()) for seed in range(16)]

        async def through() -> list[Completion]:
            asked = await begun(made, wants)
            await made.engine.update_weights(InProcessWeights(policies[0]), 3)
            return await asyncio.gather(*asked)

        mixed = 0
        for said in made.run(through()):
            mixed += len({*said.policy_versions}) > 1
            for version, adapted in ((2, policies[2]), (3, policies[0])):
                own = [t for t, made_by in enumerate(said.policy_versions) if made_by == version]
                expected = logprobs_of(merged(adapted), PROMPT, said)
                assert same([said.logprobs[t] for t in own], [expected[t] for t in own], 1e-4)
        assert mixed

        for pid in server_pids(made):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineLostError):
            made.run(made.engine.generate(PROMPT, sampling()))
        assert made.run(made.engine.fingerprint()) == fingerprint(policies[0].named_weights())
        says(made, merged(policies[0]), 3)


@pytest.mark.proof
def test_an_adapter_in_bfloat16_is_read_back_to_the_last_bit(tmp_path: Path):
    """It is scaled by the server, and rounded then."""
    one_of = {"publication": Disk(None, adapter=True), "change": taking_adapters("bfloat16")}
    with served("real vllm", tmp_path, **one_of) as made:
        model(0).model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
        adapted = policy(1, torch.bfloat16)
        made.publish(adapted, 0)
        assert made.run(made.engine.fingerprint()) == fingerprint(adapted.named_weights())


def test_a_server_over_other_weights_is_told_by_its_fingerprint(tmp_path: Path):
    one_of = {"publication": Disk(None, adapter=True), "change": taking_adapters("float32")}
    with served("vllm", tmp_path, **one_of) as made:
        model(7).model.save_pretrained(tmp_path / "model")
        made.publish(policy(1), 0)
        assert made.run(made.engine.fingerprint()) != fingerprint(policy(1).named_weights())
