"""Boxes and names are drawn where and as they are, and the attention is the one that the model really used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("torchvision")

from smca_model import SMCA, build, pictures
from smca_model.data.images import normalize
from smca_model.detect import detect

CLASSES = ("one", "two", "three")
TINY = {"hidden_dim": 32, "num_heads": 2, "decoder_layers": 2, "num_queries": 6, "ffn_dim": 64}


def small_detector() -> SMCA:
    model = build("smca-tiny", len(CLASSES), **TINY).eval()
    model.image_size = (48, 96)
    return model


@pytest.mark.parametrize("preset", ["smca-tiny", "smca-ms-tiny", "detr-tiny"])
def test_the_attention_is_that_of_the_layer(preset: str) -> None:
    """Values weighted by the map and projected are what the layer puts out."""
    model = build(preset, len(CLASSES), backend="reference", **TINY).eval()
    layer = model.decoder.layers[1].co_attn
    kept = {}
    layer.register_forward_hook(lambda _, inputs, output: kept.update(value=inputs[2], output=output[0]))
    image = torch.randn(3, 48, 64)
    maps, prior = pictures.attention_of(model, image, queries=[4, 0], layer=1)
    scales = len(model.config.strides)
    assert [tuple(each.shape[:2]) for each in maps] == [(2, 2)] * scales
    for each in maps:
        torch.testing.assert_close(each.sum((-1, -2)), torch.ones(2, 2))
    value = torch.nn.functional.linear(kept["value"], layer.in_proj_weight[64:], layer.in_proj_bias[64:])
    value = value[0].unflatten(-1, (2, 16))  # [T, H, D]
    weight = prior.scale_weights if prior.scale_weights is not None else torch.ones(1, 1, 6, scales)
    heads = torch.zeros(2, 2, 16)
    start = 0
    for s, each in enumerate(maps):
        cells = each.flatten(2)  # [H, n, cells]
        part = torch.einsum("hnt,thd->nhd", cells, value[start : start + cells.shape[-1]])
        heads += weight[0, 0, [4, 0], s, None, None] * part
        start += cells.shape[-1]
    torch.testing.assert_close(layer.out_proj(heads.flatten(1)), kept["output"][0, [4, 0]])


def test_a_layer_that_is_not_there_is_refused() -> None:
    model = small_detector()
    with pytest.raises(ValueError, match="layer must be in -2 … 1, got 2"):
        pictures.attention_of(model, torch.randn(3, 48, 48), queries=[0], layer=2)


def test_the_best_queries_are_those_of_the_best_detections() -> None:
    model = small_detector()
    image = torch.randint(0, 256, (3, 48, 48), dtype=torch.uint8)
    best = pictures.best_queries(model, normalize(image), 2)
    (found,) = detect(model, [image], threshold=0.0)
    with torch.no_grad():
        box = model([normalize(image)])["pred_boxes"][0, best[0]] * 48
    torch.testing.assert_close(found["boxes"][0], torch.cat((box[:2] - box[2:] / 2, box[:2] + box[2:] / 2)))
    assert best[0] != best[1]


def test_boxes_are_drawn_where_they_are() -> None:
    image = torch.zeros(3, 40, 50, dtype=torch.uint8)
    found = {"boxes": torch.tensor([[10.0, 20.0, 30.0, 35.0]]), "labels": torch.tensor([1])}
    drawn = pictures.draw_boxes(image, found | {"scores": torch.tensor([0.9])}, CLASSES)
    assert drawn.shape == (3, 640, 800)
    rows, columns = drawn.any(0).nonzero().unbind(1)
    assert columns.min() == pytest.approx(160, abs=3)
    assert rows.max() == pytest.approx(560, abs=3)
    nothing = {name: tensor[:0] for name, tensor in found.items()} | {"scores": torch.zeros(0)}
    assert not pictures.draw_boxes(image, nothing, CLASSES).any()


@pytest.mark.parametrize(
    ("sides", "expected"),
    [((1, 1000), (4, 4000)), ((5000, 2), (5000, 2)), ((3, 1), (1920, 640)), ((9, 700), (45, 3500))],
)
def test_pictures_of_long_thin_images_are_enlarged_up_to_a_long_side(
    sides: tuple[int, int], expected: tuple[int, int]
) -> None:
    image = torch.zeros(3, *sides, dtype=torch.uint8)
    box = torch.tensor([[0.0, 0.0, float(sides[1]), float(sides[0])]])
    found = {"boxes": box, "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
    drawn = pictures.draw_boxes(image, found, CLASSES)
    assert drawn.shape == (3, *expected)
    assert drawn.any()


def drawn_names(monkeypatch: pytest.MonkeyPatch, classes: tuple[str, ...]) -> tuple[list[str], str]:
    import torchvision.utils

    kept: list[tuple[list[str], str]] = []
    real = torchvision.utils.draw_bounding_boxes
    monkeypatch.setattr(
        torchvision.utils,
        "draw_bounding_boxes",
        lambda image, boxes, names, **options: (
            kept.append((names, options["font"])) or real(image, boxes, names, **options)
        ),
    )
    count = len(classes)
    found = {"boxes": torch.tensor([[1.0, 1.0, 20.0, 20.0]] * count), "labels": torch.arange(count)}
    pictures.draw_boxes(
        torch.zeros(3, 40, 50, dtype=torch.uint8), found | {"scores": torch.full((count,), 0.9)}, classes
    )
    return kept[0]


def test_names_that_no_font_can_show_are_drawn_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    names, font = drawn_names(monkeypatch, ("cat", "\U0010fffd", "Bär", "dog \U0010fffe", "Ελλάδα"))
    assert names == ["cat 0.90", "class 1 0.90", "Bär 0.90", "class 3 0.90", "Ελλάδα 0.90"]
    assert Path(font).name == "DejaVuSans.ttf"


def test_names_are_drawn_in_a_font_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.font_manager import fontManager

    sign = "\U0001d44e"  # an italic a of mathematics
    usual = pictures._find_font(frozenset("a"))
    fonts = [each.fname for each in fontManager.ttflist if "Last Resort" not in each.name and each.fname != usual]
    able = [font for font in fonts if sign in pictures._characters(font)]
    monkeypatch.setattr(pictures, "_characters", lambda font: frozenset(f"cat{sign}" if font == able[0] else "cat"))
    pictures._find_font.cache_clear()
    try:
        assert drawn_names(monkeypatch, ("cat", sign)) == (["cat 0.90", f"{sign} 0.90"], able[0])
        assert drawn_names(monkeypatch, ("cat",)) == (["cat 0.90"], usual)
    finally:
        pictures._find_font.cache_clear()


@pytest.mark.filterwarnings("error:Glyph:UserWarning")
@pytest.mark.parametrize("name", ["\U0010fffd", r"$\nothing$", "100 % $"])
def test_attention_of_classes_of_any_name_is_drawn(tmp_path: Path, name: str) -> None:
    model = small_detector()
    model.classes = (name,) * len(CLASSES)
    pictures.draw_attention(model, torch.randn(3, 48, 64), tmp_path / "attention.png", queries=[0])
    assert (tmp_path / "attention.png").stat().st_size > 1000
