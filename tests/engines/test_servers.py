"""vLLM and SGLang as engines, by the same tests: real vLLM in `make proof`, stand-ins for both always."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest
from servers import KINDS, STANDINS, WINDOW, Served, logprobs_of, model, sampling, served

from processes import stopped
from sluice.engines.dialect import Reply
from sluice.engines.http import HttpClient, HttpError
from sluice.engines.lifetime import Server
from sluice.engines.pieces import extend
from sluice.errors import EngineError, EngineLostError, PromptTooLongError
from sluice.types import Completion, Sampling
from sluice.weights.fingerprint import fingerprint
from sluice.weights.in_process import InProcessWeights
from small_runs import set_up, sluice, workplace

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module", params=KINDS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for most tests: each start of one takes its time."""
    with served(request.param, tmp_path_factory.mktemp("served"), step_s=0.005) as made:
        yield made


@pytest.fixture
def one(running: Served) -> Served:
    """With the weights `model(1)` as version 0."""
    running.publish(model(1), 0)
    return running


def same(found: list[float], expected: list[float], tolerance: float = 1e-5) -> bool:
    return len(found) == len(expected) and all(abs(a - b) < tolerance for a, b in zip(found, expected, strict=True))


async def until(holds: Callable[[], bool]) -> None:
    """Asked in a thread, so that the engine goes on meanwhile."""
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(holds):  # noqa: ASYNC110 - what is waited for happens elsewhere
            await asyncio.sleep(0.01)


async def begun(one: Served, wants: Sequence[Sampling]) -> list[asyncio.Task[Completion]]:
    """Requests that the server is at. A real one may be done with them before it is looked at; then they are asked again."""
    for _ in range(20):
        asked = [asyncio.create_task(one.engine.generate(PROMPT, want)) for want in wants]
        await until(lambda asked=asked: any(task.done() for task in asked) or one.num_running() > 0)
        if not any(task.done() for task in asked):
            return asked
        await asyncio.gather(*asked)
    raise AssertionError("the server was never seen at work")


# Sampling


def test_log_probs_are_those_of_the_tempered_policy(one: Served):
    """To 1e-5 of transformers', for several completions at once."""

    async def several() -> list[Completion]:
        return await asyncio.gather(*(one.engine.generate(PROMPT, sampling(seed=i)) for i in range(6)))

    completions = one.run(several())
    assert len({tuple(said.token_ids) for said in completions}) > 1
    for said in completions:
        assert same(said.logprobs, logprobs_of(model(1), PROMPT, said))
        assert said.policy_versions == [0] * len(said.token_ids)
        assert said.finish_reason == ("stop" if said.token_ids[-1] == 1 else "length")


def test_a_seed_is_all_that_decides(one: Served):
    """Whatever is sampled beside it."""

    async def twice() -> list[Completion]:
        first = await one.engine.generate(PROMPT, sampling(seed=3))
        beside = [one.engine.generate([9, 9], sampling(30, seed=i)) for i in range(4)]
        return [first, *(await asyncio.gather(one.engine.generate(PROMPT, sampling(seed=3)), *beside))[:1]]

    first, second = one.run(twice())
    assert first.token_ids == second.token_ids


def test_a_stop_id_is_kept_and_ends_it(one: Served):
    free = one.run(one.engine.generate(PROMPT, sampling(20, seed=5, stop_token_ids=frozenset())))
    assert (len(free.token_ids), free.finish_reason) == (20, "length")
    stop = free.token_ids[6]
    ended = one.run(one.engine.generate(PROMPT, sampling(20, seed=5, stop_token_ids=frozenset({stop}))))
    assert ended.finish_reason == "stop"
    assert ended.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]


def test_a_stop_text_ends_with_the_token_that_completes_it(one: Served):
    free = one.run(one.engine.generate(PROMPT, sampling(20, seed=5, stop_token_ids=frozenset())))
    text = one.chat.decode(free.token_ids[5:7])
    ended = one.run(one.engine.generate(PROMPT, sampling(20, seed=5, stop=(text,), stop_token_ids=frozenset())))
    assert ended.finish_reason == "stop"
    assert one.chat.decode(ended.token_ids).endswith(text)
    assert ended.token_ids == free.token_ids[: len(ended.token_ids)]
    assert len(ended.logprobs) == len(ended.token_ids) <= 7


