"""Detectors as folders and as repositories of the Hugging Face hub: weights, configuration and a model card.

    save_pretrained(model, "street")
    push_to_hub(model, "me/street", license="mit")
    model = from_pretrained("me/street")  # or the folder

Folders need no package of the hub. model.safetensors is all that is read; config.json and README.md are for people and
for the hub.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from smca_kernels import __version__
from smca_kernels.files import write_text
from smca_kernels.tools.arguments import check_packages, first_line

from . import weights
from .config import NO_CLASS
from .presets import nearest_preset

if TYPE_CHECKING:
    from torch import nn

    from .detector import SMCA

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def save_pretrained(
    model: SMCA, folder: str | os.PathLike[str], *, classes: Sequence[str] | None = None, license: str = "unknown"
) -> None:
    """Write a detector into a folder, which is made: its weights, its configuration, and a card unless there is one.

    Args:
        model: the detector.
        folder: where to.
        classes: the name of every label in order; None: the model's own.
        license: of the weights, as the hub calls it ("mit", "apache-2.0", "other").

    Raises:
        ValueError: for another number of classes than the model has, and a folder that can't be made.
        OSError: with the file's name, when one can't be written.
    """
    names = model.classes if classes is None else tuple(classes)
    _check(model, names)
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"folder must be one that can be made, got {path} ({error.strerror})") from None
    weights.save(model, path / WEIGHTS, names)
    about = {"model_type": "smca", "config": asdict(model.config), "classes": names, "image_size": model.image_size}
    write_text(path / CONFIG, json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    if not (path / CARD).exists():
        write_text(path / CARD, model_card(model, names, license))


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    backend: str = "auto",
    backbone: nn.Module | None = None,
) -> SMCA:
    """The detector in a folder of `save_pretrained` or in a repository of the hub, as `weights.load` gives it.

    Args:
        source: the folder, or the repository's "owner/name".
        revision: of the repository: branch, tag or commit; None: its main branch.
        token: for the hub; None: that of its login.
        backend: of the co-attention, as `smca_attention`.
        backbone: the module, for a detector that was built with one.

    Raises:
        ValueError: for a source that has no such weights or can't be reached, and where huggingface_hub is missing.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(f"revision must be None for a folder, got {revision!r} for {os.fspath(source)}")
        return weights.load(Path(source) / WEIGHTS, backend=backend, backbone=backbone)
    check_packages(("huggingface_hub",), "hub")
    from huggingface_hub import hf_hub_download

    name = os.fspath(source)
    try:
        file = hf_hub_download(name, WEIGHTS, revision=revision, token=token)
    except Exception as error:  # the network's have another class with every library that the hub's package is on
        raise ValueError(
            f"source must be a folder, or a repository of the hub with {WEIGHTS}, got {name} ({first_line(error)})"
        ) from error
    return weights.load(file, backend=backend, backbone=backbone)


def push_to_hub(
    model: SMCA,
    repository: str,
    *,
    classes: Sequence[str] | None = None,
    license: str = "unknown",
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload a detector",
) -> str:
    """Put a detector into a repository of the hub, which is made if it isn't there; a card that it has is kept.

    Args:
        model: the detector.
        repository: "owner/name".
        classes: the name of every label in order; None: the model's own.
        license: of the weights, as the hub calls it.
        private: whether nobody else may see a repository that is made.
        token: for the hub; None: that of its login.
        revision: the branch; None: the main one.
        message: of the commit.

    Returns:
        The commit's address.

    Raises:
        ValueError: before anything is sent, for another number of classes than the model has and where huggingface_hub
            is missing; afterwards, for what the hub refuses, and where it can't be reached.
    """
    check_packages(("huggingface_hub",), "hub")
    from huggingface_hub import HfApi

    _check(model, model.classes if classes is None else classes)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, classes=classes, license=license)
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            kept = [CARD] if api.file_exists(repository, CARD, revision=revision) else None
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=message,
                revision=revision,
                ignore_patterns=kept,
            )
        except Exception as error:  # the network's have another class with every library that the hub's package is on
            raise ValueError(
                f"repository must be one that can be written, got {repository} ({first_line(error)})"
            ) from error
    return str(commit.commit_url)


def model_card(model: SMCA, classes: Sequence[str], license: str) -> str:
    """The README.md of a detector, in Markdown with the hub's metadata.

    Args:
        model: the detector.
        classes: the name of every label in order.
        license: of the weights, as the hub calls it.
    """
    preset, changes = nearest_preset(model.config)
    changed = "".join(f"\n  - `{name}`: `{json.dumps(value)}`" for name, value in changes.items())
    named = [name for name in classes if name != NO_CLASS]
    short, longest = model.image_size
    backbone = ", backbone=…" if model.config.backbone == "custom" else ""
    return f"""---
library_name: smca
license: {json.dumps(license)}
pipeline_tag: object-detection
tags:
- object-detection
- detr
- smca
---

# SMCA detector

An object detector of `smca_model` {__version__}: DETR with spatially modulated co-attention
([paper](https://arxiv.org/abs/2101.07448)).

- Preset: `{preset}`{", but for" if changes else ""}{changed}
- Images: RGB, ImageNet's mean and deviation, short side {short} pixels, longest side at most {longest}
- License of the weights: {license}

## Use

```python
from smca_model import postprocess
from smca_model.hub import from_pretrained

model = from_pretrained("THIS_REPOSITORY"{backbone})
detections = postprocess(model([image]), [(height, width)])  # image: [3, height, width]
```

`smca detect street.jpg --weights {WEIGHTS}` does so from the command line.

## Classes

{len(named)}, by label:

{_listed(classes)}
"""


def _listed(classes: Sequence[str]) -> str:
    # Indented text is shown as it is, whatever the names hold.
    return "\n".join(f"    {label} {' '.join(name.split())}" for label, name in enumerate(classes) if name != NO_CLASS)


def _check(model: SMCA, classes: Sequence[str]) -> None:
    if len(classes) != model.config.num_classes:
        has = "the model has no names of its own" if not model.classes else f"got {len(classes)}"
        raise ValueError(f"classes must be {model.config.num_classes} names, one a label; {has}")
