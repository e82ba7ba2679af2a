"""What every bench writes: one JSON with the command, machine, versions, seeds and rows; partial runs go on.

A row has a key; a key that is there is not measured again, unless the command says `--fresh`. Each row carries when, by
which commit, in how many threads and with whose matrix products it was measured. The file is replaced whole after every
row, under a lock and with the rows that another process has added meanwhile, so several may share one bench: a job is
claimed before it begins.
"""

from __future__ import annotations

import fcntl
import json
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from regrow.cache import cache_dir
from regrow.engines import products
from regrow.engines.clock import machine

RESULTS = Path(__file__).with_name("results")
FRESH = "--fresh" in sys.argv
sys.argv = [word for word in sys.argv if word != "--fresh"]


WAIT = 20  # seconds


@dataclass(frozen=True)
class Job:
    """Something that leaves rows; `run` makes `done` true."""

    name: str
    done: Callable[[], bool]
    run: Callable[[], object]
    ready: Callable[[], bool] = lambda: True


class Ledger:
    """Rows of one bench, kept in `bench/results/NAME.json`."""

    def __init__(self, name: str, about: str, **settings: Any) -> None:
        self.path = RESULTS / f"{name}.json"
        if FRESH:
            self.path.unlink(missing_ok=True)
        self.faster = products.faster()  # kept, since it ends when it is forgotten
        self.faster.__enter__()
        old = json.loads(self.path.read_text()) if self.path.exists() else {}
        if old and old["settings"] != json.loads(json.dumps(settings)):
            sys.exit(f"{self.path} was measured with other settings: move it away to start anew\n{old['settings']}")
        self.data: dict[str, Any] = {
            "bench": name,
            "about": about,
            "settings": settings,
            "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *map(place, sys.argv[1:])]),
            "machine": machine(),
            "rows": old.get("rows", {}),
        }
        here = self.data["machine"]  # what runs, until it ends
        self.code = {"commit": commit(), "threads": here["torch_threads"], "products": here["fp32_products"]}

    def row(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row under `key`, measured now unless it is there."""
        if key not in self.data["rows"]:
            found = {**measure(), "at": datetime.now(UTC).isoformat(timespec="seconds"), **self.code}
            self.data["rows"][key] = found
            self.save()
            print(f"{key}: {found}", flush=True)
        row: dict[str, Any] = self.data["rows"][key]
        return row

    def refresh(self) -> None:
        """Take in the rows that others have added."""
        if self.path.exists():
            self.data["rows"] |= json.loads(self.path.read_text())["rows"]

    def job(self, key: str, measure: Callable[[], dict[str, Any]]) -> Job:
        """One row."""
        return Job(key, lambda: key in self.data["rows"], lambda: self.row(key, measure))

    def work(self, jobs: Sequence[Job]) -> None:
        """Do all `jobs`, the first that can begin first, each once among all processes that share the bench."""
        while left := [job for job in jobs if not job.done()]:
            for job in left:
                if job.ready():
                    with claimed(f"{self.path.stem} {job.name}") as mine:
                        self.refresh()
                        if mine and not job.done():
                            job.run()
                            assert job.done(), f"{job.name} was run and is not done"
                            break
            else:
                time.sleep(WAIT)  # others work on all that is left, or on what it needs
            self.refresh()

    def save(self) -> None:
        RESULTS.mkdir(exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.refresh()
            partial = self.path.with_suffix(".partial")
            partial.write_text(readable(self.data))
            partial.replace(self.path)


def readable(data: Any) -> str:
    """JSON with a line for every entry, and numbers of a list side by side."""
    return re.sub(r"\[[^][{}\"]*\]", lambda found: " ".join(found[0].split()), json.dumps(data, indent=1))


@contextmanager
def claimed(name: str) -> Iterator[bool]:
    """Whether this process alone works on `name` while this is open; a process that dies gives up its claims."""
    path = cache_dir("bench-claims") / name.replace("/", "-").replace(":", "-").replace("%", "")
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "mean": statistics.fmean(values), "std": statistics.stdev(values)}


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def place(word: str) -> str:
    """An argument as it may be published: of a path, only its last part."""
    return Path(word).name if "/" in word and Path(word).exists() else word


def commit() -> str:
    """The commit of the working tree, marked when there are changes."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "src") else "")
