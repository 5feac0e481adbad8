"""Log-probs and entropies are those of the plain softmax in float64, and no more logits than one chunk are ever held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models import tiny_model
from sluice.trainers import logprobs as room
from sluice.trainers.logprobs import token_logprobs
from sluice.trainers.model import PolicyModel

VOCAB = 128
CHUNK = 5  # tokens; 23 is no multiple of it


def inputs(dtype: torch.dtype = torch.float32, num: int = 23) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num, 32, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (num,), generator=generator)
    return hidden, targets, 0.5 + torch.rand(num, generator=generator)


def kept_for(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Flat kept ids and their counts: 1 to 20 that hold the target, and none for every fourth token (it stays whole)."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        torch.cat([target[None], others[others != target][: i % 20]]) if i % 4 else targets[:0]
        for i, target in enumerate(targets)
        for others in [torch.randperm(VOCAB, generator=generator)]
    ]
    return torch.cat(rows), torch.tensor([len(row) for row in rows])


def plain(
    model: PolicyModel, hidden: Tensor, targets: Tensor, temperatures: Tensor, *kept: Tensor
) -> tuple[Tensor, Tensor]:
    """In float64, all at once or, with kept ids, token by token over those alone."""
    logits = hidden.double() @ model.head.weight.double().T / temperatures.double()[:, None]
    if not kept:
        logp = torch.log_softmax(logits, -1)
        return logp[range(len(targets)), targets], -(logp.exp() * logp).sum(-1)
    logprobs, entropies = [], []
    for row, target, ids in zip(logits, targets, kept[0].split(kept[1].tolist()), strict=True):
        own = ids if len(ids) else torch.arange(VOCAB)
        logp = torch.log_softmax(row[own], -1)
        logprobs.append(logp[own == target])
        entropies.append(-(logp.exp() * logp).sum())
    return torch.cat(logprobs), torch.stack(entropies)


def gradients(model: PolicyModel, hidden: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Of a sum in which every token counts differently."""
    weights = torch.linspace(-1, 2, len(logprobs), dtype=logprobs.dtype)
    return torch.autograd.grad((weights * logprobs).sum(), (hidden, model.head.weight))


truncated = pytest.mark.parametrize("truncate", [False, True], ids=["whole", "truncated"])


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "CHUNK_ELEMENTS", CHUNK * VOCAB + 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_chunk_is_the_plain_softmax(dtype: torch.dtype):
    """With BF16 weights too the head is FP32: in BF16 the error would be near 0.05."""
    model, columns = tiny_model("qwen3", dtype), inputs(dtype)
    expected, actual = plain(model, *columns), token_logprobs(model, *columns)
    assert model.logits(columns[0]).dtype == actual[0].dtype == actual[1].dtype == torch.float32
    for values, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_plain_softmax(dtype: torch.dtype):
    model, columns = tiny_model("qwen3", dtype), inputs(dtype)
    expected = gradients(model, columns[0], plain(model, *columns)[0])
    actual = gradients(model, columns[0], token_logprobs(model, *columns)[0])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # a BF16 leaf has a BF16 gradient
    for values, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(values, wanted, rtol=tolerance, atol=tolerance)


def test_chunks_change_neither_values_nor_gradients(monkeypatch: pytest.MonkeyPatch):
    model, columns = tiny_model("qwen3"), inputs()
    whole = token_logprobs(model, *columns)
    whole_gradients = gradients(model, columns[0], whole[0])
    for size in (1, 5, 22, 23, 24):
        monkeypatch.setattr(room, "CHUNK_ELEMENTS", size * VOCAB)
        parts = token_logprobs(model, *columns)
        for actual, expected in zip(
            (*parts, *gradients(model, columns[0], parts[0])), (*whole, *whole_gradients), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            for actual, expected in zip(token_logprobs(model, *columns), whole, strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_a_chunk_is_never_less_than_a_token(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "CHUNK_ELEMENTS", 1)
    logprobs, entropies = token_logprobs(tiny_model("qwen3"), *inputs(num=3))
    assert logprobs.shape == entropies.shape == (3,)


def test_entropies_carry_no_gradient():
    logprobs, entropies = token_logprobs(tiny_model("qwen3"), *inputs())
    assert logprobs.requires_grad
    assert not entropies.requires_grad


@pytest.mark.parametrize("size", [1, 5, 23])
def test_with_kept_ids_all_is_of_the_softmax_over_those_alone(monkeypatch: pytest.MonkeyPatch, size: int):
    """Values and both gradients, through the chunks."""
    monkeypatch.setattr(room, "CHUNK_ELEMENTS", size * VOCAB)
    model, columns = tiny_model("qwen3"), inputs()
    kept = kept_for(columns[1])
    expected = plain(model, *columns, *kept)
    actual = token_logprobs(model, *columns, *kept, entropy_gradient=True)
    for values, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=1e-5)
    ours, theirs = (gradients(model, columns[0], torch.cat(both)) for both in (actual, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(token_logprobs(model, *columns, *kept), tuple(a.detach() for a in actual))


def test_the_logits_of_the_architecture_are_used():
    """Gemma 2 caps its logits; at a temperature, what is capped is divided."""
    model, (hidden, targets, temperatures) = tiny_model("gemma2"), inputs()
    logits = torch.tanh(hidden.double() @ model.head.weight.double().T / 30.0) * 30.0 / temperatures.double()[:, None]
    expected = torch.log_softmax(logits, -1)[range(len(targets)), targets]
    actual, _ = token_logprobs(model, hidden, targets, temperatures)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_no_tokens(chunked: None):
    logprobs, entropies = token_logprobs(tiny_model("qwen3"), *inputs(num=0))
    assert logprobs.shape == entropies.shape == (0,)
    logprobs.sum().backward()


class Widest(TorchDispatchMode):
    """Most rows that any tensor over the vocabulary had, forward or backward."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] == VOCAB:
                self.rows = max(self.rows, tensor.shape[0] * (tensor.shape != (32, VOCAB)))  # not the head, transposed
        return result


@truncated
@pytest.mark.parametrize("train", [True, False], ids=["training", "no_grad"])
def test_logits_never_exist_beyond_one_chunk(chunked: None, train: bool, truncate: bool):
    model, columns = tiny_model("qwen3"), inputs()
    kept = kept_for(columns[1]) if truncate else ()
    with Widest() as widest, torch.set_grad_enabled(train):
        logprobs, _ = token_logprobs(model, *columns, *kept)
        if train:
            logprobs.sum().backward()
    assert widest.rows == CHUNK


@truncated
def test_no_logits_are_held_for_the_backward(chunked: None, truncate: bool):
    """Chunks that were each held would be the whole [T, V] again, piece by piece."""
    model, columns = tiny_model("qwen3"), inputs()
    kept = kept_for(columns[1]) if truncate else ()
    held: dict[int, int] = {}

    def hold(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() != model.head.weight.data_ptr():
            held[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        logprobs, _ = token_logprobs(model, *columns, *kept)
    assert max(held.values(), default=0) < CHUNK * VOCAB
    assert sum(held.values()) < len(logprobs) * VOCAB / 2
    logprobs.sum().backward()
    assert columns[0].grad is not None
