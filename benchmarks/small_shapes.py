"""Forward and backward of the Triton kernels on small shapes, for a tool that watches every memory access.

compute-sanitizer --tool memcheck python -m benchmarks.small_shapes
"""

from __future__ import annotations

import dataclasses
import sys

from smca_kernels.demo import call_arguments
from smca_kernels.parity import CASES, case_generator, make_inputs

# Odd grids, both masks, a scale without valid keys, strided inputs, each head_dim that compiles anew.
NAMES = (
    "one cell",
    "one row, one column",
    "one past the tiles",
    "head_dim 20",
    "head_dim 64",
    "head_dim 128",
    "three scales, padded batch",
    "image empty at one scale",
    "random padding mask",
    "projections",
    "expanded",
)


def main() -> int:
    """Exit status 0 when all ran; what they computed is `smca parity`'s concern."""
    import torch

    from smca_kernels import smca_attention

    if not torch.cuda.is_available():
        print("small_shapes needs a GPU: the kernels can't be compiled for the CPU", file=sys.stderr)
        return 2
    for case in (case for case in CASES if case.name in NAMES):
        for dtype in ("float16", "float32"):
            inputs = make_inputs(dataclasses.replace(case, dtype=dtype), case_generator(case, 0), "cuda")
            for dropout_p in (0.0, 0.1):
                output = smca_attention(**call_arguments(inputs), dropout_p=dropout_p, backend="triton")
                torch.autograd.grad(output, list(inputs.differentiable().values()), inputs.grad_output)
                torch.cuda.synchronize()
                print(f"{case.name}, {dtype}, dropout {dropout_p}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
