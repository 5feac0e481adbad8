"""Inside vLLM's server: nobody gives it orders who does not know the key.

vLLM itself asks for its key where a path begins with /v1, /v2, /inference or /cohere, and not for what changes its weights or calls methods of
its workers.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

OPEN = ("/health", "/metrics")


class RequireKey:
    """Around the whole application, by the interface of ASGI."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._greeting = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Callable[..., Awaitable[None]]) -> None:
        said = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] == "lifespan" or scope["path"] in OPEN or hmac.compare_digest(said, self._greeting):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        else:
            kind = (b"content-type", b"application/json")
            await send({"type": "http.response.start", "status": 401, "headers": [kind]})
            await send(
                {"type": "http.response.body", "body": b'{"error": "it wants the key that it was started with"}'}
            )
