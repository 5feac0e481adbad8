"""The guard around vLLM's interface, by itself; `test_servers.py` asks a real server."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import Any

import pytest

from sluice.engines.vllm import INSIDE

KEY = "a key"


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Around an application that answers everything."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    spec = importlib.util.spec_from_file_location("sluice_key", INSIDE / "sluice_key.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "answer"})

    return module.RequireKey(application)


def sent(guard: Any, **scope: Any) -> list[Any]:
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    asyncio.run(guard(scope, None, send))
    return [message.get("status", message["type"]) for message in messages]


def greeting(word: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"here"), (b"authorization", word.encode())]


@pytest.mark.parametrize(
    "path", ["/collective_rpc", "/v1/models", "/health/", "/healthy", "/metrics/x", "//health", ""]
)
@pytest.mark.parametrize("headers", [[], greeting("Bearer a kez"), greeting(KEY), greeting("Bearer "), greeting("")])
def test_without_the_key_nothing_is_answered(guard: Any, path: str, headers: Any):
    assert sent(guard, type="http", path=path, headers=headers) == [401, "http.response.body"]
    assert sent(guard, type="websocket", path=path, headers=headers) == ["websocket.close"]


def test_with_the_key_and_for_a_sign_of_life_all_is(guard: Any):
    for kind in ("http", "websocket"):
        assert sent(guard, type=kind, path="/collective_rpc", headers=greeting(f"Bearer {KEY}")) == ["answer"]
    assert sent(guard, type="lifespan") == ["answer"]
    for path in ("/health", "/metrics"):
        assert sent(guard, type="http", path=path, headers=[]) == ["answer"]
