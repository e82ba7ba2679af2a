"""Gates that learn, on the whole road: sizes, shapes, resumption, what is refused and what is said."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers import logging as hf_logging

import regrow.run as road
from models import anatomy_of, make
from regrow.artifacts.budget import Budget
from regrow.artifacts.scores import Scores
from regrow.artifacts.shape import Anatomy, count
from regrow.errors import BudgetError, RegrowError, RegrowWarning, SettingsError, UnknownName
from regrow.learned import learned, planned, target_of
from regrow.prepare import as_wish, check_words
from regrow.recipe_files import overlay
from regrow.settings import Recipe, parse
from regrow.stages.learn import pull_of, too_few
from regrow.stages.plan import Wish

QUICK = {
    "tokens": 120 * 2 * 32, "block": 32, "gate_rate": 0.5, "multiplier_rate": 0.5, "tolerance": 0.06, "lag": 2,
    "learning_rate": 1e-3,
}  # fmt: skip
Make = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("regrow.prepare.HELDOUT_TOKENS", 512)  # the curve costs more than the training otherwise
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    yield tmp_path / "cache"
    if bars:
        hf_logging.enable_progress_bar()


@pytest.fixture
def recipe(sprout_dir: Path) -> Make:
    """A short training of gates over the test model; changes go on top."""

    def make(**changes: Any) -> Recipe:
        usual = {
            "model": str(sprout_dir),
            "keep": "80%",
            "axes": ["neuron", "group", "channel"],
            "rescale_norms": True,
            "learn": QUICK,
            "evaluate": {"max_tokens": 512, "seqlen": 64, "speed": False, "samples": []},
        }
        return parse(overlay(usual, changes))

    return make


def no_page(*_: Any) -> dict[str, str]:
    return {}


def walk(recipe: Recipe, out: Path, **more: Any) -> Any:
    return road.run(recipe, out, page=no_page, **more)


def smol() -> Anatomy:
    return anatomy_of(make("llama"))


# --- the whole road


@pytest.mark.filterwarnings("ignore::regrow.errors.RegrowWarning")
def test_from_gates_to_a_smaller_model(recipe: Make, tmp_path: Path) -> None:
    """The true count fits the budget, whatever the gates expect; the path is in the report; stock tools load it."""
    said: list[str] = []
    report = walk(recipe(), tmp_path / "out", progress=lambda what, *_: said.append(what))
    before, after = (m["size/decoder_weights"].value for m in (report.before, report.after))
    assert 0.79 <= after / before <= 0.8
    assert {"group", "neuron", "channel"} == {u for u, x in report.made_by["split_realised"].items() if x > 0}
    sparsity = [row["sparsity"] for row in report.learning]
    assert sparsity[0] < 0.05
    assert sparsity[-1] == pytest.approx(0.2, abs=0.06)
    assert max(row["teacher"] for row in report.learning) > 0
    assert {"divergence", "states", "multiplier", "asked", "heldout_loss"} <= {
        k for row in report.learning for k in row
    }
    assert any("masked and sliced logits" in note for note in report.notes)
    assert any("begun in the order of taylor-second, learned over" in note for note in report.notes)
    assert any("sparsity 0." in what and "teacher 0." in what for what in said)
    lines = (tmp_path / "out" / "learn.jsonl").read_text().splitlines()
    assert [json.loads(x) for x in lines] == list(report.learning)
    assert not list((tmp_path / "cache" / "learn").glob("*/checkpoint-*"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


class Stop(Exception):
    pass


@pytest.mark.filterwarnings("ignore::regrow.errors.RegrowWarning")
def test_interrupted_it_ends_with_the_same_weights(recipe: Make, tmp_path: Path) -> None:
    words: dict[str, Any] = {
        "learn": {"records": "disk", "tokens": 60 * 64, "tolerance": 0.3},
        "recover": {"tokens": 512, "block": 64, "batch": 4},
    }
    asked = recipe(**words)
    walk(asked, tmp_path / "whole")

    def pull(what: str, done: int, total: int) -> None:
        if what.startswith("learn") and done > 0.7 * total:
            raise Stop

    with pytest.raises(Stop):
        walk(recipe(**words, seed=0, name="again"), tmp_path / "cut", progress=pull)
    assert not (tmp_path / "cut").exists()
    assert list((tmp_path / "cache" / "learn").glob("*/checkpoint-*/complete"))
    report = walk(asked, tmp_path / "cut")
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert report.stages["learn"]["tokens"] == 60 * 64
    assert max(row["teacher"] for row in report.learning) > 0  # records were read again


@pytest.mark.filterwarnings("ignore::regrow.errors.RegrowWarning")
def test_sheared_ends_with_exactly_the_shape(recipe: Make, tmp_path: Path) -> None:
    shape = {"layer": 3, "neuron": 128, "channel": 96}
    asked = recipe(
        keep=None, shape=shape, rescale_norms=False,
        learn={"gates": "sheared", "method": "full", "teachers": "none", "tokens": 300 * 64, "multiplier_rate": 2.0},
    )  # fmt: skip
    report = walk(asked, tmp_path / "out")
    after = report.shape["after"]
    assert after["channels"] == 96
    assert len(after["layers"]) == 3
    assert {row[2] for row in after["layers"]} == {128}
    assert report.model["holder"] == "stock"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.config.hidden_size == 96
    fresh = AutoModelForCausalLM.from_config(plain.config)
    assert plain.num_parameters() == fresh.num_parameters()
    before = AutoModelForCausalLM.from_pretrained(asked.model).config
    for unit, share in (("neuron", 128 / before.intermediate_size), ("channel", 96 / before.hidden_size)):
        assert report.learning[-1][f"sparsity {unit}"] == pytest.approx(1 - share, abs=0.06)


@pytest.mark.filterwarnings("ignore::regrow.errors.RegrowWarning")
def test_domains_are_balanced_while_gates_learn(recipe: Make, tmp_path: Path) -> None:
    """References are losses of the model as it was read, also those of the recovery that follows."""
    mixed = {"mixture": {"demo:squad": 1, "demo:coqa": 1}, "balance": "dynamic", "balance_every": 1920}
    after = {**mixed, "tokens": 2048, "block": 64, "balance_every": 1024}
    asked = recipe(learn={**mixed, "tolerance": 0.2, "tokens": 60 * 64}, recover=after)
    report = walk(asked, tmp_path / "out")
    (first,), (second,) = ({row[key] for row in rows[-1:]} for rows, key in (
        (report.learning, "weight demo:squad"), (report.training, "weight demo:squad")))  # fmt: skip
    assert 0 < first < 1
    assert 0 < second < 1
    files = list((tmp_path / "cache" / "references").glob("*.json"))
    assert len(files) == 2  # blocks of two lengths
    losses = [json.loads(path.read_text()) for path in files]
    assert losses[0] == pytest.approx(losses[1], abs=0.3)


def test_by_masks_alone(recipe: Make, tmp_path: Path) -> None:
    """No weight moves: what stays is as it was; the count fits; interrupted, it ends the same."""
    own = {"gates": "policy-gradient", "method": "none", "teachers": "none", "learning_rate": 0.05, "tokens": 1920}
    asked = recipe(axes=["neuron", "group"], criterion="activation", calibration={"tokens": 512, "block": 64},
                   rescale_norms=False, learn=own)  # fmt: skip
    report = walk(asked, tmp_path / "out")
    before, after = (m["size/decoder_weights"].value for m in (report.before, report.after))
    assert 0.79 <= after / before <= 0.8
    assert any("learned from 60 masks" in note for note in report.notes)
    assert [row["step"] for row in report.learning] == [20, 30]
    dense, cut = (load_file(folder / "model.safetensors") for folder in (Path(asked.model), tmp_path / "out"))
    assert torch.equal(dense["model.norm.weight"], cut["model.norm.weight"])
    assert torch.equal(dense["model.embed_tokens.weight"], cut["model.embed_tokens.weight"])


@pytest.mark.filterwarnings("ignore::regrow.errors.RegrowWarning")
def test_gates_that_do_not_arrive_cut_nothing(recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"the gates ended at .* % of the decoder weights gone, and 20.0 %") as caught:
        walk(recipe(learn={"tokens": 640, "gate_rate": 0.01, "tolerance": 0.01}), tmp_path / "out")
    assert "nothing was cut" in caught.value.todo
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "cache" / "learn").glob("*/checkpoint-*/complete"))


@pytest.mark.filterwarnings("ignore::regrow.errors.RegrowWarning")
def test_what_gates_begin_after_is_in_their_key(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another criterion, or other text that scores are read from, is no training to go on with."""
    subject, few = road.load(recipe().model), {"calibration": {"tokens": 256, "block": 64}}
    monkeypatch.setattr("regrow.learned.learn", lambda *_, **more: more["folder"])

    def folder(**changes: Any) -> Any:
        asked = recipe(**overlay(few, changes))
        wish = as_wish(asked)
        assert wish is not None
        return learned(subject, asked, wish, None)[1]

    usual = folder()
    assert folder() == usual
    assert folder(criterion="magnitude") != usual
    assert folder(calibration={"tokens": 512}) != usual
    even = folder(learn={"start": "even"})
    assert even != usual
    assert folder(learn={"start": "even"}, criterion="magnitude") == even


