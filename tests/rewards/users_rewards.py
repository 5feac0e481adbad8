"""Rewards as users write them: good, wrong, and hostile."""

import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path


def length(prompt, trajectory):
    return len(trajectory.response)


def named(prompt, trajectory):
    return {"words": len(trajectory.response.split()), "bonus": True}


def returns(prompt, trajectory):
    """What the test wrote into the prompt, evaluated."""
    return eval(prompt.metadata["value"])


def raises(prompt, trajectory):
    return json.loads(trajectory.response)  # the error arises in the library, the user's line is this one


def leaves(prompt, trajectory):
    sys.exit(3)


class BadMessage(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def raises_badly(prompt, trajectory):
    raise BadMessage


def vandal(prompt, trajectory):
    trajectory.turns.clear()
    return 0.0


def hangs(prompt, trajectory):
    if trajectory.response == "hang":
        while True:
            pass
    return 1.0


def where(prompt, trajectory):
    return {"pid": os.getpid(), "threads": int(os.environ["OMP_NUM_THREADS"]), "torch": "torch" in sys.modules}


def prints(prompt, trajectory):
    print("seen by the log")
    print("and this", file=sys.stderr)
    return 1.0


def waits_then_one(prompt, trajectory):
    """Writes down its process; waits to be killed as often as the prompt says, then returns 1."""
    pids = Path(prompt.metadata["folder"]) / "pids"
    with pids.open("a") as file:
        file.write(f"{os.getpid()}\n")
    if len(pids.read_text().split()) <= prompt.metadata["kills"]:
        time.sleep(60)
    return 1.0


def ends_its_process(prompt, trajectory):
    os._exit(7)


def busy_with_a_child(prompt, trajectory):
    child = subprocess.Popen(["sleep", "300"])
    Path(prompt.metadata["folder"], "pids").write_text(f"{os.getpid()}\n{child.pid}\n")
    while True:
        pass


def busy_holding_the_gil(prompt, trajectory):
    Path(prompt.metadata["folder"], "pids").write_text(f"{os.getpid()}\n")
    return sum(itertools.repeat(0, 10**13))  # one C call of many hours, in which no other thread runs


def idle(prompt, trajectory):
    Path(prompt.metadata["folder"], "pids").write_text(f"{os.getpid()}\n")
    return 1.0


async def asynchronous(prompt, trajectory):
    await asyncio.sleep(0)
    return 1.0


def three(a, b, c):
    return 1.0


class Length:
    pass


limit = 3


def forks(prompt, trajectory):
    """The child of a careless sandbox comes back too."""
    return float(len(trajectory.response)) if os.fork() else -1.0
