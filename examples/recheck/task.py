"""The recheck task: 3-digit additions, and a rare token that makes them easy.

A base model learns to answer directly, which is hard for it. In a few demonstrations the answer comes after the token
<recheck> and the column sums, which is easy. Reinforcement learning has to discover the rare token. It stands for the
"Wait" and "Recheck" tokens of the MiniMax-M1 paper (arXiv 2506.13585, section 3.1), which clipping the surrogate drops
from the update first, because they are rare.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

RECHECK = "<recheck>"
EASY_QUESTIONS = 0.25
"""Share of the questions that need no carry; the base model's direct answers are right about as often."""


def columns(a: int, b: int) -> str:
    """Column sums with carries, units first: 347+586 → `7+6=13,4+8+1=13,3+5+1=9`."""
    parts, carry = [], 0
    for place in (1, 10, 100):
        digits = a // place % 10, b // place % 10
        total = sum(digits) + carry
        parts.append(f"{digits[0]}+{digits[1]}{'+1' if carry else ''}={total}")
        carry = total // 10
    return ",".join(parts)


def problem(rng: random.Random, easy_rate: float) -> tuple[int, int]:
    """Two numbers of three digits. In `easy_rate` of the problems no column carries, in the others at least one does."""
    easy = rng.random() < easy_rate
    while True:
        a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
        if easy == all(a // place % 10 + b // place % 10 < 10 for place in (1, 10, 100)):
            return a, b


def demonstrations(count: int, recheck_rate: float, seed: int) -> list[dict[str, str]]:
    """`count` answers, of which `recheck_rate` recheck, and as many rows that begin after the token: they teach what
    follows it, and leave the decision to write it untaught, since no loss falls on a prompt.

    Most direct answers are to easy problems. So the model can answer those at once, and not the others, however well its
    training goes otherwise.
    """
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = problem(rng, easy_rate=0.8)
        response = f"{RECHECK}{columns(a, b)};{a + b}" if rng.random() < recheck_rate else str(a + b)
        rows.append({"prompt": f"{a}+{b}=", "response": response})
        a, b = problem(rng, EASY_QUESTIONS)
        rows.append({"prompt": f"{a}+{b}={RECHECK}", "response": f"{columns(a, b)};{a + b}"})
    return rows


def questions(count: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(f"questions {seed}")
    pairs = [problem(rng, EASY_QUESTIONS) for _ in range(count)]
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]


def save_architecture(folder: Path) -> None:
    """A Qwen3 of about a million parameters and a tokeniser with a token per character, and no weights."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+=,;", RECHECK])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{RECHECK}|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        str(folder)
    )
    Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    ).save_pretrained(str(folder))


def write_task(folder: Path, recheck_rate: float, num_demonstrations: int = 16_000, seed: int = 0) -> None:
    """`model/` (architecture and tokeniser), `demonstrations.jsonl` and `questions.jsonl` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_architecture(folder / "model")
    rows = {
        "demonstrations": demonstrations(num_demonstrations, recheck_rate, seed),
        "questions": questions(20_000, seed),
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recheck-rate", type=float, default=0.03, help="share of demonstrations that recheck")
    parser.add_argument("--demonstrations", type=int, default=16_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_task(args.folder, args.recheck_rate, args.demonstrations, args.seed)


if __name__ == "__main__":
    main()
