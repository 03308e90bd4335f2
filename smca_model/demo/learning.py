"""The detector's part of `smca demo`: a small one is trained on digits before your eyes.

Real digits, synthetic placement (data/digits.py): scenes are made, `smca-tiny` learns them, AP is computed on held-out
scenes, and detections and attention are drawn. With --compare, `detr-tiny`, the same without the spatial prior,
trains beside it for as long.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smca_kernels.files import replacing, write_text
from smca_kernels.profiling.measure import interleaved_times
from smca_kernels.tools.demo import Steps

if TYPE_CHECKING:
    from ..training.settings import Settings

SIZE = 96
TRAIN_SCENES, VAL_SCENES = 4000, 300
SHOWN, SHOWN_IN_A_ROW = 12, 4
WITH_ATTENTION = 2
SCORE = 0.3  # focal losses leave scores lower than a softmax would
# Chosen on a CPU, for about five minutes on two cores. A GPU gets larger steps: its time hardly grows with them.
# Learning sets in after two or three epochs, sooner or later from seed to seed.
TRAINING: dict[str, dict[str, Any]] = {
    "cpu": {"batch_size": 16, "epochs": 6, "lr_drop": 5, "lr": 3e-4, "warmup_steps": 100},
    "cuda": {"batch_size": 32, "epochs": 10, "lr_drop": 8, "lr": 4e-4, "warmup_steps": 100},
}


def settings_for(preset: str, data: Path, out: Path, device: str, seed: int, epochs: int | None = None) -> Settings:
    """The demo's training of a preset; other numbers of epochs drop the learning rate at the same part of them."""
    from ..training.settings import Settings

    chosen = dict(TRAINING[device])
    chosen["lr_backbone"] = chosen["lr"]  # it is not pretrained
    if epochs is not None:
        chosen |= {"lr_drop": round(epochs * chosen["lr_drop"] / chosen["epochs"]), "epochs": epochs}
    return Settings(
        data=str(data),
        out=str(out),
        preset=preset,
        sizes=(SIZE,),
        max_size=2 * SIZE,
        flip=False,  # a mirrored digit is no digit
        crop=False,
        workers=0,  # scenes this small load faster than they travel between processes
        seed=seed,
        clip=10.0,  # norms are 30 to 100 from scratch; with the paper's 0.1, AP50 differed more from seed to seed
        log_every=25,
        **chosen,
    )


