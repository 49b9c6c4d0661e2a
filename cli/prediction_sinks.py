"""Where predictions go: CSV, JSON lines, an annotated video, a window."""

from __future__ import annotations

import contextlib
import csv
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from co3d_compile.cli.common import stdout
from co3d_compile.cli.output_file import Output

if TYPE_CHECKING:
    from co3d_compile.cli.preview_window import Window
    from co3d_compile.media.frame_source import Source
    from co3d_compile.media.predictor import Prediction, Predictor
    from co3d_compile.media.video import VideoFrame

DIGITS = 6  # behind the point: microseconds, millionths


class Sink(Protocol):
    """Takes each frame (None at the end) with the predictions that it brought."""

    def add(self, frame: VideoFrame | None, predictions: list[Prediction]) -> bool:
        """Returns whether it goes on: a window may have been closed."""
        ...

    def close(self) -> None: ...


class Sinks:
    """All that was asked for. Files appear whole, with `finish`, or not at all."""

    def __init__(self, save: Path | None, csv: Path | None, jsonl: Path | None, show: bool, top: int) -> None:
        self._given = {name: path for name, path in (("save", save), ("csv", csv), ("jsonl", jsonl)) if path}
        self._outputs = {name: Output(path) for name, path in self._given.items() if str(path) != "-"}
        self.on_stdout = len(self._outputs) < len(self._given)
        self.files = [str(output.given) for output in self._outputs.values()]
        self._top = top
        self._stack = contextlib.ExitStack()
        self._sinks: list[Sink] = []
        self._window: Window | None = None
        if show:
            from co3d_compile.cli.preview_window import Window

            self._window = Window(top)
            self._sinks.append(self._window)

    def begin(self, source: Source, predictor: Predictor) -> None:
        """Opens the files; the window follows the source."""
        if self._window is not None:
            window, self._window.paced = self._window, not source.live
            source.while_waiting = lambda: None if window.alive() else source.stop()
        for name in self._given:
            file: Path | TextIO = stdout()
            if name in self._outputs:
                file = self._stack.enter_context(self._outputs[name].writing())
            if isinstance(file, Path) and name == "save":
                self._sinks.append(_Video(file, source.fps or predictor.fps or 30.0, self._top))
            else:
                kind = _Csv if name == "csv" else _JsonLines
                self._sinks.append(kind(file, self._top))

    def add(self, frame: VideoFrame | None, predictions: list[Prediction]) -> bool:
        """To every sink, also where the window was closed; returns whether all want more."""
        more = [sink.add(frame, predictions) for sink in self._sinks]
        return all(more)

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


class _Text:
    """A text file, or standard output, which is flushed at every line."""

    def __init__(self, file: Path | TextIO, top: int) -> None:
        self._own = isinstance(file, Path)
        self._file: TextIO = file.open("w", encoding="utf-8", newline="") if isinstance(file, Path) else file
        self._top = top
        self._begin()

    def _begin(self) -> None:
        pass

    def add(self, frame: VideoFrame | None, predictions: list[Prediction]) -> bool:
        for prediction in predictions:
            self._write(prediction)
        if predictions and not self._own:
            self._file.flush()
        return True

    def _write(self, prediction: Prediction) -> None:
        raise NotImplementedError

    def close(self) -> None:
        if self._own:
            self._file.close()


class _Csv(_Text):
    def _begin(self) -> None:
        self._csv = csv.writer(self._file, lineterminator="\n")
        columns = ["time", "frame", "newest_time", "newest_frame", "step", "warmup", "milliseconds"]
        for rank in range(1, self._top + 1):
            columns += [f"class_{rank}", f"label_{rank}", f"score_{rank}"]
        self._csv.writerow(columns)

    def _write(self, prediction: Prediction) -> None:
        p = prediction
        row: list[Any] = [round(p.time, DIGITS), p.frame, round(p.newest_time, DIGITS), p.newest_frame, p.step]
        row += [int(p.warmup), round(p.milliseconds, 3)]
        for rank in p.top(self._top):
            row += [rank.index, rank.label, round(rank.score, DIGITS)]
        self._csv.writerow(row)


class _JsonLines(_Text):
    def _write(self, prediction: Prediction) -> None:
        from co3d_compile.media.predictor import as_dict

        data = as_dict(prediction, self._top)
        for name in ("time", "newest_time", "milliseconds"):
            data[name] = round(data[name], DIGITS)
        for rank in data["top"]:
            rank["score"] = round(rank["score"], DIGITS) if math.isfinite(rank["score"]) else None
        self._file.write(json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n")


class _Video:
    def __init__(self, path: Path, fps: float, top: int) -> None:
        from co3d_compile.media.annotated_video import AnnotatedVideo

        self._video = AnnotatedVideo(path, fps, top)

    def add(self, frame: VideoFrame | None, predictions: list[Prediction]) -> bool:
        self._video.add(frame, predictions)
        return True

    def close(self) -> None:
        self._video.close()
