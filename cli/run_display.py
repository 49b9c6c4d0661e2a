"""What ``co3d run`` says: a line per second, a bar for files, and what it comes to at the end."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any, TextIO

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from co3d_compile.cli.common import Report, join, stderr, stdout
from co3d_compile.cli.picture_options import NOT_SAID
from co3d_compile.cli.prediction_sinks import Sinks
from co3d_compile.cli.summary import console_for, facts_table
from co3d_compile.media.frame_source import Source
from co3d_compile.media.predictor import Prediction, Predictor
from co3d_compile.media.video import VideoFrame
from co3d_compile.report.latency import latency_texts
from co3d_compile.support.readable_numbers import plural

EVERY = 1.0  # seconds between two lines
REMEMBERED = 20_000  # steps whose milliseconds are kept


class Live:
    """A display of what goes on while it goes on, which counts for the summary.

    Args:
        silent: Say nothing on standard output: it holds something else.
    """

    def __init__(self, source: Source, predictor: Predictor, top: int, limit: int | None, *, silent: bool) -> None:
        self.frames = self.predictions = self.warmup = self.resizes = self.returns = 0
        self.seconds = self.away = 0.0
        self.classes: Counter[str] = Counter()
        self.steps: deque[float] = deque(maxlen=REMEMBERED)
        self._source, self._predictor, self._top, self._silent = source, predictor, top, silent
        self._shape: tuple[int, ...] | None = None
        self._last: Prediction | None = None
        self._at = 0.0  # seconds of the newest frame
        self._start = self._said = time.perf_counter()
        self._counted, self._noted, self._resets = 0, -EVERY, 0
        self._bars, self._task = self._bar(source, limit)
        source.when_lost = lambda what: self._tell(f"{clock(self._at)}  {what}")

    def _bar(self, source: Source, limit: int | None) -> tuple[Progress | None, Any]:
        total = min((n for n in (source.total, limit) if n is not None), default=None)
        if total is None or source.live or not stderr().isatty():
            return None, None
        bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(), TextColumn("left"), console=Console(file=stderr()), transient=True,
        )  # fmt: skip
        return bars, bars.add_task("frames", total=total, rate="")

    def __enter__(self) -> Live:
        if self._bars:
            self._bars.start()
        if self._predictor.info.preprocess is None:
            click.echo(f"{NOT_SAID}, or give these here.", file=stderr())
        if not self._silent:
            self._say(Text(self._opening(), style="dim"))
            self._say(Text(self._late(), style="dim"))
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        if self._bars:
            self._bars.stop()

    def add(self, frame: VideoFrame | None, predictions: list[Prediction]) -> None:
        """Counts a frame (None: the end) and its predictions; says a line when a second is over."""
        for prediction in predictions:
            self.predictions += 1
            self.warmup += prediction.warmup
            self.steps.append(prediction.milliseconds)
            if not prediction.warmup:
                self.classes[prediction.top(1)[0].label] += 1
            self._last = prediction
        if frame is None:
            return
        self.frames += 1
        self._look_at(frame)
        if frame.away:
            self._returned(frame)
        self._at = frame.time
        if self._predictor.resets > self._resets:
            self._resets = self._predictor.resets
            self._note(f"{clock(frame.time)}  {self._predictor.spoilt}: the stream starts anew and warms up again")
        now = time.perf_counter()
        if now - self._said >= EVERY:
            rate = (self.frames - self._counted) / (now - self._said)
            self._said, self._counted = now, self.frames
            self._line(frame, rate)

    def _look_at(self, frame: VideoFrame) -> None:
        shape = frame.image.shape[:2]
        if self._shape not in (None, shape):
            self.resizes += 1
            if not self._silent:
                self._note(f"{clock(frame.time)}  the pictures are now {shape[1]}x{shape[0]} pixels")
        self._shape = shape

    def _returned(self, frame: VideoFrame) -> None:
        """Says that a live source is back, and what has become of the states."""
        self.returns += 1
        self.away += frame.away
        missed, memory = self._predictor.missed, self._predictor.memory
        kept = f"the states are kept: {missed:.0f} of the {plural(memory, 'frame')} that an answer sees are missing"
        sees = f"an answer sees {plural(memory, 'frame')}" if memory else "its memory has no end"
        new = f"the stream begins anew and warms up again: {sees}"
        self._tell(f"{clock(frame.time)}  back after {frame.away:.1f} s; {new if self._predictor.anew else kept}")

    def _note(self, text: str) -> None:
        """Says what may happen often, once a second at most."""
        if time.perf_counter() - self._noted < EVERY:
            return
        self._noted = time.perf_counter()
        self._tell(text)

    def _tell(self, text: str) -> None:
        """Says what has happened; on stderr where standard output holds something else."""
        if self._silent:
            click.echo(text, file=stderr())
        else:
            self._say(Text(text, "yellow"))

    def _line(self, frame: VideoFrame, rate: float) -> None:
        if self._bars:
            self._bars.update(self._task, completed=self.frames, rate=f"{rate:.0f}/s")
        if self._silent:
            return
        text = Text(f"{clock(frame.time)}  frame {frame.index}  ")
        if self._last is None:
            text.append("no result yet", "dim")
        else:
            text.append(f"{self._last.milliseconds:.1f} ms  {rate:.0f} fps  ", "dim")
            text.append(f"at {clock(self._last.time)}: ", "dim")
            text.append("warming up  " if self._last.warmup else "", "yellow")
            for place, rank in enumerate(self._last.top(self._top)):
                text.append(
                    f"{rank.label} {rank.score:.2f}  ", "bold" if not place and not self._last.warmup else "dim"
                )
        if self._source.dropped:
            text.append(f"{self._source.dropped} dropped", "yellow")
        self._say(text)

    def _say(self, text: Text) -> None:
        if not stdout().isatty():
            click.echo(text.plain.rstrip(), file=stdout())
        elif self._bars:  # one terminal: the bar stays below
            self._bars.console.print(text)
        else:
            console_for(stdout()).print(text)

    def _late(self) -> str:
        """Says how late an answer is; the model's rate counts, where it has one."""
        data = json.loads(self._predictor.info.to_json())
        data["outputs"] = [each for each in data["outputs"] if each["name"] == self._predictor.output.name]
        text = latency_texts(data, self._predictor.fps or self._source.fps)[0]
        return f"{text[0].upper()}{text[1:]}."

    def _opening(self) -> str:
        info, fps = self._predictor.info, self._predictor.fps or self._source.fps
        frames = info.warmup_steps * max(info.frames_per_step.values())
        seconds = f", {frames / fps:.1f} s" if fps else ""
        steps = plural(info.warmup_steps, "step")
        return f"Warming up: results of the first {steps} ({plural(frames, 'frame')}{seconds}) are marked."


