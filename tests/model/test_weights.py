"""Our weight files, and a start from them."""

from __future__ import annotations

import errno
import json
import os
import re
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_disk import files_of_at_most
from tiny_detector import MULTI, tiny_detector

from smca_model import build, weights

CLASSES = ("a", "b", "N/A", "d", "e")
TINY_SIZES = {"hidden_dim": 32, "num_heads": 2, "ffn_dim": 48, "decoder_layers": 2, "num_queries": 7}


def test_a_saved_model_loads_with_its_configuration_and_classes_and_no_other_argument(tmp_path):
    model = tiny_detector(MULTI, share_ffn=False)
    model.image_size = (48, 96)
    weights.save(model, tmp_path / "model.safetensors", CLASSES)

    loaded = weights.load(tmp_path / "model.safetensors")

    images = [torch.randn(3, 40, 56)]
    assert loaded.config == model.config
    assert loaded.classes == CLASSES
    assert loaded.image_size == (48, 96)
    assert not loaded.training
    assert torch.equal(loaded(images)["pred_boxes"], model(images)["pred_boxes"])


def test_fields_that_change_no_parameter_may_be_overridden_while_loading(tmp_path):
    weights.save(tiny_detector(), tmp_path / "model.safetensors", CLASSES)

    loaded = weights.load(tmp_path / "model.safetensors", backend="reference", dropout=0.3)

    assert loaded.backend == "reference"
    assert loaded.config.dropout == 0.3


def test_overrides_that_the_weights_do_not_fit_are_refused(tmp_path):
    weights.save(tiny_detector(), tmp_path / "model.safetensors", CLASSES)

    with pytest.raises(ValueError, match="must fit the configuration"):
        weights.load(tmp_path / "model.safetensors", num_queries=8)
    with pytest.raises(ValueError, match="overrides must be fields of Config, got colour"):
        weights.load(tmp_path / "model.safetensors", colour="red")


def test_a_model_with_another_number_of_classes_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="classes must be 5 names, one a label, got 4"):
        weights.save(tiny_detector(), tmp_path / "model.safetensors", CLASSES[:4])

    assert not list(tmp_path.iterdir())


def test_class_names_are_saved_once_but_for_those_that_mean_nothing(tmp_path):
    with pytest.raises(ValueError, match="each of classes must be there once, repeated: a, b"):
        weights.save(tiny_detector(), tmp_path / "model.safetensors", ("a", "b", "a", "b", "e"))
    assert not list(tmp_path.iterdir())
    weights.save(tiny_detector(), tmp_path / "model.safetensors", ("a", "N/A", "N/A", "b", "e"))
    assert weights.load(tmp_path / "model.safetensors").classes == ("a", "N/A", "N/A", "b", "e")


@pytest.mark.parametrize("image_size", [(96, 48), (0, 48), (48,), (48.0, 96)])
def test_an_image_size_that_no_image_can_have_is_not_saved(tmp_path, image_size):
    model = tiny_detector()
    model.image_size = image_size
    with pytest.raises(ValueError, match="image_size must be pixels of the short side and of the longest, got"):
        weights.save(model, tmp_path / "model.safetensors", CLASSES)


def test_a_save_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    weights.save(tiny_detector(), path, CLASSES)
    before = path.read_bytes()

    def disk_full(state, filename, metadata):
        filename.write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(weights, "save_file", disk_full)
    with pytest.raises(OSError, match="disk full"):
        weights.save(tiny_detector(), path, CLASSES)

    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weights_are_as_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        weights.save(tiny_detector(), tmp_path / "model.safetensors", CLASSES)
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == mode


