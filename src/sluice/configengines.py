"""The sections of the config that say what generates."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from sluice.configbase import DottedPath, Fraction, NonNegativeFloat, NonNegativeInt, NumProcesses, NumThreads, Section


class EmbeddedEngine(Section):
    name: Literal["embedded"] = "embedded"
    """Generates by itself, with the trainer's own weights or a copy of them."""
    process: Literal["trainer", "own"] = "trainer"
    """Where it generates. trainer: in the trainer's process, in turn with it. own: in a process of its own with its own copy of the
    weights, beside it; so rollout.max_staleness may be above 0."""
    replicas: NumProcesses = 1
    """Engines, each in a process of its own with its own copy of the weights, between which requests are shared out."""
    num_threads: NumThreads | None = None
    """CPU threads of each process of its own; left out, these have half of the cores together."""
    on_new_weights: Literal["continue", "finish"] = "continue"
    """What becomes of completions that are unfinished when weights are published. continue: later tokens are by the new ones.
    finish: they end with those that they began with, and the publication waits for them."""
    publication: Literal["shared_memory", "broadcast", "disk"] | None = None
    """How weights reach its own process. shared_memory: through memory of this machine. broadcast: by NCCL between GPUs, by memory of the GPU
    that both are on, else by gloo; in buckets, without a copy in between. disk: as a model folder. Left out, shared_memory, or broadcast
    with placement.name=ray."""
    publication_folder: str | None = None
    """Where publication=disk puts that folder; left out, `weights` in the run folder."""
    max_restarts: NonNegativeInt = 3
    """Times in a run that a process of its own is started again after it died. One that dies once more is given up, and the run ends
    when none is left."""
    hang_timeout_s: PositiveFloat = 300.0
    """A process of its own that gives no sign of life for so long, or gets none of its work done, is killed and started again. Long
    prompts, and the first steps on a GPU, may take minutes."""
    num_slots: PositiveInt = 256
    """Completions decoded at once; a finished one's slot is taken at once."""
    max_model_len: PositiveInt | None = None
    """Longest prompt + completion; left out, the model's own limit."""
    prefill_tokens: PositiveInt = 8192
    """Prompt tokens computed at once."""
    cache_gb: PositiveFloat | None = None
    """Bound of the key-value cache in 10⁹ bytes; left out, half of what is free on a GPU, and none on the CPU. One sequence may pass
    it. Where it holds fewer than are to be decoded at once, some are put off and computed again: slower, and the same samples."""

    def check_process(self, max_staleness: int) -> None:
        """Raises ValueError for what cannot work together, and for what would have no effect."""
        if self.process == "trainer":
            if max_staleness > 0:
                raise ValueError(
                    f"rollout.max_staleness={max_staleness} cannot work with engine.process=trainer: the engine generates with the "
                    "trainer's own weights, so nothing can be sampled while they change; set engine.process=own, or "
                    "rollout.max_staleness=0"
                )
            for name in (
                "replicas",
                "num_threads",
                "on_new_weights",
                "publication",
                "publication_folder",
                "max_restarts",
                "hang_timeout_s",
            ):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"engine.{name} has no effect with engine.process=trainer; leave it out, or set engine.process=own"
                    )
        elif self.publication_folder is not None and self.publication != "disk":
            raise ValueError(
                "engine.publication_folder has no effect without engine.publication=disk; set that, or leave it out"
            )
        elif max_staleness == 0 and self.on_new_weights == "finish":
            raise ValueError(
                "engine.on_new_weights=finish has no effect with rollout.max_staleness=0, where nothing is unfinished when weights "
                "are published; leave it out"
            )


class ScriptedEngine(Section):
    name: Literal["scripted"] = "scripted"
    """Answers from a function instead of a model, to try data, rewards and the loop."""
    script: DottedPath
    """`module:function` with `(prompt_ids, sampling) -> token ids`."""
    max_delay_s: NonNegativeFloat = 0.0
    """Each completion takes a random time up to this."""
    max_model_len: PositiveInt = 4096
    """Longest prompt + completion."""


