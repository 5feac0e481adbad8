"""The seams of a run. Whatever has these methods can stand in; nothing needs to be inherited."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from sluice.types import Completion, Group, Message, Prompt, Sample, Sampling, Trajectory, Turn

if TYPE_CHECKING:
    import torch

    from sluice.tracking.metrics import Metrics


class Weights(Protocol):
    """A handle to the trainer's weights, not a copy of them; an engine asks for them in the way that suits it."""

    @property
    def model(self) -> Any:
        """The live model, where the trainer has it as a whole in this process; else None."""
        ...

    async def copy_to(self, shared: SharedMemory) -> None:
        """Into memory of this machine that the engine sees too."""
        ...

    async def save(self, folder: str, *, adapter: bool = False) -> None:
        """Into a folder that `transformers` loads, weights and `config.json`; or only its `adapter`, which peft loads."""
        ...

    async def fingerprint(self, version: int) -> str:
        """Of those that were published as this version. Raises WeightsMoved as `broadcast`."""
        ...

    async def broadcast(self, address: Any, version: int) -> None:
        """To the process of an engine that waits at an address (`sluice.weights.group.Address`), with a `Sender` of the process
        that has the weights. Raises WeightsMoved when there were updates since the handle was made; makes later ones wait."""
        ...


class SharedMemory(Protocol):
    """Room for named tensors that other processes of this machine see."""

    fd: int
    """Its file descriptor: a process that inherits it sees the same numbers."""

    def write(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None: ...


class LanguageModel(Protocol):
    """A causal language model as hidden states and a head; what the trainer and the embedded engine share."""

    device: torch.device
    dtype: torch.dtype
    max_length: int
    config: Any
    """Of `transformers`."""
    body: Any
    """The module below the head."""
    head: Any
    """The linear output layer."""
    routers: Any
    """Of a mixture of experts, where what they choose is to be reported, else None: `chosen()` tells it of the last forward,
    [T, `num_chosen`]."""

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        visible: torch.Tensor | None = None,
        cache: Any = None,
    ) -> torch.Tensor:
        """[B, L] ids and positions → [B, L, H]; `visible` [B, L, K] says who may look at whom, all before it if left out."""
        ...

    def head_weight(self) -> torch.Tensor:
        """What `logits` multiplies by."""
        ...

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """[T, H] → [T, V] in FP32, whatever the weights' dtype; `weight` is `head_weight()`, asked for once by who calls often."""
        ...

    def named_weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Every weight that it computes with, once, under the name that `transformers` gives it: a parameter of the model, or what
        adapters make of it, and the buffers of its checkpoints."""
        ...

    def named_modules(self) -> Iterable[tuple[str, Any]]:
        """Its parts by those names."""
        ...

    def load_weights(self, folder: str) -> None:
        """Those of a model folder, into the tensors that are there."""
        ...


class Engine(Protocol):
    """Turns prompts into completions."""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion: ...

    async def update_weights(self, weights: Weights, version: int) -> int:
        """Returns when every later token is made by these weights: how many bytes were moved for that, 0 in the trainer's process."""
        ...

    async def unfinished(self) -> dict[int, Completion]:
        """By the seed of its sampling, what every completion that is being made has so far, with the finish reason `abort`: for
        checkpoints. May leave out what it cannot tell."""
        ...

    def status(self) -> str:
        """What it does at the moment, for people: asked from another thread when the state of the run is wanted."""
        ...

    async def fingerprint(self) -> str | None:
        """Of the weights that it decodes with, by its own reading and not from what it was told; None without weights."""
        ...

    async def close(self) -> None: ...


Layout = Literal["rows", "packed"]
"""How samples are put before a model: side by side and padded, or one after the other."""

TrainerOutput = Literal["old_logprobs", "ref_logprobs", "values"]
"""What a trainer can say of samples before it updates on them: a field of theirs."""


class Trainer(Protocol):
    """Turns batches into updates."""

    async def forward(self, samples: Sequence[Sample], output: TrainerOutput, layout: Layout | None = None) -> None:
        """Fill the field `output` of the samples: by the policy's, the reference's or the critic's weights as they are.

        In the trainer's own layout, if none is given."""
        ...

    async def forward_backward(self, minibatch: Any, loss: Callable[..., Any] | None) -> Metrics:
        """Without a loss only the critic learns."""
        ...

    async def optim_step(self) -> Metrics: ...

    async def update_reference(self) -> None:
        """From now on the policy as it is now is the reference."""
        ...

    def weights(self) -> Weights: ...

    async def fingerprint(self) -> str | None:
        """Of the policy's weights as they are; None without weights."""
        ...

    def snapshot(self) -> Callable[[str], dict[str, Any]]:
        """Copy the state. What is returned writes the weights into a folder that `transformers` loads and gives the rest of
        the state (numbers, texts, tensors); it may be called from another thread, while training goes on."""
        ...

    def restore(self, folder: str, state: dict[str, Any]) -> None:
        """Go on, to the last bit, where a snapshot was taken; `folder` and `state` are what it wrote and gave."""
        ...

    def status(self) -> str:
        """What it is, for people: asked from another thread when the state of the run is wanted."""
        ...

    async def close(self) -> None: ...


class Policy(Protocol):
    """What an environment talks to."""

    turns: list[Turn]
    """Every exchange so far; `respond` records them itself."""

    async def respond(self, messages: Sequence[Message]) -> Message: ...


class Environment(Protocol):
    """Plays one attempt at a prompt: any agent loop can be written in it."""

    async def __call__(self, prompt: Prompt, policy: Policy) -> Trajectory: ...


class Reward(Protocol):
    """Scores one attempt; this is all that most users write. Parts are named floats that are summed and logged."""

    def __call__(self, prompt: Prompt, trajectory: Trajectory) -> float | dict[str, float]: ...


class Tracker(Protocol):
    """Takes what a run reports."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def log_groups(
        self, step: int, groups: Sequence[Group], samples: Sequence[Sample], fingerprint: str | None = None
    ) -> None:
        """`fingerprint` is that of the weights after the step; None when there was no update, or there are no weights.

        Called in a thread of its own, while events of the next step may come.
        """
        ...

    def event(self, kind: str, message: str, **details: Any) -> None:
        """May come from any thread."""
        ...

    def close(self) -> None: ...
