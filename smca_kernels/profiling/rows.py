"""What a profile says of each call and of each of its scales."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """Cost of one scale of one call.

    Attributes:
        call: number of the call, from 1.
        scale: number of the scale, from 1.
        height, width: of its grid, in cells.
        keys: height · width.
        valid_keys: keys that count, neither padded nor masked, as a mean over the images of the batch.
        tiles: key tiles that the forward kernel walks, over all images, heads and blocks of queries; None for a
            backend without tiles.
        tiles_skipped: key tiles that it leaves out, because all of their keys are padding or because the prior makes
            them too unlikely for a whole block (mass_tolerance).
        milliseconds: median time of the call with this scale alone.
        share: of the sum of these times over all calls and scales.
        bytes_moved: what the operations of this scale take and give; a fused kernel's tensors count once.
        scale_weight: mean α over images, heads and queries; 1 without scale weights.
        sigma_median, sigma_90: median and 90th percentile of the prior's σ = 1 / √(2 p) in cells, over images, heads,
            queries and both axes; None where the prior is switched off (infinite).
    """

    call: int
    scale: int
    height: int
    width: int
    keys: int
    valid_keys: float
    tiles: int | None
    tiles_skipped: int | None
    milliseconds: float
    share: float
    bytes_moved: int
    scale_weight: float
    sigma_median: float | None
    sigma_90: float | None


@dataclass(frozen=True)
class CallRow:
    """One call with all its scales, as it was made.

    Attributes:
        call: its number, from 1.
        backend, dtype, device: where and how it ran.
        step: "forward", or "forward + backward" where a gradient was wanted.
        batch, heads, queries, head_dim: sizes of its query.
        milliseconds: median time.
    """

    call: int
    backend: str
    dtype: str
    device: str
    step: str
    batch: int
    heads: int
    queries: int
    head_dim: int
    milliseconds: float
