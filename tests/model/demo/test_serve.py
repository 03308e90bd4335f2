"""`smca demo --serve`: what it refuses before any work, and the page itself, in a browser."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

pytest.importorskip("gradio")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from PIL import Image
from tiny_detector import MULTI, tiny_detector

from smca_kernels.tools import cli
from smca_model import weights
from smca_model.demo import explore, serve

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

CLASSES = ("one", "two", "three", "four", "fünf & <b>six</b>")


def run(*arguments: str) -> int:
    return cli.main(["demo", "--serve", *arguments])


def test_without_weights_the_command_that_makes_them_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--out", str(tmp_path)) == 2
    told = capsys.readouterr().err
    assert f"there is no {tmp_path / 'detector' / 'smca-tiny' / 'model.safetensors'}" in told
    assert f"run `smca demo --out {tmp_path}` first" in told
    assert not list(tmp_path.iterdir())


def test_a_file_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "words.txt").write_text("no weights")
    assert run("--weights", str(tmp_path / "words.txt")) == 2
    assert f"must be a file of weights, got {tmp_path / 'words.txt'}" in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind((serve.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run("--port", str(port), "--out", str(tmp_path)) == 2
    assert f"--port {port} can't be used (Address already in use)" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["0", "-1", "65536"])
def test_a_port_that_there_is_not_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--port", port) == 2
    assert f"--port must be in 1 … 65535, got {port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--port", "8000"], "--port must go with --serve, got 8000"),
        (["--weights", "some.file"], "--weights must go with --serve, got some.file"),
        (["--serve", "--compare"], "--compare must go without --serve"),
        (["--serve", "--ablations"], "--ablations must go without --serve"),
    ],
)
def test_options_that_have_no_effect_are_refused(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_gradio_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    assert run() == 2
    assert "smca demo: error: needs gradio: pip install 'smca_kernels[model,serve]'" in capsys.readouterr().err


def test_the_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    before = dict(os.environ)
    with serve._environment("folder"):
        assert os.environ["NO_PROXY"] == "example.org,127.0.0.1"
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
        assert os.environ["GRADIO_TEMP_DIR"] == str(Path("folder", "gradio"))
    assert dict(os.environ) == before


# ------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(names)} is here")
    quiet = ("background-networking", "component-update", "sync")
    options = ["--no-sandbox", "--disable-gpu", "--no-first-run", *(f"--disable-{each}" for each in quiet)]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=options)
        yield browser
        browser.close()


@contextmanager
def served(file: Path, folder: Path) -> Iterator[str]:
    """The address of a page that a process of its own serves; Ctrl-C ends it, and what it kept is deleted."""
    with socket.socket() as free:
        free.bind((serve.HOST, 0))
        port = free.getsockname()[1]
    (folder / "temporary").mkdir()
    # Where a shell started the tests in the background, SIGINT is ignored, and would be here.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "from smca_kernels.tools.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", program, "demo", "--serve", "--weights", str(file)]
    environment = os.environ | {"TMPDIR": str(folder / "temporary"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with (folder / "errors").open("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            assert process.stdout is not None
            told = process.stdout.readline()
            assert f"http://{serve.HOST}:{port}" in told, (folder / "errors").read_text("utf-8")
            yield f"http://{serve.HOST}:{port}/"
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == cli.INTERRUPTED
        finally:
            process.kill()
            process.communicate()
        assert "Traceback" not in (folder / "errors").read_text("utf-8")
    assert not list((folder / "temporary").iterdir())


def picture(shown: Locator) -> np.ndarray:
    """The pixels behind a picture of the page, [H, W, 3]."""
    body = shown.page.request.get(shown.get_attribute("src") or "").body()
    return np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))


def click_picture(shown: Locator, x: float, y: float) -> None:
    """Click at a point in parts of a picture, which fills its element without being distorted."""
    width, height = shown.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    box = shown.bounding_box()
    assert box is not None
    scale = min(box["width"] / width, box["height"] / height)
    left, top = box["x"] + (box["width"] - scale * width) / 2, box["y"] + (box["height"] - scale * height) / 2
    shown.page.mouse.click(left + x * scale * width, top + y * scale * height)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT")
def test_a_photograph_becomes_boxes_and_a_click_shows_the_attention(tmp_path: Path, browser: Browser) -> None:
    from playwright.sync_api import expect

    model = tiny_detector(MULTI)
    with torch.no_grad():
        model.class_embed.bias.fill_(1.0)  # scores about 0.7
    model.image_size = (48, 96)
    weights.save(model, tmp_path / "model.safetensors", CLASSES)
    model = weights.load(tmp_path / "model.safetensors")
    files = [tmp_path / f"photograph {i}.png" for i in range(2)]
    for file, size in zip(files, ((64, 48), (120, 90)), strict=True):
        Image.effect_noise(size, 80).convert("RGB").save(file)
    expected = [explore.explore(model, file) for file in files]
    (tmp_path / "words.png").write_text("no image")

    complaints: list[str] = []
    elsewhere: list[str] = []

    def open_page(address: str) -> Page:
        context = browser.new_context()
        context.set_default_timeout(30_000)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))

        def pass_on(route: Any) -> None:
            if route.request.url.startswith((address, "data:", "blob:")):
                route.continue_()
            else:
                elsewhere.append(route.request.url)
                route.abort()

        page.route("**/*", pass_on)
        page.goto(address)
        return page

    expect.set_options(timeout=30_000)
    with served(tmp_path / "model.safetensors", tmp_path) as address:
        pages = [open_page(address) for _ in files]
        for page, file, explored in zip(pages, files, expected, strict=True):
            page.locator("#upload input[type=file]").set_input_files(file)
            boxes = page.get_by_alt_text("box around each object")
            expect(boxes).to_be_visible()
            status = page.locator("#status [role=status]")
            expect(status).to_contain_text(f"{explored.count(0.3)} objects of score 0.30 or more")
            assert picture(boxes).shape == (*explored.picture.shape[1:], 3)
        # The first visitor's click is on the first photograph, though the second's came later.
        for page, explored in zip(pages, expected, strict=True):
            height, width = explored.size
            x1, y1, x2, y2 = explored.found["boxes"][0].clamp(min=0).tolist()
            x, y = (x1 + min(x2, width)) / 2, (y1 + min(y2, height)) / 2
            chosen = explore.box_at(explored, (x, y), 0.3)
            assert chosen is not None
            click_picture(page.get_by_alt_text("box around each object"), x / width, y / height)
            query = int(explored.found["queries"][chosen])
            expect(page.locator("#status [role=status]")).to_have_text(
                f"{explored.describe(chosen)}, found by query {query}"
            )
            attention = page.get_by_alt_text("attention of each head")
            expect(attention).to_be_visible()
            drawn = explore.picture_of_attention(explored, chosen)
            assert picture(attention).shape == drawn.shape
            # Last bits may differ between processes, and with them what is rounded to whole shades.
            assert np.abs(picture(attention).astype(int) - drawn).max() <= 1
            expect(page.get_by_label("Box")).to_have_value(f"{chosen + 1}: {explored.describe(chosen)}")

        page, status = pages[0], pages[0].locator("#status [role=status]")
        score = page.get_by_label("number input for Least score")
        score.fill("1")
        score.press("Enter")
        expect(status).to_contain_text("0 objects of score 1.00 or more")
        expect(page.get_by_alt_text("attention of each head")).to_have_count(0)
        click_picture(page.get_by_alt_text("box around each object"), 0.5, 0.5)
        expect(status).to_contain_text("No box at (32, 24)")
        page.get_by_role("button", name="Thumbnail 5 of 6").click()  # the astronaut
        expect(status).to_contain_text("0 objects")
        assert picture(page.get_by_alt_text("box around each object")).shape == (512, 512, 3)
        page.locator("#upload input[type=file]").set_input_files(tmp_path / "words.png")
        expect(status).to_have_text("image words.png can't be read: cannot identify image file 'words.png'")
    assert (complaints, elsewhere) == ([], [])
