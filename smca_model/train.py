"""`smca train`: AdamW on the weighted losses of every decoder layer, learning rate ÷ 10 once, as the paper trains.

A run is a folder: checkpoint.pt (where it stands), model.safetensors (the weights to use, those of the moving average
if there is one), metrics.jsonl and tensorboard/. A run that is stopped anywhere and resumed gives the same weights;
engine.py tells why.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Subset

from . import build, checkpoint, distributed
from .engine import WEIGHTS, Trainer, TrainingError, derived_seed, epoch_batches
from .metrics import Metrics, read_metrics
from .signals import Stopped, StopSignals

if TYPE_CHECKING:  # these need the packages of the `model` extra, which `smca train --help` does without
    from .data import CocoDetection
    from .detector import SMCA

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
DROP = 10.0  # the paper divides the learning rate by this, once
DRY_STEPS, DRY_WARM_UP = 10, 3
# What may differ from the run that is resumed.
FREE = {"data", "out", "epochs", "lr_drop", "workers", "eval_every", "save_minutes", "log_every", "backend"}


# ------------------------------------------------------------------------------------------------------------- settings


def option(default: Any, help: str, **argument: Any) -> Any:
    """A field of `Settings` with its default and its text in `smca train --help`."""
    return field(default=default, metadata={"help": help, **argument})


@dataclass(frozen=True)
class Settings:
    """What a run is; every field is an option of `smca train`. Defaults are those of the paper's 50-epoch schedule.

    Raises:
        ValueError: for a value out of range.
    """

    data: str = option("", "folder with train and val images and annotations, digits' or COCO's layout", metavar="DIR")
    out: str = option("", "folder of the run", metavar="DIR")
    preset: str = option("smca-r50", "which model; `smca presets` lists them", metavar="NAME")
    overrides: tuple[str, ...] = option((), "changes to the preset, such as dropout=0.0", metavar="NAME=VALUE")
    pretrained_backbone: bool | None = option(None, "ImageNet weights; default: unless the backbone is tiny")
    detr_weights: str = option("", "start from a facebookresearch DETR checkpoint", metavar="FILE")
    sizes: tuple[int, ...] = option(
        (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
        "short sides that images are resized to, in pixels; the largest for evaluation",
        type=int,
    )
    max_size: int = option(1333, "most pixels of the longest side")
    flip: bool = option(True, "mirror half of the training images")
    crop: bool = option(True, "crop half of the training images")
    epochs: int = option(50, "passes over the training images")
    lr_drop: int = option(40, "epoch from which the learning rate is a tenth")
    lr: float = option(1e-4, "learning rate")
    lr_backbone: float = option(1e-5, "learning rate of the backbone")
    warmup_steps: int = option(0, "steps over which the learning rate rises from 0")
    weight_decay: float = option(1e-4, "weight decay of AdamW")
    clip: float = option(0.1, "largest norm of the gradient")
    batch_size: int = option(2, "images at once on one device")
    accumulate: int = option(1, "batches whose gradients make one step")
    precision: str = option("fp32", "arithmetic", choices=PRECISIONS)
    ema: float = option(0.0, "decay of a moving average of the weights, such as 0.9997; 0: none")
    backend: str = option("auto", "of the co-attention", choices=("auto", "triton", "sdpa", "reference"))
    workers: int = option(4, "processes that load images, for each device; 0: none")
    seed: int = option(0, "of everything random")
    deterministic: bool = option(False, "deterministic algorithms only; slower on a GPU")
    eval_every: int = option(1, "epochs between evaluations; 0: after the last only")
    save_minutes: float = option(30.0, "minutes between checkpoints inside an epoch")
    log_every: int = option(50, "steps between lines of metrics")

    def __post_init__(self) -> None:
        at_least = {"epochs": 1, "lr_drop": 0, "batch_size": 1, "accumulate": 1, "workers": 0, "log_every": 1}
        at_least |= {"eval_every": 0, "warmup_steps": 0, "seed": 0}
        at_least |= {"lr": 0, "lr_backbone": 0, "weight_decay": 0, "save_minutes": 0}
        for name, least in at_least.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.clip > 0:
            raise ValueError(f"clip must be positive, got {self.clip}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {self.precision!r}")
        self.model_overrides()

    def model_overrides(self) -> dict[str, Any]:
        """`overrides` by name, each value read as JSON where it is JSON, else as a string."""
        found: dict[str, Any] = {}
        for item in self.overrides:
            name, equals, value = item.partition("=")
            if not (name and equals):
                raise ValueError(f"overrides must be of the form NAME=VALUE, got {item!r}")
            try:
                found[name] = json.loads(value)
            except json.JSONDecodeError:
                found[name] = value
        return found

    def learning_rate_factor(self, step: int, steps_per_epoch: int) -> float:
        """What the learning rates are multiplied with at a step (counted from 0): warm-up, then ÷ 10 at lr_drop."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warm / DROP if step >= self.lr_drop * steps_per_epoch else warm


