"""TRL's trainers without model, data or engine: their own methods, on an object that has only what these methods read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer

from parity.ragged import Measured, Ragged


def bare(trainer: type, batch: Ragged, **settings: Any) -> Any:
    """One process and one micro-batch; `settings` replace what is set here."""
    self = object.__new__(trainer)
    arguments = {
        "delta": None,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing_kwargs": None,
        "per_device_train_batch_size": len(batch.mask),
        "sapo_temperature_neg": 1.05,
        "sapo_temperature_pos": 1.0,
        "steps_per_generation": 1,
        "use_bias_correction_kl": False,
    }
    attributes = {
        "accelerator": SimpleNamespace(
            device=torch.device("cpu"), num_processes=1, process_index=0, sync_gradients=True, gather=same, reduce=same
        ),
        "args": SimpleNamespace(**{k: settings.pop(k, v) for k, v in arguments.items()}),
        "aux_loss_enabled": False,
        "beta": 0.0,
        "current_gradient_accumulation_steps": 1,
        "entropy_coef": 0.0,
        "environment_factories": None,
        "environments": [],
        "epsilon_high": 0.2,
        "epsilon_low": 0.2,
        "importance_sampling_level": "token",
        "log_multimodal": False,
        "loss_type": "grpo",
        "mask_truncated_completions": False,
        "max_completion_length": 48,
        "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
        "multi_objective_aggregation": "sum_then_normalize",
        "normalize_advantages": False,
        "num_generations": len(batch.mask),
        "num_iterations": 1,
        "off_policy_mask_threshold": None,
        "pad_to_multiple_of": None,
        "ref_model": "the reference",
        "reward_clip_range": None,
        "reward_func_names": ["reward"],
        "reward_funcs": ["reward"],
        "reward_weights": torch.ones(1, dtype=batch.mask.dtype),
        "scale_rewards": "group",
        "tools": [],
        "top_entropy_quantile": 1.0,
        "use_adaptive_entropy": False,
        "use_vllm": True,
        "vllm_importance_sampling_clip_max": 3.0,
        "vllm_importance_sampling_clip_min": None,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "token_truncate",
        "_logs": defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_pending_extra_logs": {},
        "_pending_metrics": {},
        "_tokenizer": SimpleNamespace(pad_token_id=0),
    } | settings
    attributes["_entropy_bonus_enabled"] = attributes["entropy_coef"] != 0.0
    self.__dict__.update(attributes)
    return self


def same(x: Tensor, **_: Any) -> Tensor:
    """What one process gathers or reduces."""
    return x


def logprobs_by_model(**of: Tensor) -> Callable[..., tuple[Tensor, Tensor | None, None]]:
    """In place of a forward pass of the policy or of the reference."""

    def given(model: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None, None]:
        return of["reference" if model == "the reference" else "policy"], of.get("entropies"), None

    return given


def trl_loss(batch: Ragged, weights: Tensor | None = None, **settings: Any) -> Measured:
    """`importance_sampling_ratio` multiplies each token's loss, so the gradient to it is the loss that each token contributes."""
    self = bare(GRPOTrainer, batch, **settings)
    logprobs = batch.logprobs.clone().requires_grad_()
    weights = (torch.ones_like(logprobs) if weights is None else weights).clone().requires_grad_()
    self._get_per_token_logps_and_entropies = logprobs_by_model(policy=logprobs, entropies=batch.entropies)
    inputs = {
        "prompt_ids": torch.zeros(len(batch.mask), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(batch.mask), 1, dtype=torch.int64),
        "completion_ids": torch.zeros_like(batch.mask, dtype=torch.int64),
        "completion_mask": batch.present.to(batch.mask.dtype),
        "tool_mask": batch.mask,
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old_logprobs,
        "ref_per_token_logps": batch.ref_logprobs,
        "importance_sampling_ratio": weights,
        "num_items_in_batch": batch.mask.sum(),
    }
    loss = self._compute_loss(None, inputs)
    gradient, per_weight = torch.autograd.grad(loss, [logprobs, weights])
    return Measured(loss.detach(), gradient, per_weight * weights.detach())


def trl_rloo_loss(batch: Ragged, advantages: Tensor) -> Measured:
    """`advantages` [N]."""
    self = bare(RLOOTrainer, batch)
    logprobs = batch.logprobs.clone().requires_grad_()
    self._get_per_token_logps_and_entropies = logprobs_by_model(policy=logprobs, entropies=batch.entropies)
    inputs = {
        "prompt_ids": torch.zeros(len(batch.mask), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(batch.mask), 1, dtype=torch.int64),
        "completion_ids": torch.zeros_like(batch.mask, dtype=torch.int64),
        "completion_mask": batch.mask,
        "advantages": advantages,
        "old_logps": (batch.old_logprobs * batch.mask).sum(-1),
    }
    loss = self._compute_loss(None, inputs)
    return Measured(loss.detach(), torch.autograd.grad(loss, logprobs)[0])


def trl_rollout(trainer: type, batch: Ragged, **settings: Any) -> dict[str, Tensor]:
    """What the trainer makes of completions, rewards and log-probs: `advantages` [N], `importance_sampling_ratio` …"""
    self = bare(trainer, batch, **settings)
    num, lengths = len(batch.mask), batch.present.sum(-1).tolist()
    ids = [[1] * length for length in lengths]
    generated = ([[1]] * num, ids)
    if trainer is GRPOTrainer:
        tool_mask = [m[:n].tolist() for m, n in zip(batch.mask, lengths, strict=True)]
        engine = [x[:n].tolist() for x, n in zip(batch.engine_logprobs, lengths, strict=True)]
        self._generate = lambda _: (*generated, tool_mask, [""] * num, engine, {}, None, [])
    else:
        self._generate = lambda _: (*generated, [""] * num)
    self._calculate_rewards = lambda *_: batch.rewards[:, None].clone()
    self._get_per_token_logps_and_entropies = logprobs_by_model(policy=batch.old_logprobs, reference=batch.ref_logprobs)
    return self._generate_and_score_completions([{"prompt": ""}] * num)
