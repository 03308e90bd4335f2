"""The presets against the paper's counts, and `smca presets`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import pytest
import torch

from smca_kernels.tools.cli import main
from smca_model import PRESETS, SMCA, Config, build
from smca_model.presets import IMAGE_SIZE, PAPER, count


@pytest.mark.parametrize("name", PAPER)
def test_parameters_are_within_1_5_percent_of_the_paper_s(name):
    with torch.device("meta"):
        model = SMCA(PRESETS[name])
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    assert parameters / 1e6 == pytest.approx(PAPER[name][0], rel=0.015)


@pytest.mark.parametrize("name", ["detr-r50", "detr-dc5-r50", "smca-r50"])
def test_multiply_adds_are_within_2_percent_of_the_paper_s(name):
    _, operations = count(PRESETS[name], IMAGE_SIZE)

    assert operations / 1e9 == pytest.approx(PAPER[name][1], rel=0.02)


def test_multiply_adds_are_those_of_matrix_products_and_convolutions():
    config = Config(
        backbone="tiny", strides=(8,), encoder="1intra", hidden_dim=32, num_heads=2, ffn_dim=48, decoder_layers=1,
        num_queries=7, num_classes=5, modulation="none",
    )  # fmt: skip
    N, T, C = 7, 4 * 3, 32
    backbone = 9 * (
        16 * 12 * 3 * 32 + 8 * 6 * 32 * 64 + 2 * 8 * 6 * 64 * 64 + 4 * 3 * 64 * 128 + 2 * 4 * 3 * 128 * 128
    )  # fmt: skip
    encoder = T * 4 * C * C + 2 * T * T * C + 2 * T * C * 48
    decoder = N * 4 * C * C + 2 * N * N * C + N * 2 * C * C + T * 2 * C * C + 2 * N * T * C + 2 * N * C * 48
    heads = N * (C * 5 + 2 * C * C + 4 * C)

    _, operations = count(config, (32, 24))

    assert operations == backbone + T * 128 * C + encoder + decoder + heads


def test_the_presets_command_prints_counts_beside_the_paper_s(capsys):
    assert main(["presets", "smca-ms-noshare-r50", "smca-tiny"]) == 0

    *_, unshared, tiny = capsys.readouterr().out.splitlines()
    assert unshared.split() == ["smca-ms-noshare-r50", "47.42", "47.3", "+0.2%", "141.40", "–", "800×1120"]
    assert tiny.split()[0] == "smca-tiny"
    assert tiny.split()[-1] == "96×96"


def test_a_missing_package_is_told_with_what_installs_it(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "smca_model.detector", raising=False)

    assert main(["presets"]) == 2

    message = "smca presets: error: needs torchvision: pip install 'smca_kernels[model]'\n"
    assert capsys.readouterr() == ("", message)


def test_the_image_size_can_be_chosen(capsys):
    assert main(["presets", "smca-tiny", "--size", "32", "64"]) == 0

    assert capsys.readouterr().out.splitlines()[-1].endswith("32×64")


def test_an_unknown_preset_is_refused_with_the_names_there_are(capsys):
    assert main(["presets", "smca-r18"]) == 2
    with pytest.raises(ValueError, match=r"preset must be one of detr-r50, .*, got 'smca-r18'"):
        build("smca-r18")

    assert "NAME must be among detr-r50," in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"dropout": "half"}, "dropout must be a float, got 'half'"),
        ({"encoder": 3}, "encoder must be a str, got 3"),
        ({"dilation": 1}, "dilation must be a bool, got 1"),
        ({"num_heads": True}, "num_heads must be a int, got True"),
        ({"strides": 8}, r"strides must be a tuple\[int, ...\], got 8"),
        ({"num_queries": 0}, "num_queries must be at least 1, got 0"),
    ],
)
def test_overrides_of_another_kind_are_refused_by_name(override, message):
    with pytest.raises(ValueError, match=message):
        build("smca-tiny", **override)


def test_whole_numbers_and_lists_do_as_overrides():
    assert (
        build("smca-tiny", dropout=0, strides=[8, 16]).config == build("smca-tiny", dropout=0.0, strides=(8, 16)).config
    )


def test_unknown_overrides_are_refused_with_the_fields_there_are():
    with pytest.raises(ValueError, match=r"overrides must be among backbone, beta, .*, got colour"):
        build("smca-tiny", colour="red")


@pytest.mark.parametrize(
    ("field", "wrong", "message"),
    [
        ("num_queries", 0, "num_queries must be at least 1, got 0"),
        ("strides", (8, 16.5), r"strides must be a tuple\[int, ...\], got \(8, 16\.5\)"),
        ("strides", (0, 8), "strides must be at least 1, got 0"),
        ("hidden_dim", 30, "hidden_dim must be a multiple of 4, got 30"),
        ("hidden_dim", 36, "hidden_dim must be a multiple of num_heads=8, got 36"),
        ("strides", (8, 8), r"strides must be one or more, ascending, got \(8, 8\)"),
        ("strides", (16, 8), r"strides must be one or more, ascending, got \(16, 8\)"),
        ("strides", (), r"strides must be one or more, ascending, got \(\)"),
        ("dropout", 5.0, "dropout must be in 0 … 1, got 5"),
        ("dropout", -0.1, r"dropout must be in 0 … 1, got -0\.1"),
        ("dropout", float("nan"), "dropout must be in 0 … 1, got nan"),
        ("encoder", "6inter", "encoder must be such as"),
        ("modulation", "gaussian", "modulation must be one of"),
    ],
)
def test_a_configuration_that_can_not_be_built_is_refused_by_the_field(field, wrong, message):
    with pytest.raises(ValueError, match=message):
        build("smca-tiny", **{"num_heads": 8, field: wrong})


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_survive_json(name):
    assert Config(**json.loads(json.dumps(asdict(PRESETS[name])))) == PRESETS[name]


def test_building_touches_no_network(monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    monkeypatch.setattr("urllib.request.urlopen", no_network)

    build("smca-r50", decoder_layers=1, encoder="1intra")
