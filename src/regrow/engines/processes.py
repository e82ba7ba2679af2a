"""Several processes on one run, as `torchrun` and `accelerate launch` start them: which one this is, and who waits.

All of them train; the first alone measures, writes and speaks, and the others return what it wrote. What this gives up:
stages other than the training are done by every process for itself.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

HOURS = 24  # that processes wait for each other: the first may measure for long before and after the training


def rank() -> int:
    """0 where there is only one."""
    return int(os.environ.get("RANK", "0"))


def first() -> bool:
    return rank() == 0


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local() -> int:
    """Which of the devices of this machine is this process's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def mean(value: Tensor) -> Tensor:
    """Of one number over all processes; the number itself where there is only one, or none has trained yet."""
    from torch import distributed

    if count() > 1 and distributed.is_available() and distributed.is_initialized():
        value = value.clone()
        distributed.all_reduce(value)
        return value / count()
    return value


def wait() -> None:
    """Until all are here; at once where there is only one, or none has trained yet."""
    from torch import distributed

    if count() > 1 and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
