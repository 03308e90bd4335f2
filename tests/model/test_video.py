"""Videos are read upright, whole and in time, and written with the size and times that they had."""

from __future__ import annotations

import errno
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("torchvision")

from small_videos import noise, shades, write_frames

from smca_model import video as video_module
from smca_model.data.images import DataError
from smca_model.video import VideoFile, Webcam, writing_video


def read(path: Path) -> tuple[VideoFile, list[torch.Tensor], list[float]]:
    with VideoFile(path) as video:
        frames = list(video)
    return video, [frame.image for frame in frames], [float(frame.ticks * video.time_base) for frame in frames]


def copy(source: Path, path: Path) -> Path:
    with VideoFile(source) as video, writing_video(path, video) as write:
        for frame in video:
            write(frame.image, frame.ticks)
    return path


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("a film of mine.mp4", "libx264", None),
        ("film.mkv", "libx264", None),
        ("film.avi", "mpeg4", None),
        ("film.webm", "libvpx-vp9", None),
        ("film.without_a_known_end", "mpeg2video", "mpegts"),
    ],
)
def test_every_frame_is_read_once_and_in_time(tmp_path: Path, name: str, codec: str, container: str | None) -> None:
    pictures, rate = shades(6), Fraction(25)
    video, images, seconds = read(write_frames(tmp_path / name, pictures, rate=rate, codec=codec, container=container))
    assert (video.width, video.height, video.rate, video.damaged) == (64, 48, rate, 0)
    assert all(image.shape == (3, 48, 64) and image.dtype == torch.uint8 for image in images)
    assert [image.float().mean().item() for image in images] == pytest.approx([p.mean() for p in pictures], abs=5)
    assert seconds == pytest.approx([i / 25 for i in range(6)], abs=0.001)  # some containers count milliseconds
    assert video.frames in (6, None) or container == "mpegts"


def test_frames_without_times_come_at_the_rate_of_the_stream(tmp_path: Path) -> None:
    video, images, seconds = read(write_frames(tmp_path / "film.h264", shades(5), container="h264"))
    assert len(images) == 5
    assert seconds == pytest.approx([i / float(video.rate) for i in range(5)])


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_frames_are_turned_as_players_show_them(tmp_path: Path, degrees: int) -> None:
    cv2 = pytest.importorskip("cv2")
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:16, :16] = 255  # one corner
    path = write_frames(tmp_path / "film.mp4", [picture] * 2, turned=degrees)
    video, images, _ = read(path)
    _, expected = cv2.VideoCapture(str(path)).read()  # OpenCV heeds the rotation
    assert (video.height, video.width) == expected.shape[:2] == ((64, 48) if degrees % 180 else (48, 64))
    centers = slice(8, None, 16)  # of blocks, away from what compression smears
    ours = images[0].permute(1, 2, 0).numpy()[centers, centers, 0] > 128
    assert ours.sum() == 1
    assert (ours == (expected[centers, centers, 0] > 128)).all()


def test_a_file_that_is_cut_off_gives_what_is_there(tmp_path: Path) -> None:
    path = write_frames(tmp_path / "film.mkv", noise(8))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    _, images, _ = read(path)
    assert 0 < len(images) < 8


