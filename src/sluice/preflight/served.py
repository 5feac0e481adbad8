"""Whether a vLLM server that runs already fits a run: what can be asked of it, without giving it anything."""

from __future__ import annotations

import json
import os
import urllib.request
from typing import Any

from sluice.config import DryTrainer, TrainConfig
from sluice.engines.http import KEY_VARIABLE
from sluice.errors import ConfigError
from sluice.launch.checked import window_of
from sluice.launch.reachable import LIMIT_S
from sluice.preflight.findings import Item
from sluice.preflight.folder import ModelFolder


def check_served(item: Item, config: TrainConfig, url: str, policy: ModelFolder) -> None:
    """Raises ConfigError for one that does not answer as ours do."""
    try:
        said = _asked(f"{url}/collective_rpc", {"method": "sluice_shapes"})
        result = said["results"][0]
        shapes, highest_rank = ({}, 0) if "error" in result else result["value"]
        longest = _asked(f"{url}/v1/models")["data"][0]["max_model_len"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"engine.url={url} is no vLLM server that weights can be published to, or wants another key than that in {KEY_VARIABLE} "
            f"({type(error).__name__}: {error}); start it as docs/scaling.md says"
        ) from None
    if "error" in result:
        raise ConfigError(f"the server at engine.url={url} cannot tell the shapes of its weights: {result['error']}")
    for name, shape in policy.shapes.items():
        if sorted(shapes.get(name, shape)) != sorted(shape):
            item.fail(
                f"the model at engine.url={url} is not that of model.path={policy.path}: {name} is {shapes[name]} there, and {shape} "
                "here; start the server with --model MODEL_FOLDER of this one"
            )
            break
    if longest < (window := window_of(config, policy.max_length)):
        item.fail(
            f"the server at engine.url={url} takes {longest} tokens, and the run up to {window}; set engine.max_model_len={longest}, or "
            f"start the server with --max-model-len {window}"
        )
    trainer = config.trainer
    if config.publishes_adapters() and not isinstance(trainer, DryTrainer) and (trainer.lora_rank or 0) > highest_rank:
        takes = f"adapters up to rank {highest_rank}" if highest_rank else "no adapters"
        item.fail(
            f"the server at engine.url={url} takes {takes}, and trainer.lora_rank is {trainer.lora_rank}; start it with --enable-lora "
            "and a --max-lora-rank that is not smaller"
        )


def _asked(address: str, body: dict[str, Any] | None = None) -> Any:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=LIMIT_S) as answer:
        return json.loads(answer.read())
