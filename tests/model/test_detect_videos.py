"""`smca detect` on videos and webcams: a video with boxes and a line a frame, whole or not at all."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("av")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")
pytest.importorskip("torchvision")

from small_videos import noise, shades, write_frames
from test_video import FakeCapture, read

from smca_kernels.tools import cli
from smca_model import SMCA, build, detect, weights
from smca_model.video import VideoFile

CLASSES = ("one", "two", "three")
TINY = {"hidden_dim": 32, "num_heads": 2, "decoder_layers": 2, "num_queries": 6, "ffn_dim": 64}


def small_detector() -> SMCA:
    model = build("smca-tiny", len(CLASSES), **TINY).eval()
    model.image_size, model.classes = (48, 96), CLASSES
    return model


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    weights.save(small_detector(), tmp_path / "model.safetensors", CLASSES)
    options = ("--weights", tmp_path / "model.safetensors", "--out", tmp_path / "found", "--threshold", 0)
    return ["detect", *map(str, options)]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_video_is_written_with_boxes_and_a_line_a_frame(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_frames(tmp_path / "a film.avi", noise(5), codec="mpeg4")
    assert cli.main([*command, str(source), "--batch-size", "2"]) == 0
    out = tmp_path / "found"
    assert {path.name for path in out.iterdir()} == {"a film_boxes.mp4", "a film_detections.jsonl", "detections.json"}
    before, images, seconds = read(source)
    after, drawn, seconds_after = read(out / "a film_boxes.mp4")
    assert (after.width, after.height, after.rate, after.frames) == (before.width, before.height, before.rate, 5)
    assert seconds_after == pytest.approx(seconds)
    lines = lines_of(out / "a film_detections.jsonl")
    assert [line["frame"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["seconds"] for line in lines] == pytest.approx(seconds)
    model = weights.load(tmp_path / "model.safetensors").eval()
    (found,) = detect.detect(model, images[3:4], threshold=0)
    assert [each["score"] for each in lines[3]["detections"]] == pytest.approx(found["scores"].tolist(), abs=1e-4)
    expected = detect.draw_boxes(images[3], found, CLASSES, enlarge=False).float()
    difference = (drawn[3].float() - expected).abs().mean()  # compression loses some
    assert difference < (drawn[3].float() - images[3].float()).abs().mean() / 2
    (entry,) = json.loads((out / "detections.json").read_text())
    facts = {"video": str(source), "width": 64, "height": 48, "frames": 5, "fps": 12.5, "rate_varies": False}
    assert entry == facts | {"detections": "a film_detections.jsonl"}
    told = capsys.readouterr()
    assert "90 objects of score 0 or more in 5 frames, in " in told.out
    assert "5/5" in told.err  # the bar knows its end


def test_a_frame_rate_that_varies_is_told_and_kept(
    command: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_frames(tmp_path / "film.mkv", shades(4), times=[0, 40, 80, 300])
    assert cli.main([*command, str(source)]) == 0
    assert f"{source}: frames are 40 to 220 ms apart" in caplog.text
    assert read(tmp_path / "found" / "film_boxes.mp4")[2] == pytest.approx([0, 0.04, 0.08, 0.3])
    (entry,) = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert entry["rate_varies"] is True


def test_images_and_videos_are_told_together(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    source = write_frames(tmp_path / "film.mp4", shades(2))
    Image.effect_noise((64, 48), 80).save(tmp_path / "image.gif")  # an image, by what is in it
    assert cli.main([*command, str(source), str(tmp_path / "image.gif")]) == 0
    report = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert [next(iter(each)) for each in report] == ["image", "video"]
    assert " in 1 images and 2 frames, in " in capsys.readouterr().out


def test_a_video_that_can_not_be_read_keeps_no_other_from_being_written(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = write_frames(tmp_path / "good.mp4", shades(2)), tmp_path / "bad.mp4"
    bad.write_text("no video")
    assert cli.main([*command, str(bad), str(good)]) == 1
    told = capsys.readouterr().err
    assert f"smca detect: 1 left out:\nvideo {bad} can't be read: Invalid data found" in told
    assert (tmp_path / "found" / "good_boxes.mp4").exists()
    assert not (tmp_path / "found" / "bad_boxes.mp4").exists()


def test_damaged_parts_are_told(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_frames(tmp_path / "film.avi", noise(9), codec="ffv1")
    whole = path.read_bytes()
    half, part = len(whole) // 2, len(whole) // 20
    path.write_bytes(whole[: half - part] + bytes([7]) * part + whole[half:])
    assert cli.main([*command, str(path)]) == 1
    assert f"video {path} has 1 parts that can't be decoded" in capsys.readouterr().err
    assert len(lines_of(tmp_path / "found" / "film_detections.jsonl")) == 8


def test_a_video_that_is_stopped_is_written_as_far_as_it_was(
    command: list[str], tmp_path: Path, stopped_in_second_batch: int
) -> None:
    number = stopped_in_second_batch
    files = [write_frames(tmp_path / name, shades(9)) for name in ("first.mp4", "second.mp4")]
    before = signal.getsignal(number)
    assert cli.main([*command, *map(str, files), "--batch-size", "2"]) == 128 + number
    out = tmp_path / "found"
    assert {path.name for path in out.iterdir()} == {"first_boxes.mp4", "first_detections.jsonl", "detections.json"}
    assert len(read(out / "first_boxes.mp4")[1]) == len(lines_of(out / "first_detections.jsonl")) == 4
    assert signal.getsignal(number) == before


def test_what_stops_a_video_at_once_leaves_nothing(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = detect.draw_boxes

    def draw(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(detect, "draw_boxes", draw)
    assert cli.main([*command, str(write_frames(tmp_path / "film.mp4", shades(5)))]) == cli.INTERRUPTED
    assert not list((tmp_path / "found").iterdir())


def test_a_full_disk_leaves_nothing_and_is_told(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from small_disk import files_of_at_most

    source = write_frames(tmp_path / "film.mp4", noise(8))
    with files_of_at_most(source.stat().st_size // 2):
        assert cli.main([*command, str(source), "--threshold", "1"]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == f"smca detect: error: {tmp_path / 'found' / 'film_boxes.mp4'}: File too large"
    assert "PyAV" not in "".join(told)
    assert not list((tmp_path / "found").iterdir())


def test_a_name_that_is_too_long_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "detect", lambda *_, **__: pytest.fail("it was run"))
    with VideoFile(write_frames(tmp_path / "film.mp4", shades(2))) as video, pytest.raises(OSError, match="too long"):
        detect.detect_video(small_detector(), video, boxes=tmp_path / ("n" * 256), records=tmp_path / "records.jsonl")


def test_a_webcam_is_shown_until_it_is_stopped(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cv2 = pytest.importorskip("cv2")
    capture = FakeCapture(1000)
    real = capture.read

    def pictures() -> Any:
        if capture.left == 996:
            os.kill(os.getpid(), signal.SIGINT)
        return real()

    capture.read = pictures
    monkeypatch.setattr(cv2, "VideoCapture", lambda number: capture)
    assert cli.main([*command, "--webcam", "2"]) == cli.INTERRUPTED
    out = tmp_path / "found"
    lines = lines_of(out / "webcam_2_detections.jsonl")
    assert len(lines) == len(read(out / "webcam_2_boxes.mp4")[1]) == 5
    assert [each["seconds"] for each in lines] == pytest.approx(read(out / "webcam_2_boxes.mp4")[2], abs=0.002)
    (entry,) = json.loads((out / "detections.json").read_text())
    assert (entry["video"], entry["frames"]) == ("webcam 2", 5)
    assert capture.released


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give images, folders, videos, or --webcam N"),
        (["0"], "images must be files or folders, there is no 0; a webcam is --webcam 0"),
        (["https://example.org/film.mp4"], "images and videos must be files, no addresses; download it first, got "),
        (["rtsp://10.0.0.1/camera"], "images and videos must be files, no addresses"),
        (["--webcam", "-1"], "--webcam must be at least 0, got -1"),
        (["--webcam", "77"], "webcam 77 can't be read: there is none of that number"),
        (["film.mp4", "--attention"], "--attention must go with images alone, got film.mp4"),
        (["text.mp4"], "video text.mp4 can't be read: Invalid data found"),
        (["film.mp4", "film.mkv"], "images must differ in name without suffix, got film.mp4 and film.mkv"),
    ],
)
def test_wrong_options_are_told_in_one_line(
    command: list[str],
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "film.mp4" in options:
        write_frames(Path("film.mp4"), shades(1))
        write_frames(Path("film.mkv"), shades(1))
    Path("text.mp4").write_text("no video")
    assert cli.main([*command, *options]) == 2
    assert f"smca detect: error: {message}" in capsys.readouterr().err


def test_without_pyav_the_command_that_installs_it_is_told(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    source = write_frames(tmp_path / "film.mp4", shades(1))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("av", "cv2") else real(name))
    assert cli.main([*command, str(source)]) == 2
    assert "needs av: pip install 'smca_kernels[video]'" in capsys.readouterr().err
    assert cli.main([*command, "--webcam", "0"]) == 2
    assert "needs av, opencv-python-headless: pip install 'smca_kernels[video]'" in capsys.readouterr().err
