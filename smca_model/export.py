"""`smca export`: a detector as one file for any number of images of any size, in ONNX or as torch.export's program.

`OneSize` is what is exported: the detector without lists, tensors in and out. It attends by the reference backend,
whose operations every runtime has, so that the file needs none of this library. Before the file takes its name, it is
run on several sizes beside the detector.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smca_kernels.files import replacing
from smca_kernels.pictures import MEAN, STD
from smca_kernels.tools.arguments import check_output_file, check_packages, first_line, naming_option

from .onnx_detector import FORMAT, INPUT, OUTPUTS, open_session

if TYPE_CHECKING:
    from .detector import SMCA

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
PACKAGES = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "torch": ()}
OPSET = 20
TOLERANCE = 1e-4  # of the largest logit, and of an image's side
METADATA_FILE = "smca.json"  # in a file of torch.export

PREPROCESSING = (
    "images: float32 [batch, 3, height, width], all of one size, RGB in 0…1, minus mean, divided by std, channel by "
    "channel; resized so that the short side is image_size[0] pixels, or fewer where the long one would exceed "
    "image_size[1]; no side shorter than min_side"
)
POSTPROCESSING = (
    "logits: [batch, queries, classes], the score of each class is their sigmoid, and there is no class for no object; "
    "take the 100 best scores of all pairs of a query and a class; a class's name is classes[index]. boxes: [batch, "
    "queries, 4], (center x, center y, width, height) in parts of the image's width and height"
)


class OneSize(nn.Module):
    """A detector on images of one size without padding, as exporters want it: a tensor in, two out.

    Args:
        model: the detector; shared, not copied.
    """

    def __init__(self, model: SMCA) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, N, num_classes] and boxes [B, N, 4], as `SMCA.forward` gives them, of images [B, 3, H, W]."""
        outputs = self.model.detect(self.model.backbone(images), [(images.shape[2], images.shape[3])])
        return outputs["pred_logits"], outputs["pred_boxes"]


def min_side(model: SMCA) -> int:
    """The shortest side of an image, in pixels, that an exported detector takes: two cells of its coarsest scale.

    Exporters take a length of 1 for a constant.
    """
    return max(model.config.strides) + 1


def dynamic_axes(least: int) -> dict[int, Any]:
    """`dynamic_shapes` of images [B, 3, H, W] for torch's exporters; `least` is the shortest side."""
    dim = torch.export.Dim
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    if version < (2, 11):  # which can't prove that no size in a range is an exception
        return dict.fromkeys((0, 2, 3), dim.AUTO)
    return {0: dim("batch", min=1), 2: dim("height", min=least), 3: dim("width", min=least)}


def export(model: SMCA, path: Path, format: str = "onnx") -> None:
    """Write a detector as a file that runs without this library, in float32; the file is replaced as a whole.

    Input "images" [batch, 3, height, width], outputs "logits" and "boxes" as `OneSize` has them; batch, height and
    width may be any, sides from `min_side` on. Metadata say how images are prepared and outputs are read: in ONNX
    (opset 20) among the model's properties, in a program of torch.export in its extra file "smca.json".

    Args:
        model: on any device, with any backend; it is not changed.
        path: the file, in a folder that exists.
        format: "onnx", or "torch" for what `torch.export.load` reads.

    Raises:
        ValueError: for another format, a model that can't be exported, and one whose file would compute something else.
        OSError: with the file's name, when it can't be written.
    """
    if format not in SUFFIXES:
        raise ValueError(f"format must be one of {', '.join(map(repr, SUFFIXES))}, got {format!r}")
    least, about = min_side(model), _metadata(model)
    model = copy.deepcopy(model).cpu().float().eval()
    model.backend = "reference"
    detector = OneSize(model)
    with replacing(path) as temporary, torch.no_grad():
        run = (_export_onnx if format == "onnx" else _export_torch)(detector, least, about, temporary)
        _check(detector, run, least)


Run = Callable[[Tensor], tuple[Tensor, Tensor]]


def _export_torch(detector: OneSize, least: int, about: dict[str, str], path: Path) -> Run:
    with _explained("torch"):
        program = torch.export.export(detector, (_example(least),), dynamic_shapes=(dynamic_axes(least),))
    # As a stream: torch wants a file to be called *.pt2, and knows nothing of full disks.
    stream = io.BytesIO()
    torch.export.save(program, stream, extra_files={METADATA_FILE: json.dumps(about, ensure_ascii=False)})
    path.write_bytes(stream.getvalue())
    loaded = torch.export.load(io.BytesIO(path.read_bytes())).module()
    return lambda images: loaded(images)


