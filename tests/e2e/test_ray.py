"""Engines, reward and environment processes in a Ray cluster: the same run as on one machine, through kill -9 too, with its words and errors."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from ray_clusters import joined_by_runs
from sluice.launch.checked import num_cores
from sluice.viewer import report
from small_runs import (
    events_of,
    finished,
    ledger_of,
    metrics_of,
    set_up,
    sluice,
    started,
    without_timings,
    workplace,
)

STEPS = 6
APART = ("engine.process=own", "engine.replicas=2", "engine.num_threads=1", f"run.num_steps={STEPS}")
REWARD = """\
import os
import sys


def loud_share(prompt, trajectory):
    print("scored for", os.environ["GREETING"], flush=True)
    return sum(c.islower() for c in trajectory.response) / max(1, trajectory.num_response_tokens)


def broken(prompt, trajectory):
    raise LookupError("no answer in the book")
"""
ENVIRONMENT = """\
import asyncio
import os

from sluice.types import Trajectory


async def talk(prompt, policy):
    print(f"plays for {os.environ['GREETING']}\\n", end="", flush=True)
    reply = await policy.respond(prompt.messages)
    await asyncio.sleep(0.2)
    await policy.respond([{"role": "user", "content": reply["content"]}])
    return Trajectory(policy.turns)


async def broken(prompt, policy):
    await policy.respond(prompt.messages)
    raise LookupError("no such room")
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, str]]:
    with joined_by_runs(4) as settings:
        yield settings


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(report, "write_report", lambda run: None)
    with workplace(tmp_path, monkeypatch):
        set_up(tmp_path)
        (tmp_path / "loud.py").write_text(REWARD)
        (tmp_path / "talks.py").write_text(ENVIRONMENT)
        yield tmp_path


def processes(module: str) -> list[int]:
    """Of runs that were started in the current folder."""
    found: list[int] = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            is_one = f"from {module} import serve" in cmdline.read_text()
            if is_one and os.readlink(cmdline.with_name("cwd")) == os.getcwd():
                found.append(int(cmdline.parent.name))
    return found


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def trained(run: Path, steps: int = STEPS) -> list[dict[str, object]]:
    return [row for step in range(1, steps + 1) for row in ledger_of(run, step) if row["trained"]]


def test_it_is_the_run_on_one_machine_to_the_last_bit(ready: Path, cluster: tuple[str, str]):
    """Every column of the ledger and every metric; the processes are gone afterwards, and the cluster stays for another run."""
    here = finished("train", "config.yaml", *APART)
    there = finished("train", "config.yaml", *APART, *cluster, "reward_workers=2", name="there")
    for step in range(1, STEPS + 1):
        assert ledger_of(here, step) == ledger_of(there, step)
    assert without_timings(metrics_of(here)) == without_timings(metrics_of(there))
    end = time.monotonic() + 10
    while processes("sluice.engines.serving") + processes("sluice.rewards.worker"):
        assert time.monotonic() < end, "a process outlived its run"
        time.sleep(0.1)


VICTIMS: dict[str, Callable[[], list[int]]] = {
    "engine": lambda: processes("sluice.engines.serving"),
    "engine's actor": lambda: [parent_of(pid) for pid in processes("sluice.engines.serving")],
    "reward process": lambda: processes("sluice.rewards.worker"),
    "reward's actor": lambda: [parent_of(pid) for pid in processes("sluice.rewards.worker")],
}
ENVIRONMENTS: dict[str, Callable[[], list[int]]] = {
    "environment process": lambda: processes("sluice.environments.serving"),
    "environment's actor": lambda: [parent_of(pid) for pid in processes("sluice.environments.serving")],
}


class Killer(threading.Thread):
    """kill -9 of each kind in turn, each a step after the one before."""

    def __init__(self, run: Path, victims: dict[str, Callable[[], list[int]]] = VICTIMS) -> None:
        super().__init__(daemon=True)
        self.run_folder, self.victims, self.killed, self.over = run, victims, Counter[str](), threading.Event()

    def run(self) -> None:
        for number, (kind, pids) in enumerate(self.victims.items(), start=1):
            while not self._has_steps(number):
                if self.over.wait(0.01):
                    return
            for pid in pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    self.killed[kind] += 1

    def _has_steps(self, number: int) -> bool:
        path = self.run_folder / "metrics.jsonl"
        return path.exists() and path.read_bytes().count(b"\n") >= number


