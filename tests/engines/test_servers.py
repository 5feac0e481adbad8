"""vLLM and SGLang as engines, by the same tests: real vLLM in `make proof`, stand-ins for both always."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from servers import KINDS, STANDINS, WINDOW, Served, logprobs_of, model, sampling, served

from sluice.errors import EngineError, PromptTooLongError
from sluice.types import Completion
from sluice.weights.in_process import InProcessWeights

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module", params=KINDS)
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server for all tests that leave it as it was, with the weights `model(1)` as version 0."""
    with served(request.param, tmp_path_factory.mktemp("served"), step_s=0.005) as made:
        made.publish(model(1), 0)
        yield made


def same(found: list[float], expected: list[float], tolerance: float = 1e-5) -> bool:
    return len(found) == len(expected) and all(abs(a - b) < tolerance for a, b in zip(found, expected, strict=True))


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
        asked = [
            asyncio.ensure_future(one.engine.generate(PROMPT, sampling(190, stop_token_ids=frozenset())))
            for _ in range(3)
        ]
        await _until(lambda: one.num_running() == 3)
        for task in asked:
            task.cancel()
        await _until(lambda: one.num_running() == 0, 0.6)

    one.run(cancelled())


# Weights


def test_its_own_reading_of_its_weights_is_the_trainers(one: Served):
    from sluice.weights.fingerprint import fingerprint

    assert one.run(one.engine.fingerprint()) == fingerprint(model(1).named_weights())


