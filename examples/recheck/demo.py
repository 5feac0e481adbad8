"""Train the base model of the recheck task (once), then train it with CISPO, and say what happened.

Everything goes through the `sluice` commands that any other model and data would go through.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from itertools import count
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent))
from task import write_task

ROOT = Path(__file__).resolve().parents[2]
SLUICE = Path(sys.executable).with_name("sluice")


def base_model(recheck_rate: float, seed: int) -> tuple[Path, Path]:
    """Folders of the base model and of its task; made once for each version of what they are made from."""
    sources = [ROOT / "recipes/recheck_base.yaml", Path(__file__).with_name("task.py")]
    made_from = b"".join(source.read_bytes() for source in sources) + f"{recheck_rate} {seed}".encode()
    name = f"recheck-{hashlib.sha256(made_from).hexdigest()[:8]}"
    task, run = ROOT / "runs" / name, ROOT / "runs" / f"{name}-base"
    done = sorted(run.glob("checkpoints/step-*"))
    if done:
        print(f"base model: {done[-1]} (made before)")
        return done[-1], task
    if run.exists():
        raise SystemExit(f"{run} is there but unfinished; remove it, and this makes it again")
    print("base model: a million parameters learn 3-digit additions from scratch, which takes a minute or two")
    write_task(task, recheck_rate, seed=seed)
    here = task.relative_to(ROOT)
    paths = [f"model.path={here}/model", f"data.path={here}/demonstrations.jsonl", f"run.seed={seed}"]
    sluice("sft", "recipes/recheck_base.yaml", f"run.name={run.name}", *paths)
    return sorted(run.glob("checkpoints/step-*"))[-1], task


def sluice(*words: str) -> None:
    command = [str(SLUICE), *words]
    print(f"\n$ sluice {' '.join(words)}", flush=True)
    if code := subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit(code)


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train(name: str, recheck_rate: float, seed: int, settings: list[str]) -> Path:
    """One run of the recipe from the base model; gives its folder."""
    model, task = base_model(recheck_rate, seed=0)
    paths = [f"model.path={model.relative_to(ROOT)}", f"data.path={task.relative_to(ROOT)}/questions.jsonl"]
    paths += [f"run.name={name}", f"run.seed={seed}"]
    sluice("train", "recipes/recheck.yaml", *paths, *settings)
    return ROOT / "runs" / name


def free_name(stem: str) -> str:
    return next(name for i in count(1) if not (ROOT / "runs" / (name := f"{stem}-{i}")).exists())


def tell(run: Path) -> None:
    steps = metrics_of(run)
    first, last = steps[:1], steps[-4:]
    print(f"\n{'':28} first batch   last 4 batches")
    for title, name in (
        ("reward", "rollout/reward"),
        ("recheck rate", "rollout/reward/recheck"),
        ("response length (tokens)", "rollout/response_len/mean"),
        ("clip fraction", "train/pg_clipfrac"),
    ):
        print(f"{title:28} {mean(s[name] for s in first):11.4f}   {mean(s[name] for s in last):14.4f}")
    print(f"\nEvery sample and every token of it: {run.relative_to(ROOT)}/report.html")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recheck-rate", type=float, default=0.03, help="share of demonstrations that recheck")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("settings", nargs="*", help="settings for sluice train, such as algorithm.name=dapo")
    args = parser.parse_args()
    tell(train(free_name("recheck-demo"), args.recheck_rate, args.seed, args.settings))


if __name__ == "__main__":
    main()