class ServerEngine(Section):
    """What vLLM and SGLang have in common."""

    package: ClassVar[str]
    """What is installed in its Python."""
    python: str | None = None
    """Python that has the server installed, which is started with it, e.g. `.venv-vllm/bin/python`. Either this or url."""
    url: Annotated[str, Field(pattern=r"^https?://[\w.\-\[\]:]+$")] | None = None
    """`http://host:port` of a server that runs already. What is said of how to start one has then no effect."""
    replicas: NumProcesses = 1
    """Servers, each with its own copy of the weights, between which requests are shared out."""
    publication: Literal["broadcast", "disk"] | None = None
    """How weights reach the server. broadcast: by NCCL between GPUs, by memory of the GPU that trainer and server are both on (vLLM only), else
    by gloo; in buckets, without a copy in between. disk: as a model folder. Left out, disk, or with placement.name=ray broadcast where
    that works and no publication_folder is named."""
    publication_folder: str | None = None
    """Where publication=disk puts that folder, which the server sees under the same path (`/dev/shm` is memory of this machine); left out,
    `weights` in the run folder."""
    on_new_weights: Literal["continue", "finish"] = "continue"
    """What becomes of completions that are unfinished when weights are published. continue: later tokens are by the new ones.
    finish: they end with those that they began with, and the publication waits for them."""
    max_model_len: PositiveInt | None = None
    """Longest prompt + completion; left out, the model's own limit."""
    max_restarts: NonNegativeInt = 3
    """Times in a run that a server is started again, or looked for again, after it was lost. One that is lost once more is given up, and
    the run ends when none is left."""
    hang_timeout_s: PositiveFloat = 300.0
    """A server that does not answer for so long, when what computes in it (while weights change or it sleeps: what listens) is asked
    whether it is well, is killed and started again."""
    start_limit_s: PositiveFloat = 900.0
    """Longest time until a server that is started answers, or one at `url` is there again."""
    num_slots: PositiveInt = 256
    """Completions decoded at once."""
    num_threads: NumThreads | None = None
    """CPU threads of each server; left out, these have half of the cores together."""
    tensor_parallel: PositiveInt = 1
    """GPUs over which each server splits the model."""
    gpus: tuple[NonNegativeInt, ...] = Field(default=(), strict=False)
    """Numbers of the GPUs that servers use, tensor_parallel for each replica in turn; left out, each sees all and takes the first ones."""
    memory_fraction: Fraction | None = None
    """Share of the GPU's memory for weights and key-value cache; left out, the server decides."""
    quantization: Literal["fp8"] | None = None
    """fp8: weights are rounded to 8 bits as they are loaded. Then the trainer's log-probs differ from the engine's."""
    speculative: str | None = None
    """Speculative decoding, by the server's name of the method: several tokens are drafted, and those kept that the policy would have
    drawn. `ngram` drafts from the completion itself; `eagle`, `eagle3`, `mtp` … by a model."""
    draft_tokens: PositiveInt = 3
    """Tokens that speculative decoding drafts at once."""
    draft_path: str | None = None
    """Folder of the model that drafts; left out, the method needs none, or the policy has one in it."""
    sleep: bool = False
    """Whether the server gives the GPU's memory back while the trainer computes, with which it shares the GPU."""
    arguments: tuple[str, ...] = Field(default=(), strict=False)
    """Further words of the server's command line, as they are."""

    @model_validator(mode="after")
    def _fits(self) -> ServerEngine:
        if (self.python is None) == (self.url is None):
            raise ValueError(
                "one of engine.python (the Python that the server is started with) and engine.url (a server that runs) is wanted, "
                "and not both"
            )
        drafting = [key for key in ("draft_tokens", "draft_path") if key in self.changed()]
        if drafting and self.speculative is None:
            raise ValueError(
                f"engine.{drafting[0]} has no effect without engine.speculative; leave it out, or name the method there"
            )
        if self.url:
            of_start = (
                *("replicas", "hang_timeout_s", "num_slots", "num_threads", "tensor_parallel"),
                *("gpus", "memory_fraction", "quantization", "speculative", "sleep", "arguments"),
                *("cache_gb", "compile"),
            )
            if name := next((key for key in of_start if key in self.changed()), None):
                raise ValueError(
                    f"engine.{name} has no effect with engine.url, whose server runs already; give it to that server, and leave it out "
                    "here"
                )
            local = any(f"//{host}" in self.url for host in ("127.0.0.1", "localhost", "[::1]"))
            if not local and self.publication_folder is None and self.publication != "broadcast":
                raise ValueError(
                    f"engine.url={self.url} is another machine; set engine.publication=broadcast, or engine.publication_folder to a folder "
                    "that both see under one path"
                )
        if self.publication_folder is not None and self.publication == "broadcast":
            raise ValueError(
                "engine.publication_folder has no effect with engine.publication=broadcast; leave one of them out"
            )
        if self.gpus and len(self.gpus) != self.replicas * self.tensor_parallel:
            raise ValueError(
                f"engine.gpus names {len(self.gpus)} GPUs, and engine.replicas={self.replicas} servers with engine.tensor_parallel="
                f"{self.tensor_parallel} take {self.replicas * self.tensor_parallel}; name as many"
            )
        return self

    def why_not_broadcast(self, shares_gpus: bool) -> str:
        """What of the config lets weights reach it from a folder only; nothing, if nothing does."""
        return ""

    def check_run(self, max_staleness: int, top_p: float, top_k: int, device: str) -> None:
        """Raises ValueError for what cannot work with the rest of the config."""
        if max_staleness == 0 and self.on_new_weights == "finish":
            raise ValueError(
                "engine.on_new_weights=finish has no effect with rollout.max_staleness=0, where nothing is unfinished when weights "
                "are published; leave it out"
            )
        if self.sleep and max_staleness > 0:
            raise ValueError(
                f"engine.sleep=true cannot work with rollout.max_staleness={max_staleness}: the server would sleep while it is to "
                "sample; leave one of them out"
            )
        if self.sleep and device == "cpu":
            raise ValueError(
                "engine.sleep=true has no effect on the CPU, where the server has no memory to give back; leave it out"
            )


