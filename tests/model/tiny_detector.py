"""A detector small enough for tests, with every output depending on every input."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from smca_model import SMCA, build

SINGLE, MULTI = "smca-tiny", "smca-ms-tiny"


def tiny_detector(preset: str = SINGLE, **overrides: Any) -> SMCA:
    """A detector in evaluation mode; every parameter is off its initial value, since the box head's is 0."""
    sizes = {"hidden_dim": 32, "num_heads": 2, "ffn_dim": 48, "decoder_layers": 2, "num_queries": 7}
    model = build(preset, 5, **(sizes | overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def without_parameters(model: nn.Module) -> nn.Module:
    """The same model with buffers in place of its parameters, as quantised layers keep their weights."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
    return model
