"""`smca bench-model`: whole detectors with naive and with fused co-attention. Parity first; then time and memory.

- step: one step of training on a batch of noise with random boxes, as `smca train` does it: forward, matching and
  losses, backward, clipping, AdamW. The learning rate is 0, so that all steps do the same work.
- image: inference of one image, boxes in pixels included.
- peak: maximum that torch's allocator held during a call, beyond the model and AdamW's state that it held before.
- largest batch: number of images of that size whose step fits in the GPU's memory. Not searched for on a CPU.
- co-attention: a step's calls of the operator, repeated on their own (smca_kernels.profile), without projections.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smca_kernels.files import write_text
from smca_kernels.tools.arguments import check_output_file, check_packages, choose_device, first_line, is_out_of_memory

if TYPE_CHECKING:
    import torch

    from smca_kernels.profiling.recorder import Profile
    from smca_model.training.engine import Batch, Trainer

NAIVE, FUSED = "naive", "fused"
BACKENDS = {NAIVE: "reference", FUSED: "auto"}
PRESETS = {
    "cpu": ("detr-tiny", "smca-tiny", "smca-ms-tiny"),
    "cuda": ("detr-r50", "smca-r50", "smca-ms-r50", "smca-dc5-r50"),
}
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BATCH_SIZE = 2  # on one GPU, as the paper trains
BOXES = 7  # in an image: COCO's mean
MAX_IMAGES = 256  # in a batch
SEED = 0


@dataclass(frozen=True)
class Repeats:
    """Number of measurements of each call, and whether the largest batch is searched for."""

    step: int
    image: int
    operator: int
    search: bool


REPEATS = {"cpu": Repeats(9, 15, 5, search=False), "cuda": Repeats(30, 50, 20, search=True)}
QUICK_REPEATS = {"cpu": Repeats(2, 3, 2, search=False), "cuda": Repeats(5, 10, 5, search=False)}


@dataclass(frozen=True)
class Time:
    """Time in milliseconds: median, 20 % and 80 % quantile of the repeats."""

    median: float
    q20: float
    q80: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float]) -> Time:
        cuts = statistics.quantiles(seconds, n=5, method="inclusive")
        return cls(1e3 * statistics.median(seconds), 1e3 * cuts[0], 1e3 * cuts[-1], len(seconds))

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.q20:.1f}–{self.q80:.1f})"


@dataclass(frozen=True)
class Row:
    """A detector with one kind of co-attention.

    Attributes:
        preset, precision, height, width: the detector and its images.
        batch: images of a training step.
        co_attention: "naive" or "fused".
        backend: the operator's backend that this chose.
        step, image: times, see the module's docstring.
        step_peak_mb, image_peak_mb: peaks of memory in MB.
        largest_batch: images, at most MAX_IMAGES; None if it was not searched for.
        operator_ms: milliseconds of a step's calls of the operator, forward and backward.
        share: that time as a share of the step.
        speedup: time of a step with naive co-attention over this one.
    """

    preset: str
    precision: str
    height: int
    width: int
    batch: int
    co_attention: str
    backend: str
    step: Time
    image: Time
    step_peak_mb: float
    image_peak_mb: float
    largest_batch: int | None
    operator_ms: float
    share: float
    speedup: float


class DetectorCase:
    """A detector in training whose co-attention can be exchanged.

    Args:
        preset, precision: as in `smca train`.
        image_size: (height, width) of all images.
        batch_size: images of a step.
        device: where it runs.
    """

    def __init__(
        self, preset: str, precision: str, image_size: tuple[int, ...], batch_size: int, device: torch.device
    ) -> None:
        import torch

        from smca_model import build
        from smca_model.training.engine import Trainer
        from smca_model.training.settings import Settings

        self.preset, self.precision, self.image_size, self.device = preset, precision, image_size, device
        torch.manual_seed(SEED)
        model = build(preset).to(device)
        settings = Settings(preset=preset, precision=precision, batch_size=batch_size, lr=0.0, lr_backbone=0.0)
        self.trainer: Trainer = Trainer(model, settings, steps_per_epoch=1)
        self.image = torch.randn(3, *image_size, device=device)
        self.batch = self.make_batch(batch_size)

    def make_batch(self, size: int) -> Batch:
        """Images of the same noise, with random boxes."""
        import torch

        def target(image_id: int) -> dict[str, Any]:
            sides = 0.05 + 0.4 * torch.rand(BOXES, 2)
            centers = sides / 2 + torch.rand(BOXES, 2) * (1 - sides)
            labels = torch.randint(self.trainer.model.config.num_classes, (BOXES,))
            boxes = torch.cat([centers, sides], 1)
            return {"boxes": boxes, "labels": labels, "image_id": image_id, "dropped_boxes": 0}

        return [self.image] * size, [target(i) for i in range(size)]

    def step(self, co_attention: str, batch: Batch | None = None) -> None:
        """Train one step."""
        self.trainer.model.backend = BACKENDS[co_attention]
        self.trainer.train_step([batch or self.batch])

    def drop_gradients(self) -> None:
        """Free the last step's gradients, which are kept until the next step."""
        self.trainer.optimizer.zero_grad(set_to_none=True)

    def infer(self, co_attention: str) -> None:
        """Detect objects in one image; the model must be in evaluation mode."""
        import torch

        from smca_model import postprocess

        model = self.trainer.model
        model.backend = BACKENDS[co_attention]
        dtype = None if self.precision == "fp32" else getattr(torch, PRECISIONS[self.precision])
        with torch.no_grad(), torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            postprocess(model([self.image]), [(self.image.shape[1], self.image.shape[2])])

    def fits(self, co_attention: str, size: int) -> bool:
        """Try whether a step with a batch of that size fits in the GPU's memory."""
        import torch

        fitted = True
        try:
            self.step(co_attention, self.make_batch(size))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fitted = False
        # Outside of the handler, whose traceback holds the step's tensors.
        self.drop_gradients()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return fitted


