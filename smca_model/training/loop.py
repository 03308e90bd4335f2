"""A training run: AdamW on the weighted losses of every decoder layer, learning rate ÷ 10 once, as the paper trains.

A run is a folder: checkpoint.pt (where it stands), model.safetensors (the weights to use, those of the moving average
if there is one), best.safetensors (those of the best AP), metrics.jsonl, and what loggers write. A run that is stopped
anywhere and resumed gives the same weights; engine.py says why.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Subset

from smca_kernels.tools.arguments import first_line

from ..execution import float32_products
from . import checkpoint, distributed
from .best import Best
from .distributed import log
from .engine import Trainer, epoch_batches
from .loggers import Logger, Loggers, open_loggers
from .metrics import Metrics, read_metrics
from .setup import MODEL_FILE, build_model, check_start, count_steps, images_per_step, open_data
from .signals import Stopped, StopSignals

if TYPE_CHECKING:  # this needs the packages of the `model` extra, which `smca train --help` does without
    from ..data.coco import CocoDetection
    from .settings import Settings

# Settings that may differ from those of the run that is resumed; the others decide about its numbers.
CHANGEABLE = {"data", "out", "epochs", "lr_drop", "workers", "eval_every", "save_minutes", "log_every", "backend"}
CHANGEABLE |= {"patience", "loggers"}


def train(
    settings: Settings, *, resume: bool = False, loggers: Mapping[str, Logger] | None = None
) -> list[dict[str, Any]]:
    """Train to the last epoch, evaluating on the way; in every process of torchrun, or in one without it.

    Args:
        settings: of the run; with `resume`, they may differ from the checkpoint's in what `CHANGEABLE` names.
        resume: go on from the checkpoint in `settings.out`; a run that ended early stays as it is, unless `patience`
            is now larger, or 0.
        loggers: objects of your own, by name, that take the numbers beside those that `settings.loggers` names; they
            are closed at the end.

    Returns:
        The run's evaluations, as `read_metrics` has them; nothing in processes other than 0.

    Raises:
        ValueError: for settings, data or a checkpoint that don't fit; before any work.
        TrainingError: when a loss or gradient is not finite.
        Stopped: on SIGINT or SIGTERM, after the checkpoint is written; before the first step, in an evaluation, and on
            a second one at once.
    """
    if not settings.out:
        raise ValueError("out must be a folder for the run, got ''")
    out = Path(settings.out)
    with (
        distributed.process_group() as device,
        StopSignals() as stop,
        float32_products(settings.precision, deterministic=settings.deterministic),
        contextlib.ExitStack() as stack,
        contextlib.ExitStack() as starting,
    ):
        starting.enter_context(stop.stopping_at_once())
        if not resume:
            check_start(settings)
        train_set, val_set = open_data(settings)
        steps_per_epoch = count_steps(settings, len(train_set))
        state = checkpoint.load(out / "checkpoint.pt") if resume else None
        if state is None and (out / "checkpoint.pt").exists():
            raise ValueError(f"out must be a folder without a run, but {out} holds one; go on with --resume {out}")
        facts = {"classes": list(train_set.classes), "images": len(train_set), "step_images": images_per_step(settings)}
        if state is not None:
            read_metrics(out)  # a damaged file ends the run here, not after its work
            _check_continues(state, settings, facts, steps_per_epoch, out / "checkpoint.pt")
            ended = state.get("ended")
            if ended and 0 < settings.patience <= ended["waited"]:
                log(f"the run in {out} has ended: {_told(ended)}; a larger --patience goes on with it")
                return _evaluations(out)
        model = build_model(
            settings,
            len(train_set.classes),
            from_weights=state is None,
            device=device,
            classes=train_set.classes,
        )
        trainer = Trainer(model, settings, steps_per_epoch)
        stack.callback(trainer.close)
        if state is not None:
            try:
                trainer.load_state(state)
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
                raise ValueError(f"{out / 'checkpoint.pt'} does not fit the run that it is of ({reason})") from error
        metrics = best = None
        if distributed.rank() == 0:
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"out must be a folder that can be made, got {out} ({error.strerror})") from None
            opened = open_loggers(settings.loggers, out, asdict(settings), trainer.step)
            metrics = Metrics(out, trainer.step, stack.enter_context(Loggers({**opened, **(loggers or {})})))
            best = Best(out, _evaluations(out), resume)
            if not resume:
                (out / MODEL_FILE).unlink(missing_ok=True)
            parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
            log(
                f"{settings.preset}, {parameters / 1e6:.1f} M trained parameters, on {distributed.world_size()} × "
                f"{device.type}; {len(train_set)} images, {len(train_set.classes)} classes, {steps_per_epoch} steps "
                "an epoch"
            )
            places = [f"{name} ({logger.place})" for name, logger in opened.items()]
            log(f"numbers go to {', '.join([str(metrics.path), *places])}")
            if train_set.degenerate_boxes:
                log(f"{train_set.degenerate_boxes} boxes have no width or height and are left out")

        def save(**ended: Any) -> None:
            if metrics is not None:
                state = {"settings": asdict(settings), "facts": facts, **trainer.state(), **ended}
                checkpoint.save(out / "checkpoint.pt", state)

        starting.close()
        _train_epochs(trainer, train_set, val_set, metrics, best, save, stop)
        return _evaluations(out) if metrics is not None else []


def _evaluations(out: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(out) if "AP" in line]


def _told(ended: dict[str, Any]) -> str:
    return (
        f"after epoch {ended['at']}, no better AP than {ended['AP']:.3f} of epoch {ended['epoch']} in "
        f"{ended['waited']} evaluations"
    )


def _train_epochs(
    trainer: Trainer,
    train_set: CocoDetection,
    val_set: CocoDetection,
    metrics: Metrics | None,
    best: Best | None,
    save: Callable[..., None],
    stop: StopSignals,
) -> None:
    from tqdm import tqdm

    settings, per_epoch = trainer.settings, trainer.steps_per_epoch
    steps = settings.epochs * per_epoch
    bar = tqdm(
        total=steps, initial=trainer.step, desc=settings.preset, unit="step", smoothing=0, disable=metrics is None
    )
    with bar:
        stopped_before = trainer.step and trainer.step % per_epoch == 0  # before an evaluation, or in it
        if stopped_before and _evaluate_if_due(trainer, val_set, metrics, best, save, stop):
            return
        saved = time.monotonic()
        while trainer.step < steps:
            window: list[dict[str, float]] = []
            began, cpu_began = time.perf_counter(), time.process_time()
            for micro_batches in epoch_batches(train_set, trainer):
                window.append(trainer.train_step(micro_batches))
                began, took = time.perf_counter(), time.perf_counter() - began
                trainer.seconds += took
                cpu_began, cpu_took = time.process_time(), time.process_time() - cpu_began
                trainer.cpu_seconds += cpu_took
                window[-1]["seconds_per_step"] = took
                bar.update()
                if trainer.step % settings.log_every == 0 or trainer.step % per_epoch == 0:
                    line = _averaged(window, trainer.device)
                    window = []
                    bar.set_postfix(epoch=(trainer.step - 1) // per_epoch + 1, loss=f"{line['loss']:.3f}")
                    if metrics is not None:
                        metrics.write("train", {"step": trainer.step, **_times(trainer), **line})
                stopped = int(distributed.largest(stop.number, trainer.device))
                late = time.monotonic() - saved > 60 * settings.save_minutes
                if stopped or late or trainer.step % per_epoch == 0:
                    save()
                    saved = time.monotonic()
                if stopped:
                    raise Stopped(stopped)
            if _evaluate_if_due(trainer, val_set, metrics, best, save, stop):
                return


def _times(trainer: Trainer) -> dict[str, float]:
    return {"seconds": trainer.seconds, "cpu_seconds": trainer.cpu_seconds}


def _averaged(window: list[dict[str, float]], device: torch.device) -> dict[str, float]:
    """Means over steps and processes."""
    sums = [sum(step[name] for step in window) for name in window[0]]
    count = len(window) * distributed.world_size()
    return {n: total / count for n, total in zip(window[0], distributed.summed(sums, device), strict=True)}


def _evaluate_if_due(
    trainer: Trainer,
    val_set: CocoDetection,
    metrics: Metrics | None,
    best: Best | None,
    save: Callable[..., None],
    stop: StopSignals,
) -> bool:
    """Write weights and AP after each eval_every-th epoch and the last; each process detects in part of the images.

    Returns:
        Whether the run ends early, in all processes alike.
    """
    from .. import weights
    from ..coco_results import measure
    from ..evaluate import detect_all

    settings, model = trainer.settings, trainer.trained_model
    epoch = trainer.step // trainer.steps_per_epoch
    if epoch < settings.epochs and (settings.eval_every == 0 or epoch % settings.eval_every):
        return False
    if metrics is not None:
        weights.save(model, Path(settings.out) / MODEL_FILE, val_set.classes)
    mine: Any = Subset(val_set, range(distributed.rank(), len(val_set), distributed.world_size()))
    mine.classes, mine.category_ids = val_set.classes, val_set.category_ids
    waited = 0
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
        if metrics is not None and best is not None:
            numbers = measure(val_set.coco, detections).numbers
            best.update(model, val_set.classes, {"step": trainer.step, "epoch": epoch, "AP": numbers["AP"]})
            waited = best.waited
            metrics.write("val", {"step": trainer.step, **_times(trainer), "epoch": epoch, **numbers})
            told = "the best so far" if not waited else f"the best is {best.evaluation['AP']:.3f} of epoch "
            told += f"{best.evaluation['epoch']}" if waited else ""
            log(f"epoch {epoch}: AP {numbers['AP']:.3f}, AP50 {numbers['AP50']:.3f}; {told}")
    ends = 0 < settings.patience <= distributed.largest(waited, trainer.device) and epoch < settings.epochs
    if ends and best is not None:
        ended: dict[str, Any] = {**best.evaluation, "waited": waited, "at": epoch}
        save(ended=ended)
        log(f"the run ends {_told(ended)}")
    return ends


def _check_continues(
    state: dict[str, Any], settings: Settings, facts: dict[str, Any], steps_per_epoch: int, path: Path
) -> None:
    """Raise ValueError where the run that a checkpoint is of could not go on as it began, or is damaged."""
    checkpoint.check(state, path)
    # A setting that came after the run began has its default there.
    before = {**{each.name: each.default for each in fields(settings)}, **state["settings"], **state["facts"]}
    now = {**asdict(settings), **facts}
    missing = [name for name in now if name not in before]
    if missing:
        raise ValueError(f"{path} is a damaged checkpoint: it lacks {', '.join(missing)}")
    changed = [n for n in now if n not in CHANGEABLE and now[n] != before[n]]
    if changed:
        differences = "; ".join(f"{n} {before[n]} there, {now[n]} here" for n in changed)
        raise ValueError(f"a resumed run must have what its checkpoint was made with, got {differences}")
    done = state["step"] / steps_per_epoch
    if settings.epochs < done:
        raise ValueError(f"epochs must be at least the {done:.4g} that {path} has done, got {settings.epochs}")
