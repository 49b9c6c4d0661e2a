"""Streams a video to a running ``co3d serve``, as JPEG over a WebSocket, and says what comes back.

    python examples/serve_client.py video.mp4 --stream door

Frames go at the model's rate, as a server leaves none out. What the server loses when one of its processes dies is sent
again, and a stream that restarts says so. The token is taken from the variable CO3D_TOKEN.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import urllib.request
from collections.abc import Iterator

from PIL import Image

import co3d_compile as co3d
from co3d_compile.media.video_steps import Rate
from co3d_compile.serve import client


def jpegs(source: str, fps: float | None) -> Iterator[bytes]:
    """The frames of a video at this rate; None: all of them."""
    rate = Rate(fps)
    for frame in co3d.read_source(source):
        out = io.BytesIO()
        Image.fromarray(frame.image).save(out, "JPEG", quality=90)
        for _ in range(rate(frame.time)):
            yield out.getvalue()


def frame_rate(url: str, token: str | None) -> float | None:
    """Frames per second that the model wants."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    http = f"http{url.removeprefix('ws')}" if url.startswith("ws") else url
    with urllib.request.urlopen(urllib.request.Request(f"{http}/v1/model", None, headers)) as found:
        fps: float | None = json.load(found)["fps"]
    return fps


async def run(url: str, name: str, source: str) -> None:
    token = os.environ.get("CO3D_TOKEN")
    frames = jpegs(source, frame_rate(url, token))
    async for message in client.stream(url, name, frames, token=token, top=1, values=0):
        if message["type"] == "answer" and message["about"] is None:
            print(f"frame {message['frame']}: no result yet")
        elif message["type"] == "answer" and not message["warm"]:
            print(f"frame {message['frame']}: warming up")
        elif message["type"] == "answer":
            best = message["top"][0]
            print(f"frame {message['about']}: {best['label']} {best['score']:.2f}")
        else:
            print({key: message[key] for key in ("type", "frame", "reason", "last") if key in message})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a video file, a camera, a URL: as for co3d run")
    parser.add_argument("--url", default="http://localhost:8000", help="the address that co3d serve has printed")
    parser.add_argument("--stream", default="camera", help="a name; each camera has its own")
    args = parser.parse_args()
    try:
        asyncio.run(run(args.url, args.stream, args.source))
    except (co3d.Co3dError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
