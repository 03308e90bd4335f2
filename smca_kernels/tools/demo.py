"""The layer's part of `smca demo`, on photographs that are feature maps already: parity, time and memory, pictures.

`make_scene` puts 300 queries on a grid of reference points. A query's content is the map under its point, and keys are
projected as queries are, so that q·k compares appearance. `show` checks every backend against naive PyTorch, times it,
and draws where one query of each photograph looks. Nothing is trained.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smca_kernels.files import replacing, write_text
from smca_kernels.pictures import (
    EXPLANATION,
    POINT_COLOR,
    QueryAttention,
    displayable,
    draw_heads,
    draw_priors,
    window,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from smca_kernels.nn import SpatiallyModulatedCoAttention, SpatialPriorOutput
    from smca_kernels.testing.cases import CaseInputs

EMBED_DIM, HEADS = 256, 8
QUERY_ROWS, QUERY_COLUMNS = 15, 20
QUERIES = QUERY_ROWS * QUERY_COLUMNS
REPEATS = {"cuda": 50, "cpu": 5}
PRIOR_PIXELS = 1200  # width of the picture of the prior


# ----------------------------------------------------------------------------------------- the layer's inputs


@dataclass(frozen=True)
class Photograph:
    """An image, and where the query is that the pictures show."""

    name: str
    image: Tensor  # [3, height, width], normalised
    point: tuple[float, float]  # (x, y) in parts of width and height


@dataclass(frozen=True)
class Scene:
    """The inputs of the layer: a batch of photographs seen by 300 queries each."""

    tokens: Tensor  # [B, T, E], key and value
    queries: Tensor  # [B, N, E], query and prior features
    reference_logits: Tensor  # [B, N, 2]
    image_sizes: Tensor  # [B, 2]
    strides: tuple[int, ...]  # S, pixels per cell
    spatial_shapes: tuple[tuple[int, int], ...]
    valid_shapes: Tensor  # [B, S, 2]

    def to(self, dtype: torch.dtype) -> Scene:
        """The same with maps and queries in another dtype, as fresh leaves that require gradients."""
        tokens, queries = (t.detach().to(dtype).requires_grad_() for t in (self.tokens, self.queries))
        return dataclasses.replace(self, tokens=tokens, queries=queries)

    def geometry(self) -> dict[str, Tensor]:
        """The layer's keyword arguments about where queries and images are."""
        return {
            "prior_features": self.queries,
            "reference_logits": self.reference_logits,
            "image_sizes": self.image_sizes,
            "valid_shapes": self.valid_shapes,
        }

    def prior(self, layer: SpatiallyModulatedCoAttention) -> SpatialPriorOutput:
        """The layer's prior of every query, without gradient."""
        import torch

        with torch.no_grad():
            return layer.prior(
                self.queries,
                self.spatial_shapes,
                reference_logits=self.reference_logits,
                image_sizes=self.image_sizes,
            )


def reference_points() -> Tensor:
    """Centres of a 15 × 20 grid over the unit square, row-major: [N, 2] as (x, y)."""
    import torch

    x = (torch.arange(QUERY_COLUMNS) + 0.5) / QUERY_COLUMNS
    y = (torch.arange(QUERY_ROWS) + 0.5) / QUERY_ROWS
    return torch.stack((x.repeat(QUERY_ROWS), y.repeat_interleave(QUERY_COLUMNS)), -1)


def make_scene(
    maps: Sequence[Tensor],  # S × [B, E, height, width]
    strides: Sequence[int],
    image_sizes: Tensor,  # [B, 2]
    valid_shapes: Tensor,  # [B, S, 2]
) -> Scene:
    """Tokens of all maps, and a query at every reference point with what the finest map has under it.

    Args:
        maps: of every scale, the finest first.
        strides: pixels per cell of each.
        image_sizes: (height, width) of each image in pixels, without padding.
        valid_shapes: (height, width) in cells of the part of each map that is image.
    """
    import torch

    device = maps[0].device
    points = reference_points()
    cells = (points * image_sizes[:, None].flip(-1) / strides[0]).long().to(device)  # [B, N, 2]
    rows = torch.arange(len(image_sizes), device=device)[:, None]
    return Scene(
        tokens=torch.cat([m.flatten(2) for m in maps], -1).transpose(1, 2).contiguous(),
        queries=maps[0][rows, :, cells[..., 1], cells[..., 0]],
        reference_logits=points.logit().to(device).expand(len(image_sizes), -1, -1),
        image_sizes=image_sizes.to(device),
        strides=tuple(strides),
        spatial_shapes=tuple((m.shape[-2], m.shape[-1]) for m in maps),
        valid_shapes=valid_shapes.to(device),
    )


