"""`python -m smca_model.memory`: what one decoder layer saves for its backward pass, naive and fused.

The size is that of a dilated backbone (DC5): 50×67 cells, 300 queries, two images, 256 channels, 8 heads, float32. The
layer runs on tensors without storage, so that nothing is computed and no GPU is needed: what is counted are the
distinct tensors that autograd holds on to, parameters and inputs among them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from smca_kernels.profiling import measure

from .decoder import DecoderLayer

SPATIAL_SHAPE = (50, 67)  # ⌈800 / 16⌉ × ⌈1066 / 16⌉
STRIDE = 16
BATCH, QUERIES, DIM, HEADS, FFN_DIM = 2, 300, 256, 8, 2048
MIB = 2**20

# (backend, device, name). On a CPU torch's own attention stores all weights once there is dropout.
IMPLEMENTATIONS = (
    ("reference", "cuda", "naive PyTorch"),
    ("sdpa", "cpu", "sdpa, on a CPU"),
    ("triton", "cuda", "triton"),
)


def saved_bytes(backend: str, device: str, dropout: float) -> tuple[int, int]:
    """Bytes saved for backward by the co-attention with its projections, and by the whole decoder layer.

    Args:
        backend: of the co-attention, as `smca_attention`.
        device: "cpu" or "cuda"; neither is touched.
        dropout: probability, of attention weights and everywhere else in the layer.
    """
    height, width = SPATIAL_SHAPE
    with FakeTensorMode(), torch.device(device):
        layer = DecoderLayer(DIM, HEADS, FFN_DIM, dropout, (STRIDE,), predicts_center=True)
        queries, query_pos = (torch.empty(BATCH, QUERIES, DIM, requires_grad=True) for _ in range(2))
        key, value = (torch.empty(BATCH, height * width, DIM, requires_grad=True) for _ in range(2))
        image_sizes = torch.empty(BATCH, 2)
        shapes = [SPATIAL_SHAPE]

        def co_attention() -> Tensor:
            return layer.co_attn(
                queries, key, value, shapes, prior_features=query_pos, image_sizes=image_sizes, backend=backend
            )[0]

        def whole_layer() -> Tensor:
            return layer(
                queries,
                query_pos,
                key,
                value,
                shapes,
                valid_shapes=None,
                image_sizes=image_sizes,
                reference_logits=None,
                backend=backend,
            )[0]

        return measure.saved_bytes(co_attention), measure.saved_bytes(whole_layer)


def main() -> None:
    """Print the table."""
    height, width = SPATIAL_SHAPE
    print(
        f"Saved for backward by one decoder layer: {height}×{width} cells, {QUERIES} queries, {BATCH} images, float32"
    )
    print(f"{'':16} {'dropout':>7} {'co-attention':>13} {'whole layer':>12}   MiB")
    for backend, device, name in IMPLEMENTATIONS:
        for dropout in (0.0, 0.1):
            co_attention, layer = saved_bytes(backend, device, dropout)
            print(f"{name:16} {dropout:7} {co_attention / MIB:13.1f} {layer / MIB:12.1f}")


if __name__ == "__main__":
    main()
