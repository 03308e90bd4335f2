"""Our weight files, the authors' checkpoints against their forward pass written out, and DETR's as a start."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import re
import stat

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors import safe_open
from safetensors.torch import save_file
from small_disk import files_of_at_most
from tiny_detector import MULTI, tiny_detector
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from smca_model import build, load_official, weights

CLASSES = ("a", "b", "N/A", "d", "e")
TINY_SIZES = {"hidden_dim": 32, "num_heads": 2, "ffn_dim": 48, "decoder_layers": 2, "num_queries": 7}

# A small model of the authors': their 8 heads, everything else reduced.
DIM, HEADS, FFN, LAYERS, QUERIES, LOGITS, BETA = 32, 8, 40, 2, 6, 92, 8.0
POINT3 = {"type1": 0, "type2": HEADS, "type3": 2 * HEADS}


# --- the authors' model: names and shapes as in their checkpoints, the forward pass from the paper ---


@pytest.fixture(scope="module")
def resnet_state():
    resnet = torchvision.models.resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    state = {name: tensor for name, tensor in resnet.state_dict().items() if not name.startswith("fc.")}
    for name, tensor in state.items():
        if name.endswith("bn3.weight"):
            tensor.fill_(0.3)  # so that residual branches keep the features' size, as trained ones do
        elif name.endswith(("running_mean", "bn1.bias", "bn2.bias", "bn3.bias")):
            tensor.uniform_(-0.1, 0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.8, 1.2)
    return state


def authors_state(resnet_state, scale_type, layers=LAYERS):
    def attention(prefix):
        module = nn.MultiheadAttention(DIM, HEADS)
        nn.init.normal_(module.in_proj_bias, std=0.1)
        return named(prefix, module)

    def named(prefix, module):
        state = {f"{prefix}.{name}": tensor.detach() for name, tensor in module.state_dict().items()}
        return {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in state.items()}

    def mlp(outputs):
        return nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(DIM, n) for n in (DIM, DIM, outputs))})

    state = {f"backbone.0.body.{name}": tensor for name, tensor in resnet_state.items()}
    for part, norms in (("encoder", 2), ("decoder", 4)):
        for i in range(layers):
            prefix = f"transformer.{part}.layers.{i}"
            state |= attention(f"{prefix}.self_attn")
            state |= named(f"{prefix}.linear1", nn.Linear(DIM, FFN)) | named(f"{prefix}.linear2", nn.Linear(FFN, DIM))
            for k in range(norms):
                state |= named(f"{prefix}.norm{k + 1}", nn.LayerNorm(DIM))
            if part == "decoder":
                state |= attention(f"{prefix}.multihead_attn")
                state |= named(f"{prefix}.point2", nn.Linear(DIM, 2 * HEADS))
                if i == 0:
                    state |= named(f"{prefix}.point1", mlp(2))
                if POINT3[scale_type]:
                    state |= named(f"{prefix}.point3", nn.Linear(DIM, POINT3[scale_type]))
    state |= named("transformer.decoder.norm", nn.LayerNorm(DIM))
    state |= named("class_embed", nn.Linear(DIM, LOGITS)) | named("bbox_embed", mlp(4))
    state |= named("query_embed", nn.Embedding(QUERIES, DIM)) | named("input_proj", nn.Conv2d(2048, DIM, 1))
    return state


class AuthorsForward:
    """The single-scale model of the released code: sequence first, the prior as one tensor [N, T, B · H]."""

    def __init__(self, state, scale_type):
        self.state, self.scale_type = state, scale_type
        self.resnet = torchvision.models.resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
        body = {name.removeprefix("backbone.0.body."): t for name, t in state.items() if name.startswith("backbone.")}
        self.resnet.load_state_dict(body, strict=False)

    def linear(self, name, x):
        return F.linear(x, self.state[name + ".weight"], self.state[name + ".bias"])

    def norm(self, name, x):
        return F.layer_norm(x, (DIM,), self.state[name + ".weight"], self.state[name + ".bias"])

    def mlp(self, name, x):
        x = self.linear(f"{name}.layers.0", x).relu()
        return self.linear(f"{name}.layers.2", self.linear(f"{name}.layers.1", x).relu())

    def attention(self, name, query, key, value, padding=None, log_prior=0.0):
        weights, biases = (self.state[f"{name}.in_proj_{kind}"].chunk(3) for kind in ("weight", "bias"))
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        q, k, v = (x.view(x.shape[0], -1, DIM // HEADS).transpose(0, 1) for x in (q, k, v))  # [B · H, length, D]
        logits = q @ k.transpose(1, 2) / math.sqrt(DIM // HEADS) + log_prior
        if padding is not None:
            logits = logits.masked_fill(padding.repeat_interleave(HEADS, 0).unsqueeze(1), -math.inf)
        attended = (logits.softmax(-1) @ v).transpose(0, 1).reshape(query.shape)
        return self.linear(f"{name}.out_proj", attended)

    def __call__(self, images):
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        pixels, padding = torch.zeros(len(images), 3, height, width), torch.ones(len(images), height, width)
        for i, image in enumerate(images):
            pixels[i, :, : image.shape[1], : image.shape[2]] = image
            padding[i, : image.shape[1], : image.shape[2]] = 0
        resnet = self.resnet
        x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(pixels))))
        features = resnet.layer4(resnet.layer3(resnet.layer2(resnet.layer1(x))))
        padding = F.interpolate(padding[None], size=features.shape[2:])[0].bool()
        memory = F.conv2d(features, self.state["input_proj.weight"], self.state["input_proj.bias"])
        memory, pos = (x.flatten(2).permute(2, 0, 1) for x in (memory, self.positions(padding)))
        flat = padding.flatten(1)
        for i in range(LAYERS):
            layer = f"transformer.encoder.layers.{i}"
            attended = self.attention(f"{layer}.self_attn", memory + pos, memory + pos, memory, flat)
            memory = self.norm(f"{layer}.norm1", memory + attended)
            memory = self.norm(f"{layer}.norm2", memory + self.ffn(layer, memory))

        # (width, height) of each image in cells of stride 32, and the cells' own (x, y).
        extent = torch.tensor([[image.shape[2], image.shape[1]] for image in images]) / 32
        rows, columns = torch.meshgrid(*(torch.arange(n) for n in padding.shape[1:]), indexing="ij")
        cells = torch.stack((columns, rows), -1).view(1, -1, 1, 2)
        query_pos = self.state["query_embed.weight"].unsqueeze(1).expand(-1, len(images), -1)
        tgt, outputs = torch.zeros_like(query_pos), []
        for i in range(LAYERS):
            layer = f"transformer.decoder.layers.{i}"
            before = self.norm(f"{layer}.norm4", tgt + query_pos)
            tgt = self.norm(
                f"{layer}.norm1", tgt + self.attention(f"{layer}.self_attn", tgt + query_pos, tgt + query_pos, tgt)
            )
            if i == 0:
                reference = self.mlp(f"{layer}.point1", before)
            center = (reference.sigmoid() * extent).unsqueeze(2) + self.linear(f"{layer}.point2", before).unflatten(
                -1, (HEADS, 2)
            )
            squared = (center.flatten(1, 2).unsqueeze(1) - cells).square()  # [N, T, B · H, 2]
            if self.scale_type != "type1":
                scale = self.linear(f"{layer}.point3", before).square().unflatten(-1, (HEADS, -1))
                squared = squared * scale.flatten(1, 2).unsqueeze(1)
            log_prior = -(squared.sum(-1) / BETA).permute(2, 0, 1)
            attended = self.attention(f"{layer}.multihead_attn", tgt + query_pos, memory + pos, memory, flat, log_prior)
            tgt = self.norm(f"{layer}.norm2", tgt + attended)
            tgt = self.norm(f"{layer}.norm3", tgt + self.ffn(layer, tgt))
            outputs.append(self.norm("transformer.decoder.norm", tgt).transpose(0, 1))
        boxes = [self.mlp("bbox_embed", output) for output in outputs]
        shift = F.pad(reference.transpose(0, 1), (0, 2))
        return [(self.linear("class_embed", x), (box + shift).sigmoid()) for x, box in zip(outputs, boxes, strict=True)]

    def ffn(self, layer, x):
        return self.linear(f"{layer}.linear2", self.linear(f"{layer}.linear1", x).relu())

    def positions(self, padding):
        """Sines of cumulated rows and columns of image, scaled to 2π over the image: [B, DIM, height, width]."""
        halves = []
        for axis in (1, 2):
            count = (~padding).float().cumsum(axis)
            angle = count / (count.amax(axis, keepdim=True) + 1e-6) * 2 * math.pi
            frequency = 10000 ** (torch.arange(DIM // 2) // 2 * 2 / (DIM // 2))
            angle = angle.unsqueeze(-1) / frequency
            halves.append(torch.where(torch.arange(DIM // 2) % 2 == 0, angle.sin(), angle.cos()))
        return torch.cat(halves, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("scale_type", POINT3)
def test_the_authors_weights_give_the_authors_outputs(resnet_state, scale_type):
    state = authors_state(resnet_state, scale_type)
    images = [torch.randn(3, 70, 96), torch.randn(3, 96, 50)]

    model = load_official({"model": state})
    outputs = model(images)

    expected = AuthorsForward(state, scale_type)(images)
    for layer, (logits, boxes) in zip([*outputs["aux_outputs"], outputs], expected, strict=True):
        torch.testing.assert_close(layer["pred_logits"], logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(layer["pred_boxes"], boxes, rtol=0, atol=1e-4)


def test_an_official_checkpoint_file_may_hold_the_training_arguments(resnet_state, tmp_path):
    state = authors_state(resnet_state, "type3", layers=1)
    torch.save({"model": state, "args": argparse.Namespace(smooth=8)}, tmp_path / "checkpoint.pth")

    model = load_official(tmp_path / "checkpoint.pth")

    assert torch.equal(model.query_embed.weight, state["query_embed.weight"])
    assert not model.training


def test_official_models_are_named_by_coco_s_category_ids(resnet_state):
    model = load_official(authors_state(resnet_state, "type2", layers=1))

    assert len(model.classes) == LOGITS
    assert (model.classes[1], model.classes[90]) == ("person", "toothbrush")
    assert sum(name != "N/A" for name in model.classes) == 80


def test_an_official_model_of_type4_is_refused(resnet_state):
    state = authors_state(resnet_state, "type3", layers=1)
    state["transformer.decoder.layers.0.point3.weight"] = torch.randn(24, DIM)
    state["transformer.decoder.layers.0.point3.bias"] = torch.randn(24)

    with pytest.raises(ValueError, match="type1, type2 or type3: point3 with 0, 8 or 16 outputs, got 24"):
        load_official(state)


def test_an_official_checkpoint_of_another_model_is_refused_with_the_names_that_tell():
    with pytest.raises(ValueError, match=r"lacking: query_embed\.weight, .*not known: input_proj_2048\.weight"):
        load_official({"input_proj_2048.weight": torch.zeros(1), "bbox_embed.layers.0.bias": torch.zeros(1)})


def test_a_file_that_is_no_checkpoint_is_refused_by_its_path(tmp_path):
    (tmp_path / "notes.txt").write_text("not weights")

    with pytest.raises(ValueError, match=r"checkpoint must be a file that torch\.save wrote, got .*notes\.txt"):
        load_official(tmp_path / "notes.txt")
    (tmp_path / "empty.pt").touch()
    with pytest.raises(ValueError, match=r"got .*empty\.pt: \w+"):
        load_official(tmp_path / "empty.pt")


# --- our own files ---


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


@pytest.mark.parametrize(
    "content", [{"model": 7}, {"model": {3: torch.zeros(1)}}, [torch.zeros(1)], {"model": {"a": "b"}}, {}]
)
def test_a_checkpoint_without_a_state_dict_is_refused_by_its_path(tmp_path, content):
    torch.save(content, tmp_path / "checkpoint.pth")

    with pytest.raises(ValueError, match=r'state dict, itself or under "model" \(in .*checkpoint\.pth\)'):
        load_official(tmp_path / "checkpoint.pth")


# --- DETR ---


def detr_state(resnet_state):
    """DETR's names are those that the authors kept, without the prior's."""
    state = authors_state(resnet_state, "type1", layers=1)
    return {name: tensor for name, tensor in state.items() if ".point" not in name and ".norm4." not in name}


def test_detr_weights_fill_what_they_fit_and_the_rest_is_reported(resnet_state):
    state = detr_state(resnet_state)
    sizes = {"hidden_dim": DIM, "ffn_dim": FFN, "decoder_layers": 1, "encoder": "1intra", "num_queries": 9}
    model = build("smca-r50", 91, **sizes)
    kept = model.query_embed.weight.detach().clone()

    report = weights.load_detr(model, {"model": state})

    layer = model.decoder.layers[0]
    assert torch.equal(
        layer.co_attn.in_proj_weight, state["transformer.decoder.layers.0.multihead_attn.in_proj_weight"]
    )
    assert torch.equal(model.bbox_embed[4].bias, state["bbox_embed.layers.2.bias"])
    assert torch.equal(model.backbone.body.conv1.weight, state["backbone.0.body.conv1.weight"])
    assert torch.equal(model.query_embed.weight, kept)
    assert set(report.used) | set(report.unused) == set(state)
    assert report.unused == {
        "query_embed.weight": "is [6, 32], and query_embed.weight is [9, 32]",
        "class_embed.weight": "was trained for a softmax",
        "class_embed.bias": "was trained for a softmax",
    }
    assert {name.split(".prior.")[0] for name in report.untouched} == {
        "query_embed.weight",
        "class_embed.weight",
        "class_embed.bias",
        "decoder.layers.0.co_attn",
    }
    assert "query_embed.weight: is [6, 32]" in str(report)


def test_detr_s_projection_goes_to_the_scale_of_the_same_map(resnet_state):
    state = detr_state(resnet_state)
    sizes = {"hidden_dim": DIM, "ffn_dim": FFN, "decoder_layers": 1, "encoder": "1intra"}
    model = build("smca-ms-r50", 91, **sizes)

    weights.load_detr(model, state)

    assert model.config.strides[1] == 32
    assert torch.equal(model.input_proj[1].weight, state["input_proj.weight"])


@pytest.mark.parametrize(
    ("preset", "changes", "lacking"),
    [
        ("smca-r50", {"hidden_dim": 64}, "input_proj, encoder, decoder"),
        ("smca-r101", {"hidden_dim": DIM}, "backbone"),
    ],
)
def test_a_start_from_detr_that_uses_less_than_the_shared_parts_is_refused(resnet_state, preset, changes, lacking):
    model = build(preset, 91, **{"ffn_dim": FFN, "decoder_layers": 1, "encoder": "1intra"} | changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    with pytest.raises(ValueError, match=f"tensors fit, and {lacking}.* would start at random: "):
        weights.load_detr(model, detr_state(resnet_state))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("backbone", ["timm/resnet18", "tiny"])
def test_of_detr_s_backbone_nothing_goes_to_one_of_another_kind(resnet_state, backbone):
    if backbone != "tiny":
        pytest.importorskip("timm")
    strides = (8,) if backbone == "tiny" else (32,)
    sizes = {"hidden_dim": DIM, "ffn_dim": FFN, "decoder_layers": 1, "encoder": "1intra"}
    model = build("smca-r50", 91, backbone=backbone, strides=strides, **sizes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    report = weights.load_detr(model, detr_state(resnet_state))

    ours = [name for name in before if name.startswith(("backbone.", "input_proj."))]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in ours)
    assert set(ours) <= set(report.untouched)
    assert report.unused["input_proj.bias"] == f"belongs to a ResNet, and the backbone is {backbone}"
    assert "backbone.0.body.conv1.weight" in report.unused
    assert "transformer.encoder.layers.0.linear1.weight" in report.used


def test_a_file_brings_the_backbone_unless_it_is_detr_s_and_that_is_no_resnet(resnet_state, tmp_path):
    weights.save(tiny_detector(), tmp_path / "model.safetensors", CLASSES)
    torch.save({"model": detr_state(resnet_state)}, tmp_path / "detr.pth")
    torch.save({"model": authors_state(resnet_state, "type1", layers=1)}, tmp_path / "authors.pth")

    found = {
        name: [weights.brings_backbone(tmp_path / name, backbone) for backbone in ("resnet50", "timm/resnet18")]
        for name in ("model.safetensors", "authors.pth", "detr.pth")
    }
    assert found == {"model.safetensors": [True, True], "authors.pth": [True, True], "detr.pth": [True, False]}


def test_our_own_weights_as_a_start_from_detr_are_refused_with_the_option_for_them(tmp_path):
    weights.save(tiny_detector(), tmp_path / "model.safetensors", CLASSES)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        torch.save({name: file.get_tensor(name) for name in file.keys()}, tmp_path / "ours.pth")  # noqa: SIM118

    with pytest.raises(ValueError, match=r"got weights of smca_model \(in .*ours\.pth\); --weights starts from those"):
        weights.load_detr(tiny_detector(), tmp_path / "ours.pth")
    with pytest.raises(ValueError, match=r"model\.safetensors.*"):
        weights.load_detr(tiny_detector(), tmp_path / "model.safetensors")


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


def test_a_start_from_the_authors_weights_takes_the_rows_of_coco_s_names(resnet_state, tmp_path):
    state = authors_state(resnet_state, "type3", layers=1)
    torch.save({"model": state}, tmp_path / "checkpoint.pth")
    sizes = {"hidden_dim": DIM, "ffn_dim": FFN, "decoder_layers": 1, "encoder": "1intra", "num_queries": QUERIES}
    model = build("smca-r50", 2, **sizes)

    told = weights.start(model, tmp_path / "checkpoint.pth", ["toothbrush", "person"])

    assert "weights of the authors in" in told
    assert torch.equal(model.query_embed.weight, state["query_embed.weight"])
    assert torch.equal(model.class_embed.weight, state["class_embed.weight"][[90, 1]])


def test_a_start_from_detr_s_weights_tells_what_was_used(resnet_state, tmp_path):
    torch.save({"model": detr_state(resnet_state)}, tmp_path / "detr.pth")
    sizes = {"hidden_dim": DIM, "ffn_dim": FFN, "decoder_layers": 1, "encoder": "1intra", "num_queries": QUERIES}
    model = build("smca-r50", 2, **sizes)

    told = weights.start(model, tmp_path / "detr.pth", ["cat", "dog"])

    assert "class_embed.weight: was trained for a softmax" in told
    assert torch.equal(model.query_embed.weight, detr_state_of(tmp_path / "detr.pth")["query_embed.weight"])


def detr_state_of(path):
    return torch.load(path)["model"]


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


def test_a_checkpoint_that_shares_nothing_with_the_model_is_refused():
    with pytest.raises(ValueError, match=r"checkpoint must be one of DETR, got names such as head\.weight"):
        weights.load_detr(tiny_detector(), {"head.weight": torch.zeros(1)})