def result_of(model: Path, source: Source, predictor: Predictor, live: Live, sinks: Sinks) -> Report:
    """Collects what ``--json`` prints, and the summary says."""
    steps = sorted(live.steps)
    sure = live.predictions - live.warmup
    return {
        "model": str(model),
        "source": source.name,
        "frames": live.frames,
        "frames_taken": predictor.frames,
        "frames_skipped": predictor.skipped,
        "frames_repeated": predictor.repeated,
        "frames_left_over": predictor.left_over,
        "frames_dropped": source.dropped,
        "damaged": source.damaged,
        "clock_jumps": predictor.restarts,
        "not_finite": predictor.resets,
        "size_changes": live.resizes,
        "returns": live.returns,
        "seconds_away": live.away,
        "layout": predictor.session.layout,
        "predictions": live.predictions,
        "warmup_predictions": live.warmup,
        "seconds": live.seconds,
        "fps": live.frames / live.seconds if live.seconds else None,
        "milliseconds_median": statistics.median(steps) if steps else None,
        "milliseconds_95": steps[int(0.95 * (len(steps) - 1))] if steps else None,
        "classes": [{"label": label, "share": count / sure} for label, count in live.classes.most_common(10)],
        "events": None if sinks.events is None else dict(sinks.events.counts.most_common()),
        "files": sinks.files,
    }


def print_result(result: Report, stream: TextIO) -> None:
    """Prints the summary, for a person."""
    steps, classes = result["milliseconds_median"], result["classes"][:5]
    table = facts_table(
        ("Frames", _frames(result)),
        ("Predictions", _predictions(result)),
        ("Step", f"{steps:.1f} ms (95%: {result['milliseconds_95']:.1f} ms)" if steps is not None else None),
        ("Layout", "of this machine's kernels" if result["layout"] == "native" else "as in the file"),
        ("Classes", join([f"{each['label']} {each['share']:.0%}" for each in classes])),
        ("Events", _events(result["events"])),
        ("Written", join(result["files"])),
    )
    console_for(stream).print(*([""] if result["predictions"] else []), table)


def _events(counts: dict[str, int] | None) -> str | None:
    if counts is None:
        return None
    return join([f"{label} {count}" for label, count in counts.items()]) or "none"


def _predictions(result: Report) -> str:
    count, early = result["predictions"], result["warmup_predictions"]
    if early and early == count:
        return f"{count}, all of them while warming up: the source is shorter than the warm-up"
    if not count and result["frames"]:
        return "none: the source is shorter than the model's delay"
    return f"{count}, the first {early} while warming up" if early else str(count)


def _frames(result: Report) -> str:
    text = f"{result['frames']} in {result['seconds']:.1f} s"
    text += f", {result['fps']:.0f} per second" if result["fps"] else ""
    for name, what in (
        ("skipped", "left out by the frame rate"),
        ("repeated", "taken more than once"),
        ("left_over", "too few for a last step"),
        ("dropped", "dropped: they came faster than the model took them"),
    ):
        if result[f"frames_{name}"]:
            text += f"; {result[f'frames_{name}']} {what}"
    text += f"; {result['damaged']} damaged" if result["damaged"] else ""
    text += f"; away for {result['seconds_away']:.1f} s" if result["returns"] else ""
    for name, what in (
        ("clock_jumps", "jump{} in time"),
        ("size_changes", "change{} of size"),
        ("not_finite", "start{} anew after values that were not finite"),
    ):
        text += f"; {result[name]} {what.format('s' * (result[name] > 1))}" if result[name] else ""
    return text


def clock(seconds: float) -> str:
    """Writes ``1:02:03.4``."""
    minutes, rest = divmod(max(0.0, seconds), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:04.1f}" if hours else f"{minutes:02d}:{rest:04.1f}"
