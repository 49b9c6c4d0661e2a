"""Pictures that are sent to a shard: decoded and preprocessed as the file says, or refused."""

from __future__ import annotations

import asyncio
import io

import numpy as np
import torch
from PIL import Image
from shards import frame
from torch import nn

import co3d_compile as co3d
from co3d_compile.cli.serve import about_pictures
from co3d_compile.media import VideoFrame
from co3d_compile.serve.engine import TENSOR, Engine
from co3d_compile.serve.options import ServeOptions
from co3d_compile.serve.shard import Shard


def picture(kind: str, image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind)
    return out.getvalue()


def test_pictures_are_preprocessed_as_the_file_says() -> None:
    """JPEG, PNG and raw pictures against a Predictor on the decoded picture."""
    network = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.AdaptiveAvgPool3d(1), nn.Flatten()).eval()
    compiled = co3d.compile(
        network, (torch.zeros(1, 3, 4, 16, 16),), preprocess={"size": 20, "mean": 0.4, "std": 0.2}, labels=list("abcd")
    )
    images = [np.random.default_rng(n).integers(0, 256, (30, 40, 3), np.uint8) for n in range(8)]

    async def main() -> None:
        options = ServeOptions(max_streams=4, max_pixels=5000)
        engine = Engine(compiled, options)
        shard = Shard(engine, options)
        shard.start()
        for kind, name in (("image/jpeg", "JPEG"), ("image/png", "PNG"), ("image/x-rgb", "")):
            predictor = co3d.Predictor(compiled, threads=1)
            for number, image in enumerate(images):
                payload = picture(name, image) if name else image.tobytes()
                decoded = np.asarray(Image.open(io.BytesIO(payload))) if name else image
                more = {"kind": kind, "size": (30, 40), "top": 2, "values": False}
                reply = await shard.frame(frame(kind, number, payload, **more))
                (expected,) = predictor.push(VideoFrame(decoded, number / 10, number)) or [None]
                assert "outputs" not in reply
                if expected is not None:
                    assert [best["label"] for best in reply["top"]] == [best.label for best in expected.top(2)]
                    np.testing.assert_allclose(reply["top"][0]["score"], expected.top(1)[0].score, rtol=1e-4)
        bad = {
            "not a picture": ("image/jpeg", b"nothing", None, 400),
            "cut off": ("image/jpeg", picture("JPEG", images[0])[:200], None, 400),
            "a PNG called JPEG": ("image/jpeg", picture("PNG", images[0]), None, 400),
            "too large": ("image/jpeg", picture("JPEG", np.zeros((80, 80, 3), np.uint8)), None, 413),
            "another size": ("image/x-rgb", b"0" * 300, (10, 9), 400),
            "no size": ("image/x-rgb", b"0" * 300, None, 400),
            "unknown": ("text/html", b"0", None, 415),
            "half a tensor": (TENSOR, b"0", None, 400),
        }
        for what, (kind, payload, size, status) in bad.items():
            reply = await shard.frame(frame("bad", 0, payload, kind=kind, size=size))
            assert (reply["status"], reply["expected"]) == (status, 0), what
        await shard.close()

    asyncio.run(main())


def test_a_file_that_does_not_say_how_pictures_are_prepared_is_told_of() -> None:
    network, clip = nn.Conv3d(3, 4, 3, padding=1).eval(), torch.zeros(1, 3, 4, 8, 8)
    assert "does not say how pictures are prepared" in (about_pictures(co3d.compile(network, clip).info) or "")
    assert about_pictures(co3d.compile(network, clip, preprocess={"mean": 0.4}).info) is None
    row = co3d.compile(nn.Conv1d(3, 4, 3, padding=1).eval(), torch.zeros(1, 3, 4))
    assert about_pictures(row.info) is None, "it takes none"
