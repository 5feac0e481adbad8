"""What runs inside a reward process: reads samples from a socket, answers with the value of each part.

The parent keeps the time; see `sluice.rewards.pool`. Both sides pickle, since both run the same code of the same user.
"""

from __future__ import annotations

import math
import numbers
import os
import pickle
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sluice.errors import RewardError, SluiceError
from sluice.hooks import first_line, raised_at
from sluice.interfaces import Reward
from sluice.processes import Parent, belong_to
from sluice.rewards.math import warm_up
from sluice.rewards.spec import build


def serve(fd: int, parent: Parent) -> None:
    """Read the specs, build the rewards, say so, then score one sample after the other until the parent is gone.

    For each sample there is one reply per part, in order, up to the first part that fails: whether it went well, and
    the value, or what went wrong as text.
    """
    pipe = belong_to(parent, fd).makefile("rwb")

    def reply(ok: bool, result: Any) -> None:
        pickle.dump((ok, result), pipe)
        pipe.flush()

    try:
        specs = pickle.load(pipe)
        try:
            rewards = [build(spec) for spec in specs]
            if any(spec.kind == "math" for spec in specs):
                warm_up()
        except BaseException as error:
            reply(False, _describe(error))
        else:
            reply(True, None)
            while True:
                _score(pickle.load(pipe), rewards, reply)
    except (EOFError, ConnectionError):  # the parent closed its end, or died
        pass
    finally:
        os.killpg(0, signal.SIGKILL)


def _score(sample: bytes, rewards: Sequence[Reward], reply: Callable[[bool, Any], None]) -> None:
    for reward in rewards:
        process = os.getpid()
        ok, result = _attempt(reward, sample)
        # a child that the reward forked came back: it can give no answer, and is not to kill its parent for that
        if os.getpid() != process:
            os._exit(0)
        reply(ok, result)
        if not ok:
            return


def _attempt(reward: Reward, sample: bytes) -> tuple[bool, Any]:
    try:
        # Unpickled for every part, so that one that changes the trajectory cannot change what the next one sees.
        prompt, trajectory = pickle.loads(sample)
        return True, checked(reward(prompt, trajectory))
    except BaseException as error:  # sys.exit() in a reward is an error of this sample, not the end of the process
        return False, _describe(error)


def checked(value: Any) -> float | dict[str, float]:
    """The value as a finite float, or as a dict of them. Raises RewardError for anything else: no score is made up."""
    if not isinstance(value, Mapping):
        return _finite(value, "")
    if not value:
        raise RewardError("returned an empty dict; return at least one named float")
    if wrong := [key for key in value if not isinstance(key, str)]:
        raise RewardError(f"returned a dict with the key {wrong[0]!r}; keys are the names of the parts, so texts")
    return {key: _finite(part, f" as {key!r}") for key, part in value.items()}


def _finite(value: Any, where: str) -> float:
    if not isinstance(value, numbers.Real):
        raise RewardError(
            f"returned {type(value).__name__}{where}; a reward returns a float, a bool, or a dict of named floats"
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RewardError(f"returned {number}{where}; a reward is a finite number")
    return number


def _describe(error: BaseException) -> str:
    return str(error) if isinstance(error, SluiceError) else first_line(error) + raised_at(error)
