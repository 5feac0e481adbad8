"""Log-probs, entropies and gradients of the head are those of the plain softmax in float64, however it is cut into chunks, and
no more logits than one chunk are ever held."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models import tiny_model
from sluice.algorithms import LossOutput
from sluice.algorithms.aggregation import sums_by
from sluice.data.batch import MicroBatch
from sluice.tracking.metrics import Metrics, Sum
from sluice.trainers import logprobs as room
from sluice.trainers.chunks import chunk_tokens
from sluice.trainers.logprobs import HeadOutput, head_backward, token_logprobs
from sluice.trainers.model import PolicyModel

VOCAB = 128
CHUNK = 5  # tokens; 23 is no multiple of it
AFTER_HEAD = {
    "nothing": {},
    "scaled": {"logit_scale": 0.25},  # Cohere
    "divided": {"logits_scaling": 3.0},  # Granite
    "capped": {"final_logit_softcapping": 2.0},  # Gemma 2
    "all": {"logit_scale": 1.5, "logits_scaling": 3.0, "final_logit_softcapping": 2.0},
}
truncated = pytest.mark.parametrize("truncate", [False, True], ids=["whole", "truncated"])
coupled = pytest.mark.parametrize("couples", [False, True], ids=["alone", "coupled"])


def model_of(dtype: torch.dtype = torch.float32, bias: bool = False, after: str = "nothing") -> PolicyModel:
    model = tiny_model("qwen3", dtype)
    if bias:
        weight, model.head = model.head.weight, nn.Linear(32, VOCAB, dtype=dtype)
        with torch.no_grad():
            model.head.weight.copy_(weight)
            model.head.bias.copy_(torch.randn(VOCAB, generator=torch.Generator().manual_seed(2)))
    for name, value in AFTER_HEAD[after].items():
        setattr(model.config, name, value)
    return model


def inputs(num: int = 23, dtype: torch.dtype = torch.float32, truncate: bool = False) -> tuple[Tensor, MicroBatch]:
    """States, and a batch of sequences of 4 tokens, at temperatures that differ from token to token."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num, 32, generator=generator).to(dtype)
    targets = torch.randint(VOCAB, (num,), generator=generator)
    kept = kept_for(targets) if truncate else [targets[:0]] * num
    columns = dict.fromkeys(MicroBatch.__dataclass_fields__, torch.empty(0)) | {
        "samples": [],
        "target_ids": targets,
        "temperatures": 0.5 + torch.rand(num, generator=generator),
        "sequence_ids": torch.arange(num) // 4,
        "coefficients": torch.randn(num, generator=generator),
        "kept_ids": torch.cat([*kept, targets[:0]]),
        "kept_counts": torch.tensor([len(ids) for ids in kept] if truncate else [], dtype=torch.int64),
    }
    return hidden, MicroBatch(**columns)  # type: ignore[arg-type]


