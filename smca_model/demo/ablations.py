"""`smca demo --ablations`: Tables 2 and 3 of the paper in small, on digits (data/digits.py).

Every variant changes in `smca-tiny` or `smca-ms-tiny` what its namesake among the paper's presets changes. All see the
same scenes for as many epochs, with the same batches and learning rate, in one thread of the CPU. All variants run with
the first seed, then with the second, so that an unfinished set says something already; a set that was interrupted goes
on where it was. ablation_report.py reads what the runs leave.

Source: Gao et al., ICCV 2021, Tables 2 and 3.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smca_kernels.files import write_text
from smca_kernels.tools.demo import Steps

from ..presets import PRESETS
from . import ablation_variants
from .ablation_report import read_evaluations, read_json, read_runs, write_report

if TYPE_CHECKING:
    from ..training.settings import Settings


ABLATED = ("modulation", "scale_type", "scale_selection", "encoder", "share_self_attention", "share_ffn")
FFN_PART = 8  # the small models' FFNs are that much narrower than the paper's 2048 and 1024

SEEDS = 3
DATA: dict[str, Any] = {"train": 2000, "val": 150, "size": 64, "seed": 0}
# The learning rate does not drop: each evaluation is then that of a run which ends there, so that equal times compare
# runs that could have been planned so.
TRAINING: dict[str, Any] = {
    "epochs": 5,
    "lr_drop": 5,
    "batch_size": 8,
    "lr": 4e-4,
    "lr_backbone": 4e-5,  # a tenth, as in the paper
    "warmup_steps": 100,
    "clip": 10.0,  # as the demo's
    "flip": False,  # a mirrored digit is no digit
    "crop": False,
    "workers": 0,
    "save_minutes": 1.0,
}


@dataclass(frozen=True)
class Job:
    """One run of the set: a variant with a seed, in its own folder."""

    variant: str
    seed: int
    folder: Path

    @property
    def record(self) -> Path:
        """The file that says the run is over, and how it went."""
        return self.folder / "run.json"


def run_ablations(folder: Path, *, seed: int) -> None:
    """Train what is not trained yet; results.json, table.md and curves.png are written anew after every run.

    Args:
        folder: of the set; what an earlier call left there is gone on with.
        seed: the first of three.

    Raises:
        ValueError: for a folder with a set of other settings, or with damaged files; where there is a GPU.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after a checkpoint.
    """
    import torch

    from ..data import digits
    from .pretraining import pretrain_backbone

    if torch.cuda.is_available():
        raise ValueError("--ablations compares times of one CPU core; hide the GPU: CUDA_VISIBLE_DEVICES= smca demo …")
    check_plan(folder)
    jobs = list_jobs(folder, seed)
    waiting = [job for job in jobs if not job.record.exists()]
    read_runs(folder)  # a damaged file ends the set here, not after its work
    steps = Steps(total=len(jobs))
    steps.number = len(jobs) - len(waiting)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if not (folder / "data").exists():
            steps.log(f"{DATA['train']} + {DATA['val']} scenes: real digits, synthetic placement")
            digits.make_digits(folder / "data", **DATA)
        if not (folder / "backbone.pt").exists():
            settings = settings_of(Job(ablation_variants.VARIANTS[0].name, DATA["seed"], folder), folder)
            right = pretrain_backbone(settings, folder / "backbone.pt")
            steps.log(f"the backbone alone names {right:.0%} of the cells that digits cover in held-out scenes")
        for job in waiting:
            steps.start(f"{job.variant}, seed {job.seed}; {_time_left(jobs)}")
            train_one(job, folder)
            write_report(folder)
    finally:
        torch.set_num_threads(threads)
    write_report(folder)
    steps.log(f"{folder}: table.md, curves.png, results.json")


def list_jobs(folder: Path, seed: int) -> list[Job]:
    """The runs of a set in their order: all variants with the first seed, then with the next."""
    return [
        Job(variant.name, number, folder / "runs" / f"{variant.name}-{number}")
        for number in range(seed, seed + SEEDS)
        for variant in ablation_variants.VARIANTS
    ]


def make_plan() -> dict[str, Any]:
    """What every run of a set has in common, and each variant's model, as plan.json holds it."""
    models = {}
    for variant in ablation_variants.VARIANTS:
        preset, overrides = small_model(variant.name)
        models[variant.name] = {"preset": preset, "overrides": overrides}
    return {"data": DATA, "training": TRAINING, "variants": models}


