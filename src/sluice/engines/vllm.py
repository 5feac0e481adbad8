"""vLLM as an engine: token ids in and out, and weights by its interface for reinforcement learning.

Written for, and run with, vLLM 0.32. It wants `VLLM_SERVER_DEV_MODE=1`, `--enable-scale-out` (token ids in and out),
`--logprobs-mode processed_logprobs` (of the policy that was drawn from) and our extension of its workers
(`engines/inside_vllm/sluice_worker.py`); and it is started with our guard of its interface (`engines/inside_vllm/sluice_key.py`).
"""

from __future__ import annotations

import io
import json
import os
import pickle
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sluice.engines.dialect import STATUS_LIMIT_S, Reply, ServerSetting
from sluice.engines.guard import HOST, PORT, Command, seen
from sluice.engines.http import HttpClient, HttpError
from sluice.engines.routed import Routed
from sluice.errors import EngineError
from sluice.types import FinishReason, Sampling
from sluice.weights.broadcast import Broadcast, BroadcastInlet, BroadcastLink
from sluice.weights.disk import ADAPTER_FOLDER, Disk, DiskInlet, DiskLink
from sluice.weights.fingerprint import combined
from sluice.weights.publication import PUBLISH_LIMIT_S, Stream

ADAPTER = "adapter"
"""What the server calls the one that it takes."""
INSIDE = Path(__file__).with_name("inside_vllm")
DROPPED = -9000.0
"""vLLM says -9999 for the log-prob of an id that top-p or top-k dropped."""
REASONS: Mapping[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "repetition": "repetition",
    "abort": "abort",
}


