"""The search: what is tried, who goes on, what it costs, and that nothing of it touches the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import logging as hf_logging

import regrow.search as searching
from models import anatomy_of, cut, make
from models import plan as some_plan
from regrow import cache as caching
from regrow import plan_checks, prepare, trials
from regrow.artifacts.budget import Budget
from regrow.artifacts.plan import Plan
from regrow.artifacts.report import Report
from regrow.artifacts.shape import MEASURES
from regrow.artifacts.sight import CRITERIA
from regrow.artifacts.space import full, shape_of, totals_of
from regrow.engines.bind import Subject
from regrow.engines.checkpoint import write
from regrow.engines.loop import Loop
from regrow.errors import BrokenModel, BudgetError, RegrowWarning, SettingsError, TextError, UnknownName
from regrow.recipe_files import overlay
from regrow.run import help_search, run
from regrow.search import Chosen, candidates, search, taus
from regrow.settings import Recipe, parse
from regrow.stages.apply import cut_copy
from regrow.stages.load import load
from regrow.stages.plan import realise

Make = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A cache of its own, and no bars of other libraries."""
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "cache"))
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    yield
    if bars:
        hf_logging.enable_progress_bar()


@pytest.fixture
def recipe(sprout_dir: Path) -> Make:
    def make(**changes: Any) -> Recipe:
        usual = {
            "model": str(sprout_dir),
            "keep": "80%",
            "criterion": "activation",
            "axes": ["layer", "head", "neuron", "channel"],
            "uniform": True,
            "divisors": {"neuron": 16, "channel": 16},
            "calibration": {"tokens": 512, "block": 64},
            "search": {"tokens": 512, "rank_tokens": 512, "top": 2, "checkpoints": 2, "candidates": 3},
            "recover": {"method": "full", "teacher": str(sprout_dir), "tokens": 0, "block": 64, "batch": 2,
                        "micro_batch": 2, "learning_rate": 1e-3},
            "evaluate": {"text": None, "speed": False, "samples": []},
        }  # fmt: skip
        return parse({**overlay(usual, changes), **({"divisors": {}} if changes.get("divisors") == {} else {})})

    return make


def no_page(*_: Any) -> dict[str, str]:
    return {}


def walked(recipe: Recipe, out: Path) -> dict[str, Any]:
    run(recipe, out, page=no_page)
    found: dict[str, Any] = json.loads((out / "search.json").read_text(encoding="utf-8"))
    return found


def same_but_time(a: dict[str, Any], b: dict[str, Any]) -> bool:
    def bare(record: dict[str, Any]) -> str:
        return json.dumps(json.loads(json.dumps(record), object_hook=lambda x: {k: x[k] for k in x if k != "seconds"}))

    return bare(a) == bare(b)


def test_the_road(recipe: Make, tmp_path: Path) -> None:
    """Every shape in the budget by the real count; the winner is the best of those trained, and what is written."""
    out = tmp_path / "out"
    found = walked(recipe(), out)
    report = Report.from_json(json.loads((out / "report.json").read_text(encoding="utf-8")))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert report.search == found
    assert found["size"] == 2 * 1 * 9 * 4
    assert len(found["scored"]) == min(3, found["unbeaten"])
    losses = [row["loss"] for row in found["scored"]]
    assert losses == sorted(losses)
    assert [row["widths"] for row in found["ranked"]] == [row["widths"] for row in found["scored"][:2]]
    ends = {row["losses"][-1]["loss"]: row["widths"] for row in found["ranked"]}
    assert found["chosen"] == ends[min(ends)]
    assert [row["tokens"] for row in found["ranked"][0]["losses"]] == [256, 512]
    assert found["tokens"] == 2 * 512 == report.stages["search"]["tokens"]
    config = model.config
    assert found["chosen"] == {
        "layer": config.num_hidden_layers, "neuron": config.intermediate_size, "channel": config.hidden_size,
        "head": config.num_attention_heads // config.num_key_value_heads,
    }  # fmt: skip
    chosen = next(row for row in found["scored"] if row["widths"] == found["chosen"])
    assert chosen["parameters"] == model.num_parameters()
    assert report.after["size/decoder_weights"].value <= 0.8 * report.before["size/decoder_weights"].value
    assert any("1,024 tokens in all" in note for note in report.notes)
    assert [path.name for path in caching.cache_dir("search").iterdir() if path.is_dir()] == []


def torn(monkeypatch: pytest.MonkeyPatch, at: int) -> list[None]:
    """The training of that number is interrupted before it begins; one entry for each that was asked for."""
    real, calls = trials.recover, list[None]()

    def recover(*given: Any, **named: Any) -> Any:
        calls.append(None)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*given, **named)

    monkeypatch.setattr(trials, "recover", recover)
    return calls