@pytest.mark.filterwarnings("ignore::regrow.errors.RegrowWarning")
def test_uniform_and_annealed(recipe: Make, tmp_path: Path) -> None:
    short = {"anneal": 0.2, "tolerance": 0.3, "tokens": 80 * 64}
    asked = recipe(uniform=True, divisors={"neuron": 8, "channel": 8}, learn={**short, "start": "even"})
    report = walk(asked, tmp_path / "out")
    assert any("gates (hard-concrete) learned over" in note for note in report.notes)
    assert len({tuple(row) for row in report.shape["after"]["layers"]}) == 1
    assert report.model["holder"] in ("stock", "carrier")


# --- what is to be reached


def as_target(**changes: Any) -> Any:
    asked = parse(overlay({"axes": ["neuron", "group", "channel"], "learn": {}}, changes))
    wish = as_wish(asked)
    assert wish is not None
    return target_of(smol(), asked, wish)


def test_a_share_of_the_weights() -> None:
    anatomy = smol()
    dense = count(anatomy, anatomy.dense, decoder_only=True)
    assert as_target(keep="75%").share == 1 - Budget.parse("75%").target(anatomy) / dense
    assert as_target(keep="75%").widths is None


def test_other_budgets_become_a_share_of_the_weights() -> None:
    anatomy = smol()
    whole = count(anatomy, anatomy.dense)
    found = as_target(keep=f"params={round(0.8 * whole)}")
    assert 0.1 < found.share < 0.4


