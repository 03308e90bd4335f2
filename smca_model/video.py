"""Videos and webcams, read as upright frames with their times, and frames written as a video file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from smca_kernels.files import replacing

from .data.images import DataError

if TYPE_CHECKING:
    from torch import Tensor

MILLISECOND = Fraction(1, 1000)  # a webcam's times are a clock's


@dataclass(frozen=True)
class Frame:
    """A frame of a video.

    Attributes:
        image: uint8 [3, height, width], RGB, upright.
        ticks: when it is shown, in the video's `time_base`, from 0 at the first frame.
    """

    image: Tensor
    ticks: int


class VideoFile:
    """The frames of a video file that FFmpeg can read, one after the other, turned as the file says they are shown.

    Args:
        path: the file; of several video streams, FFmpeg's choice is read.

    Attributes:
        name: the path.
        width, height: of a frame, upright, in pixels.
        frames: how many there are as the file says or its duration implies, for a bar; None if neither is known.
        rate: frames per second on average, as the file says; None if it doesn't.
        time_base: what frames' times are multiples of, in seconds.
        pixel_aspect: width over height of a pixel where it is shown.
        damaged: parts that could not be decoded so far, and were left out.

    Raises:
        DataError: naming the file, when it can't be read, has no video or no frame.
    """

    def __init__(self, path: Path) -> None:
        import av

        self.name = str(path)
        try:
            self._container = av.open(path)
        except (av.error.FFmpegError, OSError) as error:
            raise DataError(f"video {path} can't be read: {error.strerror}") from None
        try:
            if not self._container.streams.video:
                raise DataError(f"video {path} can't be read: it has no video stream")
            self._stream = self._container.streams.best("video")
            self._stream.thread_type = "AUTO"
            self.damaged = 0
            self._decoded = self._decode()
            first = next(self._decoded, None)
            if first is None:
                raise DataError(
                    f"video {path} can't be read: it has no frame{' that can be decoded' * (self.damaged > 0)}"
                )
        except BaseException:
            self._container.close()
            raise
        self._first: Any = first
        stream, turned = self._stream, self._quarters(first) % 2
        self.width, self.height = self._first.width, self._first.height
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        if turned:
            self.width, self.height, aspect = self.height, self.width, 1 / aspect
        self.pixel_aspect = aspect
        self.rate: Fraction | None = stream.average_rate or stream.guessed_rate
        self.time_base: Fraction = stream.time_base
        seconds = (
            float(stream.duration * stream.time_base) if stream.duration else (self._container.duration or 0) / 1e6
        )
        self.frames: int | None = stream.frames or round(seconds * (self.rate or 0)) or None

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[Frame]:
        first, size = self._first, {"width": self._first.width, "height": self._first.height}
        step = 1 if self.rate is None else max(1, round(1 / (self.rate * self.time_base)))
        ticks = -step
        frame: Any = first
        while frame is not None:
            after = ticks + step  # for a stream without times, or whose times don't rise
            timed = frame.pts is not None and first.pts is not None and frame.pts - first.pts > ticks
            ticks = frame.pts - first.pts if timed else after
            # A stream may change its size; a file that is written can't.
            upright = np.rot90(frame.to_ndarray(format="rgb24", **size), self._quarters(first))
            yield Frame(torch.from_numpy(upright.copy()).permute(2, 0, 1).contiguous(), ticks)
            frame = next(self._decoded, None)

    @staticmethod
    def _quarters(frame: Any) -> int:
        """How many quarters of a turn, counterclockwise, make a frame upright."""
        return round(frame.rotation / 90) % 4

    def _decode(self) -> Iterator[Any]:
        import av

        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, EOFError):
                return
            except av.error.FFmpegError:
                self.damaged += 1
                return
            try:
                yield from packet.decode()
            except EOFError:
                return
            except av.error.FFmpegError:
                self.damaged += 1


class Webcam:
    """The frames of a webcam, without an end, with the times at which they came; closed when left.

    Args:
        number: as OpenCV counts them, from 0.

    Attributes:
        name, width, height, frames, rate, time_base, pixel_aspect, damaged: as of `VideoFile`.

    Raises:
        DataError: when there is no such webcam, or it gives no frame.
    """

    time_base, pixel_aspect, frames, damaged = MILLISECOND, Fraction(1), None, 0

    def __init__(self, number: int) -> None:
        import cv2

        self.name = f"webcam {number}"
        before = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # all is said below
        try:
            self._capture = cv2.VideoCapture(number)
            opened, (read, self._first) = self._capture.isOpened(), self._capture.read()
        finally:
            cv2.utils.logging.setLogLevel(before)
        self._began = time.monotonic()
        if not read:
            self._capture.release()
            reason = (
                "it gives no picture; is it in use?" if opened else "there is none of that number, or no right to it"
            )
            raise DataError(f"{self.name} can't be read: {reason}")
        self.height, self.width = self._first.shape[:2]
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = Fraction(rate).limit_denominator(1001) if rate > 0 else None

    def __enter__(self) -> Webcam:
        return self

    def __exit__(self, *_: object) -> None:
        self._capture.release()

    def __iter__(self) -> Iterator[Frame]:
        read, picture, ticks = True, self._first, 0
        while read:
            yield Frame(torch.from_numpy(picture[:, :, ::-1].copy()).permute(2, 0, 1).contiguous(), ticks)
            read, picture = self._capture.read()
            ticks = max(ticks + 1, round((time.monotonic() - self._began) / self.time_base))


@contextmanager
def writing_video(path: Path, like: VideoFile | Webcam) -> Iterator[Callable[[Tensor, int], None]]:
    """Write or replace an MP4 file (H.264, without sound) by the frames that what is yielded is called with.

    It is there when all went well, else what was before. Its size, times and shape of a pixel are those of another
    video.

    Args:
        path: where the file is to be; its folder must exist.
        like: the other video.

    Yields:
        A function of an image, uint8 [3, like.height, like.width], and its time in ticks of like.time_base, more than
        the last one's.

    Raises:
        OSError: with the path's name, when it can't be written.
    """
    import av

    with replacing(path) as temporary, temporary.open("wb") as file:
        sink = _Sink(file)
        with av.open(sink, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=like.rate or 30)
            stream.width, stream.height = like.width, like.height
            # Chroma of half the size needs even sides.
            stream.pix_fmt = "yuv444p" if like.width % 2 or like.height % 2 else "yuv420p"
            stream.codec_context.time_base = like.time_base
            stream.codec_context.sample_aspect_ratio = like.pixel_aspect

            def write(image: Tensor, ticks: int) -> None:
                frame = av.VideoFrame.from_ndarray(image.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
                frame.pts, frame.time_base = ticks, like.time_base
                container.mux(stream.encode(frame))
                sink.check()

            yield write
            container.mux(stream.encode(None))
        sink.check()


class _Sink:
    """A file for FFmpeg to write, which keeps the first error: raised inside FFmpeg, some would be printed and lost."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: OSError | None = None
        self.seek, self.tell = file.seek, file.tell

    def write(self, data: bytes) -> int:
        if self._error is None:
            try:
                self._file.write(data)
                self._file.flush()
            except OSError as error:
                self._error = error
        return len(data)

    def check(self) -> None:
        if self._error is not None:
            raise self._error
