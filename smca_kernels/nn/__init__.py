"""SMCA as modules: a spatial prior for every object query, and the co-attention that looks where the prior says.

    prior.py           SpatialPrior: query features → centre, precision and scale weights, in two geometries
    co_attention.py    SpatiallyModulatedCoAttention: projections, prior, `smca_attention` and output projection, in the
                       place of a decoder layer's nn.MultiheadAttention
    projected.py       ProjectedCoAttention: the same between the projections of a host, and boxes around the centre
    hosts/             detectors of others with SMCA inside, by one call
    official.py        the parameters of the authors' released decoder layer, under our names
    linear.py          linear layers with the initial values that both need, and the dtype that a module computes in
    checks.py          checks of the arguments of both modules

Source: Gao et al., "Fast Convergence of DETR with Spatially Modulated Co-Attention", ICCV 2021.
"""

from smca_kernels.nn.co_attention import SpatiallyModulatedCoAttention
from smca_kernels.nn.official import OFFICIAL_NAMES, official_layer_state
from smca_kernels.nn.prior import GEOMETRIES, MODULATIONS, SCALE_TYPES, SpatialPrior, SpatialPriorOutput
from smca_kernels.nn.projected import ProjectedCoAttention, boxes_around

__all__ = [
    "GEOMETRIES",
    "MODULATIONS",
    "OFFICIAL_NAMES",
    "SCALE_TYPES",
    "ProjectedCoAttention",
    "SpatialPrior",
    "SpatialPriorOutput",
    "SpatiallyModulatedCoAttention",
    "boxes_around",
    "official_layer_state",
]
