"""A cut in steps: what each is to reach, one plan of them all, and scores of what really lies between."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import regrow.kept as kept
import regrow.run as road
from models import anatomy_of, difference, families, ids, logits, make
from models import plan as some_plan
from regrow.artifacts.budget import Budget
from regrow.artifacts.family import Unit
from regrow.artifacts.plan import LayerPlan, Plan
from regrow.artifacts.scores import Scores
from regrow.artifacts.shape import Anatomy, LayerShape, Shape
from regrow.dryrun import dry_run
from regrow.engines.bind import Subject
from regrow.errors import BudgetError, SettingsError
from regrow.foretold import foretold_plan
from regrow.kept import scored
from regrow.prepare import as_wish
from regrow.recipe_files import overlay
from regrow.settings import Recipe, parse
from regrow.staged import _fitting, left_by, staged, steps
from regrow.stages.apply import cut_copy
from regrow.stages.load import load
from regrow.stages.plan import Wish, make_plan
from regrow.stages.score import choose, score

Make = Callable[..., Recipe]
ALL: tuple[Unit, ...] = ("layer", "group", "head", "neuron", "channel")


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def recipe(sprout_dir: Path) -> Make:
    def make(**changes: Any) -> Recipe:
        usual = {
            "model": str(sprout_dir),
            "criterion": "activation",
            "axes": ["neuron", "channel", "head"],
            "uniform": True,
            "divisors": {"neuron": 16, "channel": 16},
            "keep": "60%",
            "stages": 2,
            "calibration": {"tokens": 512, "block": 64},
            "evaluate": {"text": None, "speed": False, "samples": []},
        }
        return parse({**overlay(usual, changes), **({"divisors": {}} if changes.get("divisors") == {} else {})})

    return make


def subject(model: Any) -> Subject:
    return Subject(model, None, anatomy_of(model), {"fingerprint": "x"}, torch.float32)  # type: ignore[arg-type]


def walk(recipe: Recipe, out: Path) -> Plan:
    road.run(recipe, out, page=lambda *_: {})
    return Plan.from_json(json.loads((out / "plan.json").read_text(encoding="utf-8")))


def wished(recipe: Recipe) -> Wish:
    wish = as_wish(recipe)
    assert wish is not None
    return wish


# ---- what each step is to reach


def test_widths_fall_in_equal_parts() -> None:
    """Minitron's formula for sizes: 24 channels to 16, 20 neurons to 11, by thirds; multiples only on the way."""
    anatomy = anatomy_of(make("llama"))
    shape = Shape(16, (LayerShape(3, 2, 11),) * 3)
    wish = Wish(budget=Budget.parse("50%"), axes=("channel", "neuron"), divisors={"channel": 1, "neuron": 1})
    assert steps(anatomy, wish, shape, 3) == [
        {"channel": 22, "neuron": 17},
        {"channel": 19, "neuron": 14},
        {"channel": 16, "neuron": 11},
    ]
    coarse = replace(wish, divisors={"channel": 1, "neuron": 4})
    assert [step["neuron"] for step in steps(anatomy, coarse, shape, 3)] == [20, 16, 11]


def test_a_step_in_which_nothing_goes_is_left_out() -> None:
    """One of two heads a group, in three steps: it goes in the last."""
    anatomy = anatomy_of(make("llama"))
    shape = Shape(24, (LayerShape(3, 1, 20),) * 3)
    assert steps(anatomy, Wish(budget=Budget.parse("50%"), axes=("head",)), shape, 3) == [{"head": 1}]
    assert steps(anatomy, Wish(budget=Budget.parse("50%"), axes=("head",)), anatomy.dense, 3) == []


# ---- one plan of several


