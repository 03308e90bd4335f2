"""`smca demo`: the SMCA layer on two photographs, checked against naive PyTorch, timed, and drawn.

Photographs → resize, normalise, pad as detectors do → ResNet-50 → maps at strides 16, 32 and 64 → the layer
with 300 queries on a grid of reference points. Nothing is trained but (if its weights can be had) the ResNet.
A query's content is the map under its reference point, and keys are projected as queries are, so that q·k
compares appearance.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smca_kernels.files import replacing, write_text
from smca_kernels.pictures import EXPLANATION, MEAN, POINT_COLOR, STD, QueryAttention, displayable, draw_heads, window

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torchvision.models import ResNet

    from smca_kernels.nn import SpatiallyModulatedCoAttention, SpatialPriorOutput
    from smca_kernels.testing.cases import CaseInputs

STRIDES = (16, 32, 64)
EMBED_DIM, HEADS = 256, 8
QUERY_ROWS, QUERY_COLUMNS = 15, 20
QUERIES = QUERY_ROWS * QUERY_COLUMNS
# scikit-image ships these inside its package. The picture shows the query nearest to the point (x, y)
# (in parts of width and height).
PHOTOGRAPHS = {"astronaut": (0.43, 0.24), "coffee": (0.47, 0.36)}
SHORT_SIDE = {"cuda": 800, "cpu": 512}
MAX_SIDE = 1333
DOWNLOAD_SECONDS = 45
REPEATS = {"cuda": 50, "cpu": 5}
SEED = 0


# -------------------------------------------------------------------------------- photographs to feature maps


def load_photographs(names: list[str], short_side: int) -> list[Tensor]:
    """Photographs [3, height, width] as detectors take them: short side given, long ≤ 1333, normalised."""
    import skimage.data
    import torch
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(short_side, max_size=MAX_SIDE, antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return [transform(getattr(skimage.data, name)()).as_subclass(torch.Tensor) for name in names]


def pad_batch(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Images [3, h, w] at the top left of a batch [B, 3, H, W] of zeros, and their (height, width) [B, 2]."""
    import torch

    sizes = torch.tensor([image.shape[-2:] for image in images])
    height, width = sizes.amax(0).tolist()
    batch = images[0].new_zeros(len(images), 3, height, width)
    for padded, image in zip(batch, images, strict=True):
        padded[:, : image.shape[-2], : image.shape[-1]] = image
    return batch, sizes


def valid_cells(image_sizes: Tensor) -> Tensor:
    """(height, width) in cells of the part of each grid that is image: [B, 2] pixels → [B, S, 2]."""
    import torch

    strides = torch.tensor(STRIDES)[:, None]
    return (image_sizes[:, None] + strides - 1) // strides


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    import socket

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def build_resnet50() -> tuple[ResNet, str]:
    """torchvision's ResNet-50, with ImageNet weights if they can be had soon, and a line that says which."""
    from torchvision.models import ResNet50_Weights, resnet50

    found: dict[str, Any] = {}

    def download() -> None:
        try:
            with _socket_timeout(5.0):
                weights = ResNet50_Weights.IMAGENET1K_V1
                found["state"] = weights.get_state_dict(progress=False, check_hash=True)
        except Exception as error:  # no network, a proxy's page instead, a full disk: random ones will do
            found["reason"] = str(getattr(error, "reason", error))

    # In a thread, because name resolution and a trickling connection obey no timeout.
    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    model = resnet50()
    if "state" in found:
        model.load_state_dict(found["state"])
        return model.eval(), "ResNet-50 with ImageNet weights"
    reason = found.get("reason", f"nothing after {DOWNLOAD_SECONDS} s")
    line = f"ResNet-50 with RANDOM weights: the ImageNet weights could not be downloaded ({reason})"
    # Batch norm has no statistics yet; in training mode it takes those of the batch.
    return model.train(), line


