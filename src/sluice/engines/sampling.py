"""Drawing the next token of many sequences at once."""

from __future__ import annotations

from collections.abc import Sequence

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


def sample_tokens(
    logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """FP32 logits [N, V] and one setting per row ([N] each) → token ids [N] and their log-probs [N].

    Draws by inverting the cumulative distribution at `uniform` in [0, 1), so a row's token depends on that row only.
    The log-probs are those of softmax(logits / temperature), whole, before top-p and top-k. Temperature 0 is greedy,
    with the log-probs of temperature 1.
    """
    greedy = temperature == 0
    logp = torch.log_softmax(logits / torch.where(greedy, 1.0, temperature)[:, None], dim=-1)
    probs = logp.exp()
    if bool((top_p < 1).any()) or bool((top_k > 0).any()):
        probs = _truncated(probs, top_p, top_k)
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    # right: the first token whose cumulative probability exceeds the draw, hence never one of probability 0
    drawn = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)[:, 0]
    likeliest = logits.argmax(-1)
    drawn = torch.where(greedy | (drawn >= logits.shape[1]), likeliest, drawn)
    return drawn, logp.gather(1, drawn[:, None])[:, 0]


def _truncated(probs: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Probabilities outside the k likeliest, and outside the smallest set that reaches p, become 0."""
    ordered, order = probs.sort(dim=-1, descending=True)
    rank = torch.arange(probs.shape[1], device=probs.device)[None]
    keep = (top_k[:, None] == 0) | (rank < top_k[:, None])
    # a token stays while what comes before it has not reached p, so the likeliest always stays
    before = ordered.cumsum(-1) - ordered
    keep &= (before < top_p[:, None]) | (top_p[:, None] >= 1)
    return torch.zeros_like(probs).scatter(1, order, torch.where(keep, ordered, 0.0))
