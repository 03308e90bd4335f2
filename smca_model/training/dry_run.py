"""`smca train --dry-run`: what a run will take in time and memory, from a few of its steps."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
from itertools import islice
from typing import TYPE_CHECKING

import torch

from ..execution import float32_products
from . import distributed
from .engine import Trainer, epoch_batches
from .setup import build_model, count_steps, open_data

if TYPE_CHECKING:  # this needs the packages of the `model` extra, which `smca train --help` does without
    from .settings import Settings

MEASURED_STEPS, WARM_UP_STEPS = 10, 3


def dry_run(settings: Settings) -> dict[str, float]:
    """Run a few steps without writing anything, and report what the whole run will take.

    Returns:
        steps; seconds_per_step and loading_seconds_per_step (medians; loading is the part of it that waited for
        data); projected_hours of all steps, without evaluations; peak_bytes of a step, and largest_peak_bytes of
        a batch of the largest images that resizing can give, with 100 boxes each, inf where the device's memory is too
        small for it (on a CPU, of the whole process; nan where the system doesn't tell, as Windows).

    Raises:
        ValueError: for settings or data that don't fit.
        TrainingError: when a loss or gradient is not finite.
        torch.OutOfMemoryError: for a step; with several processes, for a batch of the largest images too, after process
            0 has logged what is known.
    """
    with (
        distributed.process_group() as device,
        float32_products(settings.precision, deterministic=settings.deterministic),
        contextlib.ExitStack() as stack,
    ):
        train_set, _ = open_data(settings)
        steps_per_epoch = count_steps(settings, len(train_set))
        model = build_model(settings, len(train_set.classes), from_weights=False, device=device)
        trainer = Trainer(model, settings, steps_per_epoch)
        stack.callback(trainer.close)
        loading, stepping = [], []
        began = time.perf_counter()
        for micro_batches in islice(epoch_batches(train_set, trainer), WARM_UP_STEPS + MEASURED_STEPS):
            loaded = time.perf_counter()
            trainer.train_step(micro_batches)
            loading.append(loaded - began)
            stepping.append(time.perf_counter() - began)
            began = time.perf_counter()
        seconds = statistics.median(stepping[WARM_UP_STEPS:] or stepping)
        found = {
            "steps": settings.epochs * steps_per_epoch,
            "seconds_per_step": seconds,
            "loading_seconds_per_step": statistics.median(loading[WARM_UP_STEPS:] or loading),
            "projected_hours": settings.epochs * steps_per_epoch * seconds / 3600,
            "peak_bytes": _peak_bytes(device),
            "largest_peak_bytes": math.inf,
        }
        height, width = train_set.largest_size(settings.batch_size)
        boxes = torch.full((100, 4), 0.5, device=device)
        target = {"boxes": boxes, "labels": torch.zeros(100, dtype=torch.int64), "image_id": "largest"}
        target |= {"dropped_boxes": 0}
        largest = [torch.zeros(3, height, width)] * settings.batch_size, [target] * settings.batch_size
        try:
            trainer.train_step([largest] * settings.accumulate)
        except torch.OutOfMemoryError:
            if distributed.world_size() > 1:  # the others may be waiting for this one's gradients
                distributed.log(format_dry_run(found))
                raise
        else:
            found["largest_peak_bytes"] = _peak_bytes(device)
        return found


def format_dry_run(found: dict[str, float]) -> str:
    """The report of `dry_run`, in words."""
    step, loading = found["seconds_per_step"], found["loading_seconds_per_step"]
    peak, largest = (found[name] / 2**30 for name in ("peak_bytes", "largest_peak_bytes"))
    memory = f"peak memory {peak:.2f} GiB, "
    if math.isinf(largest):
        memory += "but a batch of the largest images does not fit into the device's"
    else:
        memory += f"{largest:.2f} GiB with a batch of the largest images"
    return (
        f"{step:.3f} s a step, {loading:.3f} s of them waiting for data\n"
        f"{found['steps']:.0f} steps: {found['projected_hours']:.2f} h, and the evaluations\n"
        f"{'peak memory is not known on this system' if math.isnan(peak) else memory}"
    )


def _peak_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # Unix alone has it
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
