"""Compares what two versions of the compiler make of every network of the tables.

    compiled_files.py write OUT.json [NETWORK ...]  operators, states and digest of the file of each small network
    compiled_files.py compare OLD NEW               names the networks whose files differ: then the exit status is 1

A change that only moves code gives the same files. Run ``write`` in both checkouts, then ``compare``. Networks that
only one of them has are passed over.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]

from networks_table import small_names  # noqa: E402
from zoo.real import REAL  # noqa: E402
from zoo.small import SMALL  # noqa: E402

import co3d_compile as co3d  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write")
    write.add_argument("out", type=Path)
    write.add_argument("networks", nargs="*", choices=[[], *small_names()], metavar="NETWORK")
    compare = commands.add_parser("compare")
    compare.add_argument("old", type=Path)
    compare.add_argument("new", type=Path)
    args = parser.parse_args()
    if args.command == "write":
        warnings.filterwarnings("ignore")
        args.out.write_text(json.dumps({name: described(name) for name in args.networks or small_names()}, indent=1))
    else:
        sys.exit(differences(json.loads(args.old.read_text()), json.loads(args.new.read_text())))


def described(name: str) -> dict[str, Any]:
    """The digest, the operators in order and the states of the file of one network."""
    import onnx

    entry = SMALL[name] if name in SMALL else REAL[name.removesuffix("-small")].entry(small=True)
    compiled = co3d.compile(entry.build(), entry.examples(), time_dim=entry.time_dim, **entry.options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        compiled.save(path)
        model = onnx.load(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    metadata = next(json.loads(p.value) for p in model.metadata_props if p.key == "co3d")
    return {
        "digest": digest,
        "operators": [n.op_type for n in model.graph.node],
        "states": [[s["input"], s["output"], s["shape"], s["dtype"], s["initial"]] for s in metadata["states"]],
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> int:
    """Prints what differs, network by network. 1 if operators or states do, else 0."""
    status = 0
    both = sorted(old.keys() & new.keys())
    for name in both:
        parts = [k for k in ("operators", "states", "digest") if old[name][k] != new[name][k]]
        if parts:
            print(f"{name}: {', '.join(parts)} differ")
            status |= parts != ["digest"]
    same = sum(old[n] == new[n] for n in both)
    print(f"{same} of {len(both)} networks: the same file to the byte")
    return status


if __name__ == "__main__":
    main()
