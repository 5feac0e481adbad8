"""Ray clusters for tests: of this machine, and of three machines made of network namespaces."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}
START_LIMIT_S = 120
SMALL = ["--object-store-memory=80000000", "--include-dashboard=false"]


def new_secret() -> dict[str, str]:
    """The environment of all machines of a cluster that asks for one."""
    return {**QUIET, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def ray(*words: str, env: Mapping[str, str], before: tuple[str, ...] = ()) -> str:
    done = subprocess.run(
        [*before, *RAY, *words], env={**os.environ, **env}, capture_output=True, text=True, timeout=START_LIMIT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


class Machines:
    """So many machines on one: a network namespace each, with an address of its own, and a cable to a switch."""

    def __init__(self, count: int) -> None:
        self._name = f"sluice{os.getpid()}"
        self._switch = f"{self._name}-switch"
        self.addresses = [f"10.77.0.{k}" for k in range(1, count + 1)]
        self._names = [f"{self._name}-{k}" for k in range(1, count + 1)]

    def __enter__(self) -> Machines:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "switch", "up")
        for k, (name, address) in enumerate(zip(self._names, self.addresses, strict=True)):
            _ip("netns", "add", name)
            _ip("-n", self._switch, "link", "add", f"port{k}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", self._switch, "link", "set", f"port{k}", "master", "switch", "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for k in range(len(self._names)):
            for pid in self.processes(k):
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)
        for name in (*self._names, self._switch):
            _ip("netns", "del", name)

    def inside(self, k: int) -> tuple[str, ...]:
        """Put before a command, it runs on that machine."""
        return ("ip", "netns", "exec", self._names[k])

    def processes(self, k: int) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self._names[k]).split()]

    def cut_off(self, k: int) -> None:
        """Pull its cable: nothing goes in or out any more, and nobody is told."""
        _ip("-n", self._switch, "link", "set", f"port{k}", "down")


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30).stdout


def machines_can_be_made() -> bool:
    if os.geteuid() != 0:
        return False
    try:
        with Machines(1):
            return True
    except (OSError, subprocess.SubprocessError):
        return False


@contextmanager
def short_folder() -> Iterator[str]:
    """For the sockets of a cluster, whose paths may not be long."""
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder:
        yield folder


@contextmanager
def joined_by_runs(num_cpus: int, num_gpus: int = 0) -> Iterator[tuple[str, str]]:
    """The settings of runs in a cluster that stays from one to the next."""
    with (
        short_folder() as folder,
        cluster_of_this_machine(num_cpus, folder, num_gpus) as (address, env),
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in env.items():
            patch.setenv(name, value)
        yield "placement.name=ray", f"placement.address={address}"


@contextmanager
def cluster_of_this_machine(num_cpus: int, folder: str, num_gpus: int = 0) -> Iterator[tuple[str, dict[str, str]]]:
    """Its address, and the environment that lets one join it. GPUs need not be there."""
    env = {**QUIET, "RAY_AUTH_MODE": "disabled"}  # it is read when ray is imported, which here was long ago
    amounts = f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}"
    said = ray("start", "--head", "--port=0", *amounts, f"--temp-dir={folder}", *SMALL, env=env)
    (address,) = set(re.findall(r"--address='([\d.]+:\d+)'", said))
    raylets = [
        pid
        for pid in map(int, filter(str.isdecimal, os.listdir("/proc")))
        if folder.encode() in _command(pid) and pid != os.getpid()
    ]
    try:
        yield address, env
    finally:
        for pid in raylets:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)


def _command(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