def build_layer(strides: Sequence[int], device: torch.device) -> SpatiallyModulatedCoAttention:
    """An untrained layer of the official geometry, with two changes for something to see.

    Keys are projected as queries are, and the object scale s varies around its initial 1 from query to query.
    """
    import torch

    from smca_kernels.nn import SpatiallyModulatedCoAttention

    layer = SpatiallyModulatedCoAttention(EMBED_DIM, HEADS, strides, predicts_center=False, batch_first=True)
    with torch.no_grad():
        w_q, w_k, _ = layer.in_proj_weight.chunk(3)
        w_k.copy_(w_q)
        assert layer.prior.object_scale is not None
        torch.nn.init.normal_(layer.prior.object_scale.weight, std=0.012)
    return layer.to(device)


def call_layer(layer: SpatiallyModulatedCoAttention, scene: Scene, backend: str) -> Tensor:
    """Output [B, N, E] of the layer."""
    tokens = scene.tokens
    return layer(scene.queries, tokens, tokens, scene.spatial_shapes, **scene.geometry(), backend=backend)[0]


def operator_inputs(layer: SpatiallyModulatedCoAttention, scene: Scene) -> CaseInputs:
    """What the layer hands to the operator, as leaves, and a random upstream gradient."""
    import torch

    from smca_kernels.inputs import MASS_TOLERANCES
    from smca_kernels.testing.cases import CaseInputs

    prior = scene.prior(layer)
    assert prior.scale_weights is not None
    with torch.no_grad():
        projected = [
            torch.nn.functional.linear(source, weight, bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for source, weight, bias in zip(
                (scene.queries, scene.tokens, scene.tokens),
                layer.in_proj_weight.chunk(3),
                layer.in_proj_bias.chunk(3),
                strict=True,
            )
        ]
    query, key, value = (tensor.detach().requires_grad_() for tensor in projected)
    return CaseInputs(
        query=query,
        key=key,
        value=value,
        center=prior.center.detach().requires_grad_(),
        precision=prior.precision.detach().requires_grad_(),
        scale_weights=prior.scale_weights.detach().requires_grad_(),
        spatial_shapes=scene.spatial_shapes,
        valid_shapes=scene.valid_shapes,
        key_padding_mask=None,
        dropout_p=0.0,
        scale=query.shape[-1] ** -0.5,
        mass_tolerance=MASS_TOLERANCES[query.dtype],
        grad_output=torch.randn_like(query),
    )


# ------------------------------------------------------------------------------------------- parity and table


def check_parity(
    layer: SpatiallyModulatedCoAttention, scene: Scene, inputs: CaseInputs, backend: str
) -> tuple[str, bool]:
    """A line that compares a backend with float64 PyTorch on the photographs, and whether it passed."""
    import torch

    from smca_kernels.testing.budget import compare
    from smca_kernels.testing.check import compare_results, run_backend

    comparisons = compare_results(run_backend(inputs, backend), inputs)
    with torch.no_grad():
        output, eager = (call_layer(layer, scene, name) for name in (backend, "reference"))
        oracle = call_layer(copy.deepcopy(layer).double(), scene.to(torch.float64), "reference")
    comparisons.append(compare(output, oracle, eager, "output of the layer"))
    worst = max(comparisons, key=lambda comparison: comparison.ratio)
    passed = all(comparison.ratio <= 1.0 for comparison in comparisons)
    verdict = "within the error budget" if passed else "NOT WITHIN THE ERROR BUDGET"
    line = f"{backend}, {_dtype_name(scene)}: output, six gradients and the layer's output {verdict}"
    return f"{line}; worst error / budget {worst.ratio:.2f} ({worst.name})", passed


def measure(
    layer: SpatiallyModulatedCoAttention, scene: Scene, backends: list[str], repeats: int
) -> list[dict[str, Any]]:
    """Rows of the table: time and peak memory of the layer with each backend, forward; and with backward."""
    import torch

    from smca_kernels.profiling.measure import interleaved_times, peak_bytes

    device = scene.tokens.device
    leaves = [scene.tokens, scene.queries, *layer.parameters()]
    upstream = torch.randn_like(scene.queries)

    def forward(backend: str, repeat: int = 0) -> None:
        with torch.no_grad():
            call_layer(layer, scene, backend)

    def both(backend: str, repeat: int = 0) -> None:
        torch.autograd.grad(call_layer(layer, scene, backend), leaves, upstream)

    dtype = _dtype_name(scene)
    rows: dict[str, dict[str, Any]] = {name: {"backend": name, "dtype": dtype} for name in backends}
    for step, function in (("forward", forward), ("both", both)):
        calls = {name: partial(function, name) for name in backends}
        for name, seconds in interleaved_times(calls, repeats, device).items():
            rows[name][f"{step}_seconds"] = statistics.median(seconds)
            rows[name][f"{step}_peak_bytes"] = peak_bytes(calls[name], device)
    return list(rows.values())


def _dtype_name(scene: Scene) -> str:
    return str(scene.tokens.dtype).removeprefix("torch.")


def format_table(rows: list[dict[str, Any]]) -> str:
    """The measured rows as a Markdown table; the speed-up is against the naive row of the same dtype."""
    header = ["dtype", "backend", "forward", "", "forward + backward", "", "peak forward", "peak both"]
    cells = [header, ["---:"] * len(header)]
    for row in rows:
        naive = next(r for r in rows if r["backend"] == "reference" and r["dtype"] == row["dtype"])
        line = [row["dtype"], "naive" if row is naive else row["backend"]]
        for step in ("forward_seconds", "both_seconds"):
            line += [f"{row[step] * 1e3:.1f} ms", f"{naive[step] / row[step]:.1f} ×"]
        cells.append(line + [f"{row[f'{step}_peak_bytes'] / 1e6:.0f} MB" for step in ("forward", "both")])
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    padded = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


# --------------------------------------------------------------------------------------------------- pictures


def attention_of_one(
    layer: SpatiallyModulatedCoAttention, scene: Scene, photographs: Sequence[Photograph]
) -> list[tuple[tuple[float, float], QueryAttention]]:
    """Find the query nearest to each photograph's point: where it is, in pixels, and what it attends to."""
    import torch

    points = scene.reference_logits.sigmoid().cpu()  # [B, N, 2]
    wanted = torch.tensor([photograph.point for photograph in photographs])
    chosen = (points - wanted[:, None]).norm(dim=-1).argmin(1).tolist()
    attention = layer.attention_map(
        scene.queries, scene.tokens, scene.spatial_shapes, queries=chosen, **scene.geometry()
    )
    prior = scene.prior(layer)
    found = []
    for b, (photograph, query) in enumerate(zip(photographs, chosen, strict=True)):
        height, width = photograph.image.shape[-2:]
        x, y = (points[b, query] * torch.tensor([width, height])).tolist()
        cells = [attention[s][b, :, b, :rows, :columns] for s, (rows, columns) in enumerate(scene.valid_shapes[b])]
        found.append(((x, y), QueryAttention.of(cells, prior, b, query, scene.strides)))
    return found


def draw(
    layer: SpatiallyModulatedCoAttention,
    scene: Scene,
    photographs: Sequence[Photograph],
    footnote: str,
    path: Path,
) -> None:
    """Prior (ellipses) and attention (colour) of one query a photograph: a column a head, a row a scale."""
    import matplotlib
    import torch

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    points = scene.reference_logits.sigmoid().cpu()
    figure = pyplot.figure(figsize=(23, 6.3 * len(photographs) + 1.2), dpi=100, layout="constrained")
    figure.suptitle("SMCA co-attention: where one object query looks, per head and scale\n", fontsize=20, weight="bold")
    figure.supxlabel("\n" + footnote, fontsize=12, color="#333333")
    blocks = figure.subfigures(len(photographs), 1, hspace=0.04, squeeze=False)[:, 0]
    shown = attention_of_one(layer, scene, photographs)
    for block, photograph, grid_points, (here, query) in zip(blocks, photographs, points, shown, strict=True):
        pixels = displayable(photograph.image)
        height, width = pixels.shape[:2]
        grid = block.add_gridspec(len(scene.strides), HEADS + 1, width_ratios=[3.4] + [1.0] * HEADS)
        left = block.add_subplot(grid[:, 0])
        left.imshow(pixels)
        frame = window(list(here), width, height)
        corner, side = (frame[0], frame[2]), frame[1] - frame[0]
        left.add_patch(Rectangle(corner, side, side, fill=False, color=POINT_COLOR, linewidth=1.5))
        left.plot(*(grid_points * torch.tensor([width, height])).T, ".", color="white", markersize=2.5, alpha=0.7)
        left.plot(*here, "*", color=POINT_COLOR, markersize=22, markeredgecolor="black")
        left.set_title(f"{photograph.name}, {width} × {height} px; the panels show the frame", fontsize=13)
        left.set_axis_off()
        draw_heads(block, grid, pixels, query, here, frame)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)


