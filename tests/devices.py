"""The devices that tests run on, and what they need to be there."""

from __future__ import annotations

import importlib.util

import pytest
import torch

CPU = torch.device("cpu")
ON_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
TRITON = pytest.param("triton", marks=needs_triton)
COMPILER = "inductor" if ON_GPU else "aot_eager"