def test_kinds_that_stay_whole_do_not_learn() -> None:
    found = as_target(
        keep=None, shape={"layer": 2, "group": 3, "neuron": 10},
        learn={"gates": "sheared", "teachers": "none", "method": "full"},
    )  # fmt: skip
    assert found.units == ("layer", "neuron")
    assert found.widths == {"layer": pytest.approx(1 / 3), "neuron": 0.5}


def test_gates_decide_and_the_count_is_enforced() -> None:
    """The lowest scalars go, by one ranking over layers; kinds lose as they learned."""
    anatomy = smol()
    source = torch.Generator().manual_seed(0)
    neurons = torch.randn(3, anatomy.sizes["F"], generator=source)
    neurons[0] += 5
    scores = Scores({"neuron": neurons, "group": torch.ones(3, 3)}, {})
    wish = Wish(budget=Budget.parse("80%"), axes=("neuron", "group"))
    plan = planned(anatomy, wish, scores, {"neuron": 0.4, "group": 0.001})
    dense = count(anatomy, anatomy.dense, decoder_only=True)
    assert count(anatomy, plan.shape(), decoder_only=True) <= 0.8 * dense
    assert len(plan.layers[0].neurons) == anatomy.sizes["F"]
    for row in plan.layers[1:]:
        kept, own = list(row.neurons), neurons[row.index]
        gone = [i for i in range(len(own)) if i not in kept]
        assert own[kept].min() > own[gone].max()
    assert all(len(row.groups) == 3 for row in plan.layers)


