"""Weights: our own files, the authors' checkpoints, and DETR's as a start.

Our files are safetensors that hold the configuration, the class names and the size of images that the weights are
meant for, so that `load` needs nothing else.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smca_kernels.files import replacing
from smca_kernels.nn import OFFICIAL_NAMES

from .config import NO_CLASS, Config
from .detector import SMCA

FORMAT = "smca_model 1"

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
# Fields of a configuration that may differ from that of the weights a model starts from.
_FREE_AT_START = {"num_classes", "dropout"}


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


def save(
    model: SMCA,
    path: str | os.PathLike[str],
    classes: Sequence[str],
    evaluation: Mapping[str, float] | None = None,
) -> None:
    """Write the weights with configuration, class names and the model's `image_size`; the file is replaced as a whole.

    Args:
        model: what to save.
        path: a file, usually ``*.safetensors``.
        classes: the name of every label in order, "N/A" for one that means nothing.
        evaluation: what is known of these weights, such as their AP; `read_evaluation` reads it.

    Raises:
        ValueError: for another number of classes than the model has, for names that repeat, and for an `image_size` of
            which the short side is not within the longest.
        OSError: with the file's name, when it can't be written.
    """
    _check_classes(classes, model.config)
    if not _is_image_size(model.image_size):
        raise ValueError(
            f"model.image_size must be pixels of the short side and of the longest, got {model.image_size}"
        )
    metadata = {
        "format": FORMAT,
        "config": json.dumps(asdict(model.config)),
        "classes": json.dumps(list(classes), ensure_ascii=False),
        "image_size": json.dumps(model.image_size),
    }
    if evaluation is not None:
        metadata["evaluation"] = json.dumps(dict(evaluation))
    state: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in model.state_dict().items():
        storage = tensor.untyped_storage().data_ptr()
        # safetensors takes none that share memory, such as those of a module that a backbone has under two names.
        tensor = tensor.clone() if storage in storages else tensor
        storages.add(storage)
        state[name] = tensor.contiguous()
    with replacing(Path(path)) as temporary:
        mode = stat.S_IMODE(temporary.stat().st_mode)
        try:
            save_file(state, temporary, metadata)
            temporary.chmod(mode)  # safetensors puts a file of its own there, which nobody else can read
        except SafetensorError as error:  # it has the system's error as text alone
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise OSError(errno.EIO, str(error)) from error
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def read_evaluation(path: str | os.PathLike[str]) -> dict[str, float]:
    """What `save` was told of a file's weights; nothing where it was told nothing.

    Raises:
        ValueError: for what is no file of weights.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get("evaluation", "{}"))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"path must be a file of weights, got {os.fspath(path)}: {error}") from error
    numbers = found if isinstance(found, dict) else {"evaluation": found}
    if not all(isinstance(number, (int, float)) for number in numbers.values()):
        raise ValueError(f"{os.fspath(path)} is damaged: its evaluation must be numbers by name, got {found!r}")
    return numbers


