"""Listings as nvdisasm prints them, made of bare instructions."""

from __future__ import annotations


def sass(*lines: str) -> str:
    """nvdisasm's layout: labels end in a colon, everything else is an instruction."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * i:04x}*/                   {line} ;"
        for i, line in enumerate(lines)
    )
