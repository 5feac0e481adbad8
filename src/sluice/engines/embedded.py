"""The default engine: generates in process, with the trainer's own weights, on the CPU or one GPU.

Continuous batching: a finished sequence's slot is taken by the next request before the next token. A prompt is
computed once for all requests that share it. One asyncio task drives everything, one token of every active
sequence at a time, and lets other tasks run in between.
"""

from __future__ import annotations

import asyncio
import traceback
from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice

import torch
from torch import Tensor

from sluice.engines.sampling import check_ids, check_room, kept_lists, sample_tokens
from sluice.engines.slots import Prefix, SlotCache, SlotState
from sluice.errors import EngineError
from sluice.hooks import first_line
from sluice.interfaces import LanguageModel, Weights
from sluice.types import Completion, FinishReason, Sampling
from sluice.weights.fingerprint import fingerprint


@dataclass(eq=False)
class _Request:
    key: bytes
    """The prompt's ids as bytes, whose hash is computed once."""
    prompt: Sequence[int]
    sampling: Sampling
    done: asyncio.Future[Completion]
    kept_ids: list[list[int]] = field(default_factory=list[list[int]])
    """Grows with the tokens while any active request asks for top-p or top-k, and is empty otherwise."""


class EmbeddedEngine:
    def __init__(
        self,
        model: LanguageModel,
        decode: Callable[[Sequence[int]], str],
        *,
        vocab_size: int,
        num_slots: int = 256,
        max_model_len: int | None = None,
        prefill_tokens: int = 8192,
    ) -> None:
        """`decode` turns ids into text, for stop strings only."""
        self.model = model
        self.decode = decode
        self.vocab_size = vocab_size
        self.num_slots = num_slots
        self.max_model_len = max_model_len or model.max_length
        self.prefill_tokens = prefill_tokens
        self.version = 0
        self._waiting: deque[_Request] = deque()
        self._active: list[_Request] = []  # by slot
        self._closed = False
        self._wanted: Counter[bytes] = Counter()
        """How many waiting requests want each prompt; its prefix is kept as long as one does."""
        self._prefixes: dict[bytes, Prefix] = {}
        self._reset_slots()
        self._driver: asyncio.Task[None] | None = None
        self._cancelled = False

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """Raises PromptTooLongError when prompt and completion do not fit the window, EngineError when decoding fails.

        What is wrong with one request fails that request; a step that fails as a whole (out of memory) fails all that are
        in flight. The engine can be used again after both. Cancelling the call gives its slot back.
        """
        if self._closed:
            raise EngineError("the engine is closed")
        check_room(prompt_ids, sampling, self.max_model_len)
        check_ids(prompt_ids, self.vocab_size)
        key = array("q", prompt_ids).tobytes()
        self._wanted[key] += 1
        request = _Request(key, prompt_ids, sampling, asyncio.get_running_loop().create_future())
        request.done.add_done_callback(self._note_cancelled)
        self._waiting.append(request)
        if self._driver is None:
            self._driver = asyncio.create_task(self._drive())
        return await request.done

    async def update_weights(self, weights: Weights, version: int) -> None:
        """The weights are the model's own, so nothing is copied; what was computed with the old ones is dropped."""
        if weights.model is not self.model:
            raise EngineError(
                "the embedded engine generates with the trainer's own model, and was given another one's weights"
            )
        if self._active or self._waiting:
            raise EngineError(
                f"weights changed under {len(self._active) + len(self._waiting)} unfinished completions; the embedded "
                "engine is synchronous"
            )
        self.version = version
        self._prefixes.clear()
        self._cache = SlotCache()  # training needs the memory

    async def fingerprint(self) -> str:
        return fingerprint(self.model.named_weights())

    async def close(self) -> None:
        self._closed = True
        if self._driver is not None:
            self._driver.cancel()
        self._fail("the engine was closed")

    def status(self) -> str:
        """What it does at the moment, for people."""
        return (
            f"{len(self._active)} completions are decoded, {len(self._waiting)} wait; weights of version {self.version}"
        )

    # -- the driver --

    def _reset_slots(self) -> None:
        self._cache = SlotCache()
        self._state = SlotState(self.model.device)
        self._stop_rows: dict[frozenset[int], int] = {}
        self._stop_table = torch.zeros(0, self.vocab_size, dtype=torch.bool, device=self.model.device)

    async def _drive(self) -> None:
        try:
            await self._settle()
            while self._waiting or self._active:
                self._step()
                await asyncio.sleep(0)
        except Exception as cause:
            traceback.clear_frames(
                cause.__traceback__
            )  # they hold the tensors of the step, and memory may be what is wanted
            in_flight = len(self._active) + len(self._waiting)
            self._fail(f"decoding failed: {first_line(cause)} ({in_flight} completions were in flight)", cause)
        finally:
            self._driver = None

    async def _settle(self) -> None:
        """Wait until every task that can ask has asked, so that the first batch does not depend on scheduling."""
        quiet = 0
        for _ in range(100):
            seen = len(self._waiting)
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._waiting) == seen else 0
            if quiet == 5:
                return

    def _fail(self, what: str, cause: Exception | None = None) -> None:
        """Fail all requests; what the step left half done is dropped with them."""
        requests = [*self._active, *self._waiting]
        self._active.clear()
        self._waiting.clear()
        self._wanted.clear()
        self._prefixes.clear()
        self._reset_slots()
        for request in requests:
            _fail_request(request, what, cause)

    def _note_cancelled(self, done: asyncio.Future[Completion]) -> None:
        self._cancelled |= done.cancelled()

    @torch.inference_mode()
    def _step(self) -> None:
        """One token for every active sequence, after the free slots have been filled."""
        if self._cancelled:
            self._drop_cancelled()
        self._admit()
        if self._active:
            self._decode()

    def _drop_cancelled(self) -> None:
        self._cancelled = False
        for request in self._waiting:
            if request.done.cancelled():
                self._unwant(request)
        self._waiting = deque(r for r in self._waiting if not r.done.cancelled())
        for slot in reversed(range(len(self._active))):
            if self._active[slot].done.cancelled():
                self._free(slot)

    # -- admission --

    def _admit(self) -> None:
        while self._waiting and len(self._active) < self.num_slots:
            free = self.num_slots - len(self._active)
            new = list(islice(self._waiting, free))
            new.sort(key=lambda r: r.key)  # requests of one prompt side by side: one copy for all of them
            self._prefill({r.key: r.prompt for r in new})
            first = len(self._active)
            self._place(new, first)
            hidden = torch.stack([self._prefixes[r.key].hidden for r in new])
            for request in new:
                self._waiting.popleft()  # not before they are placed, so that a failure reaches them too
                self._unwant(request)
            self._accept(first, hidden)

    def _unwant(self, request: _Request) -> None:
        self._wanted[request.key] -= 1
        if not self._wanted[request.key]:
            del self._wanted[request.key]
            self._prefixes.pop(request.key, None)

    def _prefill(self, prompts: dict[bytes, Sequence[int]]) -> None:
        from transformers import DynamicCache

        todo = deque(sorted((key for key in prompts if key not in self._prefixes), key=len))
        while todo:
            keys = [todo.popleft()]
            while todo and len(prompts[todo[0]]) * (len(keys) + 1) <= self.prefill_tokens:
                keys.append(todo.popleft())
            batch = [prompts[key] for key in keys]
            width = len(batch[-1])
            ids = torch.tensor([[*p, *[0] * (width - len(p))] for p in batch], device=self.model.device)
            positions = torch.arange(width, device=self.model.device).expand(len(batch), width)
            cache = DynamicCache()
            hidden = self.model.hidden_states(ids, positions, cache=cache)
            for row, (key, prompt) in enumerate(zip(keys, batch, strict=True)):
                self._prefixes[key] = Prefix(cache, row, len(prompt), hidden[row, len(prompt) - 1])

    def _place(self, new: list[_Request], first: int) -> None:
        """Give requests the slots from `first` on."""
        longest = max(len(r.prompt) + r.sampling.max_new_tokens for r in new)
        self._cache.reserve(self._prefixes[new[0].key], first + len(new), longest)
        self._state.reserve(first + len(new), max(r.sampling.max_new_tokens for r in new))
        start = first
        for key, same in groupby(new, key=lambda r: r.key):
            end = start + len(list(same))
            self._cache.fill(slice(start, end), self._prefixes[key])
            start = end
        rows = slice(first, first + len(new))
        sampling = [r.sampling for r in new]
        settings = {
            "position": [len(r.prompt) - 1 for r in new],
            "count": [0] * len(new),
            "limit": [s.max_new_tokens for s in sampling],
            "temperature": [s.temperature for s in sampling],
            "top_p": [s.top_p for s in sampling],
            "top_k": [s.top_k for s in sampling],
            "stop_row": [self._stop_row(s.stop_token_ids) for s in sampling],
        }
        for name, values in settings.items():
            column = self._state[name]
            column[rows] = torch.tensor(values, dtype=column.dtype, device=column.device)
        for slot, s in enumerate(sampling, first):
            draws = torch.rand(s.max_new_tokens, generator=torch.Generator().manual_seed(s.seed))
            self._state["uniform"][slot, : s.max_new_tokens] = draws
        self._active += new

    def _stop_row(self, stop_token_ids: frozenset[int]) -> int:
        """Row of the stop table for this set of ids."""
        if stop_token_ids not in self._stop_rows:
            row = torch.zeros(1, self.vocab_size, dtype=torch.bool, device=self.model.device)
            row[0, [i for i in stop_token_ids if i < self.vocab_size]] = True
            self._stop_rows[stop_token_ids] = len(self._stop_table)
            self._stop_table = torch.cat([self._stop_table, row])
        return self._stop_rows[stop_token_ids]

    # -- decoding --

    def _decode(self) -> None:
        n = len(self._active)
        positions = self._state["position"][:n]
        length = int(positions.max()) + 1
        visible = torch.arange(length, device=positions.device)[None, None] <= positions[:, None, None]
        hidden = self.model.hidden_states(
            self._state["last"][:n, None], positions[:, None], visible, self._cache.at(positions, length)
        )
        self._accept(0, hidden[:, 0])

    def _accept(self, first: int, hidden: Tensor) -> None:
        """Sample a token from each hidden state ([k, H], slots from `first`) and finish the sequences that end with it."""
        rows = slice(first, first + len(hidden))
        state = self._state
        count = state["count"][rows]
        uniform = state["uniform"][rows].gather(1, count[:, None])[:, 0]
        tokens, logprobs, kept = sample_tokens(
            self.model.logits(hidden), state["temperature"][rows], state["top_p"][rows], state["top_k"][rows], uniform
        )
        state["tokens"][rows].scatter_(1, count[:, None], tokens[:, None])
        state["logprobs"][rows].scatter_(1, count[:, None], logprobs[:, None])
        if kept is not None:
            for request, ids in zip(self._active[rows], kept_lists(kept), strict=True):
                request.kept_ids.append(ids)
        state["last"][rows] = tokens
        state["position"][rows] += 1
        count += 1  # a view: counts in place
        stopped = self._stop_table[state["stop_row"][rows], tokens]
        full = count >= state["limit"][rows]
        ends: dict[int, FinishReason] = {first + slot: "length" for slot in full.nonzero().flatten().tolist()}
        ends |= {first + slot: "stop" for slot in stopped.nonzero().flatten().tolist()}
        failures: dict[int, Exception] = {}
        for slot in range(first, rows.stop):
            try:
                if self._says_stop(slot):
                    ends[slot] = "stop"
            except Exception as error:
                failures[slot] = error
        # from the end, so that a move never fills a slot still to be freed
        for slot in sorted(ends.keys() | failures.keys(), reverse=True):
            if slot in failures:
                cause = failures[slot]
                _fail_request(
                    self._active[slot], f"the text cannot be searched for stop strings: {first_line(cause)}", cause
                )
                self._free(slot)
            else:
                self._finish(slot, ends[slot])

    def _says_stop(self, slot: int) -> bool:
        """Whether the text of a slot now holds one of its stop strings. Raises what the decoder raises."""
        stop = self._active[slot].sampling.stop
        if not stop:
            return False
        count = int(self._state["count"][slot])
        # a token is a byte at least, so n bytes of text lie within the last n tokens; a few more settle the spacing
        window = max(len(s.encode()) for s in stop) + 4
        text = self.decode(self._state["tokens"][slot, max(0, count - window) : count].tolist())
        return any(s in text for s in stop)

    def _finish(self, slot: int, reason: FinishReason) -> None:
        request, count = self._active[slot], int(self._state["count"][slot])
        completion = Completion(
            token_ids=self._state["tokens"][slot, :count].tolist(),
            logprobs=self._state["logprobs"][slot, :count].tolist(),
            finish_reason=reason,
            policy_versions=[self.version] * count,
            temperature=request.sampling.temperature,
            kept_ids=request.kept_ids if any(request.kept_ids) else [],
        )
        self._free(slot)
        if not request.done.done():
            request.done.set_result(completion)

    def _free(self, slot: int) -> None:
        last = len(self._active) - 1
        if slot != last:
            self._cache.move(last, slot, int(self._state["position"][last]) + 1)
            self._state.move(last, slot)
            self._active[slot] = self._active[last]
        self._active.pop()


def _fail_request(request: _Request, what: str, cause: Exception | None) -> None:
    """Each with an exception of its own: one that is raised in many places gathers all their tracebacks."""
    if not request.done.done():
        error = EngineError(what)
        error.__cause__ = cause
        request.done.set_exception(error)
