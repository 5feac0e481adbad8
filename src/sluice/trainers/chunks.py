"""How much head and attention take at once. Needs no torch: `sluice check` foretells from it how much memory a run wants."""

from __future__ import annotations

CHUNK_TOKENS = 512
"""At least so many. Each chunk reads the head's weight [V, H] twice and reads and writes its gradient: 16 · V · H bytes beside
6 · tokens · V · H FLOPs, so that with 512 tokens a machine is held up by it only if it does over 190 FLOPs while it moves one
byte. A CPU and a GPU in FP32 do 5 to 20; there the share is 10 % at most."""
GPU_CHUNK_TOKENS = 2048
"""The same where matrix units do some 200 FLOPs while a byte moves."""
CHUNK_ELEMENTS = 2**20
"""More of them while the logits are as few as this, 4 MiB: beyond the cache, logits of a small vocabulary cost more than the
products that they come from."""
SHORT_ATTENTION = 128
"""Keys up to which attention in FP32 is two batched products, which keep their weights for the backward: that is faster than the
fused kernel of a CPU, and takes less memory than the states do."""


def chunk_tokens(vocab_size: int, device: str) -> int:
    return max(CHUNK_TOKENS if device == "cpu" else GPU_CHUNK_TOKENS, CHUNK_ELEMENTS // vocab_size)