# ----------------------------------------------------------------------------------------------------- data and model


def open_data(settings: Settings) -> tuple[CocoDetection, CocoDetection]:
    """The training and the validation images, with one list of classes."""
    from . import data

    folder = Path(settings.data)
    sizes: dict[str, Any] = {"sizes": settings.sizes, "max_size": settings.max_size}
    train_split, val_split = (data.find_split(folder, split) for split in ("train", "val"))
    train_set = data.CocoDetection(
        *train_split, train=True, flip=settings.flip, crop=settings.crop, seed=settings.seed, **sizes
    )
    return train_set, data.CocoDetection(*val_split, train=False, classes=train_set.classes, **sizes)


def build_model(settings: Settings, num_classes: int, *, from_weights: bool, device: torch.device) -> SMCA:
    """The preset's model on its device, the same in every process; `from_weights` fetches those it starts from."""
    from . import weights

    torch.manual_seed(derived_seed(settings.seed, WEIGHTS))
    overrides = settings.model_overrides()
    model = build(settings.preset, num_classes, backend=settings.backend, **overrides)
    wanted = settings.pretrained_backbone
    if from_weights and (model.config.backbone != "tiny" if wanted is None else wanted):
        # Process 0 fetches the file, the others find it in the cache.
        for turn in (True, False):
            if turn == (distributed.rank() == 0):
                torch.manual_seed(derived_seed(settings.seed, WEIGHTS))
                model = build(
                    settings.preset, num_classes, backend=settings.backend, pretrained_backbone=True, **overrides
                )
            distributed.barrier()
    model.image_size = (max(settings.sizes), settings.max_size)
    if from_weights and settings.detr_weights:
        tell(str(weights.load_detr(model, settings.detr_weights)))
    return model.to(device)


def tell(line: str) -> None:
    """Say something once, above the progress bar."""
    if distributed.rank() == 0:
        from tqdm import tqdm

        tqdm.write(line)


# ------------------------------------------------------------------------------------------------------------- training