def feature_maps(resnet: ResNet, batch: Tensor) -> list[Tensor]:
    """Maps [B, 256, height, width] at strides 16, 32 and 64, normalised at every cell."""
    import torch
    from torch import nn

    stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool, resnet.layer1, resnet.layer2)
    projections = nn.ModuleList(
        [
            nn.Conv2d(1024, EMBED_DIM, kernel_size=1),
            nn.Conv2d(2048, EMBED_DIM, kernel_size=1),
            nn.Conv2d(2048, EMBED_DIM, kernel_size=3, stride=2, padding=1),
        ]
    ).to(batch.device)
    with torch.no_grad():
        c4 = resnet.layer3(stem(batch))
        c5 = resnet.layer4(c4)
        maps = [project(features) for project, features in zip(projections, (c4, c5, c5), strict=True)]
        return [nn.functional.layer_norm(m.movedim(1, -1), (EMBED_DIM,)).movedim(-1, 1) for m in maps]


# ----------------------------------------------------------------------------------------- the layer's inputs


@dataclass(frozen=True)
class Scene:
    """What the layer is called with: a batch of photographs seen by 300 queries each."""

    tokens: Tensor  # [B, T, E], key and value
    queries: Tensor  # [B, N, E], query and prior features
    reference_logits: Tensor  # [B, N, 2]
    image_sizes: Tensor  # [B, 2]
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


def make_scene(maps: list[Tensor], image_sizes: Tensor) -> Scene:
    """Tokens of all maps, and a query at every reference point with what the finest map has under it."""
    import torch

    device = maps[0].device
    points = reference_points()
    cells = (points * image_sizes[:, None].flip(-1) / STRIDES[0]).long().to(device)  # [B, N, 2]
    rows = torch.arange(len(image_sizes), device=device)[:, None]
    return Scene(
        tokens=torch.cat([m.flatten(2) for m in maps], -1).transpose(1, 2).contiguous(),
        queries=maps[0][rows, :, cells[..., 1], cells[..., 0]],
        reference_logits=points.logit().to(device).expand(len(image_sizes), -1, -1),
        image_sizes=image_sizes.to(device),
        spatial_shapes=tuple((m.shape[-2], m.shape[-1]) for m in maps),
        valid_shapes=valid_cells(image_sizes).to(device),
    )


def build_layer(device: torch.device) -> SpatiallyModulatedCoAttention:
    """An untrained layer of the official geometry, with two changes for something to see.

    Keys are projected as queries are, and the object scale s varies around its initial 1 from query to query.
    """
    import torch

    from smca_kernels.nn import SpatiallyModulatedCoAttention

    layer = SpatiallyModulatedCoAttention(EMBED_DIM, HEADS, STRIDES, predicts_center=False, batch_first=True)
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


# ---------------------------------------------------------------------------------------------------- picture


def draw(layer: SpatiallyModulatedCoAttention, scene: Scene, images: list[Tensor], footnote: str, path: Path) -> None:
    """Prior (ellipses) and attention (colour) of one query a photograph: a column a head, a row a scale."""
    import matplotlib
    import torch

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    points = reference_points()
    wanted = torch.tensor(list(PHOTOGRAPHS.values()))
    chosen = torch.cdist(wanted, points).argmin(1).tolist()
    tokens, shapes = scene.tokens, scene.spatial_shapes
    attention = layer.attention_map(scene.queries, tokens, shapes, queries=chosen, **scene.geometry())
    prior = scene.prior(layer)

    figure = pyplot.figure(figsize=(23, 6.3 * len(images) + 1.2), dpi=100, layout="constrained")
    figure.suptitle("SMCA co-attention: where one object query looks, per head and scale\n", fontsize=20, weight="bold")
    figure.supxlabel("\n" + footnote, fontsize=12, color="#333333")
    blocks = figure.subfigures(len(images), 1, hspace=0.04, squeeze=False)[:, 0]
    for b, (block, image, name) in enumerate(zip(blocks, images, PHOTOGRAPHS, strict=True)):
        photograph = displayable(image)
        height, width = image.shape[-2:]
        here = points[chosen[b]] * torch.tensor([width, height])
        grid = block.add_gridspec(len(STRIDES), HEADS + 1, width_ratios=[3.4] + [1.0] * HEADS)
        left = block.add_subplot(grid[:, 0])
        left.imshow(photograph)
        frame = window(here.tolist(), width, height)
        corner, side = (frame[0], frame[2]), frame[1] - frame[0]
        left.add_patch(Rectangle(corner, side, side, fill=False, color=POINT_COLOR, linewidth=1.5))
        left.plot(*(points * torch.tensor([width, height])).T, ".", color="white", markersize=2.5, alpha=0.7)
        left.plot(*here, "*", color=POINT_COLOR, markersize=22, markeredgecolor="black")
        left.set_title(f"{name}, {width} × {height} px; the panels show the frame", fontsize=13)
        left.set_axis_off()
        cells = [attention[s][b, :, b, :rows, :columns] for s, (rows, columns) in enumerate(scene.valid_shapes[b])]
        query = QueryAttention.of(cells, prior, b, chosen[b], STRIDES)
        draw_heads(block, grid, photograph, query, tuple(here.tolist()), frame)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)