def test_a_kind_that_did_not_learn_stays_whole() -> None:
    """Masks of neurons alone, where an even cut to the budget took no group."""
    anatomy = smol()
    scores = Scores({"neuron": torch.randn(3, anatomy.sizes["F"], generator=torch.Generator().manual_seed(0))}, {})
    wish = Wish(budget=Budget.parse("80%"), axes=("neuron", "group"))
    plan = planned(anatomy, wish, scores, {"neuron": 0.4})
    assert all(len(row.groups) == 3 for row in plan.layers)
    assert count(anatomy, plan.shape(), decoder_only=True) <= 0.8 * count(anatomy, anatomy.dense, decoder_only=True)


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"keep": None}, "nothing is to go"),
        ({"search": {"method": "grid"}}, "search beside gates"),
        ({"stages": 2, "uniform": True}, "stages = 2 beside"),
        ({"refit": {}}, "refit beside"),
        ({"protect": [1, 0]}, "protect"),
        ({"learn": {"teacher": "base"}}, "learn.teacher = base"),
        ({"learn": {"distil": {"cache": 200}}}, "learn.distil.cache"),
        ({"learn": {"patience": 3}}, "learn.patience"),
        ({"learn": {"until": 64}}, "learn.until"),
        ({"learn": {"distil": {"likeness": "relations"}}}, "learn.distil.likeness"),
        ({"dtype": "bf16"}, "bf16"),
        ({"learn": {"rise": 1.0, "anneal": 0.5}}, "in which the sparsity rises|of which the sparsity rises"),
        ({"learn": {"gates": "policy-gradient"}}, "learn.method = lora of learn.gates = policy-gradient"),
        ({"learn": {"method": "none"}}, "learn.method = none"),
        ({"learn": {"gates": "policy-gradient", "method": "none"}}, "learn.teachers = numerous of policy-gradient"),
        ({"learn": {"method": "full"}}, "the teachers live in them"),
        ({"learn": {"tokens": 32}}, "of which the sparsity rises"),
    ],
)
def test_what_cannot_be_is_refused_at_once(recipe: Make, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(RegrowError, match=what):
        check_words(recipe(**changes))


def test_unknown_words(recipe: Make) -> None:
    with pytest.raises(UnknownName, match="ramp"):
        check_words(recipe(learn={"ramp": "linaer"}))
    with pytest.raises(SettingsError, match=r"learn\.gates"):
        recipe(learn={"gates": "soft"})


def test_too_few_steps_are_warned_of(recipe: Make) -> None:
    short = recipe(learn={"tokens": 50 * 64, "gate_rate": 0.1})
    assert short.learn is not None
    assert "50 steps at learn.gate_rate 0.1: a gate needs 92" in (too_few(short.learn, 50) or "")
    assert too_few(short.learn, 185) is None
    with pytest.warns(RegrowWarning, match="50 steps at learn.gate_rate"):
        check_words(short)


def test_a_short_training_pulls_harder() -> None:
    assert pull_of(20_000) == pull_of(12_000) == 0.1
    assert pull_of(1200) == pytest.approx(1.0)


def test_more_records_than_are_allowed() -> None:
    with pytest.raises(SettingsError, match="199 records"):
        as_target(keep="80%", learn={"spacing": 0.001, "most_records": 100})