@pytest.mark.proof
def test_killed_processes_and_killed_actors_cost_no_sample(ready: Path, cluster: tuple[str, str]):
    """Nothing is lost and nothing trained twice; the samples are those of the run without kills."""
    killer = Killer(Path("runs/killed"))
    killer.start()
    words = ("reward_workers=2", "rollout.max_new_tokens=40", "trainer.learning_rate=1e-4")
    killed = finished("train", "config.yaml", *APART, *words, *cluster, name="killed")
    killer.over.set()
    killer.join()
    assert set(killer.killed) == set(VICTIMS), killer.killed
    died = [event["message"] for event in events_of(killed) if event["kind"] == "engine_died"]
    assert len(died) == killer.killed["engine"] + killer.killed["engine's actor"]
    for replica in range(2):
        own = [message for message in died if f"(engine-{replica} on node" in message]
        assert "was killed (SIGKILL" in own[0]
        assert "its Ray actor died" in own[1]
    rows = trained(killed)
    assert Counter((row["group"], row["index"]) for row in rows) == Counter(
        {(group, index): 1 for group in range(4 * STEPS) for index in range(4)}
    )
    whole = trained(finished("train", "config.yaml", *APART, *words, name="whole"))
    assert [row["token_ids"] for row in rows] == [row["token_ids"] for row in whole]
    assert [row["reward"] for row in rows] == [row["reward"] for row in whole]


def test_environments_play_there_as_they_play_here(
    ready: Path, cluster: tuple[str, str], monkeypatch: pytest.MonkeyPatch
):
    """Through the deaths of processes and of actors; what they print and what they raise comes back."""
    monkeypatch.setenv("GREETING", "nobody")
    words = ("rollout.environment=talks:talk", f"run.num_steps={STEPS}", "trainer.learning_rate=1e-4")
    here = finished("train", "config.yaml", *words)
    killer = Killer(Path("runs/there"), ENVIRONMENTS)
    killer.start()
    there = (
        *cluster,
        "rollout.environment_workers=2",
        "placement.environment_cpus=0.5",
        "placement.env={GREETING: you}",
    )
    run = finished("train", "config.yaml", *words, *there, name="there")
    killer.over.set()
    killer.join()
    assert killer.killed == dict.fromkeys(ENVIRONMENTS, 2)
    for name in ("group", "index", "token_ids", "reward", "trained"):
        assert [row[name] for row in trained(run)] == [row[name] for row in trained(here)]
    died = [event["message"] for event in events_of(run) if event["kind"] == "environment_died"]
    assert sum("its process was killed (SIGKILL" in message for message in died) == 2
    assert sum("its Ray actor died" in message for message in died) == 2
    said = (run / "environments.log").read_text().splitlines()
    assert all("on node" in line and line.endswith(") plays for you") for line in said)
    assert {line.split()[0] for line in said} == {"(environment-0", "(environment-1"}
    assert sluice("train", "config.yaml", *words, *there, "rollout.environment=talks:broken", "run.name=broken") == 1
    assert "LookupError: no such room at " in str(events_of(Path("runs/broken")))


def test_a_cluster_of_its_own_brings_words_variables_and_errors_back_and_says_nothing_else(
    ready: Path, capfd: pytest.CaptureFixture[str]
):
    """One command, no address. What rewards print is in rewards.log under their names, and what they raise in the ledger."""
    words = ("placement.name=ray", "placement.env={GREETING: you}", "run.num_steps=2", "reward_workers=2")
    run = finished("train", "config.yaml", *words, "rewards=[{name: loud:loud_share}]")
    said = (run / "rewards.log").read_text().splitlines()
    assert len(said) == 32
    assert all("on node" in line and line.endswith(") scored for you") for line in said)
    assert {line.split()[0] for line in said} <= {"(reward-0", "(reward-1"}
    console = capfd.readouterr()
    lines = [line for line in (console.out + console.err).splitlines() if not line.startswith("placement ")]
    assert [line for line in lines if "ray" in line.replace("array", "").lower()] == []
    assert [line for line in console.out.splitlines() if line.startswith("2/2")] != []


def test_a_cluster_of_its_own_wants_a_token_and_leaves_none_behind(ready: Path, monkeypatch: pytest.MonkeyPatch):
    """In a process of its own: Ray would put one into the user's home, which the next `ray start` asks for."""
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("HOME", str(ready))
    words = ("train", "config.yaml", "placement.name=ray", "run.num_steps=1", "run.name=alone", "run.num_threads=1")
    run = started(*words, cwd=ready)
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 0, said
    assert not (ready / ".ray").exists()


def test_what_a_reward_raises_reaches_the_driver(
    ready: Path, cluster: tuple[str, str], capfd: pytest.CaptureFixture[str]
):
    words = ("run.name=test", "run.num_threads=1", "rewards=[{name: loud:broken}]", "checks.outcome_budget=off")
    assert sluice("train", "config.yaml", *cluster, *words) == 1
    assert "LookupError: no answer in the book" in capfd.readouterr().err


