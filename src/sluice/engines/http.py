"""Requests to an inference server: JSON both ways over HTTP, on connections that are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import aiohttp

KEY_VARIABLE = "SLUICE_ENGINE_KEY"
"""Of the environment: the key of a server that somebody else has started."""
_CONNECT_LIMIT_S = 10.0
_KEPT_S = 2.0
"""For which an idle connection is kept: less than servers do, so that none is used that the server is about to close."""


class HttpError(Exception):
    """An answer that is none: `status` is that of HTTP, the text is what the server said."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"HTTP {status}: {said}")
        self.status = status


class HttpClient:
    """Of one server. Cancelling a request closes its connection, by which the server knows that nobody waits for it."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """`url` is `http://host:port`, or `https://…`, with no path; `key` is what the server wants to hear from who may give it orders."""
        self.url = url
        self._session = aiohttp.ClientSession(
            url,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT_S),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )

    async def get(self, path: str, limit_s: float) -> Any:
        """What the server answers, None where that is no JSON. Raises OSError when it cannot be reached or breaks off,
        ConnectionRefusedError when nobody listens there, HttpError for an error that it tells, TimeoutError."""
        return await self._ask("GET", path, None, limit_s)

    async def post(self, path: str, body: Mapping[str, Any] | None = None, limit_s: float | None = None) -> Any:
        """As `get`. Without a limit it is the caller's to cancel it."""
        return await self._ask("POST", path, body, limit_s)

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None, limit_s: float | None) -> Any:
        if self._session.closed:
            raise ConnectionError(f"the connection with {self.url} was closed")
        timeout = aiohttp.ClientTimeout(total=limit_s, sock_connect=_CONNECT_LIMIT_S)
        try:
            async with self._session.request(method, path, json=body, timeout=timeout) as answer:
                said = await answer.read()
        except aiohttp.ClientError as error:
            refused = isinstance(error, aiohttp.ClientConnectorError) and isinstance(
                error.os_error, ConnectionRefusedError
            )
            kind = ConnectionRefusedError if refused else ConnectionError
            raise kind(f"{self.url}: {str(error) or type(error).__name__}") from error
        except TimeoutError as error:  # which says nothing
            raise TimeoutError(f"{self.url} gave no answer to {method} {path} within {limit_s} s") from error
        if answer.status == 401:
            raise HttpError(401, f"{_complaint(said)}; a key for engine.url belongs in the variable {KEY_VARIABLE}")
        if answer.status >= 300:
            raise HttpError(answer.status, _complaint(said))
        return json.loads(said) if "json" in answer.content_type else None

    async def close(self) -> None:
        """Breaks off what it waits for: of a machine that is lost nothing comes, not even an end."""
        await self._session.close()


def _complaint(body: bytes) -> str:
    """The sentence in an error's body, whatever the server wraps it in."""
    said: Any = body.decode(errors="replace")
    with suppress(ValueError):
        said = json.loads(said)
        while isinstance(said, dict) and (inner := said.get("error", said.get("message", said.get("detail")))):
            said = inner
    text = said if isinstance(said, str) else json.dumps(said)
    return text if len(text) <= 500 else text[:500] + "…"
