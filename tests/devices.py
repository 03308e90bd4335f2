"""The devices that tests run on."""

from __future__ import annotations

import pytest
import torch

CPU = torch.device("cpu")
ON_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
COMPILER = "inductor" if ON_GPU else "aot_eager"
