"""SGLang as an engine: token ids in and out, and weights between a pause and its end.

Written from its documentation (0.5.23), its weight checker and its code for updates of weights; it has no build for CPUs, so it was run
against a stand-in only.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from base64 import b64decode
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sluice.engines.dialect import POLL_S, STATUS_LIMIT_S, Reply, ServerSetting
from sluice.engines.guard import HOST, PORT, Command, seen
from sluice.engines.http import HttpClient, HttpError
from sluice.engines.routed import Routed
from sluice.errors import EngineError
from sluice.types import FinishReason, Sampling
from sluice.weights.broadcast import Broadcast, BroadcastLink
from sluice.weights.disk import Disk, DiskInlet, DiskLink
from sluice.weights.publication import PUBLISH_LIMIT_S
from sluice.weights.server_group import ServerInlet

REASONS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}
PORTION_BYTES = 2**29
"""Of tensors that its workers are asked to take at once, and hold beside their weights."""
_KEY = "SLUICE_API_KEY"
_ENTRY = f"""\
import os, runpy, sys
sys.argv += ["--api-key", os.environ.pop("{_KEY}")]
runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
"""
"""Puts the key behind the words of the command line, where others on the machine do not see it. Without it SGLang answers what begins with
/health, /ready and /metrics only."""


@dataclass(frozen=True, kw_only=True)
class SglangServer(ServerSetting):
    """How one is started."""

    speculative: str | None = None
    draft_tokens: int = 3
    draft_path: str | None = None
    deterministic: bool = False

    def command(self, key: str) -> Command:
        words = [self.python, "-c", _ENTRY, "--host", HOST, "--port", PORT]
        words += ["--json-model-override-args", json.dumps({"architectures": [self.architecture]})]
        words += ["--model-path", self.model, "--served-model-name", "policy", "--load-format", "dummy"]
        words += ["--dtype", self.dtype, "--context-length", str(self.max_model_len)]
        words += ["--max-running-requests", str(self.max_num_seqs), "--sampling-defaults", "openai"]
        if self.tensor_parallel > 1:
            words += ["--tp-size", str(self.tensor_parallel)]
        if self.memory_fraction is not None:
            words += ["--mem-fraction-static", str(self.memory_fraction)]
        if self.quantization:
            words += ["--quantization", self.quantization]
        if self.speculative:
            words += ["--speculative-algorithm", self.speculative.upper()]
            words += ["--speculative-num-draft-tokens", str(self.draft_tokens)]
            words += ["--speculative-draft-model-path", self.draft_path] if self.draft_path else []
        if self.can_sleep:
            words += ["--enable-memory-saver"]
        if self.deterministic:
            words += ["--enable-deterministic-inference"]
        if self.reports_experts:
            words += ["--enable-return-routed-experts"]
        variables = {
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
            "OMP_NUM_THREADS": str(self.num_threads),
            # else /health makes a token, which it cannot while weights change
            "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",
            _KEY: key,
        }
        return Command([*words, *self.arguments], variables | seen(self.gpus))


@dataclass(frozen=True)
class Layout:
    """Of a server's workers."""

    num_workers: int
    """Those that tensor parallelism makes."""
    device: str
    has_ranks: bool
    """Whether these are all, or have numbers that no others have."""


def _layout(about: Any) -> Layout:
    try:
        is_plain = about["pp_size"] == 1 and (about["dp_size"] == 1 or about["enable_dp_attention"])
        return Layout(about["tp_size"], about["device"], is_plain)
    except (KeyError, TypeError) as error:
        raise EngineError(f"no SGLang server says of itself what this one does: {about!r}") from error


async def _order(http: HttpClient, path: str, body: Mapping[str, Any]) -> None:
    """About its weights."""
    answer = await http.post(path, body, PUBLISH_LIMIT_S)
    if not isinstance(answer, dict) or not answer.get("success"):
        said = answer.get("message", answer) if isinstance(answer, dict) else answer
        raise EngineError(f"SGLang did not take the weights: {said}")


