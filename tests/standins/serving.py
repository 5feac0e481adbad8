"""What the stand-ins for inference servers are made of: a tiny model that samples for many requests at once, and HTTP.

They are processes that are started as the real ones are (`python -m sglang.launch_server …`), and answer what those would; log-probs
and weights are real ones.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

Handler = Callable[[dict[str, Any]], Awaitable[tuple[int, Any]]]
STEP_S = float(os.environ.get("STANDIN_STEP_S", "0"))
"""How long a token takes besides its computation."""
COMPUTES = asyncio.Event()
"""SIGUSR1 ends it, or begins it again: without it whoever asks waits, but for a sign of life from what listens."""
COMPUTES.set()


class Sampler:
    """Draws a token of every request in turn."""

    def __init__(self, path: str, *, random_weights: bool = True) -> None:
        logging.disable_progress_bar()
        torch.set_num_threads(1)
        torch.manual_seed(1234)  # the weights are no model's until some are loaded
        self.model: Any = (
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
            if random_weights
            else AutoModelForCausalLM.from_pretrained(path)
        )
        self.has_adapter = False
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.version = "default"
        self.asks = {"output_router_logits": True} if "--enable-return-routed-experts" in sys.argv else {}
        self.top_k = getattr(self.model.config, "num_experts_per_tok", 0)
        self.asleep: set[str] = set()
        self.running = asyncio.Event()
        self.running.set()
        self.active: dict[object, asyncio.Event] = {}
        """By request: whether it is to be given up."""

    def sleep(self) -> None:
        """Without its weights, which are gone."""
        assert not self.active
        self.asleep = {"weights", "kv_cache"}
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()

    def load(self, folder: str) -> None:
        assert "weights" not in self.asleep
        published, about = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(about[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        self.model.load_state_dict(published.state_dict())

    def take(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        weights = dict(named)
        assert "weights" not in self.asleep
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}  # tied

    def take_adapter(self, folder: str, max_rank: int) -> None:
        """Over the model's own weights, in the place of the one before."""
        from peft import PeftModel

        assert json.loads((Path(folder) / "adapter_config.json").read_text())["r"] <= max_rank
        self.drop_adapter()
        self.model, self.has_adapter = PeftModel.from_pretrained(self.model, folder), True

    def drop_adapter(self) -> None:
        if self.has_adapter:
            self.model, self.has_adapter = self.model.unload(), False

    def named_weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        """By the names that sluice has for them."""
        if not self.has_adapter:
            return self.model.named_parameters()
        from sluice.trainers.lora import weights_apart

        inner = self.model.base_model.model
        return weights_apart(inner, inner.named_parameters())

    def take_one(self, name: str, weight: torch.Tensor) -> None:
        """The others stay as they are."""
        assert "weights" not in self.asleep
        with torch.no_grad():
            self.model.get_parameter(name).copy_(weight)

    async def sample(
        self,
        prompt: Sequence[int],
        *,
        limit: int,
        temperature: float,
        top_k: int,
        seed: int | None,
        stop: Sequence[str],
        ends: set[int],
    ) -> dict[str, Any]:
        """Token ids, their log-probs, those of the ids that were kept, the version of each, and why it ended."""
        generator = torch.Generator().manual_seed(seed) if seed is not None else None
        found: dict[str, Any] = {
            "ids": [],
            "logprobs": [],
            "kept": [],
            "versions": [],
            "routed": [],
            "reason": "length",
        }
        number = object()
        given_up = self.active[number] = asyncio.Event()
        try:
            while len(found["ids"]) < limit:
                await asyncio.sleep(STEP_S)
                await COMPUTES.wait()
                if given_up.is_set():
                    found["reason"] = "abort"
                    break
                if not self.running.is_set():
                    await self.running.wait()
                    continue
                self._draw(prompt, found, temperature, top_k, generator)
                if found["ids"][-1] in ends or any(s in self.tokenizer.decode(found["ids"]) for s in stop):
                    found["reason"] = "stop"
                    break
        finally:
            del self.active[number]
        return found

    def _routed(self, output: Any) -> list[Any]:
        """By token, the experts of each layer."""
        if not self.asks:
            return []
        return torch.stack([logits.topk(self.top_k).indices for logits in output.router_logits], 1).tolist()

    @torch.inference_mode()
    def _draw(
        self, prompt: Sequence[int], found: dict[str, Any], temperature: float, top_k: int, generator: Any
    ) -> None:
        assert not self.asleep
        output = self.model(torch.tensor([[*prompt, *found["ids"]]]), **self.asks)
        found["routed"] += self._routed(output)[len(found["routed"]) :]
        logits = output.logits[0, -1] / temperature
        if top_k > 0:
            logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
        logp = logits.log_softmax(-1)
        token = int(torch.multinomial(logp.exp(), 1, generator=generator))
        found["ids"].append(token)
        found["logprobs"].append(float(logp[token]))
        kept = [token, *(i for i in logp.isfinite().nonzero()[:, 0].tolist() if i != token)] if top_k > 0 else []
        found["kept"].append([(i, float(logp[i])) for i in kept])
        found["versions"].append(self.version)


async def serve(handlers: dict[str, Handler], key: str | None) -> None:
    """HTTP/1.1 where the command line says; a handler gets the request's JSON and query, and is cancelled when who asked has gone.

    With a `key`, who does not say it gets no more than a sign of life."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                target = urlsplit(head.split()[1])
                length = int(
                    next(
                        (
                            line.split(":")[1]
                            for line in head.split("\r\n")
                            if line.lower().startswith("content-length")
                        ),
                        0,
                    )
                )
                body = json.loads(await reader.readexactly(length) or b"{}") | dict(parse_qsl(target.query))
                is_known = (
                    key is None or f"Authorization: Bearer {key}" in head or target.path in ("/health", "/metrics")
                )
                handler = handlers.get(target.path) if is_known else unauthorized
                work = asyncio.ensure_future(_answered(handler, body, target.path)) if handler else None
                gone = asyncio.ensure_future(reader.read(1))
                if work:
                    await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
                    if not work.done():
                        work.cancel()
                        return
                gone.cancel()
                with suppress(asyncio.CancelledError):
                    await gone
                status, value = work.result() if work else (404, {"detail": "Not Found"})
                text = json.dumps(value).encode() if not isinstance(value, str) else value.encode()
                kind = "text/plain" if isinstance(value, str) else "application/json"
                writer.write(
                    f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(text)}\r\n\r\n".encode()
                    + text
                )
        writer.close()

    def toggle() -> None:
        COMPUTES.clear() if COMPUTES.is_set() else COMPUTES.set()

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, toggle)
    server = await asyncio.start_server(answer, option("--host"), int(option("--port")))
    async with server:
        await server.serve_forever()


async def _answered(handler: Handler, body: dict[str, Any], path: str) -> tuple[int, Any]:
    if path not in ("/health", "/metrics"):
        await COMPUTES.wait()
    return await handler(body)


async def unauthorized(body: dict[str, Any]) -> tuple[int, Any]:
    return 401, {"error": "Unauthorized"}


def option(name: str, default: str = "") -> str:
    """What follows an option of the command line."""
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default
