"""What a run writes down of a model: the pattern that it still has, names without the way to them."""

from __future__ import annotations

import pytest
import torch

from regrow.engines.zeros import census
from regrow.page.origin import without_paths
from regrow.record import _pattern


@pytest.mark.parametrize("pattern", ["2:4", "1:2", "3:6", "50%", None])
def test_a_pattern_whose_zeros_did_not_move_is_kept(pattern: str | None) -> None:
    """Whatever it is: a spread, dense layers and odd groups leave nothing that could be found again."""
    dense, sparse = torch.ones(4, 12), (torch.arange(12) % 3 > 0).float().expand(4, 12)
    kept = census([("a", dense), ("b", sparse)])
    before = {"pattern": pattern, "mask_hash": kept.mask_hash, "share": kept.share}
    assert _pattern(before, kept) == pattern
    moved = {**before, "mask_hash": "another", "share": kept.share + 0.01}
    assert _pattern(moved, kept) is None


@pytest.mark.parametrize(
    "path",
    [
        "/disk/me/base", "~/base", "../base", "./base", "C:\\disk\\me\\base", "C:/disk/me/base",
        "\\\\host\\share\\base", "file:///disk/me/base",
    ],
)  # fmt: skip
def test_the_way_to_a_model_stays_here(path: str) -> None:
    found = without_paths({"recover": {"teacher": path, "text": path}, "model": path, "note": "at / all is well"})
    assert found["recover"] == {"teacher": "base", "text": "base"}
    assert found["model"] == "base"
    assert found["note"] == "at / all is well"
