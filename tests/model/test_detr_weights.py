"""The authors' checkpoints against their forward pass written out, and DETR's as a start."""

from __future__ import annotations

import argparse
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors import safe_open
from tiny_detector import tiny_detector
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from smca_model import build, load_official, weights

CLASSES = ("a", "b", "N/A", "d", "e")

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


def test_our_own_weights_as_a_start_from_detr_are_refused_with_the_option_for_them(tmp_path):
    weights.save(tiny_detector(), tmp_path / "model.safetensors", CLASSES)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        torch.save({name: file.get_tensor(name) for name in file.keys()}, tmp_path / "ours.pth")  # noqa: SIM118

    with pytest.raises(ValueError, match=r"got weights of smca_model \(in .*ours\.pth\); --weights starts from those"):
        weights.load_detr(tiny_detector(), tmp_path / "ours.pth")
    with pytest.raises(ValueError, match=r"model\.safetensors.*"):
        weights.load_detr(tiny_detector(), tmp_path / "model.safetensors")


def test_a_checkpoint_that_shares_nothing_with_the_model_is_refused():
    with pytest.raises(ValueError, match=r"checkpoint must be one of DETR, got names such as head\.weight"):
        weights.load_detr(tiny_detector(), {"head.weight": torch.zeros(1)})


# --- a start from either ---


def test_a_file_brings_the_backbone_unless_it_is_detr_s_and_that_is_no_resnet(resnet_state, tmp_path):
    weights.save(tiny_detector(), tmp_path / "model.safetensors", CLASSES)
    torch.save({"model": detr_state(resnet_state)}, tmp_path / "detr.pth")
    torch.save({"model": authors_state(resnet_state, "type1", layers=1)}, tmp_path / "authors.pth")

    found = {
        name: [weights.brings_backbone(tmp_path / name, backbone) for backbone in ("resnet50", "timm/resnet18")]
        for name in ("model.safetensors", "authors.pth", "detr.pth")
    }
    assert found == {"model.safetensors": [True, True], "authors.pth": [True, True], "detr.pth": [True, False]}


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
