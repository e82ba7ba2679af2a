"""Zeros in levels: they nest, each level reads its own text, and who teaches is the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import logging as hf_logging

import regrow.levels as levels
import regrow.run as road
from regrow.engines.distil import Teacher
from regrow.engines.packed import Packed
from regrow.errors import OutputError, SettingsError
from regrow.levels import Past, one_track
from regrow.prepare import check_words
from regrow.recipe_files import overlay
from regrow.recovery import Recover
from regrow.settings import Recipe, parse
from regrow.stages.load import load
from regrow.stages.recover import Recovered
from regrow.trained import Trained, Turn, part_of

Make = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("regrow.prepare.HELDOUT_TOKENS", 512)
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    yield tmp_path / "cache"
    if bars:
        hf_logging.enable_progress_bar()


@pytest.fixture
def recipe(sprout_dir: Path) -> Make:
    """Wanda in three levels, SPP after each."""

    def make(**changes: Any) -> Recipe:
        usual = {
            "model": str(sprout_dir),
            "keep": None,
            "sparsify": {"pattern": "75%", "criterion": "wanda", "levels": ["50%", "60%"]},
            "calibration": {"tokens": 1024, "block": 64},
            "recover": {"method": "spp", "rank": 8, "tokens": 3 * 512, "block": 64, "batch": 4, "teacher": "base",
                        "distil": {"lag": 1}},
            "evaluate": {"text": None, "speed": False, "samples": []},
        }  # fmt: skip
        return parse(overlay(usual, changes))

    return make


def walk(recipe: Recipe, out: Path, **more: Any) -> Any:
    return road.run(recipe, out, page=lambda *_: {}, **more)


def linears(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if "proj" in name}


def test_zeros_nest_and_teachers_are_what_it_was(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the second level the dense model teaches, then what the first left, then what the second left."""
    seen: list[tuple[dict[str, Tensor], dict[str, Tensor], Turn]] = []
    plain = levels.recovered

    def spied(subject: Any, asked: Any, *rest: Any, teacher: Teacher | None, turn: Turn) -> Trained:
        assert teacher is not None
        found = plain(subject, asked, *rest, teacher=teacher, turn=turn)
        state = {k: v.detach().clone() for k, v in subject.model.named_parameters()}
        seen.append(({k: v.detach().clone() for k, v in teacher.model.named_parameters()}, state, turn))
        return found

    monkeypatch.setattr(levels, "recovered", spied)
    monkeypatch.setattr(road, "recovered", spied)
    report = walk(recipe(), tmp_path / "out")
    assert [turn.index for _, _, turn in seen] == [0, 1, 2]
    dense = load(recipe().model).model.state_dict()
    assert all(torch.equal(value, dense[name]) for name, value in seen[0][0].items())
    for (teacher, _, _), (_, left, _) in zip(seen[1:], seen, strict=False):
        assert all(torch.equal(value, left[name]) for name, value in teacher.items())
    for (_, first, _), (_, second, _), share in zip(seen, seen[1:], (0.5, 0.6), strict=False):
        for name, value in linears(first).items():
            assert not second[name][value == 0].any()
            assert float((value == 0).float().mean()) == pytest.approx(share, abs=0.01)
    kept = report.after["size/nonzero_weights"].value / report.before["size/nonzero_weights"].value
    assert kept == pytest.approx(0.25, abs=0.002)
    tokens = [row["tokens"] for row in report.training]
    assert tokens == sorted(tokens)
    assert tokens[-1] == report.stages["recover"]["tokens"] == 3 * 512
    assert "3 levels (50%, 60%, 75%)" in " ".join(report.notes)
    assert "taught by what it was 1 before" in " ".join(report.notes)
    assert not list((tmp_path / "cache" / "recover").glob("*/checkpoint-*"))
    assert not list((tmp_path / "cache" / "levels").iterdir())


class Stop(Exception):
    pass


def test_interrupted_it_ends_with_the_same_weights(recipe: Make, tmp_path: Path) -> None:
    walk(recipe(), tmp_path / "whole")
    left = []

    def pull(what: str, *_: int) -> None:
        left.append(what)
        if what.startswith("60%: recovery"):
            raise Stop

    with pytest.raises(Stop):
        walk(recipe(), tmp_path / "cut", progress=pull)
    assert any(what.startswith("50%: recovery") for what in left)
    left.clear()
    walk(recipe(), tmp_path / "cut", progress=lambda what, *_: left.append(what))
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_each_level_reads_its_own_part_of_the_text() -> None:
    text = Packed(torch.arange(7)[:, None].expand(7, 4), domain=torch.tensor([0, 0, 0, 0, 1, 1, 1]))
    parts = [part_of(Recover(tokens=28), text, Turn(i, 3)) for i in range(3)]
    assert sorted(int(row[0]) for _, part in parts for row in part.ids) == list(range(7))
    assert [asked.tokens for asked, _ in parts] == [9, 9, 9]
    assert all(len(set(part.domain.tolist())) == 2 for _, part in parts if part.domain is not None)
    assert part_of(Recover(tokens=28), text, Turn())[1] is text


def test_the_past_keeps_no_more_than_it_needs(recipe: Make, tmp_path: Path) -> None:
    past = Past(recipe(), 2, tmp_path)
    model = load(recipe().model).model
    for level in range(4):
        past.remember(model)
        assert sorted(path.name for path in tmp_path.glob("level-*")) == [
            f"level-{i}.safetensors" for i in range(max(0, level - 1), level + 1)
        ]


def test_no_room_for_the_past(recipe: Make, tmp_path: Path) -> None:
    model = load(recipe().model).model
    with pytest.raises(OutputError, match="after level 1 cannot be written"):
        Past(recipe(), 1, tmp_path / "gone").remember(model)


def test_one_track_goes_on_counting() -> None:
    from regrow.engines.train import TrainResult

    def of(steps: int) -> Trained:
        rows = ({"step": 1.0, "tokens": 10.0, "loss": 2.0}, {"step": float(steps), "tokens": 10.0 * steps, "loss": 1.0})
        return Trained(Recovered(TrainResult(steps, 10 * steps, 0, rows, 0.0, None)), Path())

    rows = one_track((of(2), of(3)))
    assert [(row["step"], row["tokens"]) for row in rows] == [(1, 10), (2, 20), (3, 30), (5, 50)]
    assert one_track(()) == ()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"sparsify": {"levels": ["50%", "50%"]}}, "50% cannot follow 50%"),
        ({"sparsify": {"levels": ["80%"]}}, "75% cannot follow 80%"),
        ({"sparsify": {"levels": ["2:4"]}}, "75% cannot follow 2:4"),
        ({"sparsify": {"levels": []}}, r"recover.distil.lag = 1 of a model that does not grow sparse"),
        ({"recover": {"tokens": 3 * 64}}, "3 levels and 192 tokens"),
        ({"recover": None}, "3 levels and 0 tokens"),
        ({"recover": {"method": "lora"}}, "recover.method = lora beside sparsify.levels"),
        ({"recover": {"until": 512}}, "recover.until = 512 beside"),
        ({"sparsify": {"keep_statistics": True, "inputs": "dense"}}, "keep_statistics = True beside"),
        ({"recover": {"distil": {"cache": 200}}}, "recover.distil.cache = 200 beside"),
    ],
)
def test_what_cannot_be_is_refused_at_once(recipe: Make, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(SettingsError, match=what):
        check_words(recipe(**changes))


def test_groups_may_get_emptier(recipe: Make) -> None:
    check_words(recipe(sparsify={"pattern": "1:4", "levels": ["3:4", "2:4"]}))
