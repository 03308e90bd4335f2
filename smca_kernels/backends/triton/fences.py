"""Fences that Triton repeats before every product on Hopper, taken out of the PTX before it is assembled.

A wgmma reads shared memory through another proxy than the copies and stores that fill it, so a fence has to come
between. Triton puts one before each product whose operands were copied. The first of a loop's trip orders all that was
waited for; the others have nothing to order until shared memory is written, or another thread waited for, again. Each
of them makes a warp wait until all of its own copies have arrived, also those of tiles to come.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

FENCE = "fence.proxy.async.shared::cta"
# Instructions that neither write shared memory nor wait for what others write. Whatever isn't listed ends a run.
_ORDERED = {
    *("abs", "add", "and", "bfe", "bfi", "clz", "cvt", "cvta", "div", "ex2"),
    *("fma", "ld", "ldmatrix", "lg2", "lop3", "mad", "max", "min", "mov", "mul"),
    *("neg", "not", "or", "popc", "prmt", "rcp", "redux", "rem", "selp", "setp"),
    *("shf", "shfl", "shl", "shr", "sqrt", "sub", "vote", "wgmma", "xor"),
}
_INSTRUCTION = re.compile(r"(?:@!?%p\d+\s+)?([a-z][\w.:]*)")
_DEBUG_LABEL = re.compile(r"\$L__tmp\d+:")


def without_repeated_fences(ptx: str) -> str:
    """PTX less the fences that follow another in the same basic block, with nothing new to order between them."""
    lines, is_fenced = [], False
    for line in ptx.splitlines(keepends=True):
        code = line.split("//")[0].strip()
        if code.rstrip(";") == FENCE:
            if is_fenced:
                continue
            is_fenced = True
        elif is_fenced:
            is_fenced = all(_leaves_order(statement.strip(" \t{}")) for statement in code.split(";"))
        lines.append(line)
    return "".join(lines)


def _leaves_order(statement: str) -> bool:
    """Whether what a fence has ordered stays all there is to order after a statement."""
    if not statement or statement.startswith((".loc", ".reg")) or _DEBUG_LABEL.fullmatch(statement):
        return True
    found = _INSTRUCTION.match(statement)
    if found is None or ".acquire" in found[1]:
        return False
    return found[1].split(".")[0] in _ORDERED or found[1].startswith("st.global")


@cache
def _cache_key() -> str:
    """This file's text, by which Triton's cache tells what was compiled so."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _hook(*stage_arguments: Any) -> tuple[str, str] | None:
    """Triton's hook around its stages of compilation; without arguments it asks for a part of the cache's key."""
    if not stage_arguments:
        return _cache_key(), _cache_key()
    stages: dict[str, Callable[[Any, Any], Any]] = stage_arguments[1]
    make_ptx = stages["ptx"]
    stages["ptx"] = lambda source, metadata: without_repeated_fences(make_ptx(source, metadata))
    return None


@contextmanager
def taken_out() -> Iterator[None]:
    """Take repeated fences out of what is compiled in this block, unless someone else has a hook there already."""
    from triton import knobs

    if getattr(knobs.runtime, "add_stages_inspection_hook", None) is not None:
        yield
        return
    knobs.runtime.add_stages_inspection_hook = _hook
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = None
