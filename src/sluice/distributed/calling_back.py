"""How a process on another machine is connected: it calls the driver back, and says a secret before anything else is read.

The secret is new for every process and travels through Ray. What comes after it is pickled, so nobody else may get so far.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

Line = Literal["talk", "output"]
"""The two connections of a process: the conversation, and what it prints."""

T = TypeVar("T")

_LINES: tuple[Line, ...] = ("talk", "output")
_TOKEN_BYTES = 32
_GREETING_LIMIT_S = 2.0
"""For who has connected to say the secret."""
_LOOK_S = 0.1
_PROBES = 4


@dataclass(frozen=True)
class Number:
    """Where the driver listens for one process."""

    host: str
    port: int
    token: bytes
    lost_after_s: float
    """The machine at the other end counts as lost when nothing has come from it for so long."""

    def call(self, line: Line, limit_s: float) -> socket.socket:
        """Raises OSError when the driver cannot be reached."""
        connection = socket.create_connection((self.host, self.port), limit_s)
        connection.sendall(self.token + bytes([_LINES.index(line)]))
        connection.settimeout(None)
        notice_a_lost_machine(connection, self.lost_after_s)
        return connection


class Listener:
    """Waits for the calls of one process, at an address of this machine."""

    def __init__(self, host: str, lost_after_s: float) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        port: int = self._listener.getsockname()[1]
        self.number = Number(host, port, secrets.token_bytes(_TOKEN_BYTES), lost_after_s)

    def both(self, limit_s: float, look: Callable[[], T | None]) -> tuple[dict[Line, socket.socket], T]:
        """Waits until both lines are there and `look`, which is called again and again, has given something; what it raises ends
        the wait.

        Raises TimeoutError when they are not there in time.
        """
        found: dict[Line, socket.socket] = {}
        end = time.monotonic() + limit_s
        try:
            while (said := look()) is None or len(found) < len(_LINES):
                if time.monotonic() > end:
                    raise TimeoutError
                found |= self._next()
        except BaseException:
            for connection in found.values():
                connection.close()
            raise
        finally:
            self._listener.close()
        return found, said

    def _next(self) -> dict[Line, socket.socket]:
        """A line that has come within a moment, with the secret; others are hung up on."""
        self._listener.settimeout(_LOOK_S)
        try:
            connection, _ = self._listener.accept()
        except TimeoutError:
            return {}
        try:
            line = self._greeted(connection)
        except OSError:
            line = None
        if line is None:
            connection.close()
            return {}
        connection.settimeout(None)
        notice_a_lost_machine(connection, self.number.lost_after_s)
        return {line: connection}

    def _greeted(self, connection: socket.socket) -> Line | None:
        end, said = time.monotonic() + _GREETING_LIMIT_S, b""
        while len(said) < _TOKEN_BYTES + 1:
            connection.settimeout(max(0.001, end - time.monotonic()))
            more = connection.recv(_TOKEN_BYTES + 1 - len(said))
            if not more or time.monotonic() > end:
                return None
            said += more
        if not hmac.compare_digest(said[:-1], self.number.token) or said[-1] >= len(_LINES):
            return None
        return _LINES[said[-1]]


def notice_a_lost_machine(connection: socket.socket, after_s: float) -> None:
    """Let the connection fail when the other machine has not answered for so long, whether or not something is under way."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    every_s = max(1, round(after_s / (_PROBES + 1)))
    options = {
        "TCP_KEEPIDLE": every_s,
        "TCP_KEEPALIVE": every_s,  # the name of the one before on macOS
        "TCP_KEEPINTVL": every_s,
        "TCP_KEEPCNT": _PROBES,
        "TCP_USER_TIMEOUT": round(1000 * after_s),
    }
    for name, value in options.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
