"""Tokens per second of the embedded engine beside `transformers`: its `generate`, and its continuous batching.

All sides have the same random weights, the same prompts and the same number of new tokens for each, sample at
temperature 1 from the whole vocabulary, and are timed in turn in one process, which is set up as `sluice train` sets up its own (the
C library keeps freed memory, for all sides). Only tokens that were asked for count.
The engine's log-probs are in its time, and so is that it drops its caches, as it does after every update; the others
compute no log-probs.

Two kinds of lengths. `uniform`: all sequences at once, each as long as the others. `rl_like`: log-normal lengths (median
40, 99th percentile 400), and twice as many prompts as slots or more. `generate` takes one batch of as many prompts as there
are slots after the other; a row stops at its length as it would at an end-of-sequence token, and a batch ends with its
longest row. The engine and continuous batching give each request its own limit and fill a slot as it comes free.

Sizes that would take the peers long are measured against the bound alone (`--against-bound`), with few tokens. The bound
is the time of the matrix products of every distinct prompt, once, and of the fewest decode steps that can make the rest of the
tokens, run by themselves in the same rounds: `share_of_bound` is that time over the engine's, and `share_of_square_product` that
of the tokens' FLOPs at the rate of one large product.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import sluice  # noqa: F401  before torch: sets GOMP_SPINCOUNT

# isort: split
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from bounds import DecodeProducts, SquareProduct
from measuring import DTYPES, add_cases, in_turn, parser, ratios, reported, seconds, shown, spread
from shapes import SHAPES, Work, matrix_parameters, model_of, rl_like, uniform
from sluice.engines.embedded import EmbeddedEngine
from sluice.launch.models import set_up_process
from sluice.trainers.model import PolicyModel
from sluice.types import Sampling
from sluice.weights.in_process import InProcessWeights

SLOTS = 64
RL_PROMPTS = {"1M": (128, 64), "10M": (64, 32), "100M": (32, 16)}
"""Prompts and slots of rl_like lengths; with more a round would take minutes."""
PEERS = ["generate", "continuous_batching"]
PAGE = 32
WARM_UP = 8
"""Tokens."""


class Engine:
    """The embedded engine as a run has it: made once, and told of new weights before every batch."""

    def __init__(self, model: Any, num_slots: int) -> None:
        self.policy = PolicyModel(model)
        self.engine = EmbeddedEngine(self.policy, lambda _: "", vocab_size=model.config.vocab_size, num_slots=num_slots)
        self.version = 0

    def __call__(self, work: Work) -> float:
        return seconds(lambda: asyncio.run(self._all(work)))

    async def _all(self, work: Work) -> None:
        self.version += 1
        await self.engine.update_weights(InProcessWeights(self.policy), self.version)
        requests = (
            self.engine.generate(prompt, Sampling(max_new_tokens=length, seed=i))
            for i, (prompt, length) in enumerate(zip(work.prompts, work.new_tokens, strict=True))
        )
        completions = await asyncio.gather(*requests)
        assert [len(completion.token_ids) for completion in completions] == work.new_tokens


class LengthReached(StoppingCriteria):
    """True for the rows that have as many tokens as they were to get."""

    def __init__(self, prompt_length: int, new_tokens: Sequence[int]) -> None:
        self.ends = torch.tensor([prompt_length + length for length in new_tokens])

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return self.ends.to(input_ids.device) <= input_ids.shape[1]


def sampled(**settings: Any) -> GenerationConfig:
    """From the whole vocabulary; by default transformers takes the 50 likeliest."""
    return GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, **settings)


def generate(model: Any, cache: str | None, work: Work) -> float:
    """`model.generate`, a batch of as many prompts as slots at a time."""

    def all_batches() -> None:
        for prompts, lengths in work.batches():
            width = max(map(len, prompts))
            ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
            mask = torch.tensor(
                [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device
            )
            found = model.generate(
                ids,
                attention_mask=mask,
                generation_config=sampled(max_new_tokens=max(lengths), cache_implementation=cache),
                stopping_criteria=StoppingCriteriaList([LengthReached(width, lengths)]),
            )
            assert found.shape[1] == width + max(lengths)

    return seconds(all_batches)


class ContinuousBatching:
    """Its manager and the manager's cache are made once, and not timed."""

    def __init__(self, model: Any, work: Work) -> None:
        longest = max(len(p) + n for p, n in zip(work.prompts, work.new_tokens, strict=True))
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=work.num_slots * (longest // PAGE + 2),
            max_batch_tokens=2048,
            max_requests_per_batch=work.num_slots,
        )
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # it misses psutil, for GPU settings
        model = copy.deepcopy(model)  # it changes how the model attends
        self.manager = model.init_continuous_batching(sampled(eos_token_id=-1), config)
        self.manager.start()

    def __call__(self, work: Work) -> float:
        return seconds(lambda: self._all(work))

    def _all(self, work: Work) -> None:
        for prompt, length in zip(work.prompts, work.new_tokens, strict=True):
            self.manager.add_request(prompt, max_new_tokens=length)
        lengths: list[int] = []
        while len(lengths) < len(work.prompts):
            result = self.manager.get_result(timeout=60)
            assert result is not None, "continuous batching has stopped"
            assert not result.error, result.error
            if result.is_finished():
                lengths.append(len(result.generated_tokens))
        assert sorted(lengths) == sorted(work.new_tokens)

    def close(self) -> None:
        self.manager.stop(block=True)
        self.manager.destroy()


