"""`smca env`: the report is complete, true, and never fails on what it reports."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from smca_kernels import smca_attention
from smca_kernels.tools import cli
from smca_kernels.tools import env as environment

DTYPES = ("float32", "float16", "bfloat16", "float64")


def test_the_report_tells_a_backend_for_every_dtype_on_every_device() -> None:
    facts = environment.report()
    assert [told["device"] for told in facts["devices"]] == [str(device) for device in environment.devices()]
    for device in facts["devices"]:
        assert set(device["backends"]) == set(DTYPES)
        for choice in device["backends"].values():
            assert {choice["backend"], *choice["passed_over"]} == {"triton", "sdpa", "reference"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", environment.devices(), ids=str)
def test_the_backend_that_is_reported_serves_on_that_device(device: torch.device, dtype: str) -> None:
    backend = environment.backends(device)[dtype]["backend"]
    query, key = (torch.randn(1, 1, n, 32, device=device, dtype=getattr(torch, dtype)) for n in (1, 16))
    center = torch.zeros(1, 1, 1, 1, 2, device=device, dtype=torch.promote_types(query.dtype, torch.float32))
    smca_attention(query, key, key, center, center, [(4, 4)], backend=backend)


def test_a_dtype_that_a_device_refuses_is_reported_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> NoReturn:
        raise TypeError("this device has no float64\nand more")

    monkeypatch.setattr(environment, "explain_backend", refuse)
    choice = environment.backends(torch.device("cpu"))["float64"]
    assert choice == {"backend": "none", "reason": "this device has no float64", "passed_over": {}}


def test_a_missing_package_is_reported_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> NoReturn:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(environment, "import_module", fail)
    assert environment.versions()["triton"] == "can't be imported (No module named 'triton')"


def test_dtypes_with_the_same_backend_and_reasons_share_their_lines() -> None:
    fused = {"backend": "triton", "reason": "it is fastest", "passed_over": {"sdpa": "it is slower"}}
    other = {"backend": "sdpa", "reason": "it serves", "passed_over": {"triton": "no float64"}}
    backends = {"float32": fused, "float16": fused, "float64": other}
    gpu = {"device": "cuda:0", "name": "A GPU", "capability": "9.0", "backends": backends}
    told = environment.format_report({"versions": {"torch": "2.11.0"}, "interpreter": "", "devices": [gpu]})
    assert told.splitlines() == [
        "torch            2.11.0",
        "TRITON_INTERPRET not set",
        "",
        "cuda:0: A GPU, capability 9.0",
        "  float32, float16: triton, it is fastest",
        "    not sdpa: it is slower",
        "  float64: sdpa, it serves",
        "    not triton: no float64",
    ]


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06"),
        ("", ""),
    ],
    ids=["proprietary", "open", "none"],
)
def test_the_driver_is_read_from_the_kernel_where_nvidia_smi_is_missing(
    monkeypatch: pytest.MonkeyPatch, line: str, version: str
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(environment, "_text", lambda path: line)
    assert environment.nvidia_driver() == version


def test_a_gpu_is_described_by_what_is_known_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="A GPU", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(environment, "nvidia_driver", lambda: "")
    assert environment.describe(torch.device("cuda:0")) == {
        "name": "A GPU",
        "capability": "9.0",
        "multiprocessors": "132",
        "memory": "80.0 GiB",
    }


def test_the_driver_is_asked_of_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 535.129.03\necho 535.129.03\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert environment.nvidia_driver() == "535.129.03"


def test_a_failing_nvidia_smi_does_not_break_the_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(environment, "_text", lambda path: "")
    assert environment.nvidia_driver() == ""


def test_json_writes_the_report_that_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "env.json"
    assert cli.main(["env", "--json", str(path)]) == 0
    facts = json.loads(path.read_text())
    assert capsys.readouterr().out == environment.format_report(facts) + "\n"


def test_json_into_a_missing_folder_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", "--json", str(tmp_path / "nowhere" / "env.json")]) == 2
    assert "smca env: error: --json must name a file in an existing folder" in capsys.readouterr().err
