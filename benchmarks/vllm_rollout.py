"""Tokens per second of the embedded engine beside vLLM on the CPU: in one process, and as a server over HTTP.

The model, the prompts and the lengths are those of `rollout.py`; the sides are timed in turn, and only one works at a
time. `in_process` is vLLM's `LLM.generate` on all prompts at once. `server` is its OpenAI server, to which every prompt
goes as a request of its own with token ids, all at the same time. Lengths are forced by `ignore_eos` and `max_tokens`.
vLLM computes no log-probs here, and its prefix cache stays warm from one round to the next; ours starts empty.

vLLM may use every core (`VLLM_CPU_OMP_THREADS_BIND`), where by itself it leaves one to its other processes. Without
`--compile` it runs eagerly, which saves a minute or more of compilation at every start.

`make vllm` makes the environment that it runs in.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import sluice  # noqa: F401  before torch: sets GOMP_SPINCOUNT

# isort: split
from children import Child, ChildFailed, end
from measuring import DTYPES, ROOT, add_cases, in_turn, parser, ratios, reported, seconds, shown, skip, spread
from rollout import WARM_UP, Engine, work_of
from shapes import SHAPES, WINDOW, Work, model_of, save
from sluice.launch.models import set_up_process

HERE = Path(__file__).resolve().parent
START_LIMIT_S = 300


def variables(threads: int) -> dict[str, str]:
    """For vLLM's processes."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }


class InProcess:
    def __init__(self, model: Path, dtype: str, slots: int, args: argparse.Namespace) -> None:
        command = [args.vllm, HERE / "peers/vllm_in_process.py", "--model", model, "--dtype", dtype]
        command += ["--slots", slots, "--window", WINDOW, *([] if args.compile else ["--eager"])]
        self.child = Child(command, args.threads, **variables(args.threads))
        self.versions = self.child.first["versions"]

    def __call__(self, work: Work) -> float:
        answer = self.child.ask(prompts=work.prompts, new_tokens=work.new_tokens)
        assert answer["tokens"] == work.new_tokens
        return answer["seconds"]

    def close(self) -> None:
        self.child.close()


class Server:
    """`python -m vllm.entrypoints.openai.api_server`; the command `vllm` looks for a distribution of that name."""

    def __init__(self, model: Path, dtype: str, slots: int, args: argparse.Namespace) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        command = [args.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "m"]
        command += ["--dtype", dtype, "--max-num-seqs", slots, "--max-model-len", WINDOW, "--port", self.port]
        command += [
            "--host",
            "127.0.0.1",
            "--disable-uvicorn-access-log",
            *([] if args.compile else ["--enforce-eager"]),
        ]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the server runs
        fixed = {"GOMP_SPINCOUNT": "1000", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(args.threads)}
        environment = os.environ | fixed | variables(args.threads)
        words = [str(word) for word in command]
        self.process = subprocess.Popen(
            words, env=environment, stdout=self.log, stderr=self.log, start_new_session=True
        )
        try:
            self.versions = {"vllm": self._wait()}
        except BaseException:
            self.close()
            raise

    def _wait(self) -> str:
        """Its version, as soon as it answers."""
        limit = time.monotonic() + START_LIMIT_S
        while time.monotonic() < limit and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/version", timeout=5) as answer:
                    return json.load(answer)["version"]
            except OSError:
                time.sleep(0.5)
        self.log.seek(0)
        raise ChildFailed(f"vLLM's server did not start:\n{''.join(self.log.readlines()[-15:])}")

    def __call__(self, work: Work) -> float:
        return seconds(lambda: asyncio.run(self._all(work)))

    async def _all(self, work: Work) -> None:
        pairs = zip(work.prompts, work.new_tokens, strict=True)
        answered = await asyncio.gather(*(self._complete(prompt, length) for prompt, length in pairs))
        assert answered == work.new_tokens

    async def _complete(self, prompt: list[int], length: int) -> int:
        """Tokens of the completion of one prompt. By hand: an HTTP library would take more of the two cores than this."""
        body = json.dumps(
            {"model": "m", "prompt": prompt, "max_tokens": length, "temperature": 1.0, "ignore_eos": True}
        ).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        status, _, text = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert status.startswith(b"HTTP/1.1 200"), status + text
        return json.loads(text)["usage"]["completion_tokens"]

    def close(self) -> None:
        self.process.terminate()
        end(self.process)
        self.log.close()


WAYS = {"in_process": InProcess, "server": Server}


def measure(size: str, dtype: str, way: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    works = {kind: work_of(size, kind, args) for case, kind in args.cases if case == size}
    slots = max(work.num_slots for work in works.values())
    results = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        began = time.monotonic()
        vllm = stack.enter_context(closing(WAYS[way](save(folder, size), dtype, slots, args)))
        start_s = round(time.monotonic() - began, 1)
        for kind, work in works.items():
            engine = Engine(model_of(size, dtype), work.num_slots)
            for side in (engine, vllm):
                side(work.shortened(WARM_UP))
            sides = {"sluice": partial(engine, work), "vllm": partial(vllm, work)}
            found = in_turn(sides, args.rounds, warm_up=False)
            results.append(
                {
                    "size": size,
                    "dtype": dtype,
                    "way": way,
                    "lengths": kind,
                    "prompts": len(work.prompts),
                    "slots": work.num_slots,
                    "tokens": work.total,
                    "tokens_per_s": {name: spread([work.total / s for s in taken]) for name, taken in found.items()},
                    "sluice_over_vllm": ratios(found["vllm"], found["sluice"]),
                    "vllm_start_s": start_s,
                    "vllm_eager": not args.compile,
                    "versions": vllm.versions,
                }
            )
            tell(results[-1])
    return results


def tell(result: dict[str, Any]) -> None:
    print(
        f"{result['size']} {result['dtype']}, vLLM {result['way']}, {result['lengths']} lengths, {result['tokens']} tokens:"
    )
    for name, rate in result["tokens_per_s"].items():
        print(f"  {name:7} {shown(rate)} tokens/s")
    print(f"  sluice has {shown(result['sluice_over_vllm'], 2)} times vLLM's", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    add_cases(options, SHAPES, ["1M:uniform", "1M:rl_like", "100M:uniform"])
    options.add_argument("--ways", nargs="+", choices=WAYS, default=["server"])
    options.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    options.add_argument("--slots", type=int, help="sequences at once; left out, as in rollout.py")
    options.add_argument("--new-tokens", type=int, default=32, help="of uniform lengths")
    options.add_argument("--longest", type=int, default=512, help="of rl_like lengths")
    options.add_argument("--compile", action="store_true", help="let vLLM compile the model")
    options.add_argument("--vllm", type=Path, default=ROOT / ".venv-vllm/bin/python", help="python that has vLLM")
    args = options.parse_args(argv)
    set_up_process(None)
    with reported("vllm_rollout", args, argv) as said:
        if not args.vllm.exists():
            skip(said, f"vLLM, since there is no {args.vllm}: `make vllm` makes it")
            return
        for size in dict(args.cases):
            for way in args.ways:
                for dtype in args.dtypes:
                    try:
                        said["results"] += measure(size, dtype, way, args)
                    except ChildFailed as error:
                        skip(said, f"vLLM {way} at {size} {dtype}: {error}")


if __name__ == "__main__":
    main()
