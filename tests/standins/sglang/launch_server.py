"""Stands in for SGLang's server, which has no build for CPUs: the part of its HTTP interface that sluice uses, as documented."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serving import Sampler, option, serve

SAMPLER = Sampler(option("--model-path"))
OBEYS_SEEDS = "--enable-deterministic-inference" in sys.argv


async def health(body: dict[str, Any]) -> tuple[int, Any]:
    return 200, ""


async def model_info(body: dict[str, Any]) -> tuple[int, Any]:
    return 200, {"model_path": option("--model-path"), "is_generation": True}


async def generate(body: dict[str, Any]) -> tuple[int, Any]:
    wanted = body["sampling_params"]
    if max(body["input_ids"]) >= SAMPLER.model.config.vocab_size:
        return 400, {"error": {"message": "The input_ids contain values greater than the vocab size"}}
    found = await SAMPLER.sample(
        body["input_ids"],
        limit=wanted["max_new_tokens"],
        temperature=wanted["temperature"],
        top_k=0,
        seed=wanted.get("sampling_seed") if OBEYS_SEEDS else None,
        stop=wanted["stop"],
        ends=set(wanted["stop_token_ids"]),
    )
    said = [[logprob, token, None] for token, logprob in zip(found["ids"], found["logprobs"], strict=True)]
    routed = np.array(found["routed"], "<i4")
    return 200, {
        "text": SAMPLER.tokenizer.decode(found["ids"]),
        "output_ids": found["ids"],
        "meta_info": {
            "finish_reason": {"type": found["reason"]},
            "completion_tokens": len(said),
            "weight_version": SAMPLER.version,
            **({"output_token_logprobs": said} if body.get("return_logprob") else {}),
            **(
                {"routed_experts": b64encode(routed.tobytes()).decode()}
                if SAMPLER.asks and body.get("return_routed_experts")
                else {}
            ),
        },
    }


async def pause_generation(body: dict[str, Any]) -> tuple[int, Any]:
    assert body["mode"] == "abort"
    SAMPLER.running.clear()
    for given_up in SAMPLER.active.values():
        given_up.set()
    return 200, {"message": "Generation paused successfully.", "status": "ok"}


async def continue_generation(body: dict[str, Any]) -> tuple[int, Any]:
    SAMPLER.running.set()
    return 200, {"message": "Generation continued successfully.", "status": "ok"}


async def flush_cache(body: dict[str, Any]) -> tuple[int, Any]:
    return (400 if SAMPLER.active else 200), "Cache flushed.\nPlease check backend logs for more details.\n"


async def update_weights_from_disk(body: dict[str, Any]) -> tuple[int, Any]:
    assert not SAMPLER.active, "Cache flush failed after updating weights"
    try:
        SAMPLER.load(body["model_path"])
    except Exception as error:
        return 400, {"success": False, "message": f"Failed to update weights: {error}", "num_paused_requests": 0}
    SAMPLER.version = body["weight_version"]
    return 200, {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}


async def weights_checker(body: dict[str, Any]) -> tuple[int, Any]:
    assert body["action"] == "checksum"
    digest = hashlib.sha256()
    for name, weight in SAMPLER.model.named_parameters():
        digest.update(name.encode() + weight.detach().numpy().tobytes())
    rank = {"checksums": {}, "per_gpu_checksum": digest.hexdigest(), "parallelism_info": {"tp_rank": 0, "tp_size": 1}}
    whole = hashlib.sha256(digest.hexdigest().encode()).hexdigest()
    return 200, {"success": True, "message": "", "ranks": [rank], "per_engine_checksum": whole}


async def release_memory_occupation(body: dict[str, Any]) -> tuple[int, Any]:
    assert set(body["tags"]) == {"weights", "kv_cache"}
    SAMPLER.sleep()
    return 200, ""


async def resume_memory_occupation(body: dict[str, Any]) -> tuple[int, Any]:
    SAMPLER.asleep -= set(body["tags"])
    return 200, ""


async def metrics(body: dict[str, Any]) -> tuple[int, Any]:
    return 200, f"sglang:num_running_reqs {len(SAMPLER.active)}\n"


HANDLERS = {
    "/metrics": metrics,
    "/health": health,
    "/get_model_info": model_info,
    "/generate": generate,
    "/pause_generation": pause_generation,
    "/continue_generation": continue_generation,
    "/flush_cache": flush_cache,
    "/update_weights_from_disk": update_weights_from_disk,
    "/weights_checker": weights_checker,
    "/release_memory_occupation": release_memory_occupation,
    "/resume_memory_occupation": resume_memory_occupation,
}

if __name__ == "__main__":
    asyncio.run(serve(HANDLERS, option("--api-key") or None))