def train(settings: Settings, *, resume: bool = False) -> list[dict[str, Any]]:
    """Train to the last epoch, evaluating on the way; in every process of torchrun, or in one without it.

    Args:
        settings: of the run; with `resume`, they may differ from the checkpoint's in what `FREE` names.
        resume: go on from the checkpoint in `settings.out`.

    Returns:
        The run's evaluations, as `read_metrics` has them; nothing in processes other than 0.

    Raises:
        ValueError: for settings, data or a checkpoint that don't fit; before any work.
        TrainingError: when a loss or gradient is not finite.
        Stopped: on SIGINT or SIGTERM, after the checkpoint is written; on a second one at once.
    """
    if not settings.out:
        raise ValueError("out must be a folder for the run, got ''")
    out = Path(settings.out)
    with distributed.process_group() as device, StopSignals() as stop, _arithmetic(settings, device):
        train_set, val_set = open_data(settings)
        steps_per_epoch = _steps_per_epoch(settings, len(train_set))
        state = checkpoint.load(out / "checkpoint.pt") if resume else None
        if state is None and (out / "checkpoint.pt").exists():
            raise ValueError(f"out must be a folder without a run, but {out} holds one; go on with --resume {out}")
        facts = {"classes": list(train_set.classes), "images": len(train_set), "step_images": _step_images(settings)}
        if state is not None:
            _check_continues(state, settings, facts)
        model = build_model(settings, len(train_set.classes), from_weights=state is None, device=device)
        trainer = Trainer(model, settings, steps_per_epoch)
        if state is not None:
            trainer.load_state(state)
        metrics = None
        if distributed.rank() == 0:
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"out must be a folder that can be made, got {out} ({error.strerror})") from None
            metrics = Metrics(out, trainer.step)
            parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
            tell(
                f"{settings.preset}, {parameters / 1e6:.1f} M trained parameters, on {distributed.world_size()} × "
                f"{device.type}; {len(train_set)} images, {len(train_set.classes)} classes, {steps_per_epoch} steps "
                "an epoch"
            )
            if train_set.degenerate_boxes:
                tell(f"{train_set.degenerate_boxes} boxes have no width or height and are left out")

        def save() -> None:
            if metrics is not None:
                checkpoint.save(
                    out / "checkpoint.pt", {"settings": asdict(settings), "facts": facts, **trainer.state()}
                )

        _train_epochs(trainer, train_set, val_set, metrics, save, stop)
        return [line for line in read_metrics(out) if "AP" in line] if metrics is not None else []


def _train_epochs(
    trainer: Trainer,
    train_set: CocoDetection,
    val_set: CocoDetection,
    metrics: Metrics | None,
    save: Callable[[], None],
    stop: StopSignals,
) -> None:
    from tqdm import tqdm

    settings, per_epoch = trainer.settings, trainer.steps_per_epoch
    steps = settings.epochs * per_epoch
    bar = tqdm(
        total=steps, initial=trainer.step, desc=settings.preset, unit="step", smoothing=0, disable=metrics is None
    )
    with bar:
        if trainer.step and trainer.step % per_epoch == 0:  # stopped before or in an evaluation
            _evaluate_if_due(trainer, val_set, metrics, stop)
        saved = time.monotonic()
        while trainer.step < steps:
            window: list[dict[str, float]] = []
            began = time.perf_counter()
            for micro_batches in epoch_batches(train_set, trainer):
                window.append(trainer.train_step(micro_batches))
                began, took = time.perf_counter(), time.perf_counter() - began
                trainer.seconds += took
                window[-1]["seconds_per_step"] = took
                bar.update()
                if trainer.step % settings.log_every == 0 or trainer.step % per_epoch == 0:
                    line = _averaged(window, trainer.device)
                    window = []
                    bar.set_postfix(epoch=(trainer.step - 1) // per_epoch + 1, loss=f"{line['loss']:.3f}")
                    if metrics is not None:
                        metrics.write("train", {"step": trainer.step, "seconds": trainer.seconds, **line})
                stopped = int(distributed.largest(stop.number, trainer.device))
                late = time.monotonic() - saved > 60 * settings.save_minutes
                if stopped or late or trainer.step % per_epoch == 0:
                    save()
                    saved = time.monotonic()
                if stopped:
                    raise Stopped(stopped)
            _evaluate_if_due(trainer, val_set, metrics, stop)


def _averaged(window: list[dict[str, float]], device: torch.device) -> dict[str, float]:
    """Means over steps and processes."""
    sums = [sum(step[name] for step in window) for name in window[0]]
    count = len(window) * distributed.world_size()
    return {n: total / count for n, total in zip(window[0], distributed.summed(sums, device), strict=True)}


def _evaluate_if_due(trainer: Trainer, val_set: CocoDetection, metrics: Metrics | None, stop: StopSignals) -> None:
    """After every eval_every-th epoch and the last: the weights, and AP from each process's part of the images."""
    from . import weights
    from .evaluate import average_precision, detect_all

    settings, model = trainer.settings, trainer.trained_model
    epoch = trainer.step // trainer.steps_per_epoch
    if epoch < settings.epochs and (settings.eval_every == 0 or epoch % settings.eval_every):
        return
    if metrics is not None:
        weights.save(model, Path(settings.out) / "model.safetensors", val_set.classes)
    mine: Any = Subset(val_set, range(distributed.rank(), len(val_set), distributed.world_size()))
    mine.classes, mine.category_ids = val_set.classes, val_set.category_ids
    with stop.stopping_at_once():
        detections, _ = detect_all(
            model,
            mine,
            batch_size=settings.batch_size,
            device=trainer.device,
            workers=settings.workers,
            progress=metrics is not None,
        )
        detections = distributed.joined(detections)
        if metrics is not None:
            numbers, _ = average_precision(val_set.coco, detections)
            metrics.write("val", {"step": trainer.step, "seconds": trainer.seconds, "epoch": epoch, **numbers})
            tell(f"epoch {epoch}: AP {numbers['AP']:.3f}, AP50 {numbers['AP50']:.3f}")


def _step_images(settings: Settings) -> int:
    return settings.batch_size * settings.accumulate * distributed.world_size()


def _steps_per_epoch(settings: Settings, images: int) -> int:
    steps = images // _step_images(settings)
    if not steps:
        raise ValueError(
            f"batch_size must leave a step of at most the {images} training images, got a step of "
            f"{_step_images(settings)}: batch_size {settings.batch_size} × accumulate {settings.accumulate} × "
            f"{distributed.world_size()} processes"
        )
    return steps


def _check_continues(state: dict[str, Any], settings: Settings, facts: dict[str, Any]) -> None:
    """Raise ValueError where the run that a checkpoint is of could not go on as it began."""
    before, now = {**state["settings"], **state["facts"]}, {**asdict(settings), **facts}
    changed = [n for n in now if n not in FREE and now[n] != before[n]]
    if changed:
        differences = "; ".join(f"{n} {before[n]} there, {now[n]} here" for n in changed)
        raise ValueError(f"a resumed run must have what its checkpoint was made with, got {differences}")


@contextlib.contextmanager
def _arithmetic(settings: Settings, device: torch.device) -> Iterator[None]:
    """TF32 and deterministic algorithms as the settings say, and as they were afterwards."""
    precision, deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    if settings.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic)


