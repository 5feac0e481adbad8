"""The sequences that are being decoded, one per slot: where each stands, and what it asks for."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from sluice.engines.decoders import Decoder
from sluice.engines.routed import as_entries
from sluice.engines.slots import Prefix, SlotCache, SlotState, Span, spans
from sluice.types import Completion, FinishReason, Sampling

STEPS_BETWEEN_SORTS = 16
"""A sort copies the cache once, which is about what a step reads of it."""


@dataclass(eq=False)
class Request:
    key: bytes
    """The prompt's ids as bytes, whose hash is computed once."""
    prompt: Sequence[int]
    sampling: Sampling
    done: asyncio.Future[Completion]
    kept_ids: list[list[int]] = field(default_factory=list[list[int]])
    """Grows with the tokens while any active request asks for top-p or top-k, and is empty otherwise."""
    versions: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """Of the weights: from which token on, which."""
    prompt_routed: list[bytes] = field(default_factory=list[bytes])
    """The experts that the tokens of the prompt took, where they are noted."""

    def policy_versions(self, count: int) -> list[int]:
        """Of each of the first `count` tokens."""
        ends = [*(first for first, _ in self.versions[1:]), count]
        return [v for (first, v), end in zip(self.versions, ends, strict=True) for _ in range(first, end)][:count]

    def completion(
        self, tokens: Tensor, logprobs: Tensor, reason: FinishReason, routed: Tensor | None = None
    ) -> Completion:
        """Of these tokens ([T] each), the first that it has. `routed` [T, layers · k] are the experts that they took when they were fed
        in, which the last one was not."""
        kept_ids = self.kept_ids[: len(tokens)]
        return Completion(
            token_ids=tokens.tolist(),
            logprobs=logprobs.tolist(),
            finish_reason=reason,
            policy_versions=self.policy_versions(len(tokens)),
            temperature=self.sampling.temperature,
            kept_ids=kept_ids if any(kept_ids) else [],
            routed_experts=[]
            if routed is None
            else [*self.prompt_routed, *as_entries(routed[:-1].cpu().numpy(), len(tokens))],
        )

    def asks(self) -> Iterator[str]:
        """What costs something in every step, and is done only while somebody asks for it."""
        s = self.sampling
        if s.stop:
            yield "stop"
        if s.top_p < 1 or s.top_k > 0:
            yield "truncation"
        if s.temperature == 0:
            yield "greedy"
        elif s.temperature != 1:
            yield "temperature"