def test_a_folder_that_the_other_machine_lacks_is_named(ready: Path, cluster: tuple[str, str]):
    """As a machine sees it that does not share the folder of the run."""
    from sluice.distributed.cluster import Cluster, Place
    from sluice.distributed.process import RayProcess
    from sluice.errors import PlacementError

    address = cluster[1].partition("=")[2]
    joined = Cluster(address, num_cpus=1, variables={}, start_limit_s=60, lost_after_s=10)
    try:
        joined.reserve([[Place("engine-0", cpus=1)]], "PACK")
        launch = partial(RayProcess, joined, "engine-0")
        with pytest.raises(PlacementError, match="the folder /only/here, in which the run was started, does not exist"):
            launch("sluice.engines.serving", path=[], folder="/only/here", log=None, variables={}).connect()
        closed = launch("sluice.rewards.worker", path=[], folder="/", log=None, variables={})
        threading.Timer(0.2, closed.kill).start()
        start = time.monotonic()
        with pytest.raises(PlacementError, match="engine-0 was closed while it started"):
            closed.connect()
        assert time.monotonic() - start < 20
    finally:
        joined.close()


def test_check_says_whether_there_is_room(
    ready: Path, cluster: tuple[str, str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sluice.preflight.places.LIMIT_S", 1.0)
    words = ("check", "--offline", "config.yaml", "engine.process=own", *cluster)
    assert sluice(*words) == 0
    address = cluster[1].partition("=")[2]
    assert f"places    ok       room for 2 places at {address}: 2 CPUs, 0 GPUs" in capfd.readouterr().out
    assert sluice(*words, "engine.replicas=4", "engine.num_threads=1") == 2
    said = capfd.readouterr().out
    assert "failure: the Ray cluster has no room for the run" in said
    assert "engine-3: 1 CPU" in said
    assert sluice(*words, "placement.address=127.0.0.1:9") == 2
    assert "no Ray cluster could be joined" in capfd.readouterr().out


def test_check_counts_cores_for_a_cluster_of_this_machine_and_starts_none(
    ready: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sluice.distributed.cluster.ray.init", lambda **_: pytest.fail("it was started"))
    words = ("check", "--offline", "config.yaml", "placement.name=ray", "engine.process=own")
    assert sluice(*words, f"placement.engine_cpus={num_cores()}") == 0
    said = capfd.readouterr().out
    assert f"placement reserves {num_cores() + 1} CPUs, and this machine has {num_cores()} cores" in said
    assert sluice(*words, "placement.engine_cpus=0.5", "placement.reward_cpus=0.5") == 0
    assert f"places    ok       1 CPUs of this machine's {num_cores()}" in capfd.readouterr().out
    environments = ("rollout.environment=talks:talk", "rollout.environment_workers=2", "placement.environment_cpus=0.5")
    assert sluice(*words, *environments, "placement.engine_cpus=0.5", "placement.reward_cpus=0.5") == 0
    assert "2 CPUs of this machine's" in capfd.readouterr().out


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray leaves what it had started to us
@pytest.mark.parametrize("during", ["init", "reserve"])
def test_a_sigterm_while_ray_is_waited_for_is_no_failure(
    ready: Path, during: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """While it starts, and while there is no room."""
    from sluice.distributed import cluster

    where: tuple[Any, str] = {"init": (cluster.ray, "init"), "reserve": (cluster.Cluster, "reserve")}[during]
    original = getattr(*where)

    def interrupted(*arguments: Any, **named: Any) -> Any:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        return original(*arguments, **named)

    monkeypatch.setattr(*where, interrupted)
    monkeypatch.setattr(cluster.Cluster, "_can_never_hold", lambda *_: False)
    assert sluice("train", "config.yaml", "placement.name=ray", "engine.process=own", "placement.engine_gpus=64") == 143
    assert "stopped by SIGTERM before the first step" in capfd.readouterr().err
    assert not cluster.ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    gc.collect()  # what Ray had started, here and not in another test


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["placement.address=127.0.0.1:9"], "placement.address=127.0.0.1:9: no Ray cluster could be joined"),
        (["placement.engine_cpus=2"], "placement.engine_cpus has no effect: no process is started for the engine"),
        (["engine.process=own", "placement.engine_gpus=64"], "no room for the run"),
        (["engine.process=own", "engine.publication=shared_memory"], "set engine.publication=broadcast"),
        (["placement.address=ray://head:10001"], "auto, HOST:PORT"),
    ],
)
def test_what_cannot_be_is_refused(ready: Path, words: list[str], complaint: str, capfd: pytest.CaptureFixture[str]):
    assert sluice("train", "config.yaml", "placement.name=ray", *words) != 0
    assert complaint in capfd.readouterr().err
    assert not Path("runs").exists()