def draw_prior(
    layer: SpatiallyModulatedCoAttention,
    scene: Scene,
    photographs: Sequence[Photograph],
    footnote: str,
    path: Path,
) -> None:
    """The prior of one query over the first photograph: a panel a scale, an ellipse a head, 1200 pixels wide."""
    import matplotlib
    from PIL import Image

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pixels = displayable(photographs[0].image)
    height, width = pixels.shape[:2]
    point, query = attention_of_one(layer, scene, photographs)[0]
    inches = PRIOR_PIXELS / 100
    size = (inches, inches / len(scene.strides) * height / width + 0.75)
    figure, panels = pyplot.subplots(1, len(scene.strides), figsize=size, dpi=100, layout="constrained", squeeze=False)
    for s, (axes, stride) in enumerate(zip(panels[0], scene.strides, strict=True)):
        draw_priors(axes, pixels, query, s, point)
        weight = "" if query.scale_weights is None else f", weight {query.scale_weights[s]:.2f}"
        axes.set_title(f"stride {stride}{weight}", fontsize=11)
    figure.supxlabel(
        "Prior of one object query (star). Ellipses: one standard deviation around the centre (+) of each head. "
        f"Light: the largest of the heads.\n{footnote}",
        fontsize=9,
        color="#333333",
    )
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    pyplot.close(figure)
    with replacing(path) as temporary, Image.open(drawn) as opened:
        # A palette makes the file smaller; the octree's keeps the few pixels of the star in their colour.
        picture = opened.convert("RGB")
        palette = picture.quantize(256, Image.Quantize.FASTOCTREE)
        picture.quantize(palette=palette).save(temporary, format="PNG", optimize=True)