def largest_batch(fits: Callable[[int], bool], limit: int = MAX_IMAGES) -> int:
    """Largest size from 0 to `limit` that fits, if every smaller one does: doubling first, then halving."""
    fitting, tried = 0, 1
    while fits(tried):
        fitting = tried
        if fitting == limit:
            return limit
        tried = min(2 * tried, limit)
    while tried - fitting > 1:
        middle = (fitting + tried) // 2
        fitting, tried = (middle, tried) if fits(middle) else (fitting, middle)
    return fitting


def check_parity(profile: Profile, precision: str) -> list[str]:
    """Check the backend on inputs of the first call's shape; return a line for each tensor over its error budget."""
    import torch

    from smca_kernels.testing.cases import Case, make_inputs
    from smca_kernels.testing.check import check

    call = profile.calls()[0]
    shapes = tuple((row.height, row.width) for row in profile.rows() if row.call == 1)
    case = Case("model", shapes, call.batch, call.heads, call.queries, call.head_dim, PRECISIONS[precision])
    inputs = make_inputs(case, torch.Generator().manual_seed(SEED), call.device)
    return [str(each) for each in check(inputs, call.backend) if not each.ratio <= 1.0]


def measure(case: DetectorCase, repeats: Repeats) -> Iterator[Row | str]:
    """Measure a detector with naive and with fused co-attention.

    Yields:
        a row for each; or, if parity fails, a line for each tensor over its error budget and no row.
    """
    from smca_kernels import profile
    from smca_kernels.profiling.measure import interleaved_times, peak_bytes

    device = case.device
    profiles = {}
    for kind in BACKENDS:
        with profile(repeats.operator) as profiles[kind]:
            case.step(kind)
    failures = check_parity(profiles[FUSED], case.precision)
    yield from (f"parity failed, not measured: {line}" for line in failures)
    if failures:
        return
    log(f"{case.preset}: {repeats.step} steps of each …")
    calls = {kind: functools.partial(_ignore_repeat, functools.partial(case.step, kind)) for kind in BACKENDS}
    steps = {kind: Time.of(seconds) for kind, seconds in interleaved_times(calls, repeats.step, device).items()}
    step_peaks = {}
    for kind in BACKENDS:
        case.drop_gradients()
        step_peaks[kind] = peak_bytes(functools.partial(case.step, kind), device)
    case.drop_gradients()
    case.trainer.model.eval()
    log(f"{case.preset}: {repeats.image} images with each …")
    calls = {kind: functools.partial(_ignore_repeat, functools.partial(case.infer, kind)) for kind in BACKENDS}
    images = {kind: Time.of(seconds) for kind, seconds in interleaved_times(calls, repeats.image, device).items()}
    image_peaks = {kind: peak_bytes(functools.partial(case.infer, kind), device) for kind in BACKENDS}
    largest: dict[str, int | None] = dict.fromkeys(BACKENDS)
    if repeats.search and device.type == "cuda":
        for kind in BACKENDS:
            log(f"{case.preset}: the largest batch, {kind} …")
            largest[kind] = largest_batch(functools.partial(case.fits, kind))
    height, width = case.image_size
    for kind in BACKENDS:
        operator = sum(call.milliseconds for call in profiles[kind].calls())
        yield Row(
            preset=case.preset,
            precision=case.precision,
            height=height,
            width=width,
            batch=len(case.batch[0]),
            co_attention=kind,
            backend=profiles[kind].calls()[0].backend,
            step=steps[kind],
            image=images[kind],
            step_peak_mb=step_peaks[kind] / 1e6,
            image_peak_mb=image_peaks[kind] / 1e6,
            largest_batch=largest[kind],
            operator_ms=operator,
            share=operator / steps[kind].median,
            speedup=steps[NAIVE].median / steps[kind].median,
        )


