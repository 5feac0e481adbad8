"""Whether what an environment returned can be trained on: it may have edited its turns, or written them itself."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from sluice.run import Run
from sluice.types import Completion, Trajectory, Turn


def check_trainable(run: Run, trajectory: Any) -> None:
    """Raises TypeError or ValueError that says which turn is wrong, and how: later it would be an error of the whole step."""
    if not isinstance(trajectory, Trajectory):
        raise TypeError(f"returned {type(trajectory).__name__}, not a Trajectory")
    if not isinstance(trajectory.stop_reason, str) or not isinstance(trajectory.error, str):
        raise TypeError("returned a Trajectory whose stop_reason or error is no text")
    if not isinstance(trajectory.turns, list) or not all(_is_turn(turn) for turn in trajectory.turns):
        raise TypeError("returned a Trajectory whose turns are not a list of Turn with a Completion each")
    for number, turn in enumerate(trajectory.turns, start=1):
        try:
            _check_turn(run, turn)
        except (TypeError, ValueError) as error:
            raise ValueError(f"returned a Trajectory whose turn {number} cannot be trained on: {error}") from error
    if not trajectory.num_response_tokens:
        raise ValueError("returned a Trajectory without a token of the policy")


def sound_turns(run: Run, turns: Any) -> list[Turn]:
    """Those that can be kept on record, of an attempt that failed; what an environment has put in their place is none."""

    def is_sound(turn: Turn) -> bool:
        try:
            _check_turn(run, turn)
        except (TypeError, ValueError):
            return False
        return True

    return [turn for turn in turns if _is_turn(turn) and is_sound(turn)] if isinstance(turns, list | tuple) else []


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Turn) and isinstance(turn.completion, Completion)


def _check_turn(run: Run, turn: Turn) -> None:
    completion = turn.completion
    if not isinstance(completion.text, str):
        raise TypeError(f"its text is of type {type(completion.text).__name__}")
    replace(completion)  # its own checks once more: all fields have one length
    if not turn.prompt_ids:
        raise ValueError("its prompt is empty; there is nothing to predict the first token from")
    for name, ids in (("prompt_ids", turn.prompt_ids), ("token_ids", completion.token_ids)):
        _check_ids(name, ids, run.vocab_size)
    for ids in completion.kept_ids:
        _check_ids("kept_ids", ids, run.vocab_size)
    _check_routing(run, turn)
    length = len(turn.prompt_ids) + len(completion.token_ids)
    if run.max_length is not None and length > run.max_length:
        raise ValueError(f"its {length} tokens are more than the {run.max_length} positions of the model")
    if not all(map(math.isfinite, completion.logprobs)):
        raise ValueError("its logprobs are not all finite numbers")
    if wrong := [v for v in completion.policy_versions if type(v) is not int or not 0 <= v <= run.step]:
        raise ValueError(f"its policy_versions hold {wrong[0]!r}; there were the versions 0 to {run.step}")
    if not (math.isfinite(completion.temperature) and completion.temperature > 0):
        raise ValueError(f"its temperature is {completion.temperature}; training needs a number above 0")


def _check_routing(run: Run, turn: Turn) -> None:
    routed = turn.completion.routed_experts
    if not routed:
        return
    if run.routing is None:
        raise ValueError("its routed_experts say what routers chose, and rollout.routing_replay is off")
    num_chosen, num_experts = run.routing
    length = len(turn.prompt_ids) + len(turn.completion.token_ids)
    sizes = {len(chosen) if isinstance(chosen, bytes) else -1 for chosen in routed}
    if len(routed) != length or sizes - {0, 2 * num_chosen}:
        raise ValueError(
            f"its routed_experts are not {length} times, for each token of prompt and response, {num_chosen} experts as bytes, or none"
        )
    if (largest := np.frombuffer(b"".join(routed), "<u2").max(initial=0)) >= num_experts:
        raise ValueError(f"its routed_experts hold {largest}, and a layer has {num_experts} experts")


def _check_ids(name: str, ids: Any, vocab_size: int | None) -> None:
    if not isinstance(ids, list):
        raise TypeError(f"its {name} are of type {type(ids).__name__}, not a list")
    if wrong := set(map(type, ids)) - {int}:
        raise TypeError(f"its {name} hold a {wrong.pop().__name__}; token ids are whole numbers")
    if ids and (min(ids) < 0 or (vocab_size is not None and max(ids) >= vocab_size)):
        foreign = min(ids) if min(ids) < 0 else max(ids)
        known = f"the {vocab_size} ids of the model" if vocab_size is not None else "token ids"
        raise ValueError(f"its {name} hold {foreign}, which is not among {known}")
