"""What a command prints: progress with time left on stderr, tables on stdout, JSON last."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from regrow.errors import RegrowWarning

if TYPE_CHECKING:
    from regrow.artifacts.report import Measure, Report

Progress = Callable[[str, int, int], None]
EVERY = 60  # seconds between two lines of a task in a log file


def emit(data: Mapping[str, Any]) -> None:
    """The last line of stdout."""
    print(json.dumps(data))


@contextmanager
def progress(quiet: bool) -> Iterator[Progress | None]:
    """A bar a task on stderr; lines in a log file. None when quiet."""
    hush()
    if quiet:
        yield None
        return
    if not sys.stderr.isatty():
        yield lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bars = Bars(*columns, console=Console(stderr=True))
    tasks: dict[str, Any] = {}

    def say(what: str, done: int, total: int) -> None:
        bars.start()
        name = what.partition(":")[0]  # what follows tells how it goes
        if name not in tasks or bars.tasks[tasks[name]].finished:
            tasks[name] = bars.add_task(what, total=total)
        bars.update(tasks[name], description=what, completed=done, total=total)

    try:
        yield say
    finally:
        if tasks:
            bars.stop()


def lines() -> Progress:
    """For a log file: a line when a task begins, when it ends, and about once a minute with the time that is left."""
    began: dict[str, tuple[float, int]] = {}  # when it was first heard of, and what was done by then
    said: dict[str, float] = {}

    def say(what: str, done: int, total: int) -> None:
        now, name = time.monotonic(), what.partition(":")[0]  # what follows tells how it goes
        if name not in began:
            began[name], said[name] = (now, done), now
            print(f"{name}: {total} to do", file=sys.stderr, flush=True)
        start, before = began[name]
        if done >= total:
            del began[name]
            print(f"{what}: {done} done in {now - start:.0f} s", file=sys.stderr, flush=True)
        elif now - said[name] >= EVERY and done > before:
            said[name] = now
            left = (now - start) * (total - done) / (done - before)
            print(f"{what}: {done} of {total}, {left / 60:.0f} min left", file=sys.stderr, flush=True)

    return say


def hush() -> None:
    """Libraries keep their own bars and hints to themselves."""
    import warnings

    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", category=RegrowWarning)
    warnings.showwarning = _warn


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout, as wide as it needs to be."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    sheet = Table(title=escape(title) or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for index, name in enumerate(columns):
        sheet.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        sheet.add_row(*map(escape, row))
    wide = sys.stdout.isatty()
    Console(width=None if wide else 140, highlight=False).print(sheet)


def show_report(report: Report) -> None:
    """Before and after, side by side, and how much of the zero-shot score is left."""
    from regrow.page.headline import retained

    rows = []
    for name, before in report.before.items():
        after = report.after.get(name)
        share = f"{after.value / before.value:.3f}" if after and before.value else ""
        rows.append([name, figure(before), figure(after), share])
    table("; ".join(report.notes[:1]), ["measure", "before", "after", "after / before"], rows)
    if left := retained(report):
        print(f"retained: {left}")
    for note in report.notes[1:]:
        print(f"note: {note}")


def figure(measure: Measure | None) -> str:
    """One number with its standard error."""
    if measure is None:
        return "-"
    value = measure.value
    text = f"{value:,.0f}" if value == int(value) and abs(value) >= 100 else f"{value:,.4g}"
    error = f" ±{measure.stderr:.2g}" if measure.stderr else ""
    return f"{text}{error} {measure.unit}".strip()
