"""SMCA, the detector: Gao et al., "Fast Convergence of DETR with Spatially Modulated Co-Attention", ICCV 2021.

In the paper's order: backbone.py, position_encoding.py, encoder.py, decoder.py, detector.py. config.py has all that a
detector is built from, and presets.py every model of the paper. weights.py loads and saves, detr_weights.py reads
checkpoints of DETR and of the authors, hub.py shares. It is trained by data/ and training/; train.py, evaluate.py,
detect.py and export.py are commands. The names below are imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Config
    from .detector import SMCA, postprocess
    from .detr_weights import load_official
    from .presets import PRESETS, build
    from .training.criterion import build_criterion

_MODULES = {
    "PRESETS": "presets",
    "SMCA": "detector",
    "Config": "config",
    "build": "presets",
    "build_criterion": "training.criterion",
    "load_official": "detr_weights",
    "postprocess": "detector",
}

__all__ = ["PRESETS", "SMCA", "Config", "build", "build_criterion", "load_official", "postprocess"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
