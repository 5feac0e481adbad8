"""One update as a data-parallel rank computes its part of it; run by `test_data_parallel`, and there also as one process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sluice.algorithms import Algorithm, compute_advantages, policy_loss, resolve, token_coefficients
from sluice.algorithms.advantages import whiten

Reduce = Callable[[Tensor], Tensor]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "token_mean": ("cispo", {}),
    "sequence_mean": ("grpo", {"kl_coef": 0.1, "entropy_coef": 0.05}),
    "prompt_mean": ("dapo", {"aggregation": "prompt_mean"}),
    "constant": ("rloo", {}),
    "blend": ("grpo", {"aggregation": "blend", "token_share": 0.3}),
    "batch_std": ("dr_grpo", {"normalise": "batch_std"}),
    "whiten": ("reinforce_pp_baseline", {"correction": "tis", "correction_level": "sequence", "correction_max": 1.5}),
    "whiten_raw": ("reinforce_pp", {}),
}
# Answers per prompt; uneven, and in the second update too few for four ranks, so that some have nothing to do.
UPDATES = {"five": (3, 1, 4, 2, 2), "two": (3, 2)}
FEATURES = 6


def row(case: str) -> Algorithm:
    name, words = CASES[case]
    return resolve(name, words, max_new_tokens=8, group_size=4)


def an_update(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Columns of all tokens; rewards and groups of all sequences. One answer is wholly masked; one group has equal rewards."""
    maker = torch.Generator().manual_seed(7)
    groups = torch.tensor([10 - 3 * g for g, size in enumerate(sizes) for _ in range(size)])
    rewards = torch.randint(0, 3, (len(groups),), generator=maker).to(dtype)
    rewards[groups == 7] = 0.1
    lengths = torch.randint(1, 6, (len(groups),), generator=maker)
    ids = torch.repeat_interleave(torch.arange(len(groups)), lengths)
    weights = (torch.rand(len(ids), generator=maker) < 0.8).to(dtype)
    weights[ids == 1] = 0.0
    columns = {
        "features": torch.randn(len(ids), FEATURES, generator=maker).to(dtype),
        "loss_weights": weights,
        "sequence_ids": ids,
        "group_ids": groups[ids],
    }
    for name in ("old_logprobs", "engine_logprobs", "ref_logprobs"):
        columns[name] = -torch.rand(len(ids), generator=maker).to(dtype)
    return columns, rewards, groups


def part(
    case: str, sizes: tuple[int, ...], rank: int, size: int, reduce: Reduce, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What this rank makes of its prompts: every `size`-th. Sums over ranks are `reduce`'s alone."""
    spec = row(case)
    columns, rewards, groups = an_update(sizes, dtype)
    order = list(dict.fromkeys(groups.tolist()))
    ours = torch.tensor([order.index(g) % size == rank for g in groups.tolist()], dtype=torch.bool)
    mine = {name: column[ours[columns["sequence_ids"]]] for name, column in columns.items()}
    ids = (ours.cumsum(0) - 1)[mine["sequence_ids"]]
    counts = torch.zeros(int(ours.sum()), dtype=dtype).index_add(0, ids, (mine["loss_weights"] != 0).to(dtype))
    advantages = compute_advantages(rewards[ours], groups[ours], spec, counts, reduce)
    weights = mine["loss_weights"]
    coefficients = token_coefficients(spec, weights, ids, mine["group_ids"], reduce)
    model = torch.linspace(-1, 1, FEATURES, dtype=dtype).requires_grad_()
    loss = torch.zeros((), dtype=dtype)
    for half in (ids % 2 == 0, ids % 2 == 1):  # two micro-batches, which cut through prompts
        loss += _backward(spec, model, mine, ids, advantages, coefficients, half)
    gradient = torch.zeros_like(model) if model.grad is None else model.grad
    whitened = whiten(mine["features"][:, 0], weights, 1, reduce)
    return {
        "advantages": advantages,
        "whitened": whitened[weights != 0],
        "coefficients": coefficients,
        "loss": reduce(loss),
        "gradient": reduce(gradient),
    }


def _backward(
    spec: Algorithm,
    model: Tensor,
    mine: dict[str, Tensor],
    ids: Tensor,
    advantages: Tensor,
    coefficients: Tensor,
    chosen: Tensor,
) -> Tensor:
    rows = {name: column[chosen] for name, column in mine.items()}
    logits = rows["features"] @ model
    logprobs = torch.nn.functional.logsigmoid(logits)
    probabilities = torch.sigmoid(logits)
    output = policy_loss(
        spec,
        logprobs,
        rows["old_logprobs"],
        advantages[ids[chosen]],
        rows["loss_weights"],
        ids[chosen],
        group_ids=rows["group_ids"],
        coefficients=coefficients[chosen],
        engine_logprobs=rows["engine_logprobs"],
        ref_logprobs=rows["ref_logprobs"],
        entropies=torch.special.entr(probabilities) + torch.special.entr(1 - probabilities),
    )
    output.loss.backward()
    return output.loss.detach()


def everything(rank: int, size: int, reduce: Reduce) -> dict[tuple[str, str, str], dict[str, Tensor]]:
    return {
        (case, update, str(dtype)): part(case, sizes, rank, size, reduce, dtype)
        for case in CASES
        for update, sizes in UPDATES.items()
        for dtype in (torch.float64, torch.float32)
    }


def main(rank: int, sizes: tuple[int, ...], folder: str) -> None:
    """A process of its own; for each size the first so many of them work together."""
    torch.set_num_threads(1)
    largest = max(sizes)
    store = dist.FileStore(str(Path(folder) / "store"), largest)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=largest, timeout=timedelta(seconds=60))
    for size in sizes:
        group = dist.new_group(list(range(size)))
        if rank < size:
            torch.save(everything(rank, size, _all_reduce(group)), Path(folder) / f"{size}-{rank}.pt")
    # all is written. Gloo's threads abort now and then as a process ends, or miss a neighbour that ended first
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    os._exit(0)


def _all_reduce(group: Any) -> Reduce:
    def reduce(tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    return reduce
