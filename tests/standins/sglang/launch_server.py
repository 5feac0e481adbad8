"""Stands in for SGLang's server, which has no build for CPUs: the part of its HTTP interface that sluice uses, as documented."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch_workers
from serving import Sampler, option, serve

SAMPLER = Sampler(option("--model-path"))
OBEYS_SEEDS = "--enable-deterministic-inference" in sys.argv
NUM_WORKERS = int(option("--tp-size", "1"))
OTHERS = [torch_workers.Another(rank) for rank in range(1, NUM_WORKERS)]
"""They take the weights, and compute nothing with them."""


async def health(body: dict[str, Any]) -> tuple[int, Any]:
    return 200, ""


async def model_info(body: dict[str, Any]) -> tuple[int, Any]:
    return 200, {"model_path": option("--model-path"), "is_generation": True}


async def server_info(body: dict[str, Any]) -> tuple[int, Any]:
    layout = {
        "tp_size": NUM_WORKERS,
        "pp_size": 1,
        "dp_size": int(option("--dp-size", "1")),
        "enable_dp_attention": False,
    }
    return 200, {"device": "cpu", "version": "0.5.23", **layout}


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


async def of_workers(order: str, body: dict[str, Any], done: str, own: Callable[[], None]) -> tuple[int, Any]:
    """All of them at once; the server answers other requests meanwhile."""
    for other in OTHERS:
        other.ask(order, body)
    try:
        await asyncio.to_thread(own)
        errors = [error for other in OTHERS if (error := await asyncio.to_thread(other.answer))]
        assert not errors, errors
    except Exception as error:
        return 400, {"success": False, "message": f"Failed to {done}: {error}."}
    return 200, {"success": True, "message": f"Succeeded to {done}."}


async def init_weights_update_group(body: dict[str, Any]) -> tuple[int, Any]:
    return await of_workers("join", body, "initialize custom process group", lambda: torch_workers.join(body))


async def destroy_weights_update_group(body: dict[str, Any]) -> tuple[int, Any]:
    if body["group_name"] not in torch_workers.GROUPS:
        return 400, {"success": False, "message": "The group to be destroyed does not exist."}
    return await of_workers("leave", body, "destroy custom process group", lambda: torch_workers.leave(body))


async def update_weights_from_distributed(body: dict[str, Any]) -> tuple[int, Any]:
    def take() -> None:
        for name, weight in torch_workers.receive(body).items():
            SAMPLER.take_one(name, weight)

    assert body["group_name"] in torch_workers.GROUPS, "Please call `init_weights_update_group` first."
    answer = await of_workers("receive", body, "update parameter online", take)
    if answer[0] == 200 and body["flush_cache"]:
        assert not SAMPLER.active, "Cache flush failed after updating weights"
    if answer[0] == 200 and body.get("weight_version"):
        SAMPLER.version = body["weight_version"]
    return answer


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
    "/get_server_info": server_info,
    "/generate": generate,
    "/pause_generation": pause_generation,
    "/continue_generation": continue_generation,
    "/flush_cache": flush_cache,
    "/update_weights_from_disk": update_weights_from_disk,
    "/init_weights_update_group": init_weights_update_group,
    "/destroy_weights_update_group": destroy_weights_update_group,
    "/update_weights_from_distributed": update_weights_from_distributed,
    "/weights_checker": weights_checker,
    "/release_memory_occupation": release_memory_occupation,
    "/resume_memory_occupation": resume_memory_occupation,
}

if __name__ == "__main__":
    torch_workers.start()
    asyncio.run(serve(HANDLERS, option("--api-key") or None))
