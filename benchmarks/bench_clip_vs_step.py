"""Milliseconds per frame of real networks in ONNX Runtime: clip model, compiled step, and a floor.

See README.md in this folder for what the sides are and how they are timed. `co3d bench` does it for a model of yours.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from continual_x3d import export_continual
from printed import print_table
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from co3d_compile.bench.bench_model import bench

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from networks import NETWORKS, Network

SIDES = ("clip", "openvino", "openvino32", "step", "plain", "floor")  # bench leaves out what is not installed
# What a step must reach: at least so many times faster than the first, at most so many times slower than the floor.
BARS = {
    "x3d_s": {"clip/step": 22, "openvino/step": 4.6, "peer/step": 6, "step/floor": 1.55},
    "x3d_m": {"clip/step": 30, "openvino/step": 8, "peer/step": 6, "step/floor": 1.77},
    "x3d_l": {"clip/step": 25, "peer/step": 6, "step/floor": 1.82},
}
console = Console(stderr=True, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", choices=[*NETWORKS, "all"], help="which networks, or all")
    parser.add_argument("--rounds", type=int, default=5, help="times that each side gets its turn")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long a turn lasts")
    parser.add_argument("--threads", type=int, default=2, help="threads of ONNX Runtime")
    parser.add_argument("--dense", action="store_true", help="with temporal strides: an answer per frame on all sides")
    parser.add_argument("--peer", action="store_true", help="X3D: continual-inference's own ONNX export as well")
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg|torch")  # torch.export's own

    names = list(NETWORKS) if "all" in args.networks else args.networks
    rows = [measure(name, NETWORKS[name], args) for name in names]
    show(rows)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"networks": rows}, indent=2) + "\n")


def measure(name: str, network: Network, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the result: the sides of one network in turns."""
    torch.manual_seed(0)
    module = network.build().eval()
    with tempfile.TemporaryDirectory() as folder, console.status(name) as status:
        more = {}
        if args.peer and name.startswith("x3d"):
            more["peer"] = ("clip", export_continual(module, network.clip_shape, Path(folder, "peer.onnx")))
        result = bench(
            module,
            (torch.zeros(network.clip_shape),),
            sides=SIDES,
            rounds=args.rounds,
            seconds=args.seconds,
            threads=args.threads,
            more=more,
            progress=lambda stage, done, total: status.update(f"{name}: {stage}, {done} of {total}"),
            stride_mode="dense" if args.dense else "step",
        )
    return {"network": name, "clip_shape": network.clip_shape, **result}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table on standard output."""
    timed = list(dict.fromkeys(side for row in rows for side in row["sides"]))
    ratios = list(dict.fromkeys(ratio for row in rows for ratio in row["ratios"]))
    table = Table("network", *timed, *ratios, "FLOPs", "state MB", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for row in rows:
        table.add_row(
            row["network"],
            *(spread(row["sides"][side]) if side in row["sides"] else "" for side in timed),
            *(f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "" for name in ratios),
            f"{row['gmac_ratio']:.1f}x",
            f"{row['state_bytes'] / 1e6:.1f}",
        )
    said = [
        f"{row['network']} {ratio}: {verdict(ratio, row['ratios'].get(ratio), bar)}"
        for row in rows
        for ratio, bar in BARS.get(row["network"], {}).items()
    ]
    print_table(table, rows, said, "Milliseconds per frame: median, and half the distance of the quartiles,")


def verdict(ratio: str, reached: float | None, bar: float) -> str:
    if reached is None:
        return "not measured"
    good = reached <= bar if ratio.endswith("/floor") else reached >= bar
    return f"{reached:.2f}, the bar is {bar}: {'reached' if good else 'MISSED'}"


def spread(side: dict[str, Any]) -> str:
    low, high = side["quartiles"]
    return f"{side['median']:.1f} ±{(high - low) / 2:.1f}"


if __name__ == "__main__":
    main()
