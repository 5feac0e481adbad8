"""Whatever a run waits for is named, on the console and in events.jsonl; and SIGUSR1 tells all that can be known of it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dry_runs import Workshop, finish
from makers import make_char_tokenizer
from rewards.rubrics import rubric_of
from sluice.engines.router import Router
from sluice.engines.scripted import ScriptedEngine
from sluice.rewards.spec import RewardSpec
from sluice.run import Run
from sluice.tracking.rundir import RunDir
from sluice.train import train
from sluice.trainers.dry import DryTrainer
from sluice.types import Completion, Prompt, Trajectory
from sluice.waits import Waits
from sluice.watchdog import Watchdog
from small_runs import ALPHABET, events_of, started, write_config, write_rows

WARN_AFTER_S = 0.2
STARTED_WITHIN_S = 60


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop.make(tmp_path_factory.mktemp("workshop"))


class Told:
    """A tracker for what comes from the watchdog's thread."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.details: list[dict[str, Any]] = []

    def event(self, kind: str, message: str, **details: Any) -> None:
        if kind == "waiting":
            self.messages.append(message)
            self.details.append(details)

    def log(self, *_: Any) -> None: ...

    def log_groups(self, *_: Any) -> None: ...

    def close(self) -> None: ...


def told_of(run: Run, folder: Path, until: Callable[[Told], bool], warn_after_s: float | None = WARN_AFTER_S) -> Told:
    """What the watchdog says of a run that hangs, until it has said enough."""
    told = Told()
    run.tracker = told

    async def watched() -> None:
        with Watchdog(run.waits, told, RunDir(folder), warn_after_s, {"engine": run.engine.status}).watching():
            work = asyncio.create_task(train(run))
            async with asyncio.timeout(10):
                while not until(told) and not work.done():  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    finish(watched())
    return told


def once(told: Told) -> bool:
    return bool(told.messages)


async def asks_then_waits(prompt: Prompt, policy: Any) -> Trajectory:
    await policy.respond(prompt.messages)
    if prompt.id == "q7":
        await asyncio.Event().wait()
    return Trajectory(policy.turns)


async def asks_then_blocks(prompt: Prompt, policy: Any) -> Trajectory:
    await policy.respond(prompt.messages)
    if prompt.id == "q7" and not blocked:
        blocked.append(prompt.id)
        time.sleep(3 * WARN_AFTER_S)  # noqa: ASYNC251  # what no environment should do
    return Trajectory(policy.turns)


blocked: list[str] = []


class StuckEngine(ScriptedEngine):
    """Answers every prompt but one."""

    def __init__(self, workshop: Workshop) -> None:
        super().__init__(workshop.digits)
        self.stuck_on = workshop.chat.encode([{"role": "user", "content": "task 7"}])

    async def generate(self, prompt_ids: Any, sampling: Any) -> Completion:
        if prompt_ids == self.stuck_on:
            await asyncio.Event().wait()
        return await super().generate(prompt_ids, sampling)


def test_an_environment_that_waits_for_ever_is_named(workshop: Workshop, tmp_path: Path):
    told = told_of(workshop.run(environment=asks_then_waits), tmp_path, once)
    assert re.match(r"0\.\d s on rollout \d+\.0, turn 1, environment, prompt q7; \d others: ", told.messages[0])
    assert "1 environment" in told.messages[0], "the other attempt at the prompt"
    assert "1 rollout" in told.messages[0], "the loop itself waits too, and is not to blame"
    assert told.details[0]["details"] == "prompt q7"
    assert not told.details[0]["event_loop_at"]


def test_an_environment_that_blocks_the_event_loop_is_named_with_its_line(workshop: Workshop, tmp_path: Path):
    """The watchdog is a thread: nothing on the event loop could say a word."""
    blocked.clear()
    told = told_of(workshop.run(environment=asks_then_blocks), tmp_path, once)
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "what no environment" in text)
    assert re.match(r"0\.\d s on rollout \d+\.0, turn 1, environment, prompt q7; ", told.messages[0])
    assert told.messages[0].endswith(f"{__file__}:{line}")
    assert "the event loop has not run for 0 s" in told.messages[0]


