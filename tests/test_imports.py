"""Imports have one direction and no circles, and `import smca_kernels` loads the library alone, without Triton.

Every import statement counts, those inside functions and those for type checking included: two files that need each
other's names can't be read one after the other. A package's __init__.py is a module like others: `from a.b import c`
leads to a.b.c where that is a module, else to a.b, and never to a.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"smca_kernels": "smca_kernels", "smca_model": "smca_model", "smca_benchmarks": "benchmarks"}  # by package
# From the bottom to the top: the library, what tests of it may use, its tools, the detector, the benchmarks.
LAYERS = ("smca_kernels", "smca_kernels.testing", "smca_kernels.tools", "smca_model", "smca_benchmarks")
# A layer's name inside a string. "benchmarks" is also an English word: it counts as a module or a path.
NAMED = {layer: re.compile(rf"\b{re.escape(layer)}\b") for layer in LAYERS}
NAMED["smca_benchmarks"] = re.compile(r"\bsmca_benchmarks\b|\bbenchmarks[./]\w|^benchmarks$")
# The command's table, which names modules above it, since they are imported only when they are chosen.
TABLE = ("smca_kernels.tools.cli", "COMMANDS")


@dataclass(frozen=True)
class Module:
    name: str
    package: str  # what its relative imports start from
    path: Path  # from the repository's root
    tree: ast.Module


def read_modules(root: Path) -> dict[str, Module]:
    modules = {}
    for package, folder in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            *parents, stem = (package, *path.relative_to(root / folder).with_suffix("").parts)
            parent = ".".join(parents)
            name = parent if stem == "__init__" else f"{parent}.{stem}"
            modules[name] = Module(name, parent, path.relative_to(root), ast.parse(path.read_text("utf-8")))
    return modules


def imports_of(module: Module, modules: dict[str, Module]) -> Iterator[tuple[int, str]]:
    """Line and full name of each module that is imported, or that something is imported from."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), module.package)
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                yield node.lineno, submodule if submodule in modules else source


def strings_of(module: Module) -> Iterator[tuple[int, str]]:
    """Line and value of every string, docstrings and the fixed parts of f-strings included."""
    exempt = set()
    for node in module.tree.body:
        if module.name == TABLE[0] and isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == TABLE[1]:
            exempt = set(ast.walk(node.value))
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in exempt:
            yield node.lineno, node.value


def layer_of(name: str) -> int:
    """Height of a module; -1 for one of somebody else's."""
    name = re.sub(r"^benchmarks\b", "smca_benchmarks", name)
    return max((i for i, layer in enumerate(LAYERS) if f"{name}.".startswith(f"{layer}.")), default=-1)


def upward_names(modules: dict[str, Module]) -> list[str]:
    """Every import and every string that names a layer above that of the module it is in."""
    found = []
    for module in modules.values():
        height = layer_of(module.name)
        for line, target in dict.fromkeys(imports_of(module, modules)):  # without repetition
            if layer_of(target) > height:
                found.append(f"{module.path}:{line} imports {target}")
        for line, value in strings_of(module):
            named = [layer for layer in LAYERS[height + 1 :] if NAMED[layer].search(value)]
            found += [f"{module.path}:{line} names {layer} in a string" for layer in named]
    return found


def circles(modules: dict[str, Module]) -> list[str]:
    """Shortest way from each module back to itself by its imports; the same modules are reported once."""
    graph = {
        module.name: sorted({target for _, target in imports_of(module, modules) if target in modules})
        for module in modules.values()
    }
    found = {}
    for start in graph:
        ways = [[start]]
        visited = set()
        for way in ways:  # grows while it is read: breadth first
            targets = graph[way[-1]]
            if start in targets:
                found.setdefault(frozenset(way), " → ".join([*way, start]))
                break
            ways += [[*way, target] for target in targets if target not in visited]
            visited.update(targets)
    return list(found.values())


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    return read_modules(ROOT)


@pytest.mark.parametrize("name", ["smca_kernels.attention", "smca_model.detector", "smca_benchmarks.workloads"])
def test_the_walk_reaches_every_package(name: str, modules: dict[str, Module]) -> None:
    assert name in modules
    assert "torch" in {target for _, target in imports_of(modules[name], modules)}


def test_nothing_names_what_stands_above_it(modules: dict[str, Module]) -> None:
    found = upward_names(modules)
    assert not found, "\n".join(found)


