"""The trainer of one process and one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sluice.algorithms.aggregation import Totals
from sluice.algorithms.losses import LossOutput
from sluice.data.batch import MicroBatch, Minibatch, Packing, collate, under_budget
from sluice.errors import NonFiniteError
from sluice.tracking.metrics import Mean, Metrics
from sluice.trainers.logprobs import token_logprobs
from sluice.trainers.model import PolicyModel, packed_visible
from sluice.trainers.optim import Optimizer
from sluice.types import Sample
from sluice.weights.in_process import InProcessWeights

Loss = Callable[[torch.Tensor, MicroBatch, Totals], LossOutput]
"""(log-probs [T], micro-batch, the update's counts) → loss of the micro-batch."""


class LocalTrainer:
    def __init__(self, model: PolicyModel, tokenizer: Any, optimizer: Optimizer, packing: Packing) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.optimizer = optimizer
        self.packing = packing

    async def recompute_logprobs(self, samples: Sequence[Sample]) -> None:
        """Fill `old_logprobs` with the log-probs under the weights as they are now."""
        for part in under_budget(samples, self.packing):
            micro_batch = collate(part, self.packing.layout)
            with torch.no_grad():  # as a decorator it would end before an async function's body begins
                logprobs, _ = self._logprobs(micro_batch.to(self.model.device))
            for sample, values in zip(part, micro_batch.spread(logprobs, 0.0), strict=True):
                sample.old_logprobs = values

    async def forward_backward(self, minibatch: Minibatch, loss: Loss) -> Metrics:
        """Add the gradient of one update's loss, micro-batch by micro-batch, and note in its samples what each token saw.

        Raises NonFiniteError before a backward that would spoil the gradients.
        """
        metrics = Metrics()
        total = torch.zeros((), device=self.model.device)
        for micro_batch in minibatch.micro_batches:
            on_device = micro_batch.to(self.model.device)
            logprobs, entropies = self._logprobs(on_device)
            output = loss(logprobs, on_device, minibatch.totals)
            if not torch.isfinite(output.loss):
                names = ", ".join(sample.name for sample in micro_batch.samples[:4])
                raise NonFiniteError(
                    f"loss is {float(output.loss.detach())} at update {minibatch.index} of the step, in a micro-batch of "
                    f"{len(micro_batch.samples)} samples ({names} …); the update was refused"
                )
            output.loss.backward()
            self.optimizer.collect_gradients()
            micro_batch.record(minibatch.index, logprobs.detach(), output.ratios, output.clipped)
            metrics += output.metrics
            metrics += Metrics({"train/entropy": Mean(entropies.sum(), len(entropies))})
            total += output.loss.detach()
        metrics["train/loss"] = Mean(total)
        return metrics

    async def optim_step(self) -> Metrics:
        return self.optimizer.step()

    def weights(self) -> InProcessWeights:
        return InProcessWeights(self.model)

    def save(self, folder: str) -> None:
        """Model and tokeniser as `transformers` loads them. Raises NonFiniteError for weights that are no numbers."""
        for name, parameter in self.model.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NonFiniteError(f"{name} holds weights that are not finite; lower trainer.learning_rate")
        self.model.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _logprobs(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        visible = None if batch.document_ids is None else packed_visible(batch.document_ids, batch.position_ids)
        hidden = self.model.hidden_states(batch.input_ids, batch.position_ids, visible)
        chosen = hidden.flatten(0, 1)[batch.hidden_index]
        return token_logprobs(self.model, chosen, batch.target_ids, batch.temperatures)
