"""Time and peak memory of the FP32 head with its loss and gradient: sluice's beside the plain way and beside Liger's.

`ours` is CISPO, whose tokens are apart; `ours_coupled` computes the logits twice, as GSPO makes it do; both measure the
entropies. `plain` is logits, log-softmax, gather, entropies and autograd. `liger` is LigerFusedLinearGRPOLoss with its defaults,
where it can be imported; it measures no entropies.

All have the same loss and gradients, which is checked first. Peaks are of a process for each, over what it held before; times are
of runs in turn in one process. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sluice  # noqa: F401  before torch: sets GOMP_SPINCOUNT

# isort: split
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from measuring import parser, ratios, reported, rounded, seconds, shown, skip, spread, versions
from sluice.algorithms import LossOutput, policy_loss, resolve
from sluice.data.batch import MicroBatch, Packing, make_minibatch
from sluice.trainers.logprobs import head_backward
from sluice.trainers.model import PolicyModel
from sluice.trainers.optim import Optimizer, OptimizerSettings
from sluice.types import Sample

CISPO = resolve("cispo")
TEMPERATURE = 0.9


@dataclass
class Problem:
    """Sequences of one length; the state before each token and the head's weight are what has a gradient."""

    model: PolicyModel
    optimizer: Optimizer
    states: Tensor  # [T, H]
    batch: MicroBatch
    num_sequences: int

    def take_gradients(self) -> list[Tensor]:
        """Of the last run; the next begins without them."""
        gradients = [tensor.grad for tensor in (self.states, self.model.head.weight)]
        self.states.grad = self.model.head.weight.grad = None
        return [gradient for gradient in gradients if gradient is not None]


