"""A prior in every decoder layer of a detector that is built, and the classes that use it in place of the host's.

Modules and parameters of the host stay the same objects. Nothing is changed where the options or the model are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from smca_kernels.inputs import FLOATING_DTYPES
from smca_kernels.nn.hosts.grids import check_options
from smca_kernels.nn.linear import UnitLinear, XavierLinear
from smca_kernels.nn.projected import ProjectedCoAttention

# Old checkpoints are renamed by the name of the class that they are loaded into.
for _name in ("DetrModel", "ConditionalDetrModel"):
    register_checkpoint_conversion_mapping(f"Smca{_name}", get_checkpoint_conversion_mapping(_name), overwrite=True)


@dataclass(frozen=True)
class Classes:
    """Classes of the host, and those that take their places."""

    host: Any
    detector: Any
    model: Any
    decoder: Any
    layer: Any
    attention: Any
    predicts_center: bool  # the first layer's prior does, else the host


class PriorInitMixin:
    """Initialisation of the priors that a checkpoint lacks, in place of the host's, which is not theirs."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (XavierLinear, UnitLinear)):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]


def options_of(config: Any) -> dict[str, Any]:
    """Options of the prior that a config has; `modulate` checks them."""
    options = getattr(config, "smca", None)
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise TypeError(f"config.smca must be a dict of options of the prior, got {type(options).__name__}")
    return options


def applied(model: Any, classes: Classes, options: dict[str, Any]) -> Any:
    """The host's model with a prior and the options in its config; another model is refused."""
    if isinstance(model, classes.detector):
        raise ValueError(f"model must be a plain {classes.host.__name__}, got a {type(model).__name__}")
    if not isinstance(model, classes.host):
        raise TypeError(f"model must be a {classes.host.__name__}, got a {type(model).__name__}{_why_not(model)}")
    modulate(model, classes, options)
    model.config.smca = {**options, "strides": list(options["strides"])}
    return model


def _why_not(model: Any) -> str:
    """The reason for which a whole family of detectors can't have a prior, if the model is of one."""
    if isinstance(model, nn.Module) and any("deformable" in type(part).__name__.lower() for part in model.modules()):
        return (
            ": deformable attention samples a few points, and has no softmax over all cells that a prior could change"
        )
    return ""


def modulate(detector: Any, classes: Classes, options: dict[str, Any]) -> None:
    """Add a prior to each decoder layer, and change the classes that hand it on. Nothing is changed if this raises."""
    options = {"strides": (32,), **options}
    check_options(options)
    decoder, config = detector.model.decoder, detector.config
    attentions = []
    for i, layer in enumerate(decoder.layers):
        attention = ProjectedCoAttention(
            config.d_model,
            config.decoder_attention_heads,
            predicts_center=classes.predicts_center and i == 0,
            dropout=layer.encoder_attn.attention_dropout,
            **options,
        )
        weight = layer.encoder_attn.o_proj.weight
        dtype = weight.dtype if weight.dtype in FLOATING_DTYPES else None
        attentions.append(attention.to(weight.device, dtype).train(layer.training))
    # A class notes what output_hidden_states records when it is first made.
    with torch.device("meta"):
        classes.decoder(config)
    for layer, attention in zip(decoder.layers, attentions, strict=True):
        layer.encoder_attn.smca = attention
        layer.encoder_attn.__class__ = classes.attention
        layer.__class__ = classes.layer
    decoder.__class__ = classes.decoder
    detector.model.__class__ = classes.model
    detector.__class__ = classes.detector
    for part in (detector, detector.model, decoder):
        part._no_split_modules = {*part._no_split_modules, classes.layer.__name__}
