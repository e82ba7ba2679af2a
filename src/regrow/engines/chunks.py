"""What takes hours to make and is made in pieces: every piece a file, so that a run which stops loses one piece.

A file is whole or not there. What this gives up: pieces made by several processes at once; each makes all it lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from regrow.cache import replacing
from regrow.errors import OutputError


def in_chunks(
    folder: Path, count: int, size: int, make: Callable[[slice], dict[str, Tensor]], *, say: Callable[[int], None]
) -> list[Path]:
    """Files of `size` rows each, of `count` rows in all; `make` gives the tensors of some rows, unless they are there.

    `say` is told how many rows are done. Raises `OutputError` when a file cannot be written.
    """
    files = []
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        path = folder / f"{start // size}.safetensors"
        if not path.exists():
            save(make(rows), path)
        files.append(path)
        say(rows.stop)
    return files


def save(tensors: Mapping[str, Tensor], path: Path, said: dict[str, str] | None = None) -> None:
    """Write a file of tensors and of what is `said` of them. Raises `OutputError` when it cannot be written."""
    try:
        with replacing(path) as partial:
            save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, partial, said)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{path} cannot be written: {error}",
            "a folder you may write to, with room",
            "free some, or set REGROW_CACHE to another folder; the same command goes on with what is there",
        ) from error
