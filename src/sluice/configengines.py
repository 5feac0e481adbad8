"""The sections of the config that say what generates."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from sluice.configbase import DottedPath, NonNegativeFloat, NonNegativeInt, Section


class EmbeddedEngine(Section):
    name: Literal["embedded"] = "embedded"
    """Generates by itself, with the trainer's own weights or a copy of them."""
    process: Literal["trainer", "own"] = "trainer"
    """Where it generates. trainer: in the trainer's process, in turn with it. own: in a process of its own with its own copy of the
    weights, beside it; so rollout.max_staleness may be above 0."""
    replicas: PositiveInt = 1
    """Engines, each in a process of its own with its own copy of the weights, between which requests are shared out."""
    num_threads: PositiveInt | None = None
    """CPU threads of each process of its own; left out, these have half of the cores together."""
    on_new_weights: Literal["continue", "finish"] = "continue"
    """What becomes of completions that are unfinished when weights are published. continue: later tokens are by the new ones.
    finish: they end with those that they began with, and the publication waits for them."""
    publication: Literal["shared_memory", "broadcast", "disk"] = "shared_memory"
    """How weights reach its own process. shared_memory: through memory of this machine. broadcast: by NCCL or gloo, in buckets, without a
    copy in between. disk: as a model folder."""
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
                f"engine.publication_folder has no effect with engine.publication={self.publication}; leave it out, or set "
                "engine.publication=disk"
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
