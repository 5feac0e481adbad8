"""What runs beside an inference server that we start, on its machine: it starts the server, and sees that it does not outlive us.

The server is another's program, in an environment of its own, which knows nothing of us; it belongs to the guard's process group,
and that ends with its parent. The parent's side is `sluice.engines.lifetime`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluice.connection import Answer, failed, read, write
from sluice.errors import EngineError
from sluice.processes import Parent, belong_to, kill_own_group, own_address

STOP_LIMIT_S = 10.0
"""For the server to end by itself, and tidy up; then it is killed."""
TIDY_LIMIT_S = 3.0
"""For what removes the shared memory of a server that was killed."""
LAST_WILL = """\
read line
kill -s KILL -- "-$1"
for own in "$2"/vllm_dist_*; do rm -f "/dev/shm/${own##*/}"-*; done
rm -rf "$2"
"""
"""When there is nothing more to read, it kills a process group and removes a folder, with the shared memory that vLLM's ranks on CPUs leave
behind: it begins with the name of the file in that folder by which they have met."""
HOST, PORT = "{host}", "{port}"
"""Stand, in words of a command, for where the server listens."""


@dataclass(frozen=True)
class Command:
    """By which a server is started."""

    words: list[str]
    variables: dict[str, str]
    """Of its environment, beside those that are there and a `TMPDIR` of its own."""
    python_path: str | None = None
    """Folder that its Python looks into first."""


@dataclass(frozen=True)
class Start:
    """The first message; the answer is the URL at which the server will listen some time later."""

    command: Command
    folder: Path | None
    """In which weights are published, if in any."""


@dataclass(frozen=True)
class Stop:
    """Asks for the server's end."""


def seen(gpus: Sequence[int]) -> dict[str, str]:
    """The variable by which a server sees these GPUs only; none for all that there are."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} if gpus else {}


def serve(fd: int, parent: Parent) -> None:
    pipe = belong_to(parent, fd, _end)
    # for all that the server leaves behind; wherever TMPDIR is: names of sockets may have 107 letters
    scratch = tempfile.mkdtemp(prefix="sluice-", dir="/tmp")
    # nobody else has the other end, so the group ends with this process, even if that and its parent are killed together
    theirs, _ = os.pipe()
    will = ["sh", "-c", LAST_WILL, "last will", str(os.getpgrp()), scratch]
    subprocess.Popen(will, stdin=theirs, start_new_session=True)
    code = asyncio.run(_serve(pipe, scratch))
    if code < 0:  # so that who started us is told the signal
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


async def _serve(pipe: socket.socket, scratch: str) -> int:
    """The exit code of the server, or minus the signal that ended it."""
    host = own_address(pipe)
    holder = _reserved_port(host)
    port: int = holder.getsockname()[1]
    reader, writer = await asyncio.open_connection(sock=pipe)
    try:
        server = await _started(await read(reader), host, port, scratch)
    except EngineError as error:
        write(writer, failed(None, error))
        await writer.drain()
        return 1
    write(writer, Answer(None, f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"))
    listening = asyncio.create_task(_listen(reader, server))
    try:
        code = await server.wait()
        _end_rest()  # before the pipe is closed, after which this process is expected to end at once
        return code
    finally:
        listening.cancel()
        holder.close()


async def _started(start: Start, host: str, port: int, scratch: str) -> asyncio.subprocess.Process:
    if start.folder and not start.folder.is_dir():
        raise EngineError(
            f"{socket.gethostname()} does not see {start.folder}, in which weights are published; set engine.publication_folder to a folder "
            "that all machines share, or engine.publication=broadcast"
        )
    command = start.command
    words = [word.replace(HOST, host).replace(PORT, str(port)) for word in command.words]
    path = os.pathsep.join(filter(None, [command.python_path, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": scratch}
    # What torch compiles is not to be compiled at each start. Not the first one: vLLM cannot name its processes when that is set anew.
    environment.setdefault(
        "TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")
    )
    print(f"$ {' '.join(words)}", flush=True)
    try:
        return await asyncio.create_subprocess_exec(*words, env={**environment, **command.variables})
    except OSError as error:
        raise EngineError(f"{words[0]} cannot be started: {error.strerror}") from error


async def _listen(reader: asyncio.StreamReader, server: asyncio.subprocess.Process) -> None:
    try:
        message: Any = await read(reader)
        assert isinstance(message, Stop)
        server.terminate()
        await asyncio.sleep(STOP_LIMIT_S)
    except EOFError:  # the parent closed its end, or died
        pass
    _end()


def _end() -> None:
    _end_rest()
    kill_own_group()


def _end_rest() -> None:
    """Kill the server's processes. Python's resource tracker among them ends by itself, after it has removed their shared memory."""
    end = time.monotonic() + TIDY_LIMIT_S
    while (rest := dict(_rest())) and time.monotonic() < end:
        for pid, command in rest.items():
            if b"multiprocessing.resource_tracker" not in command:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _rest() -> Iterator[tuple[int, bytes]]:
    """The other processes of this one's group, with their commands; none where the system has no /proc."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            pid, command = int(process.name), (process / "cmdline").read_bytes()
            if command and pid != os.getpid() and os.getpgid(pid) == os.getpgrp():  # without one it has ended
                yield pid, command


def _reserved_port(host: str) -> socket.socket:
    """Bound, and never listening: nobody else is given the port while the server loads, which takes a minute, and the server may share it."""
    holder = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    holder.bind((host, 0))
    for option in ("SO_REUSEADDR", "SO_REUSEPORT"):  # after the choice, for which nothing may be shared
        holder.setsockopt(socket.SOL_SOCKET, getattr(socket, option), 1)
    return holder