# ----------------------------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `smca demo`."""
    parser.description = (
        "Two photographs through ResNet-50 and the SMCA layer with 300 queries: parity with naive PyTorch, "
        "a table of time and memory, and a picture of prior and attention. Exit status 1 if parity fails."
    )
    parser.add_argument("--out", type=Path, default=Path("demo_output"), metavar="FOLDER", help="default: %(default)s")


class Steps:
    """Says on screen which step of how many is under way, and for how long the demo has run."""

    def __init__(self, total: int) -> None:
        self.total, self.number, self.began = total, 0, time.perf_counter()

    def start(self, what: str) -> None:
        self.number += 1
        elapsed = time.perf_counter() - self.began
        print(f"[{self.number}/{self.total}] {elapsed:5.1f} s  {what} …", flush=True)

    def log(self, line: str) -> None:
        print(f"      {line}", flush=True)


def run(args: argparse.Namespace) -> int:
    """`smca demo`: exit status 0; 1 if a backend is not within the error budget; 2 if it can't start."""
    wanted = ("torchvision", "skimage", "matplotlib")
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        print(f"smca demo needs {', '.join(missing)}: pip install 'smca_kernels[demo]'", file=sys.stderr)
        return 2
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out must be a folder that can be written, got {args.out} ({error})") from None
    import torch

    from smca_kernels.profiling.measure import available_backends
    from smca_kernels.tools.env import describe

    torch.manual_seed(SEED)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = describe(device) | {"torch": torch.__version__, "seed": str(SEED)}
    print(f"smca demo on {device}: {', '.join(f'{name} {fact}' for name, fact in facts.items())}")
    steps = Steps(total=5)

    steps.start("photographs")
    images = load_photographs(list(PHOTOGRAPHS), SHORT_SIDE[device.type])
    batch, image_sizes = pad_batch(images)
    sizes = [f"{name} {w} × {h}" for name, (h, w) in zip(PHOTOGRAPHS, image_sizes.tolist(), strict=True)]
    steps.log(f"{', '.join(sizes)}, padded to {batch.shape[-1]} × {batch.shape[-2]} pixels")

    steps.start(f"feature maps (up to {DOWNLOAD_SECONDS} s for the weights, if they are not here yet)")
    resnet, weights = build_resnet50()
    steps.log(weights)
    scene = make_scene(feature_maps(resnet.to(device), batch.to(device)), image_sizes)
    grids = " + ".join(f"{height}×{width}" for height, width in scene.spatial_shapes)
    steps.log(f"grids of {grids} = {scene.tokens.shape[1]} keys, {QUERIES} queries an image, {HEADS} heads")

    steps.start("parity with naive PyTorch")
    layer = build_layer(device).eval()
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
    picture, results = args.out / "smca_attention.png", args.out / "results.json"
    draw(layer, scene, images, _footnote(weights), picture)
    report = {
        **facts,
        "backbone": weights,
        "spatial_shapes": scene.spatial_shapes,
        "parity": [{"line": line, "passed": within} for line, within in verdicts],
        "rows": rows,
        "not_run": reasons,
    }
    write_text(results, json.dumps(report, indent=2) + "\n")
    steps.log(f"{picture}, {results}")
    seconds = time.perf_counter() - steps.began
    print(f"{'Parity holds' if passed else 'PARITY FAILED'}; {seconds:.0f} s in all.")
    return 0 if passed else 1


def _footnote(weights: str) -> str:
    return f"{EXPLANATION} The layer is untrained, on {weights.split(':')[0]}."