# ------------------------------------------------------------------------------------------------------- demo


class Steps:
    """A log on screen: which step of how many is under way, and for how long the demo has run."""

    def __init__(self, total: int) -> None:
        self.total, self.number, self.began = total, 0, time.perf_counter()

    def start(self, what: str) -> None:
        self.number += 1
        elapsed = time.perf_counter() - self.began
        print(f"[{self.number}/{self.total}] {elapsed:5.1f} s  {what} …", flush=True)

    def log(self, line: str) -> None:
        print(f"      {line}", flush=True)


def describe_device(device: torch.device, seed: int) -> dict[str, str]:
    """Facts about the run for its report, which are printed as its first line."""
    import torch

    from smca_kernels.tools.env import describe

    facts = describe(device) | {"torch": torch.__version__, "seed": str(seed)}
    print(f"smca demo on {device}: {', '.join(f'{name} {fact}' for name, fact in facts.items())}")
    return facts


def show(
    scene: Scene, photographs: Sequence[Photograph], backbone: str, facts: Mapping[str, str], steps: Steps, out: Path
) -> int:
    """Check, time and draw the layer on photographs: three steps on screen, two pictures and results.json.

    Args:
        scene: of the photographs.
        photographs: of the scene, in its order.
        backbone: what made the scene's maps, in words.
        facts: of `describe_device`.
        steps: those of the demo.
        out: the folder to write to.

    Returns:
        The exit status: 0; 1 if a backend is not within the error budget.
    """
    import torch

    from smca_kernels.profiling.measure import available_backends

    device = scene.tokens.device
    steps.start("parity with naive PyTorch")
    layer = build_layer(scene.strides, device).eval()
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    in_dtype = {dtype: (copy.deepcopy(layer).to(dtype), scene.to(dtype)) for dtype in dtypes}
    verdicts = []
    for dtype in dtypes:
        inputs = operator_inputs(*in_dtype[dtype])
        backends, reasons = available_backends(inputs)
        for backend in backends:
            verdicts.append(check_parity(*in_dtype[dtype], inputs, backend))
            steps.log(verdicts[-1][0])
    passed = bool(verdicts) and all(within for _, within in verdicts)

    repeats = REPEATS[device.type]
    steps.start(f"time and memory of one call of the layer on the batch, {repeats} repeats")
    rows = [row for dtype in dtypes for row in measure(*in_dtype[dtype], ["reference", *backends], repeats)]
    print(f"\n{format_table(rows)}\n")
    counted = {"cuda": "by the CUDA allocator", "cpu": "from torch.profiler's record of allocations"}
    print("Medians of calls in turns. Peak: most bytes held beyond those held before the call, counted")
    print(f"{counted[device.type]}; both is forward + backward.")
    for name, reason in reasons.items():
        print(f"{name} was not run: {reason}.")
    print()

    steps.start("picture and results")
    picture, prior, results = (out / name for name in ("smca_attention.png", "prior.png", "results.json"))
    untrained = f"The layer is untrained, on {backbone.split(':')[0]}."
    draw(layer, scene, photographs, f"{EXPLANATION} {untrained}", picture)
    draw_prior(layer, scene, photographs, untrained, prior)
    report = {
        **facts,
        "backbone": backbone,
        "spatial_shapes": scene.spatial_shapes,
        "parity": [{"line": line, "passed": within} for line, within in verdicts],
        "rows": rows,
        "not_run": reasons,
    }
    write_text(results, json.dumps(report, indent=2) + "\n")
    steps.log(f"{picture}, {prior}, {results}")
    seconds = time.perf_counter() - steps.began
    print(f"{'Parity holds' if passed else 'PARITY FAILED'}; {seconds:.0f} s in all.")
    return 0 if passed else 1