@dataclass(frozen=True, kw_only=True)
class VllmServer(ServerSetting):
    """How one is started."""

    top_k: int
    """Of the run's sampling; so many ids are reported with each token."""
    first_thread: int | None
    """How many threads servers beside it have, on the last cores of this machine: its own are on those before. None: they are bound to no
    cores."""
    cache_gb: int
    """10⁹ bytes of key-value cache, on the CPU."""
    lora_rank: int | None = None
    """Of the adapters that it is to take, over the weights of the model's folder; None: it takes weights, and reads none there."""
    speculative: Mapping[str, Any] | None = None
    compiles: bool = False

    def command(self, key: str) -> Command:
        words = [self.python, "-m", "vllm.entrypoints.openai.api_server", "--host", HOST, "--port", PORT]
        words += ["--hf-overrides", json.dumps({"architectures": [self.architecture]})]
        words += ["--model", self.model, "--served-model-name", "policy"]
        if self.lora_rank is None:
            words += ["--load-format", "dummy"]
        else:
            words += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(self.lora_rank)]
        words += ["--dtype", self.dtype, "--max-model-len", str(self.max_model_len)]
        words += ["--max-num-seqs", str(self.max_num_seqs), "--generation-config", "vllm"]
        words += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", str(max(1, self.top_k))]
        words += ["--enable-scale-out", "--worker-extension-cls", "sluice_worker.Weights"]
        words += ["--disable-uvicorn-access-log", "--middleware", "sluice_key.RequireKey"]
        if self.tensor_parallel > 1:
            words += ["--tensor-parallel-size", str(self.tensor_parallel)]
        if self.memory_fraction is not None:
            words += ["--gpu-memory-utilization", str(self.memory_fraction)]
        if self.quantization:
            words += ["--quantization", self.quantization]
        if self.speculative:
            words += ["--speculative-config", json.dumps(self.speculative)]
        if self.can_sleep:
            words += ["--enable-sleep-mode"]
        if not self.compiles:
            words += ["--enforce-eager"]
        if self.reports_experts:
            words += ["--enable-return-routed-experts"]
        return Command([*words, *self.arguments], self._variables() | {"VLLM_API_KEY": key}, python_path=str(INSIDE))

    def _variables(self) -> dict[str, str]:
        eager = (
            {} if self.compiles else {"TORCH_COMPILE_DISABLE": "1"}
        )  # some of its sampling is compiled even when eager
        return (
            seen(self.gpus)
            | eager
            | {
                "VLLM_SERVER_DEV_MODE": "1",
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
                "VLLM_CPU_OMP_THREADS_BIND": self._cores(),
                "VLLM_CPU_KVCACHE_SPACE": str(self.cache_gb),
                "OMP_NUM_THREADS": str(max(1, self.num_threads // self.tensor_parallel)),
                "HF_HUB_OFFLINE": "1",
            }
            | ({"VLLM_USE_V2_MODEL_RUNNER": "1"} if self.reports_experts else {})  # the other one does not
        )

    def _cores(self) -> str:
        """Of each of its ranks."""
        if self.first_thread is None:
            return "nobind"
        cores = sorted(os.sched_getaffinity(0), reverse=True)  # the trainer's threads are not bound
        cores = cores[self.first_thread :][: self.num_threads] or cores
        of_ranks = [cores[rank :: self.tensor_parallel] or cores for rank in range(self.tensor_parallel)]
        return "|".join(",".join(map(str, own)) for own in of_ranks)


class Vllm:
    """The dialect."""

    name = "vLLM"

    def __init__(
        self,
        server: VllmServer | None,
        repetition: Mapping[str, int] | None = None,
        routed: Routed | None = None,
        *,
        adapter: bool = False,
    ) -> None:
        """Without a `server` it cannot be started. `repetition`: of what size a pattern and how many times in a row end a completion.
        `routed`: which experts it has to report. `adapter`: what is published is that alone."""
        self._server = server
        self._routed = routed
        self._repetition, self._adapter = repetition, adapter
        self._quantized = server is not None and server.quantization is not None
        self._loaded: list[Any] = []
        """The parts of what it was given last."""
        self._num_workers, self._is_plain = 1, True
        """Of the server that was checked last: workers that tensor parallelism makes, and whether these are all."""
        self._number = 0
        """Of our adapter there; 0 before we have loaded one."""

    def command(self, key: str) -> Command:
        assert self._server
        return self._server.command(key)

    async def check(self, http: HttpClient) -> None:
        try:
            await http.get("/weight_info", STATUS_LIMIT_S)
            ((self._num_workers, self._is_plain), *_) = await self._told(http, "sluice_ready")
            self._number = 0
        except (HttpError, ValueError) as error:
            raise EngineError(
                f"{http.url} is no vLLM server that weights can be published to ({error}); start it as docs/scaling.md says, with "
                "VLLM_SERVER_DEV_MODE=1, --enable-scale-out and --worker-extension-cls sluice_worker.Weights"
            ) from error

    async def pass_through(self, http: HttpClient, limit_s: float) -> None:
        await self._told(http, "sluice_ready", limit_s=limit_s)

    async def generate(self, http: HttpClient, prompt_ids: Sequence[int], sampling: Sampling) -> Reply:
        params: dict[str, Any] = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": sampling.seed,
            "stop": list(sampling.stop),
            "stop_token_ids": sorted(sampling.stop_token_ids),
            "ignore_eos": True,  # what ends a completion is among the ids above
            "detokenize": bool(sampling.stop),
            "logprobs": sampling.top_k,
        }
        if self._repetition:
            params["repetition_detection"] = dict(self._repetition)
        body = {"token_ids": list(prompt_ids), "sampling_params": params, "output_mode": "tokens"}
        if self._adapter:
            body["model"] = ADAPTER
        answer = await http.post("/inference/v1/generate", body)
        try:
            reply = _reply(answer["choices"][0], sampling.top_k > 0)
            if self._routed and reply.token_ids:
                numbers = _array(answer["choices"][0]["routed_experts"])
                reply.routed_experts = self._routed.entries(numbers, len(prompt_ids) + len(reply.token_ids))
            return reply
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EngineError(f"vLLM's answer is none: {type(error).__name__}: {error}") from error

    async def pause(self, http: HttpClient) -> None:
        """What is unfinished is kept; its keys and values are dropped with all that are cached, and computed again later."""
        await http.post("/pause?mode=keep", limit_s=PUBLISH_LIMIT_S)

    def link(self, publication: Disk | Broadcast, engine: str) -> DiskLink | BroadcastLink[BroadcastInlet]:
        if isinstance(publication, Broadcast) and not self._is_plain:
            raise EngineError(
                "weights cannot be broadcast to a vLLM server with pipeline or data parallelism, several of whose workers would have one "
                "rank; leave these out, or set engine.publication=disk"
            )
        return publication.link(engine, self._num_workers)

    async def load(self, http: HttpClient, inlet: Stream, version: int) -> None:
        if self._adapter:
            assert isinstance(inlet, DiskInlet)
            await self._load_adapter(http, str(inlet.of(version) / ADAPTER_FOLDER))
        else:
            pickled = b64encode(pickle.dumps(inlet)).decode()
            asked = "parts" if self._quantized else ""
            (self._loaded, *_) = await self._told(http, "sluice_load", pickled, str(version), asked)
        await http.post("/update_weight_version", {"new_version": str(version)}, PUBLISH_LIMIT_S)

    async def _load_adapter(self, http: HttpClient, folder: str) -> None:
        """The server itself is told of it once. With its own way to put another in its place (`load_inplace`), every step of a completion
        that was begun before would load the old one again. Its workers know adapters by numbers, and may have dropped ours, of which the
        server itself then still tells."""
        if self._number and all(await self._told(http, "sluice_load_adapter", folder, str(self._number))):
            return
        before, *_ = await self._told(http, "sluice_adapters")
        models = await http.get("/v1/models", STATUS_LIMIT_S)
        if ADAPTER in [model["id"] for model in models["data"]]:
            await http.post("/v1/unload_lora_adapter", {"lora_name": ADAPTER}, PUBLISH_LIMIT_S)
        await http.post("/v1/load_lora_adapter", {"lora_name": ADAPTER, "lora_path": folder}, PUBLISH_LIMIT_S)
        after, *_ = await self._told(http, "sluice_adapters")
        self._number = max({*after} - {*before})  # each gets a higher one

    async def resume(self, http: HttpClient) -> None:
        await http.post("/resume", limit_s=PUBLISH_LIMIT_S)

    async def fingerprint(self, http: HttpClient, published: Callable[[], Awaitable[str]]) -> str:
        """Of what it computes with, read back under the names of the checkpoint. Of rounded weights that would be another one: there
        it is of what it loaded last, whatever that is."""
        if self._quantized:
            return combined(map(tuple, self._loaded))
        return combined(_added(await self._told(http, "sluice_parts", str(self._number or ""))))

    async def sleep(self, http: HttpClient) -> None:
        await http.post("/sleep?level=2", limit_s=PUBLISH_LIMIT_S)

    async def wake(self, http: HttpClient, what: Literal["weights", "kv_cache"]) -> None:
        await http.post(f"/wake_up?tags={what}", limit_s=PUBLISH_LIMIT_S)

    async def _told(
        self, http: HttpClient, method: str, *arguments: str, limit_s: float = PUBLISH_LIMIT_S
    ) -> list[Any]:
        """By all its workers. Raises ValueError for what one of them could not do."""
        answer = await http.post("/collective_rpc", {"method": method, "args": arguments}, limit_s)
        if not isinstance(answer, dict) or "results" not in answer:
            raise ValueError(f"vLLM answers {method} with {answer!r}")
        if error := next((said["error"] for said in answer["results"] if "error" in said), None):
            raise ValueError(f"{method}: {error}")
        return [said["value"] for said in answer["results"]]


def _reply(choice: Mapping[str, Any], truncated: bool) -> Reply:
    token_ids: list[int] = choice["token_ids"]
    content: list[dict[str, Any]] = choice["logprobs"]["content"] if token_ids else []
    versions: list[int] = []
    for span in choice["weight_versions"] or ():
        versions += [int(span["version"])] * (span["end"] - span["start"])
    return Reply(
        token_ids=token_ids,
        logprobs=[said["logprob"] for said in content],
        finish_reason=REASONS[choice["finish_reason"]],
        policy_versions=versions,
        kept_ids=[[top["token_id"] for top in said["top_logprobs"] if top["logprob"] > DROPPED] for said in content]
        if truncated
        else [],
    )


def _array(text: str | None) -> NDArray[Any] | None:
    return None if text is None else np.load(io.BytesIO(b64decode(text)), allow_pickle=False)


def _added(ranks: Sequence[Sequence[Sequence[Any]]]) -> list[tuple[str, tuple[int, ...], str, int]]:
    """The parts of the whole from those of its shards."""
    whole: dict[str, tuple[tuple[int, ...], str, int]] = {}
    for name, shape, dtype, total in (part for rank in ranks for part in rank):
        before = whole[name][2] if name in whole else 0
        whole[name] = tuple(shape), dtype, _wrapped(before + total)
    return [(name, *rest) for name, rest in whole.items()]


def _wrapped(total: int) -> int:
    """As 64 bits with a sign, in which the sums are taken."""
    return (total + 2**63) % 2**64 - 2**63