class Products:
    """The matrix products that cannot be done without."""

    def __init__(self, config: Any, work: Work, dtype: str) -> None:
        prompts = {tuple(prompt) for prompt in work.prompts}
        slots = min(work.num_slots, len(work.prompts))
        steps = math.ceil((work.total - len(work.prompts)) / slots)  # the first token comes with the prompt
        self.parts = [
            DecodeProducts(config, sum(map(len, prompts)), 1, dtype),
            DecodeProducts(config, slots, steps, dtype),
        ]

    def __call__(self) -> float:
        return sum(part() for part in self.parts)


def measure(size: str, dtype: str, work: Work, peers: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    model = model_of(size, dtype)
    batching = ContinuousBatching(model, work) if "continuous_batching" in peers else None
    generating: dict[str, Callable[[Work], float]] = {
        # of its own, since it changes how a model computes norms and attention
        "sluice": Engine(copy.deepcopy(model), work.num_slots)
    }
    if "generate" in peers:
        generating["generate"] = partial(generate, model, args.cache)
    if batching:
        generating["continuous_batching"] = batching
    for side in generating.values():
        side(work.shortened(WARM_UP))
    sides: dict[str, Callable[[], float]] = {name: partial(side, work) for name, side in generating.items()}
    sides["products"] = Products(model.config, work, dtype)
    sides["square"] = SquareProduct(dtype)
    found = in_turn(sides, args.rounds, warm_up=False)
    if batching:
        batching.close()
    counts = {"prompts": len(work.prompts), "slots": work.num_slots, "tokens": work.total}
    return {"size": size, "dtype": dtype, **counts, **figures(found, work.total, 2 * matrix_parameters(model.config))}


def figures(found: dict[str, list[float]], tokens: int, flops_per_token: int) -> dict[str, Any]:
    """From the seconds of the sides, and the rate of the square product, in each round."""
    ours, products, rate = found.pop("sluice"), found.pop("products"), found.pop("square")
    rates = [tokens / taken for taken in ours]
    return {
        "tokens_per_s": {"sluice": spread(rates)}
        | {name: spread([tokens / taken for taken in theirs]) for name, theirs in found.items()},
        "sluice_over": {name: ratios(theirs, ours) for name, theirs in found.items()},
        "share_of_bound": ratios(products, ours),
        "share_of_square_product": ratios([own * flops_per_token for own in rates], rate),
    }


def work_of(size: str, kind: str, args: argparse.Namespace) -> Work:
    if kind == "uniform":
        return uniform(args.slots or SLOTS, args.new_tokens)
    num, slots = (4 * args.slots, args.slots) if args.slots else RL_PROMPTS.get(size, (256, 64))
    return rl_like(num, slots, args.longest)


def tell(result: dict[str, Any]) -> None:
    print(f"{result['size']} {result['dtype']}, {result['lengths']} lengths, {result['tokens']} tokens:")
    for name, rate in result["tokens_per_s"].items():
        over = f"; sluice has {shown(result['sluice_over'][name], 2)} times that" if name != "sluice" else ""
        print(f"  {name:20} {shown(rate)} tokens/s{over}")
    bound, square = (result[name]["median"] for name in ("share_of_bound", "share_of_square_product"))
    print(f"  {'of the bound':20} {bound:.0%}; of the rate of a square product {square:.0%}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    add_cases(options, SHAPES, ["1M:uniform", "1M:rl_like", "10M:uniform", "10M:rl_like"])
    options.add_argument(
        "--against-bound",
        nargs="*",
        choices=SHAPES,
        default=["100M"],
        help="sizes without peers; left out, 100M; empty, none",
    )
    options.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    options.add_argument(
        "--slots", type=int, help="sequences at once; left out, 64, or fewer where a round would take minutes"
    )
    options.add_argument("--new-tokens", type=int, default=64, help="of uniform lengths")
    options.add_argument("--few-tokens", type=int, default=32, help="the same of --against-bound")
    options.add_argument("--longest", type=int, default=512, help="of rl_like lengths")
    options.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    options.add_argument("--cache", choices=["static"], help="of generate; left out, its default, a dynamic one")
    args = options.parse_args(argv)
    plan = [(size, kind, work_of(size, kind, args), args.peers) for size, kind in args.cases]
    plan += [(size, "uniform", uniform(args.slots or SLOTS, args.few_tokens), []) for size in args.against_bound]
    set_up_process(None)
    with reported("rollout", args, argv) as said:
        for size, kind, work, peers in plan:
            for dtype in args.dtypes:
                said["results"].append({"lengths": kind, **measure(size, dtype, work, peers, args)})
                tell(said["results"][-1])


if __name__ == "__main__":
    main()
