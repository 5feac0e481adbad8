"""TRL's side of `step.py`: GRPOTrainer with `loss_type="cispo"`, stopped between its steps. Runs in `.venv-peers`.

TRL generates with `model.generate`, which has one limit for a batch. So that a row ends at the length drawn for it, a
logits processor forbids the end-of-sequence token before that length and forces it there; from then on `generate` pads
the row, and TRL masks it, as after any response that ended by itself. Further than that nothing of TRL is changed; some
of its methods are timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from children import Served, StepClock
from digits import share
from measuring import versions
from step_work import lengths_of, options

TIMED = {
    "_generate_single_turn": "generate",
    "_generate_and_score_completions": "rollout",
    "_compute_loss": "loss forward",
    "training_step": "training step",
}


class ForcedLengths(LogitsProcessor):
    """The `end` token comes where a row has its length, and nowhere before."""

    def __init__(self, prompt_length: int, lengths: list[int], end: int) -> None:
        self.last = torch.tensor(lengths) + prompt_length - 1
        self.end = end

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ends = self.last.to(scores.device) == input_ids.shape[1]
        scores[:, self.end] = -torch.inf
        scores[ends] = -torch.inf
        scores[ends, self.end] = 0.0
        return scores


class Split:
    """Seconds in the timed methods since the last time it was asked."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(TIMED.values(), 0.0)
        for name, label in TIMED.items():
            setattr(GRPOTrainer, name, self._timed(getattr(GRPOTrainer, name), label))

    def _timed(self, method: Any, label: str) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[label] += time.perf_counter() - start

        return timed

    def __call__(self, num_steps: int) -> dict[str, float]:
        """Of each of the last steps, in the mean; the optimiser, logging and the data loader are in none of these."""
        mean = {label: total / num_steps for label, total in self.seconds.items()}
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        backward = mean.pop("training step") - mean["rollout"] - mean["loss forward"]
        return {**mean, "backward": backward}


class Clocked(TrainerCallback):
    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.clock()


def force_lengths(model: Any, end: int, args: argparse.Namespace) -> None:
    generate, step = model.generate, 0

    def forced(input_ids: Tensor, **kwargs: Any) -> Any:
        nonlocal step
        processor = ForcedLengths(input_ids.shape[1], lengths_of(step, args), end)
        step += 1
        return generate(input_ids=input_ids, logits_processor=LogitsProcessorList([processor]), **kwargs)

    model.generate = forced


def reward(completions: list[str], **_: Any) -> list[float]:
    return [share(text) for text in completions]


def config_of(args: argparse.Namespace, folder: str) -> GRPOConfig:
    return GRPOConfig(
        output_dir=folder,
        loss_type="cispo",
        epsilon_high=5.0,
        per_device_train_batch_size=args.prompts * args.samples,
        gradient_accumulation_steps=1,
        num_generations=args.samples,
        num_iterations=1,
        max_completion_length=args.longest,
        max_steps=1_000_000,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        beta=0.0,
        temperature=1.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        bf16=args.dtype == "bfloat16",
        gradient_checkpointing=False,
        disable_tqdm=True,
    )


def main() -> None:
    args = options(__doc__).parse_args()
    served = Served()
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    force_lengths(model, tokenizer.eos_token_id, args)
    rows = [json.loads(line) for line in Path(args.data).read_text().splitlines()]
    clock = StepClock(served, {"versions": versions(("trl", "torch", "transformers", "accelerate"))}, Split())
    with tempfile.TemporaryDirectory() as folder:
        GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config_of(args, folder),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clocked(clock)],
        ).train()


if __name__ == "__main__":
    main()