def test_what_is_damaged_is_left_out_and_counted(tmp_path: Path) -> None:
    path = write_frames(tmp_path / "film.avi", noise(9), codec="ffv1")
    whole = path.read_bytes()
    half, part = len(whole) // 2, len(whole) // 20
    path.write_bytes(whole[: half - part] + bytes([7]) * part + whole[half:])
    video, images, _ = read(path)
    assert (len(images), video.damaged) == (8, 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no video", "Invalid data found when processing input"),
        (b"", "Invalid data found when processing input"),
        (None, "No such file or directory"),
    ],
)
def test_what_is_no_video_is_told_with_its_name(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "film.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"video {path} can't be read: {reason}"):
        VideoFile(path)


def test_a_file_of_sound_alone_has_no_video(tmp_path: Path) -> None:
    import av

    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
    with pytest.raises(DataError, match=f"video {path} can't be read: it has no video stream"):
        VideoFile(path)


def test_a_video_without_frames_is_refused(tmp_path: Path) -> None:
    whole = write_frames(tmp_path / "whole.avi", shades(3), codec="mpeg4").read_bytes()
    path = tmp_path / "film.avi"
    path.write_bytes(whole[: whole.index(b"movi") + 4])  # the header alone
    with pytest.raises(DataError, match=f"video {path} can't be read: "):
        VideoFile(path)


@pytest.mark.parametrize("size", [(64, 48), (63, 48), (50, 37)])
def test_a_copy_has_the_size_frames_and_rate(tmp_path: Path, size: tuple[int, int]) -> None:
    source = write_frames(tmp_path / "film.avi", shades(6, *size), codec="mpeg4", rate=Fraction(25, 2))
    _, images, seconds = read(source)
    after, again, seconds_again = read(copy(source, tmp_path / "copy.mp4"))
    assert (after.width, after.height, after.rate, after.frames) == (*size, Fraction(25, 2), 6)
    assert seconds_again == pytest.approx(seconds)
    for one, other in zip(images, again, strict=True):
        assert one.float().mean().item() == pytest.approx(other.float().mean().item(), abs=5)


def test_a_copy_keeps_times_that_vary(tmp_path: Path) -> None:
    times = [0, 40, 80, 300, 340, 1000]
    source = write_frames(tmp_path / "film.mkv", shades(6), times=times)
    _, _, seconds = read(source)
    assert seconds == pytest.approx([each / 1000 for each in times])
    assert read(copy(source, tmp_path / "copy.mp4"))[2] == pytest.approx(seconds)


@pytest.mark.parametrize(("degrees", "expected"), [(0, Fraction(4, 3)), (90, Fraction(3, 4))])
def test_a_copy_keeps_the_shape_of_pixels(tmp_path: Path, degrees: int, expected: Fraction) -> None:
    source = write_frames(tmp_path / "film.mp4", shades(3), pixel_aspect=Fraction(4, 3), turned=degrees)
    after, _, _ = read(copy(source, tmp_path / "copy.mp4"))
    assert after.pixel_aspect == expected


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    source, path = write_frames(tmp_path / "film.mp4", shades(3)), tmp_path / "copy.mp4"
    path.write_text("old")
    with VideoFile(source) as video, pytest.raises(TypeError), writing_video(path, video) as write:
        write(next(iter(video)).image, "no time")
    assert path.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == sorted((source, path))


def test_a_full_disk_is_told_with_the_files_name(tmp_path: Path) -> None:
    from small_disk import files_of_at_most

    source, path = write_frames(tmp_path / "film.mp4", noise(8)), tmp_path / "copy.mp4"
    with files_of_at_most(source.stat().st_size // 2), pytest.raises(OSError, match="too large") as raised:
        copy(source, path)
    assert raised.value.filename == str(path)
    assert list(tmp_path.iterdir()) == [source]


def test_a_disk_that_is_full_at_the_very_end_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, path = write_frames(tmp_path / "film.mp4", shades(3)), tmp_path / "copy.mp4"
    real = video_module._Sink.write

    def write(self: Any, data: bytes) -> int:
        if b"moov" in data:  # the index, which is written last
            self._error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, data)

    monkeypatch.setattr(video_module._Sink, "write", write)
    with pytest.raises(OSError, match="No space left") as raised:
        copy(source, path)
    assert raised.value.filename == str(path)
    assert list(tmp_path.iterdir()) == [source]


# -------------------------------------------------------------------------------------------------------------- webcams


class FakeCapture:
    """What OpenCV gives of a webcam: some pictures in BGR, then none."""

    def __init__(self, count: int, opened: bool = True, rate: float = 30.0) -> None:
        self.left, self.opened, self.rate, self.released = count, opened, rate, False

    def isOpened(self) -> bool:
        return self.opened

    def read(self) -> tuple[bool, Any]:
        self.left -= 1
        picture = np.zeros((48, 64, 3), np.uint8)
        picture[..., 0] = 200  # blue
        return (True, picture) if self.left >= 0 else (False, None)

    def get(self, _: int) -> float:
        return self.rate

    def release(self) -> None:
        self.released = True


def test_a_webcams_pictures_are_rgb_with_rising_times(monkeypatch: pytest.MonkeyPatch) -> None:
    cv2 = pytest.importorskip("cv2")
    capture = FakeCapture(3)
    monkeypatch.setattr(cv2, "VideoCapture", lambda number: capture)
    with Webcam(4) as webcam:
        frames = list(webcam)
    assert (webcam.name, webcam.width, webcam.height, webcam.rate) == ("webcam 4", 64, 48, 30)
    assert len(frames) == 3
    assert frames[0].image[:, 0, 0].tolist() == [0, 0, 200]
    assert frames[0].ticks == 0 < frames[1].ticks < frames[2].ticks
    assert capture.released


def test_a_webcam_that_is_not_there_is_told_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cv2")
    with pytest.raises(DataError, match="webcam 77 can't be read: there is none of that number"):
        Webcam(77)
    assert capfd.readouterr() == ("", "")


def test_a_webcam_without_a_picture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cv2 = pytest.importorskip("cv2")
    capture = FakeCapture(0)
    monkeypatch.setattr(cv2, "VideoCapture", lambda number: capture)
    with pytest.raises(DataError, match="webcam 0 can't be read: it gives no picture"):
        Webcam(0)
    assert capture.released