def test_a_full_disk_is_an_os_error_with_the_file_s_name_and_nothing_half_written(tmp_path):
    path = tmp_path / "model.safetensors"
    weights.save(tiny_detector(), path, CLASSES)
    before = path.read_bytes()

    with files_of_at_most(len(before) // 2), pytest.raises(OSError, match=re.escape(str(path))) as raised:
        weights.save(tiny_detector(), path, CLASSES)

    assert raised.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_weights_in_a_folder_that_is_not_there_are_an_os_error_with_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing/model\.safetensors"):
        weights.save(tiny_detector(), tmp_path / "missing" / "model.safetensors", CLASSES)


def test_files_of_another_kind_are_refused_by_their_path(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "notes.txt").write_text("not weights")

    with pytest.raises(ValueError, match=r"format 'smca_model 1', got .*other\.safetensors of None"):
        weights.load(tmp_path / "other.safetensors")
    for name in ("notes.txt", "missing.safetensors"):
        with pytest.raises(ValueError, match=f"path must be a file of weights, got .*{name}"):
            weights.load(tmp_path / name)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("classes", '["a", "b"]', "is damaged: it must have 5 class names, got 2"),
        ("classes", '["a", "b", "b", "c", "d"]', "is damaged: each of its classes must be there once, repeated: b"),
        ("image_size", "[96, 48]", "is damaged: its image_size must be two numbers of pixels, of the short side"),
        ("classes", '{"a": 1}', "is damaged: its classes must be a list of names"),
        ("classes", "[1, 2, 3, 4, 5]", "is damaged: its classes must be a list of names"),
        ("classes", None, "is damaged: its classes must be JSON, got None"),
        ("image_size", "[800]", "is damaged: its image_size must be two numbers of pixels"),
        ("image_size", '[800, "x"]', "is damaged: its image_size must be two numbers of pixels"),
        ("image_size", "{", "is damaged: its image_size must be JSON, got '{'"),
        ("config", None, "is damaged: its config must be JSON, got None"),
        ("config", "[]", r"its config must be fields of Config by name, got \[\]"),
        ("config", {"colour": "red"}, "fields that this version does not know: .'colour'"),
        ("config", {"num_heads": "two"}, "its configuration can't be used .num_heads must be a int, got 'two'"),
        ("config", {"backbone": "resnet18"}, "must hold a configuration that can be built"),
        ("config", {"hidden_dim": 2**48, "backbone": "tiny"}, "must hold a configuration that can be built"),
    ],
)
def test_a_damaged_file_is_refused_by_its_path(tmp_path, part, value, message):
    path = tmp_path / "model.safetensors"
    weights.save(tiny_detector(), path, CLASSES)
    with safe_open(path, framework="pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if isinstance(value, dict):
        value = json.dumps(json.loads(metadata["config"]) | value)
    metadata[part] = value
    if value is None:
        del metadata[part]
    save_file(state, path, metadata)

    with pytest.raises(ValueError, match=f"{re.escape(str(path))} .*{message}") as raised:
        weights.load(path)
    assert "overrides" not in str(raised.value)


# --- a start from weights ---


def test_a_start_from_our_weights_with_the_same_classes_takes_all(tmp_path):
    source, model = tiny_detector(), tiny_detector()
    weights.save(source, tmp_path / "model.safetensors", CLASSES)

    told = weights.start(model, tmp_path / "model.safetensors", CLASSES)

    assert all(torch.equal(one, other) for one, other in zip(source.parameters(), model.parameters(), strict=True))
    assert told.endswith("the class layer has the rows of its 5 classes")


def test_a_start_with_some_of_the_classes_takes_their_rows(tmp_path):
    source, model = tiny_detector(), build("smca-tiny", 2, **TINY_SIZES)
    weights.save(source, tmp_path / "model.safetensors", CLASSES)

    weights.start(model, tmp_path / "model.safetensors", ["e", "b"])

    assert torch.equal(model.class_embed.weight, source.class_embed.weight[[4, 1]])
    assert torch.equal(model.class_embed.bias, source.class_embed.bias[[4, 1]])


def test_a_start_with_other_classes_makes_the_class_layer_anew_and_tells(tmp_path):
    source, model = tiny_detector(), build("smca-tiny", 3, **TINY_SIZES)
    weights.save(source, tmp_path / "model.safetensors", CLASSES)
    head = model.class_embed.weight.detach().clone()

    told = weights.start(model, tmp_path / "model.safetensors", ["a", "cat", "dog"])

    assert "the class layer is made anew: cat, dog are not among the 5 classes there" in told
    assert torch.equal(model.class_embed.weight, head)
    assert torch.equal(model.query_embed.weight, source.query_embed.weight)
    assert torch.equal(model.backbone.body[0].weight, source.backbone.body[0].weight)


def test_a_start_from_weights_of_another_model_is_refused_with_what_differs(tmp_path):
    weights.save(tiny_detector(), tmp_path / "model.safetensors", CLASSES)

    with pytest.raises(
        ValueError, match=r"model\.safetensors must be .*num_queries 7 there, 9 here; geometry official"
    ):
        weights.start(tiny_detector(num_queries=9, geometry="paper"), tmp_path / "model.safetensors", CLASSES)


def test_a_start_from_the_checkpoint_of_a_run_is_refused_with_what_to_do(tmp_path):
    torch.save({"format": 1, "model": tiny_detector().state_dict()}, tmp_path / "checkpoint.pt")

    with pytest.raises(ValueError, match=r"checkpoint\.pt must be a file of weights, .* --resume"):
        weights.start(tiny_detector(), tmp_path / "checkpoint.pt", CLASSES)
    with pytest.raises(ValueError, match=r"must be a file of weights, got .*missing\.pt"):
        weights.start(tiny_detector(), tmp_path / "missing.pt", CLASSES)
    with pytest.raises(
        ValueError, match=r"got .*checkpoint\.pt: it is the checkpoint of a run; model\.safetensors beside"
    ):
        weights.load(tmp_path / "checkpoint.pt")
