"""Where predictions go: CSV, JSON lines, events, an annotated video, a window."""

from __future__ import annotations

import contextlib
import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeAlias

from co3d_compile.cli.common import stdout
from co3d_compile.cli.output_file import Output
from co3d_compile.cli.preview_window import Window
from co3d_compile.media.annotated_video import AnnotatedVideo
from co3d_compile.media.events import Event, EventFinder
from co3d_compile.media.frame_source import Source
from co3d_compile.media.predictor import Prediction, Predictor, as_dict
from co3d_compile.media.video import VideoFrame

Writer: TypeAlias = Callable[[Prediction], None]
DIGITS = 6  # behind the point: microseconds, millionths
JSON_LINES = (".jsonl", ".ndjson", ".json")
EVENT = ("label", "begin", "end", "peak", "peak_time", "mean", "class")


class Sink(Protocol):
    """An output that takes each frame (None at the end) with the predictions that it brought."""

    def add(self, frame: VideoFrame | None, predictions: list[Prediction]) -> bool | None:
        """Takes a frame; False where it does not go on: a window may have been closed."""
        ...

    def close(self) -> None: ...


class Sinks:
    """All that was asked for. Files appear whole, with `finish`, or not at all.

    Args:
        finder: Makes what finds events, if they are wanted.
    """

    def __init__(
        self, files: Mapping[str, Path | None], show: bool, top: int, finder: Callable[[], EventFinder] | None = None
    ) -> None:
        self._given = {name: path for name, path in files.items() if path is not None}
        self._outputs = {name: Output(path) for name, path in self._given.items() if str(path) != "-"}
        self.on_stdout = len(self._outputs) < len(self._given)
        self.files = [str(output.given) for output in self._outputs.values()]
        self._top, self._finder = top, finder
        self.events: Events | None = None
        self._stack = contextlib.ExitStack()
        self._sinks: list[Sink] = []
        self._window = Window(top) if show else None

    def begin(self, source: Source, predictor: Predictor) -> None:
        """Opens the files; the window follows the source."""
        if self._finder is not None:  # a class that the model has not, before anything is written
            self._finder().begin(predictor.scores.classes, predictor.scores.labels)
        if self._window is not None:
            window, self._window.paced = self._window, not source.live
            source.while_waiting = lambda: None if window.alive() else source.stop()
            self._sinks.append(window)
        for name in self._given:
            file: Path | TextIO = stdout()
            if name in self._outputs:
                file = self._stack.enter_context(self._outputs[name].writing())
            if isinstance(file, Path) and name == "save":
                finder = self._finder() if self._finder else None
                self._sinks.append(AnnotatedVideo(file, source.fps or predictor.fps or 30.0, self._top, finder))
            elif name == "events" and self._finder is not None:
                self.events = Events(file, self._given[name], self._finder())
                self._sinks.append(self.events)
            else:
                self._sinks.append(_Lines(file, _csv if name == "csv" else _json_lines, self._top))

    def add(self, frame: VideoFrame | None, predictions: list[Prediction]) -> bool:
        """Gives a frame and its predictions to every sink; returns whether all want more.

        The others get them, too, where the window was closed.
        """
        more = [sink.add(frame, predictions) for sink in self._sinks]
        return False not in more

    def finish(self) -> None:
        """Completes the files and puts them in place."""
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            sink.close()
        self._stack.close()

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *error: Any) -> None:
        for sink in self._sinks:
            with contextlib.suppress(Exception):
                sink.close()
        self._stack.__exit__(*error)


class Events:
    """Events in a text file, each once it is over: as JSON lines in a file of that name, else as CSV.

    Attributes:
        counts: How many there were, by label.
    """

    def __init__(self, file: Path | TextIO, name: Path, finder: EventFinder) -> None:
        self._own = isinstance(file, Path)
        self._file: TextIO = file.open("w", encoding="utf-8", newline="") if isinstance(file, Path) else file
        self._rows = None if name.suffix.lower() in JSON_LINES else csv.writer(self._file, lineterminator="\n")
        self._finder = finder
        self.counts: Counter[str] = Counter()
        if self._rows is not None:
            self._rows.writerow(EVENT)

    def add(self, frame: VideoFrame | None, predictions: list[Prediction]) -> None:
        self._write([event for prediction in predictions for event in self._finder.add(prediction)])

    def close(self) -> None:
        self._write(self._finder.finish())
        if self._own:
            self._file.close()

    def _write(self, events: list[Event]) -> None:
        for event in events:
            self.counts[event.label] += 1
            data = {k: round(v, DIGITS) if isinstance(v, float) else v for k, v in event.to_dict().items()}
            if self._rows is None:
                self._file.write(json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n")
            else:
                self._rows.writerow([data[name] for name in EVENT])
        if events and not self._own:
            self._file.flush()


class _Lines:
    """A text file, or standard output, which is flushed at every line."""

    def __init__(self, file: Path | TextIO, writer: Callable[[TextIO, int], Writer], top: int) -> None:
        self._own = isinstance(file, Path)
        self._file: TextIO = file.open("w", encoding="utf-8", newline="") if isinstance(file, Path) else file
        self._write = writer(self._file, top)

    def add(self, frame: VideoFrame | None, predictions: list[Prediction]) -> None:
        for prediction in predictions:
            self._write(prediction)
        if predictions and not self._own:
            self._file.flush()

    def close(self) -> None:
        if self._own:
            self._file.close()


def _csv(file: TextIO, top: int) -> Writer:
    """Writes the names of the columns, then a row for each prediction."""
    rows = csv.writer(file, lineterminator="\n")
    columns = ["time", "frame", "newest_time", "newest_frame", "step", "warmup", "milliseconds"]
    ranks = [f"{name}_{rank}" for rank in range(1, top + 1) for name in ("class", "label", "score")]
    rows.writerow(columns + ranks)

    def write(p: Prediction) -> None:
        row: list[object] = [round(p.time, DIGITS), p.frame, round(p.newest_time, DIGITS), p.newest_frame, p.step]
        row += [int(p.warmup), round(p.milliseconds, 3)]
        for rank in p.top(top):
            row += [rank.index, rank.label, round(rank.score, DIGITS)]
        rows.writerow(row)

    return write


def _json_lines(file: TextIO, top: int) -> Writer:
    """Writes a line of JSON for each prediction."""

    def write(prediction: Prediction) -> None:
        data = as_dict(prediction, top)
        for name in ("time", "newest_time", "milliseconds"):
            data[name] = round(data[name], DIGITS)
        for rank in data["top"]:
            rank["score"] = round(rank["score"], DIGITS) if math.isfinite(rank["score"]) else None
        file.write(json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n")

    return write
