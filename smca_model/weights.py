"""Weights in files of our own, and a start from these, the authors' checkpoints or DETR's (detr_weights.py).

Our files are safetensors that hold the configuration, the class names and the size of images that the weights are
meant for, so that `load` needs nothing else.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from smca_kernels.files import replacing

from .config import NO_CLASS, Config
from .detector import SMCA
from .detr_weights import (
    has_our_names,
    is_of_authors,
    is_safetensors,
    load_detr,
    load_official,
    load_strictly,
    read_state,
    shortened,
)

__all__ = ["brings_backbone", "load", "load_detr", "load_official", "read_evaluation", "save", "start"]

FORMAT = "smca_model 1"

# Fields of a configuration that may differ from that of the weights a model starts from.
_FREE_AT_START = {"num_classes", "dropout"}


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
    load_strictly(model, state, name)
    model.classes, model.image_size = classes, image_size
    return model.eval()


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
        saved_by_us = is_safetensors(path)
    except OSError as error:
        raise ValueError(f"path must be a file of weights, got {name}: {error.strerror}") from error
    if saved_by_us:
        source, kind = load(path), "smca_model"
    else:
        state = read_state(path)
        if not is_of_authors(state):
            if has_our_names(state):
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
        told = f"the class layer is made anew: {shortened(unknown)} {'is' if len(unknown) == 1 else 'are'} not among "
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
    return backbone.startswith("resnet") or is_safetensors(path) or is_of_authors(read_state(path))


def _is_checkpoint_of_run(path: str | os.PathLike[str]) -> bool:
    try:
        return has_our_names(read_state(path))
    except ValueError:
        return False


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
        raise ValueError(f"{path} is damaged: each of its classes must be there once, repeated: {shortened(repeated)}")
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
        raise ValueError(f"each of classes must be there once, repeated: {shortened(repeated)}")


def _repeated(classes: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(classes).items() if count > 1 and name != NO_CLASS]
