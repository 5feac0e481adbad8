"""Tokens per second of an update, in the layouts that the trainer has, and how near that is to what the machine can do.

A trainer as `sluice train` builds it makes one update on 64 samples (fewer of large models): log-probs, advantages, CISPO
loss, backward, AdamW. The layouts are timed in turn, on the same samples. `uniform`: all responses equally long;
`rl_like`: log-normal lengths (median 40, 99th percentile 400).

The bound is the model's FLOPs (6 per parameter and token of the samples, padding not counted, and causal attention's)
at the rate of a large square product, which is measured in the same rounds; `mfu` is that time over the trainer's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import sluice  # noqa: F401  before torch: sets GOMP_SPINCOUNT

# isort: split
import numpy as np

from bounds import SquareProduct
from measuring import DTYPES, LENGTHS, add_cases, in_turn, parser, ratios, reported, seconds, shown, spread
from shapes import SHAPES, VOCABULARY, Work, config_of, rl_like, save, training_flops, uniform
from sluice.config import TrainConfig
from sluice.configfile import load
from sluice.data.chat import Chat, load_tokenizer
from sluice.interfaces import Layout
from sluice.launch.checked import check
from sluice.launch.models import engine_and_trainer, set_up_process
from sluice.launch.placing import Placement
from sluice.types import Sample
from sluice.update import prepare, update

SAMPLES = {"10M": 32, "100M": 4}
"""Of models with which 64 would take a round minutes."""


def samples_of(work: Work) -> list[Sample]:
    """Responses of random tokens, with the log-probs that such have, in groups of eight or as many as there are."""
    drawn = np.random.default_rng(0)
    samples = []
    for i, (prompt, length) in enumerate(zip(work.prompts, work.new_tokens, strict=True)):
        response = drawn.integers(3, VOCABULARY, length).tolist()
        before = [0.0] * len(prompt)
        samples.append(
            Sample(
                token_ids=prompt + response,
                loss_weights=before + [1.0] * length,
                logprobs=before + [-math.log(VOCABULARY)] * length,
                policy_versions=[-1] * len(prompt) + [0] * length,
                temperature=1.0,
                group=i // 8,
                index=i % 8,
                reward=float(i % 3 == 0),
            )
        )
    return samples


class Updates:
    """One update of a trainer at every call, which gives the seconds it took."""

    def __init__(self, folder: Path, layout: str, dtype: str, settings: Sequence[str]) -> None:
        told = [
            *(f"model.path={folder}/model", "model.random_weights=true", f"model.dtype={dtype}"),
            *(f"data.path={folder}/prompts.jsonl", "rewards=[{name: digits:share_of_digits}]"),
            f"trainer.layout={layout}",
        ]
        config = load(TrainConfig, [], [*settings, *told]).config
        checked = check(config)
        chat = Chat(load_tokenizer(config.model.path))
        parts = engine_and_trainer(config, checked, chat, Placement())
        self.learner = SimpleNamespace(
            trainer=parts.trainer,
            algorithm=checked.algorithm,
            packing=parts.packing,
            old_logprobs=config.algorithm.old_logprobs,
            pretrain_steps=0,
            step=0,
        )

    def __call__(self, samples: list[Sample]) -> float:
        return seconds(lambda: asyncio.run(self._update(samples)))

    async def _update(self, samples: list[Sample]) -> None:
        await update(self.learner, await prepare(self.learner, samples))


def measure(size: str, kind: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    num = args.samples or SAMPLES.get(size, 64)
    samples = samples_of(rl_like(num, num, args.longest) if kind == "rl_like" else uniform(num, args.new_tokens))
    with tempfile.TemporaryDirectory() as name:
        save(Path(name) / "model", size, weights=False)
        (Path(name) / "prompts.jsonl").write_text(json.dumps({"prompt": "1 + 1 = "}) + "\n")
        sides = {layout: Updates(Path(name), layout, dtype, args.settings) for layout in args.layouts}
    square = SquareProduct(dtype)
    found = in_turn(
        {**{layout: partial(side, samples) for layout, side in sides.items()}, "square": square}, args.rounds
    )
    rates, lengths = found.pop("square"), [len(sample) for sample in samples]
    flops = training_flops(config_of(size), lengths)
    bound = [flops / rate for rate in rates]
    return {
        "size": size,
        "lengths": kind,
        "dtype": dtype,
        "samples": num,
        "tokens": sum(lengths),
        "update_s": {layout: spread(taken) for layout, taken in found.items()},
        "tokens_per_s": {layout: spread([sum(lengths) / s for s in taken]) for layout, taken in found.items()},
        "mfu": {layout: ratios(bound, taken) for layout, taken in found.items()},
        "time_over_bound": {layout: ratios(taken, bound) for layout, taken in found.items()},
        "speed_over_first_layout": {layout: ratios(found[args.layouts[0]], taken) for layout, taken in found.items()},
        "square_product_gflops": spread([rate / 1e9 for rate in rates]),
    }


def tell(result: dict[str, Any]) -> None:
    print(f"{result['size']} {result['dtype']}, {result['lengths']} lengths, {result['tokens']} tokens:")
    for layout, rate in result["tokens_per_s"].items():
        mfu, over = result["mfu"][layout]["median"], result["time_over_bound"][layout]
        print(
            f"  {layout:7} {shown(rate)} tokens/s, {mfu:.0%} of the machine's FLOPs, {shown(over, 2)} times the bound"
        )


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    add_cases(options, SHAPES, [f"{size}:{kind}" for size in ("1M", "10M", "100M") for kind in LENGTHS])
    options.add_argument("--layouts", nargs="+", choices=get_args(Layout), default=list(get_args(Layout)))
    options.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    options.add_argument("--samples", type=int, help="left out, 64, or fewer of large models")
    options.add_argument("--new-tokens", type=int, default=64, help="of uniform lengths")
    options.add_argument("--longest", type=int, default=512, help="of rl_like lengths")
    options.add_argument(
        "--settings", nargs="*", default=[], help="others of sluice train, such as trainer.tokens_per_micro_batch=4096"
    )
    args = options.parse_args(argv)
    set_up_process(None)
    with reported("trainer", args, argv) as said:
        for size, kind in args.cases:
            for dtype in args.dtypes:
                said["results"].append(measure(size, kind, dtype, args))
                tell(said["results"][-1])


if __name__ == "__main__":
    main()
