"""`smca detect`: boxes in pixels of the files, and what the command writes and refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")
pytest.importorskip("torchvision")

from PIL import Image
from tiny_detector import without_parameters

from smca_kernels.tools import cli
from smca_model import SMCA, build, detect, weights

CLASSES = ("one", "two", "three")
TINY = {"hidden_dim": 32, "num_heads": 2, "decoder_layers": 2, "num_queries": 6, "ffn_dim": 64}


def small_detector(image_size: tuple[int, int] = (48, 96)) -> SMCA:
    model = build("smca-tiny", len(CLASSES), **TINY).eval()
    model.image_size = image_size
    return model


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    model = small_detector()
    weights.save(model, tmp_path / "model.safetensors", CLASSES)
    return tmp_path / "model.safetensors"


def write_image(path: Path, width: int = 64, height: int = 48) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.effect_noise((width, height), 80).convert("RGB").save(path)
    return path


def test_boxes_are_in_pixels_of_the_image_as_given() -> None:
    model = small_detector()
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    large, small = detect.detect(model, [image.repeat(1, 2, 2), image], threshold=0.0)
    # One is the other's size doubled, before both are brought to one size; so of equal network inputs.
    same = detect.detect(model, [torch.nn.functional.interpolate(image[None], scale_factor=2)[0]], threshold=0)
    again = detect.detect(model, [image], threshold=0)
    assert same[0]["boxes"].max() > 1.5 * again[0]["boxes"].max()
    for found, (height, width) in ((large, (80, 120)), (small, (40, 60))):
        assert len(found["boxes"]) == 18
        assert (found["scores"].diff() <= 0).all()
        centers = (found["boxes"][:, :2] + found["boxes"][:, 2:]) / 2
        assert (centers >= 0).all()
        assert (centers <= torch.tensor([width, height])).all()


def test_a_model_of_buffers_alone_detects_the_same() -> None:
    model = small_detector()
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    (expected,) = detect.detect(model, [image], threshold=0.0)
    (found,) = detect.detect(without_parameters(model), [image], threshold=0.0)
    assert not list(model.parameters())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_nothing_below_the_threshold_is_found() -> None:
    model = small_detector()
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    (everything,) = detect.detect(model, [image], threshold=0.0)
    middle = float(everything["scores"].median())
    (found,) = detect.detect(model, [image], threshold=middle)
    assert 0 < len(found["scores"]) < len(everything["scores"])
    assert (found["scores"] >= middle).all()


@pytest.mark.parametrize("sides", [(1, 900), (900, 1), (1, 1)])
def test_objects_are_found_in_images_one_pixel_wide(sides: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, *sides), dtype=torch.uint8)
    (found,) = detect.detect(small_detector(), [image], threshold=0.0)
    assert len(found["boxes"]) == 18
    assert torch.isfinite(found["boxes"]).all()


def test_the_command_writes_boxes_pictures_and_the_speed(
    weights_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    files = [write_image(folder / "b.png"), write_image(folder / "a.jpg", 50, 70)]
    (folder / "notes.txt").write_text("no image")
    alone = write_image(tmp_path / "c.png", 20, 90)
    out = tmp_path / "found"
    command = ["detect", str(folder), str(alone), "--weights", str(weights_file), "--out", str(out)]
    assert cli.main([*command, "--threshold", "0", "--batch-size", "2"]) == 0
    report = json.loads((out / "detections.json").read_text())
    assert [each["image"] for each in report] == [str(path) for path in (files[1], files[0], alone)]
    assert [(each["width"], each["height"]) for each in report] == [(50, 70), (64, 48), (20, 90)]
    assert all(len(each["detections"]) == 18 for each in report)
    first = report[0]["detections"][0]
    assert first["class"] in CLASSES
    assert len(first["box"]) == 4
    names = ["a_boxes.png", "b_boxes.png", "c_boxes.png", "detections.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert "54 objects" in (told := capsys.readouterr().out)
    assert "images per second on " in told


def test_what_is_no_image_keeps_no_other_from_being_written(
    weights_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "images", tmp_path / "found"
    good = [write_image(folder / name) for name in ("a.png", "d.jpg", f"{'n' * 240}.png", f"{'o' * 251}.png")]
    (folder / "b.jpg").write_bytes((folder / "d.jpg").read_bytes()[:200])
    (folder / "c.webp").write_text("no image")
    (folder / "e.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "._a.png").write_bytes(b"\0\5\x16\7Mac OS X")
    (folder / "f.png").mkdir()
    (folder / "g.png").symlink_to("g.png")  # leads to itself
    command = ["detect", str(folder), "--weights", str(weights_file), "--out", str(out), "--batch-size", "1"]
    assert cli.main([*command, "--attention", "--queries", "1"]) == 1
    report = json.loads((out / "detections.json").read_text())
    assert [each["image"] for each in report] == list(map(str, good))
    # The longest name has no place for what is added to it.
    written = {f"{path.stem}_{kind}.png" for path in good[:3] for kind in ("boxes", "attention")}
    assert {path.name for path in out.iterdir()} == written | {"detections.json"}
    told = capsys.readouterr()
    assert " in 4 images, " in told.out
    lines = told.err.splitlines()[-7:]
    assert lines[0] == "smca detect: 6 left out:"
    for line, name in zip(lines[1:5], ("b.jpg", "c.webp", "e.png", "g.png"), strict=True):
        assert line.startswith(f"image {folder / name} can't be read: ")
    for line, kind in zip(lines[5:], ("boxes", "attention"), strict=True):
        assert line == f"picture {out / ('o' * 251)}_{kind}.png can't be written: File name too long"
    assert "._a.png" not in told.err


def test_what_was_found_before_a_stop_is_written(
    weights_file: Path, tmp_path: Path, stopped_in_second_batch: int
) -> None:
    number = stopped_in_second_batch
    files = [write_image(tmp_path / "images" / f"{name}.png") for name in "abcdef"]
    before = signal.getsignal(number)
    command = ["detect", str(tmp_path / "images"), "--weights", str(weights_file), "--out", str(tmp_path / "found")]
    assert cli.main([*command, "--batch-size", "2"]) == 128 + number
    report = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert [each["image"] for each in report] == list(map(str, files[:4]))
    assert {path.name for path in tmp_path.glob("found/*.png")} == {f"{name}_boxes.png" for name in "abcd"}
    assert signal.getsignal(number) == before


def test_what_was_found_before_memory_ran_out_is_written(
    weights_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [write_image(tmp_path / "images" / f"{name}.png") for name in "abcd"]
    real, batches = detect.detect, []

    def detect_one_batch(model: SMCA, images: list[torch.Tensor], threshold: float) -> list[dict[str, torch.Tensor]]:
        batches.append(images)
        if len(batches) == 2:
            raise torch.OutOfMemoryError("out of memory; a smaller --batch-size may help")
        return real(model, images, threshold=threshold)

    monkeypatch.setattr(detect, "detect", detect_one_batch)
    command = ["detect", str(tmp_path / "images"), "--weights", str(weights_file), "--out", str(tmp_path / "found")]
    assert cli.main([*command, "--batch-size", "2"]) == 1
    assert "smca detect: error: out of memory; a smaller --batch-size may help" in capsys.readouterr().err
    report = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert [each["image"] for each in report] == list(map(str, files[:2]))


def test_a_stop_before_anything_was_found_writes_nothing(
    weights_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "images" / "a.png")
    monkeypatch.setattr(detect, "_size_of", lambda path: os.kill(os.getpid(), signal.SIGINT))
    command = ["detect", str(tmp_path / "images"), "--weights", str(weights_file), "--out", str(tmp_path / "found")]
    assert cli.main(command) == cli.INTERRUPTED
    assert "error" not in capsys.readouterr().err
    assert not list((tmp_path / "found").iterdir())


def test_photographs_are_shown_and_reported_upright(weights_file: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 8
    Image.effect_noise((64, 32), 80).convert("RGB").save(tmp_path / "photograph.jpg", exif=exif)
    command = ["detect", str(tmp_path / "photograph.jpg"), "--weights", str(weights_file), "--threshold", "0"]
    assert cli.main([*command, "--out", str(tmp_path / "found")]) == 0
    (report,) = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert (report["width"], report["height"]) == (32, 64)
    with Image.open(tmp_path / "found" / "photograph_boxes.png") as picture:
        assert picture.size == (640, 1280)


def test_a_folder_of_hidden_files_alone_has_no_images(
    weights_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "images" / "._a.png")
    assert cli.main(["detect", str(tmp_path / "images"), "--weights", str(weights_file)]) == 2
    assert "a folder must have images in it" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "sides"), [([], (48, 72)), (["--size", "40"], (40, 60))])
def test_images_are_resized_as_the_weights_say_unless_told_otherwise(
    weights_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], sides: tuple[int, int]
) -> None:
    seen = []
    real = SMCA.forward
    monkeypatch.setattr(SMCA, "forward", lambda self, images: seen.append(images[0].shape[1:]) or real(self, images))
    image = write_image(tmp_path / "image.png", 90, 60)
    command = ["detect", str(image), "--weights", str(weights_file), "--out", str(tmp_path / "found")]
    assert cli.main([*command, *options]) == 0
    assert seen == [sides]


def test_sides_may_be_as_long_as_the_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    real = SMCA.forward
    monkeypatch.setattr(SMCA, "forward", lambda self, images: seen.append(images[0].shape[1:]) or real(self, images))
    weights.save(small_detector((48, 48)), tmp_path / "model.safetensors", CLASSES)
    files = [write_image(tmp_path / "a.png", 90, 60), write_image(tmp_path / "b.png", 60, 60)]
    options = ["--weights", str(tmp_path / "model.safetensors"), "--out", str(tmp_path / "found")]
    assert cli.main(["detect", *map(str, files), *options]) == 0
    assert seen == [(32, 48), (48, 48)]


def test_the_attention_of_chosen_queries_is_drawn(weights_file: Path, tmp_path: Path) -> None:
    image, out = write_image(tmp_path / "image.png"), tmp_path / "found"
    command = ["detect", str(image), "--weights", str(weights_file), "--out", str(out)]
    assert cli.main([*command, "--attention", "--queries", "1", "--layer", "0"]) == 0
    with Image.open(out / "image_attention.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["missing.png"], "images must be files or folders, there is no missing.png"),
        (["."], "a folder must have images in it"),
        (["image.png", "--attention", "--layer", "2"], "--layer must be in -2 … 1, got 2"),
        (["image.png", "--attention", "--queries", "6"], "--queries must be in 0 … 5, got"),
        (["image.png", "--layer", "-1"], "--layer must go with --attention"),
        (["image.png", "--queries", "1"], "--queries must go with --attention"),
        (["image.png", "--threshold", "50"], "--threshold must be a score in 0 … 1, got 50"),
        (["image.png", "--threshold", "nan"], "--threshold must be a score in 0 … 1, got nan"),
        (["image.png", "--weights", "text.png"], "--weights must be a file of weights, got text.png: "),
        (["image.png", "--size", "0"], "--size must be at least 1, got 0"),
        (["image.png", "--size", "97"], "--size must be at most --max-size, got 97 and 96"),
        (["image.png", "--device", "gpux"], "--device gpux can't be used: "),
        (["image.png", "other/image.jpg"], "images must differ in name without suffix"),
        (["text.png"], "image text.png can't be read"),
        (["image.png", "--out", "text.png"], "--out must be a folder that can be written, got text.png"),
    ],
)
def test_wrong_options_are_told_in_one_line(
    options: list[str],
    message: str,
    weights_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    if options != ["."]:
        write_image(folder / "image.png")
        write_image(folder / "other" / "image.jpg")
        (folder / "text.png").write_text("no image")
    assert cli.main(["detect", "--weights", str(weights_file), *options]) == 2
    assert f"smca detect: error: {message}" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ batches and other libraries


def test_what_is_found_in_an_image_depends_on_no_other_in_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_detector()
    sides = [(40, 60), (48, 40), (80, 120), (40, 60), (96, 48)]
    images = [torch.randint(0, 256, (3, *each), dtype=torch.uint8) for each in sides]
    alone = [detect.detect(model, [image], threshold=0.0)[0] for image in images]
    seen = []
    real = SMCA.forward
    monkeypatch.setattr(
        SMCA, "forward", lambda self, batch: seen.append([tuple(each.shape[1:]) for each in batch]) or real(self, batch)
    )
    together = detect.detect(model, images, threshold=0.0)
    assert seen == [[(48, 72)] * 3, [(57, 48)], [(96, 48)]]
    for one, other in zip(alone, together, strict=True):
        # Sums of more rows may be in another order; boxes of scores so close to each other could change places.
        torch.testing.assert_close(one["scores"], other["scores"], atol=1e-5, rtol=0)
        torch.testing.assert_close(one["boxes"].sum(0), other["boxes"].sum(0), atol=1e-2, rtol=0)


def test_images_of_one_size_are_a_batch_and_reported_in_the_order_given(
    weights_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a", "b", "c", "d", "e"]
    files = [write_image(tmp_path / f"{name}.png", *((60, 40), (40, 60))[i % 2]) for i, name in enumerate(names)]
    seen = []
    real = SMCA.forward
    monkeypatch.setattr(
        SMCA, "forward", lambda self, batch: seen.append([tuple(each.shape[1:]) for each in batch]) or real(self, batch)
    )
    command = ["detect", *map(str, files), "--weights", str(weights_file), "--out", str(tmp_path / "found")]
    assert cli.main([*command, "--batch-size", "2"]) == 0
    assert seen == [[(48, 72)] * 2, [(48, 72)], [(72, 48)] * 2]
    report = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert [each["image"] for each in report] == list(map(str, files))


def some_found() -> dict[str, torch.Tensor]:
    boxes = torch.tensor([[10.0, 20.0, 30.0, 35.0], [1.0, 2.0, 40.0, 30.0]])
    return {"boxes": boxes, "labels": torch.tensor([2, 0]), "scores": torch.tensor([0.9, 0.6])}


def test_detections_are_supervisions(tmp_path: Path) -> None:
    supervision = pytest.importorskip("supervision")
    detections = detect.to_supervision(some_found(), CLASSES)
    assert detections.xyxy.tolist() == some_found()["boxes"].tolist()
    assert detections.confidence.tolist() == pytest.approx([0.9, 0.6])
    assert detections.class_id.tolist() == [2, 0]
    assert detections.data["class_name"].tolist() == detections["class_name"].tolist() == ["three", "one"]
    drawn = supervision.BoxAnnotator(thickness=1).annotate(np.zeros((40, 50, 3), np.uint8), detections[:1])
    rows, columns = drawn.any(-1).nonzero()
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == pytest.approx((10, 20, 30, 35), abs=1)


def test_supervision_exports_detections_in_cocos_format(tmp_path: Path) -> None:
    supervision = pytest.importorskip("supervision")
    picture = write_image(tmp_path / "a.png")
    detections = detect.to_supervision(some_found(), CLASSES)
    dataset = supervision.DetectionDataset(list(CLASSES), [str(picture)], {str(picture): detections})
    dataset.as_coco(annotations_path=str(tmp_path / "coco.json"))
    data = json.loads((tmp_path / "coco.json").read_text())
    names = {category["id"]: category["name"] for category in data["categories"]}
    assert [names[each["category_id"]] for each in data["annotations"]] == ["three", "one"]
    assert [each["bbox"] for each in data["annotations"]] == [[10, 20, 20, 15], [1, 2, 39, 28]]


def test_no_detections_are_empty_ones_of_supervision() -> None:
    pytest.importorskip("supervision")
    nothing = {name: tensor[:0] for name, tensor in some_found().items()}
    detections = detect.to_supervision(nothing, CLASSES)
    assert len(detections) == 0
    assert detections.xyxy.shape == (0, 4)
    assert detections.data["class_name"].shape == (0,)


def test_without_supervision_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "supervision" else real(name))
    with pytest.raises(ValueError, match=r"needs supervision: pip install 'smca_kernels\[video\]'"):
        detect.to_supervision(some_found(), CLASSES)


def test_pictures_are_written_over_no_image(
    weights_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [write_image(tmp_path / "a.png"), write_image(tmp_path / "a_boxes.png")]
    before = files[1].read_bytes()
    command = ["detect", *map(str, files), "--weights", str(weights_file), "--out", str(tmp_path)]
    assert cli.main(command) == 2
    assert f"--out must be another folder, or {files[1]} would be replaced" in capsys.readouterr().err
    assert files[1].read_bytes() == before
