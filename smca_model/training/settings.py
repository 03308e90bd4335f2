"""The settings of a training run, which are the options of `smca train`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any

from ..config import MAX_SIZE, SIZES, check_kinds
from ..execution import PRECISION_HELP, PRECISIONS
from ..presets import configure
from .loggers import LOGGERS

LR_BACKBONE = 1e-5
DROP = 10.0  # the paper divides the learning rate by this, once


def option(default: Any, help: str, **argument: Any) -> Any:
    """A field of `Settings` with its default and its text in `smca train --help`."""
    return field(default=default, metadata={"help": help, **argument})


@dataclass(frozen=True)
class Settings:
    """A run; every field is an option of `smca train`. Defaults are those of the paper's 50-epoch schedule.

    Raises:
        ValueError: for a value of another type or out of range.
    """

    data: str = option("", "folder in the layout of COCO, Roboflow or YOLO, or a data.yaml", metavar="DIR")
    out: str = option("", "folder of the run", metavar="DIR")
    preset: str = option("smca-r50", "which model; `smca presets` lists them", metavar="NAME")
    overrides: tuple[str, ...] = option((), "changes to the preset, such as dropout=0.0", metavar="NAME=VALUE")
    pretrained_backbone: bool | None = option(
        None, "ImageNet weights; default: unless the backbone is tiny, or that of the weights to start from"
    )
    weights: str = option(
        "",
        "start from these weights: ours, the authors' or DETR's; with other classes the class layer is made anew",
        metavar="FILE",
    )
    detr_weights: str = option("", "start from what of a facebookresearch DETR checkpoint fits", metavar="FILE")
    sizes: tuple[int, ...] = option(
        SIZES,
        "short sides that images are resized to, in pixels; the largest for evaluation",
        type=int,
    )
    max_size: int = option(MAX_SIZE, "most pixels of the longest side")
    flip: bool = option(True, "mirror half of the training images")
    crop: bool = option(True, "crop half of the training images")
    upright: bool = option(False, "boxes are of upright images where size and EXIF don't say")
    epochs: int = option(50, "passes over the training images")
    lr_drop: int = option(40, "epoch from which the learning rate is a tenth")
    lr: float = option(1e-4, "learning rate")
    lr_backbone: float = option(LR_BACKBONE, "learning rate of the backbone")
    freeze_backbone: bool = option(False, "do not train the backbone, which saves time and memory")
    warmup_steps: int = option(0, "steps over which the learning rate rises from 0")
    weight_decay: float = option(1e-4, "weight decay of AdamW")
    clip: float = option(0.1, "largest norm of the gradient")
    batch_size: int = option(2, "images at once on one device")
    accumulate: int = option(1, "batches whose gradients make one step")
    precision: str = option("fp32", PRECISION_HELP, choices=PRECISIONS)
    ema: float = option(0.0, "decay of a moving average of the weights, such as 0.9997; 0: none")
    backend: str = option("auto", "of the co-attention", choices=("auto", "triton", "sdpa", "reference"))
    workers: int = option(4, "processes that load images, for each device; 0: none")
    seed: int = option(0, "of everything random")
    deterministic: bool = option(False, "deterministic algorithms only; slower on a GPU")
    eval_every: int = option(1, "epochs between evaluations; 0: after the last only")
    patience: int = option(0, "evaluations without a better AP after which the run ends; 0: it never ends early")
    loggers: tuple[str, ...] = option(
        ("tensorboard",), "where numbers go beside metrics.jsonl; none: there alone", nargs="*", choices=tuple(LOGGERS)
    )
    save_minutes: float = option(30.0, "minutes between checkpoints inside an epoch")
    log_every: int = option(50, "steps between lines of metrics")

    def __post_init__(self) -> None:
        check_kinds(self)
        for item in fields(self):
            value, choices = getattr(self, item.name), item.metadata.get("choices", ())
            for each in value if isinstance(value, tuple) else (value,):
                if choices and each not in choices:
                    raise ValueError(f"{item.name} must be one of {choices}, got {each!r}")
        at_least = {"epochs": 1, "lr_drop": 0, "batch_size": 1, "accumulate": 1, "workers": 0, "log_every": 1}
        at_least |= {"eval_every": 0, "patience": 0, "warmup_steps": 0, "seed": 0, "max_size": 1}
        at_least |= {"lr": 0, "lr_backbone": 0, "weight_decay": 0, "save_minutes": 0}
        for name, least in at_least.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.clip > 0:
            raise ValueError(f"clip must be positive, got {self.clip}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes must be one or more short sides of at least 1 pixel, got {self.sizes}")
        if self.weights and self.detr_weights:
            raise ValueError(
                f"weights and detr_weights can't both be a start, got {self.weights!r} and {self.detr_weights!r}"
            )
        if self.freeze_backbone and self.lr_backbone != LR_BACKBONE:
            raise ValueError(f"lr_backbone can't be given with freeze_backbone, got {self.lr_backbone}")
        if self.patience and not self.eval_every:
            raise ValueError(f"patience counts evaluations, of which eval_every=0 has one, got {self.patience}")
        if len(set(self.loggers)) < len(self.loggers):
            raise ValueError(f"loggers must be among {', '.join(LOGGERS)}, each once, got {' '.join(self.loggers)}")
        configure(self.preset, **self.model_overrides())

    def model_overrides(self) -> dict[str, Any]:
        """`overrides` by name, each value read as JSON where it is JSON, else as a string."""
        found: dict[str, Any] = {}
        own = {each.name: each.name.replace("_", "-") for each in fields(self)}
        for item in self.overrides:
            name, equals, value = item.partition("=")
            if not (name and equals):
                raise ValueError(f"overrides must be of the form NAME=VALUE, got {item!r}")
            if name == "num_classes":
                raise ValueError(
                    f"overrides can't set num_classes, which follows from the classes of --data, got {item!r}"
                )
            if name in own:
                raise ValueError(f"overrides can't set {name}, which has an option, --{own[name]}, got {item!r}")
            if name in found:
                raise ValueError(f"overrides must name a field once, got {name} twice")
            try:
                found[name] = json.loads(value)
            except json.JSONDecodeError:
                found[name] = value
        return found

    def learning_rate_factor(self, step: int, steps_per_epoch: int) -> float:
        """The factor of the learning rates at a step (counted from 0): warm-up, then ÷ 10 at lr_drop."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warm / DROP if step >= self.lr_drop * steps_per_epoch else warm
