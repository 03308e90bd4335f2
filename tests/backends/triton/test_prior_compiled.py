"""What the compiler takes of the prior's kernels, which is less than the interpreter does."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

from smca_kernels.backends.triton import prior as kernels
from smca_kernels.tools.cost.report import compile_report
from smca_kernels.tools.cost.specializations import Specialization


def specializations(arch: int, dtype: str, head_dim: int) -> list[Specialization]:
    """Both kernels as launches of different configurations compile them, under `launch.py`'s interface."""
    rows = []
    for scales, heads, axes, floor, absent, kernel in (
        (*configuration, kernel)
        for configuration in [
            (3, 8, 2, None, ("image_sizes", "valid_shapes")),
            (3, 8, 2, None, ("valid_shapes", "wide_logits", "grad_wide")),
            (4, 1, 1, 1e-3, ("image_sizes", "offset", "grad_offset")),
            (1, 8, 0, 1e-3, ("valid_shapes", "object_scale", "selection", "scale_weights", "grad_precision",
                             "grad_object_scale", "grad_weights", "grad_selection")),
            (8, 16, 2, 1e-3, ("image_sizes", "grad_center", "grad_weights")),
        ]
        for kernel in (kernels.prior_kernel, kernels.prior_backward_kernel)
    ):  # fmt: skip
        names = kernel.arg_names
        constexprs: dict[str, Any] = kernels.constants(axes, (8.0, 16.0) * scales, (0.1, 0.2) * scales, floor, heads)
        constexprs |= {"SCALES": scales} | {name: None for name in absent if name in names}
        of_input_dtype = {"logits", "offset", "object_scale", "selection"}
        types = {"image_sizes": "*i64", "valid_shapes": "*i64"}
        types |= dict.fromkeys(of_input_dtype | {f"grad_{name}" for name in of_input_dtype}, f"*{dtype}")
        types |= {name: "i64" if name[1:].isdigit() else "i32" for name in kernels.UNSPECIALIZED}
        signature = {name: "constexpr" if name in constexprs else types.get(name, "*fp32") for name in names}
        rows.append(
            Specialization(
                kernel=kernel.__name__,
                pass_="forward" if kernel is kernels.prior_kernel else "backward",
                function=kernel,
                signature=signature,
                constexprs=constexprs,
                attrs={},
                num_warps=4,
                num_stages=3,
                elements_per_iteration=0,
                tensor_flops_per_element=0,
                elements_per_program=1,
            )
        )
    return rows


def test_every_configuration_compiles_without_a_spilled_register() -> None:
    rows = compile_report([(80, "fp16", 32), (90, "fp32", 32)], module=__name__)
    rows = [row for row in rows if not row["kernel"].endswith(" total")]
    assert len(rows) == 20
    for row in rows:
        assert not row["error"], row
        assert row["spill_bytes"] == row["local_bytes"] == 0, row