# -------------------------------------------------------------------------------------------------------------- dry run


def dry_run(settings: Settings) -> dict[str, float]:
    """A few steps without writing anything: what the whole run will take.

    Returns:
        steps; seconds_per_step and loading_seconds_per_step (medians; loading is the part of it that waited for
        data); projected_hours of all steps, without evaluations; peak_bytes of a step, and largest_peak_bytes of
        a batch of the largest images that resizing can give, with 100 boxes each (on a CPU, of the whole process).
    """
    with distributed.process_group() as device, _arithmetic(settings, device):
        train_set, _ = open_data(settings)
        steps_per_epoch = _steps_per_epoch(settings, len(train_set))
        model = build_model(settings, len(train_set.classes), from_weights=False, device=device)
        trainer = Trainer(model, settings, steps_per_epoch)
        loading, stepping = [], []
        began = time.perf_counter()
        for micro_batches in islice(epoch_batches(train_set, trainer), DRY_WARM_UP + DRY_STEPS):
            loaded = time.perf_counter()
            trainer.train_step(micro_batches)
            loading.append(loaded - began)
            stepping.append(time.perf_counter() - began)
            began = time.perf_counter()
        peak = _peak_bytes(device)
        height, width = largest_size(train_set)
        boxes = torch.full((100, 4), 0.5, device=device)
        target = {"boxes": boxes, "labels": torch.zeros(100, dtype=torch.int64), "image_id": "largest"}
        target |= {"dropped_boxes": 0}
        largest = [torch.zeros(3, height, width)] * settings.batch_size, [target] * settings.batch_size
        trainer.train_step([largest] * settings.accumulate)
        seconds = statistics.median(stepping[DRY_WARM_UP:] or stepping)
        return {
            "steps": settings.epochs * steps_per_epoch,
            "seconds_per_step": seconds,
            "loading_seconds_per_step": statistics.median(loading[DRY_WARM_UP:] or loading),
            "projected_hours": settings.epochs * steps_per_epoch * seconds / 3600,
            "peak_bytes": peak,
            "largest_peak_bytes": _peak_bytes(device),
        }


