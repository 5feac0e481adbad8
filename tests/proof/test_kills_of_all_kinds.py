"""Each kind of process that a run has is killed at random instants: no sample is lost, none is trained twice, and none outlives its run.

`KILLS_SEED=7 python -m pytest -s -m proof tests/proof/test_kills_of_all_kinds.py` takes another seed than 0, and prints what was killed.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import cycle, islice
from pathlib import Path
from typing import TypeVar

import pytest

from conftest import ROOT
from processes import command, living_in, parent_of
from ray_clusters import cluster_of_this_machine, short_folder
from same import consumed_prompts
from sluice.tracking import ledger
from sluice.tracking.rundir import RunDir
from small_runs import events_of, ledger_of, make_architecture, set_up

T = TypeVar("T")
NUM_KILLS, LIMIT_S, LEAVE_LIMIT_S = 20, 300.0, 30.0
SEED = int(os.environ.get("KILLS_SEED", "0"))
VLLM = ROOT / ".venv-vllm/bin/python"
REWARD = """\
import time


def slow_share(prompt, trajectory):
    time.sleep(0.01)
    return sum(c.islower() for c in trajectory.response) / max(1, trajectory.num_response_tokens)
"""
ENVIRONMENT = """\
import asyncio

from sluice.types import Trajectory


async def pauses(prompt, policy):
    await policy.respond(prompt.messages)
    await asyncio.sleep(0.02)
    return Trajectory(policy.turns)
"""
WORDS = (
    *("train", "config.yaml", "run.name=killed", "run.num_steps=100000", "run.num_threads=1"),
    *("checkpoint.auto_resume=true", "checkpoint.every_steps=3", "trainer.learning_rate=1e-5"),
    *("engine.num_threads=1", "engine.max_restarts=20", "rollout.max_staleness=1", "rollout.max_new_tokens=40"),
    *("rewards=[{name: slow_reward:slow_share}]", "reward_workers=2"),
)
ENGINES = ("engine.process=own", "engine.replicas=2")
ENVIRONMENTS = ("rollout.environment=pausing:pauses", "rollout.environment_workers=2")
RANKS = ("trainer.name=fsdp", "trainer.num_ranks=2", "trainer.num_threads=1")
SERVER = ("engine.name=vllm", f"engine.python={VLLM}", "model.random_weights=true")
WORLDS = {
    "processes": (*ENGINES, *ENVIRONMENTS),
    "ranks": (*ENGINES, *RANKS),
    "ray": (*ENGINES, *ENVIRONMENTS, *RANKS, "placement.name=ray"),
    "vllm": SERVER,
}
KINDS = {
    "processes": ("driver", "engine", "reward", "environment"),
    "ranks": ("driver", "rank", "engine"),
    "ray": (
        *("driver", "engine", "engine's actor", "rank", "rank's actor", "reward", "reward's actor"),
        *("environment", "environment's actor"),
    ),
    "vllm": ("driver", "server", "server's core", "server's guard"),
}
COMMANDS = {
    "engine": "from sluice.engines.serving import",
    "rank": "from sluice.trainers.rank import",
    "reward": "from sluice.rewards.worker import",
    "environment": "from sluice.environments.serving import",
    "server": "-m vllm.entrypoints",
    "server's core": "VLLM::EngineCore",
    "server's guard": "from sluice.engines.guard import",
}
ACTOR = "ray::_Host"
LAST_WORDS = r"trainer rank [01] (of 2|could not be started): .*(SIGKILL|Ray actor)"
"""Of a run of which a rank was killed."""


class KilledRun:
    """A run of which processes are killed; the command that began it goes on with it."""

    def __init__(self, folder: Path, words: Sequence[str], env: Mapping[str, str]) -> None:
        self.folder, self.path, self.env = folder, folder / "runs/killed", {**os.environ, **env}
        self.command = [Path(sys.executable).with_name("sluice"), *WORDS, *words]
        self.kills, self.num_started, self.began = Counter[str](), 0, time.monotonic()
        self.hit: dict[int, int] = {}
        """Engines of this driver that were killed, by their process groups, and after how many steps."""
        self.most_deaths = self.least_deaths = 0
        """Of engines, that earlier drivers had to tell of; it may die itself before it does."""
        self.start()

    def start(self) -> None:
        self.num_started += 1
        self.said = self.folder / f"said-{self.num_started:02d}.txt"
        with self.said.open("w") as output:
            self.driver = subprocess.Popen(
                self.command, cwd=self.folder, env=self.env, stdout=output, stderr=subprocess.STDOUT
            )

    def num_steps(self) -> int:
        metrics = self.path / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def wait_for(self, condition: Callable[[], T]) -> T:
        """What it gives when that is something."""
        end = time.monotonic() + LIMIT_S
        while not (found := condition()):
            assert self.driver.poll() is None, self.said.read_text()
            assert time.monotonic() < end, self.said.read_text()
            time.sleep(0.02)
        return found

    def victims(self, kind: str) -> list[tuple[int, int]]:
        """Processes of a kind, each with the process group that ends with it."""
        if kind == "driver":
            return [(self.driver.pid, self.driver.pid)]
        of = kind.removesuffix("'s actor")
        found: list[tuple[int, int]] = []
        for pid in (pid for pid, words in living_in(self.folder).items() if COMMANDS[of] in words):
            with suppress(OSError):
                victim = pid if of == kind else parent_of(pid)
                if of == kind or ACTOR in command(victim):  # else it has died, and somebody else is the parent
                    found.append((victim, os.getpgid(pid)))
        return found

    def kill(self, kind: str, rng: random.Random) -> None:
        if rng.random() < 0.5:  # after a step, else perhaps while something is starting
            before = self.num_steps()
            self.wait_for(lambda: self.num_steps() != before)
        time.sleep(rng.uniform(0, 2))
        victim, group = rng.choice(self.wait_for(lambda: self.victims(kind)))
        os.kill(victim, signal.SIGKILL)
        self.kills[kind] += 1
        print(f"{time.monotonic() - self.began:6.1f} s, after {self.num_steps()} steps: {kind} ({victim})", flush=True)
        if kind == "driver":
            self.driver.wait()
        elif kind.startswith("rank"):
            assert self.driver.wait(LIMIT_S) == 1
            assert re.search(LAST_WORDS, self.said.read_text()), self.said.read_text()
        elif not kind.startswith(("reward", "environment")):
            self.hit.setdefault(group, self.num_steps())
        if self.driver.returncode is not None:
            self.count_deaths()
            left = living_in(self.folder).keys()
            self.start()
            wait_until_gone(lambda: left & living_in(self.folder).keys())

    def count_deaths(self) -> None:
        """Of this driver's engines. That one died is told with the second publication after it at the latest."""
        self.most_deaths += len(self.hit)
        self.least_deaths += sum(self.num_steps() >= steps + 3 for steps in self.hit.values())
        self.hit.clear()

    def stop(self) -> str:
        """Three steps later."""
        before = self.num_steps()
        self.wait_for(lambda: self.num_steps() >= before + 3)
        self.driver.terminate()
        self.driver.wait(LIMIT_S)
        self.count_deaths()
        return self.said.read_text()