def _ignore_repeat(call: Callable[[], None], repeat: int) -> None:
    call()


def format_rows(rows: list[Row]) -> Iterator[str]:
    """Lines of a Markdown table of rows."""
    yield (
        "| preset | co-attention | step, ms | × naive | image, ms | step's peak, MB | image's peak, MB | largest batch "
        "| co-attention, ms | of the step |"
    )
    yield f"|---|---|{'---:|' * 8}"
    for row in rows:
        largest = "not measured" if row.largest_batch is None else str(row.largest_batch)
        if row.largest_batch == MAX_IMAGES:
            largest = f"≥ {MAX_IMAGES}"
        cells = [row.preset, f"{row.co_attention} ({row.backend})", str(row.step), f"{row.speedup:.2f}", str(row.image)]
        cells += [f"{row.step_peak_mb:.0f}", f"{row.image_peak_mb:.0f}", largest]
        cells += [f"{row.operator_ms:.2f}", f"{row.share:.1%}"]
        yield f"| {' | '.join(cells)} |"


def log(line: str) -> None:
    """Print progress to stderr; stdout is for the results."""
    print(line, file=sys.stderr, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `smca bench-model`."""
    parser.description = (
        "Time of a training step and of an image, peak memory, the largest batch that fits, and the share of "
        "co-attention, with naive and with fused co-attention. Exit status 1 if parity fails."
    )
    add = parser.add_argument
    defaults = "; ".join(f"{', '.join(names)} ({device})" for device, names in PRESETS.items())
    add("presets", nargs="*", metavar="PRESET", help=f"as `smca presets` lists them; default: {defaults}")
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the images; default: as `smca presets`")
    add("--batch-size", type=int, default=BATCH_SIZE, metavar="N", help="images of a step; default: %(default)s")
    add("--precision", choices=PRECISIONS, help="as `smca train`; default: bf16 on a GPU, fp32 on a CPU")
    add("--quick", action="store_true", help="fewer repeats, no search for the largest batch: a rough look")
    add("--json", type=Path, metavar="FILE", help="write environment and rows as JSON")


def run(args: argparse.Namespace) -> int:
    """Run `smca bench-model`: exit status 1 if parity fails or a measurement does, else 0."""
    check_packages(["scipy", "torchvision"], "model")
    from smca_model.presets import IMAGE_SIZE, TINY_IMAGE_SIZE
    from smca_model.presets import PRESETS as KNOWN

    from .bench_attention import environment

    unknown = [name for name in args.presets if name not in KNOWN]
    if unknown:
        raise ValueError(f"PRESET must be among {', '.join(KNOWN)}, got {', '.join(unknown)}")
    if args.batch_size < 1 or (args.size and min(args.size) < 1):
        raise ValueError(f"--batch-size and --size must be at least 1, got {args.batch_size} and {args.size}")
    check_output_file("--json", args.json)
    device = choose_device()
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    repeats = (QUICK_REPEATS if args.quick else REPEATS)[device.type]
    facts = environment(device)
    rows: list[Row] = []
    failures: dict[str, list[str]] = {}
    for preset in args.presets or PRESETS[device.type]:
        size = args.size or (TINY_IMAGE_SIZE if KNOWN[preset].backbone == "tiny" else IMAGE_SIZE)
        log(f"{preset}: {size[0]}×{size[1]}, batch {args.batch_size}, {precision} on {device} …")
        try:
            results = list(measure(DetectorCase(preset, precision, tuple(size), args.batch_size, device), repeats))
        except Exception as error:  # out of memory, say; the others may well work
            log(traceback.format_exc())
            results = [f"not measured: {first_line(error)}"]
        gc.collect()
        rows += [result for result in results if isinstance(result, Row)]
        lines = [result for result in results if isinstance(result, str)]
        if lines:
            failures[preset] = lines
        if args.json is not None:
            report = {"environment": facts, "rows": [dataclasses.asdict(row) for row in rows], "failures": failures}
            write_text(args.json, json.dumps(report, indent=1) + "\n")
    print("\n".join(format_rows(rows)))
    size_of_all = f"{args.batch_size} images a step; {precision} on {facts.get('name', device)}"
    print(f"\n{size_of_all}; medians with 20 % and 80 % quantiles; MB beyond model and optimiser.")
    if not any(row.largest_batch for row in rows):
        print("The largest batch was not measured: " + ("--quick." if device.type == "cuda" else "there is no GPU."))
    for preset, lines in failures.items():
        print("\n".join(f"{preset}: {line}" for line in lines))
    return 1 if failures else 0
