"""Checkpoints of DETR, as a start, and of the authors' SMCA, which keeps DETR's names; both are renamed to ours."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from smca_kernels.nn import OFFICIAL_NAMES

from .config import NO_CLASS, Config
from .detector import SMCA

# Labels are COCO's category ids, which have gaps.
_COCO = (
    "N/A,person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,N/A,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,N/A,backpack,umbrella,N/A,N/A,"
    "handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,"
    "tennis racket,bottle,N/A,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,"
    "hot dog,pizza,donut,cake,chair,couch,potted plant,bed,N/A,dining table,N/A,N/A,toilet,N/A,tv,laptop,mouse,"
    "remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,N/A,book,clock,vase,scissors,teddy bear,"
    "hair drier,toothbrush"
)
COCO_CLASSES = tuple(_COCO.split(","))

# Names of DETR's parameters, which the authors kept, and ours.
_ENCODER = r"transformer\.encoder\.layers\.(\d+)\."
_DECODER = r"transformer\.decoder\.layers\.(\d+)\."
_RENAMED = {
    r"backbone\.0\.body\.": r"backbone.body.",
    r"input_proj\.": r"input_proj.0.",
    _ENCODER + r"self_attn\.": r"encoder.blocks.\1.self_attn.0.",
    _ENCODER + r"(linear[12])\.": r"encoder.blocks.\1.ffn.0.\2.",
    _ENCODER + r"(norm[12])\.": r"encoder.blocks.\1.\2.",
    _DECODER + r"self_attn\.": r"decoder.layers.\1.self_attn.",
    _DECODER + r"(linear[12])\.": r"decoder.layers.\1.ffn.\2.",
    _DECODER + r"(norm[123])\.": r"decoder.layers.\1.\2.",
    **{_DECODER + re.escape(theirs): rf"decoder.layers.\1.co_attn.{ours}" for theirs, ours in OFFICIAL_NAMES.items()},
    r"transformer\.decoder\.norm\.": r"decoder.norm.",
    r"(query_embed|class_embed)\.": r"\1.",
    r"bbox_embed\.layers\.0\.": r"bbox_embed.0.",
    r"bbox_embed\.layers\.1\.": r"bbox_embed.2.",
    r"bbox_embed\.layers\.2\.": r"bbox_embed.4.",
}
_OFFICIAL_HEADS = 8
# Parts that every DETR has, and for each the weights of which some must fit: biases may do so by chance.
_SHARED_WITH_DETR = {
    "backbone": r"backbone\..*weight",
    "input_proj": r"input_proj\..*weight",
    "encoder": r"encoder\..*in_proj_weight",
    "decoder": r"decoder\..*co_attn\.in_proj_weight",
    "bbox_embed": r"bbox_embed\.0\.weight",
}


@dataclass(frozen=True)
class LoadReport:
    """The outcome of loading a checkpoint.

    Attributes:
        used: its names that were copied.
        unused: its other names, and why.
        untouched: names of the model's parameters and buffers that kept their values.
    """

    used: list[str]
    unused: dict[str, str]
    untouched: list[str]

    def __str__(self) -> str:
        lines = [f"{len(self.used)} tensors of the checkpoint used, {len(self.unused)} not:"]
        lines += [f"  {name}: {reason}" for name, reason in self.unused.items()]
        lines += [f"{len(self.untouched)} tensors of the model kept as initialised:"]
        lines += [f"  {name}" for name in self.untouched]
        return "\n".join(lines)


def load_official(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any], *, beta: float = 8.0, backend: str = "auto"
) -> SMCA:
    """The single-scale detector of a checkpoint of the authors' code, in evaluation mode.

    Sizes, backbone and scale type (their type1, type2, type3) follow from the parameters. The labels are COCO's
    category ids, and the names of those become `classes` where there are 91 or 92 logits, as the authors have.

    Args:
        checkpoint: a file that torch.save wrote, or what it holds: a state dict, maybe under "model".
        beta: their `smooth`, which is not among the parameters.
        backend: of the co-attention, as `smca_attention`.

    Raises:
        ValueError: for a checkpoint of another model: multi-scale, type4, or not SMCA.
    """
    state = read_state(checkpoint)
    renamed = {ours: state[theirs] for theirs, ours in _our_names(state).items() if ours is not None}
    strangers = [theirs for theirs, ours in _our_names(state).items() if ours is None]
    needed = [
        "query_embed.weight",
        "class_embed.weight",
        "decoder.layers.0.co_attn.prior.offset.weight",
        "encoder.blocks.0.ffn.0.linear1.weight",
    ]
    missing = [name for name in needed if name not in renamed]
    if missing or strangers:
        raise ValueError(
            "checkpoint must be one of the authors' single-scale SMCA, "
            f"lacking: {shortened(missing)}; not known: {shortened(strangers)}{_of_file(checkpoint)}"
        )
    shapeless = [name for name in needed if renamed[name].dim() != 2]
    if shapeless:
        raise ValueError(f"checkpoint must have matrices as {shortened(shapeless)}{_of_file(checkpoint)}")
    num_queries, hidden_dim = renamed["query_embed.weight"].shape
    scale_outputs = renamed.get("decoder.layers.0.co_attn.prior.object_scale.bias", torch.empty(0)).shape[0]
    scale_types = {0: "fixed", _OFFICIAL_HEADS: "single", 2 * _OFFICIAL_HEADS: "independent"}
    if scale_outputs not in scale_types:
        raise ValueError(
            f"checkpoint must be of type1, type2 or type3: point3 with 0, 8 or 16 outputs, got {scale_outputs}"
            f"{_of_file(checkpoint)}"
        )
    config = Config(
        backbone="resnet101" if "backbone.body.layer3.22.conv1.weight" in renamed else "resnet50",
        encoder=f"{_layers(renamed, 'encoder.blocks.')}intra",
        hidden_dim=hidden_dim,
        num_heads=_OFFICIAL_HEADS,
        ffn_dim=renamed["encoder.blocks.0.ffn.0.linear1.weight"].shape[0],
        decoder_layers=_layers(renamed, "decoder.layers."),
        num_queries=num_queries,
        num_classes=renamed["class_embed.weight"].shape[0],
        scale_type=scale_types[scale_outputs],
        beta=beta,
    )
    model = SMCA(config, backend=backend)
    load_strictly(model, renamed, "checkpoint" if isinstance(checkpoint, Mapping) else os.fspath(checkpoint))
    nameless = config.num_classes - len(COCO_CLASSES)
    if nameless in (0, 1):
        model.classes = COCO_CLASSES + (NO_CLASS,) * nameless
    return model.eval()


def load_detr(model: SMCA, checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> LoadReport:
    """Initialise a detector from a checkpoint of DETR: every tensor that has a place of its shape.

    DETR's class layer is left out whatever its shape, because it was trained for a softmax with a no-object class; so
    are backbone and projection where the detector's backbone is not "resnet50" or "resnet101".

    Args:
        model: changed in place.
        checkpoint: a file that torch.save wrote, or what it holds: a state dict, maybe under "model".

    Returns:
        What was used, what was not and why, and what of the model kept its values; print it.

    Raises:
        ValueError: for a file that is no such checkpoint, and for one of which less can be used than the parts that
            every DETR shares with the model; the model is then as it was.
    """
    theirs = read_state(checkpoint)
    ours = model.state_dict()
    if any(name in ours and not name.startswith(("class_embed.", "query_embed.")) for name in theirs):
        raise ValueError(
            f"checkpoint must be one of DETR, got weights of smca_model{_of_file(checkpoint)}; --weights starts from "
            "those, from the authors' and from DETR's"
        )
    deepest = max(model.backbone.channels)  # DETR projects the deepest map, whichever of our scales that is
    scale = model.config.strides.index(deepest) if deepest in model.config.strides else 0
    resnet = model.config.backbone.startswith("resnet")
    used, unused = {}, {}
    for name, target in _our_names(theirs).items():
        if target is not None:
            target = target.replace("input_proj.0.", f"input_proj.{scale}.")
        if target is not None and target.startswith(("backbone.", "input_proj.")) and not resnet:
            # Of other backbones some tensors have the same names and shapes, but stand for other features.
            unused[name] = f"belongs to a ResNet, and the backbone is {model.config.backbone}"
        elif target is None or target not in ours:
            unused[name] = "has no place in this model"
        elif target.startswith("class_embed."):
            unused[name] = "was trained for a softmax"
        elif ours[target].shape != theirs[name].shape:
            unused[name] = f"is {list(theirs[name].shape)}, and {target} is {list(ours[target].shape)}"
        else:
            used[name] = target
    if not used:
        raise ValueError(
            f"checkpoint must be one of DETR, got names such as {shortened(list(theirs))}{_of_file(checkpoint)}"
        )
    filled = set(used.values())
    lacking = [
        part for part, weight in _SHARED_WITH_DETR.items() if not any(re.fullmatch(weight, target) for target in filled)
    ]
    if not resnet:  # DETR has no such backbone, nor its projection
        lacking = [part for part in lacking if part not in ("backbone", "input_proj")]
    elif not all(name in filled for name in ours if name.startswith("backbone.")):
        lacking = sorted({*lacking, "backbone"}, key=list(_SHARED_WITH_DETR).index)
    if lacking:
        reasons = [f"{name} {reason}" for name, reason in unused.items() if not name.startswith("class_embed.")]
        raise ValueError(
            f"checkpoint must be one of DETR that the model shares its parts with, but {len(used)} of {len(theirs)} "
            f"tensors fit, and {', '.join(lacking)} would start at random"
            f"{_of_file(checkpoint)}: {shortened(reasons)}"
        )
    model.load_state_dict({target: theirs[name] for name, target in used.items()}, strict=False)
    return LoadReport(list(used), unused, [name for name in ours if name not in filled])


def read_state(checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The state dict of a checkpoint: a file that torch.save wrote, or what it holds.

    Raises:
        ValueError: for a file that can't be read, or one without a state dict, naming it.
    """
    source = checkpoint
    if not isinstance(checkpoint, Mapping):
        path = os.fspath(checkpoint)
        try:
            # DETR's training script stores its arguments beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = (
                    load_file(path)  # torch.load reads these too, but not that of torch 2.8
                    if is_safetensors(path)
                    else torch.load(path, map_location="cpu", weights_only=True)
                )
        except Exception as error:  # torch.load raises whatever unpickling a wrong file comes upon
            # What follows the first sentence advises to load without weights_only.
            reason = str(error).split(". ")[0] or type(error).__name__
            raise ValueError(f"checkpoint must be a file that torch.save wrote, got {path}: {reason}") from error
    state = checkpoint.get("model", checkpoint) if isinstance(checkpoint, Mapping) else {}
    tensors = isinstance(state, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    )
    if not state or not tensors:
        raise ValueError(f'checkpoint must hold a state dict, itself or under "model"{_of_file(source)}')
    return cast("Mapping[str, Tensor]", state)


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as safetensors do."""
    with open(path, "rb") as file:
        begin = file.read(9)
    return len(begin) == 9 and begin[8:] == b"{"  # after its length, eight bytes, the header is JSON


def is_of_authors(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is of the authors' SMCA: DETR has no `point2`."""
    return any(".point2." in name for name in state)


def has_our_names(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is of this package, such as that in the checkpoint of a run."""
    return any(name in state for name in ("encoder.blocks.0.norm1.weight", "decoder.norm.weight"))


def load_strictly(model: SMCA, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict that must fit; `source` begins the message of the ValueError if it doesn't."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{source} must fit the configuration {model.config}: {error}") from error


def _of_file(checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> str:
    """End of a message that says which file a checkpoint is from, if it is from one."""
    return "" if isinstance(checkpoint, Mapping) else f" (in {os.fspath(checkpoint)})"


def _our_names(state: Mapping[str, Tensor]) -> dict[str, str | None]:
    """{their name: ours}, None where there is none."""
    names: dict[str, str | None] = {}
    for name in state:
        matches = ((re.match(pattern, name), ours) for pattern, ours in _RENAMED.items())
        names[name] = next((match.expand(ours) + name[match.end() :] for match, ours in matches if match), None)
    return names


def _layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name[len(prefix) :].split(".")[0]) for name in state if name.startswith(prefix))


def shortened(names: Sequence[str]) -> str:
    """The first five of some names, and how many more there are, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"
