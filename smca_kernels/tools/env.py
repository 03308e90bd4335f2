"""`smca env`: versions, devices and the backend that each dtype would get, to paste into a bug report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from smca_kernels import __version__
from smca_kernels.attention import explain_backend
from smca_kernels.files import write_text
from smca_kernels.inputs import FLOATING_DTYPES
from smca_kernels.tools.arguments import check_output_file, first_line


def versions() -> dict[str, str]:
    """List versions of this library, what it builds on and the operating system; for a missing package, why."""
    runtimes = {"cuda": torch.version.cuda, "hip": torch.version.hip}
    return {
        "smca_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _module_version("triton"),
        "numpy": _module_version("numpy"),
        **{name: version for name, version in runtimes.items() if version},
        "os": platform.platform(),
    }


def devices() -> list[torch.device]:
    """The CPU, and every accelerator that torch sees."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return [torch.device("cpu")]
    count = torch.accelerator.device_count()
    return [torch.device("cpu"), *(torch.device(accelerator.type, i) for i in range(count))]


def describe(device: torch.device) -> dict[str, str]:
    """Name, capability, memory and driver of a device, those that are known."""
    if device.type == "cpu":
        facts = {
            "name": _cpu_name(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": str(torch.get_num_threads()),
        }
    elif device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count),
            "memory": f"{properties.total_memory / 2**30:.1f} GiB",
            "driver": nvidia_driver(),
        }
    else:
        facts = {"name": device.type}
    return {name: fact for name, fact in facts.items() if fact}


def nvidia_driver() -> str:
    """Version of the NVIDIA driver, or "" where it can't be had."""
    program = shutil.which("nvidia-smi")
    if program is not None:
        command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10, check=True)
            return answer.stdout.split("\n")[0].strip()
        except (subprocess.SubprocessError, OSError, UnicodeDecodeError):
            pass
    # Containers often come without the program.
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", _text("/proc/driver/nvidia/version"))
    return found[1] if found else ""


def backends(device: torch.device) -> dict[str, dict[str, Any]]:
    """Find for each dtype the backend that "auto" would choose on a device, why, and why not the others."""
    return {str(dtype).removeprefix("torch."): _backend(device, dtype) for dtype in FLOATING_DTYPES}


def report() -> dict[str, Any]:
    """Collect all that `smca env` reports, as JSON holds it."""
    return {
        "versions": versions(),
        "interpreter": os.environ.get("TRITON_INTERPRET", ""),
        "devices": [{"device": str(device), **describe(device), "backends": backends(device)} for device in devices()],
    }


def format_report(facts: dict[str, Any]) -> str:
    """A report as text; dtypes that get the same backend for the same reasons share their lines."""
    interpreter = {"TRITON_INTERPRET": facts["interpreter"] or "not set"}
    lines = [f"{name:17}{value}" for name, value in (facts["versions"] | interpreter).items()]
    for device in facts["devices"]:
        details = ", ".join(f"{k} {v}" for k, v in device.items() if k not in ("device", "name", "backends"))
        lines += ["", f"{device['device']}: {device['name']}, {details}".removesuffix(", ")]
        dtypes: dict[str, list[str]] = {}
        for dtype, choice in device["backends"].items():
            dtypes.setdefault(json.dumps(choice), []).append(dtype)
        for same, names in dtypes.items():
            choice = json.loads(same)
            lines.append(f"  {', '.join(names)}: {choice['backend']}, {choice['reason']}")
            lines += [f"    not {name}: {reason}" for name, reason in choice["passed_over"].items()]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `smca env`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there as well")


def run(args: argparse.Namespace) -> int:
    """`smca env`: print the report."""
    check_output_file("--json", args.json)
    facts = report()
    if args.json is not None:
        write_text(args.json, json.dumps(facts, indent=1) + "\n")
    print(format_report(facts))
    return 0


def _backend(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    try:
        query = torch.zeros(1, 1, 1, 32, device=device, dtype=dtype)
        key = torch.zeros(1, 1, 16, 32, device=device, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        center = torch.zeros(1, 1, 1, 1, 2, device=device, dtype=wide)
        choice = explain_backend(query, key, key, center, center, ((4, 4),))
    except (RuntimeError, TypeError) as error:  # MPS has no float64; a GPU may be out of memory
        return {"backend": "none", "reason": first_line(error), "passed_over": {}}
    return {"backend": choice.backend, "reason": choice.reason, "passed_over": choice.passed_over}


def _module_version(name: str) -> str:
    """The version of what would be imported: installed metadata may describe another copy, or a broken one."""
    try:
        return str(import_module(name).__version__)
    except ImportError as error:
        return f"can't be imported ({error})"


def _cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _text(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", errors="replace")
    except OSError:
        return ""
