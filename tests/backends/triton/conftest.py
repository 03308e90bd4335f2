"""Fixtures that turn on and off what the kernels do in large calls only."""

from __future__ import annotations

import pytest


@pytest.fixture
def always_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for calls of any size."""
    from smca_kernels.backends.triton import launch

    monkeypatch.setattr(launch, "MIN_PLANNED_ELEMENTS", 0)


@pytest.fixture
def unsplit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for each block of queries: how many share one depends on batch and grids, and rounds differently."""
    from smca_kernels.backends.triton import launch

    monkeypatch.setattr(launch, "multiprocessors", lambda device: 0)
