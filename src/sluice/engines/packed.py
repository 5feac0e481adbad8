"""Decoding for models built like a llama (Llama, Qwen 2 and 3, Mistral): far fewer operations than the model's own forward.

A small model's decode step is bound by the number of operations, not by what they compute. So queries, keys and values come
from one matrix product, gate and up from another, residuals are added by the products that follow them, a rotation is one
complex product (the elements of a head lie in pairs, where the model keeps them in halves), and attention reads the cache
where it lies. The copy of the weights is made anew whenever weights are published.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sluice.engines.attention import POSITIONS_PER_SPAN, Attention, Kernel, Products
from sluice.engines.products import Product, is_ordered
from sluice.engines.slots import SlotCache, Span
from sluice.engines.threads import StepThreads
from sluice.interfaces import LanguageModel

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


@dataclass
class _Layer:
    source: Any
    """The model's own layer."""
    window: int | None
    qkv: Product
    qkv_bias: Tensor | None
    qk_norm: Tensor | None  # [query and key heads, head size]
    out: Product
    gate_up: Product
    down: Product


def is_llama_like(model: LanguageModel) -> bool:
    """Whether it has the parts of a llama and no others. What they compute is compared afterwards: see `decoders._agrees`."""
    body: Any = model.body
    config = model.config
    if {name for name, _ in body.named_children()} != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        return False
    if getattr(body.rotary_emb, "rope_type", None) not in ("default", "linear", "llama3", "yarn"):
        return False
    if getattr(config, "hidden_act", None) != "silu" or getattr(config, "mlp_bias", False):
        return False
    return all(
        {name for name, _ in layer.named_children()} == _LAYER
        and {name for name, _ in layer.self_attn.named_children()} in (_ATTENTION, _ATTENTION | _NORMS)
        and {name for name, _ in layer.mlp.named_children()} == _MLP
        and layer.self_attn.o_proj.bias is None
        for layer in body.layers
    )


