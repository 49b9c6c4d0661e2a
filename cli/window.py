"""``--show``: the newest frame and what the model says, in a window of the display."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

from co3d_compile.errors import UsageError

if TYPE_CHECKING:
    from co3d_compile.predictor import Prediction
    from co3d_compile.video import VideoFrame


class Window:
    """A window that follows the video, not faster than its own pace. Close it, or press q, to stop.

    Raises:
        UsageError: There is no display, or Python has no tkinter.
    """

    def __init__(self, top: int) -> None:
        if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise UsageError("--show needs a display, and there is none.", hint="Use --save and look at the file.")
        try:
            import tkinter

            from co3d_compile.annotate import pillow

            pillow()
            self._root = tkinter.Tk()
        except ImportError as error:
            hint = "Install python3-tk, or use --save."
            raise UsageError("--show needs tkinter, which this Python lacks.", hint=hint) from error
        except tkinter.TclError as error:
            raise UsageError(f"--show cannot open a window: {error}.", hint="Use --save.") from error
        self._root.title("co3d run")
        self._picture = tkinter.Label(self._root, borderwidth=0)
        self._picture.pack()
        self._open = True
        self._top = top
        self._shown: Prediction | None = None
        self._start: float | None = None
        self._root.protocol("WM_DELETE_WINDOW", self._stop)
        self._root.bind("q", self._stop)
        self._root.bind("<Escape>", self._stop)

    def add(self, frame: VideoFrame | None, predictions: list[Prediction]) -> bool:
        """Show a frame with the newest prediction; returns whether the window is still open."""
        from PIL import Image, ImageTk

        from co3d_compile.annotate import annotated, fitted, video_size

        self._shown = predictions[-1] if predictions else self._shown
        if frame is None or not self._open:
            return self._open
        picture = fitted(frame.image, *video_size(*frame.image.shape[:2]))
        self._kept = ImageTk.PhotoImage(Image.fromarray(annotated(picture, self._shown, frame.time, self._top)))
        self._picture.configure(image=self._kept)
        self._root.update()
        self._pace(frame.time)
        return self._open

    def close(self) -> None:
        """Close the window."""
        self._root.destroy()

    def _stop(self, *_: Any) -> None:
        self._open = False

    def _pace(self, seconds: float) -> None:
        now = time.perf_counter()
        self._start = now - seconds if self._start is None else self._start
        time.sleep(min(max(0.0, self._start + seconds - now), 1.0))