def test_greedy_takes_the_likeliest(one: Served):
    if one.kind != "real vllm":
        pytest.skip("stand-ins only draw")
    first, second = (one.run(one.engine.generate(PROMPT, sampling(8, temperature=0.0, seed=i))) for i in (1, 2))
    assert first.token_ids == second.token_ids


def test_the_ids_that_top_k_kept_are_told(one: Served):
    if one.kind == "sglang":
        pytest.skip("the config refuses it")
    said = one.run(one.engine.generate(PROMPT, sampling(seed=4, top_k=5)))
    assert all(len(set(ids)) == 5 for ids in said.kept_ids)
    assert same(said.logprobs, logprobs_of(model(1), PROMPT, said, kept=True))


def test_repetition_is_a_reason_to_end(one: Served):
    """Of a greedy policy, which repeats itself soon."""
    if one.kind != "real vllm":
        pytest.skip("stand-ins do not look for it")
    said = one.run(one.engine.generate(PROMPT, sampling(190, temperature=0.0, stop_token_ids=frozenset())))
    assert said.finish_reason == "repetition"
    assert len(said.token_ids) < 190


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ([5] * (WINDOW - 3), PromptTooLongError, "window"),
        ([], EngineError, "empty prompt"),
        ([5, 128], EngineError, "token id 128"),
    ],
)
def test_prompts_that_cannot_be_sampled_from_are_refused(one: Served, prompt: list[int], error: type, words: str):
    with pytest.raises(error, match=words):
        one.run(one.engine.generate(prompt, sampling()))


def test_what_nobody_waits_for_is_given_up_by_the_server(one: Served):
    async def cancelled() -> None:
        asked = await begun(one, [sampling(190, stop_token_ids=frozenset())] * 16)
        for task in asked:
            task.cancel()
        await until(lambda: one.num_running() == 0)

    one.run(cancelled())


# Weights


def test_its_own_reading_of_its_weights_is_the_trainers(one: Served):
    assert one.run(one.engine.fingerprint()) == fingerprint(model(1).named_weights())


@pytest.mark.parametrize(
    "finish", [pytest.param(False, id="continue"), pytest.param(True, id="finish", marks=pytest.mark.proof)]
)
def test_completions_that_live_through_a_publication(one: Served, finish: bool, monkeypatch: pytest.MonkeyPatch):
    """Each token's log-prob is that of the weights that it names; with `finish` each completion has those that it began with."""
    policies = [model(1), model(2), model(3)]
    monkeypatch.setattr(one.engine, "_finish_limit_s", 60.0 if finish else None)
    prompts = [[5, 6, i] for i in range(56)]  # weights are published after every sixteen
    wants = sampling(150, stop_token_ids=frozenset())

    async def through(first: int) -> list[Completion]:
        """Versions from the `first` on are those of the policies in turn."""
        asked = []
        for prompt in prompts:
            asked.append(asyncio.ensure_future(one.engine.generate(prompt, wants)))
            if prompt[-1] % 16 == 15:
                await until(lambda: one.num_running() > 0 or all(task.done() for task in asked))
                k = prompt[-1] // 16
                await one.engine.update_weights(InProcessWeights(policies[k]), first + k)
        return await asyncio.gather(*asked)

    mixed = False
    for first in range(10, 50, 4):
        one.publish(policies[2], first)  # that of the requests before the first publication
        for prompt, said in zip(prompts, one.run(through(first + 1)), strict=True):
            assert len(said.token_ids) == len(said.policy_versions) <= 150
            # the real vLLM is told to look for repetition, into which one of so many may well fall
            assert (len(said.token_ids) == 150) == (
                said.finish_reason == "length"
            ) or said.finish_reason == "repetition"
            assert said.finish_reason == "length" or one.kind == "real vllm"
            assert said.policy_versions == sorted(said.policy_versions)
            mixed |= len({*said.policy_versions}) > 1
            for version in {*said.policy_versions}:
                own = [t for t, made_by in enumerate(said.policy_versions) if made_by == version]
                expected = logprobs_of(policies[(version - first - 1) % 3], prompt, said)
                assert same([said.logprobs[t] for t in own], [expected[t] for t in own], 1e-4)
        if mixed or finish:  # else a server was done with all of them before the weights were there
            break
    assert mixed != finish


