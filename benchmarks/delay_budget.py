"""X3D-S within delay budgets: how far each way of losing the future is from the untouched network, and its state.

    delay_budget.py                       a table, by budget and by way
    delay_budget.py --budgets 14 0        for other budgets

The distance is the largest difference of the scores of some clips, in standard deviations of the untouched network's
scores. Clips are smooth in time, as videos are: noise of which a
frame shares most with the one before it. The weights are random but seeded, as no package carries trained ones.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import co3d_compile as co3d

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from zoo import randomise

WAYS = ("shift", "drop", "fold")
FRAMES, SIZE = 13, 160


def clips(count: int) -> Tensor:
    """Noise that changes slowly: each frame is 0.9 of the one before it."""
    generator = torch.Generator().manual_seed(7)
    frames = [torch.randn(count, 3, SIZE, SIZE, generator=generator)]
    for _ in range(FRAMES - 1):
        frames.append(0.9 * frames[-1] + (1 - 0.9**2) ** 0.5 * torch.randn(count, 3, SIZE, SIZE, generator=generator))
    return torch.stack(frames, 2)


def distance(network: nn.Module, replaced: nn.Module, frames: Tensor) -> float:
    """The largest difference in standard deviations."""
    with torch.no_grad():
        ours, theirs = replaced(frames), network(frames)
    return float((ours - theirs).abs().max() / theirs.std())


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, nargs="+", default=[28, 14, 7, 0])
    parser.add_argument("--clips", type=int, default=8)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    from pytorchvideo.models.hub import x3d_s

    frames = clips(options.clips)
    network = randomise(x3d_s(pretrained=False), frames[:2], gain=0.3)
    print("| frames late | `delay_by` | kernels changed | distance | state MB |")
    print("| --- | --- | --- | --- | --- |")
    for budget in options.budgets:
        for by in WAYS:
            model = co3d.compile(network, (frames[:1],), max_delay=budget, delay_by=by)
            rows = model.info.options["limited"]
            far = distance(network, model.replaced_module(), frames) if rows else 0.0
            (late,) = model.info.delays.values()
            state = model.report().state_bytes / 1e6
            print(f"| {late} | {by if rows else 'none'} | {len(rows)} | {far:.2f} | {state:.1f} |", flush=True)
            if not rows:
                break


if __name__ == "__main__":
    main()