def kept_for(targets: Tensor) -> list[Tensor]:
    """1 to 20 ids that hold the target, and none for every fourth token (it stays whole)."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.cat([target[None], others[others != target][: i % 20]]) if i % 4 else targets[:0]
        for i, target in enumerate(targets)
        for others in [torch.randperm(VOCAB, generator=generator)]
    ]


def loss_of(logprobs: Tensor, entropies: Tensor, batch: MicroBatch) -> LossOutput:
    """Curved in the log-probs, each token with a weight of its own."""
    per_token = logprobs.exp() - 3 * logprobs + logprobs.square() / 9
    loss = (batch.coefficients * (per_token - 2 * entropies)).sum()
    return LossOutput(loss, per_token, logprobs.exp(), logprobs < -4, Metrics(loss=Sum(loss.detach())))


def coupled_loss_of(logprobs: Tensor, entropies: Tensor, batch: MicroBatch) -> LossOutput:
    """The same, of means over sequences."""
    ids = batch.sequence_ids
    means = sums_by(ids, logprobs) / sums_by(ids, torch.ones_like(logprobs))
    return loss_of(means[ids], entropies, batch)


LOSSES = {False: loss_of, True: coupled_loss_of}


def plain(model: PolicyModel, hidden: Tensor, batch: MicroBatch, couples: bool, bonus: bool) -> dict[str, Tensor]:
    """In float64 by the definitions, token by token and over the kept ids alone; the gradients are autograd's."""
    states, weight = (x.detach().double().requires_grad_() for x in (hidden, model.head.weight))
    bias = torch.zeros(VOCAB, dtype=torch.float64) if model.head.bias is None else model.head.bias.detach().double()
    bias.requires_grad_()
    logits = states @ weight.T + bias
    logits = logits * (getattr(model.config, "logit_scale", None) or 1.0)
    logits = logits / (getattr(model.config, "logits_scaling", None) or 1.0)
    if cap := getattr(model.config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    logits = logits / batch.temperatures.double()[:, None]
    logprobs, entropies = [logits.flatten()[:0]], [logits.flatten()[:0]]
    counts = batch.kept_counts.tolist() or [0] * len(hidden)
    for row, target, ids in zip(logits, batch.target_ids, batch.kept_ids.split(counts), strict=True):
        kept = ids if len(ids) else torch.arange(VOCAB)
        p = torch.exp(row[kept]) / torch.exp(row[kept]).sum()
        logprobs.append(torch.log(p[kept == target]))
        entropies.append(-(p * torch.log(p)).sum()[None])
    logp, entropy = torch.cat(logprobs), torch.cat(entropies)
    output = LOSSES[couples](logp, entropy if bonus else entropy.detach(), batch)
    output.loss.backward()
    gradients = {"hidden": states.grad, "weight": weight.grad, "bias": bias.grad}
    values = {"logprobs": logp, "entropies": entropy, "loss": output.loss, "per_token": output.per_token}
    return {name: value.detach() for name, value in (values | gradients).items() if value is not None}


def ours(
    model: PolicyModel, hidden: Tensor, batch: MicroBatch, couples: bool, bonus: bool
) -> tuple[dict[str, Tensor], HeadOutput]:
    sums: dict[Tensor, Tensor] = {}

    def gradient_of(parameter: Tensor) -> Tensor:
        return sums.setdefault(parameter, torch.zeros_like(parameter, dtype=torch.float32))

    settings: Any = {"couples_tokens": couples, "entropy_gradient": bonus}
    output = head_backward(model, hidden, batch, LOSSES[couples], gradient_of, **settings)
    values = {
        "logprobs": output.logprobs,
        "entropies": output.entropies,
        "loss": output.loss.loss,
        "per_token": output.loss.per_token,
        "hidden": output.hidden_gradient,
        "weight": sums[model.head.weight],
    }
    return values | ({} if model.head.bias is None else {"bias": sums[model.head.bias]}), output


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerances: float) -> None:
    """To 1e-5 of the largest number of each kind."""
    for name, value in actual.items():
        wanted, tolerance = expected[name], tolerances.get(name, 1e-5)
        scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: n + m)


@contextmanager
def chunks_of(size: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "chunk_tokens", lambda *_: size)
        yield


# values and gradients


@coupled
@truncated
@pytest.mark.parametrize("after", AFTER_HEAD)
@pytest.mark.parametrize("size", [CHUNK, 100], ids=["chunks", "one_chunk"])
def test_values_and_gradients_are_those_of_the_plain_softmax(size: int, after: str, truncate: bool, couples: bool):
    """With a bias, an entropy bonus, and whatever the architecture does to its logits."""
    model, (hidden, batch) = model_of(bias=True, after=after), inputs(truncate=truncate)
    with chunks_of(size):
        actual, output = ours(model, hidden, batch, couples, True)
        assert torch.equal(token_logprobs(model, hidden, batch), actual["logprobs"])
    assert_same(actual, plain(model, hidden, batch, couples, True))
    assert output.loss.metrics["loss"].value() == pytest.approx(float(actual["loss"]), rel=1e-5)
    assert torch.equal(output.loss.clipped, output.loss.ratios < torch.exp(torch.tensor(-4.0)))
    assert actual.keys() >= {"weight", "bias", "hidden"}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    num=st.integers(0, 30),
    size=st.integers(1, 40),
    truncate=st.booleans(),
    couples=st.booleans(),
    bonus=st.booleans(),
    bias=st.booleans(),
    after=st.sampled_from(list(AFTER_HEAD)),
)
def test_the_cut_into_chunks_changes_nothing(
    num: int, size: int, truncate: bool, couples: bool, bonus: bool, bias: bool, after: str
):
    """No tokens, one at a time, more room than there are."""
    model, (hidden, batch) = model_of(bias=bias, after=after), inputs(num, truncate=truncate)
    with chunks_of(size):
        actual, _ = ours(model, hidden, batch, couples, bonus)
    assert_same(actual, plain(model, hidden, batch, couples, bonus))