def test_no_modules_import_each_other_in_a_circle(modules: dict[str, Module]) -> None:
    found = circles(modules)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("smca_kernels/nn/a.py", "from smca_kernels.testing import cases", "imports smca_kernels.testing"),
        ("smca_kernels/a.py", "def f():\n    import smca_kernels.tools.env", "imports smca_kernels.tools.env"),
        ("smca_kernels/nn/a.py", "from ..tools import env", "imports smca_kernels.tools"),
        ("smca_kernels/a.py", "if TYPE_CHECKING:\n    from smca_kernels import tools", "imports smca_kernels.tools"),
        ("smca_kernels/a.py", "import_module('smca_kernels.tools.env')", "names smca_kernels.tools in a string"),
        ("smca_kernels/testing/a.py", "from smca_kernels.tools.env import describe", "imports smca_kernels.tools.env"),
        ("smca_kernels/tools/a.py", "import smca_model.data as data", "imports smca_model.data"),
        ("smca_kernels/tools/a.py", "from smca_benchmarks import workloads", "imports smca_benchmarks"),
        ("smca_kernels/tools/a.py", "from benchmarks.workloads import WORKLOADS", "imports benchmarks.workloads"),
        ("smca_kernels/tools/a.py", "f'see benchmarks/{name}, benchmarks/results'", "names smca_benchmarks in a"),
        ("smca_kernels/tools/cli.py", "COMMANDS = {}\nOTHERS = ['smca_model.data']", "names smca_model in a string"),
        ("smca_model/a.py", "def f():\n    from smca_benchmarks.report import plot", "imports smca_benchmarks.report"),
        ("smca_model/a.py", "MODULE = 'benchmarks.report'", "names smca_benchmarks in a string"),
    ],
)
def test_a_planted_upward_name_is_seen(path: str, source: str, complaint: str, tmp_path: Path) -> None:
    plant(tmp_path, {"smca_kernels/tools/__init__.py": "", path: source})
    (found,) = upward_names(read_modules(tmp_path))
    line = 1 + source.count("\n")
    assert found.startswith(f"{path}:{line} {complaint}")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("smca_kernels/tools/a.py", "from smca_kernels.testing import cases"),
        ("smca_kernels/tools/a.py", "'''Time of the benchmarks.'''"),
        ("smca_kernels/tools/cli.py", "COMMANDS = {'bench': ('smca_benchmarks.bench', 'smca_model, timed')}"),
        ("smca_model/a.py", "from smca_kernels.tools import arguments\nfrom .b import c"),
        ("benchmarks/a.py", "from smca_model import build\nfrom smca_kernels.tools.env import versions"),
    ],
)
def test_a_name_from_below_is_allowed(path: str, source: str, tmp_path: Path) -> None:
    plant(tmp_path, {path: source})
    assert upward_names(read_modules(tmp_path)) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.py": "import smca_model.b", "b.py": "from smca_model.a import c"}, ["a → b → a"]),
        ({"a.py": "def f():\n    from . import b", "b.py": "if TYPE_CHECKING:\n    from .a import T"}, ["a → b → a"]),
        ({"a.py": "from . import b", "b.py": "from .c import d", "c.py": "from .a import d"}, ["a → b → c → a"]),
        ({"c/__init__.py": "from .d import e", "c/d.py": "from smca_model.c import e"}, ["c → c.d → c"]),
        # Importing a submodule runs its package's __init__.py first, which is no circle of names.
        ({"__init__.py": "from .a import c", "a.py": "from . import b", "b.py": ""}, []),
        ({"a.py": "from . import b, c", "b.py": "from .c import d", "c.py": ""}, []),
    ],
)
def test_planted_circles_are_seen_and_nothing_else(files: dict[str, str], expected: list[str], tmp_path: Path) -> None:
    plant(tmp_path, {f"smca_model/{path}": source for path, source in files.items()})
    assert [found.replace("smca_model.", "") for found in circles(read_modules(tmp_path))] == expected


def plant(root: Path, files: dict[str, str]) -> None:
    for path, source in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(source, "utf-8")


# --- what importing the package needs and loads, each time in a fresh process ---


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
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
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


@pytest.mark.parametrize("package", ["smca_kernels", "smca_model"])
def test_every_module_of_a_package_is_installed_with_it(package: str) -> None:
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_importing_the_package_loads_the_library_alone() -> None:
    program = """
import sys
import torch

before = {name for name in sys.modules if name.partition(".")[0] != "triton"}
import smca_kernels

print(*sys.modules.keys() - before)
"""
    loaded = run_fresh(program).split()
    assert "smca_kernels.attention" in loaded
    # torch has argparse already; secrets and XML are of no use to a library that computes.
    unwanted = ("smca_kernels.testing", "smca_kernels.tools", "smca_model", "triton", "argparse", "secrets", "xml")
    assert sorted(name for name in loaded if f"{name}.".startswith(tuple(f"{each}." for each in unwanted))) == []
