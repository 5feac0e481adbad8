"""Opens a JSONL file as `sluice train` does and draws prompts from it: a child of `growth.py`."""

from __future__ import annotations

import sys

from children import Served, forget_peak, resident_mib
from measuring import seconds
from sluice.data.prompts import PromptStream, load_prompts
from sluice.data.sources import open_rows

DRAWN = 1000


def open_and_draw(path: str) -> None:
    prompts = load_prompts(open_rows(path), prompt="prompt", reference="answer")
    stream = PromptStream(prompts, seed=0, shuffle=True)
    for position in range(DRAWN):
        _ = stream[position]


def main() -> None:
    served = Served()
    before = resident_mib("VmRSS")
    forget_peak()
    taken = seconds(lambda: open_and_draw(sys.argv[1]))
    served.next({"seconds": taken, "resident_mib": before, "peak_mib": resident_mib("VmHWM")})


if __name__ == "__main__":
    main()
