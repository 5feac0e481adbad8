"""On one NVIDIA GPU: that everything computes what it does on the CPU, how fast it is, and what it could be at most.

Random weights of Qwen3-0.6B and 4B shapes in BF16, with FP32 masters. In under 10 minutes: `tests/test_devices.py`; the rates of
a large copy and a large product; decoding, against the time that the GPU takes to read the weights once and the cached keys and
values of each sequence, at the rate of the copy; an update, against its FLOPs at the rate of the product; and whole steps beside
TRL where the same Python has it. Of 4B an update is its gradient alone, since AdamW's state would not fit beside it into 80 GB.

The last two things printed are a table in Markdown, for docs/performance.md, and one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import sluice  # noqa: F401  before torch: sets GOMP_SPINCOUNT

# isort: split
import torch
from torch.nn.functional import linear

from head import CISPO, loss_of
from measuring import LENGTHS, ROOT, parser, reported, rounded, shown, skip, spread
from rollout import Engine, generate
from shapes import Work, config_of, matrix_parameters, model_of, rl_like, training_flops, uniform
from sluice.data.batch import Packing, make_minibatch
from sluice.trainers.local import LocalTrainer
from sluice.trainers.model import PolicyModel
from sluice.trainers.optim import Optimizer, OptimizerSettings
from trainer import samples_of

PARTS = ["checks", "decode", "update", "step"]
SETTINGS = OptimizerSettings(1e-6, 0, "constant", 0.0, (0.9, 0.95), 1e-15, 0.0, 1.0)


def timed(work: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each of the rounds, after one that does not count."""
    found = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return found[1:]


def copy_rate(rounds: int) -> float:
    """Bytes/s read and written by a copy of 4 GB."""
    source = torch.ones(2**30, device="cuda")
    target = torch.empty_like(source)
    return 8 * 2**30 / statistics.median(timed(lambda: target.copy_(source), rounds))