def _export_onnx(detector: OneSize, least: int, about: dict[str, str], path: Path) -> Run:
    with _explained("onnx"):
        program = torch.onnx.export(
            detector,
            (_example(least),),
            dynamo=True,
            dynamic_shapes=(dynamic_axes(least),),
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(about)
    program.save(path, external_data=False)

    session = open_session(path)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, boxes = session.run(list(OUTPUTS), {INPUT: images.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(boxes)

    return run


def _metadata(model: SMCA) -> dict[str, str]:
    return {
        "format": FORMAT,
        "classes": json.dumps(model.classes, ensure_ascii=False),
        "image_size": json.dumps(model.image_size),
        "mean": json.dumps(MEAN),
        "std": json.dumps(STD),
        "min_side": str(min_side(model)),
        "preprocessing": PREPROCESSING,
        "postprocessing": POSTPROCESSING,
    }


def _example(least: int) -> Tensor:
    return torch.zeros(2, 3, least + 7, least + 31)


def _check(detector: OneSize, run: Run, least: int) -> None:
    """Compare what was exported with the detector, on sizes and numbers of images other than those it was made with."""
    generator = torch.Generator().manual_seed(0)
    nothing = "; nothing was written"
    for batch, height, width in ((1, least, 2 * least + 5), (3, 2 * least + 2, least + 1), (1, 3 * least, 3 * least)):
        images = torch.randn(batch, 3, height, width, generator=generator)
        try:
            outputs = run(images)
        except Exception as error:  # a size that was made a constant; each runtime has classes of its own
            raise ValueError(
                f"the exported detector must run on images of {list(images.shape)}, got {first_line(error)}{nothing}"
            ) from error
        for name, actual, expected in zip(OUTPUTS, outputs, detector(images), strict=True):
            off = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1.0))
            if not off <= TOLERANCE:
                raise ValueError(
                    f"the exported detector must compute what the model does, to {TOLERANCE:g}, but its {name} are off "
                    f"by {off:.1e} for images of {list(images.shape)}{nothing}"
                )


@contextlib.contextmanager
def _explained(format: str) -> Iterator[None]:
    """Exporters say what they could not do at the far end of a chain of errors, and much else besides."""
    level = logging.getLogger("onnxscript").level
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # of whatever kind the part has that could not go on
        cause: BaseException = error
        while (before := cause.__cause__ or cause.__context__) is not None:
            cause = before
        lines = str(cause).strip().splitlines() or [""]
        raise ValueError(f"the model can't be exported as {format}: {type(cause).__name__}: {lines[0]}") from error
    finally:
        logging.getLogger("onnxscript").setLevel(level)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `smca export`."""
    parser.description = (
        "Write a detector as a file that runs without this library, for any number of images of any one size; it is "
        "checked before it is written."
    )
    add = parser.add_argument
    add("weights", type=Path, metavar="WEIGHTS", help="the detector, as `smca train` writes it")
    add("--format", choices=SUFFIXES, default="onnx", help="onnx, or torch for torch.export; default: %(default)s")
    add("--out", type=Path, metavar="FILE", help="default: WEIGHTS with the suffix .onnx or .pt2")


def run(args: argparse.Namespace) -> int:
    """`smca export`: exit status 0.

    Raises:
        ValueError: for weights that can't be read, and as `export`.
        OSError: as `export`.
    """
    check_packages(("safetensors", "torchvision"), "model")
    check_packages(PACKAGES[args.format], "export")
    check_output_file("--out", args.out)
    path = args.weights.with_suffix(SUFFIXES[args.format]) if args.out is None else args.out
    from . import weights

    with naming_option("WEIGHTS"):
        model = weights.load(args.weights)
    if path.exists() and path.samefile(args.weights):
        raise ValueError(f"--out must be another file than WEIGHTS, got {path}")
    export(model, path, args.format)
    print(
        f"{path}: {INPUT} [batch, 3, height, width] from {min_side(model)} pixels a side → {', '.join(OUTPUTS)}; "
        f"agrees with the model to {TOLERANCE:g}"
    )
    return 0
