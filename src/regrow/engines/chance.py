"""Chance that hangs on a seed and a count alone, so that a resumed run, or another process, draws the same.

What this gives up: draws that are the same on another kind of device.
"""

from __future__ import annotations

import hashlib

import torch


def stream(seed: int, number: int, device: torch.device) -> torch.Generator:
    """Chance of one pass; the same whenever, and by whomever, it is asked for."""
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8]))