def test_nothing_is_left_of_older_weights(one: Served):
    one.publish(model(1), 0)
    newest = one.engine._folders.newest
    assert newest
    assert [folder.name for folder in newest.parent.iterdir()] == ["version-000000"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("finish", [False, True], ids=["continue", "finish"])
def test_completions_that_live_through_a_publication(kind: str, finish: bool, tmp_path: Path):
    """Each token's log-prob is that of the weights that it names; with `finish` each completion has those that it began with."""
    policies = [model(1), model(2), model(3, tied=False)]
    with served(kind, tmp_path, step_s=0.004, finish_limit_s=60.0 if finish else None) as made:
        made.publish(policies[0], 0)

        async def through() -> list[Completion]:
            wants = sampling(150, stop_token_ids=frozenset())
            asked = [asyncio.ensure_future(made.engine.generate([5, 6, 7 + i], wants)) for i in range(4)]
            for version in (1, 2):
                await _until(lambda: made.num_running() > 0)
                await asyncio.sleep(0.1)
                await made.engine.update_weights(InProcessWeights(policies[version]), version)
                asked.append(asyncio.ensure_future(made.engine.generate([5, 6, 50 + version], wants)))
            return await asyncio.gather(*asked)

        completions = made.run(through())
        assert made.run(made.engine.fingerprint())
    prompts = [[5, 6, last] for last in (7, 8, 9, 10, 51, 52)]
    seen: set[int] = set()
    for prompt, said in zip(prompts, completions, strict=True):
        assert (len(said.token_ids), said.finish_reason) == (150, "length")
        assert said.policy_versions == sorted(said.policy_versions)
        seen |= {*said.policy_versions}
        for version, policy in enumerate(policies):
            own = [t for t, made_by in enumerate(said.policy_versions) if made_by == version]
            expected = logprobs_of(policy, prompt, said)
            assert same([said.logprobs[t] for t in own], [expected[t] for t in own], 1e-4)
    mixed = [len(set(said.policy_versions)) > 1 for said in completions]
    assert any(mixed) != finish
    assert seen == {0, 1, 2} or finish


def test_a_stop_text_is_found_across_a_publication(tmp_path: Path):
    """SGLang sees only what it made after the pause."""
    with served("sglang", tmp_path, step_s=0.02) as made:
        made.publish(model(1), 0)
        wants = sampling(60, seed=5, stop_token_ids=frozenset())

        async def through(stop: tuple[str, ...]) -> Completion:
            from dataclasses import replace

            asked = asyncio.ensure_future(made.engine.generate(PROMPT, replace(wants, stop=stop)))
            await _until(lambda: made.num_running() == 1)
            await asyncio.sleep(0.4)
            await made.engine.update_weights(InProcessWeights(model(1)), 1)
            return await asked

        free = made.run(through(()))
        joint = free.policy_versions.index(1)
        completion = Completion([], [], "abort", [], 0.7)
        stop = made.chat.decode(free.token_ids[joint - 1 : joint + 2])
        from sluice.engines.server import Reply

        for part in (free.token_ids[:joint], free.token_ids[joint:]):
            made.engine._extend(completion, Reply(part, [0.0] * len(part), "abort"), 0, sampling(60, stop=(stop,)))
        assert completion.finish_reason == "stop"
        assert made.chat.decode(completion.token_ids).endswith(stop)
        assert len(completion.token_ids) == joint + 2


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_with_stale_weights_says_so(kind: str, tmp_path: Path):
    """Planted: from version 1 on it takes no weights, and answers that it did. At version 0, too."""
    from sluice.weights.fingerprint import fingerprint

    def forgetful(made: Any) -> Any:
        load = made.load

        async def sometimes(http: Any, folder: str, version: int) -> None:
            if version == 0:
                await load(http, folder, version)

        made.load = sometimes
        return made

    with served(kind, tmp_path, change=forgetful) as made:
        made.publish(model(1), 0)
        assert made.run(made.engine.fingerprint()) == fingerprint(model(1).named_weights())
        made.publish(model(2), 1)
        assert made.run(made.engine.fingerprint()) != fingerprint(model(2).named_weights())
    with served(kind, tmp_path, change=forgetful) as made:
        made.publish(model(2), 7)
        assert made.run(made.engine.fingerprint()) != fingerprint(model(2).named_weights())


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_server_costs_no_completion(kind: str, tmp_path: Path):
    """kill -9 while it samples: another takes over, with the weights that were published last, and says the same again."""
    with served(kind, tmp_path, step_s=0.01) as made:
        made.publish(model(2), 0)
        made.publish(model(1), 1)

        async def through() -> tuple[list[Completion], list[Completion]]:
            wants = [sampling(100, seed=i, stop_token_ids=frozenset()) for i in range(4)]
            whole = await asyncio.gather(*(made.engine.generate(PROMPT, want) for want in wants))
            asked = [asyncio.ensure_future(made.engine.generate(PROMPT, want)) for want in wants]
            await _until(lambda: made.num_running() == 4)
            for pid in server_pids(made):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return whole, await asyncio.gather(*asked)

        whole, again = made.run(through())
        assert [said.token_ids for said in again] == [said.token_ids for said in whole]
        for said in again:
            assert same(said.logprobs, logprobs_of(model(1), PROMPT, said))
            assert said.policy_versions == [1] * 100
        assert len(made.events) == 1
        assert "engine_died: the" in made.events[0]
        assert "SIGKILL" in made.events[0]
        assert "2 more left" in made.events[0]
        assert server_pids(made)
    assert not server_pids(made)


def test_one_that_dies_too_often_is_an_error(tmp_path: Path):
    with served("vllm", tmp_path, max_restarts=1, arguments=["--port", "not-a-port"]) as made:
        with pytest.raises(EngineError, match=r"died 2 times \(limit: engine.max_restarts\); see .*engine.log"):
            made.publish(model(1), 0)
        assert [event.partition(":")[0] for event in made.events] == ["engine_died"] * 2


def test_one_that_never_answers_is_given_up(tmp_path: Path):
    def mute(made: Any) -> Any:
        launch = made.launch

        def sleeping() -> Any:
            from dataclasses import replace

            return replace(launch(), command=[sys.executable, "-c", "import time; time.sleep(600)"])

        made.launch = sleeping
        return made

    with (
        served("vllm", tmp_path, start_limit_s=1.0, change=mute) as made,
        pytest.raises(EngineError, match=r"1 s \(engine.start_limit_s\)"),
    ):
        made.publish(model(1), 0)


def test_a_python_that_is_not_there_is_told(tmp_path: Path):
    def wrong(made: Any) -> Any:
        from dataclasses import replace

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
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout
        assert driver.stdout.readline() == "ready\n"
        assert processes_with(str(tmp_path / "model"))
        driver.kill()
        limit = time.monotonic() + 20
        while processes_with(str(tmp_path / "model")):
            assert time.monotonic() < limit
            time.sleep(0.1)
    finally:
        driver.kill()
        driver.wait()


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_that_runs_is_used_and_left_alone(kind: str, tmp_path: Path):
    with served(kind, tmp_path) as owner:
        owner.publish(model(1), 0)
        with served(kind, tmp_path, url=owner.url) as guest:
            guest.publish(model(2), 5)
            said = guest.run(guest.engine.generate(PROMPT, sampling()))
            assert same(said.logprobs, logprobs_of(model(2), PROMPT, said))
            assert said.policy_versions == [5] * len(said.token_ids)
        assert owner.run(owner.engine.generate(PROMPT, sampling()))
    with (
        served(kind, tmp_path, url=owner_url(owner)) as guest,
        pytest.raises(EngineError, match="no .* server answers at engine.url"),
    ):
        guest.publish(model(2), 6)


def owner_url(owner: Served) -> str:
    return "http://127.0.0.1:1"


def test_a_vllm_server_without_our_extension_is_refused(tmp_path: Path):
    """It could sample, and could not be given weights."""
    with served("vllm", tmp_path) as owner:
        launch = owner.engine._dialect.launch()
        assert "sluice_worker.Weights" in launch.command
    words = [word for word in launch.command if word not in ("--worker-extension-cls", "sluice_worker.Weights")]
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(STANDINS), os.environ.get("PYTHONPATH", "")])}
    bare = subprocess.Popen([word.replace("{port}", str(port)) for word in words], env=environment)
    try:
        with served("vllm", tmp_path, url=f"http://127.0.0.1:{port}") as guest:
            limit = time.monotonic() + 60
            while True:
                with pytest.raises(EngineError) as refused:
                    guest.publish(model(1), 0)
                if "no vLLM server answers" not in str(refused.value):
                    break
                assert time.monotonic() < limit
                time.sleep(0.2)
            assert "--worker-extension-cls sluice_worker.Weights" in str(refused.value)
    finally:
        bare.kill()
        bare.wait()


async def _until(holds: Any, poll_s: float = 0.01, limit_s: float = 60.0) -> None:
    """Asked in a thread, so that the engine goes on meanwhile."""
    async with asyncio.timeout(limit_s):
        while not await asyncio.to_thread(holds):
            await asyncio.sleep(poll_s)
