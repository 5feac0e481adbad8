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
from collections.abc import AsyncGenerator, Callable, Sequence, Sized
from contextlib import asynccontextmanager
from itertools import islice

import torch
from torch import Tensor

from sluice.engines.active import ActiveSlots, Request
from sluice.engines.decoders import decoder_for
from sluice.engines.products import in_onednn_order
from sluice.engines.sampling import check_ids, check_room, kept_lists, sample_tokens
from sluice.engines.slots import Prefix
from sluice.engines.threads import StepThreads
from sluice.errors import EngineError
from sluice.hooks import first_line
from sluice.interfaces import LanguageModel, Weights
from sluice.types import Completion, FinishReason, Sampling
from sluice.weights.fingerprint import fingerprint


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
        cache_bytes: int | None = None,
        in_flight: bool = False,
    ) -> None:
        """`decode` turns ids into text, for stop strings only. `in_flight`: weights may change under unfinished completions, whose
        later tokens then are by the new ones, over keys and values by the old. `cache_bytes` bounds the key-value cache; left out, on a GPU half
        of what is free when the engine is made, and elsewhere nothing."""
        self.model = model
        self.decode = decode
        self.vocab_size = vocab_size
        self.num_slots = num_slots
        self.max_model_len = max_model_len or model.max_length
        self.prefill_tokens = prefill_tokens
        if cache_bytes is None and model.device.type == "cuda":
            cache_bytes = torch.cuda.mem_get_info(model.device)[0] // 2
        self.cache_bytes = cache_bytes
        self.in_flight = in_flight
        self.version = 0
        self.num_steps = 0
        """That were made: it grows as long as there is work and it gets done."""
        self._threads = StepThreads(model.device)
        self._decoder = decoder_for(model, self._threads)
        self._lags = model.device.type == "cuda"
        """Whether it learns a step later which sequences are done: the host then never waits for the step it has just launched."""
        self._head_weight = in_onednn_order(model.head_weight())
        self._waiting: deque[Request] = deque()
        self._closed = False
        self._is_admitting = True
        self._stepping = asyncio.Lock()
        self._none_active = asyncio.Event()
        self._wanted: Counter[bytes] = Counter()
        """How many waiting requests want each prompt; its prefix is kept as long as one does."""
        self._prefixes: dict[bytes, Prefix] = {}
        self._empty()
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
        request = Request(key, prompt_ids, sampling, asyncio.get_running_loop().create_future())
        request.done.add_done_callback(self._note_cancelled)
        self._waiting.append(request)
        if self._driver is None:
            self._driver = asyncio.create_task(self._drive())
        return await request.done

    async def update_weights(self, weights: Weights, version: int) -> int:
        """The weights are the model's own; what was copied from the old ones or computed with them is made anew or dropped."""
        if weights.model is not self.model:
            raise EngineError(
                "the embedded engine generates with the trainer's own model, and was given another one's weights"
            )
        if (self._active or self._waiting) and not self.in_flight:
            raise EngineError(
                f"weights changed under {len(self._active) + len(self._waiting)} unfinished completions; the embedded "
                "engine is synchronous"
            )
        self.version = version
        self._active.note_version(version)
        self._is_admitting = True
        self._prefixes.clear()
        self._decoder.refresh()
        self._head_weight = in_onednn_order(self.model.head_weight())
        return 0

    @asynccontextmanager
    async def paused(self) -> AsyncGenerator[None]:
        """No token is made meanwhile."""
        async with self._stepping:
            yield

    async def unfinished(self) -> dict[int, Completion]:
        """By the seed of its sampling, what each sequence that is decoded has so far."""
        made: dict[int, Completion] = {}
        counts = (self._active.state["count"] - self._active.state["done"].long()).tolist() if self._active else []
        for slot, request in enumerate(self._active.requests):
            if count := counts[slot]:  # the last token of one that is done is drawn again, and ends it again
                tokens, logprobs = (self._active.state[name][slot, :count] for name in ("tokens", "logprobs"))
                routed = self._active.routed(slot, count)
                made[request.sampling.seed] = request.completion(tokens, logprobs, "abort", routed)
        return made

    async def finish_active(self) -> None:
        """Let the completions that are decoded end, and begin no others before the weights are new."""
        self._is_admitting = False
        if self._active:
            self._none_active.clear()
            await self._none_active.wait()

    @property
    def is_busy(self) -> bool:
        return bool(self._active or self._waiting)

    async def fingerprint(self) -> str:
        return fingerprint(self._decoder.named_weights())

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

    def _empty(self) -> None:
        """No sequences, and no memory for any."""
        self._none_active.set()
        num_routed = self.model.routers.num_chosen if self.model.routers else 0
        self._active = ActiveSlots(self.model.device, self.vocab_size, self._decoder, self.cache_bytes, num_routed)
        self._unseen: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        """Where it lags: which sequences were done after the last step, on its way to the host."""

    async def _drive(self) -> None:
        try:
            await settled(self._waiting)
            while self._waiting or self._active:
                async with self._stepping:
                    with self._threads.step():
                        self._step()
                self.num_steps += 1
                if not self._active:
                    self._none_active.set()
                await asyncio.sleep(0)
            self._empty()  # training needs the memory
        except Exception as cause:
            # the frames hold the tensors of the step, and memory may be what is wanted
            traceback.clear_frames(cause.__traceback__)
            in_flight = len(self._active) + len(self._waiting)
            self._fail(f"decoding failed: {first_line(cause)} ({in_flight} completions were in flight)", cause)
        finally:
            self._driver = None

    def _fail(self, what: str, cause: Exception | None = None) -> None:
        """Fail all requests; what the step left half done is dropped with them."""
        requests = [*self._active.requests, *self._waiting]
        self._waiting.clear()
        self._wanted.clear()
        self._prefixes.clear()
        self._empty()
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
            if self._active.requests[slot].done.cancelled():
                self._active.free(slot)

    # -- admission --

    def _admit(self) -> None:
        while self._waiting and len(self._active) < self.num_slots and self._is_admitting:
            first = len(self._active)
            new = list(islice(self._waiting, self.num_slots - first))
            self._prefill(new)
            new = new[: self._active.room(new, self._prefixes[new[0].key])]
            if not new:
                return
            new.sort(key=lambda r: r.key)  # requests of one prompt side by side: one copy for all of them
            self._active.place(new, self._prefixes, min(self.num_slots, first + len(self._waiting)))
            hidden = torch.stack([self._prefixes[r.key].hidden for r in new])
            for request in new:
                self._waiting.popleft()  # not before they are placed, so that a failure reaches them too
                self._unwant(request)
                request.versions = [(0, self.version)]
            self._accept(first, hidden)

    def _unwant(self, request: Request) -> None:
        self._wanted[request.key] -= 1
        if not self._wanted[request.key]:
            del self._wanted[request.key]
            self._prefixes.pop(request.key, None)

    def _prefill(self, new: list[Request]) -> None:
        """Compute the prompts of these requests, and when one is missing also those that will be wanted next: a forward for
        one prompt takes hardly less than for many."""
        missing = {r.key: r.prompt for r in new if r.key not in self._prefixes}
        if not missing:
            return
        tokens = sum(map(len, missing.values()))
        for request in self._waiting:
            tokens += 0 if request.key in missing or request.key in self._prefixes else len(request.prompt)
            if tokens > self.prefill_tokens:
                break
            if request.key not in self._prefixes:
                missing[request.key] = request.prompt
        todo = deque(sorted(missing, key=len))
        while todo:
            keys = [todo.popleft()]
            while todo and len(missing[todo[0]]) * (len(keys) + 1) <= self.prefill_tokens:
                keys.append(todo.popleft())
            self._compute(keys, [missing[key] for key in keys])

    def _compute(self, keys: list[bytes], prompts: list[Sequence[int]]) -> None:
        """One forward for some prompts, the longest last."""
        from transformers import DynamicCache

        width = len(prompts[-1])
        ids = torch.tensor([[*p, *[0] * (width - len(p))] for p in prompts], device=self.model.device)
        positions = torch.arange(width, device=self.model.device).expand(len(prompts), width)
        cache = DynamicCache()
        with self._threads.work(ids.numel() * self._decoder.largest_product):
            hidden = self.model.hidden_states(ids, positions, cache=cache)
        routed = self.model.routers.chosen().view(*ids.shape, -1) if self.model.routers else None
        for row, (key, prompt) in enumerate(zip(keys, prompts, strict=True)):
            last = hidden[row, len(prompt) - 1]
            own = None if routed is None else routed[row, : len(prompt)]
            self._prefixes[key] = Prefix(cache, row, len(prompt), last, self._decoder.key_order, own)

    # -- decoding --

    def _decode(self) -> None:
        for request in self._active.make_room():
            request.kept_ids.clear()
            self._wanted[request.key] += 1
            self._waiting.appendleft(request)
        spans = self._active.next_step()
        n, state = len(self._active), self._active.state
        hidden = self._decoder.hidden(state["last"][:n], state["position"][:n], self._active.cache, spans)
        if self.model.routers:
            self._active.route(self.model.routers.chosen())
        self._accept(0, hidden)

    def _accept(self, first: int, hidden: Tensor) -> None:
        """Sample a token from each hidden state ([k, H], slots from `first`) and finish the sequences that end with it."""
        active, rows = self._active, slice(first, first + len(hidden))
        state, asks = active.state, active.asks
        with self._threads.work(len(hidden) * self._head_weight.numel()):
            tokens, logprobs, kept = sample_tokens(
                self.model.logits(hidden, self._head_weight),
                state["uniform"][rows].gather(1, state["count"][rows, None])[:, 0],
                state["temperature"][rows] if asks["temperature"] else None,
                top_p=state["top_p"][rows] if asks["truncation"] else None,
                top_k=state["top_k"][rows] if asks["truncation"] else None,
                greedy=state["greedy"][rows] if asks["greedy"] else None,
            )
        active.advance(first, tokens, logprobs)
        if kept is not None:
            for request, ids in zip(active.requests[rows], kept_lists(kept), strict=True):
                request.kept_ids.append(ids)
        if asks["stop"]:
            self._search_stop_strings(rows)
        self._collect()

    def _collect(self) -> None:
        """Finish the sequences that are done; one that is stands still until it is collected."""
        active = self._active
        done = active.state["done"][: len(active)]
        if self._lags and not (active.asks["truncation"] or active.asks["stop"]):
            before, self._unseen = self._unseen, (active.arrangement, *_on_its_way(done))
            if before is None or before[0] != active.arrangement:
                return
            _, done, arrived = before
            if arrived is not None:
                arrived.synchronize()
        ended = done.nonzero().flatten().tolist()
        if ended:
            self._finish(ended)

    def _search_stop_strings(self, rows: slice) -> None:
        for slot in range(rows.start, rows.stop):
            try:
                if self._says_stop(slot):
                    self._active.state["stopped"][slot] = self._active.state["done"][slot] = True
            except Exception as cause:
                what = f"the text cannot be searched for stop strings: {first_line(cause)}"
                _fail_request(self._active.requests[slot], what, cause)
                self._active.state["done"][slot] = True

    def _says_stop(self, slot: int) -> bool:
        """Whether the text of a slot now holds one of its stop strings. Raises what the decoder raises."""
        stop = self._active.requests[slot].sampling.stop
        if not stop:
            return False
        # a token is a byte at least, so n bytes of text lie within the last n tokens; a few more settle the spacing
        text = self.decode(self._active.text_tokens(slot, max(len(s.encode()) for s in stop) + 4))
        return any(s in text for s in stop)

    def _finish(self, slots: list[int]) -> None:
        """Answer the requests in these slots, in ascending order, and free them."""
        state, rows = self._active.state, torch.tensor(slots, device=self.model.device)
        counts, stopped = state["count"][rows].tolist(), state["stopped"][rows].tolist()
        tokens, logprobs = state["tokens"][rows].cpu(), state["logprobs"][rows].cpu()
        for i, slot in enumerate(slots):
            request, count = self._active.requests[slot], counts[i]
            if not request.done.done():
                reason: FinishReason = "stop" if stopped[i] else "length"
                routed = self._active.routed(slot, count)
                request.done.set_result(request.completion(tokens[i, :count], logprobs[i, :count], reason, routed))
        for slot in reversed(slots):  # from the end, so that a move never fills a slot still to be freed
            self._active.free(slot)


async def settled(waiting: Sized) -> None:
    """Wait until every task that can ask has asked, so that what is decoded side by side, and with it the last bit of the log-probs,
    does not depend on scheduling."""
    quiet = 0
    for _ in range(100):
        seen = len(waiting)
        await asyncio.sleep(0)
        quiet = quiet + 1 if len(waiting) == seen else 0
        if quiet == 5:
            return


def _on_its_way(flags: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, and what tells when it is there."""
    copy = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=flags.is_cuda)
    copy.copy_(flags, non_blocking=True)
    if not flags.is_cuda:
        return copy, None
    arrived = torch.cuda.Event()
    arrived.record()
    return copy, arrived


def _fail_request(request: Request, what: str, cause: Exception | None) -> None:
    """Each with an exception of its own: one that is raised in many places gathers all their tracebacks."""
    if not request.done.done():
        error = EngineError(what)
        error.__cause__ = cause
        request.done.set_exception(error)
