"""Gives freed memory back to the system, so that a model that was consumed tensor by tensor is really gone.

glibc keeps freed blocks below 32 MB in its heaps, one a thread: a model read by many threads and cut by one would
stay in memory twice. What this gives up: other allocators (musl, macOS, Windows), where nothing is done.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache


def give_back() -> None:
    """Return the free pages of every heap. Takes milliseconds, and takes no tensor that anything still holds."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
