"""A cluster of three machines, one of which is cut off in the middle of a run: no sample is lost, none is trained twice."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray")

from ray_clusters import SMALL, Machines, machines_can_be_made, new_secret, ray, short_folder
from small_runs import events_of, ledger_of, set_up

STEPS = 24
HEAD, *WORKERS = range(3)
PORT = 6391
LOST_AFTER_S = 10
ENVIRONMENT = """\
import asyncio

from sluice.types import Trajectory


async def pauses(prompt, policy):
    await policy.respond(prompt.messages)
    await asyncio.sleep(0.02)
    return Trajectory(policy.turns)
"""
NOTICING = {  # by Ray, of a machine that is gone: in seconds instead of a minute
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}

pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(
        not machines_can_be_made(), reason="network namespaces can be made by root alone, with iproute2"
    ),
]


@pytest.fixture
def machines() -> Iterator[tuple[Machines, dict[str, str]]]:
    """The run's own, where nothing else fits, and two with room for all of its processes."""
    env = {**new_secret(), **NOTICING}
    with short_folder() as folder, Machines(3) as machines:
        host = machines.addresses
        head = ("start", "--head", f"--node-ip-address={host[HEAD]}", f"--port={PORT}", "--num-cpus=0")
        ray(*head, f"--temp-dir={folder}", *SMALL, env=env, before=machines.inside(HEAD))
        for k in WORKERS:
            worker = ("start", f"--address={host[HEAD]}:{PORT}", f"--node-ip-address={host[k]}", "--num-cpus=4")
            ray(*worker, SMALL[0], env=env, before=machines.inside(k))
        yield machines, env


def wait_for(what: Callable[[], object], process: subprocess.Popen[str], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def num_steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def runs_on(machines: Machines, k: int, module: str) -> bool:
    return any(f"from {module} import serve".encode() in command(pid) for pid in machines.processes(k))


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_machine_that_is_cut_off_costs_no_sample(
    machines: tuple[Machines, dict[str, str]], tmp_path: Path, staleness: int
):
    cluster, env = machines
    set_up(tmp_path)
    (tmp_path / "pausing.py").write_text(ENVIRONMENT)
    words = ["config.yaml", f"run.num_steps={STEPS}", f"rollout.max_staleness={staleness}", "rollout.max_new_tokens=40"]
    words += ["engine.process=own", "engine.num_threads=1", "reward_workers=2", "trainer.learning_rate=1e-4"]
    words += ["rollout.environment=pausing:pauses", "rollout.environment_workers=2"]
    sluice = [Path(sys.executable).with_name("sluice"), "train", *words]
    placed = ["placement.name=ray", f"placement.address={cluster.addresses[HEAD]}:{PORT}"]
    placed += ["placement.environment_cpus=0.5", f"placement.lost_after_s={LOST_AFTER_S}", "run.name=cut"]
    run = tmp_path / "runs/cut"
    process = subprocess.Popen(
        [*cluster.inside(HEAD), *sluice, *placed],
        cwd=tmp_path,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(lambda: num_steps(run) >= 5, process, 240)
        (lost,) = [k for k in WORKERS if runs_on(cluster, k, "sluice.engines.serving")]
        before = num_steps(run)
        cluster.cut_off(lost)
        cut = time.monotonic()
        wait_for(lambda: num_steps(run) >= before + 4, process, 240)
        back = time.monotonic() - cut
        (other,) = {*WORKERS} - {lost}
        assert runs_on(cluster, other, "sluice.engines.serving")
        assert runs_on(cluster, other, "sluice.rewards.worker")
        assert runs_on(cluster, other, "sluice.environments.serving")
        said, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, said
    died = [event["message"] for event in events_of(run) if event["kind"] == "engine_died"]
    assert len(died) == 1
    assert f"engine-0 on node {cluster.addresses[lost]}" in died[0]
    rows = [row for step in range(1, STEPS + 1) for row in ledger_of(run, step)]
    assert Counter((row["group"], row["index"]) for row in rows if row["trained"]) == Counter(
        {(group, index): 1 for group in range(4 * STEPS) for index in range(4)}
    )
    assert {row["outcome"] for row in rows} == {"scored"}
    assert [event["kind"] for event in events_of(run) if event["kind"] == "resumed"] == []
    print(
        f"\nstaleness {staleness}: cut off after step {before}; 4 steps later {back:.0f} s had passed; {len(rows)} samples"
    )
    if staleness:
        return
    subprocess.run([*sluice, "run.name=whole"], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    whole = [row for step in range(1, STEPS + 1) for row in ledger_of(tmp_path / "runs/whole", step)]
    assert [row["token_ids"] for row in rows] == [row["token_ids"] for row in whole]
    assert [row["reward"] for row in rows] == [row["reward"] for row in whole]
