"""A search by hand: networks by seed, what became of them, and a tally by family.

python tests/random_families/search.py 0 2000 --log found.txt
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections import Counter
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("CO3D_STRICT_RULES", "1")

from random_families.examine import Outcome, examine
from random_families.sketch import Sketch, draw

PART = 125  # a new process imports for as long as four networks take


def smaller(sketch: Sketch, verdict: str) -> Sketch:
    """A network with fewer blocks and options that fails in the same way."""
    tries = [replace(sketch, blocks=sketch.blocks[:i] + sketch.blocks[i + 1 :]) for i in range(len(sketch.blocks))]
    for i, block in enumerate(sketch.blocks):
        for part in (block.a, block.b) if block.kind == "join" else ():
            tries.append(replace(sketch, blocks=sketch.blocks[:i] + part + sketch.blocks[i + 1 :]))
    plain = Sketch(())
    for name in (
        "inputs",
        "time_dim",
        "restore",
        "pulse",
        "batch",
        "captured",
        "places",
        "channels",
        "ends",
        "window",
        "dense",
    ):
        if getattr(sketch, name) != getattr(plain, name):
            tries.append(replace(sketch, **{name: getattr(plain, name)}))
    for one in tries:
        try:
            if one.blocks and examine(one).verdict == verdict:
                return smaller(one, verdict)
        except Exception:
            continue
    return sketch


def part_of(first: int, last: int, log: str, shrink: bool) -> list[tuple[int, Outcome, set[str]]]:
    """Examines the networks of some seeds."""
    import torch

    torch.set_num_threads(1)
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    results = []
    for seed in range(first, last):
        Path(f"{log}.now").write_text(str(seed))
        sketch = draw(seed)
        outcome = examine(sketch)
        results.append((seed, outcome, sketch.kinds()))
        if outcome.verdict != "right":
            found = smaller(sketch, outcome.verdict) if shrink else sketch
            why = examine(found).why
            with open(log, "a") as file:
                file.write(f"{seed} {outcome.verdict}: {why}\n    {found}\n")
    return results


def main() -> None:
    """Runs the search."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("--log", default="found.txt")
    parser.add_argument("--shrink", action="store_true")
    given = parser.parse_args()
    start, tally, kinds, bad = time.time(), Counter[str](), Counter[str](), Counter[str]()
    for first in range(given.first, given.last, PART):
        with get_context("spawn").Pool(1) as pool:  # a process that dies takes its part along, and no more
            job = pool.apply_async(part_of, (first, min(first + PART, given.last), given.log, given.shrink))
            try:
                for _, outcome, families in job.get(timeout=1800):
                    tally[outcome.verdict] += 1
                    tally["loose receptive field"] += outcome.loose
                    kinds.update(families)
                    bad.update(families if outcome.verdict != "right" else ())
            except Exception as error:
                tally["dead"] += 1
                with open(given.log, "a") as file:
                    file.write(f"{first}.. dead at {Path(given.log + '.now').read_text()}: {type(error).__name__}\n")
        print(f"{first + PART - given.first} in {time.time() - start:.0f} s: {dict(tally)}", flush=True)
    for name, count in sorted(kinds.items()):
        print(f"{name:24} {count:6} {bad[name]:6} not right")


if __name__ == "__main__":
    main()
