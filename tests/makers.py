"""Small real tokenisers, trained on the spot and saved as Hugging Face folders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""For `make_bpe_tokenizer`; roles are plain text."""


def make_bpe_tokenizer(
    folder: str | Path, texts: Iterable[str], vocab_size: int = 512, chat_template: str | None = None
) -> Path:
    """Byte-level BPE trained on `texts`, with <pad>, <eos> and <bos> (ids 0, 1, 2) and all 256 bytes; gives the folder.

    <bos> is not put before texts by itself.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _save(folder, tokenizer, chat_template, bos_token="<bos>")


def make_char_tokenizer(folder: str | Path, alphabet: str) -> Path:
    """One token per character: <pad> 0, <eos> 1, then `alphabet` in order; other characters raise. Gives the folder."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _save(folder, tokenizer, None)


def _save(folder: str | Path, tokenizer: Tokenizer, chat_template: str | None, **special_tokens: str) -> Path:
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", **special_tokens)
    saved.chat_template = chat_template
    saved.save_pretrained(str(folder))
    return Path(folder)
