"""From a config to an engine that is a server: vLLM or SGLang."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sluice.config import DryTrainer, TrainConfig
from sluice.configengines import LORA_RANKS, ServerEngine, SglangEngine, VllmEngine
from sluice.data.chat import Chat
from sluice.errors import ConfigError
from sluice.launch.checked import check_heads, window_of
from sluice.launch.cores import engine_threads
from sluice.launch.models import publication_afar
from sluice.processes import address_towards

if TYPE_CHECKING:
    from sluice.engines.dialect import Dialect
    from sluice.engines.routed import Routed
    from sluice.engines.router import Router
    from sluice.launch.placing import Placement
    from sluice.trainers.model import PolicyModel


def servers(
    config: TrainConfig, settings: ServerEngine, model: PolicyModel, chat: Chat, placement: Placement
) -> Router:
    """One server, or several of the same kind, each with its own copy of the weights."""
    from sluice.engines.router import Router
    from sluice.engines.server import ServerEngine as Engine

    check_heads(config, *model.num_heads)
    rollout, window = config.rollout, window_of(config, model.max_length)
    host = _host_for(settings.url) if settings.url else placement.host
    publication = publication_afar(config, model, host)
    engines = [
        Engine(
            _dialect(config, settings, model, window, k),
            publication,
            name=f"engine-{k}" if settings.replicas > 1 else "engine",
            url=settings.url,
            decode=chat.decode,
            vocab_size=model.config.vocab_size,
            max_model_len=window,
            finish_limit_s=rollout.timeout_s if settings.on_new_weights == "finish" else None,
            start_limit_s=settings.start_limit_s,
            hang_timeout_s=settings.hang_timeout_s,
            launch=placement.engine(k),
        )
        for k in range(settings.replicas)
    ]
    synchronous = rollout.max_staleness == 0
    return Router(engines, synchronous=synchronous, max_restarts=settings.max_restarts, group_size=rollout.group_size)


def _host_for(url: str) -> str:
    """This machine's address, as a server sees it."""
    host = urlsplit(url).hostname
    assert host  # the config wants one
    try:
        return address_towards(host)
    except OSError as error:
        raise ConfigError(f"engine.url={url}: there is no way to {host} ({error})") from None


def _dialect(config: TrainConfig, settings: ServerEngine, model: PolicyModel, window: int, k: int) -> Dialect:
    """Of the k-th replica."""
    from sluice.engines.routed import Routed

    routed = None
    if model.routers:
        routers = model.routers
        routed = Routed(model.config.num_hidden_layers, routers.layers, routers.top_k, routers.num_experts)
    of_each = settings.tensor_parallel
    shared: dict[str, Any] = {
        "python": settings.python,
        "model": config.model.path,
        "architecture": type(model.model).__name__,
        "dtype": config.model.dtype,
        "max_model_len": window,
        "max_num_seqs": settings.num_slots,
        "num_threads": engine_threads(config),
        "tensor_parallel": settings.tensor_parallel,
        "memory_fraction": settings.memory_fraction,
        "quantization": settings.quantization,
        "can_sleep": settings.sleep,
        "reports_experts": routed is not None,
        "gpus": settings.gpus[k * of_each : (k + 1) * of_each],
        "arguments": settings.arguments,
    }
    if isinstance(settings, SglangEngine):
        return _sglang(settings, shared, routed)
    assert isinstance(settings, VllmEngine)
    from sluice.engines.vllm import Vllm, VllmServer

    if settings.url:
        return Vllm(None, _repetition(settings), routed, adapter=config.publishes_adapters())
    server = VllmServer(
        **shared,
        top_k=config.rollout.top_k,
        # Ray counts cores, and does not say which are whose
        first_thread=k * engine_threads(config) if config.placement.name == "local" else None,
        cache_gb=settings.cache_gb,
        lora_rank=_lora_rank(config),
        speculative=_drafting(settings),
        compiles=settings.compile,
    )
    return Vllm(server, _repetition(settings), routed, adapter=config.publishes_adapters())


def _sglang(settings: SglangEngine, shared: dict[str, Any], routed: Routed | None) -> Dialect:
    from sluice.engines.sglang import Sglang, SglangServer

    if settings.url:
        return Sglang(None, settings.deterministic, routed)
    server = SglangServer(
        **shared,
        speculative=settings.speculative,
        draft_tokens=settings.draft_tokens,
        draft_path=settings.draft_path,
        deterministic=settings.deterministic,
    )
    return Sglang(server, settings.deterministic, routed)


def _drafting(settings: VllmEngine) -> dict[str, str | int] | None:
    if settings.speculative is None:
        return None
    path = {"model": settings.draft_path} if settings.draft_path else {}
    return {"method": settings.speculative, "num_speculative_tokens": settings.draft_tokens, **path}


def _lora_rank(config: TrainConfig) -> int | None:
    """For which vLLM is to make room, if it takes adapters."""
    if not config.publishes_adapters():
        return None
    assert not isinstance(config.trainer, DryTrainer)
    wanted = config.trainer.lora_rank
    assert wanted is not None  # the config wants one
    return next(rank for rank in LORA_RANKS if rank >= wanted)


def _repetition(settings: VllmEngine) -> dict[str, int] | None:
    if settings.max_repetitions is None:
        return None
    return {"max_pattern_size": settings.repetition_tokens, "min_count": settings.max_repetitions}
