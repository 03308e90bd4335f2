"""The detector of Hugging Face's that a test runs with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tiny_hosts import Host


@pytest.fixture(params=["detr", "conditional_detr"])
def host(request: pytest.FixtureRequest) -> Host:
    from tiny_hosts import HOSTS

    return HOSTS[request.param]
