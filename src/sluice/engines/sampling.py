"""Drawing the next token of many sequences at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from sluice.errors import EngineError, PromptTooLongError
from sluice.types import Sampling


def check_room(prompt_ids: Sequence[int], sampling: Sampling, max_model_len: int) -> None:
    """Raises PromptTooLongError when prompt and completion do not fit the window, EngineError for an empty prompt."""
    if not prompt_ids:
        raise EngineError("an empty prompt: there is nothing to predict the first token from")
    room = max_model_len - len(prompt_ids)
    if room < sampling.max_new_tokens:
        raise PromptTooLongError(
            f"a prompt of {len(prompt_ids)} tokens leaves {max(room, 0)} of the window of {max_model_len} tokens, and "
            f"{sampling.max_new_tokens} new ones were asked for; shorten the prompt, lower rollout.max_new_tokens, or "
            "raise engine.max_model_len"
        )


def check_ids(prompt_ids: Sequence[int], vocab_size: int) -> None:
    """Raises EngineError for what is no token id of the model; beside others it would fail them too."""
    if wrong := set(map(type, prompt_ids)) - {int}:
        raise EngineError(f"a prompt that holds a {wrong.pop().__name__}: token ids are whole numbers")
    if min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
        foreign = min(prompt_ids) if min(prompt_ids) < 0 else max(prompt_ids)
        raise EngineError(f"a prompt with the token id {foreign}: the model has the ids 0 to {vocab_size - 1}")


BLOCK = 64
"""Ids whose probabilities are summed at once: the running sum over single ids is the slowest part of drawing."""


def sample_tokens(
    logits: Tensor,
    uniform: Tensor,
    temperature: Tensor | None = None,
    *,
    top_p: Tensor | None = None,
    top_k: Tensor | None = None,
    greedy: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """FP32 logits [N, V] and one setting per row ([N] each) → token ids [N], their log-probs [N], and what was kept.

    Draws by inverting the cumulative distribution at `uniform` in [0, 1), so a row's token depends on that row only.
    The log-probs are those of what is drawn from: softmax(logits / temperature) over the ids that top-p and top-k
    keep. Those come as bools [N, V]. A setting is left out when no row asks for it; what was kept is then None. Rows of
    `greedy` [N] bools take the likeliest id instead, with its log-prob at the temperature given.
    """
    if temperature is not None:
        logits = logits / temperature[:, None]
    kept = None
    if top_p is not None and top_k is not None:
        kept = _kept(logits, top_p, top_k)
        logits = logits.masked_fill(~kept, -torch.inf)
    logp = torch.log_softmax(logits, dim=-1)
    drawn = _drawn(logp, uniform)
    if greedy is not None:
        drawn = torch.where(greedy, logits.argmax(-1), drawn)
    return drawn, logp.gather(1, drawn[:, None])[:, 0], kept


def _drawn(logp: Tensor, uniform: Tensor) -> Tensor:
    """[N] ids: the first whose cumulative probability exceeds the draw. First its block, then its place in the block."""
    num, vocabulary = logp.shape
    probs = logp.new_zeros(num, -(-vocabulary // BLOCK) * BLOCK)
    torch.exp(logp, out=probs[:, :vocabulary])
    by_block = probs.view(num, -1, BLOCK)
    blocks = by_block.sum(-1)
    before = blocks.cumsum(-1)
    target = uniform[:, None] * before[:, -1:]
    block = _first_above(before, target, blocks)
    inside = by_block[torch.arange(num, device=logp.device), block[:, 0]]
    rest = target - (before - blocks).gather(1, block)
    place = _first_above(inside.cumsum(-1), rest, inside)
    return (block * BLOCK + place)[:, 0]


def _first_above(sums: Tensor, target: Tensor, parts: Tensor) -> Tensor:
    """[N, K] running sums of parts, [N, 1] → [N, 1] where they first exceed the target, and never a part that is 0.

    Rounding may let the target reach the last sum, and on a GPU it may let the sum rise on a part that is 0.
    """
    found = torch.searchsorted(sums, target, right=True).clamp_(max=sums.shape[1] - 1)
    return torch.where(parts.gather(1, found) > 0, found, parts.argmax(-1, keepdim=True))


def kept_lists(kept: Tensor) -> list[list[int]]:
    """[N, V] bools → the kept ids of each row, an empty list for a row that was kept whole."""
    kept = kept & ~kept.all(-1, keepdim=True)
    counts = kept.sum(-1).tolist()
    ids = iter(kept.nonzero()[:, 1].tolist())
    return [list(islice(ids, count)) for count in counts]


def _kept(logits: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """[N, V] which ids are among the k likeliest, and in the smallest set whose probability reaches p."""
    ordered, order = logits.sort(dim=-1, descending=True)
    rank = torch.arange(logits.shape[1], device=logits.device)[None]
    keep = (top_k[:, None] == 0) | (rank < top_k[:, None])
    # a token stays while what comes before it has not reached p, so the likeliest always stays
    probs = ordered.softmax(-1)
    keep &= (probs.cumsum(-1) - probs < top_p[:, None]) | (top_p[:, None] >= 1)
    keep[:, 0] = True  # also for a p that is 0 in float32
    return torch.zeros_like(keep).scatter(1, order, keep)
