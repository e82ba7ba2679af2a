"""Who is told of a training beside its own record: what transformers reports to, by name.

What this gives up: trackers that transformers does not know.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from regrow.errors import SettingsError, UnknownName

RUNS = "runs"  # where TensorBoard's files lie, in the folder of a training


def check_trackers(names: Iterable[str]) -> None:
    """Refuse, before anything long begins, what nobody knows or what is not installed.

    Raises `UnknownName`, `SettingsError`.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UnknownName("tracker", name, set(INTEGRATION_TO_CALLBACK))
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            raise SettingsError(
                f"recover.report_to = {name}, which cannot be used: {str(error).splitlines()[0]}",
                "trackers whose package is installed",
                "install it with pip, or leave it out: train.jsonl is always written",
            ) from error


def keep_runs(work: Path, out: Path) -> None:
    """What TensorBoard has been told moves from the folder of a training to the finished one."""
    if (work / RUNS).is_dir():
        shutil.move(work / RUNS, out / RUNS)
