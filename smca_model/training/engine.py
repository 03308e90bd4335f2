"""One step of training: the images it sees, the gradient it follows, and where it refuses to go on.

What a step does depends on the trainer's state, the settings and the number of the step alone: the order of the
images on (seed, epoch), an image's augmentation on (seed, epoch, image), dropout on (seed, step, process).
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..execution import autocast, naming_batch
from . import distributed
from .seeds import DROPOUT, IMAGE_ORDER, derived_seed

if TYPE_CHECKING:  # these need the packages of the `model` extra, which `smca train --help` does without
    from ..data.coco import CocoDetection
    from ..detector import SMCA
    from .settings import Settings

    Batch = tuple[list[Tensor], list[dict[str, Any]]]

LESS_MEMORY = (
    "a smaller --batch-size with a larger --accumulate, smaller --sizes and --max-size, --precision bf16 and "
    "--freeze-backbone take less"
)

# ----------------------------------------------------------------------------------------------------- images in order


def batches(
    length: int, epoch: int, first_step: int, settings: Settings, rank: int, world_size: int
) -> list[list[int]]:
    """The images of this process's batches in an epoch, from a step on.

    All processes share one order of the images; the batches of a step are neighbours in it, so that two processes
    see what one with twice the batch size sees. The last images of the order that fill no step are left out.
    """
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, IMAGE_ORDER, epoch))
    order = torch.randperm(length, generator=generator).tolist()
    size = settings.batch_size
    at_once = size * world_size
    step_images = at_once * settings.accumulate
    starts = range(first_step * step_images, length // step_images * step_images, at_once)
    return [order[start : start + size] for start in (first + rank * size for first in starts)]


def epoch_batches(dataset: CocoDetection, trainer: Trainer) -> Iterator[list[Batch]]:
    """The batches of each step that the current epoch still has, for this process."""
    from ..data.coco import load_batches

    settings = trainer.settings
    epoch, first_step = divmod(trainer.step, trainer.steps_per_epoch)
    dataset.set_epoch(epoch)
    order = batches(len(dataset), epoch, first_step, settings, distributed.rank(), distributed.world_size())
    loaded = load_batches(dataset, trainer.device, settings.workers, batch_sampler=order)
    while micro_batches := list(islice(loaded, settings.accumulate)):
        yield micro_batches


# --------------------------------------------------------------------------------------------------------------- a step


class Trainer:
    """A model in training: the state that a checkpoint holds, and the step.

    Args:
        model: what `smca_model.build` gives, on its device.
        settings: of the run.
        steps_per_epoch: optimiser steps that an epoch has.
    """

    def __init__(self, model: SMCA, settings: Settings, steps_per_epoch: int) -> None:
        from .criterion import build_criterion

        self.settings, self.steps_per_epoch = settings, steps_per_epoch
        self.model = model
        self.device = model.device
        self.criterion = build_criterion(model.config.num_classes)
        if settings.freeze_backbone:
            model.backbone.requires_grad_(False)  # so autograd keeps nothing of what it computes
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        backbone = [p for n, p in trained if n.startswith("backbone.")]
        others = [p for n, p in trained if not n.startswith("backbone.")]
        groups = [{"params": others, "lr": settings.lr}]
        if not settings.freeze_backbone:
            groups.append({"params": backbone, "lr": settings.lr_backbone})
        self.optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.ema: torch.optim.swa_utils.AveragedModel | None = None
        if settings.ema:
            average = torch.optim.swa_utils.get_ema_multi_avg_fn(settings.ema)
            self.ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)  # buffers are copied
        self.parallel: Any = model
        if distributed.world_size() > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.parallel = torch.nn.parallel.DistributedDataParallel(model, device_ids=devices)
        self.step = 0
        self.seconds = 0.0
        self.cpu_seconds = 0.0  # of this process, all its threads

    @property
    def trained_model(self) -> SMCA:
        """The model to evaluate and to use: the moving average if there is one."""
        return self.model if self.ema is None else cast("SMCA", self.ema.module)

    def close(self) -> None:
        """Let go of what reduces gradients over the processes, which must not outlive their group; no step follows."""
        self.parallel = None
        gc.collect()  # it is part of a circle of references

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on, besides the settings."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.step, self.seconds = state["step"], state["seconds"]
        self.cpu_seconds = state.get("cpu_seconds", 0.0)  # checkpoints did not always have it
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])

    def train_step(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """One step of the optimiser on this process's batches of (images, targets); returns the losses and more.

        Losses are divided by the boxes of the whole step, so that processes and accumulated batches together give
        the gradient of one large batch.

        Raises:
            TrainingError: for outputs, losses or gradients that are not finite.
            torch.OutOfMemoryError: naming the batch's size.
        """
        counts = [float(sum(len(target["labels"]) for target in targets)) for _, targets in micro_batches]
        # The criterion divides by the boxes of one batch, averaged over processes, at least 1.
        counts = [count / distributed.world_size() for count in distributed.summed(counts, self.device)]
        factor = self.settings.learning_rate_factor(self.step, self.steps_per_epoch)
        rates = (self.settings.lr, self.settings.lr_backbone)
        for group, lr in zip(self.optimizer.param_groups, rates, strict=not self.settings.freeze_backbone):
            group["lr"] = lr * factor
        torch.manual_seed(derived_seed(self.settings.seed, DROPOUT, self.step, distributed.rank()))
        self.model.train()
        if self.settings.freeze_backbone:  # norms of a module that was passed may not be frozen by themselves
            self.model.backbone.eval()
        self.optimizer.zero_grad(set_to_none=True)
        report: dict[str, float] = {}
        for i, (images, targets) in enumerate(micro_batches):
            reduced_later = self.parallel is not self.model and i + 1 < len(micro_batches)
            waiting = self.parallel.no_sync() if reduced_later else contextlib.nullcontext()
            with waiting, naming_batch(images, f"step {self.step}: ", LESS_MEMORY):
                weight = max(counts[i], 1.0) / max(sum(counts), 1.0)
                losses = self._losses(images, targets)
                total = torch.stack(list(losses.values())).sum() * weight
                values = torch.stack([loss.detach() for loss in losses.values()]).tolist()
                named = dict(zip(losses, values, strict=True))
                check_losses(named, targets, self.model.config.decoder_layers, self.step)
                self.scaler.scale(total).backward()
            for name, value in named.items():
                report[name] = report.get(name, 0.0) + value * weight
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # GradScaler leaves a step with overflown gradients out and halves its scale, which helps down to 1.
        if not self.scaler.is_enabled() or self.scaler.get_scale() < 1.0:
            ids = [target["image_id"] for _, targets in micro_batches for target in targets]
            check_gradients(self.model, float(norm), self.step, ids)
        torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.clip, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.step += 1
        dropped = sum(target["dropped_boxes"] for _, targets in micro_batches for target in targets)
        others = {"grad_norm": float(norm), "lr": self.settings.lr * factor, "dropped_boxes": dropped}
        return {"loss": sum(report.values()), **report, **others}

    def _losses(self, images: list[Tensor], targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        images = [image.to(self.device, non_blocking=True) for image in images]
        targets = [{**t, "boxes": t["boxes"].to(self.device), "labels": t["labels"].to(self.device)} for t in targets]
        with autocast(self.settings.precision, self.device):
            outputs = self.parallel(images)
        check_outputs(outputs, targets, self.step)
        losses: dict[str, Tensor] = self.criterion(outputs, targets)
        return losses


# ---------------------------------------------------------------------------------------------------------------- guard


class TrainingError(RuntimeError):
    """Training can't go on: a loss or gradient is not finite. The message says where."""


