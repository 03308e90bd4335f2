"""Where the tests run, a GPU or the CPU with Triton interpreted, and the seed that they draw from."""

from __future__ import annotations

import importlib.util
import os
import secrets
import zlib
from collections.abc import Iterator

import pytest
import torch

# Tests of what Triton compiles.
collect_ignore = [] if importlib.util.find_spec("triton") else ["backends/triton", "machine", "tools/cost"]
if not torch.cuda.is_available():
    # Triton reads this when it is imported, which the first test that wants a kernel does.
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="seed of all random inputs; default: SMCA_SEED, else a fresh one")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--seed") is not None:
        os.environ["SMCA_SEED"] = str(config.getoption("--seed"))
    # xdist's workers inherit the environment, and so the seed.
    os.environ.setdefault("SMCA_SEED", str(secrets.randbelow(2**31)))


def pytest_report_header() -> str:
    return f"seed: {os.environ['SMCA_SEED']} (repeat with --seed)"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed:
        report.sections.append(("seed", f"repeat with --seed {os.environ['SMCA_SEED']}"))
    return report


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Random numbers of the run's seed and the test's name alone; torch's own generator is seeded too."""
    seed = zlib.crc32(f"{os.environ['SMCA_SEED']} {request.node.nodeid}".encode())
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No compiled code, neither before the test nor after it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