def test_a_stop_text_is_found_across_a_publication(one: Served):
    """A server that gives back what it has sees only what it makes afterwards."""
    free = one.run(one.engine.generate(PROMPT, sampling(20, seed=5, stop_token_ids=frozenset())))
    stop = one.chat.decode(free.token_ids[8:11])
    whole = Completion([], [], "abort", [], 0.7)
    for part, reason in ((slice(0, 10), "abort"), (slice(10, 20), "length")):
        reply = Reply(free.token_ids[part], free.logprobs[part], reason)
        extend(whole, reply, 0, sampling(20, stop=(stop,)), one.chat.decode)
    assert whole.finish_reason == "stop"
    assert whole.token_ids == free.token_ids[:11]
    assert len(whole.logprobs) == len(whole.policy_versions) == 11


def test_an_engine_with_stale_weights_says_so(one: Served, monkeypatch: pytest.MonkeyPatch):
    """Planted: it takes no weights, and answers that it did."""
    assert one.run(one.engine.fingerprint()) == fingerprint(model(1).named_weights())

    async def forgetful(http: Any, folder: Path, version: int) -> None:
        pass

    with monkeypatch.context() as patch:
        patch.setattr(one.engine._dialect, "load", forgetful)
        one.publish(model(2), 1)
        assert one.run(one.engine.fingerprint()) != fingerprint(model(2).named_weights())
    one.publish(model(2), 2)
    assert one.run(one.engine.fingerprint()) == fingerprint(model(2).named_weights())


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_one_that_never_took_weights_says_so(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It still has the random ones that it was started with."""

    async def forgetful(http: Any, folder: Path, version: int) -> None:
        pass

    with served(kind, tmp_path) as made:
        monkeypatch.setattr(made.engine._dialect, "load", forgetful)
        made.publish(model(2), 0)
        assert made.run(made.engine.fingerprint()) != fingerprint(model(2).named_weights())


def test_one_that_sleeps_wakes_with_the_next_weights(one: Served):
    """What is asked for meanwhile waits; put to sleep twice, it sleeps."""
    if one.kind == "real vllm":
        pytest.skip("needs a GPU")

    async def asleep() -> Completion:
        await one.engine.sleep()
        await one.engine.sleep()
        asked = asyncio.ensure_future(one.engine.generate(PROMPT, sampling()))
        await asyncio.sleep(0.1)
        assert not asked.done()
        await one.engine.update_weights(InProcessWeights(model(2)), 1)
        return await asked

    said = one.run(asleep())
    assert same(said.logprobs, logprobs_of(model(2), PROMPT, said))
    assert one.run(one.engine.fingerprint()) == fingerprint(model(2).named_weights())


# Processes


def processes_with(word: str) -> list[int]:
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if word.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def server_pids(made: Served) -> list[int]:
    return processes_with(str(made.folder / "model"))


def test_a_killed_server_loses_what_it_was_asked_and_comes_back(one: Served):
    """kill -9 while it samples: all are told that it is lost; another one has the weights that were published last, and says what the
    first one would have said."""
    one.publish(model(2), 0)
    one.publish(model(1), 1)
    wants = [sampling(190, seed=i, stop_token_ids=frozenset()) for i in range(16)]

    async def completions() -> list[Completion | BaseException]:
        return await asyncio.gather(*(one.engine.generate(PROMPT, want) for want in wants), return_exceptions=True)

    async def through() -> list[Completion | BaseException]:
        asked = await begun(one, wants)
        os.kill(min(server_pids(one)), signal.SIGKILL)  # its first process
        return await asyncio.gather(*asked, return_exceptions=True)

    whole, lost = one.run(completions()), one.run(through())
    assert all(isinstance(error, EngineLostError) and "SIGKILL" in str(error) for error in lost)
    assert one.run(one.engine.fingerprint()) == fingerprint(model(1).named_weights())
    for said, before in zip(one.run(completions()), whole, strict=True):
        assert isinstance(said, Completion)
        assert isinstance(before, Completion)
        assert said.token_ids == before.token_ids
        assert same(said.logprobs, logprobs_of(model(1), PROMPT, said))
        assert said.policy_versions == [1] * 190


@pytest.mark.parametrize("kind", ["vllm", pytest.param("sglang", marks=pytest.mark.proof)])
def test_one_that_stands_still_is_killed(kind: str, tmp_path: Path):
    """SIGSTOP of its process: it answers nothing any more."""
    with served(kind, tmp_path, hang_timeout_s=2.0, step_s=0.01) as made:
        made.publish(model(1), 0)

        async def through() -> None:
            asked = asyncio.ensure_future(made.engine.generate(PROMPT, sampling(100, stop_token_ids=frozenset())))
            await until(lambda: made.num_running() == 1)
            for pid in server_pids(made):
                os.kill(pid, signal.SIGSTOP)
            await asked

        with pytest.raises(EngineLostError, match=r"no sign of life for 2 s \(engine.hang_timeout_s\)"):
            made.run(through())
        made.run(until(lambda: not server_pids(made)))


def instead(code: str, monkeypatch: pytest.MonkeyPatch, made: Served) -> None:
    """Another program is started in the server's place."""
    command = replace(made.engine._dialect.command("key"), words=[sys.executable, "-c", code])
    monkeypatch.setattr(made.engine._dialect, "command", lambda key: command)


def test_one_that_ends_while_it_starts_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with served("vllm", tmp_path) as made:
        instead("print('no memory'); raise SystemExit(3)", monkeypatch, made)
        with pytest.raises(EngineLostError, match=r"its process ended with exit code 3; see .*engine\.log"):
            made.publish(model(1), 0)
        assert "no memory" in (made.folder / "run/engine.log").read_text()


def test_one_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with served("vllm", tmp_path, start_limit_s=1.0) as made:
        instead("import time; time.sleep(600)", monkeypatch, made)
        with pytest.raises(EngineError, match=r"1 s \(engine.start_limit_s\)"):
            made.publish(model(1), 0)


def test_a_python_that_is_not_there_is_told(tmp_path: Path):
    def wrong(made: Any) -> Any:
        made._server = replace(made._server, python="/nowhere/python")
        return made

    with (
        served("vllm", tmp_path, change=wrong) as made,
        pytest.raises(EngineError, match="/nowhere/python cannot be started"),
    ):
        made.publish(model(1), 0)


DRIVER = """\
import asyncio, sys
sys.path[:0] = {path!r}
from pathlib import Path
from servers import model, served

with served("vllm", Path({folder!r})) as made:
    made.publish(model(1), 0)
    print("ready", flush=True)
    made.run(asyncio.sleep(100))
"""


def test_a_server_does_not_outlive_a_killed_driver(tmp_path: Path):
    path = [str(STANDINS.parent), str(STANDINS.parent / "engines"), str(STANDINS.parent.parent / "src")]
    code = DRIVER.format(path=path, folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout
            assert driver.stdout.readline() == "ready\n"
            assert processes_with(str(tmp_path / "model"))
        finally:
            driver.kill()
    limit = time.monotonic() + 20
    while processes_with(str(tmp_path / "model")):
        assert time.monotonic() < limit
        time.sleep(0.1)


KEY = "of the one that runs"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def by_hand(kind: str, folder: Path, *left_out: str, port: int | None = None) -> Iterator[str]:
    """A server that a user has started, who wants `KEY` of all, without those words of our command: its URL."""
    with served(kind, folder) as made:
        command = made.engine._dialect.command(KEY)
        words = command.words
    if kind == "sglang":
        words[1:3] = ["-m", "sglang.launch_server", "--api-key", KEY]
    words = [word for word in words if word not in left_out]
    port = port or free_port()
    words = [word.replace("{host}", "127.0.0.1").replace("{port}", str(port)) for word in words]
    environment = {**os.environ, **command.variables}
    environment["PYTHONPATH"] = os.pathsep.join([str(STANDINS), os.environ.get("PYTHONPATH", "")])
    server, url = subprocess.Popen(words, env=environment), f"http://127.0.0.1:{port}"
    try:
        limit = time.monotonic() + 60
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{url}/health"):
                break
            assert time.monotonic() < limit
            time.sleep(0.1)
        yield url
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_that_runs_is_used_and_left_alone(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLUICE_ENGINE_KEY", KEY)
    with by_hand(kind, tmp_path) as url:
        for version in (5, 6):
            with served(kind, tmp_path, url=url) as guest:
                guest.publish(model(version), version)
                said = guest.run(guest.engine.generate(PROMPT, sampling()))
                assert same(said.logprobs, logprobs_of(model(version), PROMPT, said))
                assert said.policy_versions == [version] * len(said.token_ids)
    with (
        served(kind, tmp_path, url=url, start_limit_s=0.5) as guest,
        pytest.raises(
            EngineError, match=r"no .* server answers at engine\.url=.* after 0\.5 s \(engine\.start_limit_s\): Conn"
        ),
    ):
        guest.publish(model(2), 6)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@pytest.mark.parametrize("key", [None, "wrong"])
def test_a_server_that_runs_wants_its_key(kind: str, key: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if key:
        monkeypatch.setenv("SLUICE_ENGINE_KEY", key)
    with (
        by_hand(kind, tmp_path) as url,
        served(kind, tmp_path, url=url) as guest,
        pytest.raises(
            EngineError, match=r"HTTP 401.*; a key for engine\.url belongs in the variable SLUICE_ENGINE_KEY"
        ),
    ):
        guest.publish(model(1), 0)


def test_a_server_that_gives_no_answer_is_told_with_what_was_asked_of_it():
    async def ask(url: str) -> None:
        client = HttpClient(url)
        with pytest.raises(TimeoutError, match=rf"{url} gave no answer to GET /health within 0\.1 s"):
            await client.get("/health", 0.1)
        await client.close()

    with socket.create_server(("127.0.0.1", 0)) as silent:
        asyncio.run(ask(f"http://127.0.0.1:{silent.getsockname()[1]}"))


class Stranger(BaseHTTPRequestHandler):
    """A web server of another kind, which has an answer to everything."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_GET


def test_a_server_that_listens_no_more_is_over():
    """As vLLM's whose core was killed: it waits for its last requests to end, which they never do, and no limit has to pass."""

    async def work(web: ThreadingHTTPServer) -> str:
        ended = asyncio.get_running_loop().create_future()
        dialect = MagicMock(pass_through=lambda http, limit_s: http.get("/deep", limit_s))
        server = Server(dialect, 1, lambda server: ended.set_result(server.cause))
        server._http = HttpClient(f"http://127.0.0.1:{web.server_port}")
        server.watch(20.0)
        await asyncio.sleep(0.5)
        assert not ended.done()
        web.shutdown()
        web.server_close()
        async with asyncio.timeout(10.0):
            return await ended

    with ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        assert asyncio.run(work(web)) == "it listens no more, and was killed"


@pytest.mark.parametrize(("kind", "name"), [("vllm", "vLLM"), ("sglang", "SGLang")])
def test_a_server_of_another_kind_is_refused(kind: str, name: str, tmp_path: Path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with (
            served(kind, tmp_path, url=f"http://127.0.0.1:{server.server_port}") as guest,
            pytest.raises(EngineError, match=f"is no {name} server"),
        ):
            guest.publish(model(1), 0)
        server.shutdown()


def test_a_vllm_server_without_our_extension_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It could sample, and could not be given weights."""
    monkeypatch.setenv("SLUICE_ENGINE_KEY", KEY)
    with (
        by_hand("vllm", tmp_path, "--worker-extension-cls", "sluice_worker.Weights") as url,
        served("vllm", tmp_path, url=url) as guest,
        pytest.raises(EngineError, match=r"--worker-extension-cls sluice_worker\.Weights"),
    ):
        guest.publish(model(1), 0)


def test_a_check_says_what_a_server_that_runs_is_not_made_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Another model, too short a window and no adapters; and nothing of one that fits."""
    monkeypatch.setenv("SLUICE_ENGINE_KEY", KEY)
    (tmp_path / "run").mkdir()
    with by_hand("vllm", tmp_path) as url, workplace(tmp_path / "run", monkeypatch):
        set_up(Path())
        words = ["check", "--offline", "config.yaml", "engine.name=vllm", f"engine.url={url}", "trainer.lora_rank=4"]
        assert sluice(*words, "engine.lora=adapter") == 2
        said = capsys.readouterr().out
        for part in (
            f"failure: the model at engine.url={url} is not that of model.path=model: lm_head.weight is [128, 64] there, and [128, 32] here",
            f"failure: the server at engine.url={url} takes 200 tokens, and the run up to 256; set engine.max_model_len=200",
            f"failure: the server at engine.url={url} takes no adapters, and trainer.lora_rank is 4",
        ):
            assert part in said
        assert sluice(*words, f"model.path={tmp_path / 'model'}", f"engine.max_model_len={WINDOW}") == 0
        monkeypatch.delenv("SLUICE_ENGINE_KEY")
        assert sluice(*words) == 2
        assert (
            "or wants another key than that in SLUICE_ENGINE_KEY (HTTPError: HTTP Error 401" in capsys.readouterr().out
        )


# Who may give it orders

ORDERS = {
    "vllm": [
        "/pause?mode=keep",
        "/collective_rpc",
        "/update_weight_version",
        "/sleep?level=2",
        "/inference/v1/generate",
        "/nothing",
    ],
    "sglang": ["/pause_generation", "/update_weights_from_disk", "/release_memory_occupation", "/generate", "/nothing"],
}


def test_who_has_no_key_gives_no_orders(one: Served):
    """And nobody finds the key where all on the machine look, or in the log."""
    assert one.engine._server
    key = one.engine._server.http._session.headers["Authorization"].split()[-1]

    async def refused(wrong: str | None) -> None:
        client = HttpClient(one.url, wrong)
        for path in ORDERS[one.kind.removeprefix("real ")]:
            with pytest.raises(HttpError, match=r"^HTTP 401"):
                await client.post(path, {}, 10)
        await client.close()

    for wrong in (None, key[:-1]):
        one.run(refused(wrong))
    assert not processes_with(key)
    assert key not in (one.folder / "run/engine.log").read_text()
    assert one.run(one.engine.generate(PROMPT, sampling()))


def test_a_server_whose_machine_sees_no_weights_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with served("vllm", tmp_path) as made:
        made.engine._publication.folder = tmp_path / "elsewhere"
        monkeypatch.setattr(made.engine._publication, "publish", AsyncMock(return_value=0))
        with pytest.raises(
            EngineError, match=r"does not see .*/elsewhere.*; set engine\.publication_folder to a folder that all"
        ):
            made.publish(model(1), 0)


def test_what_was_asked_of_a_lost_machine_is_lost_too(one: Served):
    """Of which nothing comes, not even the end of a connection: here of a server that is stopped."""

    async def through() -> None:
        client = HttpClient(one.url)
        with stopped(min(server_pids(one))):
            asked = asyncio.ensure_future(client.get("/health", 60))
            await asyncio.sleep(0.3)
            await client.close()
            with pytest.raises(ConnectionError):
                await asyncio.wait_for(asked, 5)
        await asyncio.sleep(0)

    one.run(through())


def test_a_server_that_dies_as_it_goes_to_sleep_is_told_of_when_it_is_asked_next(one: Served):
    """And not to the trainer, which has the memory now."""
    if one.kind == "real vllm":
        pytest.skip("needs a GPU")

    async def through() -> Completion:
        for pid in server_pids(one):
            os.kill(pid, signal.SIGKILL)
        await one.engine.sleep()
        with pytest.raises(EngineLostError):
            await one.engine.update_weights(InProcessWeights(model(1)), 7)
        await one.engine.update_weights(InProcessWeights(model(1)), 8)
        return await one.engine.generate(PROMPT, sampling())

    assert set(one.run(through()).policy_versions) == {8}


@pytest.mark.proof
def test_an_sglang_server_with_weights_that_nobody_published_is_not_believed(tmp_path: Path):
    """One that was started again behind its address answers with those that it was started with."""
    with served("sglang", tmp_path) as made:
        made.publish(model(1), 0)

        async def through() -> None:
            assert made.engine._server
            body = {"model_path": str(made.engine._publication.of(0)), "weight_version": "default"}
            await made.engine._server.http.post("/update_weights_from_disk", body, 10)
            await made.engine.generate(PROMPT, sampling())

        with pytest.raises(EngineError, match=r"weights that were not published \(default\)"):
            made.run(through())
