"""The FP32 head: log-probs and entropies of chosen tokens from hidden states, and the gradient of a loss of them.

As the sampler drew them: at its temperature, and with top-p or top-k over the ids that it kept. Without the latter the
ratio would be of two distributions over different sets (the keep sampling mask of DeepSeek-V3.2, arXiv 2512.02556).

A chunk of tokens at a time, in two buffers that all chunks share: the logits of more than one chunk never exist, and memory is
linear in tokens · hidden size. The gradient is a formula and not autograd's, so that nothing is kept for a backward.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, reduce
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor

from sluice.algorithms.losses import LossOutput
from sluice.data.batch import MicroBatch
from sluice.trainers.chunks import chunk_tokens
from sluice.trainers.model import PolicyModel

Loss = Callable[[Tensor, Tensor, MicroBatch], LossOutput]
"""(log-probs [T], entropies [T], a micro-batch or some tokens of it) → their loss."""

GradientOf = Callable[[Tensor], Tensor | None]
"""The FP32 sum that a weight's gradients are added to; None where it is not trained."""


class HeadOutput(NamedTuple):
    logprobs: Tensor  # [T]
    entropies: Tensor  # [T]
    loss: LossOutput
    hidden_gradient: Tensor  # [T, H]


@torch.no_grad()
def token_logprobs(model: PolicyModel, hidden: Tensor, batch: MicroBatch) -> Tensor:
    """[T, H] states before the batch's targets → log-probs [T] of these, in nats, as in `head_backward`."""
    head = _Head(model, len(hidden))
    chunks = head.chunks(hidden, batch)
    return torch.cat([head.target_logprobs(head.logits(states), part) for states, part in chunks])


@torch.no_grad()
def head_backward(
    model: PolicyModel,
    hidden: Tensor,
    batch: MicroBatch,
    loss: Loss,
    gradient_of: GradientOf,
    *,
    couples_tokens: bool,
    entropy_gradient: bool,
) -> HeadOutput:
    """The loss of a batch whose targets' states are `hidden` [T, H]; its gradient in the head is added to what `gradient_of`
    gives, and that in the states is returned, in their dtype.

    Log-probs and entropies are in nats, of softmax(logits / temperature) over the kept ids. The gradient goes through the
    entropies only with `entropy_gradient`.

    With `couples_tokens` the loss is that of all tokens at once. For it the logits of more than one chunk are computed twice,
    since no gradient is known before all log-probs are; without it each chunk has its own loss, and these add up.
    What the loss raises passes through; some of the batch's gradient may have been added by then.
    """
    head = _Head(model, len(hidden), gradient_of)
    seen: list[tuple[Tensor, Tensor]] = []
    losses: list[LossOutput] = []
    gradients: list[Tensor] = []
    for states, part in [(hidden, batch)] if couples_tokens else head.chunks(hidden, batch):
        chunks = head.chunks(states, part)
        logprobs, entropies = map(torch.cat, zip(*(head.forward(*chunk) for chunk in chunks), strict=True))
        output, slopes = _differentiated(loss, logprobs, entropies, part, entropy_gradient)
        slopes_of_chunks = zip(*(slope.split(head.size) for slope in slopes), strict=True)
        for chunk, own in zip(chunks, slopes_of_chunks, strict=True):
            if len(chunks) > 1:  # the buffers hold the last one
                head.forward(*chunk)
            gradients.append(head.backward(*chunk, *own))
        seen.append((logprobs, entropies))
        losses.append(output)
    logprobs, entropies = map(torch.cat, zip(*seen, strict=True))
    return HeadOutput(logprobs, entropies, reduce(add, losses), torch.cat(gradients))


def _differentiated(
    loss: Loss, logprobs: Tensor, entropies: Tensor, batch: MicroBatch, entropy_gradient: bool
) -> tuple[LossOutput, tuple[Tensor, ...]]:
    """The loss, and its derivatives [T] by the log-probs and, where they have a gradient, the entropies."""
    logprobs = logprobs.detach().requires_grad_()
    entropies = entropies.detach().requires_grad_(entropy_gradient)
    with torch.enable_grad():
        output = loss(logprobs, entropies, batch)
    inputs = [logprobs, entropies] if entropy_gradient else [logprobs]
    detached = replace(output, loss=output.loss.detach(), per_token=output.per_token.detach())
    return detached, torch.autograd.grad(output.loss, inputs, materialize_grads=True)


