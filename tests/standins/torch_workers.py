"""How SGLang's workers join the trainer and take its weights: a group by torch's own means, and one broadcast for each tensor.

A server of several has the others in processes of their own, which are this program: an order a line, and an answer a line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed import distributed_c10d as c10d

GROUPS: dict[str, Any] = {}


def start() -> None:
    """The group that the workers of a server are in anyway."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def join(body: dict[str, Any], rank: int = 0) -> None:
    """`rank` among the workers."""
    name, own, size = body["group_name"], body["rank_offset"] + rank, body["world_size"]
    assert name not in GROUPS
    host = f"[{body['master_address']}]" if ":" in body["master_address"] else body["master_address"]
    store, _, _ = next(dist.rendezvous(f"tcp://{host}:{body['master_port']}", own, size))
    prefixed = dist.PrefixStore(name, store)
    backend, limit = dist.Backend(body["backend"]), c10d.default_pg_timeout
    made, _ = c10d._new_process_group_helper(size, own, [], backend, prefixed, group_name=name, timeout=limit)
    c10d._world.pg_group_ranks[made] = {i: i for i in range(size)}
    GROUPS[name] = made


def receive(body: dict[str, Any]) -> dict[str, torch.Tensor]:
    weights = {
        name: torch.empty(shape, dtype=getattr(torch, dtype))
        for name, shape, dtype in zip(body["names"], body["shapes"], body["dtypes"], strict=True)
    }
    group = GROUPS[body["group_name"]]
    for work in [dist.broadcast(weight, src=0, group=group, async_op=True) for weight in weights.values()]:
        work.wait()
    return weights


def leave(body: dict[str, Any]) -> None:
    dist.destroy_process_group(GROUPS.pop(body["group_name"]))


class Another:
    """One of the further workers."""

    def __init__(self, rank: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, order: str, body: dict[str, Any]) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps([order, body]) + "\n")
        self._process.stdin.flush()

    def answer(self) -> str:
        """What it raised, if anything."""
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())


def work(rank: int) -> None:
    start()
    for line in sys.stdin:
        order, body = json.loads(line)
        error = ""
        try:
            join(body, rank) if order == "join" else leave(body) if order == "leave" else receive(body)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        print(json.dumps(error), flush=True)


if __name__ == "__main__":
    work(int(sys.argv[1]))
