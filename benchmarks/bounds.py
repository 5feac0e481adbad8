"""What this machine can do at best: how fast it copies, and how fast it multiplies matrices.

Two kinds of products: large square ones, and those of a decode step of n sequences ([n, K] × [K, N] for every matrix of
a model, one after the other). No engine or trainer is faster than its products; the other benchmarks print how near
they come.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import sluice  # noqa: F401  before torch: sets GOMP_SPINCOUNT

# isort: split
import torch
from torch import Tensor
from torch.nn.functional import linear

from measuring import DTYPES, parser, reported, rounded, seconds, shown, spread
from shapes import SHAPES, config_of, matrix_parameters, matrix_weights
from sluice.cpu import onednn_linear
from sluice.engines.products import in_onednn_order

LARGEST = 2048
"""Side of the largest square product."""


def product(x: Tensor, weight: Tensor) -> Tensor:
    """By the library that sluice takes on this processor."""
    return onednn_linear(x, weight) if weight.is_mkldnn else linear(x, weight)


class Copy:
    """One large array copied into another at every call, which gives the bytes/s read and written together."""

    def __init__(self, mebibytes: int = 256) -> None:
        self.source = torch.ones(mebibytes * 2**20 // 4)
        self.target = torch.ones_like(self.source)

    def __call__(self) -> float:
        return 2 * 4 * self.source.numel() / seconds(lambda: self.target.copy_(self.source))


class SquareProduct:
    """Two square matrices, multiplied at every call, which gives the FLOP/s.

    Their side is doubled up to `largest` as long as a product takes less than `limit_s`: BF16 is slow where the
    processor has no instruction for it.
    """

    def __init__(self, dtype: str = "float32", largest: int = LARGEST, limit_s: float = 0.3) -> None:
        self.dtype, self.side = getattr(torch, dtype), min(128, largest)
        self._fill()
        self()
        while self.side < largest and self._flops() / self() < limit_s / 8:  # the next takes eight times as long
            self.side = min(2 * self.side, largest)
            self._fill()
        self()

    def _fill(self) -> None:
        self.left, self.right = (torch.randn(self.side, self.side).to(self.dtype) for _ in range(2))

    def _flops(self) -> float:
        return 2.0 * self.side**3

    @torch.inference_mode()
    def __call__(self) -> float:
        right = in_onednn_order(self.right)
        return self._flops() / seconds(lambda: product(self.left, right))


class DecodeProducts:
    """The matrix products of decode steps of `n` sequences, and nothing else: a call gives the seconds of `num_steps`.

    Every matrix has weights of its own, as in the model, so that large ones come from memory here too. The head is in
    FP32, as it is in sluice.
    """

    def __init__(self, config: Any, n: int, num_steps: int = 1, dtype: str = "float32") -> None:
        self.n, self.num_steps, self.config = n, num_steps, config
        *body, head = matrix_weights(config)
        kinds = [*((shape, getattr(torch, dtype)) for shape in body), (head, torch.float32)]
        inputs = {(width, kind): torch.randn(n, width).to(kind) for (width, _), kind in kinds}
        self.products: list[tuple[Tensor, Tensor]] = [
            (inputs[width, kind], in_onednn_order(torch.randn(height, width).to(kind)))
            for (width, height), kind in kinds
        ]

        self._step()  # the first one is slower

    def flops(self) -> float:
        return 2.0 * matrix_parameters(self.config) * self.n * self.num_steps

    def __call__(self) -> float:
        return seconds(lambda: [self._step() for _ in range(self.num_steps)])

    @torch.inference_mode()
    def _step(self) -> None:
        for states, weight in self.products:
            product(states, weight)


def repeated(ask: Callable[[], float], rounds: int, unit: float) -> dict[str, Any]:
    ask()
    return spread([ask() / unit for _ in range(rounds)])


def measure(args: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    square = SquareProduct(dtype, args.largest)
    found = repeated(square, args.rounds, 1e9)
    results = [{"what": "square product", "dtype": dtype, "side": square.side, "gflops": found}]
    print(f"{dtype}: {square.side} × {square.side} products {shown(found)} GFLOP/s")
    for size in args.sizes:
        config = config_of(size)
        num_steps = math.ceil(1e9 / (2 * matrix_parameters(config) * args.sequences))
        products = DecodeProducts(config, args.sequences, num_steps, dtype)
        rate = repeated(lambda products=products: products.flops() / products(), args.rounds, 1e9)
        results.append({"what": "decode step", "dtype": dtype, "size": size, "n": args.sequences, "gflops": rate})
        share = rounded(rate["median"] / found["median"])
        print(
            f"{dtype}: decode step of {args.sequences} sequences at {size} {shown(rate)} GFLOP/s, {share:.0%} of that"
        )
    return results


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--sizes", nargs="+", choices=SHAPES, default=["1M", "10M", "100M"])
    options.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    options.add_argument("--sequences", type=int, default=64, help="of the decode step")
    options.add_argument("--largest", type=int, default=LARGEST, help="side of the square product")
    options.add_argument("--copied", type=int, default=256, help="MiB")
    args = options.parse_args(argv)
    with reported("bounds", args, argv) as said:
        copied = repeated(Copy(args.copied), args.rounds, 1e9)
        said["results"].append({"what": "copy", "gigabytes_per_s": copied})
        print(f"copy: {shown(copied, 1)} GB/s, reads and writes together")
        for dtype in args.dtypes:
            said["results"] += measure(args, dtype)


if __name__ == "__main__":
    main()