def make_problem(tokens: int, vocab_size: int, hidden_size: int, length: int) -> Problem:
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 8}
    config = Qwen3Config(
        vocab_size=vocab_size, hidden_size=hidden_size, tie_word_embeddings=False, pad_token_id=0, **shape
    )
    model = PolicyModel(Qwen3ForCausalLM(config))
    settings = OptimizerSettings(1e-6, 0, "constant", 0.0, (0.9, 0.95), 1e-15, 0.0, 1.0)
    samples = []
    for i in range(tokens // length):
        ids = [0, *torch.randint(vocab_size, (length,)).tolist()]
        advantage = float(torch.randn(()))
        sample = Sample(ids, [0.0] + [1.0] * length, [0.0] * (length + 1), [0] * (length + 1), TEMPERATURE, i, 0)
        sample.advantages = [advantage] * (length + 1)
        sample.old_logprobs = (-12 + 2 * torch.randn(length + 1)).tolist()
        samples.append(sample)
    batch = make_minibatch(samples, Packing(1, 2 * tokens, "packed"), CISPO, 0).micro_batches[0]
    states = torch.randn(len(batch.target_ids), hidden_size, requires_grad=True)
    return Problem(model, Optimizer(model.model, settings, 1), states, batch, len(samples))


def loss_of(logprobs: Tensor, entropies: Tensor, batch: MicroBatch) -> LossOutput:
    columns = batch.old_logprobs, batch.advantages, batch.loss_weights, batch.sequence_ids
    return policy_loss(CISPO, logprobs, *columns, coefficients=batch.coefficients)


def ours(problem: Problem, couples_tokens: bool = False) -> Tensor:
    output = head_backward(
        problem.model,
        problem.states,
        problem.batch,
        loss_of,
        problem.optimizer.gradient_of,
        couples_tokens=couples_tokens,
        entropy_gradient=False,
    )
    problem.states.backward(output.hidden_gradient)
    return output.loss.loss


def ours_coupled(problem: Problem) -> Tensor:
    return ours(problem, couples_tokens=True)


def plain(problem: Problem) -> Tensor:
    batch = problem.batch
    logits = torch.nn.functional.linear(problem.states, problem.model.head.weight) / batch.temperatures[:, None]
    logp = torch.log_softmax(logits, -1)
    del logits
    with torch.no_grad():
        entropies = -(logp.exp() * logp).sum(-1)
    loss = loss_of(logp.gather(1, batch.target_ids[:, None])[:, 0], entropies, batch).loss
    loss.backward()
    return loss.detach()


def liger(problem: Problem) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # pyright: ignore[reportMissingImports]

    batch, n = problem.batch, problem.num_sequences
    # not compiled: that would be the loss of [T] numbers only, and needs a C++ compiler
    fused = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, epsilon_high=5.0, loss_type="cispo", temperature=TEMPERATURE
    )
    loss, _ = fused(
        problem.states.view(n, -1, problem.states.shape[1]),
        problem.model.head.weight,
        batch.target_ids.view(n, -1),
        torch.ones(n, len(batch.target_ids) // n),
        batch.advantages.view(n, -1)[:, 0],
        old_per_token_logps=batch.old_logprobs.view(n, -1),
    )
    loss.backward()
    return loss.detach()


SIDES: dict[str, Callable[[Problem], Tensor]] = {
    "ours": ours,
    "ours_coupled": ours_coupled,
    "plain": plain,
    "liger": liger,
}


def sides_that_run(said: dict[str, Any]) -> list[str]:
    """Those that can be imported and agree with the plain way on a small problem."""
    problem, found = make_problem(32, 512, 64, 8), []
    expected = [plain(problem), *problem.take_gradients()]
    for name, side in SIDES.items():
        try:
            actual = [side(problem), *problem.take_gradients()]
        except ImportError as error:
            skip(said, f"{name} ({error})")
            continue
        for mine, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        found.append(name)
    return found


def peak_bytes(side: str, shape: list[int]) -> int:
    """What one run adds to the largest size that this process has had. It may have had no other run of this shape."""
    problem = make_problem(*shape)
    SIDES[side](make_problem(8, 64, shape[2], 8))  # libraries are loaded, threads are started
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    SIDES[side](problem)
    return unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def peaks_of(sides: list[str], shape: list[int]) -> dict[str, int]:
    """To be asked before this process grows: a child begins with the largest size that its parent has had."""
    found = {}
    for side in sides:
        command = [sys.executable, __file__, "--peak-of", side, "--shape", *map(str, shape)]
        found[side] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def measure(sides: list[str], shape: list[int], rounds: int) -> list[dict[str, Any]]:
    peaks = peaks_of(sides, shape)
    problem = make_problem(*shape)
    times: dict[str, list[float]] = {side: [] for side in sides}
    # in turn, so that a machine that slows down slows all; to and fro: each has the heap of another
    for number in range(rounds + 1):
        for side in sides if number % 2 else reversed(sides):
            taken = seconds(lambda side=side: SIDES[side](problem))
            problem.take_gradients()
            if number:  # the first one is for warming up
                times[side].append(taken)
    return [
        {
            "side": side,
            "seconds": spread(taken),
            "seconds_over_plain": ratios(taken, times["plain"]),
            "peak_mib": rounded(peaks[side] / 2**20),
            "peak_over_plain": rounded(peaks[side] / max(1, peaks["plain"])),
        }
        for side, taken in times.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=8192)
    options.add_argument("--vocabulary", type=int, default=152_000)
    options.add_argument("--hidden", type=int, default=256)
    options.add_argument("--length", type=int, default=512, help="of each sequence; Liger takes one at a time")
    options.add_argument("--peak-of", choices=SIDES, help=argparse.SUPPRESS)
    options.add_argument("--shape", type=int, nargs=4, help=argparse.SUPPRESS)
    args = options.parse_args(argv)
    if args.peak_of:
        print(peak_bytes(args.peak_of, args.shape))
        return
    with reported("head", args, argv) as said:
        said["versions"] |= versions(["liger_kernel"])
        shape = [args.tokens, args.vocabulary, args.hidden, args.length]
        said["results"] = measure(sides_that_run(said), shape, args.rounds)
        for found in said["results"]:
            print(
                f"{found['side']}: {shown(found['seconds'], 3)} s, {shown(found['seconds_over_plain'], 2)} of the plain way's; "
                f"{found['peak_mib']:,.0f} MiB, {found['peak_over_plain']:.1%} of the plain way's"
            )


if __name__ == "__main__":
    main()