def test_indices_of_indices() -> None:
    """Layer 1 of those left is layer 2; its second group, with heads 4 and 5 of it, is group 2; neuron 1 is 7."""
    first = Plan(
        (0, 3, 5, 9),
        (LayerPlan(0, (0, 2), (0, 1, 4, 5), (1, 3)), LayerPlan(2, (1, 2), (2, 3, 4, 5), (6, 7, 8), ((3, 0),))),
        made_by={"budget": "60%"},
        merge="laco",
    )
    later = Plan((1, 2), (LayerPlan(1, (1,), (2,), (1, 2), ((2, 3),)),), made_by={"budget": "other"}, merge="laco")
    assert first.then(later) == Plan(
        (3, 5), (LayerPlan(2, (2,), (4,), (7, 8), ((3, 0), (4, 5))),), made_by={"budget": "60%"}, merge="laco"
    )


@pytest.mark.parametrize("kind", [kind for kind, _ in families()])
@pytest.mark.parametrize("rescale", [False, True], ids=["kept", "rescaled"])
def test_one_cut_is_two_by_hand(kind: str, rescale: bool) -> None:
    """The model of the composed plan is the one that is cut, read, and cut again."""
    model = make(kind)
    whole = subject(model)
    first = some_plan(whole.anatomy, whole.anatomy.supported, uniform=True, rescale=rescale)
    middle = left_by(whole, first)
    units: set[Unit] = set(middle.anatomy.supported) & {"layer", "neuron", "channel"}
    later = narrower(middle.anatomy, units, rescale)
    twice = cut_copy(middle, later).model
    once = cut_copy(whole, first.then(later)).model
    assert [p.shape for p in once.parameters()] == [p.shape for p in twice.parameters()]
    assert difference(logits(twice, ids()), logits(once, ids())) < 1e-5
    if not rescale and not kind.startswith("gemma"):  # whose embeddings and gains are scaled anew by each cut
        assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))


def narrower(anatomy: Anatomy, units: set[Unit], rescale: bool) -> Plan:
    """The last layer alone, every other neuron, every third channel gone."""
    whole, sizes = Plan.everything(anatomy), anatomy.sizes
    last = whole.layers[-1] if "layer" in units else None
    rows = [replace(x, neurons=x.neurons[::2]) for x in ((last,) if last else whole.layers)]
    channels = tuple(i for i in range(sizes["C"]) if i % 3) if "channel" in units else whole.channels
    return Plan(channels, tuple(rows), rescale_norms=rescale)


def test_merged_twice_is_merged_in_turn() -> None:
    """Three heads a group become two and then one: the second merge reads what the first has made."""
    whole = subject(make("llama", num_attention_heads=6, num_key_value_heads=2))
    rows = Plan.everything(whole.anatomy).layers
    one = replace(
        Plan.everything(whole.anatomy),
        layers=tuple(replace(x, heads=(0, 1, 3, 5), merged=((1, 2), (5, 4))) for x in rows),
        merge="minitron",
    )
    middle = left_by(whole, one)
    two = replace(
        Plan.everything(middle.anatomy),
        layers=tuple(replace(x, heads=(0, 2), merged=((0, 1), (2, 3))) for x in Plan.everything(middle.anatomy).layers),
        merge="minitron",
    )
    both = one.then(two)
    both.check(whole.anatomy)
    assert both.layers[0].merged == ((1, 2), (5, 4), (0, 1), (3, 5))
    found, wanted = cut_copy(whole, both).model, cut_copy(middle, two).model
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), wanted.parameters(), strict=True))


