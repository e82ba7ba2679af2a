"""A task asked without every run of layers: the same answers as of a model that was cut there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regrow.artifacts.plan import Plan
from regrow.engines.bind import Subject
from regrow.engines.runs import wrong_without
from regrow.engines.tasks import answer_tasks
from regrow.errors import UnknownName
from regrow.stages.apply import cut_copy
from regrow.stages.load import load
from regrow.stages.score import choose, score

ITEMS = 6


@pytest.fixture(scope="module")
def subject(sprout_dir: Path) -> Subject:
    return load(str(sprout_dir), device="cpu")


def test_shut_is_cut(subject: Subject) -> None:
    """Every run of two of six layers, by hand; other lengths are not asked, and the model stays as it is."""
    before = {name: p.detach().clone() for name, p in subject.model.named_parameters()}
    seen: list[tuple[int, int]] = []
    found = wrong_without(
        subject, [2], task="piqa", limit=ITEMS, progress=lambda done, total: seen.append((done, total))
    )
    whole, scored = Plan.everything(subject.anatomy), 0
    assert found.shape == (2, 6, 7)
    for first in range(6):
        for after in range(7):
            if after - first != 2:
                assert bool(found[:, first, after].isnan().all())
                continue
            cut = cut_copy(subject, replace(whole, layers=whole.layers[:first] + whole.layers[after:]))
            items = answer_tasks(cut.model, subject.tokenizer, ["piqa"], limit=ITEMS)["piqa"]
            assert int(found[0, first, after]) == ITEMS - sum(items.correct)
            bits = sum(items.gold_bits) / sum(items.gold_bytes)
            assert float(found[1, first, after]) == pytest.approx(bits, rel=1e-4)
            scored += 1
    assert scored == 5
    assert seen == [(done, 5) for done in range(1, 6)]
    assert all(torch.equal(p, before[name]) for name, p in subject.model.named_parameters())


def test_equal_runs_give_equal_scores(subject: Subject) -> None:
    """As of every criterion; those that read text have a test of their own. Only depths that are named have a score."""
    chosen = choose("contiguous-task", ("layer",), {}, {"task": "piqa", "limit": 3})
    first, second = (score(subject, chosen, None, depths=[4, 5]).table["layer"] for _ in range(2))
    assert torch.equal(first.nan_to_num(-1), second.nan_to_num(-1))
    assert first.dtype == torch.float32
    assert first.shape == (6, 7)
    assert torch.equal(first.isfinite(), torch.ones(6, 7).triu(4).bool() & torch.ones(6, 7).tril(5).bool())


def test_nothing_asked(subject: Subject) -> None:
    assert bool(wrong_without(subject, [], task="piqa", limit=ITEMS).isnan().all())
    with pytest.raises(UnknownName, match="did you mean 'piqa'"):
        wrong_without(subject, [1], task="pika", limit=ITEMS)