def product_rate(rounds: int) -> float:
    """FLOP/s of a product of 8192² BF16 matrices."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 10 * 2 * 8192**3 / statistics.median(timed(lambda: [linear(a, b) for _ in range(10)], rounds))


class Bounds:
    """What the GPU does at best."""

    def __init__(self, rounds: int) -> None:
        self.bytes_per_s, self.flops = copy_rate(rounds), product_rate(rounds)

    def decode_s(self, model: Any, work: Work) -> float:
        """To read the weights once a step, in the fewest steps, and before each token the keys and values of its sequence."""
        config = model.config
        per_position = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        read = sum(n * len(p) + n * (n - 1) // 2 for p, n in zip(work.prompts, work.new_tokens, strict=True))
        steps = max(work.num_steps, max(work.new_tokens))
        return (2 * matrix_parameters(config) * steps + per_position * read) / self.bytes_per_s


def peak_gb() -> float:
    return rounded(torch.cuda.max_memory_allocated() / 1e9)


def fresh() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def decode(model: Any, what: str, work: Work, bounds: Bounds, rounds: int) -> dict[str, Any]:
    fresh()
    engine = Engine(model, work.num_slots)
    taken = timed(lambda: engine(work), rounds)
    bound = bounds.decode_s(model, work)
    return {
        "what": what,
        "tokens_per_s": spread([work.total / s for s in taken]),
        "share_of_bound": spread([bound / s for s in taken]),
        "peak_gb": peak_gb(),
        "decoder": type(engine.engine._decoder).__name__,  # pyright: ignore[reportPrivateUsage]
    }


def decodes(size: str, bounds: Bounds, args: argparse.Namespace) -> list[dict[str, Any]]:
    model = model_of(size, "bfloat16", "cuda")
    new = args.new_tokens
    works = {f"decode, {n} sequences of {new} tokens": uniform(n, new) for n in args.sequences}
    most = max(args.sequences)
    works[f"decode, {4 * most} sequences of RL-like lengths, {most} at once"] = rl_like(4 * most, most, 1000)
    few = uniform(min(args.sequences), 32)
    fresh()
    # first, since our engine changes how the model computes norms and attention
    taken = timed(lambda: generate(model, None, few), 1)
    theirs = {
        "size": size,
        "what": f"`generate`, {len(few.prompts)} sequences of 32 tokens",
        "tokens_per_s": spread([few.total / s for s in taken]),
        "share_of_bound": spread([bounds.decode_s(model, few) / s for s in taken]),
        "peak_gb": peak_gb(),
    }
    ours = [{"size": size, **decode(model, what, work, bounds, args.rounds)} for what, work in works.items()]
    return [theirs, *ours]


def update(size: str, whole: bool, compiled: bool, bounds: Bounds, args: argparse.Namespace) -> dict[str, Any]:
    """64 samples of 512 tokens in micro-batches of 16,384; `whole` with AdamW, else with activations recomputed."""
    fresh()
    policy = PolicyModel(model_of(size, "bfloat16", "cuda"))
    if not whole:
        policy.recompute_activations()
    if compiled:
        policy.compile()
    optimizer = Optimizer(policy.model, SETTINGS, 1)
    trainer = LocalTrainer(policy, None, optimizer, Packing(1, 16_384, "packed"), couples_tokens=False)
    samples = samples_of(uniform(args.samples, 512))
    for sample in samples:
        sample.old_logprobs, sample.advantages = sample.logprobs, [float(sample.index % 2)] * len(sample)

    async def once() -> None:
        await trainer.forward_backward(make_minibatch(samples, trainer.packing, CISPO, 0), loss_of)
        if whole:
            await trainer.optim_step()
        else:
            optimizer.drop_gradients()

    taken = timed(lambda: asyncio.run(once()), args.rounds)
    lengths = [len(sample) for sample in samples]
    bound = training_flops(config_of(size), lengths) / bounds.flops
    return {
        "size": size,
        "what": ("update with AdamW" if whole else "gradient, activations recomputed") + ", compiled" * compiled,
        "tokens_per_s": spread([sum(lengths) / s for s in taken]),
        "share_of_bound": spread([bound / s for s in taken]),
        "peak_gb": peak_gb(),
    }


def last_json(command: Sequence[str]) -> dict[str, Any]:
    """What a benchmark says in its last line."""
    print("$", *command, flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    print(done.stdout.rpartition("\n{")[0], flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def step(size: str, kind: str, said: dict[str, Any]) -> dict[str, Any]:
    trl = sys.executable if find_spec("trl") else "none"
    if trl == "none":
        skip(said, "TRL, which this Python does not have")
    words = f"--cases {size}:{kind} --dtypes bfloat16 --trl {trl} --new-tokens 128 --longest 256 --rounds 3 --steps 1 --warm-up 1"
    words += " --settings trainer.tokens_per_micro_batch=16384"
    return last_json([sys.executable, "benchmarks/step.py", *words.split()])["results"][0]


def table(said: dict[str, Any]) -> str:
    lines = ["| shape | what | tokens/s | of the bound | peak memory |", "|---|---|---|---|---|"]
    for r in said["results"]:
        share = f"{r['share_of_bound']['median']:.0%}"
        lines.append(f"| {r['size']} | {r['what']} | {shown(r['tokens_per_s'])} | {share} | {r['peak_gb']:.1f} GB |")
    for r in said["steps"]:
        sides = "; ".join(f"{name} {shown(s, 2)} s" for name, s in r["step_s"].items())
        ratio = f"TRL takes {shown(r['trl_over_sluice'], 2)} times as long" if "trl_over_sluice" in r else ""
        lines.append(f"| {r['size']} | step, 64 samples, {r['lengths']} lengths: {sides} | {ratio} | | |")
    return "\n".join(lines)


def check(said: dict[str, Any]) -> None:
    """Raises where a test fails."""
    words = ["-q", "-o", "filterwarnings=default", "-p", "no:cacheprovider", "tests/test_devices.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=300
    )
    print(done.stdout[-6000:], flush=True)
    said["checks"] = done.stdout.strip().rpartition("\n")[2]
    done.check_returncode()


@contextmanager
def told(part: str, size: str, said: dict[str, Any]) -> Generator[None]:
    """What a part of the benchmark cannot do on this GPU is said, and the others go on."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        skip(said, f"{part} of {size}: {type(error).__name__}: {str(error)[:200]}")


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options.add_argument("--sizes", nargs="+", default=["0.6B", "4B"])
    options.add_argument("--sequences", nargs="+", type=int, default=[64, 256])
    options.add_argument("--new-tokens", type=int, default=256)
    options.add_argument("--samples", type=int, default=64, help="of an update")
    args = options.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("error: gpu.py needs an NVIDIA GPU, and torch sees none")
    with reported("gpu", args, argv) as said:
        said |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "steps": []}
        with told("checks", "all sizes", said):
            if "checks" in args.parts:
                check(said)
        bounds = Bounds(args.rounds)
        said |= {"copy_gb_per_s": rounded(bounds.bytes_per_s / 1e9), "product_tflops": rounded(bounds.flops / 1e12)}
        print(f"{said['gpu']}: copy {said['copy_gb_per_s']} GB/s, product {said['product_tflops']} TFLOP/s", flush=True)
        for size in args.sizes:
            with told("decode", size, said):
                said["results"] += decodes(size, bounds, args) if "decode" in args.parts else []
            whole = size != "4B"
            for compiled in (False, True) if whole else (False,):
                with told("update", size, said):
                    said["results"] += [update(size, whole, compiled, bounds, args)] if "update" in args.parts else []
            print(table({**said, "steps": []}), flush=True)
        fresh()
        for kind in LENGTHS if "step" in args.parts else []:
            with told(f"step, {kind}", args.sizes[0], said):
                said["steps"].append(step(args.sizes[0], kind, said))
        print(f"checks: {said.get('checks')}\n{table(said)}")


if __name__ == "__main__":
    main()