# ---- the cut in steps


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("keep", ["70%", "45%", "params=80%", "file=75%", "kv=50%"])
def test_the_budget_is_met(sprout_dir: Path, keep: str, count: int) -> None:
    """By the shape of one cut, whatever the steps; with one step it is that cut."""
    whole = load(str(sprout_dir))
    axes: tuple[Unit, ...] = ("group", "neuron") if keep.startswith("kv") else ("head", "neuron", "channel")
    wish = Wish(
        budget=Budget.parse(keep),
        axes=axes,
        uniform=True,
        divisors=dict.fromkeys(axes[1:], 8),
    )
    chosen = choose("magnitude", axes, {}, {})
    counts = []

    def between(plan: Plan) -> tuple[Anatomy, Scores]:
        small = left_by(whole, plan)
        counts.append(wish.budget.count(whole.anatomy, plan.shape()))
        assert counts[-1] == wish.budget.count(small.anatomy, small.anatomy.dense)
        return small.anatomy, score(small, chosen, None)

    dense = score(whole, chosen, None)
    plan = staged(whole.anatomy, dense, wish, count, between)
    single = make_plan(whole.anatomy, dense, wish)
    assert plan.shape() == single.shape()
    assert wish.budget.count(whole.anatomy, plan.shape()) <= wish.budget.target(whole.anatomy)
    assert counts == sorted(set(counts), reverse=True)
    assert len(counts) == count - 1
    if count == 1:
        assert plan == single


def test_heads_are_left_alone_once_every_group_has_one() -> None:
    """Of two heads a group one goes in the last of four steps; one after it would merge nothing."""
    whole = subject(make("llama", num_hidden_layers=2, intermediate_size=40))
    chosen = choose("magnitude", ("head", "neuron"), {}, {})
    widths: dict[Unit, int] = {"head": 1, "neuron": 12}
    wish = Wish(budget=Budget.parse("100%"), axes=("head", "neuron"), uniform=True, merge="laco", widths=widths)
    wish = replace(wish, divisors={"neuron": 1})
    seen = []

    def between(plan: Plan) -> tuple[Anatomy, Scores]:
        small = left_by(whole, plan)
        seen.append((small.anatomy.sizes["G"], small.anatomy.sizes["F"], sum(len(x.merged) for x in plan.layers)))
        return small.anatomy, score(small, chosen, None)

    plan = staged(whole.anatomy, score(whole, chosen, None), wish, 4, between)
    assert seen == [(2, 33, 0), (2, 26, 0), (2, 19, 0)]
    assert all(len(layer.merged) == 3 for layer in plan.layers)
    seen.clear()
    first = replace(wish, widths={"head": 1, "neuron": 40})
    one = make_plan(whole.anatomy, score(whole, chosen, None), first)
    left, found = between(one)
    later = make_plan(left, found, _fitting(wish, widths, left, whole.anatomy))
    assert not any(layer.merged for layer in later.layers)
    one.then(later).check(whole.anatomy)


def test_more_heads_are_merged_in_steps_than_at_once() -> None:
    """Five heads a group become two: at once too few stay, in two steps five become four and four two."""
    whole = subject(make("llama", hidden_size=40, num_attention_heads=10, num_key_value_heads=2))
    chosen = choose("magnitude", ("head",), {}, {})
    wish = Wish(budget=Budget.parse("100%"), axes=("head",), uniform=True, merge="minitron", widths={"head": 2})
    dense = score(whole, chosen, None)

    def between(plan: Plan) -> tuple[Anatomy, Scores]:
        small = left_by(whole, plan)
        return small.anatomy, score(small, chosen, None)

    with pytest.raises(SettingsError, match="2 of 5 heads stay"):
        staged(whole.anatomy, dense, wish, 1, between)
    plan = staged(whole.anatomy, dense, wish, 2, between)
    assert all(len(layer.merged) == 6 and len(layer.heads) == 4 for layer in plan.layers)


def test_coarse_steps_are_not_scored_twice() -> None:
    """One of three layers goes, in the last of three steps: nothing is scored between."""
    anatomy = anatomy_of(make("llama"))
    scores = Scores({"layer": torch.tensor([3.0, 1.0, 2.0])}, {"criteria": {"layer": {"comparable": True}}})

    def between(_: Plan) -> tuple[Anatomy, Scores]:
        pytest.fail("scored again")

    plan = staged(anatomy, scores, Wish(budget=Budget.parse("70%"), axes=("layer",)), 3, between)
    assert [layer.index for layer in plan.layers] == [0, 2]


# ---- on the road