def largest_size(dataset: CocoDetection) -> tuple[int, int]:
    """(height, width) of the largest batch after resizing, which may hold the highest and the widest image."""
    short = max(dataset.sizes)
    scales = [min(short / min(size), dataset.max_size / max(size)) for size in dataset.orig_sizes]
    height, width = (
        max(round(size[axis] * scale) for size, scale in zip(dataset.orig_sizes, scales, strict=True))
        for axis in (0, 1)
    )
    return height, width


def format_dry_run(told: dict[str, float]) -> str:
    """What `dry_run` returned, in words."""
    gib = 2**30
    return (
        f"{told['seconds_per_step']:.3f} s a step, {told['loading_seconds_per_step']:.3f} s of them waiting for data\n"
        f"{told['steps']:.0f} steps: {told['projected_hours']:.2f} h, and the evaluations\n"
        f"peak memory {told['peak_bytes'] / gib:.2f} GiB, {told['largest_peak_bytes'] / gib:.2f} GiB with a batch of "
        "the largest images"
    )


def _peak_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --------------------------------------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `smca train`: `Settings`, and what to do with them."""
    parser.description = (
        "Train a detector. One device: smca train …; eight: torchrun --nproc-per-node 8 -m smca_model.train … "
        "(batch-size is that of one device). SIGINT and SIGTERM save and stop; --resume goes on."
    )
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in this folder, with its settings")
    parser.add_argument("--dry-run", action="store_true", help="report time and memory of a step, write nothing")
    for item in fields(Settings):
        argument: dict[str, Any] = dict(item.metadata)
        default = item.default
        if item.name == "pretrained_backbone" or isinstance(default, bool):
            argument["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, tuple):
            argument |= {"nargs": "+", "type": item.metadata.get("type", str)}
        else:
            argument["type"] = type(default)
        if default not in ("", (), None) and not isinstance(default, bool):
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            argument["help"] += f"; default: {shown}"
        parser.add_argument(f"--{item.name.replace('_', '-')}", default=argparse.SUPPRESS, **argument)


def run(args: argparse.Namespace) -> int:
    """`smca train`: exit status 0; 1 for a loss that is not finite; 2 if it can't start; 128 + a signal's number."""
    wanted = ("pycocotools", "safetensors", "scipy", "tensorboard", "torchvision", "tqdm")
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        print(f"smca train needs {', '.join(missing)}: pip install 'smca_kernels[model]'", file=sys.stderr)
        return 2
    given = {item.name: getattr(args, item.name) for item in fields(Settings) if hasattr(args, item.name)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if args.resume:
        if "out" in given:
            raise ValueError("--out can't be given with --resume: a run goes on in its own folder")
        saved = checkpoint.load(Path(args.resume) / "checkpoint.pt")["settings"]
        settings = Settings(**{**saved, **given, "out": args.resume})
    else:
        absent = [name for name in ("data", *(() if args.dry_run else ("out",))) if not given.get(name)]
        if absent:
            raise ValueError(f"{' and '.join(f'--{name}' for name in absent)} must be given")
        settings = Settings(**given)
    if args.dry_run:
        told = dry_run(settings)
        if distributed.rank() == 0:
            print(format_dry_run(told))
        return 0
    try:
        train(settings, resume=bool(args.resume))
    except TrainingError as error:
        print(f"smca train: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        if distributed.rank() == 0:  # the others can't know whether the checkpoint is there yet
            saved = (Path(settings.out) / "checkpoint.pt").exists()
            advice = f"go on with  smca train --resume {settings.out}" if saved else "before the first checkpoint"
            print(f"stopped by {stopped}; {advice}", file=sys.stderr)
        return stopped.status
    tell(f"the weights are in {Path(settings.out) / 'model.safetensors'}")
    return 0


if __name__ == "__main__":  # as torchrun starts it
    from smca_kernels.tools.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
