"""Inference servers for tests: real ones where they are installed, else stand-ins, each with an engine and a tiny model."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import ROOT
from makers import make_char_tokenizer
from models import CONFIGS, MIXTURES
from sluice.data.chat import Chat, load_tokenizer
from sluice.engines.server import ServerEngine
from sluice.engines.sglang import Sglang, SglangServer
from sluice.engines.vllm import Vllm, VllmServer
from sluice.processes import Process
from sluice.trainers.model import PolicyModel
from sluice.types import Completion, Sampling
from sluice.weights.broadcast import Broadcast
from sluice.weights.disk import Disk
from sluice.weights.in_process import InProcessWeights, Updates
from small_runs import ALPHABET

STANDINS = ROOT / "tests/standins"
VLLM = ROOT / ".venv-vllm/bin/python"
KINDS = ["vllm", "sglang", pytest.param("real vllm", marks=pytest.mark.proof)]
WINDOW = 200

T = TypeVar("T")


def model(seed: int, tied: bool = False, architecture: str = "qwen3") -> PolicyModel:
    """Of a shape that vLLM's kernels for CPUs take."""
    torch.manual_seed(seed)
    config = CONFIGS[architecture]()
    heads = (
        {"head_dim": 32}
        if architecture.startswith(("qwen3", "glm4"))
        else {"num_attention_heads": 2, "num_key_value_heads": 2}
    )
    config.update({"hidden_size": 64, "tie_word_embeddings": tied, **heads})
    for name in ("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size"):
        if architecture in MIXTURES and hasattr(config, name):
            setattr(config, name, 64)
    made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4.0) if parameter.dim() >= 2 else parameter.add_(torch.randn_like(parameter) / 10)
    return PolicyModel(made)


@dataclass
class Served:
    """An engine, the loop that it lives in, and what was told of it."""

    kind: str
    engine: ServerEngine
    chat: Chat
    runner: asyncio.Runner
    folder: Path
    updates: Updates = field(default_factory=Updates)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(asyncio.wait_for(work, 240))

    def publish(self, policy: PolicyModel, version: int) -> None:
        self.run(self.engine.update_weights(self.weights(policy), version))

    def weights(self, policy: PolicyModel) -> InProcessWeights:
        """As all those of one trainer."""
        return InProcessWeights(policy, self.updates)

    @property
    def url(self) -> str:
        assert self.engine._server
        return self.engine._server.http.url

    def num_running(self) -> int:
        """Requests, by the server's own count."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            return int(
                float(
                    re.findall(r"^\w+:num_(?:requests_running|running_reqs)\S* (\S+)", answer.read().decode(), re.M)[0]
                )
            )


def dialect(kind: str, folder: Path, **changes: Any) -> Any:
    shared = {
        "model": str(folder / "model"),
        "architecture": json.loads((folder / "model/config.json").read_text())["architectures"][0],
        "dtype": "float32",
        "num_threads": 1,
        "max_model_len": WINDOW,
        "max_num_seqs": 16,
    }
    if kind == "sglang":
        return Sglang(SglangServer(python=sys.executable, **shared, deterministic=True, **changes), deterministic=True)
    python = VLLM if kind.startswith("real") else sys.executable
    repetition = {"max_pattern_size": 8, "min_count": 4}
    return Vllm(
        VllmServer(python=str(python), **shared, top_k=8, first_thread=0, cache_gb=1, **changes),
        repetition,
    )


@contextmanager
def served(
    kind: str,
    folder: Path,
    *,
    url: str | None = None,
    publication: Disk | Broadcast | None = None,
    hang_timeout_s: float = 60.0,
    step_s: float = 0.0,
    start_limit_s: float = 200.0,
    change: Callable[[Any], Any] = lambda made: made,
    **changes: Any,
) -> Iterator[Served]:
    """One of `kind`; a stand-in takes `step_s` for each token of a request, so that there is something to catch it at."""
    if kind.startswith("real") and not VLLM.exists():
        pytest.skip("`make vllm` installs vLLM, which this test needs")
    if not (folder / "model").exists():
        model(0).model.save_pretrained(folder / "model")
        make_char_tokenizer(folder / "model", ALPHABET)
    chat = Chat(load_tokenizer(str(folder / "model")))
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner() as runner:
        patch.setenv("STANDIN_STEP_S", str(step_s))
        if not kind.startswith("real"):
            patch.setenv("PYTHONPATH", os.pathsep.join([str(STANDINS), *filter(None, [os.environ.get("PYTHONPATH")])]))
        engine = ServerEngine(
            change(dialect(kind, folder, **changes)),
            publication or Disk(None),
            name="engine",
            url=url,
            decode=chat.decode,
            vocab_size=128,
            max_model_len=WINDOW,
            finish_limit_s=None,
            start_limit_s=start_limit_s,
            hang_timeout_s=hang_timeout_s,
            launch=Process,
        )
        engine.belongs_to(folder / ("guest" if url else "run"))
        (folder / "run").mkdir(exist_ok=True)
        made = Served(kind, engine, chat, runner, folder)
        try:
            yield made
        finally:
            runner.run(engine.close())


def logprobs_of(policy: PolicyModel, prompt: list[int], said: Completion, kept: bool = False) -> list[float]:
    """What transformers says of the tokens of a completion, at its temperature."""
    with torch.no_grad():
        logits = (
            policy.model(torch.tensor([prompt + said.token_ids])).logits[0, len(prompt) - 1 : -1] / said.temperature
        )
    if kept:
        for row, ids in zip(logits, said.kept_ids, strict=True):
            row[[i for i in range(len(row)) if i not in ids]] = -torch.inf
    return logits.log_softmax(-1).gather(1, torch.tensor(said.token_ids)[:, None])[:, 0].tolist()


def sampling(max_new_tokens: int = 12, **changes: Any) -> Sampling:
    return Sampling(
        **{"max_new_tokens": max_new_tokens, "temperature": 0.7, "stop_token_ids": frozenset({1}), **changes}
    )
