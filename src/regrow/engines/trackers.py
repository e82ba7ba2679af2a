"""Who is told of a training beside its own record: what transformers reports to, by name.

What this gives up: trackers that transformers does not know.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from transformers.integrations import integration_utils
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from regrow.errors import SettingsError, UnknownName

RUNS = "runs"  # where TensorBoard's files lie, in the folder of a training


def check_trackers(names: Iterable[str]) -> None:
    """Refuse, before anything long begins, what nobody knows or what cannot begin here.

    Raises `UnknownName`, `SettingsError`.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UnknownName("tracker", name, set(INTEGRATION_TO_CALLBACK))
        if (why := _missing(name)) is not None:
            raise SettingsError(
                f"recover.report_to = {name}, which cannot be used: {why}",
                "trackers that are installed and set up",
                "install or set up what it wants, or leave it out: train.jsonl is always written",
            )


def _missing(name: str) -> str | None:
    """Why one cannot begin here. Those that end a run when they go would complain where they were half made."""
    made, there = INTEGRATION_TO_CALLBACK[name], getattr(integration_utils, f"is_{name}_available", None)
    if hasattr(made, "__del__") and there is not None and not there():
        return f"transformers finds no {name}, or it is switched off"
    try:
        made()
    except Exception as error:  # each of them has its own
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def keep_runs(work: Path, out: Path) -> None:
    """What TensorBoard has been told moves from the folder of a training to the finished one."""
    if (work / RUNS).is_dir():
        shutil.move(work / RUNS, out / RUNS)
