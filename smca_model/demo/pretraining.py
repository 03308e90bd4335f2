"""A start for small detectors: their backbone, taught to say at every cell which digit covers it.

It stands for the ImageNet weights that the paper's backbones begin with. From random weights the deeper encoders of
the ablations need many times the steps before anything is learned.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from smca_kernels.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.coco import CocoDetection
    from ..training.settings import Settings

STRIDE = 8  # of the backbone "tiny"
EPOCHS, BATCH_SIZE, LEARNING_RATE = 8, 32, 2e-3


def pretrain_backbone(settings: Settings, path: Path) -> float:
    """Train the backbone "tiny" on the training scenes of some settings' data and write its state dict.

    Args:
        settings: of a run; its scenes must be squares of one size, a multiple of 8 pixels.
        path: the file to write, whole or not at all.

    Returns:
        The part of the held-out scenes' covered cells that it gets right.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn
    from tqdm import tqdm

    from ..backbone import build_backbone
    from ..training.seeds import IMAGE_ORDER, INITIAL_WEIGHTS, derived_seed
    from ..training.setup import open_data

    train_set, val_set = open_data(settings)
    nothing = len(train_set.classes)
    images, labels = _scenes(train_set)
    torch.manual_seed(derived_seed(settings.seed, INITIAL_WEIGHTS))
    backbone = build_backbone("tiny", (STRIDE,))
    head = nn.Conv2d(backbone.channels[STRIDE], nothing + 1, 1)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=settings.weight_decay)
    order = torch.Generator().manual_seed(derived_seed(settings.seed, IMAGE_ORDER))
    steps = EPOCHS * -(-len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    with tqdm(total=steps, desc="backbone", unit="step") as bar:
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(images), generator=order).split(BATCH_SIZE):
                loss = F.cross_entropy(head(backbone(images[batch])[STRIDE]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    with torch.no_grad():
        images, labels = _scenes(val_set)
        found = torch.cat([head(backbone(part)[STRIDE]).argmax(1) for part in images.split(BATCH_SIZE)])
    covered = labels != nothing
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(backbone.state_dict(), file)
    return float((found == labels)[covered].float().mean())


def cell_labels(boxes: Tensor, labels: Tensor, cells: int, nothing: int) -> Tensor:
    """[cells, cells], the label of the box that covers each cell's centre, the last one's where several do.

    Args:
        boxes: [K, 4], (cx, cy, w, h) in 0…1.
        labels: [K].
        cells: a side of the map.
        nothing: the label of a cell that no box covers.
    """
    import torch

    centers = (torch.arange(cells) + 0.5) / cells
    found = torch.full((cells, cells), nothing)
    for (cx, cy, width, height), label in zip(boxes, labels, strict=True):
        rows, columns = (centers - cy).abs() <= height / 2, (centers - cx).abs() <= width / 2
        found[rows[:, None] & columns] = label
    return found


def _scenes(dataset: CocoDetection) -> tuple[Tensor, Tensor]:
    """Images [N, 3, side, side] and the labels of their cells [N, side / 8, side / 8]."""
    import torch

    images, labels = [], []
    for image, target in (dataset[i] for i in range(len(dataset))):
        images.append(image)
        cells = image.shape[-1] // STRIDE
        labels.append(cell_labels(target["boxes"], target["labels"], cells, len(dataset.classes)))
    return torch.stack(images), torch.stack(labels)
