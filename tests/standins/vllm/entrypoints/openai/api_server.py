"""Stands in for vLLM's server where that is not installed: the part of its HTTP interface that sluice uses."""

from __future__ import annotations

import asyncio
import io
import os
import sys
from base64 import b64encode
from itertools import count, groupby
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from serving import Sampler, option, serve

from sluice.engines.vllm_tensors import Shapes, misfit
from sluice.errors import SluiceError
from sluice.weights.disk import DiskInlet
from sluice.weights.fingerprint import parts
from sluice.weights.publication import Source

SAMPLER = Sampler(option("--model"), random_weights=option("--load-format") == "dummy")
SOURCE = Source()
NUMBERS = count(1)
NAMED: dict[str, int] = {}
"""Adapters that the server tells of."""
HELD: set[int] = set()
"""Those that its worker has, of which the model computes with the one called `adapter`."""


async def health(body: dict[str, Any]) -> tuple[int, Any]:
    return 200, ""


async def weight_info(body: dict[str, Any]) -> tuple[int, Any]:
    return 200, {"weight_version": SAMPLER.version}


async def generate(body: dict[str, Any]) -> tuple[int, Any]:
    wanted = body["sampling_params"]
    if body.get("model", "policy") != ("adapter" if "adapter" in NAMED else "policy"):
        return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}
    if max(body["token_ids"]) >= SAMPLER.model.config.vocab_size:
        return 400, {"error": {"message": "Token id is out of vocabulary", "code": 400}}
    found = await SAMPLER.sample(
        body["token_ids"],
        limit=wanted["max_tokens"],
        temperature=wanted["temperature"],
        top_k=wanted["top_k"],
        seed=wanted["seed"],
        stop=wanted["stop"],
        ends=set(wanted["stop_token_ids"]),
    )
    spans: list[dict[str, Any]] = []
    for version, tokens in groupby(found["versions"]):
        start = spans[-1]["end"] if spans else 0
        spans.append({"version": version, "start": start, "end": start + len(list(tokens))})
    content = [
        {
            "token_id": token,
            "logprob": logprob,
            "rank": 1,
            "top_logprobs": [{"token_id": i, "logprob": logp, "rank": 1} for i, logp in kept],
        }
        for token, logprob, kept in zip(found["ids"], found["logprobs"], found["kept"], strict=True)
    ]
    choice = {"index": 0, "finish_reason": found["reason"], "stop_reason": None, "token_ids": found["ids"]}
    choice |= {"weight_versions": spans, "logprobs": {"content": content}, "routed_experts": None}
    if SAMPLER.asks:
        numbers = io.BytesIO()
        np.save(numbers, np.array(found["routed"], np.uint8), allow_pickle=False)
        choice["routed_experts"] = b64encode(numbers.getvalue()).decode()
    return 200, {"choices": [choice]}


async def pause(body: dict[str, Any]) -> tuple[int, Any]:
    assert body["mode"] == "keep"
    SAMPLER.running.clear()
    return 200, {"status": "paused"}


async def resume(body: dict[str, Any]) -> tuple[int, Any]:
    SAMPLER.running.set()
    return 200, {"status": "resumed"}


async def models(body: dict[str, Any]) -> tuple[int, Any]:
    return 200, {"data": [{"id": name, "max_model_len": int(option("--max-model-len"))} for name in ("policy", *NAMED)]}


async def load_lora_adapter(body: dict[str, Any]) -> tuple[int, Any]:
    name = body["lora_name"]
    assert "--enable-lora" in sys.argv
    if name in NAMED:
        return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded.", "code": 400}}
    NAMED[name] = next(NUMBERS)
    HELD.add(NAMED[name])
    if name == "adapter":
        assert not SAMPLER.running.is_set()
        SAMPLER.take_adapter(body["lora_path"], int(option("--max-lora-rank")))
    return 200, f"Success: LoRA adapter '{name}' added successfully."