def check_outputs(outputs: dict[str, Any], targets: list[dict[str, Any]], step: int) -> None:
    """Raise TrainingError for logits or boxes that are not finite, naming decoder layer, head and images."""
    layers = [*outputs["aux_outputs"], outputs]
    names = {"pred_logits": "class head", "pred_boxes": "box head"}
    flags = torch.stack([torch.stack([layer[n].isfinite().flatten(1).all(1) for n in names]) for layer in layers])
    if flags.all():
        return
    for layer, finite in enumerate(flags):
        for head, of_images in zip(names.values(), finite.tolist(), strict=True):
            ids = [target["image_id"] for target, fine in zip(targets, of_images, strict=True) if not fine]
            if ids:
                raise TrainingError(
                    f"step {step}: the {head} of decoder layer {layer + 1} gives values that are not finite "
                    f"for image ids {ids}"
                )


def check_losses(losses: dict[str, float], targets: list[dict[str, Any]], layers: int, step: int) -> None:
    """Raise TrainingError for a loss that is not finite, naming it, its decoder layer and the images."""
    for name, value in losses.items():
        if not math.isfinite(value):
            loss, _, layer = name.removeprefix("loss_").partition("_")
            ids = [target["image_id"] for target in targets]
            raise TrainingError(
                f"step {step}: the loss {loss} of decoder layer {int(layer) + 1 if layer else layers} is {value}; "
                f"image ids {ids}"
            )


def check_gradients(model: nn.Module, norm: float, step: int, image_ids: list[Any]) -> None:
    """Raise TrainingError when the norm of the gradient is not finite, naming parameters and images."""
    if not math.isfinite(norm):
        names = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise TrainingError(f"step {step}: the norm of the gradient is {norm}, from {shown}; image ids {image_ids}")