def _portions(tensors: Sequence[Any]) -> Iterator[list[Any]]:
    """Name, shape and dtype of each; as many at once as fit, and one at least."""
    portion: list[Any] = []
    room = PORTION_BYTES
    for tensor in tensors:
        _, shape, dtype = tensor
        size = math.prod(shape) * dtype.itemsize
        if portion and size > room:
            yield portion
            portion, room = [], PORTION_BYTES
        portion.append(tensor)
        room -= size
    yield portion


def _versions(about: Mapping[str, Any], count: int) -> list[int] | None:
    """Of the weights, for so many tokens; by the server's own word, where it says so."""
    version = str(about.get("weight_version") or "")
    if version and not version.isdecimal():
        raise ConnectionError(f"it answers with weights that were not published ({version}); was it started again?")
    return [int(version)] * count if version else None


def _experts(routed: Routed, about: Mapping[str, Any], length: int) -> list[bytes]:
    """Of all but the last of so many tokens."""
    text = about.get("routed_experts")
    return routed.entries(None if text is None else np.frombuffer(b64decode(text), "<i4"), length)


class Sglang:
    """The dialect."""

    name = "SGLang"

    def __init__(self, server: SglangServer | None, deterministic: bool, routed: Routed | None = None) -> None:
        """Without a `server` it cannot be started. `deterministic`: it obeys seeds. `routed`: which experts it has to report."""
        self._server = server
        self._routed = routed
        self._deterministic = deterministic
        self._layout = Layout(1, "cpu", True)
        """Of the server that was checked last."""
        self._held: dict[str, str] = {}
        """What was published when the server first had weights of a checksum, by the checksum; both as the owner says."""

    def command(self, key: str) -> Command:
        assert self._server
        return self._server.command(key)

    async def check(self, http: HttpClient) -> None:
        await http.get("/get_model_info", STATUS_LIMIT_S)
        if not self._held:
            self._held[await self._checksum(http)] = "those it was started with"
        self._layout = _layout(await http.get("/get_server_info", STATUS_LIMIT_S))

    async def pass_through(self, http: HttpClient, limit_s: float) -> None:
        """Not /health_generate, whose token may be under way when it is put to sleep."""
        await http.get("/get_server_info", limit_s)

    async def generate(self, http: HttpClient, prompt_ids: Sequence[int], sampling: Sampling) -> Reply:
        params: dict[str, Any] = {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "stop": list(sampling.stop),
            "stop_token_ids": sorted(sampling.stop_token_ids),
            "ignore_eos": True,  # what ends a completion is among the ids above
            "no_stop_trim": True,
            "skip_special_tokens": False,
        }
        if self._deterministic:
            params["sampling_seed"] = sampling.seed % 2**31
        body = {"input_ids": list(prompt_ids), "sampling_params": params, "return_logprob": True}
        if self._routed:
            body["return_routed_experts"] = True
        answer = await http.post("/generate", body)
        try:
            about = answer["meta_info"]
            drawn = about.get("output_token_logprobs") or ()
            return Reply(
                token_ids=[token for _, token, *_ in drawn],
                logprobs=[logprob for logprob, *_ in drawn],
                finish_reason=REASONS[about["finish_reason"]["type"]],
                policy_versions=_versions(about, len(drawn)),
                routed_experts=_experts(self._routed, about, len(prompt_ids) + len(drawn))
                if self._routed and drawn
                else [],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"SGLang's answer is none: {type(error).__name__}: {error}") from error

    async def pause(self, http: HttpClient) -> None:
        """What is unfinished is given back as far as it is; then nothing holds the cache, without which no weights are taken."""
        await http.post("/pause_generation", {"mode": "abort"}, PUBLISH_LIMIT_S)
        limit = asyncio.get_running_loop().time() + PUBLISH_LIMIT_S
        while True:
            try:
                await http.post("/flush_cache", limit_s=STATUS_LIMIT_S)
                return
            except (HttpError, TimeoutError) as error:  # the latter in a long step
                if asyncio.get_running_loop().time() > limit:
                    raise TimeoutError(f"it did not empty its cache within {PUBLISH_LIMIT_S:g} s: {error}") from error
                await asyncio.sleep(POLL_S)

    def link(self, publication: Disk | Broadcast, engine: str) -> DiskLink | BroadcastLink[ServerInlet]:
        if isinstance(publication, Disk):
            return publication.link(engine)
        return publication.server_link(engine, self._layout.num_workers, self._layout.device)

    async def load(self, http: HttpClient, inlet: DiskInlet | ServerInlet, version: int) -> None:
        last = {"weight_version": str(version), "flush_cache": True}
        if isinstance(inlet, DiskInlet):
            await _order(http, "/update_weights_from_disk", {"model_path": str(inlet.of(version)), **last})
            return
        if not self._layout.has_ranks:
            raise EngineError(
                "weights cannot be broadcast to an SGLang server with --pp-size or --dp-size above 1, several of whose workers would have "
                "one rank; leave these out, or set engine.publication=disk"
            )
        await inlet.meet(version)
        if not inlet.has_joined:
            await self._join(http, inlet)
        try:
            await self._take(http, inlet, last)
        except (HttpError, EngineError):  # it lives, and the trainer is not to wait for it
            await self._leave(http, inlet)
            raise

    async def _take(self, http: HttpClient, inlet: ServerInlet, last: Mapping[str, Any]) -> None:
        portions = list(_portions(inlet.address.tensors))
        for number, tensors in enumerate(portions, 1):
            body = {
                "group_name": inlet.group_name,
                "names": [name for name, _, _ in tensors],
                "shapes": [shape for _, shape, _ in tensors],
                "dtypes": [str(dtype).removeprefix("torch.") for _, _, dtype in tensors],
                **(last if number == len(portions) else {"flush_cache": False}),
            }
            await _order(http, "/update_weights_from_distributed", body)

    async def _join(self, http: HttpClient, inlet: ServerInlet) -> None:
        """While the trainer does: each waits for the other."""
        address = inlet.address
        assert address.workers
        await self._leave(http, inlet)  # what a run before this one has left
        inlet.check_awaited()
        where = {"master_address": address.host, "master_port": address.workers.port, "backend": inlet.backend}
        ranks = {"rank_offset": 1, "world_size": len(address.ranks)}
        await _order(http, "/init_weights_update_group", {"group_name": inlet.group_name, **where, **ranks})
        inlet.joined()

    async def _leave(self, http: HttpClient, inlet: ServerInlet) -> None:
        inlet.has_joined = False
        with suppress(HttpError):  # there may be none
            await http.post("/destroy_weights_update_group", {"group_name": inlet.group_name}, PUBLISH_LIMIT_S)

    async def resume(self, http: HttpClient) -> None:
        await http.post("/continue_generation", {}, PUBLISH_LIMIT_S)

    async def fingerprint(self, http: HttpClient, published: Callable[[], Awaitable[str]]) -> str:
        """Of the published weights, if those that it computes with are others than at other publications, and the same as when these
        were published before: their checksum is SGLang's own, of tensors that it has joined, and says no more."""
        checksum, given = await self._checksum(http), await published()
        known = {of for held, of in self._held.items() if held != checksum}
        if given in known and checksum not in self._held:
            return f"of SGLang's checksum {checksum}"
        return self._held.setdefault(checksum, given)

    async def sleep(self, http: HttpClient) -> None:
        await http.post("/release_memory_occupation", {"tags": ["weights", "kv_cache"]}, PUBLISH_LIMIT_S)

    async def wake(self, http: HttpClient, what: Literal["weights", "kv_cache"]) -> None:
        await http.post("/resume_memory_occupation", {"tags": [what]}, PUBLISH_LIMIT_S)

    async def _checksum(self, http: HttpClient) -> str:
        answer = await http.post("/weights_checker", {"action": "checksum"}, PUBLISH_LIMIT_S)
        if not isinstance(answer, dict) or "per_engine_checksum" not in answer:
            raise EngineError(
                f"{http.url} is no SGLang server that tells checksums of its weights: it answers {answer!r}"
            )
        return answer["per_engine_checksum"]
