"""Requests to an inference server: JSON both ways over HTTP/1.1, on connections that are kept.

By hand, since a library takes 3 ms of this process for a request and this 0.15 ms: with 256 completions a step that is the better
part of a second, in which the event loop does nothing else.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

_LONGEST_HEAD = 2**16
_CONNECT_LIMIT_S = 10.0


class HttpError(Exception):
    """An answer that is none: `status` is that of HTTP, the text is what the server said."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"HTTP {status}: {said}")
        self.status = status


class HttpClient:
    """Of one server. Cancelling a request closes its connection, by which the server knows that nobody waits for it."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """`url` is `http://host:port`, or `https://…`, with no path; `key` is what the server wants to hear from who may give it orders."""
        parts = urlsplit(url)
        self.url = url
        self._host, self._tls = parts.hostname or "", parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._greeting = f"Host: {self._host}:{self._port}\r\n" + (f"Authorization: Bearer {key}\r\n" if key else "")
        self._open = set[asyncio.StreamWriter]()
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._closed = False

    async def get(self, path: str, limit_s: float) -> Any:
        """What the server answers, None where that is no JSON. Raises OSError when it cannot be reached or breaks off, HttpError for
        an error that it tells, TimeoutError."""
        async with asyncio.timeout(limit_s):
            return await self._ask("GET", path, b"")

    async def post(self, path: str, body: Mapping[str, Any] | None = None, limit_s: float | None = None) -> Any:
        """As `get`. Without a limit it is the caller's to cancel it."""
        async with asyncio.timeout(limit_s):
            return await self._ask("POST", path, b"" if body is None else json.dumps(body).encode())

    async def _ask(self, method: str, path: str, body: bytes) -> Any:
        head = f"{method} {path} HTTP/1.1\r\n{self._greeting}Content-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        while self._idle:
            reader, writer = self._idle.pop()
            with suppress(asyncio.IncompleteReadError, ConnectionError):  # the server has closed it meanwhile
                return await self._exchange(reader, writer, request)
        async with asyncio.timeout(_CONNECT_LIMIT_S):
            reader, writer = await asyncio.open_connection(
                self._host, self._port, ssl=self._tls or None, limit=_LONGEST_HEAD
            )
        self._open.add(writer)
        if self._closed:
            self.close()
        try:
            return await self._exchange(reader, writer, request)
        except asyncio.IncompleteReadError as error:
            raise ConnectionError(f"{self.url} broke off its answer") from error

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> Any:
        """Raises IncompleteReadError or ConnectionError when the connection ends before the answer does."""
        whole = False
        try:
            writer.write(request)
            status, headers = _parsed(await reader.readuntil(b"\r\n\r\n"))
            body = await _body(reader, headers)
            whole = headers.get("connection", "").lower() != "close"
        finally:
            if whole and not self._closed:
                self._idle.append((reader, writer))
            else:
                writer.transport.abort()
                self._open.discard(writer)
        if status >= 300:
            raise HttpError(status, _complaint(body))
        return json.loads(body) if "json" in headers.get("content-type", "") else None

    def close(self) -> None:
        """Breaks off what it waits for: of a machine that is lost nothing comes, not even an end."""
        self._closed = True
        for writer in self._open:
            writer.transport.abort()
        self._idle.clear()


def _parsed(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").rstrip().split("\r\n")
    named = (line.partition(":") for line in lines)
    return int(first.split()[1]), {name.strip().lower(): value.strip() for name, _, value in named}


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return await reader.readexactly(int(headers.get("content-length", 0)))
    chunks: list[bytes] = []
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        chunks.append((await reader.readexactly(size + 2))[:-2])
    await reader.readuntil(b"\r\n")
    return b"".join(chunks)


def _complaint(body: bytes) -> str:
    """The sentence in an error's body, whatever the server wraps it in."""
    said: Any = body.decode(errors="replace")
    with suppress(ValueError):
        said = json.loads(said)
        while isinstance(said, dict) and (inner := said.get("error", said.get("message", said.get("detail")))):
            said = inner
    text = said if isinstance(said, str) else json.dumps(said)
    return text if len(text) <= 500 else text[:500] + "…"
