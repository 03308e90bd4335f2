"""Spatially modulated co-attention (SMCA) for DETR decoders: fused kernels and a drop-in layer.

Importing needs neither a GPU nor Triton: Triton is imported when a call first runs its kernels.
"""

from smca_kernels.attention import attention_map, explain_backend, smca_attention
from smca_kernels.nn import SpatiallyModulatedCoAttention, SpatialPrior
from smca_kernels.profiling.recorder import profile

__version__ = "0.1.0"

__all__ = [
    "SpatialPrior",
    "SpatiallyModulatedCoAttention",
    "__version__",
    "attention_map",
    "explain_backend",
    "profile",
    "smca_attention",
]