def test_an_engine_that_never_answers_is_named(workshop: Workshop, tmp_path: Path):
    """With what it says itself, such as the number of its process."""
    told = told_of(workshop.run(engine=StuckEngine(workshop)), tmp_path, once)
    assert re.match(r"0\.\d s on rollout \d+\.0, turn 1, engine, prompt q7; ", told.messages[0])
    assert "; the engine: 0 completions wait for their delay; weights of version" in told.messages[0]


def test_an_engine_that_says_who_it_is_is_named_once(workshop: Workshop, tmp_path: Path):
    router = Router([StuckEngine(workshop)], synchronous=True, max_restarts=0, group_size=4)
    told = told_of(workshop.run(engine=router), tmp_path, once)
    assert told.messages[0].count("the engine: ") == 1


def test_a_reward_that_hangs_is_named_and_not_those_that_wait_for_its_process(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A real process. With one process all others have waited longer than the reward itself has run."""
    (tmp_path / "stuck.py").write_text("import time\ndef f(prompt, trajectory):\n    time.sleep(60)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    with rubric_of(RewardSpec("hanging", "stuck:f", timeout_s=60)) as rubric:
        asyncio.run(rubric.start())
        told = told_of(workshop.run(rubric=rubric), tmp_path, once)
    assert re.match(r"0\.\d s on rollout \d+\.\d, turn 1, reward hanging, prompt q\d+; ", told.messages[0])
    assert "5 a free reward process" in told.messages[0]


def test_a_queue_behind_nothing_is_named_too(workshop: Workshop, tmp_path: Path):
    """As when a ticket was lost: nobody works, and the loop waits. Between two groups that is so for a moment only."""
    run = workshop.run()

    async def lost(count: int) -> Any:
        await asyncio.Event().wait()

    run.buffer.take = lost
    told = told_of(run, tmp_path, once)
    assert re.fullmatch(r"0\.\d s on the loop after step 0, rollout", told.messages[0])
    assert told.details[0]["age_s"] < 3 * WARN_AFTER_S


def test_training_is_named_with_the_update(workshop: Workshop, tmp_path: Path):
    class Slow(DryTrainer):
        async def forward_backward(self, minibatch: Any, loss: Any) -> Any:
            time.sleep(2 * WARN_AFTER_S if len(self.updates) == 3 else 0)  # noqa: ASYNC251
            return await super().forward_backward(minibatch, loss)

    told = told_of(workshop.run(trainer=Slow()), tmp_path, lambda told: False)
    assert len(told.messages) == 1
    assert re.match(
        r"0\.\d s on the loop after step 1, update 2 of 2, train; .*test_watchdog.py:\d+$", told.messages[0]
    )


def test_it_repeats_at_doubling_intervals(workshop: Workshop, tmp_path: Path):
    """Three lines within 8 × the threshold, not one every time it looks."""
    told = told_of(
        workshop.run(environment=asks_then_waits),
        tmp_path,
        lambda told: told.details[-1:] and told.details[-1]["age_s"] > 1.5,
    )  # type: ignore[arg-type, return-value]
    ages = [details["age_s"] for details in told.details]
    assert len(ages) == 4
    for age, due in zip(ages, (0.2, 0.4, 0.8, 1.6), strict=True):
        assert due <= age + 0.05 < due + 0.3


def test_what_takes_long_in_every_step_is_told_once(workshop: Workshop, tmp_path: Path):
    async def slow(prompt: Prompt, policy: Any) -> Trajectory:
        await asyncio.sleep(1.2 * WARN_AFTER_S)
        await policy.respond(prompt.messages)
        return Trajectory(policy.turns)

    told = told_of(workshop.run(environment=slow, num_steps=5), tmp_path, lambda told: False)
    assert len(told.messages) == 1


def test_a_sound_run_is_left_alone_and_null_turns_it_off(workshop: Workshop, tmp_path: Path):
    """Work of many short stages is no wait, however long it takes together; a threshold of none is never reached."""

    async def turns(prompt: Prompt, policy: Any) -> Trajectory:
        messages = list(prompt.messages)
        for _ in range(6):
            await asyncio.sleep(0.3)
            messages += [await policy.respond(messages), {"role": "user", "content": "go on"}]
        return Trajectory(policy.turns)

    run = workshop.run(environment=turns, num_steps=1)
    assert told_of(run, tmp_path, lambda told: False, warn_after_s=1.5).messages == []
    start = time.monotonic()
    stuck = workshop.run(environment=asks_then_waits)
    told = told_of(stuck, tmp_path, lambda told: time.monotonic() - start > 1.0, warn_after_s=None)
    assert told.messages == []


def test_it_leaves_nothing_behind(tmp_path: Path):
    """Neither a thread, nor a handler, nor an empty file."""
    before = signal.getsignal(signal.SIGUSR1)

    async def nothing() -> None:
        with Watchdog(Waits(), Told(), RunDir(tmp_path), 1.0, {}).watching():
            assert any(thread.name == "watchdog" for thread in threading.enumerate())

    asyncio.run(nothing())
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGUSR1) is before
    code = "import os, signal\nfrom sluice.watchdog import *\n"
    code += "async def f(path):\n    with Watchdog(Waits(), None, RunDir(path), 1.0, {}).watching(): pass\n"
    code += "import sys, pathlib\nasyncio.run(f(pathlib.Path(sys.argv[1])))\nos.kill(os.getpid(), signal.SIGUSR1)\n"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60).returncode == -signal.SIGUSR1


def test_the_list_can_be_read_while_it_is_written():
    """From another thread, many times; a stage is seen whole or not at all."""
    waits, end = Waits(), threading.Event()

    def write(number: int) -> None:
        while not end.is_set():
            with waits(f"rollout {number}", "a", "prompt") as wait:
                time.sleep(1e-4)  # lets another thread in
                wait.at("b", "turn 1")
                time.sleep(1e-4)
                wait.at("c", "", queued=True)
                time.sleep(1e-4)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    try:
        seen: set[tuple[str, str, bool]] = set()
        deadline = time.monotonic() + 20
        while len(seen) < 3 and time.monotonic() < deadline:
            seen |= {(s.stage.name, s.stage.place, s.stage.queued) for s in waits.standing()}
            time.sleep(1e-4)
    finally:
        end.set()
        for thread in threads:
            thread.join()
    assert seen == {("a", "", False), ("b", "turn 1", False), ("c", "", True)}
    assert waits.standing() == []


# SIGUSR1, of real processes

ENVIRONMENTS = """\
import asyncio, itertools, time
from pathlib import Path
from sluice.types import Trajectory


async def waits(prompt, policy):
    await policy.respond(prompt.messages)
    Path("begun").touch()
    await asyncio.Event().wait()


async def blocks_in_c(prompt, policy):
    Path("begun").touch()
    sum(itertools.repeat(0, 10**13))  # one call of many hours in which no other thread runs


def answer(prompt_ids, sampling):
    return [20, 21, 1]


def one(prompt, trajectory):
    return 1.0


def slow(prompt, trajectory):
    Path("begun").touch()
    time.sleep(600)
"""


@contextmanager
def running(folder: Path, *settings: str) -> Iterator[subprocess.Popen[str]]:
    """A dry run as a process, once something has touched `begun`."""
    make_char_tokenizer(folder / "model", ALPHABET)
    write_rows(folder / "prompts.jsonl", [{"prompt": f"task {i}"} for i in range(20)])
    (folder / "stuck.py").write_text(ENVIRONMENTS)
    write_config(
        folder / "config.yaml",
        engine={"name": "scripted", "script": "stuck:answer"},
        trainer={"name": "dry"},
        rewards=[{"name": "stuck:one"}],
        run={"num_steps": 3, "name": "test"},
    )
    process = started("train", "config.yaml", *settings, cwd=folder)
    try:
        wait_until(lambda: process.poll() is not None or (folder / "begun").exists(), STARTED_WITHIN_S)
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until(true: Callable[[], Any], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, f"not within {limit_s} s"
        time.sleep(0.02)


def dumps(folder: Path) -> list[Path]:
    """Those that the event has told of, so whole."""
    return [folder / event["details"]["path"] for event in events_of(folder / "runs/test") if event["kind"] == "dump"]


def test_a_run_says_what_it_waits_for_and_everything_on_sigusr1_and_goes_on(tmp_path: Path):
    with running(
        tmp_path, "rollout.environment=stuck:waits", "rollout.timeout_s=6", "watchdog.warn_after_s=2"
    ) as process:
        for number in (1, 2):
            process.send_signal(signal.SIGUSR1)
            wait_until(lambda: len(dumps(tmp_path)) == number, 10)  # noqa: B023
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, "all attempts run into their time limit, as without the signal"
    assert "groups in a row without a single score" in output
    assert output.count("dump: the state of the run is in runs/test/dump-") == 2
    waiting = [event["message"] for event in events_of(tmp_path / "runs/test") if event["kind"] == "waiting"]
    assert len(waiting) == output.count("waiting: ")
    waiting = [message for message in waiting if "reward processes starting" not in message]  # on a busy machine
    assert len(waiting) == 2, "after 2 and 4 of 6 seconds"
    assert re.match(r"2\.\d s on rollout 0\.0, turn 1, environment, prompt prompts-\d+; 16 others: ", waiting[0])
    first, second = dumps(tmp_path)
    assert first != second
    text = first.read_text()
    for part in (
        r" s on rollout \d+\.\d, turn 1, environment, prompt prompts-\d+",
        r"0 of 3 steps are finished",
        r"0 of 4 slots free; tickets from 0 on below 4: handed in \[\], out \[0, 1, 2, 3\]",
        r"0 completions wait for their delay; weights of version 0",
        r"process \d+: idle",
        r'rollout 2\.3:\n(  File .*\n)*  File ".*stuck.py", line 9, in waits\n(  File .*\n)*  File ".*locks.py"',
        r"MainThread \(\d+\):\n  File",
        r"== threads at the signal, innermost frame first ==\n(Thread|Current thread) 0x",
    ):
        assert re.search(part, text), f"{part} is not in\n{text}"
    assert not (tmp_path / "runs/test/stacks.txt").exists()


def test_sigusr1_while_a_reward_hangs_names_its_process_and_kills_none(tmp_path: Path):
    with running(tmp_path, "rewards=[{name: stuck:slow, timeout_s: 5}]", "rollout.max_failed_groups=1") as process:
        time.sleep(1)
        os.kill(process.pid, signal.SIGUSR1)
        wait_until(lambda: dumps(tmp_path), 10)
        text = dumps(tmp_path)[0].read_text()
        found = re.search(r"process (\d+): reward slow for rollout 0\.0, prompt \S+, for [12]\.\d s", text)
        assert found, text
        os.kill(int(found.group(1)), signal.SIGUSR1)  # as a careless pkill does
        time.sleep(0.3)
        os.kill(int(found.group(1)), 0)
    log = (tmp_path / "runs/test/rewards.log").read_text()
    assert re.search(r"stuck.py\", line 27 in slow", log), log


def test_sigusr1_while_python_cannot_run_still_gives_the_stacks(tmp_path: Path):
    stacks = tmp_path / "runs/test/stacks.txt"
    with running(tmp_path, "rollout.environment=stuck:blocks_in_c") as process:
        time.sleep(0.2)
        process.send_signal(signal.SIGUSR1)
        wait_until(lambda: "in blocks_in_c" in stacks.read_text(), 5)
        assert "Current thread" in stacks.read_text()


def test_a_stage_is_cheap(workshop: Workshop):
    """What a run does for the watchdog per attempt, against the ten milliseconds at least that an attempt takes."""
    waits = Waits()

    def attempt() -> None:
        with waits("rollout 1.2", "environment", "prompt q7") as wait:
            for stage in ("engine", "environment", "a free reward process", "reward math", "the event loop"):
                wait.at(stage, "turn 1")

    start = time.perf_counter()
    for _ in range(2000):
        attempt()
    assert (time.perf_counter() - start) / 2000 < 1e-4
