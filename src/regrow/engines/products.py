"""Products of fp32 matrices through oneDNN on processors where torch's usual library is slow.

torch gives fp32 products to MKL, which leaves AVX-512 unused on AMD processors; oneDNN, which torch brings as well,
uses it and is up to twice as fast. torch asks oneDNN only where rounding to bf16 is allowed, but on x86 oneDNN rounds
for AMX units alone: with AVX-512 and no AMX it computes in fp32 all the same. It is allowed there, while a command
runs, and only after a product has shown that nothing is rounded.
What this gives up: bit equality with a run without it. Intel (MKL is fast there), ARM and processors with AMX (both
would round), and systems without /proc stay as they are. The setting is the process's: while it holds,
`torch.get_float32_matmul_precision`, of torch's older interface, refuses to answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SETTING: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made at run time
_INFO = Path("/proc/cpuinfo")
_SIDE = 256  # of the matrices of the trial
_ROUNDINGS = 16  # of fp32, that the sums of a product may be off; one rounding to bf16 is 65,536 of them


@contextmanager
def faster() -> Iterator[None]:
    """While open, oneDNN computes fp32 products where that is as exact, and faster.

    A precision that the user has chosen (`torch.backends.mkldnn.matmul.fp32_precision`) is left alone.
    """
    before = _SETTING.fp32_precision
    if before == "none" and _known():
        _SETTING.fp32_precision = "bf16"
    try:
        yield
    finally:
        _SETTING.fp32_precision = before


def library() -> str:
    """Who computes fp32 products on the CPU now: "oneDNN" in fp32, "usual" for what torch takes by itself; or the
    precision that the user has chosen."""
    chosen = str(_SETTING.fp32_precision)
    return {"none": "usual", "bf16": "oneDNN" if _known() else "bf16"}.get(chosen, chosen)


def rounds_as_fp32(product: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether `product` (m, n) is that of `a` (m, k) and `b` (k, n), fp32, to a few roundings of fp32."""
    error = (product.double() - a.double() @ b.double()).abs()  # (m, n)
    return bool((error <= _ROUNDINGS * 2.0**-24 * (a.double().abs() @ b.double().abs())).all())


def worthwhile(info: str) -> bool:
    """Whether /proc/cpuinfo tells of an AMD processor with AVX-512 and without AMX."""
    lines = dict(part for line in info.splitlines() if len(part := [x.strip() for x in line.split(":", 1)]) == 2)
    flags = lines.get("flags", "").split()
    amx = any(flag.startswith("amx") for flag in flags)
    return lines.get("vendor_id") == "AuthenticAMD" and "avx512f" in flags and not amx


@cache
def _known() -> bool:
    """Whether oneDNN is faster here and as exact."""
    both: bool = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return both and _INFO.exists() and worthwhile(_INFO.read_text(encoding="utf-8")) and _exact()


def _exact() -> bool:
    """The trial; the setting is put back."""
    before = _SETTING.fp32_precision
    a, b = torch.randn(2, _SIDE, _SIDE, generator=torch.Generator().manual_seed(0))  # (side, side) each, fp32
    _SETTING.fp32_precision = "bf16"
    try:
        return rounds_as_fp32(a @ b, a, b)
    finally:
        _SETTING.fp32_precision = before
