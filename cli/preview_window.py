"""``--show``: the newest frame and what the model says, in a window of the display."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from co3d_compile.errors import UsageError
from co3d_compile.media.annotated_video import annotated, fitted, pillow, video_size
from co3d_compile.media.predictor import Prediction
from co3d_compile.media.video import VideoFrame

LONGEST = 1.0  # seconds that a frame waits for its time; further away its time has jumped
SHARE = 0.85  # of the screen that a picture takes at most: title and bars of the desktop want some


class Window:
    """A window that follows the video, not faster than its own pace. Close it, or press q, to stop.

    Attributes:
        paced: Whether frames wait for their time; those of a camera come at theirs.

    Raises:
        UsageError: There is no display, or Python has no tkinter.
    """

    def __init__(self, top: int) -> None:
        if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise UsageError("--show needs a display, and there is none.", hint="Use --save and look at the file.")
        try:
            import tkinter

            pillow()
            self._root = tkinter.Tk(className="co3d")
        except ImportError as error:
            hint = "Install python3-tk, or use --save."
            raise UsageError("--show needs tkinter, which this Python lacks.", hint=hint) from error
        except tkinter.TclError as error:
            raise UsageError(f"--show cannot open a window: {error}.", hint="Use --save.") from error
        self._root.title("co3d run")
        self._root.configure(background="black")
        self._label = tkinter.Label(self._root, borderwidth=0)
        self._label.pack(expand=True)
        self._root.withdraw()  # until there is a picture
        self._photo: Any = None
        self._open = self.paced = True
        self._top = top
        self._shown: Prediction | None = None
        self._start: float | None = None
        self._root.protocol("WM_DELETE_WINDOW", self._stop)
        for key in ("q", "Q", "<Escape>"):
            self._root.bind(key, self._stop)

    def add(self, frame: VideoFrame | None, predictions: list[Prediction]) -> bool:
        """Shows a frame with the newest prediction; returns whether the window is still open."""
        self._shown = predictions[-1] if predictions else self._shown
        if frame is None or not self._open:
            return self._open
        picture = fitted(frame.image, *self._size(*frame.image.shape[:2]))
        self._draw(annotated(picture, self._shown, frame.time, self._top))
        due = self._due(frame.time)
        while self.alive() and (left := due - time.perf_counter()) > 0:
            time.sleep(min(left, 0.02))
        return self._open

    def alive(self) -> bool:
        """Draws what is due and takes keys; returns whether the window is still open."""
        if self._open:
            self._root.update()
        return self._open

    def close(self) -> None:
        """Closes the window."""
        self._root.destroy()

    def _stop(self, *_: Any) -> None:
        self._open = False

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """The size that fits on the screen: predictions stand in the lower corner of the picture."""
        tall, wide = video_size(height, width)
        screen = self._root.winfo_screenheight(), self._root.winfo_screenwidth()
        scale = min(1.0, SHARE * screen[0] / tall, SHARE * screen[1] / wide)
        return max(2, round(tall * scale)), max(2, round(wide * scale))

    def _draw(self, picture: Any) -> None:
        """Draws into the image that is there if the size is the same, which takes less than a new one."""
        from PIL import Image, ImageTk

        image = Image.fromarray(picture)
        if self._photo is not None and (self._photo.width(), self._photo.height()) == image.size:
            self._photo.paste(image)
            return
        before, self._photo = self._photo, ImageTk.PhotoImage(image, master=self._root)
        self._label.configure(image=self._photo)
        if before is None:
            self._root.deiconify()

    def _due(self, seconds: float) -> float:
        """Says when a frame of this time has been seen for as long as it lasts."""
        now = time.perf_counter()
        if not self.paced:
            return now
        ahead = 0.0 if self._start is None else self._start + seconds - now
        if self._start is None or abs(ahead) > LONGEST:  # a jump in time, or a model slower than the video
            ahead = min(max(ahead, 0.0), LONGEST)
            self._start = now + ahead - seconds
        return now + ahead
