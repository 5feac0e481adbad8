"""From a config to an engine that is a server: vLLM or SGLang."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice.config import TrainConfig
from sluice.configengines import ServerEngine, SpeculativeSection, VllmEngine
from sluice.data.chat import Chat
from sluice.launch.checked import window_of
from sluice.launch.models import engine_threads

if TYPE_CHECKING:
    from sluice.engines.server import Dialect
    from sluice.engines.server import ServerEngine as Engine
    from sluice.trainers.model import PolicyModel


def server_engine(config: TrainConfig, settings: ServerEngine, model: PolicyModel, chat: Chat) -> Engine:
    from sluice.engines.server import ServerEngine as Engine
    from sluice.weights.folders import PublishedFolders

    window = window_of(config, model.max_length)
    return Engine(
        _dialect(config, settings, window),
        url=settings.url,
        decode=chat.decode,
        vocab_size=model.config.vocab_size,
        max_model_len=window,
        folders=PublishedFolders(settings.weights_folder),
        finish_limit_s=config.rollout.timeout_s if settings.on_new_weights == "finish" else None,
        start_limit_s=settings.start_limit_s,
        max_restarts=settings.max_restarts,
    )


def _dialect(config: TrainConfig, settings: ServerEngine, window: int) -> Dialect:
    assert isinstance(settings, VllmEngine)
    from sluice.engines.vllm import Vllm, VllmServer

    server = settings.python and VllmServer(
        python=settings.python,
        model=config.model.path,
        dtype=config.model.dtype,
        max_model_len=window,
        max_num_seqs=settings.num_slots,
        top_k=config.rollout.top_k,
        num_threads=engine_threads(settings),
        cache_gb=settings.cache_gb,
        tensor_parallel=settings.tensor_parallel,
        memory_fraction=settings.memory_fraction,
        quantization=settings.quantization,
        speculative=settings.speculative and _drafting(settings.speculative),
        can_sleep=settings.sleep,
        compiles=settings.compile,
        arguments=settings.arguments,
    )
    return Vllm(server or None, settings.repetition and settings.repetition.model_dump())


def _drafting(settings: SpeculativeSection) -> dict[str, str | int]:
    path = {"model": settings.path} if settings.path else {}
    return {"method": settings.method, "num_speculative_tokens": settings.num_tokens, **path}
