"""Two and four processes with prompts of their own make the update that one process makes: real gloo, real all-reduces."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch.multiprocessing import start_processes

SIZES = (2, 4)
TOLERANCES = {"torch.float64": 1e-12, "torch.float32": 1e-6}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """By number of processes, what each rank made."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    # one server that has torch loaded already, from which all processes are forked
    multiprocessing.set_forkserver_preload(["torch", "ranks"])
    start_processes(ranks.main, (SIZES, str(folder)), nprocs=max(SIZES), start_method="forkserver")
    return {size: [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)] for size in SIZES}


@pytest.fixture(scope="module")
def whole() -> Any:
    return ranks.everything(0, 1, lambda statistics: statistics)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("update", ranks.UPDATES)
@pytest.mark.parametrize("case", ranks.CASES)
@pytest.mark.parametrize("size", SIZES)
def test_processes_make_the_update_of_one(parts: Any, whole: Any, size: int, case: str, update: str, dtype: str):
    """Z3: advantages, coefficients, loss and gradient, also where some ranks have no prompt."""
    expected = whole[case, update, dtype]
    found = [part[case, update, dtype] for part in parts[size]]
    columns, _, groups = ranks.an_update(ranks.UPDATES[update], torch.float64)
    order = list(dict.fromkeys(groups.tolist()))
    for rank, part in enumerate(found):
        mine = torch.tensor([order.index(g) % size == rank for g in groups.tolist()])
        tokens = mine[columns["sequence_ids"]]
        own = columns["loss_weights"] != 0
        close(part["advantages"], expected["advantages"][mine], dtype)
        close(part["coefficients"], expected["coefficients"][tokens], dtype)
        close(part["whitened"], expected["whitened"][tokens[own]], dtype)
        close(part["loss"], expected["loss"], dtype)
        close(part["gradient"], expected["gradient"], dtype)
        assert torch.equal(part["gradient"], found[0]["gradient"]), "ranks must not drift apart"


def close(found: torch.Tensor, expected: torch.Tensor, dtype: str) -> None:
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * scale)


@pytest.mark.parametrize("case", ranks.CASES)
def test_there_is_something_to_agree_about(whole: Any, case: str):
    for update in ranks.UPDATES:
        assert float(whole[case, update, "torch.float64"]["gradient"].abs().min()) > 1e-6


def test_statistics_of_one_rank_alone_would_be_others(whole: Any):
    """What this file would find if a rank forgot to ask the others: the plant of Z3."""
    for case in ("token_mean", "whiten", "batch_std"):
        alone = ranks.part(case, ranks.UPDATES["five"], 0, 2, lambda statistics: statistics, torch.float64)
        _, _, groups = ranks.an_update(ranks.UPDATES["five"], torch.float64)
        order = list(dict.fromkeys(groups.tolist()))
        mine = torch.tensor([order.index(g) % 2 == 0 for g in groups.tolist()])
        expected = whole[case, "five", "torch.float64"]
        if case == "token_mean":
            assert float(alone["coefficients"].sum()) == pytest.approx(1.0) != float(expected["coefficients"][:3].sum())
        else:
            assert not torch.allclose(alone["advantages"], expected["advantages"][mine], rtol=1e-3)
