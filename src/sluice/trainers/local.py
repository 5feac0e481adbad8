"""The trainer of one process and one device."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sluice.algorithms.losses import LossOutput
from sluice.data.batch import MicroBatch, Minibatch, Packing, collate, under_budget
from sluice.errors import ConfigError, NonFiniteError
from sluice.interfaces import Layout, TrainerOutput
from sluice.tracking.metrics import Mean, Metrics, Sum
from sluice.trainers.critic import Critic, raised
from sluice.trainers.logprobs import Loss, head_backward, token_logprobs
from sluice.trainers.model import PolicyModel, copied, hidden_states_of
from sluice.trainers.optim import Optimizer
from sluice.types import Sample
from sluice.weights.fingerprint import fingerprint
from sluice.weights.in_process import InProcessWeights, Updates


class Seen(NamedTuple):
    """What an update saw of the tokens of a micro-batch that bear a loss."""

    logprobs: Tensor  # [T]
    ratios: Tensor  # [T]
    clipped: Tensor  # [T]


class LocalTrainer:
    def __init__(
        self,
        model: PolicyModel,
        tokenizer: Any,
        optimizer: Optimizer,
        packing: Packing,
        *,
        reference: PolicyModel | None = None,
        critic: Critic | None = None,
        couples_tokens: bool = True,
        entropy_gradient: bool = False,
    ) -> None:
        """Of the loss: `couples_tokens` says whether that of a token depends on others of its sequence, `entropy_gradient`
        whether there is an entropy bonus; without one entropies are measured only."""
        self.model = model
        self.tokenizer = tokenizer
        self.optimizer = optimizer
        self.packing = packing
        self.reference = reference
        self.critic = critic
        self.couples_tokens = couples_tokens
        self.entropy_gradient = entropy_gradient
        self.refuse: Callable[[NonFiniteError], None] = raised
        """Called with what is wrong with a loss; one that returns sees the micro-batch go on with a loss of 0."""
        self._policy_has_gradient = False
        self._updates = Updates()
        self.reference_moved = False
        """Whether the reference is another than that of the run's beginning."""
        self._first_reference: str | None = None

    async def forward(self, samples: Sequence[Sample], output: TrainerOutput, layout: Layout | None = None) -> None:
        """Fill the field `output` of the samples with what the weights say now: old_logprobs, ref_logprobs or values.

        All log-probs, the reference's too, are at the sampler's temperature and over the ids that it kept: the KL term is
        between the two policies as they would be sampled, each renormalised over the same ids.
        """
        packing = replace(self.packing, layout=layout or self.packing.layout)
        for part in under_budget(samples, packing):
            micro_batch = collate(part, packing.layout)
            micro_batch.fill(output, self.outputs(micro_batch, output))
            await _let_others_work()

    @torch.no_grad()
    def outputs(self, micro_batch: MicroBatch, output: TrainerOutput) -> Tensor:
        """[T] what the weights say of the tokens that bear a loss."""
        batch = micro_batch.to(self.model.device)
        if output == "values":
            assert self.critic is not None
            return self.critic.values(
                batch, hidden_states_of(self.model, batch) if self.critic.own_model is None else None
            )
        model = self.reference if output == "ref_logprobs" else self.model
        assert model is not None
        return token_logprobs(model, hidden_states_of(model, batch), batch)

    async def forward_backward(self, minibatch: Minibatch, loss: Loss | None) -> Metrics:
        """Add the gradient of one update's loss, micro-batch by micro-batch, and note in its samples what each token saw.

        Without a loss only the critic learns. Raises NonFiniteError, and leaves no gradient of the update behind.
        """
        metrics = Metrics()
        try:
            for micro_batch in minibatch.micro_batches:
                added, seen = self.backward(micro_batch, loss, about(minibatch, micro_batch))
                metrics += added
                if seen:
                    micro_batch.record(minibatch.index, *seen)
                await _let_others_work()
        except NonFiniteError:
            self.drop_gradients()
            raise
        self.keep_gradients(loss)
        return metrics.per_update()

    def backward(self, micro_batch: MicroBatch, loss: Loss | None, where: str) -> tuple[Metrics, Seen | None]:
        """Add the gradient of one micro-batch; what its loss tokens saw, if there is a loss. Raises NonFiniteError, which says `where`."""
        batch = micro_batch.to(self.model.device)
        hidden = self._states(batch, loss)
        metrics = self.model.routers.mismatch() if self.model.routers and hidden is not None else Metrics()
        seen = None
        if loss:
            assert hidden is not None
            added, seen = self._policy_backward(batch, hidden, loss, where)
            metrics += added
        if self.critic:
            metrics += self.critic.forward_backward(batch, hidden, self.refuse)
        return metrics, seen

    def _states(self, batch: MicroBatch, loss: Loss | None) -> Tensor | None:
        """The policy's [T, H], if anybody needs them."""
        if loss is None and (self.critic is None or self.critic.own_model is not None):
            return None
        with torch.set_grad_enabled(loss is not None):  # a head leaves the policy's states as they are
            return hidden_states_of(self.model, batch)

    def _policy_backward(self, batch: MicroBatch, hidden: Tensor, loss: Loss, where: str) -> tuple[Metrics, Seen]:
        def checked(logprobs: Tensor, entropies: Tensor, part: MicroBatch) -> LossOutput:
            output = loss(logprobs, entropies, part)
            if torch.isfinite(output.loss):
                return output
            self.refuse(NonFiniteError(f"loss is {float(output.loss.detach())} at {where}; the update was refused"))
            return replace(output, loss=0.0 * torch.nan_to_num(logprobs).sum())

        logprobs, entropies, output, hidden_gradient = head_backward(
            self.model,
            hidden,
            batch,
            checked,
            self.optimizer.gradient_of,
            couples_tokens=self.couples_tokens,
            entropy_gradient=self.entropy_gradient,
        )
        if hidden.requires_grad:
            hidden.backward(hidden_gradient)
        self.optimizer.collect_gradients()
        own = {"train/entropy": Mean(entropies.sum(), len(entropies)), "train/loss": Sum(output.loss)}
        return output.metrics + own, Seen(logprobs, output.ratios, output.clipped)

    def keep_gradients(self, loss: Loss | None) -> None:
        """They are those of a whole update."""
        self._policy_has_gradient |= loss is not None

    def drop_gradients(self) -> None:
        """Of an update that is refused."""
        self.optimizer.drop_gradients()
        if self.critic:
            self.critic.optimizer.drop_gradients()

    async def optim_step(self) -> Metrics:
        """One update of policy and critic, or of neither: raises NonFiniteError before the first of them moves."""
        policy_norm = self.optimizer.clip() if self._policy_has_gradient else None
        critic_norm = self.critic.optimizer.clip() if self.critic else None
        self._policy_has_gradient = False
        metrics = Metrics()
        if policy_norm is not None:
            async with self._updates.another():
                metrics += self.optimizer.step(policy_norm)
        if self.critic is not None and critic_norm is not None:
            metrics += self.critic.optim_step(critic_norm)
        return metrics

    async def update_reference(self) -> None:
        """From now on the policy as it is now is the reference."""
        assert self.reference is not None
        self.reference.take_weights(self.model)
        self.reference_moved = True

    def weights(self) -> InProcessWeights:
        return InProcessWeights(self.model, self._updates, self._updates.count)

    async def fingerprint(self) -> str:
        return fingerprint(self.model.named_weights())

    def snapshot(self) -> Callable[[str], dict[str, Any]]:
        """Copy weights and optimiser state to the CPU; what is returned writes the weights into a folder that `transformers`
        loads, and gives the rest of the state. It may be called from another thread, while training goes on.

        It raises NonFiniteError for weights that are no numbers.
        """
        write_weights, state = self.model.export(), self._rest_of_state()

        def write(folder: str) -> dict[str, Any]:
            write_weights(folder)
            self.tokenizer.save_pretrained(folder)
            return state

        return write

    def restore(self, folder: str, state: dict[str, Any]) -> None:
        """Go on where a snapshot was taken; `folder` and `state` are what it wrote and gave."""
        self.model.load_weights(folder)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
        if "reference" not in state:
            self.check_reference(state["reference_fingerprint"])
        if "reference" in state:
            assert self.reference is not None
            self.reference.model.load_state_dict(state["reference"])
            self.reference_moved = True

    def status(self) -> str:
        return f"in this process, on {self.model.device}"

    async def close(self) -> None:
        """There is nothing to end."""

    def check_reference(self, recorded: str | None) -> None:
        """Raises ConfigError when the reference is another than recorded."""
        if recorded not in (None, self.reference_fingerprint()):
            raise ConfigError(
                "the reference policy has other weights than when the run began: those of reference.path, or else model.path, were "
                "changed; put them back, or begin a new run"
            )

    def reference_fingerprint(self) -> str | None:
        """Of the reference as the run began, as long as that is what it is."""
        if self.reference is None or self.reference_moved:
            return None
        self._first_reference = self._first_reference or fingerprint(self.reference.named_weights())
        return self._first_reference

    def _rest_of_state(self) -> dict[str, Any]:
        """All but the policy's weights; the reference's only if they are no longer those of its folder."""
        state: dict[str, Any] = {"optimizer": copied(self.optimizer.state_dict())}
        if self.critic is not None:
            state["critic"] = copied(self.critic.state_dict())
        state["reference_fingerprint"] = self.reference_fingerprint()
        if self.reference is not None and self.reference_moved:
            state["reference"] = copied(self.reference.model.state_dict())
        return state


def about(minibatch: Minibatch, micro_batch: MicroBatch) -> str:
    """Where a loss arose, for messages."""
    names = ", ".join(sample.name for sample in micro_batch.samples[:4])
    return f"update {minibatch.index} of the step, in a micro-batch of {len(micro_batch.samples)} samples ({names} …)"


_TURNS = 10
"""Of the event loop, in which what an engine beside it has answered becomes the next request."""


async def _let_others_work() -> None:
    for _ in range(_TURNS):
        await asyncio.sleep(0)
