"""What both sides of `step.py` are told, and how long their responses are. Needs no sluice."""

from __future__ import annotations

import argparse

from shapes import response_lengths


def options(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="JSONL with the column prompt")
    parser.add_argument("--prompts", type=int, required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--longest", type=int, required=True)
    parser.add_argument("--rl-like", action="store_true", help="lengths; without it all are the longest")
    parser.add_argument("--dtype", required=True)
    return parser


def lengths_of(step: int, args: argparse.Namespace) -> list[int]:
    """Of the samples of a step: the same for both sides."""
    num = args.prompts * args.samples
    return response_lengths(num, args.longest, seed=step) if args.rl_like else [args.longest] * num
