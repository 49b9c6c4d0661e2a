"""The video autoencoders of ``diffusers``, small and with random weights: the table of docs/networks.md.

``diffusers`` is no package of this project's environment. Install it and what it imports beside it, and say where:

    pip install --target FOLDER diffusers "huggingface_hub<2"
    python benchmarks/video_autoencoders.py --packages FOLDER [--only NAME] [--write]
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import co3d_compile as co3d
from co3d_compile.capture.model_files.model_factory import with_torchvision

PAGE = Path(__file__).parents[1] / "docs" / "networks.md"
BEGIN, END = "<!-- begin autoencoders -->\n", "<!-- end autoencoders -->\n"
HEAD = "| network | clip | what streams | work | delay | exact |\n| --- | --- | --- | --- | --- | --- |\n"
FOUR: dict[str, Any] = {"latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1}
LATENT: dict[str, Any] = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "CogVideoX": ("CogVideoX", {**FOUR, "norm_num_groups": 2, "sample_height": 16, "sample_width": 16}),
    "Wan 2.1": ("Wan", {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, **LATENT}),
    "LTX-Video": (
        "LTXVideo",
        {"latent_channels": 4, "block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4, "patch_size": 2,
         "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5, "decoder_causal": True},
    ),
    "HunyuanVideo": ("HunyuanVideo", {**FOUR, "norm_num_groups": 2}),
    "Mochi": (
        "Mochi",
        {"latent_channels": 4, "encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4,
         "layers_per_block": (1,) * 5, **LATENT},
    ),
}  # fmt: skip


class Part(nn.Module):
    """The encoder or the decoder of an autoencoder."""

    def __init__(self, network: nn.Module, call: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, x: Tensor) -> Tensor:
        result = self.call(self.network, x)
        first: Tensor = result[0] if isinstance(result, tuple) else result
        return first


@dataclass(frozen=True)
class Row:
    """One part, the shape of its clip, how it is called, and what else is said of the network."""

    network: str
    part: str
    clip: tuple[int, ...]
    call: Callable[[Any, Tensor], Any]
    options: dict[str, Any] = field(default_factory=dict)


PLAIN: dict[str, Any] = {"mid_block_add_attention": False}


def _encoded(network: Any, x: Tensor) -> Tensor:
    return network.encoder(x)


def _decoded(network: Any, x: Tensor) -> Tensor:
    return network.decoder(x)


ROWS = [
    Row("CogVideoX", "encoder", (1, 3, 13, 16, 16), _encoded),
    Row("CogVideoX", "decoder", (1, 4, 5, 4, 4), _decoded),
    Row("Wan 2.1", "encoder, with its loop and caches", (1, 3, 21, 8, 8), lambda n, x: n.encode(x).latent_dist.mean),
    Row("Wan 2.1", "decoder, with its loop and caches", (1, 4, 6, 2, 2), lambda n, z: n.decode(z).sample),
    Row("LTX-Video", "encoder", (1, 3, 25, 64, 64), _encoded),
    Row("LTX-Video", "decoder, causal", (1, 4, 5, 2, 2), _decoded),
    Row("HunyuanVideo", "encoder without attention in the middle", (1, 3, 13, 16, 16), _encoded, PLAIN),
    Row("HunyuanVideo", "encoder", (1, 3, 13, 16, 16), _encoded),
    Row("HunyuanVideo", "decoder without attention in the middle", (1, 4, 5, 2, 2), _decoded, PLAIN),
    Row("HunyuanVideo", "decoder", (1, 4, 5, 2, 2), _decoded),
    Row("Mochi", "encoder", (1, 3, 25, 16, 16), _encoded),
    Row("Mochi", "decoder", (1, 4, 5, 2, 2), _decoded),
]


class PerFrame(nn.GroupNorm):
    """A group norm over each frame by itself, which is what scope ``frame`` makes of one over the clip."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 5:
            return super().forward(x)
        frames = x.transpose(1, 2)
        return super().forward(frames.flatten(0, 1)).view_as(frames).transpose(1, 2)


def build(row: Row) -> Part:
    """Returns the part with random weights."""
    name, options = SMALL[row.network]
    diffusers: Any = with_torchvision(lambda: __import__("diffusers"))
    torch.manual_seed(0)
    network = with_torchvision(lambda: getattr(diffusers, f"AutoencoderKL{name}"))(**options, **row.options).eval()
    return Part(network, row.call).eval()


def reference(part: Part) -> Part:
    """Turns its norms over time into norms over each frame."""
    for module in part.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = PerFrame
    return part


