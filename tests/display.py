"""A display of its own for tests that open windows: Xvfb, what it shows, and a person who presses keys.

Xvfb keeps its screen in a file, and libX11 is where Tk is: nothing else is needed.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

KEY_PRESS, CLIENT_MESSAGE, KEY_PRESS_MASK = 2, 33, 1
SIZE = 640, 480


def missing() -> str | None:
    """Why no window can be opened here, if none can."""
    if find_spec("_tkinter") is None:
        return "this Python has no tkinter"
    if shutil.which("Xvfb") is None:
        return "there is no Xvfb (Debian: apt-get install xvfb)"
    return None if ctypes.util.find_library("X11") else "there is no libX11"


class _Key(ctypes.Structure):
    """XKeyEvent"""

    _fields_ = [
        ("type", ctypes.c_int), ("serial", ctypes.c_ulong), ("send_event", ctypes.c_int), ("display", ctypes.c_void_p),
        ("window", ctypes.c_ulong), ("root", ctypes.c_ulong), ("subwindow", ctypes.c_ulong), ("time", ctypes.c_ulong),
        *[(name, ctypes.c_int) for name in ("x", "y", "x_root", "y_root")],
        ("state", ctypes.c_uint), ("keycode", ctypes.c_uint), ("same_screen", ctypes.c_int),
    ]  # fmt: skip


class _Message(ctypes.Structure):
    """XClientMessageEvent"""

    _fields_ = [
        ("type", ctypes.c_int), ("serial", ctypes.c_ulong), ("send_event", ctypes.c_int), ("display", ctypes.c_void_p),
        ("window", ctypes.c_ulong), ("message_type", ctypes.c_ulong), ("format", ctypes.c_int),
        ("data", ctypes.c_long * 5),
    ]  # fmt: skip


class _Event(ctypes.Union):
    _fields_ = [("key", _Key), ("message", _Message), ("pad", ctypes.c_long * 24)]


class Display:
    """A screen without a window manager: all windows stand in its upper left corner.

    Attributes:
        name: What ``DISPLAY`` is to be.
    """

    def __init__(self, name: str, screen: Path) -> None:
        self.name = name
        self._screen = screen
        self._x: Any = ctypes.CDLL(ctypes.util.find_library("X11"))
        self._x.XOpenDisplay.restype = ctypes.c_void_p
        self._x.XDefaultRootWindow.restype = self._x.XInternAtom.restype = ctypes.c_ulong
        self._display = ctypes.c_void_p(self._x.XOpenDisplay(name.encode()))
        self._root = ctypes.c_ulong(self._x.XDefaultRootWindow(self._display))

    def picture(self) -> np.ndarray[Any, Any]:
        """What the screen shows, (height, width, RGB): the file is an X window dump."""
        content = self._screen.read_bytes()
        header = struct.unpack(">25I", content[:100])
        width, height, line = header[4], header[5], header[12]
        pixels = np.frombuffer(content, np.uint8, height * line, header[0] + 12 * header[19])
        return pixels.reshape(height, line)[:, : 4 * width].reshape(height, width, 4)[:, :, 2::-1]

    def windows(self) -> list[int]:
        """The windows with a title."""
        root, parent, children, count = (
            ctypes.c_ulong(),
            ctypes.c_ulong(),
            ctypes.POINTER(ctypes.c_ulong)(),
            ctypes.c_uint(),
        )
        self._x.XQueryTree(self._display, self._root, *map(ctypes.byref, (root, parent, children, count)))
        return [window for window in children[: count.value] if self._titled(window)]

    def press(self, window: int, key: str, shift: bool = False) -> None:
        """Give a window the focus, and a key to it."""
        self._x.XSetInputFocus(self._display, ctypes.c_ulong(window), 1, 0)
        code = self._x.XKeysymToKeycode(self._display, ctypes.c_ulong(self._x.XStringToKeysym(key.encode())))
        event = _Key(KEY_PRESS, window=window, root=self._root, keycode=code, state=int(shift), same_screen=1)
        self._send(window, _Event(key=event), KEY_PRESS_MASK)

    def close_button(self, window: int) -> None:
        """What a window manager sends when the button in the title of a window is pressed."""
        message = _Message(CLIENT_MESSAGE, window=window, message_type=self._atom("WM_PROTOCOLS"), format=32)
        message.data[0] = self._atom("WM_DELETE_WINDOW")
        self._send(window, _Event(message=message), 0)

    def leave(self) -> None:
        self._x.XCloseDisplay(self._display)

    def _titled(self, window: int) -> bool:
        return bool(self._x.XFetchName(self._display, ctypes.c_ulong(window), ctypes.byref(ctypes.c_char_p())))

    def _atom(self, name: str) -> int:
        return int(self._x.XInternAtom(self._display, name.encode(), 0))

    def _send(self, window: int, event: _Event, mask: int) -> None:
        self._x.XSendEvent(self._display, ctypes.c_ulong(window), 0, ctypes.c_long(mask), ctypes.byref(event))
        self._x.XSync(self._display, 0)


@contextmanager
def display(folder: Path) -> Iterator[Display]:
    """A display for as long as the block lasts."""
    size = "x".join(map(str, SIZE))
    command = ["Xvfb", "-displayfd", "1", "-screen", "0", f"{size}x24", "-fbdir", str(folder), "-nolisten", "tcp"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            screen = Display(f":{server.stdout.readline().strip()}", folder / "Xvfb_screen0")
            try:
                yield screen
            finally:
                screen.leave()
        finally:
            server.terminate()
