"""The rows of the paper's Tables 2 and 3 that ablations.py trains in small, with what the paper measured.

Source: Gao et al., ICCV 2021, Tables 2 and 3.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """A row of the paper's tables.

    Attributes:
        name: of the paper's preset, without the backbone.
        tables: which of the paper's it is in.
        row: what the paper calls it.
        paper_ap: there, on COCO after 50 epochs.
    """

    name: str
    tables: tuple[int, ...]
    row: str
    paper_ap: float


VARIANTS = (
    Variant("detr", (2,), "DETR, no prior", 34.8),
    Variant("smca-fixed", (2,), "per head, fixed scale", 38.5),
    Variant("smca-shared", (2,), "shared by the heads, independent scales", 40.2),
    Variant("smca-single", (2,), "per head, single scale", 40.4),
    Variant("smca", (2, 3), "per head, independent scales; one level", 41.0),
    Variant("smca-ms", (3,), "2intra+1multi+2intra", 43.7),
    Variant("smca-ms-nossa", (3,), "2intra+1multi+2intra, no scale selection", 42.6),
    Variant("smca-3intra", (3,), "3intra", 42.9),
    Variant("smca-3multi", (3,), "3multi", 43.3),
    Variant("smca-5intra", (3,), "5intra", 43.3),
    Variant("smca-ms-noshare", (3,), "2intra+1multi+2intra, weights not shared", 42.3),
)