class ActiveSlots:
    def __init__(
        self, device: torch.device, vocab_size: int, decoder: Decoder, cache_bytes: int | None, num_routed: int
    ) -> None:
        """`cache_bytes` bounds the cache; a single sequence may pass it. `num_routed` experts are noted of each token."""
        self.device = device
        self.cache_bytes = cache_bytes
        self._position_bytes = 0
        """Of a token in the cache; known from the first prompt on."""
        self.vocab_size = vocab_size
        self.decoder = decoder
        self.cache = SlotCache(decoder.by_token)
        self.state = SlotState(device, num_routed)
        self.requests: list[Request] = []  # by slot
        self.asks: Counter[str] = Counter()
        self._clock = 0
        """Decode steps so far. A sequence's length is a number of its own plus this, so that no step counts them one by one."""
        self._born: list[int] = []  # by slot
        self._limit = 0
        """Length that no sequence so far can pass."""
        self._spans: list[Span] = []
        self._spans_at: int | None = None
        """The clock when the spans were cut; None when sequences have come or gone since."""
        self._sorted_at = 0
        self.arrangement = 0
        """Another number whenever a sequence has come, gone or changed its slot."""
        self._stop_rows: dict[frozenset[int], int] = {}
        self.stop_table = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)

    def __len__(self) -> int:
        return len(self.requests)

    def lengths(self) -> list[int]:
        """Positions that the next step attends over, by slot."""
        return [born + self._clock for born in self._born]

    def room(self, new: list[Request], prefix: Prefix) -> int:
        """Of the `new` requests, in their order, how many the cache has room for beside those that are active."""
        self._position_bytes = prefix.position_bytes + 2 * self.state.num_routed
        fits, longest, limit = 0, max(self.lengths(), default=0), self._limit
        for request in new:
            longest = max(longest, len(request.prompt) + 1)
            limit = max(limit, len(request.prompt) + request.sampling.max_new_tokens)
            if len(self) + fits >= self._slots_of(longest, limit):
                break
            fits += 1
        return fits

    def _slots_of(self, length: int, limit: int) -> int:
        """How many sequences of `length` tokens, which become `limit` at most, the cache may hold."""
        if self.cache_bytes is None:
            return sys.maxsize
        capacity = self.cache.capacity_for(length, limit)
        return max(1, self.cache_bytes // (self._position_bytes * capacity))

    def make_room(self) -> list[Request]:
        """Make room for one more token of each sequence; where that is more than the cache may take, the last ones go. They
        are to be asked again, and since what they draw depends on their seeds only, say the same again."""
        length = max(self.lengths())
        evicted: list[Request] = []
        while len(self) > self._slots_of(length, self._limit):
            evicted.append(self.requests[-1])
            self.free(len(self) - 1)
        self.cache.grow(length, self._limit, min(len(self.state["count"]), self._slots_of(length, self._limit)))
        return evicted

    def note_version(self, version: int) -> None:
        """The tokens from now on are by other weights."""
        if self.requests:
            counts: list[int] = self.state["count"][: len(self)].tolist()
            for request, count in zip(self.requests, counts, strict=True):
                request.versions.append((count, version))

    def place(self, new: list[Request], prefixes: dict[bytes, Prefix], num_slots: int) -> None:
        """Give requests the next slots; `num_slots` is how many there will be before long."""
        first, last = len(self), len(self) + len(new)
        longest = max(len(r.prompt) for r in new) + 1
        self._limit = max(self._limit, *(len(r.prompt) + r.sampling.max_new_tokens for r in new))
        if self.decoder.by_token and self._slots_of(self._limit, self._limit) >= num_slots:
            # at once: a cache that does not grow stays where it is, and so do the graphs that read it
            longest = self._limit
        slots = max(last, min(num_slots, self._slots_of(longest, self._limit)))
        self.cache.reserve(prefixes[new[0].key], slots, longest, self._limit)
        self.state.reserve(slots, max(r.sampling.max_new_tokens for r in new))
        start = first
        for key, same in groupby(new, key=lambda r: r.key):
            end = start + len(list(same))
            self.cache.fill(slice(start, end), prefixes[key])
            start = end
        sampling = [r.sampling for r in new]
        settings = {
            "position": [len(r.prompt) - 1 for r in new],
            "count": [0] * len(new),
            "done": [False] * len(new),
            "stopped": [False] * len(new),
            "limit": [s.max_new_tokens for s in sampling],
            "temperature": [s.temperature or 1.0 for s in sampling],
            "greedy": [s.temperature == 0 for s in sampling],
            "top_p": [s.top_p for s in sampling],
            "top_k": [s.top_k for s in sampling],
            "stop_row": [self._stop_row(s.stop_token_ids) for s in sampling],
        }
        for name, values in settings.items():
            column = self.state[name]
            column[first:last] = torch.tensor(values, dtype=column.dtype, device=column.device)
        draws = torch.zeros(len(new), max(s.max_new_tokens for s in sampling))
        for row, s in zip(draws, sampling, strict=True):
            drawn = torch.rand(s.num_drawn + s.max_new_tokens, generator=torch.Generator().manual_seed(s.seed))
            row[: s.max_new_tokens] = drawn[s.num_drawn :]
        self.state["uniform"][first:last, : draws.shape[1]] = draws.to(self.device)
        for request in new:
            request.prompt_routed = prefixes[request.key].routed_experts
            self.requests.append(request)
            self._born.append(len(request.prompt) + 1 - self._clock)
            self.asks.update(request.asks())
        self._rearranged()

    def _stop_row(self, stop_token_ids: frozenset[int]) -> int:
        """Row of the stop table for this set of ids."""
        if stop_token_ids not in self._stop_rows:
            row = torch.zeros(1, self.vocab_size, dtype=torch.bool, device=self.device)
            row[0, [i for i in stop_token_ids if i < self.vocab_size]] = True
            self._stop_rows[stop_token_ids] = len(self.stop_table)
            self.stop_table = torch.cat([self.stop_table, row])
        return self._stop_rows[stop_token_ids]

    def free(self, slot: int) -> None:
        self.asks.subtract(self.requests[slot].asks())
        last = len(self) - 1
        if slot != last:
            self.cache.move(last, slot, self._born[last] + self._clock - 1)
            self.state.move(last, slot)
            self.requests[slot], self._born[slot] = self.requests[last], self._born[last]
        self.requests.pop()
        self._born.pop()
        self._rearranged()

    def _rearranged(self) -> None:
        self.arrangement += 1
        self._spans_at = None

    def next_step(self) -> list[Span]:
        """Which slots attend over how much in the step that begins."""
        if self._spans_at is None:
            self._cut()
        assert self._spans_at is not None
        grown = self._clock - self._spans_at
        now = [Span(s.start, s.stop, s.length + grown) for s in self._spans]
        self._clock += 1
        return now

    def _cut(self) -> None:
        lengths = self.lengths()
        self._spans = spans(lengths, self.decoder.span_cost)
        work = sum((s.stop - s.start) * s.length for s in self._spans)
        wasteful = work > 1.2 * sum(lengths) and self._clock - self._sorted_at >= STEPS_BETWEEN_SORTS
        if wasteful and self.decoder.span_cost:
            order = sorted(range(len(lengths)), key=lambda slot: -lengths[slot])
            self._sort(order, max(lengths))
            self._spans = spans(self.lengths(), self.decoder.span_cost)
            self._sorted_at = self._clock
        self._spans_at = self._clock

    def _sort(self, order: list[int], longest: int) -> None:
        by_slot = torch.tensor(order, device=self.device)
        self.cache.reorder(by_slot, min(longest, self.cache.capacity))
        self.state.reorder(by_slot)
        self.requests = [self.requests[i] for i in order]
        self._born = [self._born[i] for i in order]
        self._rearranged()

    def text_tokens(self, slot: int, window: int) -> list[int]:
        """The last `window` tokens of a sequence."""
        count = int(self.state["count"][slot])
        return self.state["tokens"][slot, max(0, count - window) : count].tolist()

    def route(self, experts: Tensor) -> None:
        """Note what the token that each sequence ended with took, [n, layers · k]; of one that is done nobody asks."""
        rows = torch.arange(len(experts), device=self.device)
        self.state["routed"][rows, self.state["count"][: len(experts)] - 1] = experts

    def routed(self, slot: int, count: int) -> Tensor | None:
        """[count, layers · k] of a sequence's tokens, where they are noted."""
        return self.state["routed"][slot, :count] if self.state.num_routed else None

    def advance(self, first: int, tokens: Tensor, logprobs: Tensor) -> None:
        """Note one token of each sequence from slot `first` on; those that are done stay as they are."""
        rows, state = slice(first, first + len(tokens)), self.state
        count, done = state["count"][rows], state["done"][rows]
        state["tokens"][rows].scatter_(1, count[:, None], tokens[:, None])
        state["logprobs"][rows].scatter_(1, count[:, None], logprobs[:, None])
        state["last"][rows] = tokens
        alive = ~done
        count += alive  # views: in place
        state["position"][rows] += alive
        stops = self.stop_table[state["stop_row"][rows], tokens] & alive
        state["stopped"][rows] |= stops
        done |= stops | (count >= state["limit"][rows])
