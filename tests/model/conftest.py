"""A small set of digits that the tests of training share; this folder's helpers can be imported from its subfolders."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight scenes of digits, 48 × 48 pixels, to train on, two held out."""
    pytest.importorskip("skimage")
    from smca_model.data.digits import make_digits

    folder = tmp_path_factory.mktemp("digits") / "data"
    make_digits(folder, train=8, val=2, size=48, progress=False)
    return folder