class PackedDecoder:
    def __init__(self, model: LanguageModel, threads: StepThreads) -> None:
        self.model, self.threads = model, threads
        self.body: Any = model.body
        config: Any = model.config
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        attention = self.body.layers[0].self_attn
        self.head_dim: int = attention.head_dim
        self.scaling: float = attention.scaling
        self.eps = torch.tensor(config.rms_norm_eps)
        self.by_token = (
            model.device.type == "cuda"
            and model.dtype != torch.float32
            and self.head_dim % 8 == 0
            and self.head_dim <= 256
            and torch.cuda.get_device_capability(model.device) >= (8, 0)
        )
        """Whether a kernel attends that wants the cache so."""
        self.fused = fused_kernels() if self.by_token else None
        self.multiprocessors = (
            torch.cuda.get_device_properties(model.device).multi_processor_count if self.by_token else 0
        )
        half = torch.arange(self.head_dim, device=model.device).view(2, -1)
        self.key_order = half.t().flatten()
        """Pairs (i, i + half): what a rotation turns together lies together."""
        self._trained = {name for name, weight in model.named_weights() if isinstance(weight, nn.Parameter)}
        self._copies: dict[str, tuple[Tensor, bool]] = {}
        """By the model's name: where the copy of a weight is, and whether it is rotated."""
        prefix = next(n for n, m in model.named_modules() if m is self.body.layers)
        self.layers = [self._packed(layer, i, f"{prefix}.{i}") for i, layer in enumerate(self.body.layers)]
        self.largest_product = self.layers[0].gate_up.weight.numel()
        self.span_cost = self.kv_heads / POSITIONS_PER_SPAN
        self.angles = torch.empty(0, self.head_dim // 2, dtype=torch.complex64, device=model.device)
        self.refresh()

    def _packed(self, layer: Any, index: int, name: str) -> _Layer:
        """Room for the copy of a layer that the model calls so."""
        a, m = layer.self_attn, layer.mlp
        kinds = getattr(self.model.config, "layer_types", None)
        window = getattr(self.model.config, "sliding_window", None)
        sizes = [p.weight.shape[0] for p in (a.q_proj, a.k_proj, a.v_proj)]
        new = a.q_proj.weight.detach().new_empty
        packed = _Layer(
            source=layer,
            window=window if kinds is None or kinds[index] == "sliding_attention" else None,
            qkv=Product(new(sum(sizes), a.q_proj.weight.shape[1]), self.threads),
            qkv_bias=None if a.q_proj.bias is None else new(sum(sizes)),
            qk_norm=new(self.heads + self.kv_heads, self.head_dim) if hasattr(a, "q_norm") else None,
            out=self._product(f"{name}.self_attn.o_proj.weight", a.o_proj.weight.detach()),
            gate_up=Product(new(2 * m.gate_proj.weight.shape[0], m.gate_proj.weight.shape[1]), self.threads),
            down=self._product(f"{name}.mlp.down_proj.weight", m.down_proj.weight.detach()),
        )
        qkv = [f"{name}.self_attn.{kind}_proj" for kind in "qkv"]
        for kind, whole in (("weight", packed.qkv.weight), ("bias", packed.qkv_bias)):
            if whole is not None:
                views = zip(qkv, whole.split(sizes), (True, True, False), strict=True)
                self._copies |= {f"{projection}.{kind}": (view, rotated) for projection, view, rotated in views}
        if packed.qk_norm is not None:
            queries, keys = packed.qk_norm.split([self.heads, self.kv_heads])
            self._copies[f"{name}.self_attn.q_norm.weight"] = queries, True
            self._copies[f"{name}.self_attn.k_norm.weight"] = keys, True
        gate, up = packed.gate_up.weight.chunk(2)
        self._copies |= {f"{name}.mlp.gate_proj.weight": (gate, False), f"{name}.mlp.up_proj.weight": (up, False)}
        return packed

    def _product(self, name: str, weight: Tensor) -> Product:
        """By a weight as the model has it: by the model's own, or where it is put in order anyway, or is only computed from what is
        trained, by a copy, so that all that is decoded with has the age of the last `refresh`."""
        if name in self._trained and not is_ordered(weight):
            return Product(weight, self.threads)
        copy = torch.empty_like(weight)
        self._copies[name] = copy, False
        return Product(copy, self.threads)

    @torch.no_grad()
    def refresh(self) -> None:
        for name, weight in self.model.named_weights():
            if name in self._copies:
                copy, is_rotated = self._copies[name]
                copy.copy_(self._in_pairs(weight) if is_rotated else weight)
        for layer in self.layers:
            for product in (layer.qkv, layer.out, layer.gate_up, layer.down):
                product.refresh()

    def _in_pairs(self, weight: Tensor) -> Tensor:
        """A weight, a bias or a norm whose first dimension is (heads ×) head size, with each head's elements in pairs."""
        return weight.unflatten(0, (-1, self.head_dim))[:, self.key_order].reshape(weight.shape)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.model.named_weights():
            copy, _ = self._copies.get(name, (weight, False))
            yield name, copy if copy.shape == weight.shape else weight  # the norm of a head stands once for each

    # -- one token for each sequence --

    def hidden(self, tokens: Tensor, positions: Tensor, cache: SlotCache, spans: list[Span]) -> Tensor:
        n = len(tokens)
        if cache.capacity > len(self.angles):
            self.angles = self._angles(cache.capacity)
        angles = self.angles[positions][:, None]
        rows = torch.arange(n, device=tokens.device)
        attention = self._attention(positions, cache.capacity, spans)
        x: Tensor = self.body.embed_tokens(tokens)
        for index, layer in enumerate(self.layers):
            qkv = self._projected(layer, x)
            if self.fused is None:
                queries, keys, values = self._turned(layer, qkv, angles)
                cache.write(index, rows, positions, keys, values)
            else:
                here = cache.keys[index], cache.values[index]
                queries = self.fused.turn_and_write(qkv, layer.qk_norm, angles, positions, *here, self.eps.item())
            seen = attention(queries, cache.keys[index], cache.values[index], layer.window)
            x = layer.out.added_to(x, seen)
            x = self._through_mlp(layer, x)
        return rms_norm(x, self.body.norm.weight, self.eps)

    def _attention(self, positions: Tensor, capacity: int, spans: list[Span]) -> Attention:
        if not self.by_token:
            return Products(positions, spans, self.kv_heads, self.scaling, self.threads)
        if self.fused is not None and len(positions) * self.kv_heads >= self.multiprocessors:
            return partial(self.fused.attend, positions, self.scaling)
        return Kernel(positions, capacity, self.scaling)  # it cuts the keys of few sequences into parts, too

    def _projected(self, layer: _Layer, x: Tensor) -> Tensor:
        """[n, H] → queries, keys and values, [n, heads + 2 · kv heads, d]."""
        norm = layer.source.input_layernorm
        qkv = layer.qkv(rms_norm(x, norm.weight, self.eps), layer.qkv_bias)
        return qkv.view(len(x), self.heads + 2 * self.kv_heads, self.head_dim)

    def _turned(self, layer: _Layer, qkv: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [n, heads, d] and keys [n, kv heads, d], and values."""
        qk, values = qkv.split([self.heads + self.kv_heads, self.kv_heads], 1)
        if layer.qk_norm is not None:
            qk = rms_norm(qk, layer.qk_norm, self.eps)
        pairs = torch.view_as_complex(qk.float().view(*qk.shape[:2], -1, 2))
        qk = torch.view_as_real(pairs * angles).view(qk.shape).to(qkv.dtype)
        queries, keys = qk.split([self.heads, self.kv_heads], 1)
        return queries, keys, values

    def _through_mlp(self, layer: _Layer, x: Tensor) -> Tensor:
        norm = layer.source.post_attention_layernorm
        gate_up = layer.gate_up(rms_norm(x, norm.weight, self.eps))
        if self.fused is not None:
            return layer.down.added_to(x, self.fused.silu_product(gate_up))
        gate, up = gate_up.chunk(2, 1)
        return layer.down.added_to(x, F.silu(gate).mul_(up))

    def _angles(self, length: int) -> Tensor:
        """[length, d / 2] by which a position turns each pair, as complex numbers."""
        like = torch.empty(1, device=self.model.device)
        cos, sin = self.body.rotary_emb(like, torch.arange(length, device=self.model.device)[None])
        half = self.head_dim // 2
        return torch.complex(cos[0, :, :half], sin[0, :, :half])


def fused_kernels() -> Any:
    """The module of them, or None where they cannot be built: torch for CUDA brings Triton along on Linux, which wants a C compiler
    and Python's headers."""
    if find_spec("triton") is None:
        return None
    from sluice.engines import fused

    try:
        fused.silu_product(torch.zeros(1, 2, device="cuda"))
    except Exception as error:
        warnings.warn(f"decoding is slower than it could be: Triton cannot build kernels here ({error})", stacklevel=2)
        return None
    return fused


def rms_norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension; on a CPU in fewer operations than `F.rms_norm` makes of it."""
    if x.is_cuda:
        shared = weight if weight.dim() == 1 else None
        normed = F.rms_norm(x, x.shape[-1:], shared, eps.item())
        return normed if shared is not None else normed.mul_(weight)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    inverse = torch.addcmul(eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return (x * inverse).to(x.dtype).mul_(weight)
