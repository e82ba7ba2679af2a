"""Files of rows: each made once, whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from regrow.engines import chunks
from regrow.engines.chunks import in_chunks
from regrow.errors import OutputError

ROWS = torch.arange(14).view(7, 2)


def make(rows: slice) -> dict[str, Tensor]:
    return {"rows": ROWS[rows]}


def test_rows_in_order(tmp_path: Path) -> None:
    done: list[int] = []
    files = in_chunks(tmp_path, 7, 3, make, say=done.append)
    assert done == [3, 6, 7]
    assert [path.name for path in files] == ["0.safetensors", "1.safetensors", "2.safetensors"]
    assert torch.equal(torch.cat([load_file(path)["rows"] for path in files]), ROWS)


def test_what_stopped_goes_on(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    asked: list[int] = []

    def breaks(rows: slice) -> dict[str, Tensor]:
        if rows.start == 3:
            raise Stop
        return make(rows)

    def notes(rows: slice) -> dict[str, Tensor]:
        asked.append(rows.start)
        return make(rows)

    with pytest.raises(Stop):
        in_chunks(tmp_path, 7, 3, breaks, say=lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["0.safetensors"]
    in_chunks(tmp_path, 7, 3, notes, say=lambda _: None)
    assert asked == [3, 6]


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(_: Any, path: Path, *__: Any) -> None:
        path.write_bytes(b"begun")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chunks, "save_file", full)
    with pytest.raises(OutputError, match="No space left on device"):
        in_chunks(tmp_path, 7, 3, make, say=lambda _: None)
    assert list(tmp_path.iterdir()) == []
