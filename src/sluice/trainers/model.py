"""A Hugging Face causal language model as hidden states and an FP32 head: what trainer and embedded engine share."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sluice.cpu import onednn_linear
from sluice.data.batch import MicroBatch
from sluice.data.packing import Piece, pack_row
from sluice.errors import ConfigError, NonFiniteError, boundary
from sluice.trainers.attention import NAME, PackedAttention, register
from sluice.trainers.linears import use_fast_linears
from sluice.trainers.norms import use_own_norms
from sluice.trainers.routing import Routers
from sluice.types import Sample

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_LOADING = threading.Lock()
"""transformers changes its own classes while it loads a model. After two at once some stay changed, and no model made later has a tied head."""


class PolicyModel:
    """Any causal LM of `transformers` whose layers are full or sliding-window attention.

    The head is applied apart from the body, in FP32, and only to the positions that need it.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()  # dropout would make the trainer's log-probs differ from the engine's
        self.body: nn.Module = model.base_model
        self.head: nn.Linear = model.get_output_embeddings()
        self.config = model.config.get_text_config()
        self.device = next(model.parameters()).device
        self.dtype: torch.dtype = model.dtype
        self.max_length: int = getattr(self.config, "max_position_embeddings", None) or 2**31
        self._forward: Any = self.body
        self._recomputed: list[Any] = []
        self.num_heads = (self.config.num_attention_heads, _kv_heads(self.config))
        """Of queries, and of keys and values."""
        self.routers: Routers | None = None
        """Those of a mixture of experts, where what they choose is recorded or replayed."""
        self._own_attention: str = self.config._attn_implementation
        use_own_norms(self.body)
        use_fast_linears(self.body)
        register()
        model.set_attn_implementation(NAME)
        self.eos_ids = _ids(model.generation_config.eos_token_id) | _ids(self.config.eos_token_id)
        if not isinstance(self.head, nn.Linear) or self.body is model:
            raise ConfigError(f"{type(model).__name__} has no body and linear head that sluice can tell apart")

    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        visible: Tensor | None = None,
        cache: Any = None,
        pieces: Sequence[Piece] | None = None,
        experts: Tensor | None = None,
    ) -> Tensor:
        """[B, L] ids and positions → [B, L, H].

        `visible` [B, L, K] says which keys each position may look at; left out, all before it in its row. With a
        `cache` the keys are those at positions 0 … K - 1, else those of the input itself. `pieces` say what a packed row is
        made of, and so who looks at whom. `experts` [B · L, layers · k] are those that the routers take, if they are to be replayed.
        """
        if self.routers:
            self.routers.begin(experts)
        mask: Any = None
        packed: dict[str, Any] = {}
        if pieces is not None:
            packed["packed"] = self._packed_attention(pieces)
            # nobody looks at it, but without one the model would make one of [T, T]
            unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
            mask = self._by_kind(unused, unused)
        elif visible is not None:
            keys = position_ids if cache is None else torch.arange(visible.shape[-1], device=self.device)[None]
            mask = self._masks(visible, position_ids, keys)
        forward = self._training_forward if cache is None and torch.is_grad_enabled() else self.body
        output = forward(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **packed,
        )
        return output.last_hidden_state

    def _packed_attention(self, pieces: Sequence[Piece]) -> PackedAttention:
        return PackedAttention(pieces, *self.num_heads, self.device)

    def replay_routing(self) -> None:
        """From now on it says which experts its routers chose, and takes those that it is given. Raises ConfigError for a model without
        experts, or one whose routers are of another kind."""
        self.routers = Routers(self.body)

    def compile(self) -> None:
        """Forwards that have a backward go through `torch.compile` from now on. Raises ConfigError without a C++ compiler."""
        check_compiler()
        self._forward = torch.compile(self.body, dynamic=True)

    def recompute_activations(self) -> None:
        """From now on a forward keeps the input of each layer only, and the backward computes the rest again.

        Raises ConfigError where the architecture cannot do it.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        if not self.model.supports_gradient_checkpointing:
            raise ConfigError(
                f"trainer.activation_checkpointing: {type(self.model).__name__} cannot do it; leave it out"
            )
        self._recomputed = [m for m in self.body.modules() if isinstance(m, GradientCheckpointingLayer)]
        # by hand, since the method that does it has different names in different versions
        for layer in self._recomputed:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def _training_forward(self, **inputs: Any) -> Any:
        """`transformers` recomputes what is in training mode. Only the layers themselves are, for as long as it takes: the
        dropout inside them stays off."""
        for layer in self._recomputed:
            layer.training = True
        try:
            return self._forward(**inputs)
        finally:
            for layer in self._recomputed:
                layer.training = False

    def head_weight(self) -> Tensor:
        """What `logits` multiplies by: the head in FP32. On a GPU a BF16 head itself: products of two BF16 numbers are exact in FP32,
        in which its matrix units add them up, so the logits are the same up to the order of the sum."""
        weight = self.head.weight.detach()
        return (
            weight if weight.is_cuda and weight.dtype == torch.bfloat16 and self.head.bias is None else weight.float()
        )

    def logits(self, hidden: Tensor, weight: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """[T, H] → [T, V] in FP32, with whatever the architecture does to logits after its head.

        `weight` is `head_weight()`, given by who calls often, so that it is cast once, and perhaps in oneDNN's order, but not with `out` [T, V],
        where they are written then.
        """
        weight = self.head_weight() if weight is None else weight
        if weight.is_mkldnn:
            bias = None if self.head.bias is None else self.head.bias.float()
            logits = onednn_linear(hidden.float(), weight, bias)
        elif weight.dtype != torch.float32:
            logits = torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
        elif self.head.bias is None:
            logits = torch.mm(hidden.float(), weight.T, out=out)
        else:
            logits = torch.addmm(self.head.bias.float(), hidden.float(), weight.T, out=out)
        if scale := getattr(self.config, "logit_scale", None):  # Cohere
            logits.mul_(scale)
        if scaling := getattr(self.config, "logits_scaling", None):  # Granite
            logits.div_(scaling)
        if cap := getattr(self.config, "final_logit_softcapping", None):  # Gemma 2
            logits.div_(cap).tanh_().mul_(cap)
        return logits

    def logits_slope(self, logits: Tensor) -> Tensor | float | None:
        """The derivative of [T, V] `logits` by what the head itself gave, from their values: one number, or [T, V] where they are
        capped; None where the architecture does nothing to them."""
        scale, scaling = getattr(self.config, "logit_scale", None), getattr(self.config, "logits_scaling", None)
        slope = (scale or 1.0) / (scaling or 1.0) if scale or scaling else None
        if cap := getattr(self.config, "final_logit_softcapping", None):
            return (logits / cap).square_().neg_().add_(1.0).mul_(slope or 1.0)
        return slope

    def _masks(self, visible: Tensor, queries: Tensor, keys: Tensor) -> Any:
        """The attention mask in the form that the model wants: one, or one for each kind of layer."""
        window: Any = getattr(self.config, "sliding_window", None)
        full = visible[:, None]  # for all heads
        if window is None:
            return self._by_kind(full, full)
        return self._by_kind(full, full & (queries[:, None, :, None] - keys[:, None, None, :] < window))

    def _by_kind(self, full: Tensor, sliding: Tensor) -> Any:
        kinds = getattr(self.config, "layer_types", None)
        if kinds is None:
            return sliding
        masks = {"full_attention": full, "sliding_attention": sliding}
        return {kind: masks[kind] for kind in set(kinds)}

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        return weights_of(self.model)

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        return self.model.named_modules()

    @torch.no_grad()
    def take_weights(self, other: PolicyModel) -> None:
        """Of a model of the same architecture."""
        for (_, old), (_, new) in zip(self.named_weights(), other.named_weights(), strict=True):
            old.copy_(new)

    def export(self) -> Callable[[str], None]:
        """Copy the weights to the CPU. What is returned writes them into a folder that `transformers` loads; it may be called from
        another thread, while training goes on. It raises NonFiniteError for weights that are no numbers."""
        weights = copied(self.model.state_dict())
        return lambda folder: self.write(folder, weights)

    def write(self, folder: str, weights: dict[str, Tensor]) -> None:
        check_finite(weights)
        self.model.save_pretrained(folder, state_dict=dict(weights))  # which it empties, also when the disk is full

    def architecture(self) -> dict[str, Any]:
        """All of the config that decides what the weights compute."""
        ignored = {"dtype", "torch_dtype", "transformers_version", "architectures", "use_cache"}
        return {k: v for k, v in self.config.to_dict().items() if not k.startswith("_") and k not in ignored}

    @torch.no_grad()
    def load_weights(self, folder: str) -> None:
        """Take the weights of a model folder of the same architecture: copied into the tensors that are there, so that
        whoever holds these sees them, and so that they lie in memory as before (on it depends the last bit of a product).
        """
        with _LOADING:
            other = type(self.model).from_pretrained(folder, dtype=self.dtype, local_files_only=True)
        for (_, mine), (_, theirs) in zip(weights_of(self.model), weights_of(other), strict=True):
            mine.copy_(theirs)

    @torch.no_grad()
    def check(self) -> None:
        """Compare with the model's own forward, so that an architecture that we do not understand is refused.

        Random sequences, two of which begin alike, apart and packed, against `model(...).logits`. Raises ConfigError.
        """
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(self.config.vocab_size, (n,), generator=generator).tolist() for n in (3, 9, 5, 7)]
        rows.append(rows[1][:4] + rows[3])
        samples = [
            Sample(ids, [0.0] * len(ids), [0.0] * len(ids), [-1] * len(ids), 1.0, 0, i) for i, ids in enumerate(rows)
        ]
        for sample, group in zip(samples, (0, 2, 1, 3, 2), strict=True):
            sample.group = group
        samples.sort(key=lambda sample: sample.group)
        self.model.set_attn_implementation(self._own_attention)
        ids = [torch.tensor([sample.token_ids], device=self.device) for sample in samples]
        expected = torch.cat([self.model(input_ids=row).logits[0].float() for row in ids])
        self.model.set_attn_implementation(NAME)
        positions = torch.arange(max(map(len, rows)), device=self.device)[None]
        apart = torch.cat([self.logits(self.hidden_states(row, positions[:, : row.shape[1]])[0]) for row in ids])
        row = pack_row(samples)
        where = [torch.arange(p.first_position, p.first_position + p.length) for p in row.pieces]
        packed_ids, packed_positions = torch.tensor([row.token_ids]), torch.cat(where)[None]
        hidden = self.hidden_states(packed_ids.to(self.device), packed_positions.to(self.device), pieces=row.pieces)
        together = self.logits(hidden[0, torch.from_numpy(np.concatenate(row.places)).to(self.device)])
        tolerance = (1e-3 if self.dtype == torch.float32 else 0.1) * max(1.0, float(expected.abs().max()))
        for what, logits in (("FP32 head", apart), ("attention over packed rows", together)):
            error = float((logits - expected).abs().max())
            if not error <= tolerance:
                raise ConfigError(
                    f"{type(self.model).__name__}: with sluice's {what} the logits differ from the model's own by {error:.3g}; "
                    "this architecture is not supported (full and sliding-window attention are)"
                )


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All that a checkpoint holds, once: parameters, and such buffers as the bias by which a router chooses."""
    yield from model.named_parameters()
    held = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in held)


