"""Tiny random models of several architectures, for tests that need a real one."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from sluice.trainers.model import PolicyModel

_SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 2,
}

_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ALONE = {name: value for name, value in _SMALL.items() if name != "head_dim"}

MIXTURES = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**_SMALL, **_EXPERTS, norm_topk_prob=True),
    "qwen2_moe": lambda: Qwen2MoeConfig(**_ALONE, **_EXPERTS, shared_expert_intermediate_size=16),
    "olmoe": lambda: OlmoeConfig(**(_ALONE | {"intermediate_size": 16}), num_experts=8, num_experts_per_tok=2),
    "glm4_moe": lambda: Glm4MoeConfig(
        **_SMALL,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
    ),
    "mixtral": lambda: MixtralConfig(**(_ALONE | {"intermediate_size": 16}), num_local_experts=8),
}
"""Of experts: gates that are a softmax over those that were chosen (Qwen 3, Mixtral) or over all, or the sigmoid (GLM 4.5)."""

CONFIGS = MIXTURES | {
    "qwen3": lambda: Qwen3Config(**_SMALL),
    "qwen3_all_heads": lambda: Qwen3Config(**(_SMALL | {"num_key_value_heads": 4})),
    "qwen2": lambda: Qwen2Config(**_SMALL),
    "llama": lambda: LlamaConfig(**_SMALL),
    "mistral_window": lambda: MistralConfig(**_SMALL, sliding_window=6),
    "gemma2": lambda: Gemma2Config(**_SMALL, sliding_window=6, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(
        **(_SMALL | {"num_hidden_layers": 3}),
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=256, eos_token_id=1, bos_token_id=2
    ),
}


def tiny_model(
    architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 4.0, device: str = "cpu"
) -> PolicyModel:
    """A random model whose predictions are not flat: the weights are larger than at initialisation."""
    torch.manual_seed(seed)
    config = CONFIGS[architecture]()
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(scale)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # by which GLM's routers choose
                buffer.uniform_(-0.2, 0.2)
    return PolicyModel(model.to(device))
