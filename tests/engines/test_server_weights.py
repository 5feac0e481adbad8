"""How weights reach a server besides by a folder: broadcast to its workers, and adapters as such. Real vLLM in `make proof`, and a
stand-in always."""

from __future__ import annotations

import asyncio
import os
import pickle
import shutil
import signal
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import Served, logprobs_of, model, sampling, served
from test_servers import KEY, PROMPT, begun, by_hand, same, server_pids
from torch import Tensor
from transformers import AutoModelForCausalLM

from makers import make_char_tokenizer
from sluice.engines.vllm import Vllm
from sluice.errors import EngineError, EngineLostError
from sluice.trainers.lora import LoraModel
from sluice.trainers.model import PolicyModel
from sluice.types import Completion
from sluice.weights import group
from sluice.weights.broadcast import Broadcast
from sluice.weights.disk import Disk, DiskInlet
from sluice.weights.fingerprint import fingerprint
from sluice.weights.in_process import InProcessWeights
from sluice.weights.publication import WeightsMoved
from small_runs import ALPHABET

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


# Weights of another model

ONE_WORKER = ["vllm", pytest.param("real vllm", marks=pytest.mark.proof)]


def another(**changes: Any) -> PolicyModel:
    """Than `model(0)`."""
    config = model(0).config
    config.update(changes)
    return PolicyModel(AutoModelForCausalLM.from_config(config))


def renamed() -> PolicyModel:
    """With a tensor that vLLM finds to be unknown when it has taken a part of a joined matrix."""
    made = another()
    attention: Any = made.body.layers[0].self_attn  # pyright: ignore[reportIndexIssue]
    attention.l_norm = attention.k_norm
    del attention.k_norm
    return made


@pytest.mark.proof
@pytest.mark.parametrize("kind", ["vllm", "real vllm"])
def test_weights_of_another_model_are_refused_and_those_of_its_own_taken_afterwards(kind: str, tmp_path: Path):
    """Those that are known not to fit, and those at which vLLM breaks off in the middle: its half of them is not left for the next ones."""
    with served(kind, tmp_path) as made:
        made.publish(model(1), 0)
        for version, (other, complaint) in enumerate(
            [
                (another(vocab_size=160), r"lm_head\.weight is \[128, 64\] there, and \[160, 64\] comes"),
                (
                    another(num_hidden_layers=1, layer_types=["full_attention"]),
                    r"no model\.layers\.1\..* comes, which is \[",
                ),
                (
                    another(num_hidden_layers=3, layer_types=3 * ["full_attention"]),
                    r"model\.layers\.2\..* comes, .*, and there is none there",
                ),
                (renamed(), r"model\.layers\.0\.self_attn\.l_norm\.weight comes, \[32\], and there is none there"),
            ][: 4 if kind == "real vllm" else 3],
            1,
        ):
            with pytest.raises(EngineError, match=f"the server's model is not the trainer's: {complaint}"):
                made.publish(other, version)
            made.publish(model(version), 10 + version)
            assert made.run(made.engine.fingerprint()) == fingerprint(model(version).named_weights())
            says(made, model(version), 10 + version)


def test_another_models_weights_are_refused_before_they_are_broadcast(tmp_path: Path):
    """And the trainer waits for nobody."""
    other, start = another(vocab_size=160), time.monotonic()
    with served("vllm", tmp_path, publication=Broadcast(other.named_weights(), limit_s=200.0)) as made:
        with pytest.raises(EngineError, match=r"embed_tokens\.weight is \[128, 64\] there, and \[160, 64\] comes"):
            made.publish(other, 0)
        assert time.monotonic() - start < 100


@pytest.mark.proof
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_vllm_packs_is_read_as_it_is_computed_with(tied: bool, tmp_path: Path):
    """On a CPU vLLM has it twice. Planted: what it computes with is another than what it shows."""
    model(0, tied).model.save_pretrained(tmp_path / "model")
    make_char_tokenizer(tmp_path / "model", ALPHABET)
    with served("real vllm", tmp_path) as made:
        for version in range(2):
            made.publish(model(version + 1, tied), version)
            assert made.run(made.engine.fingerprint()) == fingerprint(model(version + 1, tied).named_weights())
            says(made, model(version + 1, tied), version)
        assert "spoiled" in str(made.run(told(made, "sluice_load", pickled(Spoil()), "0", "")))
        assert made.run(made.engine.fingerprint()) != fingerprint(model(2, tied).named_weights())
        made.publish(model(3, tied), 2)
        assert made.run(made.engine.fingerprint()) == fingerprint(model(3, tied).named_weights())
        says(made, model(3, tied), 2)


SPOIL = """
import gc
(head,) = {m for m in gc.get_objects() if type(m).__name__ == "ParallelLMHead"}
head.cpu_linear = lambda *given, right=head.cpu_linear: 2 * right(*given)
raise ValueError("spoiled")
"""


class Spoil:
    """What vLLM computes logits with, where it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, (SPOIL,)


def pickled(what: object) -> str:
    return b64encode(pickle.dumps(what)).decode()


async def told(made: Served, method: str, *arguments: str) -> Any:
    assert made.engine._server
    return await made.engine._server.http.post("/collective_rpc", {"method": method, "args": arguments}, 60)


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


@pytest.mark.parametrize("kind", ONE_WORKER)
def test_an_adapter_is_found_among_others_and_loaded_again_where_it_is_lost(kind: str, tmp_path: Path):
    """As somebody's own server has them, which other runs have used: its workers drop all adapters when they are given whole weights, and the
    server itself still tells of them."""
    one_of = {"publication": Disk(None, adapter=True), "change": taking_adapters("float32")}
    with served(kind, tmp_path, arguments=("--max-loras", "2"), **one_of) as made:
        made.publish(policy(1), 0)
        assert made.engine._server
        http, folder = made.engine._server.http, made.engine._publication.of(0) / "adapter"
        others = shutil.copytree(folder, tmp_path / "others")
        made.run(http.post("/v1/load_lora_adapter", {"lora_name": "another", "lora_path": str(others)}, 60))
        made.publish(policy(2), 1)
        assert made.run(made.engine.fingerprint()) == fingerprint(policy(2).named_weights())
        says(made, merged(policy(2)), 1)

        whole = tmp_path / "whole/version-000000"
        model(0).model.save_pretrained(whole)
        made.run(http.post("/pause?mode=keep", {}, 60))
        said = made.run(told(made, "sluice_load", pickled(DiskInlet(str(whole.parent))), "0", ""))
        assert said["results"] == [{"value": []}]
        made.publish(policy(3), 2)
        assert made.run(made.engine.fingerprint()) == fingerprint(policy(3).named_weights())
        says(made, merged(policy(3)), 2)

        made.run(made.engine._dialect.check(http))  # as another run does, which knows of none there
        made.publish(policy(4), 3)
        assert made.run(made.engine.fingerprint()) == fingerprint(policy(4).named_weights())
        says(made, merged(policy(4)), 3)


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