def test_the_road_in_steps(recipe: Make, tmp_path: Path) -> None:
    """What is written is what two runs by hand choose, with scores of the model between; the dense scores stay."""
    asked = recipe()
    plan = walk(asked, tmp_path / "out")
    whole = load(asked.model)
    dense = scored(whole, asked, record := {}, None)
    assert record["cached"] is True
    single = make_plan(whole.anatomy, dense, wished(asked))
    half, rest = (
        replace(wished(asked), widths=widths) for widths in steps(whole.anatomy, wished(asked), single.shape(), 2)
    )
    first = make_plan(whole.anatomy, dense, half)
    middle = left_by(whole, first)
    between = scored(middle, asked, record := {}, None)
    assert record["cached"] is True
    assert between.made_by["model"] != dense.made_by["model"] == plan.made_by["scores"]["model"]
    later = make_plan(middle.anatomy, between, _fitting(rest, rest.widths or {}, middle.anatomy, whole.anatomy))
    assert plan.layers == first.then(later).layers
    assert plan.channels == first.then(later).channels
    assert plan.made_by["stages"] == 2
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    twice = cut_copy(middle, later).model
    assert all(torch.equal(a, b) for a, b in zip(written.parameters(), twice.parameters(), strict=True))
    other = walk(recipe(stages=1), tmp_path / "one")
    assert other.layers == single.layers != plan.layers
    assert other.shape() == plan.shape()
    assert "stages" not in other.made_by


def test_tokens_of_every_step_are_counted(recipe: Make, tmp_path: Path) -> None:
    report = road.run(recipe(stages=3), tmp_path / "out", page=lambda *_: {})
    assert report.stages["score"]["tokens"] == 512
    assert report.stages["plan"]["tokens"] == 2 * 512
    assert "tokens" not in road.run(recipe(stages=1), tmp_path / "one", page=lambda *_: {}).stages["plan"]


def test_exact_widths_in_steps(recipe: Make, tmp_path: Path) -> None:
    shape = {"layer": 4, "neuron": 300, "channel": 96}
    walk(recipe(keep=None, shape=shape, axes=list(shape), divisors={}), tmp_path / "out")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.num_hidden_layers, config.intermediate_size, config.hidden_size) == (4, 300, 96)


def test_a_dry_run_foretells_the_steps(recipe: Make, tmp_path: Path) -> None:
    asked = recipe()
    foretold = dry_run(asked, gflops=1.0)
    assert foretold["shape_text"] == str(walk(asked, tmp_path / "out").shape())
    rows = {row["stage"]: row["tokens"] for row in foretold["stages"]}
    assert rows["score"] == 2 * 512


def test_what_cannot_go_in_steps(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All before anything is scored."""
    monkeypatch.setattr(kept, "score", lambda *_, **__: pytest.fail("scored"))

    def refused(error: type[Exception], says: str, **changes: Any) -> None:
        with pytest.raises(error, match=says):
            walk(recipe(**changes), tmp_path / "out")

    refused(SettingsError, "stages = 2 in a search", search={})
    refused(SettingsError, "may differ in width", uniform=False)
    refused(BudgetError, "cannot be met", keep="1%")


def test_layers_alone_need_no_uniform_widths(recipe: Make, tmp_path: Path) -> None:
    assert len(walk(recipe(axes=["layer"], uniform=False, divisors={}, keep="60%"), tmp_path / "out").layers) == 3


def test_a_shape_between_that_no_stock_class_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    from regrow.engines.hetero import Holder

    model = make("llama")
    monkeypatch.setattr("regrow.foretold.holder", lambda *_: Holder("heterogeneous", model.config, ""))
    wish = Wish(budget=Budget.parse("80%"), axes=("neuron",), uniform=True, divisors={"neuron": 1})
    with pytest.raises(SettingsError, match=r"stages = 2, and 3 layers .* which no stock class holds"):
        foretold_plan(model.config, anatomy_of(model), wish, 2)
