"""What commands check before any work, and what they tell of another library's error."""

from __future__ import annotations

import pytest

from smca_kernels.tools.arguments import first_line


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("one\ntwo"), "one"),
        (RuntimeError("\n  one \ntwo"), "one"),
        (ConnectionError(), "ConnectionError"),
        (EOFError(" \n"), "EOFError"),
    ],
)
def test_of_an_error_its_first_line_is_told_or_what_it_is(error: Exception, told: str) -> None:
    assert first_line(error) == told
