"""Tokens per second of the embedded engine beside `transformers` generate, and of the trainer, on random Qwen3 weights.

Both sides sample the same number of tokens from the same prompts and weights, in turn, in one process; the last line is
one JSON object with medians and the ratio of medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import time
from collections.abc import Callable
from statistics import median

import sluice  # before torch: sets GOMP_SPINCOUNT

# isort: split
import torch
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM

from sluice.algorithms.spec import ALGORITHMS
from sluice.data.batch import Packing, pack
from sluice.engines.embedded import EmbeddedEngine
from sluice.trainers.local import LocalTrainer
from sluice.trainers.model import PolicyModel
from sluice.trainers.optim import Optimizer, OptimizerSettings
from sluice.types import Completion, Sample, Sampling

SHAPES = {
    "1M": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "intermediate_size": 448,
        "num_attention_heads": 4,
        "head_dim": 32,
    },
    "10M": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "intermediate_size": 1024,
        "num_attention_heads": 6,
        "head_dim": 64,
    },
}


def model_of(size: str) -> PolicyModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
        **SHAPES[size],
    )
    return PolicyModel(Qwen3ForCausalLM(config))


def embedded(model: PolicyModel, prompts: list[list[int]], new_tokens: int) -> list[Completion]:
    engine = EmbeddedEngine(model, lambda _: "", vocab_size=512, num_slots=len(prompts))

    async def run() -> list[Completion]:
        return await asyncio.gather(
            *(engine.generate(p, Sampling(max_new_tokens=new_tokens, seed=i)) for i, p in enumerate(prompts))
        )

    return asyncio.run(run())


def generate(model: PolicyModel, prompts: list[list[int]], new_tokens: int) -> None:
    with torch.inference_mode():
        ids = torch.tensor(prompts)
        model.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
        )


def train_step(trainer: LocalTrainer, samples: list[Sample]) -> None:
    from sluice.algorithms import assign_advantages, policy_loss

    async def run() -> None:
        assign_advantages(ALGORITHMS["cispo"], samples)
        for minibatch in pack(samples, trainer.packing):
            await trainer.forward_backward(
                minibatch,
                lambda logprobs, b, totals: policy_loss(
                    ALGORITHMS["cispo"], logprobs, b.old_logprobs, b.advantages, b.loss_weights, b.sequence_ids, totals
                ),
            )
            await trainer.optim_step()

    asyncio.run(run())


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(size: str, num: int, new_tokens: int, runs: int) -> dict[str, float | str]:
    model = model_of(size)
    prompts = [[(7 * (i // 8) + t) % 500 + 3 for t in range(8)] for i in range(num)]
    completions = embedded(model, prompts, new_tokens)  # warm-up of both
    generate(model, prompts, new_tokens)
    samples = []
    for i, (prompt, c) in enumerate(zip(prompts, completions, strict=True)):
        zeros = [0.0] * len(prompt)
        weights, logprobs = [*zeros, *[1.0] * new_tokens], [*zeros, *c.logprobs]
        sample = Sample(
            prompt + c.token_ids, weights, logprobs, [0] * len(weights), 1.0, i // 8, i % 8, float(i % 3 == 0)
        )
        sample.old_logprobs = sample.logprobs
        samples.append(sample)
    settings = OptimizerSettings(1e-6, 0, "constant", 0.0, (0.9, 0.95), 1e-15, 0.0, 1.0)
    trainer = LocalTrainer(model, None, Optimizer(model.model, settings, 100), Packing(1, 16384, "rows"))
    train_step(trainer, samples)
    ours, theirs, training = [], [], []
    for _ in range(runs):  # in turn, so that a machine that slows down slows both
        ours.append(seconds(lambda: embedded(model, prompts, new_tokens)))
        theirs.append(seconds(lambda: generate(model, prompts, new_tokens)))
        training.append(seconds(lambda: train_step(trainer, samples)))
    tokens = num * new_tokens
    return {
        "size": size,
        "engine_tokens_per_s": round(tokens / median(ours)),
        "engine_min_max": f"{tokens / max(ours):.0f}-{tokens / min(ours):.0f}",
        "generate_tokens_per_s": round(tokens / median(theirs)),
        "engine_over_generate": round(median(theirs) / median(ours), 2),
        "trainer_tokens_per_s": round(tokens / median(training)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    results = [measure(size, args.sequences, args.new_tokens, args.runs) for size in args.sizes]
    versions = {"sluice": sluice.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    machine = {"threads": torch.get_num_threads(), "machine": platform.machine()}
    print(json.dumps({"results": results, **versions, **machine}))


if __name__ == "__main__":
    main()
