"""The portable backend (first version: the reference)."""

from __future__ import annotations

from .reference import attention, unsupported

__all__ = ["attention", "unsupported"]
