"""Forward and backward of the Triton kernels on small shapes, to be run under compute-sanitizer.

compute-sanitizer --tool memcheck python -m smca_benchmarks.sanitize
"""

from __future__ import annotations

import dataclasses
import sys

from smca_kernels import backends
from smca_kernels.testing.cases import CASES, case_generator, make_inputs
from smca_kernels.testing.check import run_backend

ARITHMETIC = (("float16", 0.0), ("float16", 0.1), ("float32", 0.0))  # dtype, dropout_p


def main() -> int:
    """Run the quick parity cases, whose results other tests check. Exit status 2 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        print("smca_benchmarks.sanitize needs a GPU: the kernels can't be compiled for the CPU", file=sys.stderr)
        return 2
    for case in (case for case in CASES if case.quick):
        for dtype, dropout_p in ARITHMETIC:
            inputs = make_inputs(dataclasses.replace(case, dtype=dtype), case_generator(case, 0), torch.device("cuda"))
            if backends.unsupported("triton", inputs) is not None:
                continue
            run_backend(inputs, "triton", dropout_p=dropout_p)
            torch.cuda.synchronize()
            print(f"{case.name}, {dtype}, dropout {dropout_p}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
