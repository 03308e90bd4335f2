"""SMCA, the detector: Gao et al., "Fast Convergence of DETR with Spatially Modulated Co-Attention", ICCV 2021.

In the paper's order: backbone.py, position_encoding.py, encoder.py, decoder.py, detector.py; matcher.py and
criterion.py train it, presets.py names every model of the paper, weights.py loads and saves. The names below are
imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .criterion import build_criterion
    from .detector import SMCA, postprocess
    from .presets import PRESETS, Config, build
    from .weights import load_official

_MODULES = {
    "PRESETS": "presets",
    "SMCA": "detector",
    "Config": "presets",
    "build": "presets",
    "build_criterion": "criterion",
    "load_official": "weights",
    "postprocess": "detector",
}

__all__ = ["PRESETS", "SMCA", "Config", "build", "build_criterion", "load_official", "postprocess"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
