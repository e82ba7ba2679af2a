"""What a run writes down of a model: the pattern that it still has, names without the way to them."""

from __future__ import annotations

import pytest
import torch

from regrow.artifacts.report import Measure
from regrow.engines.zeros import census
from regrow.page.origin import without_paths
from regrow.record import _pattern, uneven


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


@pytest.mark.parametrize(
    ("seconds", "work", "said"),
    [(0.9, 0.8, False), (0.6, 0.8, False), (0.5, 0.8, True), (1.4, 1.0, False), (1.6, 1.0, True), (1.0, 0.3, False)],
)
def test_speeds_that_operations_do_not_explain(seconds: float, work: float, said: bool) -> None:
    """A small model has overheads, so it may gain nothing; more than what was saved it cannot gain."""

    def measures(times: float, operations: float) -> dict[str, Measure]:
        return {
            "speed/prompt_ms/batch1": Measure(100 * times, "ms", "lower"),
            "size/flops_per_token": Measure(1e9 * operations, "", "lower"),
        }

    notes = uneven(measures(1, 1), measures(seconds, work))
    assert bool(notes) == said
    assert all(f"{seconds:.2f} of the time before, and {work:.2f} of the operations" in note for note in notes)
    assert uneven({}, measures(seconds, work)) == ()