def check_compiler() -> None:
    """Raises ConfigError without one of C++."""
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ConfigError(
            "trainer.compile needs a C++ compiler (g++ or clang++), and none is on the PATH; leave it out"
        )


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Raises NonFiniteError for weights that are no numbers."""
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{name} holds weights that are not finite; lower trainer.learning_rate")


def copied(state: Any) -> Any:
    """A copy of a tree of tensors on the CPU, in which what was one tensor is one again (weights may be tied)."""
    copies: dict[Any, Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            key = (value.data_ptr(), value.shape, value.dtype) if value.numel() else object()
            if key not in copies:
                copies[key] = value.detach().to("cpu", copy=True)
            return copies[key]
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        return [copy(item) for item in value] if isinstance(value, list | tuple) else value

    return copy(state)


def hidden_states_of(model: PolicyModel, batch: MicroBatch) -> Tensor:
    """[T, H] the states from which the batch's loss tokens are predicted."""
    hidden = model.hidden_states(batch.input_ids, batch.position_ids, pieces=batch.pieces, experts=batch.routed_experts)
    return hidden.flatten(0, 1)[batch.hidden_index]


def load_model(
    path: str, *, key: str = "model.path", dtype: str, device: str, random_weights: bool, seed: int
) -> PolicyModel:
    """Load a model folder (local files only), or with `random_weights` only its architecture.

    Raises ConfigError when the folder is not a model, or when its architecture is not supported; `key` is what names the path
    in the config.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = str(Path(path).expanduser())
    config, settings = _known_config(path, key, dtype)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device=cuda, but torch sees no CUDA device; set model.device=auto or cpu")
    target = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    with _LOADING, boundary(ConfigError, f"{key}={path}: transformers cannot load it"):
        if random_weights:
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, **settings)
        else:
            model, info = AutoModelForCausalLM.from_pretrained(
                path, local_files_only=True, trust_remote_code=False, output_loading_info=True, **settings
            )  # pyright: ignore[reportGeneralTypeIssues]
            if missing := sorted(info["missing_keys"]):
                raise ConfigError(
                    f"{key}={path}: {len(missing)} weights are not in the checkpoint, among them {missing[0]}; they "
                    "would be random. Set model.random_weights=true if all of them should be"
                )
    policy = PolicyModel(model.to(torch.device(target)))  # pyright: ignore[reportArgumentType]
    with boundary(ConfigError, f"{key}={path}: this architecture is not supported"):
        policy.check()
    return policy


def load_outline(path: str, *, key: str = "model.path", dtype: str) -> PolicyModel:
    """A model folder's architecture, names and shapes: a model whose weights are on no device. Raises ConfigError."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    with boundary(ConfigError, f"{key}={path}: transformers cannot load it"):
        config, settings = _known_config(path, key, dtype)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **settings)
        if (Path(path).expanduser() / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(str(Path(path).expanduser()))
    return PolicyModel(model)


def _known_config(path: str, key: str, dtype: str) -> tuple[Any, dict[str, Any]]:
    """Of a model folder, and how a model is made from it. Raises ConfigError when there is none, or one of unknown layers."""
    from transformers import AutoConfig

    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{key}={folder}: no model folder there (config.json is missing)")
    with boundary(ConfigError, f"{key}={folder}: transformers cannot load it"):
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    refuse_unknown_layers(f"{key}={folder}", config.get_text_config())
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return config, {"dtype": DTYPES[dtype]} | ({"attn_implementation": "eager"} if capped else {})


def refuse_unknown_layers(where: str, config: Any) -> None:
    """Raises ConfigError for a text model's config with layers of a kind that is not supported."""
    unknown = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ConfigError(
            f"{where}: layers of kind {', '.join(sorted(unknown))} are not supported; "
            "full and sliding-window attention are"
        )


def _kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _ids(value: int | list[int] | None) -> frozenset[int]:
    return frozenset() if value is None else frozenset([value] if isinstance(value, int) else value)