def load(
    path: str | os.PathLike[str], *, backend: str = "auto", backbone: nn.Module | None = None, **overrides: Any
) -> SMCA:
    """The detector that `save` wrote, on the CPU, in evaluation mode, with its `classes` and `image_size`.

    Args:
        path: the file.
        backend: of the co-attention, as `smca_attention`.
        backbone: the module, for a detector that was built with one; its weights are those of the file then.
        overrides: fields of `Config` that change no parameter, such as dropout.

    Raises:
        ValueError: for a file that `save` did not write, or overrides that the weights don't fit.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except (OSError, SafetensorError) as error:
        if _is_checkpoint_of_run(path):
            reason = "it is the checkpoint of a run; model.safetensors beside it has the weights"
        else:
            reason = str(error)
        raise ValueError(f"path must be a file of weights, got {os.fspath(path)}: {reason}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"path must be a file of format {FORMAT!r}, got {os.fspath(path)} of {metadata.get('format')!r}"
        )
    name = os.fspath(path)
    config, classes, image_size = _read_metadata(metadata, name)
    try:
        config = replace(config, **overrides)
    except TypeError as error:
        raise ValueError(f"overrides must be fields of Config, got {', '.join(overrides)} ({error})") from error
    try:
        model = SMCA(config, backend=backend, backbone=backbone)
    except (ValueError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{name} must hold a configuration that can be built, got {config} ({error})") from error
    _load_strictly(model, state, name)
    model.classes, model.image_size = classes, image_size
    return model.eval()


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
    state = _official_state(checkpoint)
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
            f"lacking: {_shortened(missing)}; not known: {_shortened(strangers)}{_of_file(checkpoint)}"
        )
    shapeless = [name for name in needed if renamed[name].dim() != 2]
    if shapeless:
        raise ValueError(f"checkpoint must have matrices as {_shortened(shapeless)}{_of_file(checkpoint)}")
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
    _load_strictly(model, renamed, "checkpoint" if isinstance(checkpoint, Mapping) else os.fspath(checkpoint))
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
    theirs = _official_state(checkpoint)
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
            f"checkpoint must be one of DETR, got names such as {_shortened(list(theirs))}{_of_file(checkpoint)}"
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
            f"{_of_file(checkpoint)}: {_shortened(reasons)}"
        )
    model.load_state_dict({target: theirs[name] for name, target in used.items()}, strict=False)
    return LoadReport(list(used), unused, [name for name in ours if name not in filled])


def start(model: SMCA, path: str | os.PathLike[str], classes: Sequence[str]) -> str:
    """Initialise a detector from a file of `save`, a checkpoint of the authors' code, or one of DETR.

    The class layer is taken over, name by name, where the file has all the classes wanted; else it keeps its values.
    Everything else must fit, but for DETR's checkpoints, of which `load_detr` takes what has a place.

    Args:
        model: changed in place.
        path: the file.
        classes: the name of every label that the model is to have.

    Returns:
        What was taken over, and what became of the class layer; print it.

    Raises:
        ValueError: for another kind of file, or weights of another model.
    """
    name = os.fspath(path)
    _check_classes(classes, model.config)
    try:
        saved_by_us = _is_safetensors(path)
    except OSError as error:
        raise ValueError(f"path must be a file of weights, got {name}: {error.strerror}") from error
    if saved_by_us:
        source, kind = load(path), "smca_model"
    else:
        state = _official_state(path)
        if not _is_of_authors(state):
            if _has_our_names(state):
                raise ValueError(
                    f"{name} must be a file of weights, got the checkpoint of a run: go on with it by --resume, or "
                    "start from the model.safetensors beside it"
                )
            return f"starts from DETR's {name}: {load_detr(model, path)}"
        source, kind = load_official(path, beta=model.config.beta), "the authors"
    theirs, ours = asdict(source.config), asdict(model.config)
    differing = [field for field in ours if field not in _FREE_AT_START and theirs[field] != ours[field]]
    if differing:
        shown = "; ".join(f"{field} {theirs[field]} there, {ours[field]} here" for field in differing)
        raise ValueError(f"{name} must be weights of the model that --preset and --overrides choose, got {shown}")
    tensors = source.state_dict()
    head = [each for each in tensors if each.startswith("class_embed.")]
    unknown = [each for each in classes if each not in source.classes]
    if unknown:
        for each in head:
            del tensors[each]
        told = f"the class layer is made anew: {_shortened(unknown)} {'is' if len(unknown) == 1 else 'are'} not among "
        told += (
            f"the {len(source.classes)} classes there" if source.classes else "the classes there, which have no names"
        )
    else:
        rows = [source.classes.index(each) for each in classes]
        for each in head:
            tensors[each] = tensors[each][rows]
        told = f"the class layer has the rows of its {len(rows)} classes"
    model.load_state_dict(tensors, strict=False)
    return f"starts from weights of {kind} in {name}: {len(tensors)} tensors; {told}"


def brings_backbone(path: str | os.PathLike[str], backbone: str) -> bool:
    """Whether `start` takes a backbone of this name from a file: not from one of DETR, unless it is a ResNet.

    Raises:
        ValueError: for what is no file of weights.
        OSError: for a file that can't be read.
    """
    return backbone.startswith("resnet") or _is_safetensors(path) or _is_of_authors(_official_state(path))


def _is_of_authors(state: Mapping[str, Tensor]) -> bool:
    return any(".point2." in name for name in state)


def _is_checkpoint_of_run(path: str | os.PathLike[str]) -> bool:
    try:
        return _has_our_names(_official_state(path))
    except ValueError:
        return False


def _has_our_names(state: Mapping[str, Tensor]) -> bool:
    return any(name in state for name in ("encoder.blocks.0.norm1.weight", "decoder.norm.weight"))


def _is_safetensors(path: str | os.PathLike[str]) -> bool:
    with open(path, "rb") as file:
        begin = file.read(9)
    return len(begin) == 9 and begin[8:] == b"{"  # after its length, eight bytes, the header is JSON


def _read_metadata(metadata: Mapping[str, str], path: str) -> tuple[Config, tuple[str, ...], tuple[int, int]]:
    """Configuration, class names and image size of a file of ours, each checked."""

    def read(name: str) -> Any:
        try:
            return json.loads(metadata[name])
        except (KeyError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: its {name} must be JSON, got {metadata.get(name)!r}") from error

    values, classes, image_size = (read(name) for name in ("config", "classes", "image_size"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: its config must be fields of Config by name, got {values!r}")
    strangers = sorted(values.keys() - {field.name for field in fields(Config)})
    if strangers:
        raise ValueError(f"{path} has a configuration with fields that this version does not know: {strangers}")
    try:
        config = Config(**values)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: its configuration can't be used ({error})") from error
    if not (isinstance(classes, list) and all(isinstance(each, str) for each in classes)):
        raise ValueError(f"{path} is damaged: its classes must be a list of names, got {classes!r}")
    if len(classes) != config.num_classes:
        raise ValueError(f"{path} is damaged: it must have {config.num_classes} class names, got {len(classes)}")
    if repeated := _repeated(classes):
        raise ValueError(f"{path} is damaged: each of its classes must be there once, repeated: {_shortened(repeated)}")
    if not _is_image_size(image_size):
        raise ValueError(
            f"{path} is damaged: its image_size must be two numbers of pixels, of the short side and of the longest, "
            f"got {image_size!r}"
        )
    return config, tuple(classes), (image_size[0], image_size[1])


def _is_image_size(sides: Any) -> bool:
    if not isinstance(sides, (list, tuple)) or len(sides) != 2:
        return False
    return all(isinstance(side, int) and not isinstance(side, bool) for side in sides) and 1 <= sides[0] <= sides[1]


def _check_classes(classes: Sequence[str], config: Config) -> None:
    if len(classes) != config.num_classes:
        raise ValueError(f"classes must be {config.num_classes} names, one a label, got {len(classes)}")
    if repeated := _repeated(classes):
        raise ValueError(f"each of classes must be there once, repeated: {_shortened(repeated)}")


def _repeated(classes: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(classes).items() if count > 1 and name != NO_CLASS]


def _official_state(checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> Mapping[str, Tensor]:
    source = checkpoint
    if not isinstance(checkpoint, Mapping):
        path = os.fspath(checkpoint)
        try:
            # DETR's training script stores its arguments beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = (
                    load_file(path)  # torch.load reads these too, but not that of torch 2.8
                    if _is_safetensors(path)
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


def _load_strictly(model: SMCA, state: Mapping[str, Tensor], source: str) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{source} must fit the configuration {model.config}: {error}") from error


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"