def test_an_interrupted_search_goes_on(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is torn, the end is the same, and nothing is measured twice."""
    whole = walked(recipe(), tmp_path / "whole")
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "other"))
    calls = torn(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(), tmp_path / "torn", page=no_page)
    assert not (tmp_path / "torn").exists()
    assert same_but_time(walked(recipe(), tmp_path / "torn"), whole)
    assert len(calls) == 5  # two candidates at two checkpoints, and the one that was torn
    monkeypatch.setattr(trials, "cut_copy", lambda *_: pytest.fail("measured again"))
    assert same_but_time(walked(recipe(), tmp_path / "again"), whole)


def test_a_search_that_begins_anew_in_another_study(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints of the interrupted one lie beyond its first mark for some, and are no loss at that mark."""
    whole = help_search(recipe()).record
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "other"))
    torn(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        help_search(recipe())
    anew = help_search(recipe(search={"storage": str(tmp_path / "new.journal")})).record
    losses = [[(x["tokens"], x["loss"]) for row in found["ranked"] for x in row["losses"]] for found in (whole, anew)]
    assert losses[0] == losses[1]
    assert anew["tokens"] == whole["tokens"]


def test_parts_of_a_training_are_one_training(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that stops at every checkpoint ends where one ends that runs through."""
    parts = walked(recipe(search={"checkpoints": 2}), tmp_path / "parts")
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "other"))
    whole = walked(recipe(search={"checkpoints": 1}), tmp_path / "whole")
    ends = [[row["losses"][-1]["loss"] for row in found["ranked"]] for found in (parts, whole)]
    assert ends[0] == ends[1]
    assert [len(row["losses"]) for row in parts["ranked"]] == [2, 2]


def test_tokens_of_parts_that_begin_anew_are_counted(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine that does not have the checkpoints of another, in every second part."""
    asked = recipe(search={"checkpoints": 4, "rank_tokens": 512, "stable": 1})
    steps, real, losses = 0, trials.recover, Loop.compute_loss

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal steps
        steps += 1
        return losses(*given, **named)

    def elsewhere(small: Any, blocks: Any, train: Any, *, folder: Path, **named: Any) -> Any:
        there = folder if train.until % 256 else tmp_path / folder.name
        return real(small, blocks, train, folder=there, **named)

    monkeypatch.setattr(Loop, "compute_loss", counted)
    monkeypatch.setattr(trials, "recover", elsewhere)
    found = help_search(asked).record
    assert found["tokens"] == 128 * steps
    assert steps > 4 * 2  # each candidate once


def test_tokens_by_hand() -> None:
    """Begun anew; taken up where an interrupted worker had come to; broken."""
    rows: list[dict[str, Any]] = [{"tokens": 100, "resumed": 0}, {"tokens": 200, "resumed": 0}]
    assert searching.spent(rows) == 300
    assert searching.spent([*rows, {"tokens": 300, "resumed": 250}]) == 400
    assert searching.spent([*rows, {"tokens": 300, "resumed": 100}]) == 500
    assert searching.spent([*rows, {"tokens": 300, "failed": "NaN"}]) == 400
    assert searching.spent([]) == 0


def test_a_worker_goes_on_with_what_it_has(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First with candidates whose checkpoints are here; rows stay in their order."""
    whole = walked(recipe(), tmp_path / "whole")
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "other"))
    real, folders = trials.recover, []

    def lost(*given: Any, folder: Path, **named: Any) -> Any:
        folders.append(folder.name)
        done = real(*given, folder=folder, **named)
        if len(folders) == 1:
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        return done

    monkeypatch.setattr(trials, "recover", lost)
    found = walked(recipe(), tmp_path / "out")
    first, second = folders[:2]
    assert folders == [first, second, second, first]
    ends = [[[point["loss"] for point in row["losses"]] for row in each["ranked"]] for each in (found, whole)]
    assert ends[0] == ends[1]
    assert found["tokens"] == whole["tokens"] + 256


def test_the_order_after_training_decides(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    found = faked(recipe(), monkeypatch, {256: [3.0, 2.0], 512: [3.0, 2.5]})
    assert found.record["chosen"] == found.record["scored"][1]["widths"]
    assert found.record["tau"] == [1.0]
    assert "as cut, another was best" in found.notes[0]


def test_a_stable_order_ends_it(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the same order in a row is enough; one flip in between, and it goes on."""
    asked = recipe(search={"checkpoints": 5, "rank_tokens": 640})
    steady = faked(asked, monkeypatch, {n: [2.0, 3.0] for n in range(128, 641, 128)})
    assert [len(row["losses"]) for row in steady.record["ranked"]] == [3, 3]
    assert steady.record["tokens"] == 2 * 384
    assert "stable after 384 tokens" in steady.record["end"]
    flipping = {128: [2.0, 3.0], 256: [2.0, 3.0], 384: [3.0, 2.0], 512: [3.0, 2.0], 640: [3.0, 2.0]}
    moving = faked(asked, monkeypatch, flipping)
    assert moving.record["tau"] == [1.0, -1.0, 1.0, 1.0]
    assert [len(row["losses"]) for row in moving.record["ranked"]] == [5, 5]


def test_halving(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worse half goes after each part; the tokens are those that were spent."""
    asked = recipe(search={"checkpoints": 4, "rank_tokens": 512, "top": 3, "halving": True, "candidates": 3})
    found = faked(asked, monkeypatch, {n: [3.0, 1.0, 2.0] for n in range(128, 513, 128)})
    trained = [len(row["losses"]) for row in found.record["ranked"]]
    assert trained == [1, 1, 1]
    assert found.record["chosen"] == found.record["ranked"][1]["widths"]
    assert found.record["tokens"] == 3 * 128


def test_a_shape_that_breaks_goes_to_the_end(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    found = faked(recipe(), monkeypatch, {256: [None, 2.0], 512: [None, 2.0]})
    assert found.record["chosen"] == found.record["ranked"][1]["widths"]
    assert found.record["ranked"][0]["losses"] == [{"tokens": 256, "failed": "NaN"}]  # and is trained no further


def test_trainings_that_all_diverge(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """No ranking came of them, so none is claimed."""
    for losses in ({256: [None, None]}, {256: [2.0, 3.0], 512: [None, None]}):
        with pytest.raises(BrokenModel, match=r"2 shapes were trained.*NaN(.*\n)+.*learning_rate"):
            faked(recipe(), monkeypatch, losses)


def test_one_that_lasts_is_taken(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though another was better until it diverged, or went on after the better half and diverged then."""
    last = faked(recipe(), monkeypatch, {256: [3.0, 2.0], 512: [3.0, None]}).record
    assert last["chosen"] == last["ranked"][0]["widths"]
    many = {"method": "random", "band": 0.3, "candidates": 4, "top": 4}
    asked = recipe(search={"checkpoints": 2, "halving": True, **many})
    gone = faked(asked, monkeypatch, {256: [1.0, 2.0, 3.0, 4.0], 512: [None, None, 3.0, 4.0]}).record
    assert [len(row["losses"]) for row in gone["ranked"]] == [2, 2, 1, 1]
    assert gone["chosen"] == gone["ranked"][2]["widths"]


def test_a_record_is_json(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all are equal there is no order: neither a number that JSON lacks, nor a stable one."""
    asked = recipe(search={"checkpoints": 4, "rank_tokens": 512})
    found = faked(asked, monkeypatch, {n: [2.0, 2.0] for n in range(128, 513, 128)}).record
    assert found["tau"] == [None, None, None]
    json.dumps(found, allow_nan=False)
    assert len(found["ranked"][0]["losses"]) == 4


@pytest.mark.parametrize(
    ("asked", "marks"),
    [
        ({"rank_tokens": 512, "checkpoints": 2}, [256, 512]),
        ({"rank_tokens": 500, "checkpoints": 2}, [256, 512]),
        ({"rank_tokens": 300, "checkpoints": 4}, [128, 256, 384]),
        ({"rank_tokens": 1, "checkpoints": 4}, [128]),
    ],
)
def test_candidates_are_compared_after_whole_steps(recipe: Make, asked: dict[str, int], marks: list[int]) -> None:
    """A step here takes two blocks of 64."""
    from regrow.kept import scored
    from regrow.prepare import as_wish

    made = recipe(search=asked)
    subject, wish = load(made.model), as_wish(made)
    assert wish is not None
    assert trials.Trials(subject, made, scored(subject, made, {}, None), wish).marks() == marks


def test_steps_larger_than_a_part_of_the_training(recipe: Make, tmp_path: Path) -> None:
    """Tokens are those that were seen, no order is stable by looking twice at one loss, and the page says so."""
    for tokens, marks in ((200, [128, 256]), (1, [128])):
        out = tmp_path / str(tokens)
        found = walked(recipe(search={"rank_tokens": tokens, "checkpoints": 8}), out)
        assert [[point["tokens"] for point in row["losses"]] for row in found["ranked"]] == [marks] * 2
        assert found["tokens"] == 2 * marks[-1]
        assert found["end"] == f"the best was trained on {marks[-1]}; steps of 128 leave {len(marks)} of 8 checkpoints"
        assert "NaN" not in (out / "report.json").read_text(encoding="utf-8")


def test_the_same_model_elsewhere_shares_the_ranking(
    recipe: Make, sprout_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model, teacher and texts are known by content; another teacher is another ranking."""
    other, texts = tmp_path / "elsewhere", [tmp_path / name / "text.txt" for name in ("a", "b")]
    shutil.copytree(sprout_dir, other)
    for text in texts:
        text.parent.mkdir()
        text.write_text("\n\n".join(f"{n} " + "word " * 60 for n in range(800)))
    named = {"calibration": {"text": str(texts[0])}, "recover": {"text": str(texts[0])}}
    first = help_search(recipe(**named)).record
    real, seen = trials.cut_copy, []
    monkeypatch.setattr(trials, "cut_copy", lambda *given: seen.append(1) or real(*given))
    moved = {"calibration": {"text": str(texts[1])}, "recover": {"text": str(texts[1]), "teacher": str(other)}}
    assert help_search(recipe(model=str(other), **moved)).record == first
    assert seen == []
    config = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**config, "top_k": 7}))
    taught = help_search(recipe(**overlay(named, {"recover": {"teacher": str(other)}}))).record
    assert len(seen) == 4  # as cut they are the same
    assert taught["scored"] == first["scored"]


def faked(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, losses: dict[int, list[Any]]) -> Chosen:
    """A search whose trainings give these losses, by tokens, in the order of the candidates."""
    subject = load(recipe.model)
    from regrow.kept import scored
    from regrow.prepare import as_wish

    def after(self: Any, points: Any, mark: int, _: Any) -> list[dict[str, Any]]:
        self.first = getattr(self, "first", None) or [dict(point) for point in points]
        rows = [losses[mark][self.first.index(dict(point))] for point in points]
        return [{"failed": "NaN"} if loss is None else {"loss": loss} for loss in rows]

    monkeypatch.setattr(trials.Trials, "after", after)
    wish = as_wish(recipe)
    assert wish is not None
    return search(subject, recipe, scored(subject, recipe, {}, None), wish, {}, None)


def test_kendalls_tau_by_hand() -> None:
    """Of three pairs one turned: (2 - 1) / 3."""
    rows = [[{"loss": loss} for loss in losses] for losses in ((1, 1, 3), (2, 3, 2), (3, 2, 1))]
    assert taus(rows) == [0.3333, -0.3333]
    assert taus([[{"loss": 1}, {"loss": 2}]]) == []
    assert taus([]) == []
    assert taus([[{"loss": 1}, {"loss": 1}], [{"loss": 2}, {"loss": 2}], [{"loss": 3}]]) == [1.0]


@pytest.mark.parametrize(
    ("kind", "rescale"),
    [("llama", False), ("llama", True), ("gemma3_text", False), ("gemma3_text", True), ("gpt_neox", False),
     ("phi3", False), ("phi3", True)],
)  # fmt: skip
def test_a_copy_is_the_cut_and_leaves_the_model(kind: str, rescale: bool) -> None:
    """Nothing is shared: what is done to the copy is not seen in the model, which is the same to the bit."""
    model = make(kind)
    anatomy = anatomy_of(model)
    kept = some_plan(anatomy, anatomy.supported, uniform=True, rescale=rescale)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    small = cut_copy(Subject(model, None, anatomy, {}, torch.float32), kept).model  # type: ignore[arg-type]
    sliced = cut(make(kind), kept).model
    for (name, ours), theirs in zip(small.named_parameters(), sliced.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def state_of(model: Any) -> dict[str, Any]:
    """All that a search could leave behind in a model, beside values."""
    return {
        "trains": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {name for name, p in model.named_parameters() if p.grad is not None},
        "hooks": {name: [*m._forward_hooks, *m._forward_pre_hooks] for name, m in model.named_modules()},
        "mode": {name: m.training for name, m in model.named_modules()},
        "own": {name: sorted(m.__dict__) for name, m in model.named_modules()},
    }


def test_candidates_leave_the_model_as_it_was(recipe: Make) -> None:
    """Who is their teacher too: values, buffers, and what is set on it."""
    subject = load(recipe().model)
    from regrow.kept import scored
    from regrow.prepare import as_wish

    def values() -> dict[str, torch.Tensor]:
        return {**dict(subject.model.named_parameters()), **dict(subject.model.named_buffers())}

    before, state = {name: value.detach().clone() for name, value in values().items()}, state_of(subject.model)
    asked = recipe(recover={"distil": {"states": [1]}}, search={"rank_tokens": 128, "checkpoints": 1})
    wish = as_wish(asked)
    assert wish is not None
    search(subject, asked, scored(subject, asked, {}, None), wish, {}, None)
    assert before.keys() == values().keys() > dict(subject.model.named_parameters()).keys()
    assert all(torch.equal(value, before[name]) for name, value in values().items())
    assert state_of(subject.model) == state


@pytest.mark.parametrize("how", ["minitron", "laco"])
def test_a_search_that_merges_heads_leaves_the_model_as_it_was(recipe: Make, how: str) -> None:
    """To the bit; and candidates are merged: their losses are others."""
    from regrow.kept import scored
    from regrow.prepare import as_wish

    space = {"rank_tokens": 0, "choices": {"head": [1], "layer": [6], "channel": [128]}}
    subject, losses = load(recipe().model), []
    before = {name: p.detach().clone() for name, p in subject.model.named_parameters()}
    for asked in (recipe(search=space), recipe(search=space, merge_heads=how)):
        wish = as_wish(asked)
        assert wish is not None
        found = search(subject, asked, scored(subject, asked, {}, None), wish, {}, None)
        losses.append({str(row["widths"]): row["loss"] for row in found.record["scored"]})
        assert any(layer.merged for layer in found.plan.layers) == (asked.merge_heads == how)
    assert losses[0].keys() == losses[1].keys()
    assert all(losses[0][shape] != losses[1][shape] for shape in losses[0])
    assert all(torch.equal(p, before[name]) for name, p in subject.model.named_parameters())


def test_a_search_among_shapes_that_merge_too_many_heads() -> None:
    for kind, heads in ({"num_key_value_heads": 2}, "head"), ({"num_key_value_heads": 6}, "group"):
        model = make("llama", **kind)
        subject = Subject(model, None, anatomy_of(model), {}, torch.float32)  # type: ignore[arg-type]
        few = {"head": 1, "group": 2}
        pool = searching.Pool([{heads: full(subject.anatomy)[heads]}, {heads: few[heads]}], 2, None)  # type: ignore[arg-type,dict-item,list-item]
        with pytest.raises(SettingsError, match=rf"keep {few[heads]} of \d {heads}s\n.*at least [23]"):
            searching.check_merged(subject, pool)
        searching.check_merged(subject, searching.Pool(pool.points[:1], 1, pool.space))


def test_a_search_asks_a_task_for_every_depth_it_tries(recipe: Make) -> None:
    from regrow.kept import scored
    from regrow.prepare import as_wish

    asked = recipe(
        criteria={"layer": "contiguous-task"},
        options={"task": "piqa", "limit": 4},
        search={"rank_tokens": 0, "choices": {"layer": [6, 5, 4]}},
    )
    subject, wish = load(asked.model), as_wish(asked)
    assert wish is not None
    tried = {6 - point["layer"] for point in searching.candidates(subject, asked).points} - {0}
    depths = searching.depths(subject, asked, wish)
    assert depths == sorted(tried)
    found = search(subject, asked, scored(subject, asked, {}, None, depths), wish, {}, None)
    assert len(found.plan.layers) == found.record["chosen"]["layer"]


def test_text_to_judge_by_is_not_what_was_scored(recipe: Make) -> None:
    from regrow.kept import calibration

    subject = load(recipe().model)
    seen, judges = calibration(subject, recipe()), trials.judges(subject, recipe())
    assert len(judges) == 8
    rows = {tuple(row) for row in seen.tolist()}
    assert not rows & {tuple(row) for row in judges.tolist()}


def test_latency(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only shapes that are fast enough are trained; the dense model is timed for a share."""
    times = iter([3.0, 1.0, 2.0, 10.0])
    monkeypatch.setattr(trials, "latency", lambda _: next(times))
    asked = recipe(search={"latency": "20%", "rank_tokens": 256, "top": 3})
    found = walked(asked, tmp_path / "out")
    assert [row.get("slow", False) for row in found["scored"]] == [False, False, True]
    assert [row["latency_ms"] for row in found["scored"]][2] == 3.0
    assert [row["widths"] for row in found["ranked"]] == [row["widths"] for row in found["scored"][:2]]
    report = Report.from_json(json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8")))
    assert any("; 3 were scored as cut (1 of them are too slow)" in note for note in report.notes)
    assert same_but_time(walked(asked, tmp_path / "again"), found)  # no time is taken again, the dense model's neither
    with pytest.raises(BudgetError, match=r"latency 0.5ms .*\n.*at least 1.0 ms"):
        run(recipe(search={"latency": "0.5ms", "rank_tokens": 0}), tmp_path / "slow", page=no_page)
    assert not (tmp_path / "slow").exists()


def test_times_belong_to_a_machine(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere they are taken anew; losses would not be."""
    taken = []
    monkeypatch.setattr(trials, "latency", lambda _: taken.append(1) or 1.0)
    asked = recipe(search={"latency": "100%", "rank_tokens": 0})
    help_search(asked)
    help_search(asked)
    assert len(taken) == 4
    monkeypatch.setattr(trials, "machine", lambda: {"cpu": "another"})
    help_search(asked)
    assert len(taken) == 8
    own = trials.cache.key
    monkeypatch.setattr(trials.cache, "key", lambda what: own(what | {"device": "a GPU"} if "device" in what else what))
    help_search(asked)
    assert len(taken) == 12, "and to a device"


def test_a_smaller_teacher_is_warned_of_before_any_training(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: not of the shape that was chosen again."""

    def left(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    asked = recipe(recover={"tokens": 256})
    subject = load(asked.model)
    monkeypatch.setattr(plan_checks.checkpoint, "count", lambda _: 10)
    monkeypatch.setattr(trials, "recover", left)
    most = max(trials.count(subject.anatomy, shape_of(subject.anatomy, p)) for p in candidates(subject, asked).points)
    says = f"10 parameters and the largest student {most:,}: little is learnt"
    with pytest.warns(RegrowWarning, match=says) as said, pytest.raises(KeyboardInterrupt):
        run(asked, tmp_path / "out", page=no_page)
    assert len(said) == 1
    plan_checks.check_planned(subject, Plan.everything(subject.anatomy), asked)


def test_no_shape_gives_a_loss(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said as it is, where a latency is asked for too."""
    monkeypatch.setattr(trials.Trials, "judged", broken)
    for asked in ({"latency": "12ms"}, {}):
        with pytest.raises(BrokenModel, match="none of them gives a loss: NaN"):
            help_search(recipe(search=asked))


def broken(*_: Any) -> dict[str, Any]:
    raise BrokenModel("NaN", "numbers", "look")


def test_a_worker_finishes_what_another_began(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = help_search(recipe())
    monkeypatch.setattr(trials, "cut_copy", lambda *_: pytest.fail("measured again"))
    assert walked(recipe(), tmp_path / "out")["chosen"] == chosen.record["chosen"]
    with pytest.raises(SettingsError, match="does not search"):
        help_search(recipe(search=None))


def test_exact_widths(recipe: Make, tmp_path: Path) -> None:
    shape = {"layer": 5, "neuron": 300, "channel": 112, "head": 1}
    asked = recipe(search=None, keep=None, shape=shape, axes=list(shape), divisors={})
    run(asked, tmp_path / "out", page=no_page)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.num_hidden_layers, config.intermediate_size, config.hidden_size) == (5, 300, 112)
    assert config.num_attention_heads == config.num_key_value_heads == 4


def test_what_cannot_be_searched(recipe: Make, tmp_path: Path) -> None:
    def refused(error: type[Exception], says: str, **changes: Any) -> None:
        with pytest.raises(error, match=says):
            run(recipe(**changes), tmp_path / "out", page=no_page)
        assert not (tmp_path / "out").exists()

    refused(BudgetError, "none of 72 shapes", keep="10%")
    refused(BudgetError, "is not understood", search={"also": ["fast"]})
    refused(BudgetError, "is not understood", search={"latency": "quick"})
    refused(SettingsError, "without a budget", keep=None)
    refused(SettingsError, "shape and keep", shape={"layer": 5})
    refused(SettingsError, "1 to 6", search={"choices": {"layer": [7]}})
    refused(TextError, "used up", calibration={"tokens": 10**8})
    only: dict[str, Any] = {"axes": ["neuron"], "divisors": {}}
    refused(SettingsError, "1 to 352", search=None, keep=None, shape={"neuron": 400}, **only)
    with pytest.raises(UnknownName, match=r"search\.speed"):
        recipe(search={"speed": 1})


def test_heads_of_a_model_without_groups(recipe: Make) -> None:
    asked = recipe()
    grouped = anatomy_of(make("llama"))
    single = anatomy_of(make("gpt_neox"))
    assert prepare.fitted(asked, grouped).axes == asked.axes
    assert prepare.fitted(asked, single).axes == ("layer", "group", "neuron", "channel")


def test_a_search_belongs_to_its_code(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of regrow measures anew."""
    help_search(recipe(search={"rank_tokens": 0}))
    monkeypatch.setattr(caching, "code", lambda: "other")
    seen = []
    real = trials.cut_copy
    monkeypatch.setattr(trials, "cut_copy", lambda *given: seen.append(1) or real(*given))
    help_search(recipe(search={"rank_tokens": 0}))
    assert len(seen) == 3


@pytest.mark.parametrize("rank_tokens", [0, 512])
def test_a_search_belongs_to_the_code_of_its_criterion(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, rank_tokens: int
) -> None:
    """A user turns a criterion of their own about: other units stay, and nothing measured before is said of them."""
    found, known = [], CRITERIA.get("magnitude")
    for code, sign in (("before", 1), ("after", -1)):
        own = replace(known, name="mine", code=code, score=lambda sight, sign=sign: sign * known.score(sight))
        monkeypatch.setitem(CRITERIA._items, "mine", own)
        one = {"candidates": 2, "rank_tokens": rank_tokens}
        found.append(help_search(recipe(criterion="mine", axes=["neuron", "channel"], search=one)))
    first, then = (chosen.record for chosen in found)
    assert first["inside"] == then["inside"]
    losses = [{str(row["widths"]): row["loss"] for row in record["scored"]} for record in (first, then)]
    assert all(losses[0][shape] != losses[1][shape] for shape in losses[0])
    ends = [{row["losses"][-1]["loss"] for row in record["ranked"]} for record in (first, then)]
    assert not ends[0] & ends[1]


def deep(**changes: Any) -> dict[str, Any]:
    """A search in which some shapes lose layers alone, and all that are left of others have six."""
    choices = {"layer": [6, 5], "neuron": [352, 288]}
    space = {"rank_tokens": 128, "checkpoints": 1, "band": 0.3, "choices": choices}
    usual = {"keep": "89%", "criterion": "magnitude", "axes": ["layer", "neuron"], "divisors": {}, "search": space}
    return overlay(usual, changes)


@pytest.mark.parametrize(
    ("asked", "says", "inside", "unbeaten", "unfit"),
    [
        ({"recover": {"method": "cut"}}, "no matrix smaller", 3, 1, 1),
        ({"recover": {"distil": {"states": [0, 6]}}}, "states at place 6", 3, 1, 2),
        ({"recover": {"method": "spp", "rank": 16}, "search": {"choices": {"layer": [6], "neuron": [288, 280]}}},
         "SPP of rank 16", 2, 1, 1),
    ],
    ids=["cut", "states", "spp"],
)  # fmt: skip
def test_shapes_that_cannot_be_trained_are_left_out(
    recipe: Make, asked: dict[str, Any], says: str, inside: int, unbeaten: int, unfit: int
) -> None:
    """Before any is scored, and it is said how many and why. Whoever is left is not exceeded by one that is not."""
    made = recipe(**deep(**asked))
    found = help_search(made)
    assert (found.record["inside"], found.record["unbeaten"]) == (inside, unbeaten)
    assert found.record["unfit"]["shapes"] == unfit
    assert says in found.record["unfit"]["why"]
    assert any(f"{unfit} of them were left out" in note and says in note for note in found.notes)


def test_a_search_that_cannot_go_on(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shape of it can be trained: refused before anything is scored."""
    monkeypatch.setattr("regrow.run.scored", lambda *_: pytest.fail("scored"))
    for asked, says in (
        ({"recover": {"method": "cut"}, "search": {"choices": {"neuron": [352], "layer": [5]}}}, "no matrix smaller"),
        ({"recover": {"method": "spp", "rank": 3}}, "SPP of rank 3"),
        ({"recover": {"method": "spp", "rank": 3, "tokens": 128}, "search": {"rank_tokens": 0}}, "SPP of rank 3"),
    ):
        with pytest.raises(SettingsError, match=rf"none of . shapes inside the budget can go on: .*{says}"):
            help_search(recipe(**deep(**asked)))
    monkeypatch.undo()


def test_a_grid_says_how_many_are_inside(recipe: Make) -> None:
    """All that fill the budget, and of these those that no other exceeds; by lot there are no such."""
    subject, loose = load(recipe().model), {"band": 0.3}
    pool = searching.candidates(subject, recipe(search={**loose, "candidates": 999}))
    lot = searching.candidates(subject, recipe(search={**loose, "candidates": 999, "method": "random"}))
    assert pool.inside == lot.inside == len(lot.points) > len(pool.points) == pool.unbeaten
    assert (lot.unbeaten, lot.unfit, lot.why) == (None, 0, None)
    found = help_search(recipe(search={**loose, "rank_tokens": 0}))
    expected = (
        f"search: {pool.inside} shapes inside the budget, of which no other exceeds {pool.unbeaten}; 3 were scored"
    )
    assert found.notes[0].startswith(expected)


def test_another_micro_batch(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the loss hangs on the pass it is another training, which does not meet the checkpoints of the first."""
    asked = {"search": {"candidates": 2}, "recover": {"distil": {"states": [1]}}}
    calls = torn(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        help_search(recipe(**asked))
    found = help_search(recipe(**overlay(asked, {"recover": {"micro_batch": 1}})))
    assert len(found.record["ranked"]) == 2
    assert len(calls) == 3 + 4


def test_more_checkpoints(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that was interrupted is asked for an earlier loss than it had trained to, and measures that one."""

    def losses() -> list[list[float]]:
        found = help_search(recipe(search={"rank_tokens": 512, "checkpoints": 4}))
        return [[part["loss"] for part in row["losses"]] for row in found.record["ranked"]]

    torn(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        help_search(recipe(search={"rank_tokens": 512, "checkpoints": 2}))
    asked_later = losses()
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "fresh"))
    assert asked_later == losses()


@pytest.mark.parametrize("resume", [True, False])
def test_what_an_interrupted_search_left_may_be_dropped(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    """The recipe says whether its first part goes on; later parts go on with what this process has done itself."""
    seen, real = [], trials.recover

    def watched(*given: Any, **named: Any) -> Any:
        seen.append(given[2].resume)
        return real(*given, **named)

    monkeypatch.setattr(trials, "recover", watched)
    help_search(recipe(recover={"resume": resume}))
    assert seen == [resume, resume, True, True]


def test_a_dense_model_without_a_loss(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of its latency is a share of nothing."""
    real = trials.Trials.judged

    def judged(self: Any, model: Subject) -> dict[str, Any]:
        return broken() if model is self.subject else {**real(self, model), "latency_ms": 1.0}

    monkeypatch.setattr(trials, "latency", lambda _: 1.0)
    monkeypatch.setattr(trials.Trials, "judged", judged)
    with pytest.raises(BrokenModel, match=r"latency 80% of a dense model that gives no loss: NaN\n.*12ms"):
        help_search(recipe(search={"latency": "80%", "rank_tokens": 0}))


def test_a_search_reads_the_calibration_text(recipe: Make, tmp_path: Path) -> None:
    """To judge by, though its scores read none: it is not measured on, it must be there, and its blocks must fit."""
    text = tmp_path / "mine.txt"
    text.write_text("\n\n".join(f"{n} " + "word " * 60 for n in range(800)))
    weights = {"criterion": "magnitude", "axes": ["neuron"], "evaluate": {"text": str(text)}}
    with pytest.raises(TextError, match="of its paragraphs are calibration text"):
        prepare.check(recipe(**weights, calibration={"text": str(text)}))
    prepare.check(recipe(**weights, calibration={"text": str(text)}, search=None))
    with pytest.raises(TextError, match=r"nosuch\.txt"):
        prepare.check(recipe(criterion="magnitude", axes=["neuron"], calibration={"text": "nosuch.txt"}))
    long = recipe(criterion="magnitude", axes=["neuron"], calibration={"block": 10**5})
    with pytest.raises(SettingsError, match=r"calibration\.block = 100000, and the model reads"):
        prepare.check_blocks(load(long.model), long)


MEASURED: dict[str, Callable[[Subject, Path], int]] = {
    "parameters": lambda small, _: small.model.num_parameters(),
    "file_bytes": lambda small, folder: written(small, folder),
    "kv_bytes_per_token": lambda small, _: cached(small.model),
}
"""Counted on a model that was built, by no formula of ours."""


def written(small: Subject, folder: Path) -> int:
    """Bytes of tensors in the file, without its header."""
    folder.mkdir()
    write(small.model, small.tokenizer, folder, small.store, None)
    path = folder / "model.safetensors"
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


@torch.no_grad()
def cached(model: Any, tokens: int = 7) -> int:
    """Bytes a token of what a model in 16 bits keeps of it."""
    kept = model.to(torch.bfloat16)(input_ids=torch.arange(tokens)[None], use_cache=True).past_key_values
    size = sum(x.numel() * x.element_size() for layer in kept.layers for x in (layer.keys, layer.values))
    each, rest = divmod(size, tokens)
    assert rest == 0
    return each


@pytest.mark.parametrize(
    ("keep", "also", "axes"),
    [
        ("80%", (), ("layer", "head", "neuron", "channel")),
        ("params=80%", ("kv=75%",), ("layer", "group", "head", "neuron")),
        ("kv=75%", ("file=90%",), ("group", "neuron")),
        ("file=90%", (), ("group", "head", "channel")),
        ("kv=1200", (), ("layer", "group")),
    ],
)
def test_realised_widths_are_those_asked_for(
    recipe: Make, tmp_path: Path, keep: str, also: tuple[str, ...], axes: tuple[str, ...]
) -> None:
    """What budgets count is what a model that was built has, and within each of them."""
    from regrow.kept import scored
    from regrow.prepare import as_wish

    divisors = {unit: 16 for unit in ("neuron", "channel") if unit in axes}
    space = {"band": 0.3, "also": list(also), "candidates": 2}
    asked = recipe(keep=keep, axes=list(axes), divisors=divisors, criterion="magnitude", search=space)
    subject = load(asked.model)
    anatomy, scores, wish = subject.anatomy, scored(subject, asked, {}, None), as_wish(asked)
    assert wish is not None
    points = searching.candidates(subject, asked).points
    assert points
    for place, point in enumerate(points):
        plan = realise(anatomy, scores, wish, totals_of(anatomy, point))
        small = cut_copy(subject, plan)
        found = {name: measure(small, tmp_path / str(place)) for name, measure in MEASURED.items()}
        assert found == {name: MEASURES[name](anatomy, plan.shape()) for name in MEASURED}
        for budget in map(Budget.parse, (keep, *also)):
            counted = found.get(budget.measure, budget.count(anatomy, plan.shape()))
            assert counted <= budget.target(anatomy) < budget.count(anatomy, anatomy.dense)