async def unload_lora_adapter(body: dict[str, Any]) -> tuple[int, Any]:
    """The worker keeps it."""
    del NAMED[body["lora_name"]]
    return 200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully."


async def update_weight_version(body: dict[str, Any]) -> tuple[int, Any]:
    SAMPLER.version = body["new_version"]
    return 200, {"success": True, "new_version": body["new_version"]}


def _shapes() -> Shapes:
    return {name: list(shape) for name, shape, *_ in parts(SAMPLER.named_weights())}


def _load(inlet: Any, version: int) -> None:
    HELD.clear()
    SAMPLER.drop_adapter()
    complaint, is_certain = misfit(_shapes(), inlet.shapes(version))
    if is_certain:
        raise SluiceError(complaint)
    if isinstance(inlet, DiskInlet):  # where experts have other names than in the model
        SAMPLER.load(str(inlet.of(version)))
    else:
        SAMPLER.take(inlet.tensors(version, torch.device("cpu"), 0))


async def collective_rpc(body: dict[str, Any]) -> tuple[int, Any]:
    if "--worker-extension-cls" not in sys.argv:
        return 500, {"error": {"message": f"no method {body['method']}", "code": 500}}
    match body["method"], body.get("args", []):
        case "sluice_ready", []:
            return 200, {"results": [{"value": [int(option("--tensor-parallel-size", "1")), True]}]}
        case "sluice_load", [inlet, version, asked]:
            assert not SAMPLER.running.is_set()
            try:
                stream = SOURCE.inlet(inlet)
                try:
                    _load(stream, int(version))
                except BaseException:
                    SOURCE.drop()
                    raise
            except SluiceError as error:
                return 200, {"results": [{"error": str(error)}]}
            return 200, {"results": [{"value": parts(SAMPLER.named_weights()) if asked else []}]}
        case "sluice_adapters", []:
            return 200, {"results": [{"value": sorted(HELD)}]}
        case "sluice_load_adapter", [folder, number]:
            if int(number) in HELD:
                assert int(number) == NAMED["adapter"]
                SAMPLER.take_adapter(folder, int(option("--max-lora-rank")))
            return 200, {"results": [{"value": int(number) in HELD}]}
        case "sluice_parts", [adapter]:
            assert not adapter or int(adapter) in HELD
            return 200, {"results": [{"value": parts(SAMPLER.named_weights())}]}
        case "sluice_shapes", []:
            return 200, {"results": [{"value": [_shapes(), int(option("--max-lora-rank", "0"))]}]}
    return 500, {"error": {"message": f"no method {body['method']}", "code": 500}}


async def sleep(body: dict[str, Any]) -> tuple[int, Any]:
    assert body["level"] == "2"
    SAMPLER.running.clear()
    SAMPLER.sleep()
    return 200, {"status": "sleeping", "level": 2}


async def wake_up(body: dict[str, Any]) -> tuple[int, Any]:
    SAMPLER.asleep.discard(body["tags"])
    return 200, {"status": "sleeping" if SAMPLER.asleep else "awake", "tags": [body["tags"]]}


async def metrics(body: dict[str, Any]) -> tuple[int, Any]:
    return 200, f'vllm:num_requests_running{{engine="0"}} {len(SAMPLER.active)}\n'


HANDLERS = {
    "/metrics": metrics,
    "/health": health,
    "/weight_info": weight_info,
    "/inference/v1/generate": generate,
    "/pause": pause,
    "/resume": resume,
    "/v1/models": models,
    "/v1/load_lora_adapter": load_lora_adapter,
    "/v1/unload_lora_adapter": unload_lora_adapter,
    "/update_weight_version": update_weight_version,
    "/collective_rpc": collective_rpc,
    "/sleep": sleep,
    "/wake_up": wake_up,
}

if __name__ == "__main__":
    asyncio.run(serve(HANDLERS, os.environ["VLLM_API_KEY"] if "sluice_key.RequireKey" in sys.argv else None))
