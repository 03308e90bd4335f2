"""A detector that `smca export` wrote in ONNX, run by onnxruntime on the CPU."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from smca_kernels.tools.arguments import first_line

# Of every exported file, also of torch.export's.
FORMAT = "smca_model detector 1"
INPUT, OUTPUTS = "images", ("logits", "boxes")


def open_session(path: str | os.PathLike[str]) -> Any:
    """onnxruntime's session of a file, silent but for errors.

    Raises:
        ValueError: for a file that it can't run.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        raise ValueError(
            f"path must be an ONNX file that onnxruntime can run, got {os.fspath(path)}: {first_line(error)}"
        ) from None


class OnnxDetector:
    """Called as `SMCA` is, with the same outputs but for those of earlier decoder layers.

    Images of different sizes are run one size after the other, so that none is padded.

    Args:
        path: file of `smca_model.export.export`.

    Attributes:
        classes, image_size: as those of `SMCA`.
        min_side: least pixels of a side of the images that it takes.
        device: the CPU.

    Raises:
        ValueError: for another file.
    """

    device = torch.device("cpu")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._session = open_session(path)
        metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"path must be a file that `smca export` wrote, of format {FORMAT!r}, got {os.fspath(path)} of "
                f"{metadata.get('format')!r}"
            )
        self.classes: tuple[str, ...] = tuple(json.loads(metadata["classes"]))
        short, longest = json.loads(metadata["image_size"])
        self.image_size: tuple[int, int] = (short, longest)
        self.min_side = int(metadata["min_side"])

    def __call__(self, images: Sequence[Tensor]) -> dict[str, Any]:
        """pred_logits [B, N, num_classes] and pred_boxes [B, N, 4] of images [3, height, width] in float32, normalised.

        Raises:
            ValueError: for an image with a side of less than two cells of the coarsest scale.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            if min(image.shape[1:]) < self.min_side:
                raise ValueError(
                    f"images[{i}] must have sides of at least {self.min_side} pixels for this exported detector, got "
                    f"{list(image.shape)}"
                )
            groups.setdefault(tuple(image.shape), []).append(i)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for members in groups.values():
            batch = torch.stack([images[i] for i in members]).numpy()
            outputs = map(torch.from_numpy, self._session.run(list(OUTPUTS), {INPUT: batch}))
            found.update(zip(members, zip(*outputs, strict=True), strict=True))
        logits, boxes = zip(*(found[i] for i in range(len(images))), strict=True)
        return {"pred_logits": torch.stack(logits), "pred_boxes": torch.stack(boxes)}