def check_plan(folder: Path) -> None:
    """Write plan.json into a new folder, or compare the one that is there with what this version would run.

    Raises:
        ValueError: naming what differs; for a file that can't be read.
    """
    path, plan = folder / "plan.json", json.loads(json.dumps(make_plan()))
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(plan, indent=1) + "\n")
        return
    before = read_json(path)
    for part, now in plan.items():
        there = before.get(part, {})
        differing = sorted(name for name in now.keys() | there.keys() if now.get(name) != there.get(name))
        if differing:
            name = differing[0]
            raise ValueError(
                f"{folder} holds ablations with other settings, {part} {name} {there.get(name)} there, "
                f"{now.get(name)} here; choose another --out"
            )


def small_model(variant: str) -> tuple[str, tuple[str, ...]]:
    """The preset and the overrides that do in small what the paper's preset of that name does."""
    paper = PRESETS[f"{variant}-r50"]
    fields = {name: getattr(paper, name) for name in ABLATED} | {"ffn_dim": paper.ffn_dim // FFN_PART}
    preset = "smca-tiny" if len(paper.strides) == 1 else "smca-ms-tiny"
    return preset, tuple(f"{name}={json.dumps(value)}" for name, value in fields.items())


def settings_of(job: Job, folder: Path) -> Settings:
    """The run's settings of `smca train`, in the folder of its set."""
    from ..training.settings import Settings

    preset, overrides = small_model(job.variant)
    size = DATA["size"]
    return Settings(
        data=str(folder / "data"),
        out=str(job.folder),
        preset=preset,
        overrides=overrides,
        weights=str(job.folder / "start.safetensors"),
        sizes=(size,),
        max_size=2 * size,
        seed=job.seed,
        **TRAINING,
    )


def train_one(job: Job, folder: Path) -> None:
    """Train to the end, from the checkpoint if there is one, and write the run's record.

    A run whose loss is not finite is over as well: the record says so, and it would go the same way again.
    """
    import torch

    from smca_kernels.tools.env import describe, versions

    from ..training.engine import TrainingError
    from ..training.loop import train

    settings = settings_of(job, folder)
    checkpoint, start = job.folder / "checkpoint.pt", Path(settings.weights)
    if not checkpoint.exists():
        job.folder.mkdir(parents=True, exist_ok=True)
        write_start(settings, folder / "backbone.pt")
    error = ""
    try:
        train(settings, resume=checkpoint.exists())
    except TrainingError as raised:
        error = str(raised)
    record = {
        "variant": job.variant,
        "seed": job.seed,
        "error": error,
        "evaluations": read_evaluations(job.folder),
        "settings": asdict(replace(settings, data="", out="", weights="")),
        "versions": versions(),
        "cpu": describe(torch.device("cpu")),
    }
    write_text(job.record, json.dumps(record, indent=1) + "\n")
    for file in (checkpoint, start):
        file.unlink(missing_ok=True)


def write_start(settings: Settings, backbone: Path) -> None:
    """Write the run's first weights: random ones of its seed, but for the backbone."""
    import torch

    from .. import weights
    from ..training.setup import build_model, open_data

    classes = open_data(settings)[0].classes
    model = build_model(settings, len(classes), from_weights=False, device=torch.device("cpu"))
    model.backbone.load_state_dict(torch.load(backbone, weights_only=True))
    weights.save(model, settings.weights, classes)


def _time_left(jobs: list[Job]) -> str:
    """An estimate from the runs that are over, each variant's own where there is one."""
    over = [(job, read_evaluations(job.folder)) for job in jobs if job.record.exists()]
    seconds = {(job.variant, job.seed): lines[-1]["seconds"] for job, lines in over if lines}
    if not seconds:
        return "how long all will take is known after the first run"
    overall = sum(seconds.values()) / len(seconds)
    left = 0.0
    for job in jobs:
        if not job.record.exists():
            own = [took for (variant, _), took in seconds.items() if variant == job.variant]
            begun = read_evaluations(job.folder)
            left += (sum(own) / len(own) if own else overall) - (begun[-1]["seconds"] if begun else 0.0)
    return f"about {max(left, 0.0) / 60:.0f} min of training left in all"
