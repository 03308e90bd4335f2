"""Listings as nvdisasm prints them, made of bare instructions."""

from __future__ import annotations

NO_COUNTER = 7


def sass(*lines: str) -> str:
    """nvdisasm's layout: labels end in a colon, everything else is an instruction."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * i:04x}*/                   {line} ;"
        for i, line in enumerate(lines)
    )


def encoded(*lines: str | tuple[str, int, int, int, int]) -> str:
    """nvdisasm's layout with `-hex`.

    Args:
        lines: labels, instructions that stall one cycle, or (instruction, stall, write counter, read counter, mask of
            the counters to wait for).
    """
    text = []
    for i, line in enumerate(lines):
        if isinstance(line, str) and line.endswith(":"):
            text.append(line)
            continue
        instruction, stall, write, read, wait = (line, 1, NO_COUNTER, NO_COUNTER, 0) if isinstance(line, str) else line
        upper = (stall | write << 5 | read << 8 | wait << 11) << 41
        text.append(f"        /*{16 * i:04x}*/                   {instruction} ;   /* 0x{0:016x} */")
        text.append(f"                                          /* 0x{upper:016x} */")
    return "\n".join(text)