class VllmEngine(ServerEngine):
    package = "vllm"
    name: Literal["vllm"]
    """A vLLM server generates, in an environment of its own; sluice talks to it with the package aiohttp (`pip install aiohttp`)."""
    cache_gb: PositiveInt = 1
    """10⁹ bytes of key-value cache, on the CPU; on a GPU memory_fraction decides."""
    compile: bool = False
    """Whether vLLM compiles the model and captures CUDA graphs: faster, after a minute or more at every start."""
    lora: Literal["merged", "adapter"] = "merged"
    """What is published where trainer.lora_rank is set. merged: the weights that the policy computes with. adapter: the adapter alone, which is
    many times smaller, for a server that has loaded the weights of model.path."""
    max_repetitions: Annotated[int, Field(ge=2)] | None = None
    """A completion that says a pattern so many times in a row is ended, with the finish reason `repetition`; left out, none is."""
    repetition_tokens: PositiveInt = 32
    """Longest pattern of max_repetitions, in tokens."""

    def why_not_broadcast(self, shares_gpus: bool) -> str:
        return "engine.lora=adapter: a server reads an adapter from a folder" if self.lora == "adapter" else ""

    def check_adapter(self, lora_rank: int | None, random_weights: bool) -> None:
        """Raises ValueError for what cannot work with engine.lora=adapter, and for what would have no effect."""
        if self.lora == "merged":
            return
        if lora_rank is None:
            raise ValueError("engine.lora=adapter has no effect without trainer.lora_rank; set that, or leave it out")
        problems = {
            "model.random_weights=true: the server loads the weights under the adapter from model.path": random_weights,
            "engine.sleep=true: a server that sleeps forgets the weights under the adapter": self.sleep,
            f"engine.quantization={self.quantization}: what a server has rounded cannot be compared with the trainer's": self.quantization,
            f"trainer.lora_rank={lora_rank}: vLLM takes {LORA_RANKS[-1]} at most": lora_rank > LORA_RANKS[-1],
        }
        if found := next((what for what, holds in problems.items() if holds), None):
            raise ValueError(f"engine.lora=adapter cannot work with {found}; set engine.lora=merged, or leave that out")

    def check_run(self, max_staleness: int, top_p: float, top_k: int, device: str) -> None:
        super().check_run(max_staleness, top_p, top_k, device)
        if self.max_repetitions is None and "repetition_tokens" in self.changed():
            raise ValueError(
                "engine.repetition_tokens has no effect without engine.max_repetitions; set it, or leave this out"
            )
        if top_p < 1 and not 0 < top_k <= MOST_KEPT:
            raise ValueError(
                f"rollout.top_p={top_p:g} with engine.name=vllm needs rollout.top_k between 1 and {MOST_KEPT}: all log-probs are over the "
                "ids that were kept, and vLLM reports so many at most"
            )
        if top_k > MOST_KEPT:
            raise ValueError(
                f"rollout.top_k={top_k} with engine.name=vllm may be {MOST_KEPT} at most: all log-probs are over the ids that were kept, "
                "and vLLM reports so many at most"
            )


class SglangEngine(ServerEngine):
    package = "sglang"
    name: Literal["sglang"]
    """An SGLang server generates, in an environment of its own; sluice talks to it with the package aiohttp (`pip install aiohttp`)."""
    deterministic: bool = False
    """Whether what a request draws depends on its seed only, for which SGLang takes slower kernels. Without it seeds have no effect."""

    def why_not_broadcast(self, shares_gpus: bool) -> str:
        if self.sleep or shares_gpus:
            where = "engine.sleep=true" if self.sleep else "placement.layout=colocated"
            return f"{where}: trainer and server are on one GPU, and SGLang takes broadcasts by NCCL, which wants two"
        if self.quantization:
            return f"engine.quantization={self.quantization}: SGLang rounds only weights that it reads from a folder"
        return ""

    def check_run(self, max_staleness: int, top_p: float, top_k: int, device: str) -> None:
        super().check_run(max_staleness, top_p, top_k, device)
        if top_p < 1 or top_k > 0:
            raise ValueError(
                "rollout.top_p and rollout.top_k cannot be had with engine.name=sglang: all log-probs are over the ids that were kept, "
                "and SGLang does not say which; leave them out, or set engine.name=vllm"
            )


LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""For which vLLM makes room; an adapter of another rank gets the next room."""
MOST_KEPT = 1024
"""Ids that vLLM is asked to report with each token, at most."""
