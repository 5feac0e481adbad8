"""How far engine and trainer are apart in FP32, in BF16 throughout, and in BF16 with the FP32 head that sluice has.

Both have the same weights and compute the same tokens in different ways: one by one from a cache, and all at once in a packed row.
What the rounding of each makes of it is seen in the probabilities of the sampled tokens: their mean absolute difference and their
correlation (the measure of MiniMax-M1, arXiv 2506.13585, which found 0.9 with a BF16 head and 0.99 with one in FP32).
Weights are random, and the head is scaled until the mean entropy is that of a language model; every variant has the same
weights, rounded to BF16.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
from collections.abc import Sequence
from typing import Any

import sluice  # noqa: F401  before torch: sets GOMP_SPINCOUNT

# isort: split
import torch
from torch import Tensor

from measuring import parser, reported, rounded
from shapes import SHAPES, model_of, uniform
from sluice.data.batch import Packing
from sluice.engines.embedded import EmbeddedEngine
from sluice.trainers.local import LocalTrainer
from sluice.trainers.model import PolicyModel
from sluice.trainers.optim import Optimizer, OptimizerSettings
from sluice.types import Sample, Sampling

ENTROPY = 1.5
"""Nats per token."""
SETTINGS = OptimizerSettings(1e-6, 0, "constant", 0.0, (0.9, 0.95), 1e-15, 0.0, 1.0)


class RoundedHead(PolicyModel):
    """Its logits are rounded to BF16, as those of a model are that is BF16 throughout."""

    def logits(self, hidden: Tensor, weight: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        logits = super().logits(hidden, weight, out)
        return logits.copy_(logits.bfloat16())


VARIANTS: dict[str, tuple[torch.dtype, type[PolicyModel]]] = {
    "FP32": (torch.float32, PolicyModel),
    "BF16": (torch.bfloat16, RoundedHead),
    "BF16, FP32 head": (torch.bfloat16, PolicyModel),
}


@torch.inference_mode()
def with_entropy(model: Any) -> Any:
    """Its head scaled until what it predicts has the mean entropy wanted, and its weights such as BF16 can hold."""
    ids = torch.tensor([prompt[:8] for prompt in uniform(64, 1).prompts])
    logits = model(input_ids=ids).logits.float()
    low, high = 0.1, 1e4
    for _ in range(40):
        middle = (low * high) ** 0.5
        logp = torch.log_softmax(logits * middle, -1)
        low, high = (middle, high) if -(logp.exp() * logp).sum(-1).mean() > ENTROPY else (low, middle)
    model.lm_head.weight.mul_(low)
    return model.bfloat16()


def sampled(policy: PolicyModel, args: argparse.Namespace) -> list[Sample]:
    engine = EmbeddedEngine(policy, lambda _: "", vocab_size=policy.config.vocab_size)
    prompts = uniform(args.sequences, args.new_tokens).prompts

    async def all_of_them() -> list[Sample]:
        asked = [engine.generate(p, Sampling(max_new_tokens=args.new_tokens, seed=i)) for i, p in enumerate(prompts)]
        samples = []
        for i, (prompt, c) in enumerate(zip(prompts, await asyncio.gather(*asked), strict=True)):
            before, n = [0.0] * len(prompt), len(c.token_ids)
            versions = [-1] * len(prompt) + [0] * n
            samples.append(
                Sample(prompt + c.token_ids, before + [1.0] * n, before + c.logprobs, versions, 1.0, i // 8, i % 8)
            )
        return samples

    return asyncio.run(all_of_them())


def measure(model: Any, variant: str, args: argparse.Namespace) -> dict[str, Any]:
    dtype, kind = VARIANTS[variant]
    policy = kind(copy.deepcopy(model).to(dtype))
    samples = sampled(policy, args)
    trainer = LocalTrainer(policy, None, Optimizer(policy.model, SETTINGS, 1), Packing(1, 8192, "packed"))
    asyncio.run(trainer.forward(samples, "old_logprobs"))
    pairs = [(a, b) for s in samples for a, b, w in zip(s.logprobs, s.old_logprobs, s.loss_weights, strict=True) if w]
    engine, ours = torch.tensor(pairs, dtype=torch.float64).exp().T
    difference = (engine - ours).abs()
    return {
        "variant": variant,
        "mean_difference": rounded(float(difference.mean())),
        "largest_difference": rounded(float(difference.max())),
        "correlation": float(torch.corrcoef(torch.stack([engine, ours]))[0, 1]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--sizes", nargs="+", choices=SHAPES, default=["1M", "10M"])
    options.add_argument("--sequences", type=int, default=64)
    options.add_argument("--new-tokens", type=int, default=64)
    args = options.parse_args(argv)
    with reported("precision", args, argv) as said:
        print("| parameters | precision | mean difference of probabilities | largest | correlation |")
        print("|---|---|---|---|---|")
        for size in args.sizes:
            model = with_entropy(model_of(size))
            for variant in VARIANTS:
                found = measure(model, variant, args)
                said["results"].append({"size": size, **found})
                print(
                    f"| {size} | {variant} | {found['mean_difference']:.1e} | {found['largest_difference']:.1e} | "
                    f"{found['correlation']:.6f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
