"""Features of a long video, frame by frame, in numbered files that a broken run goes on with.

A part holds, for each output, the features, and the frames and times that they are about. Beside the newest part lies
the state of the stream, so that a run that goes on gives the same numbers as one that was never broken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from co3d_compile.contract.model_contract import Contract, OutputSpec
from co3d_compile.errors import OutputError, UsageError
from co3d_compile.media.preprocess import Settings
from co3d_compile.media.video import VideoFrame
from co3d_compile.media.video_steps import Feed, frame_about, frames_per_entry
from co3d_compile.runtime.session import StreamSession
from co3d_compile.support.atomic_file import whole_file
from co3d_compile.support.plain_types import Array, JsonObject

INDEX = "features.json"
ROWS = 512  # of the output with the most, in a part


def feature_outputs(info: Contract, named: Sequence[str] = ()) -> list[OutputSpec]:
    """Chooses the outputs that are features: those named, those of ``also``, or all.

    Raises:
        UsageError: The model has no such output.
    """
    own = {output.name: output for output in info.outputs}
    wanted = named or [n for n in own if any(n == a or n.startswith(f"{a}.") for a in info.options.get("also", ()))]
    for name in wanted:
        if name not in own:
            raise UsageError(f"The model has no output '{name}'.", hint=f"It has {', '.join(own)}.")
    return [own[name] for name in wanted or own]


class FeatureRun:
    """A run that writes the features of one video into a folder, behind the parts that a broken run has left.

    Args:
        session: The model, for one stream.
        folder: Where the parts are written; it is made.
        source: What the video is called. A folder is for one model, one video and one ``every``.
        every: Keep the features of each so many frames.
        outputs: Which outputs; see ``feature_outputs``.
        preprocess: As for ``Predictor``.
        rows: Features in a part.

    Attributes:
        complete: Whether the folder holds everything already.
        begun: Frames of the source that were read by runs before this one.
        rows: Features that were written by all runs, of the output with the most.

    Raises:
        UsageError: The folder holds the features of something else.
    """

    def __init__(
        self,
        session: StreamSession,
        folder: Path,
        source: str,
        *,
        every: int = 1,
        outputs: Sequence[str] = (),
        preprocess: Settings | None = None,
        rows: int = ROWS,
    ) -> None:
        self.session, self.folder, self._limit, self._every = session, folder, rows, every
        self._specs = feature_outputs(session.info, outputs)
        self._feed = Feed(session.info, preprocess)
        self._names = [spec.name for spec in session.info.inputs]
        self._what = {
            "model": session.info.weights_sha256,
            "source": source,
            "every": every,
            "preprocess": [each.to_dict() for each in self._feed.pictures.preprocess],
            "outputs": {spec.name: {"shape": list(spec.shape), "delay": spec.delay} for spec in self._specs},
        }
        self.begun = self.rows = self.parts = self._steps = self._frames = 0
        self.complete = False
        self._taken: list[tuple[int, float]] = []
        self._first = 0  # frames taken before those in `_taken`
        self._kept: dict[str, list[tuple[Array, int, float]]] = {spec.name: [] for spec in self._specs}
        self._open()

    def add(self, frame: VideoFrame) -> None:
        """Takes the next frame; those that a run before has read are passed over."""
        if frame.index < self.begun:
            return
        for full in self._feed.add(frame):
            self._taken.append((frame.index, frame.time))
            self._frames += 1
            if full:
                self._step()
        if not self._feed.pending and max(map(len, self._kept.values())) >= self._limit:
            self._write(frame.index + 1)

    def finish(self) -> None:
        """Writes what is left, and that this is all."""
        if self.session.info.boundary == "exact" and self._frames:
            for _ in range(self.session.info.flush_steps + bool(self._feed.pending)):
                self._step()
        if any(self._kept.values()):
            self._write(None)
        self._say(complete=True)
        for state in self.folder.glob("state_*.npz"):
            state.unlink()

    def _step(self) -> None:
        arrays, valid = self._feed.take()
        results = self.session.run(dict(zip(self._names, arrays, strict=True)), valid=valid)
        exact = self.session.info.boundary == "exact"
        for spec in self._specs:
            if self._steps < self.session.info.warmup_steps and not (exact and spec.has_time):
                continue
            for entry, frame in self._entries(spec, results[spec.name]):
                index, seconds = self._taken[frame - self._first]
                if index % self._every == 0:
                    self._kept[spec.name].append((entry, index, seconds))
        self._steps += 1
        keep = 2 * self._feed.pulse.frames + max(self._reach(spec) for spec in self._specs)
        self._first += len(self._taken[:-keep])
        del self._taken[:-keep]

    def _entries(self, spec: OutputSpec, values: Array) -> list[tuple[Array, int]]:
        """Lists the entries of a step's result, each with the frame that it is about, counted among those taken."""
        pulse = self._feed.pulse
        each = frames_per_entry(self.session.info, spec)
        streams = spec.has_time and math.isclose(spec.entries_per_step * each, pulse.first)
        apart = streams and spec.entries_per_step > 1 and spec.time_dim is not None
        parts = list(np.moveaxis(values, spec.time_dim or 0, 0)) if apart else [values]
        frames = [frame_about(self.session.info, spec, self._steps + 1, k) for k in reversed(range(len(parts)))]
        return [(part[0].copy(), at) for part, at in zip(parts, frames, strict=True) if 0 <= at < self._frames]

    def _reach(self, spec: OutputSpec) -> int:
        """Counts the frames from the newest one back to the oldest that an entry of a step is about, at most."""
        pulse = self._feed.pulse
        entries = 1 + max(0, spec.delay) + spec.entries_per_step
        return math.ceil(entries * frames_per_entry(self.session.info, spec)) * (pulse.frames // pulse.first)

    # --- the folder

    def _open(self) -> None:
        index = self.folder / INDEX
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            found = json.loads(index.read_text(encoding="utf-8")) if index.exists() else None
        except (OSError, ValueError) as error:
            raise OutputError(f"{self.folder} cannot be used: {error}.", hint="Give another folder.") from error
        if found is None:
            if any(self.folder.iterdir()):
                raise UsageError(f"{self.folder} holds other files.", hint="Give a new folder.")
            self._say(complete=False)
            return
        same = isinstance(found, dict) and {name: found.get(name) for name in self._what} == self._what
        if not same:
            what = f"{self.folder} holds the features of another model or video, or with other options."
            raise UsageError(what, hint="Give another folder.")
        self.complete = bool(found.get("complete"))
        self.parts, self.rows = int(found["parts"]), int(found["rows"])
        if not self.complete:
            self._go_on()

    def _go_on(self) -> None:
        """Takes up the state behind the newest part that is whole; without one it begins anew."""
        numbers = sorted((int(path.stem.split("_")[1]) for path in self.folder.glob("state_*.npz")), reverse=True)
        number = next((n for n in numbers if (self.folder / f"part_{n:05d}.npz").exists()), None)
        self.parts = self.rows = 0
        if number is None:
            return
        with np.load(self.folder / f"state_{number:05d}.npz") as stored:
            run = json.loads(str(stored["run"]))
            self.session.restore(stored["snapshot"].tobytes())
        self._taken = [(index, seconds) for index, seconds in run["taken"]]
        self._steps, self._frames, self._first = run["steps"], run["frames"], run["first"]
        self.begun, self.rows, self.parts = run["begun"], run["rows"], number + 1
        self._feed.rate.restore(run["rate"])

    def _write(self, begun: int | None) -> None:
        """Writes a part; before it the state behind it, unless it is the last one."""
        self.rows += max(map(len, self._kept.values()))
        name = f"{self.parts:05d}.npz"
        if begun is not None:
            run = {"taken": self._taken, "steps": self._steps, "frames": self._frames, "first": self._first}
            run |= {"begun": begun, "rows": self.rows, "rate": self._feed.rate.state()}
            snapshot = np.frombuffer(self.session.snapshot(), np.uint8)
            self._save(f"state_{name}", {"run": np.array(json.dumps(run)), "snapshot": snapshot})
        arrays: JsonObject = {}
        for output, kept in self._kept.items():
            if kept:
                arrays |= {output: np.stack([each[0] for each in kept])}
                arrays |= {f"{output}.frame": np.array([each[1] for each in kept])}
                arrays |= {f"{output}.time": np.array([each[2] for each in kept])}
            kept.clear()
        self._save(f"part_{name}", arrays)
        if self.parts:
            (self.folder / f"state_{self.parts - 1:05d}.npz").unlink(missing_ok=True)
        self.parts += 1
        self._say(complete=False)

    def _save(self, name: str, arrays: Mapping[str, Any]) -> None:
        with whole_file(self.folder / name) as file, file.open("wb") as stream:
            np.savez(stream, **arrays)

    def _say(self, *, complete: bool) -> None:
        self.complete = complete
        data = {**self._what, "parts": self.parts, "rows": self.rows, "complete": complete}
        with whole_file(self.folder / INDEX) as file:
            file.write_text(json.dumps(data, indent=1), encoding="utf-8")
