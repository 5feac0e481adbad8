"""Decoding for models built like a llama (Llama, Qwen 2 and 3, Mistral): far fewer operations than the model's own forward.

A small model's decode step is bound by the number of operations, not by what they compute. So queries, keys and values come
from one matrix product, gate and up from another, residuals are added by the products that follow them, a rotation is one
complex product (the elements of a head lie in pairs, where the model keeps them in halves), and attention reads the cache
where it lies. The copy of the weights is made anew whenever weights are published.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
        """Whether a fused kernel attends, as far as there is one."""
        half = torch.arange(self.head_dim, device=model.device).view(2, -1)
        self.key_order = half.t().flatten()
        """Pairs (i, i + half): what a rotation turns together lies together."""
        self.layers = [self._packed(layer, i) for i, layer in enumerate(self.body.layers)]
        self.largest_product = self.layers[0].gate_up.weight.numel()
        self.span_cost = self.kv_heads / _POSITIONS_PER_SPAN
        self.angles = torch.empty(0, self.head_dim // 2, dtype=torch.complex64, device=model.device)
        self.refresh()

    def _packed(self, layer: Any, index: int) -> _Layer:
        """Room for a layer's copy."""
        a, m = layer.self_attn, layer.mlp
        rows = sum(p.weight.shape[0] for p in (a.q_proj, a.k_proj, a.v_proj))
        kinds = getattr(self.model.config, "layer_types", None)
        window = getattr(self.model.config, "sliding_window", None)
        new = a.q_proj.weight.detach().new_empty
        return _Layer(
            source=layer,
            window=window if kinds is None or kinds[index] == "sliding_attention" else None,
            qkv=Product(new(rows, a.q_proj.weight.shape[1]), self.threads),
            qkv_bias=None if a.q_proj.bias is None else new(rows),
            qk_norm=new(self.heads + self.kv_heads, self.head_dim) if hasattr(a, "q_norm") else None,
            out=self._product(a.o_proj.weight.detach()),
            gate_up=Product(new(2 * m.gate_proj.weight.shape[0], m.gate_proj.weight.shape[1]), self.threads),
            down=self._product(m.down_proj.weight.detach()),
        )

    def _product(self, weight: Tensor) -> Product:
        """By a weight as the model has it: by the model's own, or where it is put in order anyway, by a copy, so that all that is
        decoded with has the age of the last `refresh`."""
        return Product(torch.empty_like(weight) if is_ordered(weight) else weight, self.threads)

    @torch.no_grad()
    def refresh(self) -> None:
        for layer in self.layers:
            for target, parts in self._parts(layer):
                for part, (_, weight, is_rotated) in zip(target, parts, strict=True):
                    part.copy_(self._in_pairs(weight) if is_rotated else weight)
            for product in (layer.qkv, layer.out, layer.gate_up, layer.down):
                product.refresh()

    def _parts(self, layer: _Layer) -> Iterator[tuple[Any, list[tuple[str, Tensor, bool]]]]:
        """What lies where in the copies: (views of one copy, the model's name and weight for each, whether it is rotated)."""
        a, m = layer.source.self_attn, layer.source.mlp
        sizes = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        kinds = [("self_attn.q_proj", True), ("self_attn.k_proj", True), ("self_attn.v_proj", False)]
        projections = (a.q_proj, a.k_proj, a.v_proj)
        named = [(f"{n}.weight", p.weight, r) for (n, r), p in zip(kinds, projections, strict=True)]
        yield layer.qkv.weight.split(sizes), named
        if layer.qkv_bias is not None:
            named = [(f"{n}.bias", p.bias, r) for (n, r), p in zip(kinds, projections, strict=True)]
            yield layer.qkv_bias.split(sizes), named
        if layer.qk_norm is not None:
            views = layer.qk_norm.split([self.heads, self.kv_heads])
            named = [
                ("self_attn.q_norm.weight", a.q_norm.weight, True),
                ("self_attn.k_norm.weight", a.k_norm.weight, True),
            ]
            yield views, named
        named = [("mlp.gate_proj.weight", m.gate_proj.weight, False), ("mlp.up_proj.weight", m.up_proj.weight, False)]
        yield layer.gate_up.weight.chunk(2), named
        if is_ordered(a.o_proj.weight):
            yield [layer.out.weight], [("self_attn.o_proj.weight", a.o_proj.weight, False)]
            yield [layer.down.weight], [("mlp.down_proj.weight", m.down_proj.weight, False)]

    def _in_pairs(self, weight: Tensor) -> Tensor:
        """A weight, a bias or a norm whose first dimension is (heads ×) head size, with each head's elements in pairs."""
        return weight.unflatten(0, (-1, self.head_dim))[:, self.key_order].reshape(weight.shape)

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        weights = dict(self.model.named_weights())
        names = {id(weight): name for name, weight in weights.items()}
        for layer in self.layers:
            for target, parts in self._parts(layer):
                for part, (_, weight, _) in zip(target, parts, strict=True):
                    if part.shape == weight.shape:  # the norm of a head stands once for each
                        weights[names[id(weight)]] = part
        return weights.items()

    # -- one token for each sequence --

    def hidden(self, tokens: Tensor, positions: Tensor, cache: SlotCache, spans: list[Span]) -> Tensor:
        n = len(tokens)
        if cache.capacity > len(self.angles):
            self.angles = self._angles(cache.capacity)
        angles = self.angles[positions][:, None]
        rows = torch.arange(n, device=tokens.device)
        attention = _Kernel(positions, cache, self.scaling) if self.by_token else _Products(self, positions, spans)
        x: Tensor = self.body.embed_tokens(tokens)
        for index, layer in enumerate(self.layers):
            queries, keys, values = self._projected(layer, x, angles)
            cache.write(index, rows, positions, keys, values)
            seen = attention(queries, cache.keys[index], cache.values[index], layer.window)
            x = layer.out.added_to(x, seen)
            x = self._through_mlp(layer, x)
        return rms_norm(x, self.body.norm.weight, self.eps)

    def _projected(self, layer: _Layer, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[n, H] → rotated queries [n, heads, d] and keys [n, kv heads, d], and values."""
        norm = layer.source.input_layernorm
        qkv = layer.qkv(rms_norm(x, norm.weight, self.eps), layer.qkv_bias)
        qkv = qkv.view(len(x), self.heads + 2 * self.kv_heads, self.head_dim)
        qk, values = qkv.split([self.heads + self.kv_heads, self.kv_heads], 1)
        if layer.qk_norm is not None:
            qk = rms_norm(qk, layer.qk_norm, self.eps)
        pairs = torch.view_as_complex(qk.float().unflatten(-1, (-1, 2)))
        qk = torch.view_as_real(pairs * angles).flatten(-2).to(x.dtype)
        queries, keys = qk.split([self.heads, self.kv_heads], 1)
        return queries, keys, values

    def _through_mlp(self, layer: _Layer, x: Tensor) -> Tensor:
        norm = layer.source.post_attention_layernorm
        gate, up = layer.gate_up(rms_norm(x, norm.weight, self.eps)).chunk(2, 1)
        return layer.down.added_to(x, F.silu(gate).mul_(up))

    def _angles(self, length: int) -> Tensor:
        """[length, d / 2] by which a position turns each pair, as complex numbers."""
        like = torch.empty(1, device=self.model.device)
        cos, sin = self.body.rotary_emb(like, torch.arange(length, device=self.model.device)[None])
        half = self.head_dim // 2
        return torch.complex(cos[0, :, :half], sin[0, :, :half])


_POSITIONS_PER_SPAN = 1500
"""Cached positions (of one sequence and key head) that take as long as the operations of one more span: 30 µs on a CPU."""
_SMALL_PRODUCTS = 8
"""How much longer a multiplication takes in attention, whose products are many and small, than in a large one."""


class _Products:
    """Attention of one step by batched products, span by span."""

    def __init__(self, decoder: PackedDecoder, positions: Tensor, spans: list[Span]) -> None:
        self.decoder, self.positions, self.spans = decoder, positions, spans
        self.masks: dict[int | None, list[Tensor]] = {}

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """[n, heads, d], the cache of the layer → [n, heads · d]."""
        if window not in self.masks:
            self.masks[window] = [self._mask(span, window, queries.dtype) for span in self.spans]
        seen = [
            self._attended(queries[span.start : span.stop], keys, values, span, mask)
            for span, mask in zip(self.spans, self.masks[window], strict=True)
        ]
        return seen[0] if len(seen) == 1 else torch.cat(seen)

    def _attended(self, queries: Tensor, keys: Tensor, values: Tensor, span: Span, mask: Tensor) -> Tensor:
        """Query heads that share a key head are the rows of one product."""
        d, n = self.decoder, len(queries)
        q = queries.reshape(n * d.kv_heads, -1, d.head_dim)
        k = keys[span.start : span.stop, :, :, : span.length].flatten(0, 1)
        v = values[span.start : span.stop, :, : span.length].flatten(0, 1)
        with d.threads.work(_SMALL_PRODUCTS * 2 * n * d.heads * span.length * d.head_dim):
            scores = torch.baddbmm(mask, q, k, alpha=d.scaling)
            return torch.bmm(torch.softmax(scores, -1, torch.float32).to(v.dtype), v).view(n, -1)

    def _mask(self, span: Span, window: int | None, dtype: torch.dtype) -> Tensor:
        """[n · kv heads, 1, length]: 0 where a cached position is seen, -inf where not."""
        at = self.positions[span.start : span.stop, None]
        keys = torch.arange(span.length, device=at.device)
        hidden = keys > at
        if window is not None:
            hidden |= keys <= at - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=at.device).masked_fill_(hidden, -torch.inf)
        return mask.repeat_interleave(self.decoder.kv_heads, 0)[:, None]


class _Kernel:
    """Attention of one step by the FlashAttention kernel that torch brings, which reads of each slot what is used of it."""

    def __init__(self, positions: Tensor, cache: SlotCache, scaling: float) -> None:
        n, device = len(positions), positions.device
        self.scaling, self.capacity = scaling, cache.capacity
        self.lengths = (positions + 1).int()
        self.queries_at = torch.arange(n + 1, dtype=torch.int32, device=device)
        self.slots_at = self.queries_at * self.capacity

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        # the operator itself: torch's function around it takes lengths in later versions only
        seen: Tensor = torch.ops.aten._flash_attention_forward(
            queries,
            keys.permute(0, 3, 1, 2).flatten(0, 1),
            values.permute(0, 2, 1, 3).flatten(0, 1),
            self.queries_at,
            self.slots_at,
            1,
            self.capacity,
            0.0,
            False,
            False,
            scale=self.scaling,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
            seqused_k=self.lengths,
        )[0]
        return seen.flatten(1)


def rms_norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension; on a CPU in fewer operations than `F.rms_norm` makes of it."""
    if x.is_cuda:
        shared = weight if weight.dim() == 1 else None
        normed = F.rms_norm(x, x.shape[-1:], shared, eps.item())
        return normed if shared is not None else normed.mul_(weight)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    inverse = torch.addcmul(eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return (x * inverse).to(x.dtype).mul_(weight)
