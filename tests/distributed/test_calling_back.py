"""Who calls the driver is let in with the secret of his process and with nothing else, and nobody waits for ever."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from sluice.distributed.calling_back import Listener, Number


@pytest.fixture
def listener() -> Listener:
    return Listener("127.0.0.1", lost_after_s=5.0)


def calls(number: Number) -> list[socket.socket]:
    return [number.call("output", 5.0), number.call("talk", 5.0)]


def beside(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_both_lines_are_told_apart_and_carry_what_is_said(listener: Listener):
    ends: list[socket.socket] = []
    thread = beside(lambda: ends.extend(calls(listener.number)))
    lines, _ = listener.both(5.0, lambda: True)
    thread.join()
    ends[0].sendall(b"printed")
    ends[1].sendall(b"answered")
    assert (lines["output"].recv(100), lines["talk"].recv(100)) == (b"printed", b"answered")
    for connection in (*ends, *lines.values()):
        connection.close()


def test_a_stranger_is_hung_up_on_and_nothing_he_says_is_read_further(listener: Listener):
    wrong = replace(listener.number, token=b"x" * 32)
    heard: list[bytes] = []

    def strangers() -> None:
        silent = socket.create_connection(("127.0.0.1", listener.number.port))
        for number in (wrong, replace(wrong, token=b"short")):
            with number.call("talk", 5.0) as stranger:
                stranger.sendall(b"cos\nsystem\n")
                stranger.settimeout(15.0)
                try:
                    heard.append(stranger.recv(10))
                except ConnectionResetError:
                    heard.append(b"")
        ends.extend([silent, *calls(listener.number)])

    ends: list[socket.socket] = []
    thread = beside(strangers)
    lines, said = listener.both(30.0, lambda: ends or None)
    assert said is ends
    thread.join()
    assert heard == [b"", b""]
    for connection in (*ends, *lines.values()):
        connection.close()


def test_no_call_ends_in_a_timeout_and_the_port_is_closed(listener: Listener):
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        listener.both(0.3, lambda: True)
    assert time.monotonic() - start < 5.0
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", listener.number.port), 1.0)


def test_one_line_is_not_enough_and_is_closed(listener: Listener):
    alone = listener.number.call("talk", 5.0)
    with pytest.raises(TimeoutError):
        listener.both(0.5, lambda: True)
    alone.settimeout(5.0)
    assert alone.recv(1) == b""
    alone.close()


def test_what_the_look_raises_ends_the_wait(listener: Listener):
    def look() -> None:
        raise KeyError("the actor died")

    with pytest.raises(KeyError):
        listener.both(30.0, look)


def test_the_system_is_told_to_notice_a_lost_machine_at_both_ends_of_both_lines(listener: Listener):
    """That it does is shown by the proof with three machines."""
    ends: list[socket.socket] = []
    thread = beside(lambda: ends.extend(calls(listener.number)))
    lines, _ = listener.both(5.0, lambda: True)
    thread.join()
    for connection in (*ends, *lines.values()):
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle, every, probes = (
            connection.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle + every * probes <= 5.0
        connection.close()
