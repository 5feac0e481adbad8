"""The models and the work that all benchmarks measure: Qwen3 shapes with random weights, prompts, and response lengths.

Nothing here needs sluice, so that what runs in the environment of a peer makes the same.
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

VOCABULARY = 512
WINDOW = 1024
EOS = 1
_QWEN3 = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151_936, "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 32},
    "1M": {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 448, "num_attention_heads": 4, "head_dim": 32},
    "5M": {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 768, "num_attention_heads": 4, "head_dim": 64},
    "10M": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1024, "num_attention_heads": 6, "head_dim": 64},
    "100M": {"hidden_size": 896, "num_hidden_layers": 12, "intermediate_size": 2432, "num_attention_heads": 14, "head_dim": 64},
    "0.6B": {"hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072, "num_attention_heads": 16, **_QWEN3},
    "4B": {"hidden_size": 2560, "num_hidden_layers": 36, "intermediate_size": 9728, "num_attention_heads": 32, **_QWEN3},
}  # fmt: skip
"""By their parameters: 1.0, 5.0, 9.8 and 101.4 million, and those of Qwen3-0.6B and 4B, for a GPU; `tiny` is for trying the
benchmarks out."""

MEDIAN_LENGTH, P99_LENGTH = 40, 400
"""Of responses as they are in reinforcement learning: most are short, and a few very long."""


def config_of(size: str, **changes: Any) -> Qwen3Config:
    """Without an end-of-sequence id: how long a response gets is for the benchmark to say."""
    usual = {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "tie_word_embeddings": False}
    ids = {"pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}
    return Qwen3Config(**{**usual, **ids, "max_position_embeddings": WINDOW, **SHAPES[size], **changes})


def model_of(size: str, dtype: str = "float32", device: str = "cpu") -> Any:
    """The same weights every time on the same device."""
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen3ForCausalLM._from_config(config_of(size), dtype=getattr(torch, dtype)).eval()


def tokenizer_of() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 512 words; <pad> is 0, <eos> 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sums = (f"{a} + {b} = {a + b}. The answer is {a * b}. {string.ascii_letters}" for a in range(60) for b in range(60))
    tokenizer.train_from_iterator(sums, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def save(folder: Path, size: str, *, weights: bool = True, **changes: Any) -> Path:
    """A model folder with a tokeniser, which knows the first 512 ids; without weights it is for `model.random_weights`."""
    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    (model_of(size) if weights else config_of(size, **changes)).save_pretrained(folder)
    tokenizer_of().save_pretrained(str(folder))
    return folder


@dataclass(frozen=True)
class Work:
    """Prompts and how many tokens each is answered with, in groups of eight with one prompt each."""

    prompts: list[list[int]]
    new_tokens: list[int]
    num_slots: int
    """Sequences that are decoded at once."""

    @property
    def total(self) -> int:
        """Tokens that are wanted; what a side computes besides is its own loss."""
        return sum(self.new_tokens)

    @property
    def num_steps(self) -> int:
        """Fewest decode steps that can do it: with every slot full until the end."""
        return math.ceil(self.total / self.num_slots)

    def shortened(self, longest: int) -> Work:
        """As many prompts as slots, and few tokens."""
        few = slice(self.num_slots)
        return Work(self.prompts[few], [min(n, longest) for n in self.new_tokens[few]], self.num_slots)

    def batches(self) -> list[tuple[list[list[int]], list[int]]]:
        """As many prompts as slots at a time, and their lengths."""
        starts = range(0, len(self.prompts), self.num_slots)
        return [(self.prompts[i : i + self.num_slots], self.new_tokens[i : i + self.num_slots]) for i in starts]


def uniform(num: int, new_tokens: int) -> Work:
    return Work(_prompts(num), [new_tokens] * num, num)


def rl_like(num: int, num_slots: int, longest: int) -> Work:
    return Work(_prompts(num), response_lengths(num, longest), num_slots)


def response_lengths(num: int, longest: int, seed: int = 0) -> list[int]:
    """Log-normal lengths of median 40 and 99th percentile 400, cut off at `longest`."""
    sigma = math.log(P99_LENGTH / MEDIAN_LENGTH) / 2.326
    drawn = np.random.default_rng(seed).lognormal(math.log(MEDIAN_LENGTH), sigma, num)
    return [min(longest, max(1, round(length))) for length in drawn]


def _prompts(num: int) -> list[list[int]]:
    """8 to 24 tokens."""
    drawn = np.random.default_rng(0)
    distinct = [drawn.integers(3, VOCABULARY, drawn.integers(8, 25)).tolist() for _ in range(math.ceil(num / 8))]
    return [distinct[i // 8] for i in range(num)]


# What a model costs


def matrix_weights(config: Any) -> list[tuple[int, int]]:
    """(inputs, outputs) of every matrix product that a token takes, with query, key and value as one, and so gate and up."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer = [
        (hidden, heads + 2 * keys),
        (heads, hidden),
        (hidden, 2 * config.intermediate_size),
        (config.intermediate_size, hidden),
    ]
    return [*layer * config.num_hidden_layers, (hidden, config.vocab_size)]


def matrix_parameters(config: Any) -> int:
    """Parameters that take part in matrix products: all but the embeddings and the norms."""
    return sum(inputs * outputs for inputs, outputs in matrix_weights(config))


def training_flops(config: Any, lengths: list[int]) -> float:
    """Of forward and backward over sequences of these lengths: 6 per parameter and token, and causal attention's."""
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 6.0 * matrix_parameters(config) * sum(lengths) + attention * sum(length**2 for length in lengths)
