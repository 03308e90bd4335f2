"""What importing the package needs, each time in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BLOCK_TRITON = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run_fresh(program: str) -> str:
    """Standard output of a Python program in a process of its own that sees no GPU."""
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_imports_and_trains_without_triton_or_a_gpu() -> None:
    program = """
import torch
import smca_kernels

layer = smca_kernels.SpatiallyModulatedCoAttention(32, 2, strides=(16, 32))
queries, features = torch.randn(3, 1, 32), torch.randn(20, 1, 32)
output, _ = layer(queries, features, features, [(4, 4), (2, 2)], prior_features=queries)
output.sum().backward()
assert all(parameter.grad is not None for parameter in layer.parameters())
print("trained")
"""
    assert run_fresh(BLOCK_TRITON + program) == "trained\n"


def test_without_triton_its_backend_is_refused_with_that_reason() -> None:
    program = """
import torch
from smca_kernels import smca_attention

query = torch.randn(1, 1, 2, 16)
key = torch.randn(1, 1, 4, 16)
center = torch.zeros(1, 1, 2, 1, 2)
try:
    smca_attention(query, key, key, center, center, [(2, 2)], backend="triton")
except ValueError as error:
    print(error)
"""
    told = run_fresh(BLOCK_TRITON + program)
    assert "backend='triton'" in told
    assert "No module named 'triton" in told


def test_without_triton_the_environment_report_says_so() -> None:
    told = run_fresh(BLOCK_TRITON + "from smca_kernels.tools.cli import main; raise SystemExit(main(['env']))")
    assert "triton           can't be imported (No module named 'triton')" in told


def test_every_module_of_the_package_is_installed_with_it() -> None:
    package = Path(__file__).parents[1] / "smca_kernels"
    folders = {path.parent for path in package.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_importing_the_package_does_not_import_triton() -> None:
    assert run_fresh("import sys, smca_kernels; print('triton' in sys.modules)") == "False\n"