def use_fastest_threads(settings: Settings) -> str:
    """Set torch's threads to the number, all or a half, a quarter … of them, that trains fastest; say which.

    On small scenes many threads wait for each other more than they help, and on a busy machine even two do.
    """
    import torch

    from ..training.engine import Trainer, epoch_batches
    from ..training.setup import build_model, open_data

    train_set, _ = open_data(settings)
    model = build_model(settings, len(train_set.classes), from_weights=False, device=torch.device("cpu"))
    trainer = Trainer(model, settings, steps_per_epoch=len(train_set) // settings.batch_size)
    batches = next(epoch_batches(train_set, trainer))
    seconds: dict[int, float] = {}
    threads = torch.get_num_threads()
    while threads:
        torch.set_num_threads(threads)
        times = interleaved_times({"step": lambda _: trainer.train_step(batches)}, 3, trainer.device)["step"]
        seconds[threads] = min(times)
        threads //= 2
    best = min(seconds, key=lambda number: seconds[number])
    torch.set_num_threads(best)
    return ", ".join(f"{number}: {second:.2f} s a step" for number, second in seconds.items()) + f"; {best} it is"


def check_replaceable(folder: Path) -> None:
    """Check that what a new detector takes the place of is one of an earlier demo, if there is anything.

    Raises:
        ValueError: naming the folder.
    """
    earlier = (folder / "smca-tiny" / "model.safetensors").is_file() and not folder.is_symlink()
    if os.path.lexists(folder) and not earlier:
        raise ValueError(f"--out must have nothing called detector but an earlier demo's, which {folder} is not")


def run_detector(out: Path, *, compare: bool, seed: int) -> None:
    """Make the scenes, train, evaluate, draw; `out`/detector appears when all of it is there.

    Args:
        out: an existing folder.
        compare: train `detr-tiny` as well, for at least the time of `smca-tiny`.
        seed: of scenes and training.
    """
    import torch

    from ..data import digits
    from ..training.dry_run import dry_run
    from ..training.loop import train

    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    steps = Steps(total=5 if compare else 3)
    with tempfile.TemporaryDirectory(dir=out, prefix=".detector.") as temporary:
        folder = Path(temporary, "detector")  # as the umask says, which the folder around it is not
        folder.mkdir()
        data = folder / "data"
        steps.start(f"{TRAIN_SCENES} + {VAL_SCENES} scenes: real digits, synthetic placement")
        digits.make_digits(data, train=TRAIN_SCENES, val=VAL_SCENES, size=SIZE, seed=seed)

        settings = settings_for("smca-tiny", data, folder / "smca-tiny", device, seed)
        twins = [settings]
        if device == "cpu":
            steps.log(f"threads, {use_fastest_threads(settings)}")
        if compare:
            steps.start("a few steps of smca-tiny and detr-tiny, to give both the same time")
            plain = settings_for("detr-tiny", data, folder / "detr-tiny", device, seed)
            ratio = dry_run(settings)["seconds_per_step"] / dry_run(plain)["seconds_per_step"]
            epochs = max(settings.epochs, math.ceil(settings.epochs * ratio))
            twins.append(settings_for("detr-tiny", data, folder / "detr-tiny", device, seed, epochs))
        for each in twins:
            steps.start(f"training {each.preset}, {each.epochs} epochs (AP is that of the held-out scenes)")
            train(each)

        steps.start("detections, attention and learning curves")
        curves = {each.preset: _evaluations(Path(each.out)) for each in twins}
        draw_results(folder, data)
        draw_curves(curves, folder / "learning.png")
        write_text(folder / "results.json", json.dumps({"seed": seed, "evaluations": curves}, indent=1) + "\n")
        for each in twins:
            (Path(each.out) / "checkpoint.pt").unlink()  # its data folder is about to be renamed
        final = out / "detector"
        if final.exists():
            shutil.rmtree(final)
        folder.rename(final)
    torch.set_num_threads(threads)
    for preset, evaluations in curves.items():
        last = evaluations[-1]
        steps.log(f"{preset}: AP {last['AP']:.3f}, AP50 {last['AP50']:.3f} after {last['seconds']:.0f} s of training")
    steps.log(f"{final}: detections.png, attention_*.png, learning.png, results.json; the weights in smca-tiny/")
    steps.log(f"all twelve numbers: smca eval --weights {final}/smca-tiny/model.safetensors --data {final}/data")


def draw_results(folder: Path, data: Path) -> None:
    """detections.png of the first held-out scenes, and attention_N.png of the fullest of them."""
    from torchvision.utils import make_grid

    from .. import weights
    from ..data.images import load_image, normalize
    from ..data.layouts import find_split
    from ..detect import detect
    from ..pictures import best_queries, draw_attention, draw_boxes, write_picture

    model = weights.load(folder / "smca-tiny" / "model.safetensors")
    files = sorted(find_split(data, "val")[0].iterdir())[:SHOWN]
    images = [load_image(file) for file in files]
    found = detect(model, images, threshold=SCORE)
    drawn = [draw_boxes(image, each, model.classes) for image, each in zip(images, found, strict=True)]
    write_picture(make_grid(drawn, SHOWN_IN_A_ROW, padding=8, pad_value=255), folder / "detections.png")
    fullest = sorted(range(len(files)), key=lambda i: -len(found[i]["boxes"]))[:WITH_ATTENTION]
    for i in fullest:
        image = normalize(images[i])
        path = folder / f"attention_{files[i].stem}.png"
        draw_attention(model, image, path, queries=best_queries(model, image, 3))


def draw_curves(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """AP and AP50 of each preset's evaluations over seconds of training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharex=True)
    for axes, name in zip(panels, ("AP50", "AP"), strict=True):
        for preset, evaluations in curves.items():
            seconds = [0.0, *(each["seconds"] for each in evaluations)]
            axes.plot(seconds, [0.0, *(each[name] for each in evaluations)], "o-", label=preset)
        axes.set(xlabel="seconds of training", ylabel=f"{name}, held-out scenes", ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    from ..training.metrics import read_metrics

    return [line for line in read_metrics(folder) if "AP" in line]
