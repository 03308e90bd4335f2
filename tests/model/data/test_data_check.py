"""`smca data check`: what it prints, the picture, and the exit status."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("pycocotools")
pytest.importorskip("torchvision")
pytest.importorskip("yaml")

from coco_folder import annotation, write_coco
from PIL import Image
from yolo_folder import SETTINGS, write_image, write_yolo

from smca_kernels.tools import cli
from smca_model.data.inspection import check_data
from smca_model.data.sheet import IN_A_ROW, ROWS, choose, draw_samples

BOTH = "1 0.5 0.5 0.5 0.25\n0 0.5 0.5 0.5 0.5"


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two images of two boxes each, of different sizes."""
    write_yolo(tmp_path / "pets", {"train/a.png": BOTH, "val/b.png": BOTH})
    write_image(tmp_path / "pets" / "images" / "val" / "b.png", (50, 50))
    return tmp_path / "pets"


def test_counts_are_printed_and_the_last_line_sums_up(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", str(pets)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        f"train: {pets / 'data.yaml'} (train)",
        "  1 images, 0 of them without boxes",
        "  sizes: 60 × 40 pixels to 60 × 40 pixels, 60 × 40 pixels in the middle",
        "  2 boxes: 2 small, 0 medium, 0 large (less than 32², less than 96² and more pixels); 2.0 an image, 2 at most",
    ]
    assert [line.split() for line in lines[-5:-2]] == [
        ["boxes", "of", "train", "val"],
        ["cat", "1", "1"],
        ["dog", "1", "1"],
    ]
    assert lines[-1] == f"{pets}: 2 images, 4 boxes; 0 errors, 0 warnings"


def test_warnings_leave_the_status_at_0_and_errors_make_it_1(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label = pets / "labels" / "val" / "b.txt"
    label.write_text("1 0.5 0.5 0.5 0.25")
    assert cli.main(["data", "check", str(pets)]) == 0
    out = capsys.readouterr().out
    assert "\nwarnings:\n  val: 1 classes have no boxes: cat\n" in out
    assert out.endswith("0 errors, 1 warnings\n")
    label.write_text("7 0.5 0.5 0.5 0.25")
    assert cli.main(["data", "check", str(pets)]) == 1
    out = capsys.readouterr().out
    assert f"\nerrors:\n  {label}, line 1: class 7, but data.yaml names 2\n" in out
    assert out.endswith("1 errors, 1 warnings\n")


def test_thousands_of_mistakes_are_a_hundred_lines(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pets / "labels" / "val" / "b.txt").write_text("9 0 0 0 0\n" * 2000)
    assert cli.main(["data", "check", str(pets)]) == 1
    out = capsys.readouterr().out
    assert out.count("class 9, but") == 100
    assert "\n  … and 1900 more\n" in out


def test_no_data_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("smca data: error: data must be a folder with ")
    assert cli.main(["data", "check", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "--out must name a file in an existing folder" in capsys.readouterr().err


def test_an_interrupt_ends_it_with_its_status(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("smca_model.data.inspection.load_annotated_image", interrupted)
    assert cli.main(["data", "check", str(pets), "--out", str(pets / "sheet.png")]) == cli.INTERRUPTED
    assert not (pets / "sheet.png").exists()


def test_the_sheet_shows_images_boxes_and_names(
    pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from smca_model import pictures

    drawn = []
    real = pictures.draw_boxes
    monkeypatch.setattr(pictures, "draw_boxes", lambda *args: drawn.append(args) or real(*args))
    sheet = tmp_path / "sheet.png"
    assert cli.main(["data", "check", str(pets), "--out", str(sheet)]) == 0
    assert f"2 images with their boxes are drawn in {sheet}" in capsys.readouterr().out
    (_, found, classes), _ = drawn
    assert found["boxes"].tolist() == [[15, 15, 45, 25], [15, 10, 45, 30]]
    assert [classes[label] for label in found["labels"]] == ["dog", "cat"]
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    gray = (np.abs(pixels - 128).max(-1) <= 2).mean()
    colored = (np.ptp(pixels, axis=-1) > 50).mean()
    assert gray > 0.5  # the images
    assert colored > 0.003  # the frames


def test_the_sheet_shows_each_class_and_no_image_that_can_not_be_read(tmp_path: Path) -> None:
    names = [f"class{i}" for i in range(10)]
    labels: dict[str, str | bytes | None] = {f"train/{i}.png": "0 0.5 0.5 0.5 0.5" for i in range(40)}
    labels |= {f"train/rare{i}.png": f"{i} 0.5 0.5 0.5 0.5" for i in range(1, 10)}
    labels |= {f"train/broken{i}.png": f"{i % 10} 0.5 0.5 0.5 0.5" for i in range(40)}
    labels |= {"val/empty.png": None, "val/a.png": "0 0.9 0.9 0.9 0.9"}
    file = write_yolo(tmp_path, labels, settings=SETTINGS.replace("[cat, dog]", str(names)).replace("nc: 2\n", ""))
    for path in (tmp_path / "images" / "train").glob("broken*"):
        path.write_bytes(path.read_bytes()[:-40])
    report = check_data(file, progress=False)
    chosen = [split.images[row]["file_name"] for split, row in choose(report.splits)]
    assert len(set(chosen)) == IN_A_ROW * ROWS
    assert {str(Path("images", "train", f"rare{i}.png")) for i in range(1, 10)} <= set(chosen)
    assert not any("broken" in name for name in chosen)
    assert draw_samples([split for split in report.splits if split.name == "val"], tmp_path / "sheet.png") == 1


def test_boxes_far_beyond_an_image_are_drawn_to_its_border(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smca_model import pictures

    drawn = []
    real = pictures.draw_boxes
    monkeypatch.setattr(pictures, "draw_boxes", lambda *args: drawn.append(args[1]["boxes"].tolist()) or real(*args))
    for split in ("train", "val"):
        write_coco(tmp_path, [annotation(1, 1, 3, [-1e300, 5, 2e300, 9])], split=split)
    assert draw_samples(check_data(tmp_path, progress=False).splits, tmp_path / "sheet.png") == 2
    assert drawn == [[[0, 5, 60, 14]]] * 2


def test_there_is_no_sheet_of_nothing(tmp_path: Path) -> None:
    assert draw_samples([], tmp_path / "sheet.png") == 0
    assert not (tmp_path / "sheet.png").exists()