@coupled
@pytest.mark.parametrize("bonus", [False, True], ids=["measured", "bonus"])
def test_the_head_of_a_bf16_model_is_fp32(bonus: bool, couples: bool):
    """Values, and the gradient of the weight: in BF16 the errors would be near 0.05. Only the states' is rounded."""
    model, (hidden, batch) = model_of(torch.bfloat16), inputs(dtype=torch.bfloat16)
    with chunks_of(CHUNK):
        actual, _ = ours(model, hidden, batch, couples, bonus)
    assert actual["hidden"].dtype == torch.bfloat16
    assert actual["weight"].dtype == actual["logprobs"].dtype == torch.float32
    assert_same(actual, plain(model, hidden, batch, couples, bonus), hidden=4e-3)


@coupled
@truncated
def test_the_same_inputs_give_the_same_bits(truncate: bool, couples: bool):
    model, (hidden, batch) = model_of(), inputs(truncate=truncate)
    with chunks_of(CHUNK):
        first, second = (ours(model, hidden, batch, couples, True)[0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradients_add_to_what_is_there_and_one_that_nobody_wants_is_left_out():
    model, (hidden, batch) = model_of(bias=True), inputs()
    expected = plain(model, hidden, batch, False, False)
    there = torch.ones_like(model.head.weight)
    for sums in ({model.head.weight: there}, {}):
        output = head_backward(model, hidden, batch, loss_of, sums.get, couples_tokens=False, entropy_gradient=False)
        assert_same({"hidden": output.hidden_gradient, "weight": there - 1}, expected)


def test_a_target_that_was_not_kept_has_no_probability():
    hidden, batch = inputs(truncate=True)
    token = 1  # of two ids, the target and another
    own = slice(int(batch.kept_counts[:token].sum()), int(batch.kept_counts[: token + 1].sum()))
    batch.target_ids[token] = int(next(i for i in range(VOCAB) if i not in batch.kept_ids[own].tolist()))
    assert token_logprobs(model_of(), hidden, batch).isinf().nonzero().tolist() == [[token]]


# memory


class Wide(TorchDispatchMode):
    """Storages in which a tensor over the vocabulary was seen, and the elements of the largest tensor of all."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: dict[int, int] = {}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.largest = max(self.largest, storage.nbytes() // tensor.itemsize)
                if (
                    tensor.dim() >= 2 and tensor.shape[-1] == VOCAB and tensor.shape != (32, VOCAB)
                ):  # the head, transposed
                    self.logits[storage.data_ptr()] = storage.nbytes() // tensor.itemsize
        return result


@coupled
@truncated
@pytest.mark.parametrize("bonus", [False, True], ids=["measured", "bonus"])
def test_all_chunks_share_two_buffers_of_logits(bonus: bool, truncate: bool, couples: bool):
    """No tensor has an element for every token and id, nor do many small ones together."""
    num = 200
    model, (hidden, batch) = model_of(), inputs(num, truncate=truncate)
    with chunks_of(CHUNK), Wide() as wide:
        ours(model, hidden, batch, couples, bonus)
    assert list(wide.logits.values()) == [2 * CHUNK * VOCAB]
    assert wide.largest <= num * 32 < num * VOCAB / 3
    with chunks_of(CHUNK), Wide() as wide:
        token_logprobs(model, hidden, batch)
    assert list(wide.logits.values()) == [2 * CHUNK * VOCAB]


def test_a_few_tokens_have_buffers_of_their_size():
    with Wide() as wide:
        token_logprobs(model_of(), *inputs(3))
    assert list(wide.logits.values()) == [2 * 3 * VOCAB]


@pytest.mark.parametrize(("vocab_size", "tokens"), [(128, 8192), (4096, 512), (151_936, 512), (2**21, 512)])
def test_a_chunk_has_enough_tokens_for_the_heads_gradient_and_no_more_than_fit_the_cache(vocab_size: int, tokens: int):
    assert chunk_tokens(vocab_size, "cpu") == tokens
