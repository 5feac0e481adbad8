"""What one kind of server wants said, and how it says what it did."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from sluice.engines.guard import Command
from sluice.engines.http import HttpClient
from sluice.types import FinishReason, Sampling
from sluice.weights.broadcast import Broadcast, BroadcastLink
from sluice.weights.disk import Disk, DiskLink

STATUS_LIMIT_S = 10.0
POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class ServerSetting:
    """What a server of either kind is started with, most of it as in the config's `engine`."""

    python: str
    model: str
    """Folder with `config.json` and a tokeniser; its weights are not read."""
    architecture: str
    """Class of the model; a config that was never saved with a model does not name it."""
    dtype: str
    max_model_len: int
    max_num_seqs: int
    num_threads: int
    tensor_parallel: int = 1
    memory_fraction: float | None = None
    quantization: str | None = None
    can_sleep: bool = False
    reports_experts: bool = False
    gpus: Sequence[int] = ()
    arguments: Sequence[str] = ()


@dataclass
class Reply:
    """What a server made of one request: as in a `Completion`."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    """`abort`: it gave back what it had, because weights are published."""
    policy_versions: list[int] | None = None
    """None: all by the weights that the server had when it was asked."""
    kept_ids: list[list[int]] = field(default_factory=list[list[int]])
    routed_experts: list[bytes] = field(default_factory=list[bytes])
    """Of all that it was given and made."""


class Dialect(Protocol):
    """All of it raises OSError, HttpError and TimeoutError."""

    name: str

    def command(self, key: str) -> Command:
        """How one is started, with random weights; nobody else is to give it orders than who knows the `key`."""
        ...

    async def check(self, http: HttpClient) -> None:
        """Raises EngineError for a server that cannot serve a run."""
        ...

    async def pass_through(self, http: HttpClient, limit_s: float) -> None:
        """Ask what only the processes that compute can answer, between two of their steps: /health is another's word, who does not see
        that they stand still."""
        ...

    async def generate(self, http: HttpClient, prompt_ids: Sequence[int], sampling: Sampling) -> Reply: ...

    async def pause(self, http: HttpClient) -> None:
        """Returns when nothing is computed any more. What is unfinished is kept, or given back as it is."""
        ...

    def link(self, publication: Disk | Broadcast, engine: str) -> DiskLink | BroadcastLink[Any]:
        """With the server that was checked last."""
        ...

    async def load(self, http: HttpClient, inlet: Any, version: int) -> None:
        """Take over the weights that come through the inlet of that link; the server is paused."""
        ...

    async def resume(self, http: HttpClient) -> None: ...

    async def fingerprint(self, http: HttpClient, published: Callable[[], Awaitable[str]]) -> str:
        """Of its own weights, by its own reading; `published` is that of those which it was given."""
        ...

    async def sleep(self, http: HttpClient) -> None:
        """Give back the device's memory, the weights' too: others are on their way."""
        ...

    async def wake(self, http: HttpClient, what: Literal["weights", "kv_cache"]) -> None:
        """Take the memory of these again."""
        ...
