"""How a detector is run: in float32 with or without products in TF32 or in half precision, and out of memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from smca_kernels.tools.arguments import first_line, is_out_of_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HALF = {"bf16": "bfloat16", "fp16": "float16"}  # names of the dtypes that autocast casts to
PRECISIONS = ("fp32", "tf32", *HALF)
PRECISION_HELP = "arithmetic; only tf32 makes TF32 products, in convolutions too"


@contextlib.contextmanager
def float32_products(precision: str, *, deterministic: bool = False) -> Iterator[None]:
    """TF32 as the precision says and deterministic algorithms, and both as they were afterwards.

    cuBLAS reads its workspaces' size when it is first used, and keeps it.
    """
    import torch

    matmul, was_deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    convolutions, workspaces = torch.backends.cudnn.allow_tf32, os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"  # of itself it is True
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.use_deterministic_algorithms(was_deterministic)
        if workspaces is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a detector computes in half precision, if that is what the precision says."""
    import torch

    half = getattr(torch, HALF[precision]) if precision in HALF else None
    return torch.autocast(device.type, dtype=half, enabled=half is not None)


@contextlib.contextmanager
def naming_batch(images: Sequence[Tensor], where: str, advice: str) -> Iterator[None]:
    """Name the size of a batch that does not fit into memory, before torch's own words, and what takes less after them.

    Raises:
        torch.OutOfMemoryError: in place of any error of that meaning.
    """
    import torch

    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        raise torch.OutOfMemoryError(
            f"{where}{len(images)} images, padded to {width} × {height} pixels, do not fit into memory "
            f"({first_line(error)}); {advice}"
        ) from error
