"""Mixtures of experts on servers: their weights, and which experts they took. Real vLLM in `make proof`, stand-ins for both always."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from servers import logprobs_of, model, sampling, served

from makers import make_char_tokenizer
from models import MIXTURES
from sluice.engines.routed import Routed, as_entries
from sluice.errors import EngineError
from sluice.trainers.model import PolicyModel
from sluice.weights.fingerprint import fingerprint
from sluice.weights.in_process import InProcessWeights
from small_runs import ALPHABET

PROMPT = [5, 6, 7, 8]
BOTH = Routed(2, (0, 1), 2, 8)
each_server = pytest.mark.parametrize("kind", ["vllm", "sglang"])


def mixture(seed: int, architecture: str = "qwen3_moe") -> PolicyModel:
    made = model(seed, architecture=architecture)
    made.replay_routing()
    return made


def folder_of(path: Path, architecture: str = "qwen3_moe") -> Path:
    model(0, architecture=architecture).model.save_pretrained(path / "model")
    make_char_tokenizer(path / "model", ALPHABET)
    return path


def asked(routed: Routed = BOTH) -> Callable[[Any], Any]:
    """A dialect that wants to know the experts."""

    def change(dialect: Any) -> Any:
        dialect._routed = routed
        return dialect

    return change


def choice_of(policy: PolicyModel, ids: list[int]) -> list[bytes]:
    with torch.no_grad():
        policy.hidden_states(torch.tensor([ids]), torch.arange(len(ids))[None])
    assert policy.routers
    return [*as_entries(policy.routers.chosen().numpy()[:-1], len(ids))]


@pytest.mark.proof
@pytest.mark.parametrize(("architecture", "ranks"), [*((name, 1) for name in MIXTURES), ("qwen3_moe", 2)])
def test_vllm_computes_with_the_published_experts(architecture: str, ranks: int, tmp_path: Path):
    """The first time and later ones, and its fingerprint is of those that it computes with."""
    with served("real vllm", folder_of(tmp_path, architecture), tensor_parallel=ranks) as one:
        for version in range(3):
            policy = model(1 + version, architecture=architecture)
            one.publish(policy, version)
            said = one.run(one.engine.generate(PROMPT, sampling(seed=version)))
            assert said.logprobs == pytest.approx(logprobs_of(policy, PROMPT, said), abs=1e-5)
            assert one.run(one.engine.fingerprint()) == fingerprint(policy.named_weights())


@each_server
def test_the_experts_of_a_completion_are_told(kind: str, tmp_path: Path):
    policy = mixture(1)
    with served(kind, folder_of(tmp_path), change=asked(), reports_experts=True) as one:
        one.publish(policy, 0)
        assert one.run(one.engine.fingerprint()) == fingerprint(policy.named_weights())
        said = one.run(one.engine.generate(PROMPT, sampling(seed=3)))
    assert said.routed_experts == choice_of(policy, PROMPT + said.token_ids)


@each_server
def test_each_token_keeps_the_experts_that_made_its_log_prob(kind: str, tmp_path: Path):
    """Of completions that live through a publication, whether the server gives them back or keeps them."""
    policies = [mixture(1), mixture(2)]
    with served(kind, folder_of(tmp_path), change=asked(), reports_experts=True, step_s=0.02) as one:
        one.publish(policies[0], 0)

        async def published_meanwhile() -> Any:
            task = asyncio.create_task(one.engine.generate(PROMPT, sampling(40, seed=3, stop_token_ids=frozenset())))
            await asyncio.sleep(0.4)
            assert not task.done()
            await one.engine.update_weights(InProcessWeights(policies[1]), 1)
            return await task

        said = one.run(published_meanwhile())
    ids = PROMPT + said.token_ids
    fed_before = len(PROMPT) + said.policy_versions.index(1) - 1
    first, then = (choice_of(policy, ids) for policy in policies)
    assert len(PROMPT) < fed_before < len(ids) - 1
    assert said.routed_experts == [*first[:fed_before], *then[fed_before:]]


@each_server
def test_a_server_that_does_not_tell_is_an_error(kind: str, tmp_path: Path):
    """As one that runs already, and was started without the option."""
    with served(kind, folder_of(tmp_path), change=asked()) as one:
        one.publish(mixture(1), 0)
        with pytest.raises(
            EngineError, match="which experts it took; it has to be started with --enable-return-routed-experts"
        ):
            one.run(one.engine.generate(PROMPT, sampling()))


def test_servers_speak_of_all_layers_and_engines_of_those_with_experts():
    numbers = np.arange(3 * 4 * 2).reshape(3, 4, 2)
    routed = Routed(4, (1, 3), 2, 24)
    entries = routed.entries(numbers, 4)
    assert [np.frombuffer(entry, "<u2").tolist() for entry in entries] == [
        [2, 3, 6, 7],
        [10, 11, 14, 15],
        [18, 19, 22, 23],
        [],
    ]
    with pytest.raises(ValueError, match=r"it tells 24 experts, and \(tokens, layers, experts each\) are \(4, 4, 2\)"):
        routed.entries(numbers, 5)


@pytest.mark.parametrize(
    ("chosen", "complaint"),
    [
        ([0, 0], "the same expert twice"),
        ([1, 8], "a layer has 8"),
        ([-1, 2], "tells experts -1 to 2"),
        (None, "does not say"),
    ],
)
def test_what_no_router_chose_is_refused(chosen: list[int] | None, complaint: str):
    """As a server says whose kernels note nothing; in layers without experts it may say what it likes."""
    numbers = None if chosen is None else np.array([[[0, 0], chosen]] * 3)
    with pytest.raises(ValueError, match=complaint):
        Routed(2, (1,), 2, 8).entries(numbers, 4)
