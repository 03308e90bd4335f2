"""The memory that a decoder layer saves for its backward pass."""

from __future__ import annotations

import pytest
import torch
from devices import needs_triton

from smca_kernels.profiling import measure as profiling
from smca_model import memory
from smca_model.decoder import DecoderLayer


@pytest.mark.parametrize(
    ("backend", "device", "dropout"),
    [pytest.param("triton", "cuda", 0.1, marks=needs_triton), ("sdpa", "cpu", 0.0)],
)
def test_the_co_attention_and_its_projections_save_less_than_40_mib(backend, device, dropout):
    co_attention, layer = memory.saved_bytes(backend, device, dropout)

    assert co_attention < 40 * 2**20 < layer


@needs_triton
def test_naive_attention_saves_several_times_as_much():
    naive, _ = memory.saved_bytes("reference", "cuda", 0.1)
    fused, _ = memory.saved_bytes("triton", "cuda", 0.1)

    assert naive > 10 * fused


def test_the_count_without_storage_is_that_of_a_real_run():
    height, width = memory.SPATIAL_SHAPE
    layer = DecoderLayer(memory.DIM, memory.HEADS, memory.FFN_DIM, 0.0, (memory.STRIDE,), predicts_center=True)
    queries, query_pos = (torch.randn(memory.BATCH, memory.QUERIES, memory.DIM, requires_grad=True) for _ in range(2))
    key, value = (torch.randn(memory.BATCH, height * width, memory.DIM, requires_grad=True) for _ in range(2))
    image_sizes = torch.tensor([[800.0, 1066.0]] * memory.BATCH)

    real = profiling.saved_bytes(
        lambda: layer.co_attn(
            queries, key, value, [(height, width)],
            prior_features=query_pos, image_sizes=image_sizes, backend="sdpa",
        )[0]
    )  # fmt: skip

    assert memory.saved_bytes("sdpa", "cpu", 0.0)[0] == real


@needs_triton
def test_the_command_prints_a_row_for_each_backend_and_dropout(capsys):
    memory.main()

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Saved for backward by one decoder layer: 50×67 cells, 300 queries, 2 images")
    assert [line.split()[0] for line in lines[2:]] == ["naive", "naive", "sdpa,", "sdpa,", "triton", "triton"]
