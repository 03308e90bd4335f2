"""Small video files, made by FFmpeg, for the tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

MILLISECOND = Fraction(1, 1000)


def write_frames(
    path: Path,
    pictures: Sequence[NDArray[np.uint8]],  # [height, width, 3] each
    *,
    rate: Fraction = Fraction(25, 2),
    times: Sequence[int] | None = None,  # in milliseconds; None: at the rate
    codec: str = "libx264",
    container: str | None = None,  # None: as the name ends
    turned: float = 0,  # degrees that a player turns the frames
    pixel_aspect: Fraction = Fraction(1),
) -> Path:
    av = pytest.importorskip("av")
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate)
        if pictures:
            stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.sample_aspect_ratio = pixel_aspect
        if times is not None:
            stream.codec_context.time_base = MILLISECOND
        if turned:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("this PyAV writes no rotation")
            stream.set_display_rotation(turned)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], MILLISECOND
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def shades(count: int, width: int = 64, height: int = 48) -> list[NDArray[np.uint8]]:
    """Grey pictures, each brighter than the one before."""
    return [np.full((height, width, 3), 10 + i * (240 // count), np.uint8) for i in range(count)]


def noise(count: int, width: int = 64, height: int = 48) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3), np.uint8) for _ in range(count)]
