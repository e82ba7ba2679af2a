"""Where regrow keeps what it may need again: the converted demo model, scores, unfinished recoveries.

Everything under one folder (`REGROW_CACHE`, else `$XDG_CACHE_HOME/regrow`, else `~/.cache/regrow`) that can be deleted
at any time. Keys are hashes of the inputs' content and of regrow's own code, so nothing goes stale.
What this gives up: eviction; and whoever edits regrow scores again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from regrow.errors import OutputError


def cache_dir(*parts: str) -> Path:
    """The cache folder, or a folder inside it; made when it is missing. Raises `OutputError` when it cannot be."""
    root = os.environ.get("REGROW_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "regrow"
    )
    folder = Path(root, *parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the cache {folder} cannot be made: {error.strerror}", "a writable folder", "set REGROW_CACHE to one"
        ) from error
    return folder


def key(inputs: Mapping[str, Any]) -> str:
    """16 hex digits that change when any input changes. `inputs` must be JSON."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


@cache
def code() -> str:
    """16 hex digits over every module of regrow: another version may score or measure otherwise."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """`folder` is this process's alone while this is open. Raises `OutputError` when another has it."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as busy:
        raise OutputError(
            f"another process is at work on {what} ({folder})", "one at a time", "wait for it, or change a setting"
        ) from busy
    try:
        yield
    finally:
        lock.release()


def drop(folder: Path) -> None:
    """Remove a folder that is not needed any more, unless another process is at work on it."""
    with suppress(OutputError), held(folder, folder.name):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it becomes `path` when the block ends well, and vanishes when it does not."""
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
        partial = Path(folder, path.name)
        yield partial
        partial.replace(path)


def settle(folder: Path) -> None:
    """Everything in `folder` is on disk when this returns."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
