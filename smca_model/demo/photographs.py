"""The layer's part of `smca demo`: two photographs to feature maps, by the detector's own parts.

Photographs → resize, normalise, pad → ResNet-50 → projections to maps at strides 16, 32 and 64, normalised at every
cell. ImageNet's weights are taken if they can be had soon, else random ones, and a line says which.
smca_kernels/tools/demo.py shows the layer on what comes out.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smca_kernels.tools.arguments import choose_device
from smca_kernels.tools.demo import (
    EMBED_DIM,
    HEADS,
    QUERIES,
    Photograph,
    Scene,
    Steps,
    describe_device,
    make_scene,
    show,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..backbone import Backbone

STRIDES = (16, 32, 64)
# scikit-image ships these inside its package. The pictures show the query nearest to the point (x, y)
# (in parts of width and height).
POINTS = {"astronaut": (0.43, 0.24), "coffee": (0.47, 0.36)}
SHORT_SIDE = {"cuda": 800, "cpu": 512}
DOWNLOAD_SECONDS = 45
SEED = 0


def load_photographs(names: Sequence[str], short_side: int) -> list[Tensor]:
    """Photographs [3, height, width] as the detector takes them: short side given, long ≤ 1333, normalised."""
    import skimage.data
    import torch

    from ..data.images import normalize, resize

    photographs = (torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1) for name in names)
    return [normalize(resize(photograph, short_side)) for photograph in photographs]


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def build_resnet50(images: Tensor) -> tuple[Backbone, str]:
    """The detector's ResNet-50, with ImageNet weights if they can be had soon, and a line that says which.

    Args:
        images: [B, 3, height, width], whose statistics the norms of random weights get.
    """
    from torchvision.models import ResNet50_Weights

    from ..backbone import build_backbone, set_norm_statistics

    found: dict[str, Any] = {}

    def download() -> None:
        try:
            with _socket_timeout(5.0):
                ResNet50_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
            found["weights"] = True
        except Exception as error:  # no network, a proxy's page instead, a full disk: random ones will do
            found["reason"] = str(getattr(error, "reason", error))

    # In a thread, because name resolution and a trickling connection obey no timeout.
    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    if "weights" in found:
        backbone = build_backbone("resnet50", STRIDES, pretrained=True)  # from torch's cache by now
        return backbone.eval(), "ResNet-50 with ImageNet weights"
    reason = found.get("reason", f"nothing after {DOWNLOAD_SECONDS} s")
    backbone = build_backbone("resnet50", STRIDES).eval()
    set_norm_statistics(backbone, images)
    return backbone, f"ResNet-50 with RANDOM weights: the ImageNet weights could not be downloaded ({reason})"


def scene_of(backbone: Backbone, images: Sequence[Tensor], device: torch.device) -> Scene:
    """The inputs of the layer: maps [B, 256, height, width] of each scale, normalised at every cell, and queries."""
    import torch
    from torch import nn

    from ..detector import build_projections, pad_images, project_maps, valid_cells

    sizes = [(image.shape[1], image.shape[2]) for image in images]
    with torch.no_grad():
        projections = nn.ModuleList(build_projections(backbone.channels, STRIDES, EMBED_DIM)).to(device)
        projected = project_maps(projections, STRIDES, backbone.to(device)(pad_images(images).to(device)), sizes)
        maps = [nn.functional.layer_norm(m.movedim(1, -1), (EMBED_DIM,)).movedim(-1, 1) for m, _ in projected]
    valid_shapes = torch.stack([torch.tensor(valid_cells(sizes, stride)) for stride in STRIDES], 1)
    return make_scene(maps, STRIDES, torch.tensor(sizes), valid_shapes)


def run_layer(out: Path) -> int:
    """Show the layer on the photographs; the exit status is that of `show`.

    Args:
        out: an existing folder.
    """
    import torch

    from ..detector import pad_images

    torch.manual_seed(SEED)
    device = choose_device()
    facts = describe_device(device, SEED)
    steps = Steps(total=5)

    steps.start("photographs")
    images = load_photographs(list(POINTS), SHORT_SIDE[device.type])
    batch = pad_images(images)
    sizes = [f"{name} {image.shape[2]} × {image.shape[1]}" for name, image in zip(POINTS, images, strict=True)]
    steps.log(f"{', '.join(sizes)}, padded to {batch.shape[-1]} × {batch.shape[-2]} pixels")

    steps.start(f"feature maps (up to {DOWNLOAD_SECONDS} s for the weights, if they are not here yet)")
    backbone, weights = build_resnet50(batch)
    steps.log(weights)
    scene = scene_of(backbone, images, device)
    grids = " + ".join(f"{height}×{width}" for height, width in scene.spatial_shapes)
    steps.log(f"grids of {grids} = {scene.tokens.shape[1]} keys, {QUERIES} queries an image, {HEADS} heads")

    photographs = [Photograph(name, image, POINTS[name]) for name, image in zip(POINTS, images, strict=True)]
    return show(scene, photographs, weights, facts, steps, out)
