"""The conversation with a child process."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from sluice.connection import Answer, Connection, write
from sluice.processes import Died


class Child:
    """One that is nothing but its end of the socket."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.is_killed = False

    def connect(self) -> socket.socket:
        return self.ours

    def is_running(self) -> bool:
        return not self.is_killed

    def cause_of_death(self) -> tuple[str, bool]:
        return "it left", False

    def kill(self) -> None:
        self.is_killed = True


@pytest.mark.parametrize(
    "message", [Answer(7), "what nobody says", Answer(None)], ids=["take fails", "no answer", "not asked"]
)
def test_one_that_cannot_be_heard_is_killed_and_what_it_was_asked_fails_at_once(message: Any):
    """Else its later answers would lie unread until a limit is over."""

    async def work() -> None:
        child, ended = Child(), asyncio.get_running_loop().create_future()

        def take(number: int, answer: Answer) -> None:
            raise KeyError(number)

        reader, writer = await asyncio.open_connection(sock=child.connect())
        connection = Connection(child, reader, writer, take, lambda _, cause: ended.set_result(cause))  # type: ignore[arg-type]
        _, their_writer = await asyncio.open_connection(sock=child.theirs)
        asked = [] if message == Answer(None) else [asyncio.ensure_future(connection.ask("something", 30.0))]
        await asyncio.sleep(0)
        write(their_writer, message)
        async with asyncio.timeout(5.0):
            assert "could not be heard" in await ended
            for one in asked:
                with pytest.raises(Died, match="could not be heard"):
                    await one
        assert child.is_killed
        their_writer.close()

    asyncio.run(work())


def test_an_end_is_told_even_when_the_machine_has_no_more_threads(monkeypatch: pytest.MonkeyPatch):
    async def none(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    async def work() -> None:
        child, ended = Child(), asyncio.get_running_loop().create_future()
        reader, writer = await asyncio.open_connection(sock=child.connect())
        monkeypatch.setattr(asyncio, "to_thread", none)
        _ = Connection(child, reader, writer, lambda *_: None, lambda _, cause: ended.set_result(cause))  # type: ignore[arg-type]
        child.theirs.close()
        async with asyncio.timeout(5.0):
            assert "can't start new thread" in await ended

    asyncio.run(work())
