"""SMCA in the DETR and Conditional DETR of Hugging Face's transformers: `pip install "smca_kernels[transformers]"`.

    model = SmcaDetrForObjectDetection.from_pretrained("facebook/detr-resnet-50")      or, for a model that is there,
    model = apply_smca_to_detr(model)

    detr.py                DETR: attention, decoder and model with a prior, and boxes around its centre
    conditional_detr.py    Conditional DETR: the same around the host's own reference points
    forward.py             what both compute alike: the encoder's feature map, attention with a prior
    apply.py               what both are given alike: priors in a decoder that is built, and the classes that use them

Only the decoder's co-attention changes, and in DETR the box head. Every parameter keeps its name: a plain checkpoint
loads with the prior alone missing. What a layer needs of an earlier one is an argument, not a hook's note, because
gradient checkpointing runs the `forward` of a layer again, and nothing else.
"""

from smca_kernels.nn.hosts.transformers.conditional_detr import (
    SmcaConditionalDetrForObjectDetection,
    apply_smca_to_conditional_detr,
)
from smca_kernels.nn.hosts.transformers.detr import SmcaDetrForObjectDetection, apply_smca_to_detr

__all__ = [
    "SmcaConditionalDetrForObjectDetection",
    "SmcaDetrForObjectDetection",
    "apply_smca_to_conditional_detr",
    "apply_smca_to_detr",
]