class _Head:
    """The head in FP32, with room for the logits of one chunk of at most `size` tokens.

    `forward` leaves the chunk's probabilities p, and p · log p, in the two buffers, where `backward` of that chunk takes them.
    """

    def __init__(self, model: PolicyModel, num_tokens: int, gradient_of: GradientOf = lambda _: None) -> None:
        self.model = model
        self.weight = model.head_weight()
        self.weight_gradient = gradient_of(model.head.weight)
        self.bias_gradient = None if model.head.bias is None else gradient_of(model.head.bias)
        self.size = min(max(1, num_tokens), chunk_tokens(len(self.weight), self.weight.device.type))
        # one allocation: fresh memory for each chunk would cost as much as the elementwise work on it
        self.buffers = self.weight.new_empty(2, self.size, len(self.weight), dtype=torch.float32)

    @cached_property
    def weight_in_fp32(self) -> Tensor:
        return self.weight.float()

    def chunks(self, hidden: Tensor, batch: MicroBatch) -> list[tuple[Tensor, MicroBatch]]:
        return list(zip(hidden.detach().split(self.size), batch.parts(self.size), strict=True))

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, V] in the first buffer."""
        return self.model.logits(hidden, self.weight, out=self.buffers[0, : len(hidden)])

    def target_logprobs(self, logits: Tensor, part: MicroBatch) -> Tensor:
        """[n], and those of all ids in the second buffer."""
        logits.div_(part.temperatures[:, None])
        if len(part.kept_ids):
            _drop_others(logits, part.kept_ids, part.kept_counts)
        logp = torch.log_softmax(logits, -1, out=self.buffers[1, : len(logits)])
        return logp.gather(1, part.target_ids[:, None])[:, 0]

    def forward(self, hidden: Tensor, part: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [n]."""
        logits = self.logits(hidden)
        self.slope = self.model.logits_slope(logits)
        logprobs = self.target_logprobs(logits, part)
        p, logp = self.buffers[:, : len(hidden)]
        torch.exp(logp, out=p)
        if len(part.kept_ids):
            logp.clamp_(min=torch.finfo(logp.dtype).min)  # 0 · -inf would be no number
        return logprobs, -logp.mul_(p).sum(-1)

    def backward(self, hidden: Tensor, part: MicroBatch, c: Tensor, e: Tensor | None = None) -> Tensor:
        """[n, H] the gradient in the states, from the loss's derivatives c by the log-probs and e by the entropies.

        With z = logits / temperature: d log π / dz = onehot - p, and dH / dz = -p · (log p + H).
        """
        p, p_logp = self.buffers[:, : len(hidden)]
        c = c / part.temperatures
        if e is None:
            gradient = p.mul_(-c[:, None])
        else:
            e = e / part.temperatures
            gradient = p.mul_((e * p_logp.sum(-1) - c)[:, None]).addcmul_(p_logp, -e[:, None])
        gradient[torch.arange(len(c), device=c.device), part.target_ids] += c
        if self.slope is not None:
            gradient.mul_(self.slope)
        if self.bias_gradient is not None:
            self.bias_gradient.add_(gradient.sum(0))
        with _matrix_units(hidden):
            if self.weight_gradient is not None:
                self.weight_gradient.addmm_(gradient.T, hidden.float())
            return (gradient @ self.weight_in_fp32).to(hidden.dtype)


@contextmanager
def _matrix_units(hidden: Tensor) -> Generator[None]:
    """FP32 products with BF16 states on a GPU by its matrix units: they round the gradient to 11 bits (TF32), where the rest of a
    BF16 model's gradient has 8."""
    before = torch.get_float32_matmul_precision()
    if hidden.is_cuda and hidden.dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _drop_others(logits: Tensor, kept_ids: Tensor, kept_counts: Tensor) -> None:
    """-inf in [n, V] logits at every id that is not among those kept for the token; a count of 0 keeps all."""
    rows = torch.arange(len(logits), device=logits.device).repeat_interleave(kept_counts, output_size=len(kept_ids))
    kept = logits[rows, kept_ids]
    logits.masked_fill_((kept_counts > 0)[:, None], -torch.inf)
    logits[rows, kept_ids] = kept