def wait_until_gone(processes: Callable[[], Collection[object]]) -> None:
    end = time.monotonic() + LEAVE_LIMIT_S
    while left := processes():
        assert time.monotonic() < end, left
        time.sleep(0.1)


@contextmanager
def surroundings(world: str) -> Iterator[tuple[tuple[str, ...], dict[str, str], Callable[[], object]]]:
    """Settings and environment of a run in that world, and its processes that are not in its folder."""
    if world == "vllm" and not VLLM.exists():
        pytest.skip("`make vllm` installs vLLM, which this test needs")
    if world != "ray":
        yield (), {}, lambda: ()
        return
    pytest.importorskip("ray")
    with short_folder() as folder, cluster_of_this_machine(8, folder) as (address, env):
        yield (f"placement.address={address}",), env, lambda: actors(folder)


def actors(cluster: str) -> list[int]:
    """Of ours, in the cluster whose files are in that folder."""
    found: list[int] = []
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        with suppress(OSError):
            if ACTOR in command(pid) and cluster in command(parent_of(pid)):
                found.append(pid)
    return found


@pytest.mark.proof
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("world", WORLDS)
def test_twenty_kills_of_all_kinds_cost_no_sample(world: str, tmp_path: Path):
    set_up(tmp_path)
    if world == "vllm":
        make_architecture(tmp_path / "model", "".join(map(chr, range(32, 127))), head_dim=32, hidden_size=64)
    (tmp_path / "slow_reward.py").write_text(REWARD)
    (tmp_path / "pausing.py").write_text(ENVIRONMENT)
    rng = random.Random(SEED)
    print(f"\n{world}, KILLS_SEED={SEED}")
    kinds = list(islice(cycle(KINDS[world]), NUM_KILLS))
    rng.shuffle(kinds)
    with surroundings(world) as (words, env, elsewhere):
        run = KilledRun(tmp_path, (*WORLDS[world], *words), env)
        try:
            for kind in kinds:
                run.kill(kind, rng)
            said = run.stop()
        finally:
            run.driver.kill()
        wait_until_gone(lambda: [*living_in(tmp_path).values(), *elsewhere()])
    assert "stopped by SIGTERM" in said
    steps = ledger.steps(RunDir(run.path))
    assert steps == [*range(1, len(steps) + 1)]
    trained = Counter((r["group"], r["index"]) for step in steps for r in ledger_of(run.path, step) if r["trained"])
    groups = [group for group, _, is_trained in consumed_prompts(run.path, len(steps)) if is_trained]
    assert trained == {(group, index): 1 for group in groups for index in range(4)}
    events = Counter(event["kind"] for event in events_of(run.path))
    assert run.least_deaths <= events["engine_died"] <= run.most_deaths
    print(f"kills: {dict(run.kills)}; {len(steps)} steps, {trained.total()} samples, each trained once")
    print(f"events: {dict(events)}; deaths of engines: {run.least_deaths} to {run.most_deaths}")
