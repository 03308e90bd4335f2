"""Settings are of the types and in the ranges that a run needs, also where no command line has looked at them."""

from __future__ import annotations

from typing import Any

import pytest

from smca_model.training.settings import Settings

TINY = ("hidden_dim=32", "num_heads=2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"clip": 0.0}, "clip must be positive, got 0.0"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"precision": "fp8"}, "precision must be one of .*, got 'fp8'"),
        ({"overrides": ("dropout",)}, "overrides must be of the form NAME=VALUE, got 'dropout'"),
        (
            {"overrides": ("num_classes=2",)},
            "num_classes, which follows from the classes of --data, got 'num_classes=2'",
        ),
        ({"overrides": ("backend=sdpa",)}, "backend, which has an option, --backend, got 'backend=sdpa'"),
        ({"overrides": ("preset=smca-r50",)}, "preset, which has an option, --preset, got 'preset=smca-r50'"),
        ({"overrides": ("pretrained_backbone=0",)}, "which has an option, --pretrained-backbone, got 'pretrained_"),
        ({"overrides": ("lr=1",)}, "lr, which has an option, --lr, got 'lr=1'"),
        ({"overrides": ("beta=1", "beta=2")}, "overrides must name a field once, got beta twice"),
        ({"overrides": ("colour=red",)}, "overrides must be among .*, got colour"),
        ({"overrides": ("dropout=half",)}, "dropout must be a float, got 'half'"),
        ({"weights": "a.pt", "detr_weights": "b.pt"}, "weights and detr_weights can't both be a start"),
        ({"preset": "smca-r18", "overrides": ()}, "preset must be one of .*, got 'smca-r18'"),
        ({"lr": float("nan")}, "lr must be at least 0, got nan"),
        ({"flip": "no"}, "flip must be a bool, got 'no'"),
        ({"epochs": "5"}, "epochs must be a int, got '5'"),
        ({"batch_size": 1.5}, "batch_size must be a int, got 1.5"),
        ({"seed": True}, "seed must be a int, got True"),
        ({"lr": "1e-4"}, "lr must be a float, got '1e-4'"),
        ({"weights": None}, "weights must be a str, got None"),
        ({"pretrained_backbone": "no"}, r"pretrained_backbone must be a bool \| None, got 'no'"),
        ({"sizes": 800}, r"sizes must be a tuple\[int, ...\], got 800"),
        ({"sizes": (800, "640")}, r"sizes must be a tuple\[int, ...\], got \(800, '640'\)"),
        ({"sizes": ()}, r"sizes must be one or more short sides of at least 1 pixel, got \(\)"),
        ({"sizes": (800, 0)}, r"sizes must be one or more short sides of at least 1 pixel, got \(800, 0\)"),
        ({"max_size": 0}, "max_size must be at least 1, got 0"),
        ({"loggers": "tensorboard"}, r"loggers must be a tuple\[str, ...\], got 'tensorboard'"),
        ({"backend": "x"}, "backend must be one of .*, got 'x'"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**{"preset": "smca-tiny", "overrides": TINY} | changes)


def test_settings_may_be_lists_and_whole_numbers_as_a_file_may_have_them() -> None:
    chosen = Settings(sizes=[40, 48], loggers=[], lr=1, pretrained_backbone=False)
    assert (chosen.sizes, chosen.loggers, chosen.lr) == ((40, 48), (), 1)


def test_overrides_are_json_where_they_can_be() -> None:
    chosen = Settings(preset="smca-tiny", overrides=("dropout=0.5", "geometry=paper", "strides=[8, 16]"))
    assert chosen.model_overrides() == {"dropout": 0.5, "geometry": "paper", "strides": [8, 16]}
