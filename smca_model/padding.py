"""`python -m smca_model.padding`: how far padding reaches into the maps of the backbones.

At the edge of an image alone, convolutions see their own zeros; beside padding they see what earlier layers made of it.
The image is scikit-image's portrait of an astronaut. The weights are random; batch norm is set to the statistics of the
image, without which features of a random network would die out or explode.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import build_backbone, set_norm_statistics
from .data.images import normalize

SIDE, PADDING = 480, 240  # pixels
MIN_CHANGE = 0.001  # changes below it are left out
BACKBONES = (
    ("ResNet-50, stride 32", "resnet50", 32, False),
    ("ResNet-50, stride 16", "resnet50", 16, False),
    ("ResNet-50 dilated, stride 16", "resnet50", 16, True),
    ("small network, stride 8", "tiny", 8, False),
)


@torch.no_grad()
def change_beside_padding(backbone: nn.Module, stride: int, image: Tensor, padding: int) -> list[float]:
    """Measure how padding changes the columns of a map that are next to it, outermost first.

    Args:
        backbone: as `build_backbone` gives it.
        stride: which of its maps.
        image: [1, 3, height, width].
        padding: pixels of it, on the right.

    Returns:
        For each column of the image's own part of the map, ‖padded - alone‖ / ‖alone‖ over channels and rows.
    """
    alone = backbone(image)[stride]
    padded = backbone(F.pad(image, (0, padding)))[stride][..., : alone.shape[-1]]
    of_padding, of_image = (torch.linalg.vector_norm(each, dim=(0, 1, 2)) for each in (padded - alone, alone))
    change: list[float] = (of_padding / of_image).flip(0).tolist()
    return change


def main() -> None:
    """Print the table."""
    import skimage.data

    torch.manual_seed(0)
    image = normalize(torch.from_numpy(skimage.data.astronaut()[:SIDE, :SIDE]).permute(2, 0, 1)).unsqueeze(0)
    print(f"Change of features beside {PADDING} pixels of padding, in columns of cells, outermost first")
    for name, backbone, stride, dilation in BACKBONES:
        network = build_backbone(backbone, (stride,), dilation).eval()
        set_norm_statistics(network, image)
        change = change_beside_padding(network, stride, image, PADDING)
        print(f"{name:29}", *(f"{part:6.1%}" for part in change if part >= MIN_CHANGE))


if __name__ == "__main__":
    main()
