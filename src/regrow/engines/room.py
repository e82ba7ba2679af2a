"""How much memory a device has, and freed memory given back, so that a model that was consumed is really gone.

glibc keeps freed blocks below 32 MB in its heaps, one a thread: a model read by many threads and cut by one would
stay in memory twice. What this gives up: other allocators (musl, macOS, Windows), where nothing is done.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def give_back() -> None:
    """Return the free pages of every heap. Takes milliseconds, and takes no tensor that anything still holds."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def memory_of(device: torch.device) -> float:
    """Bytes that a device has in all; infinite where nobody says."""
    import torch

    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return math.inf


@cache
def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