def line(row: Row) -> str:
    """Returns the row of the table."""
    part, clip = build(row), torch.randn(row.clip)
    with torch.inference_mode():
        out = part(clip).shape[2]
    began = time.process_time()
    compiled = co3d.compile(part, clip)
    print(f"compiled in {time.process_time() - began:.0f} s of one core", file=sys.stderr)
    stream, late = compiled.report(), compiled.info.outputs[0].delay
    per_latent = stream.gmac_clip / min(out, row.clip[2])
    work = f"{stream.gmac_step / per_latent:.2f}"
    streams, error = "all", "on a window"
    if not stream.recomputed:
        ends = co3d.compile(part, clip, boundary="exact")
        error, with_ends = exact(row, ends), f"{ends.report().gmac_step / per_latent:.2f}"
        work += f" ({with_ends} with ends)" if with_ends != work else ""
    else:
        first = stream.recomputed[0]
        streams = f"up to {first['operator'].removeprefix('aten.')} in {first['module_path'].removeprefix('network.')}"
    delay = f"{late} {'frame' if out > row.clip[2] else 'latent'}{'s' * (late != 1)}" if late else "0"
    cells = [f"{row.network} {row.part}", "x".join(map(str, row.clip)), streams]
    return f"| {' | '.join([*cells, work, delay, error])} |\n"


def exact(row: Row, model: co3d.CompiledModel) -> str:
    """Returns the largest error of whole streams with both ends, at three lengths, in standard deviations."""
    untouched, worst = reference(build(row)), 0.0
    with co3d.StreamSession(model) as session:
        pulse, multiple = session.info.inputs[0].frames_per_step or 1, max(1, session.info.length_multiple)
        for more in (0, 1, 3):
            frames = row.clip[2] + more * multiple * max(1, 8 // multiple)
            x = torch.randn(*row.clip[:2], frames, *row.clip[3:])
            with torch.inference_mode():
                wanted = untouched(x).numpy()
            session.reset()
            got = streamed(session, x.numpy(), pulse)[:, :, : wanted.shape[2]]
            assert got.shape == wanted.shape, (got.shape, wanted.shape)
            worst = max(worst, float(np.abs(got - wanted).max() / wanted.std()))
    return f"{worst:.0e}"


def streamed(session: co3d.StreamSession, x: np.ndarray[Any, Any], pulse: int) -> np.ndarray[Any, Any]:
    """Returns all results of one stream, from its first entry to its last."""
    results: list[np.ndarray[Any, Any]] = []
    for start in range(0, x.shape[2], pulse):
        frames = x[:, :, start : start + pulse]
        short = pulse - frames.shape[2]
        valid = np.arange(pulse)[None] < frames.shape[2]
        frames = np.pad(frames, [(0, 0), (0, 0), (0, short), (0, 0), (0, 0)])
        results.append(np.asarray(session.step(frames[:, :, 0] if pulse == 1 else frames, valid=valid)))
    results += [np.asarray(result) for result in session.flush()]
    spec = session.info.outputs[0]
    each = [r[:, :, None] if r.ndim == 4 else r for r in results]
    whole = np.concatenate(each, 2)
    return whole[:, :, spec.delay :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", help="the folder in which diffusers is")
    parser.add_argument("--only", default="", help="rows whose names begin so")
    parser.add_argument("--write", action="store_true", help="write the rows into the page")
    arguments = parser.parse_args()
    if arguments.packages:
        sys.path.append(arguments.packages)
    rows = [row for row in ROWS if f"{row.network} {row.part}".startswith(arguments.only)]
    for row in rows:
        text = line(row)
        print(text, end="", flush=True)
        if arguments.write:
            write(f"{row.network} {row.part}", text)


def written() -> list[str]:
    """Returns the page in front of the table, the table, and what is behind it."""
    page = PAGE.read_text(encoding="utf-8")
    return re.split(f"({re.escape(BEGIN)}.*?{re.escape(END)})", page, maxsplit=1, flags=re.S)


def write(name: str, text: str) -> None:
    """Puts one row into the page, in the place of the one of that name or behind the others."""
    before, table, after = written()
    lines = [each for each in table.splitlines(keepends=True) if not each.startswith(f"| {name} |")]
    names = [f"{row.network} {row.part}" for row in ROWS]
    known = {each.split(" | ")[0].removeprefix("| "): each for each in [*lines[3:-1], text]}
    rows = [known[each] for each in names if each in known]
    PAGE.write_text(before + "".join([*lines[:3], *rows, lines[-1]]) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
