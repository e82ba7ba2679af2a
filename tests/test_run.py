"""The whole road: what is kept between runs, what an interruption leaves, and what a dry run foretells."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers import logging as hf_logging

import regrow.kept as kept
import regrow.run as road
from models import anatomy_of, make
from regrow.artifacts.budget import Budget
from regrow.artifacts.plan import Plan
from regrow.artifacts.report import Report
from regrow.artifacts.scores import Scores
from regrow.artifacts.shape import Shape
from regrow.artifacts.sight import CRITERIA
from regrow.artifacts.space import full
from regrow.dryrun import ITEM_TOKENS, SCORE_COPIES, dry_run, machine_gflops
from regrow.engines import checkpoint, provenance
from regrow.engines.bind import Subject
from regrow.errors import (
    BudgetError,
    IdentityError,
    MissingDemo,
    OutputError,
    RegrowWarning,
    SettingsError,
    TextError,
    UnknownName,
)
from regrow.prepare import as_wish, check_steps
from regrow.recipe_files import RECIPES, find_recipe, overlay, read_recipe, recipe_names
from regrow.search import candidates
from regrow.settings import Recipe, parse
from regrow.stages import recover as recovering
from regrow.trained import recovered


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache of its own, and no bars of other libraries."""
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "cache"))
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    yield tmp_path / "cache"
    if bars:
        hf_logging.enable_progress_bar()


@pytest.fixture
def recipe(sprout_dir: Path) -> Callable[..., Recipe]:
    """A quick run over the test model; changes go on top."""

    def make(**changes: Any) -> Recipe:
        usual = {
            "model": str(sprout_dir),
            "criterion": "activation",
            "calibration": {"tokens": 512, "block": 64},
            "evaluate": {"max_tokens": 512, "seqlen": 64, "speed": False, "samples": []},
        }
        return parse(overlay(usual, changes))

    return make


def no_page(report: Report, plan: Plan, scores: Scores, text: str) -> dict[str, str]:
    return {"facts.txt": f"{report.made_by['keep']} {len(plan.layers)} {sorted(scores.table)} {len(text) > 0}"}


def walk(recipe: Recipe, out: Path, **more: Any) -> Report:
    return road.run(recipe, out, page=no_page, **more)


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        home = road if hasattr(road, name) else kept
        monkeypatch.setattr(home, name, lambda *_, name=name, **__: pytest.fail(f"{name} ran again"))


Make = Callable[..., Recipe]


# ---- what is kept


def test_another_ratio_costs_no_second_calibration(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = walk(recipe(keep="80%"), tmp_path / "a")
    assert first.stages["score"]["cached"] is False
    assert first.stages["score"]["tokens"] == 512
    notes = json.loads((tmp_path / "a" / "regrow.json").read_text())
    assert (notes["id"], notes["base_model"]) == ("a", recipe().model)
    assert notes["base"]["fingerprint"] == provenance.fingerprint(Path(recipe().model))
    assert "path" not in notes["base"]
    forbid(monkeypatch, "score", "calibration")
    seen: list[str] = []
    second = walk(recipe(keep="60%"), tmp_path / "b", progress=lambda what, *_: seen.append(what))
    assert second.stages["score"]["cached"] is True
    assert second.stages["evaluate before"]["cached"] is True
    assert seen == ["demo held out"] * len(seen)
    assert second.before == first.before
    assert second.after["size/decoder_weights"].value < first.after["size/decoder_weights"].value
    plans = [Plan.from_json(json.loads((tmp_path / x / "plan.json").read_text())) for x in "ab"]
    assert plans[0].made_by["scores"] == plans[1].made_by["scores"]
    assert (tmp_path / "a" / "facts.txt").read_text() == "80% 6 ['group', 'neuron'] True"


@pytest.mark.parametrize(
    "change",
    [
        {"criterion": "magnitude"},
        {"criteria": {"group": "magnitude"}},
        {"axes": ["neuron"]},
        {"calibration": {"tokens": 640}},
        {"calibration": {"block": 32}},
        {"calibration": {"text": "demo:squad"}},
        {"options": {"batch": "mean"}},
        {"reduce": "mean"},
        {"seed": 1},
        {"dtype": "bf16"},
    ],
    ids=str,
)
def test_scores_are_kept_under_everything_they_hang_on(recipe: Make, change: dict[str, Any]) -> None:
    subject = road.load(recipe().model)
    walked: list[dict[str, Any]] = []
    for asked in (recipe(), recipe(**change), recipe()):
        record: dict[str, Any] = {}
        road.scored(subject, asked, record, None)
        walked.append(record)
    assert [record["cached"] for record in walked] == [False, False, True]


@pytest.mark.parametrize(
    "change", [{"keep": "50%"}, {"spread": "ends"}, {"uniform": True}, {"split": {"group": 0.5}}], ids=str
)
def test_scores_do_not_hang_on_what_is_cut(recipe: Make, change: dict[str, Any]) -> None:
    subject = road.load(recipe().model)
    record: dict[str, Any] = {}
    for asked in (recipe(), recipe(**change)):
        road.scored(subject, asked, record, None)
    assert record["cached"] is True


def test_another_version_of_the_code_scores_and_measures_anew(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = []
    for number, code in enumerate(("one", "one", "two")):
        monkeypatch.setattr(road.cache, "code", lambda code=code: code)
        stages = walk(recipe(), tmp_path / str(number)).stages
        cached.append((stages["score"]["cached"], stages["evaluate before"]["cached"]))
    assert cached == [(False, False), (True, True), (False, False)]


def test_a_criterion_that_was_edited_scores_anew(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file may lie outside regrow."""
    subject, found = road.load(recipe().model), CRITERIA.get("activation")
    cached = []
    for code in ("one", "one", "two"):
        monkeypatch.setitem(CRITERIA._items, "activation", dataclasses.replace(found, code=code))
        record: dict[str, Any] = {}
        road.scored(subject, recipe(), record, None)
        cached.append(record["cached"])
    assert cached == [False, True, False]


def test_any_file_can_be_measured_on_and_its_every_space_counts(recipe: Make, tmp_path: Path) -> None:
    text = tmp_path / "text.raw"
    cached = []
    for number, gap in enumerate((" ", " ", "  ")):
        text.write_text(gap.join(["so", "the", "river", "rose"] * 130))
        report = walk(recipe(evaluate={"text": str(text), "max_tokens": 256}), tmp_path / str(number))
        cached.append(report.stages["evaluate before"]["cached"])
    assert cached == [False, True, False]
    assert report.before["text/text.raw/perplexity"].how["split"] == "the whole file"


def test_text_that_is_trained_on_is_not_measured_on(recipe: Make, tmp_path: Path) -> None:
    text, other = tmp_path / "mine.txt", tmp_path / "copy.md"
    text.write_text("\n\n".join(f"Tale number {i} " + "went on and on and was not over yet. " * 8 for i in range(60)))
    other.write_text("A preface.\n\n" + text.read_text())
    trained = {"recover": {"text": str(text), "tokens": 256, "block": 32}}
    scored = {"calibration": {"text": str(text)}}
    for used, what in ((trained, "recovery text"), (scored, "calibration text")):
        for measured in (text, other):
            with pytest.raises(TextError, match=what):
                road.check(recipe(**used, evaluate={"text": str(measured)}))
        road.check(recipe(**used, evaluate={"text": "demo"}))
    road.check(recipe(**scored, criterion="magnitude", evaluate={"text": str(text)}))  # reads no text


@pytest.mark.parametrize("words", ["went on and on. " * 20, "ended. "], ids=["long", "short"])
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_rows_that_are_trained_on_are_not_measured_on(recipe: Make, tmp_path: Path, kind: str, words: str) -> None:
    """Whatever their file looks like; its held-out part may be."""
    rows = [{"text": f"Tale number {i} {words}"} for i in range(60)]
    text, other = tmp_path / f"mine.{kind}", tmp_path / "other.jsonl"
    text.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    other.write_text('{"text": "Another tale."}')
    trained = {"recover": {"text": str(text), "tokens": 256, "block": 32}}
    with pytest.raises(TextError, match="of its paragraphs are recovery text"):
        road.check(recipe(**trained, evaluate={"text": str(text)}))
    road.check(recipe(**trained, evaluate={"text": str(other)}))
    road.check(recipe(**trained, evaluate={"text": f"heldout:{text}"}))


def test_a_note_says_how_many_rows_have_no_answer(recipe: Make, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i}? " * 5, "completion": "" if i % 50 == 0 else f"It is {i}."} for i in range(200)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"text": str(tmp_path / "mine.jsonl"), "tokens": 256, "block": 32, "batch": 2, "template": "alpaca"}
    report = walk(recipe(recover=asked), tmp_path / "out")
    assert "4 rows of the recovery text have no answer: left out" in report.notes


@pytest.mark.parametrize("part", ["calibration", "recover"])
def test_blocks_that_are_longer_than_the_model_reads(recipe: Make, tmp_path: Path, part: str) -> None:
    most = road.load(recipe().model).model.config.max_position_embeddings
    asked: dict[str, Any] = {part: {"block": most + 1, "tokens": 4 * most}}
    with pytest.raises(SettingsError, match=rf"{part}\.block = {most + 1}, and the model reads {most} tokens at most"):
        walk(recipe(**asked), tmp_path / "out")


def test_a_short_text_is_said_to_be_short(recipe: Make, tmp_path: Path) -> None:
    """Of the calibration a tenth is read, of the recovery text the same tokens come again; enough is not spoken of."""
    text = tmp_path / "mine.txt"
    text.write_text("\n\n".join(f"Tale number {i} " + "went on and on. " * 15 for i in range(60)))
    asked: dict[str, Any] = {
        "keep": None,
        "sparsify": {"pattern": "2:4", "criterion": "wanda"},
        "calibration": {"text": str(text), "tokens": 64_000, "block": 32},
        "recover": {"method": "spp", "text": str(text), "tokens": 8192, "block": 32, "batch": 128},
    }
    report = road.run(recipe(**asked), tmp_path / "short", page=lambda *_: {})
    read = report.stages["sparsify"]["tokens"]
    assert 0 < read < 64_000
    assert f"the text's calibration part filled {read:,} of the 64,000 tokens asked for" in report.notes
    (again,) = (note for note in report.notes if note.startswith("trained "))
    times, tokens = re.findall(r"trained ([\d.]+) times over a recovery text of ([\d,]+) tokens", again)[0]
    assert float(times) * int(tokens.replace(",", "")) == pytest.approx(8192, rel=0.05)
    enough = overlay(asked, {"calibration": {"tokens": read}, "recover": None})
    plenty = road.run(recipe(**enough), tmp_path / "enough", page=lambda *_: {})
    assert not any("tokens" in note for note in plenty.notes)


def test_new_text_in_the_same_file_is_scored_anew(recipe: Make, tmp_path: Path) -> None:
    subject, text, record = road.load(recipe().model), tmp_path / "mine.txt", dict[str, Any]()
    asked = recipe(calibration={"text": str(text), "tokens": 64, "block": 32})
    for start in ("The old", "A new"):
        text.write_text("\n\n".join(f"{start} tale number {i} " + "went on and on. " * 15 for i in range(60)))
        road.scored(subject, asked, record, None)
        assert record["cached"] is False


def test_a_cache_that_was_deleted_is_no_loss(recipe: Make, tmp_path: Path, cache: Path) -> None:
    import shutil

    first = walk(recipe(), tmp_path / "a")
    shutil.rmtree(cache)
    second = walk(recipe(), tmp_path / "b")
    assert second.stages["score"]["cached"] is False
    assert second.after == first.after


@pytest.mark.parametrize(
    "change",
    [
        {"calibration": {"tokens": 640}},
        {"calibration": {"block": 32}},
        {"calibration": {"text": "demo:squad"}},
        {"seed": 1},
        {"dtype": "bf16"},
    ],
    ids=str,
)
def test_readings_are_kept_under_everything_they_hang_on(recipe: Make, change: dict[str, Any]) -> None:
    subject = road.load(recipe().model)
    first, other, again = (kept.statistics(subject, asked) for asked in (recipe(), recipe(**change), recipe()))
    assert first.folder == again.folder != other.folder


def test_readings_serve_any_pattern_of_their_model(recipe: Make) -> None:
    subject = road.load(recipe().model)
    usual = {"keep": None, "sparsify": {"pattern": "2:4", "criterion": "sparsegpt"}}
    ways = ({}, {"sparsify": {"pattern": "50%"}}, {"sparsify": {"criterion": "wanda", "solver": ["refit"]}})
    assert len({kept.statistics(subject, recipe(**overlay(usual, way))).folder for way in ways}) == 1
    other = dataclasses.replace(subject, source={**subject.source, "fingerprint": "another"})
    assert kept.statistics(subject, recipe()).folder != kept.statistics(other, recipe()).folder


# ---- interruptions


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def pull_plug(what: str, after: int) -> Any:
    def progress(name: str, done: int, _: int) -> None:
        if name == what and done >= after:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("what", ["activations", "demo held out"])
def test_an_interruption_leaves_nothing_half_written(recipe: Make, tmp_path: Path, cache: Path, what: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        walk(recipe(), tmp_path / "out" / "cut", progress=pull_plug(what, 1))
    assert listing(tmp_path / "out") == []
    assert [p for p in cache.rglob("*") if ".writing-" in p.name] == []
    assert listing(cache / "measures") == []
    walk(recipe(), tmp_path / "out" / "cut")
    assert listing(tmp_path / "out") == ["cut"]


def test_the_command_says_how_to_go_on(
    sprout_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from regrow.cli.main import main

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(kept, "score", interrupted)
    ask = ["prune", str(sprout_dir), "--out", str(tmp_path / "cut"), "--criterion", "magnitude", "--text", "none", "-q"]
    assert main(ask) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_interrupted_recovery_goes_on_where_it_stopped(
    recipe: Make, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """And ends where it would have ended."""
    often = recovering.as_train
    monkeypatch.setattr(recovering, "as_train", lambda *x: dataclasses.replace(often(*x), save_every=2))
    settings = {"method": method, "tokens": 6 * 4 * 64, "block": 64, "batch": 4, "micro_batch": 2}
    asked = recipe(keep="70%", recover=settings)
    step = 4 * 64
    with pytest.raises(KeyboardInterrupt):
        walk(asked, tmp_path / "out" / "cut", progress=pull_plug("recovery", 5 * step))
    assert listing(tmp_path / "out") == []
    assert len(listing(cache / "recover")) == 1
    seen: list[int] = []
    forbid(monkeypatch, "score")
    report = walk(
        asked, tmp_path / "out" / "cut", progress=lambda what, done, _: what == "recovery" and seen.append(done)
    )
    assert seen == [5 * step, 6 * step]  # the checkpoint of step 4 was found
    assert listing(tmp_path / "out") == ["cut"]
    assert listing(cache / "recover") == []  # and is gone once it is not needed
    assert report.training[-1]["tokens"] == 6 * step
    monkeypatch.undo()
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "other cache"))
    walk(asked, tmp_path / "whole")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "whole", tmp_path / "out" / "cut")]
    assert weights[0] == weights[1]


def test_less_memory_is_no_reason_to_start_anew(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller micro-batch goes on from the checkpoint; another type starts anew instead of being refused."""
    often = recovering.as_train
    monkeypatch.setattr(recovering, "as_train", lambda *x: dataclasses.replace(often(*x), save_every=1))
    usual = {"tokens": 4 * 4 * 64, "block": 64, "batch": 4, "micro_batch": 4, "rank": 2}
    with pytest.raises(KeyboardInterrupt):
        walk(recipe(recover=usual), tmp_path / "cut", progress=pull_plug("recovery", 2 * 4 * 64))

    def note(seen: list[int], what: str, done: int, _: int) -> None:
        if what == "recovery":
            seen.append(done)

    for number, (changes, first) in enumerate((({"recover": {"micro_batch": 1}}, 2), ({"dtype": "bf16"}, 1))):
        seen: list[int] = []
        asked = parse(overlay(recipe(recover=usual).model_dump(), changes))
        walk(asked, tmp_path / str(number), progress=partial(note, seen))
        assert seen[0] == first * 4 * 64


def test_layers_go_and_the_rest_recovers(recipe: Make, tmp_path: Path) -> None:
    asked = {"tokens": 512, "block": 64, "batch": 4, "micro_batch": 2, "rank": 2}
    report = walk(recipe(axes=["layer"], criterion="magnitude", keep="60%", recover=asked), tmp_path / "cut")
    assert report.training[-1]["tokens"] == 512
    assert len(report.shape["after"]["layers"]) < len(report.shape["before"]["layers"])


@pytest.mark.parametrize("uniform", [True, False])
def test_a_sparse_model_that_is_cut_keeps_the_zeros_of_what_is_left(
    recipe: Make, tmp_path: Path, sprout_dir: Path, uniform: bool
) -> None:
    """Unless plain LoRA is named, which warns."""
    import regrow

    quiet = {"text": None, "samples": []}
    regrow.sparsify(str(sprout_dir), tmp_path / "sparse", pattern="50%", criterion="magnitude", evaluate=quiet)
    short = {"tokens": 256, "block": 32, "batch": 2, "micro_batch": 2, "learning_rate": 0.01}
    wish = {
        "model": str(tmp_path / "sparse"),
        "axes": ["neuron", "layer"],
        "criterion": "magnitude",
        "uniform": uniform,
    }
    asked = recipe(**wish, keep="70%", recover=short)
    report = walk(asked, tmp_path / "cut")
    assert report.made_by["recover"]["method"] == "hira"
    cut = walk(recipe(**wish, keep="70%"), tmp_path / "plain")
    kept, plain = (found.after["size/nonzero_weights"].value for found in (report, cut))
    assert kept == plain < 0.8 * report.before["size/nonzero_weights"].value
    filled = {**short, "method": "lora"}
    with pytest.warns(RegrowWarning, match="zeros are filled by plain LoRA"):
        report = walk(recipe(**wish, keep="70%", recover=filled), tmp_path / "filled")
    assert any("filled by plain LoRA" in note for note in report.notes)


def test_heads_are_merged_on_the_road(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"axes": ["head", "neuron"], "uniform": True, "split": {"head": 1, "neuron": 0.2}}
    walk(recipe(keep="85%", merge_heads="minitron", **asked), tmp_path / "merged")
    plan = Plan.from_json(json.loads((tmp_path / "merged" / "plan.json").read_text()))
    assert plan.merge == "minitron"
    assert all(len(layer.merged) == 4 for layer in plan.layers)
    walk(recipe(keep="85%", **asked), tmp_path / "plain")
    merged, plain = (checkpoint.read(tmp_path / name)[0].state_dict() for name in ("merged", "plain"))
    other = [name for name in plain if not torch.equal(merged[name], plain[name])]
    assert other == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(6)]
    forbid(monkeypatch, "score", "calibration")
    with pytest.raises(SettingsError, match="no query heads go"):
        walk(recipe(merge_heads="laco"), tmp_path / "out")


def test_a_task_chooses_which_layers_go(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run without which least goes wrong, among runs of the length that the budget asks for; kept for such runs."""
    options = {"task": "piqa", "limit": 8}
    asked = {"axes": ["layer"], "criterion": "contiguous-task", "options": options}
    walk(recipe(keep="67%", **asked), tmp_path / "two")
    plan = Plan.from_json(json.loads((tmp_path / "two" / "plan.json").read_text()))
    scores = Scores.load(next((tmp_path / "cache" / "scores").glob("*.safetensors")))
    costs = scores.table["layer"].diagonal(2)
    start = int(costs.argmin())
    assert [layer.index for layer in plan.layers] == [i for i in range(6) if not start <= i < start + 2]
    assert int(scores.table["layer"].isfinite().sum()) == len(costs) == 5
    assert scores.made_by["depths"] == [2]
    report = walk(recipe(keep="50%", **asked), tmp_path / "three")
    assert report.stages["score"]["cached"] is False
    forbid(monkeypatch, "score")
    walk(recipe(keep="52%", **asked), tmp_path / "again")

    def refused(error: type[Exception], says: str, **changes: Any) -> None:
        with pytest.raises(error, match=says):
            walk(recipe(**{**asked, **changes}), tmp_path / "out")

    refused(SettingsError, "task piqa is to choose", evaluate={"tasks": ["piqa"]})
    refused(UnknownName, "did you mean 'piqa'", options={"task": "pika"})
    refused(SettingsError, "limit=0", options={"limit": 0})
    refused(SettingsError, "which are asked for once", stages=2)


def test_a_dry_run_counts_what_is_asked_without_layers(recipe: Make) -> None:
    """Two of six layers go: five runs, eight items each."""
    asked = recipe(axes=["layer"], criterion="contiguous-task", options={"task": "piqa", "limit": 8}, keep="67%")
    rows = {row["stage"]: row["tokens"] for row in dry_run(asked, gflops=1.0)["stages"]}
    assert rows["ask without layers"] == 5 * 8 * ITEM_TOKENS
    assert rows["score"] == 0


def test_heads_of_a_sparse_model_are_not_merged(
    recipe: Make, tmp_path: Path, sprout_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its zeros would be filled; said before anything is scored."""
    import regrow

    quiet = {"text": None, "samples": []}
    regrow.sparsify(str(sprout_dir), tmp_path / "sparse", pattern="50%", criterion="magnitude", evaluate=quiet)
    forbid(monkeypatch, "score", "calibration")
    asked = recipe(model=str(tmp_path / "sparse"), axes=["head", "neuron"], merge_heads="laco")
    with pytest.raises(SettingsError, match=r"of a sparse model"):
        walk(asked, tmp_path / "out")


def test_what_reads_the_cut_units_is_refitted(recipe: Make, tmp_path: Path) -> None:
    """Nothing else differs, the report says by how much errors fell, and the loss is nearer to the dense one."""
    quick = {"text": "demo", "max_tokens": 2048, "seqlen": 128, "speed": False, "samples": []}
    asked: dict[str, Any] = {"axes": ["head", "neuron"], "criterion": "magnitude", "keep": "75%", "evaluate": quick}
    plain = walk(recipe(**asked), tmp_path / "plain")
    report = walk(recipe(**asked, refit={"tokens": 4096}), tmp_path / "refitted")
    ours, theirs = (checkpoint.read(tmp_path / name)[0].state_dict() for name in ("refitted", "plain"))
    other = {
        name.partition("layers.")[2].partition(".")[2] for name in ours if not torch.equal(ours[name], theirs[name])
    }
    assert other == {"self_attn.o_proj.weight", "mlp.down_proj.weight"}
    assert report.stages["refit"]["tokens"] == 4096
    note = next(note for note in report.notes if "refitted on 4,096 tokens" in note)
    before, after = map(float, re.findall(r"[01]\.\d+", note))
    assert after < before
    losses = [[m.value for name, m in found.after.items() if name.endswith("perplexity")] for found in (report, plain)]
    assert losses[0][0] < losses[1][0]
    assert report.made_by["refit"] == {"tokens": 4096, "damping": None}


def test_where_nothing_can_be_refitted(
    recipe: Make, tmp_path: Path, sprout_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import regrow

    quiet = {"text": None, "samples": []}
    regrow.sparsify(str(sprout_dir), tmp_path / "sparse", pattern="50%", criterion="magnitude", evaluate=quiet)
    forbid(monkeypatch, "score", "calibration")
    with pytest.raises(SettingsError, match="refit of a sparse model"):
        walk(recipe(model=str(tmp_path / "sparse"), refit={}), tmp_path / "out")
    heads = {"axes": ["head", "neuron"], "uniform": True, "split": {"head": 1, "neuron": 0.2}, "keep": "85%"}
    with pytest.raises(SettingsError, match="refit and merge_heads"):
        walk(recipe(**heads, merge_heads="laco", refit={}), tmp_path / "out")


def test_text_that_has_no_halves(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block is refused before anything is scored: too few tokens asked for, or too few in the text."""
    forbid(monkeypatch, "scored", "measured")
    (text := tmp_path / "mine.txt").write_text("\n\n".join(f"{i} " + "the river rose " * 3 for i in range(200)))
    for changes in ({"refit": {"tokens": 100}}, {"refit": {}, "calibration": {"text": str(text), "block": 300}}):
        with pytest.raises(
            TextError, match=r"refit on one block of text, of \d+ tokens\n.*two at least\n.*refit.tokens"
        ):
            walk(recipe(criterion="magnitude", **changes), tmp_path / "out")


def test_heads_that_cannot_be_refitted(recipe: Make) -> None:
    """Known of the shape alone: of the plan to come, and of every shape that a search may try."""
    model = make("olmo2")
    subject = Subject(model, None, anatomy_of(model), {}, torch.float32)  # type: ignore[arg-type]
    asked: dict[str, Any] = {"axes": ["head", "neuron"], "uniform": True, "refit": {}, "keep": "75%"}
    plain = recipe(**asked, divisors={"neuron": 1})
    wish = as_wish(plain)
    assert wish is not None
    with pytest.raises(SettingsError, match="refit of heads in a olmo2"):
        check_steps(subject, plain, wish)
    check_steps(subject, plain.model_copy(update={"refit": None}), wish)
    whole = full(subject.anatomy)["head"]
    few = {"rank_tokens": 0, "band": 0.9, "candidates": 99}
    for choices, left in (((whole, 1), {whole}), ((1,), None)):
        searched = recipe(
            **asked, divisors={"neuron": 1}, search={**few, "choices": {"head": choices, "neuron": (20, 12, 4)}}
        )
        if left is None:
            with pytest.raises(SettingsError, match="can go on: refit of heads in a olmo2"):
                candidates(subject, searched)
        else:
            assert {point["head"] for point in candidates(subject, searched).points} == left


def test_a_dry_run_counts_what_is_refitted(recipe: Make) -> None:
    rows = [row["stage"] for row in dry_run(recipe(refit={"tokens": 2048}), gflops=1.0)["stages"]]
    assert rows[rows.index("refit") + 1] == "cut and write"
    assert "refit" not in [row["stage"] for row in dry_run(recipe(), gflops=1.0)["stages"]]


def test_heads_that_cannot_be_merged_are_found_before_the_scores(recipe: Make) -> None:
    """Whatever the scores: one of three stays in the layers that the spread does not protect."""
    model = make("llama", num_hidden_layers=6, num_key_value_heads=2)
    subject = Subject(model, None, anatomy_of(model), {}, torch.float32)  # type: ignore[arg-type]
    asked = recipe(axes=["head", "neuron"], split={"head": 1, "neuron": 0.1}, keep="80%", merge_heads="laco")
    wish = as_wish(asked)
    assert wish is not None
    with pytest.raises(SettingsError, match=r"merge_heads where 1 of 3 heads stay"):
        check_steps(subject, asked, wish)
    check_steps(subject, asked, dataclasses.replace(wish, budget=Budget.parse("97%"), spread="across"))


def test_two_runs_do_not_train_in_one_folder(recipe: Make, tmp_path: Path, cache: Path) -> None:
    """The second is told; what it leaves alone is not removed under the first."""
    usual = {"tokens": 512, "block": 64, "batch": 4, "micro_batch": 2}
    seen: list[str] = []

    def second(what: str, *_: int) -> None:
        if what == "recovery" and not seen:
            seen.append("begun")
            with pytest.raises(OutputError, match="another process is at work on this recovery"):
                walk(recipe(recover=usual), tmp_path / "b")

    report = walk(recipe(recover=usual), tmp_path / "a", progress=second)
    assert seen == ["begun"]
    assert report.training[-1]["tokens"] == 512
    assert listing(cache / "recover") == []


def test_a_start_that_differs_is_another_recovery(recipe: Make) -> None:
    """Another number of threads may round otherwise; nothing is refused, and nothing taken over."""
    usual = {"tokens": 512, "block": 64, "batch": 4, "micro_batch": 2}
    subject = road.load(recipe().model)
    asked = recipe(keep=None, sparsify={"pattern": "2:4"}, recover={**usual, "method": "full"})
    plan = Plan.everything(subject.anatomy)
    folders = []
    for nudge in (0.0, 1e-6):
        subject = road.load(recipe().model)
        with torch.no_grad():
            subject.model.model.norm.weight[0] += nudge
        folders.append(recovered(subject, asked, plan, None).work)
    assert folders[0] != folders[1]


def test_a_recovery_with_other_settings_starts_anew(recipe: Make, tmp_path: Path) -> None:
    usual = {"tokens": 512, "block": 64, "batch": 4, "micro_batch": 2}
    with pytest.raises(KeyboardInterrupt):
        walk(recipe(recover=usual), tmp_path / "cut", progress=pull_plug("recovery", 1))
    report = walk(recipe(recover={**usual, "learning_rate": 1e-5}), tmp_path / "cut")
    assert report.training[-1]["tokens"] == 512


# ---- failures on the way


def test_when_masked_and_sliced_differ_nothing_is_written(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.check_equal
    for what in ("masked and sliced", "reloaded folder", "generation with and without a cache"):

        def strict(name: str, ours: Any, theirs: Any, *rest: float, what: str = what) -> float:
            return real(name, ours, theirs + 1 if what in name else theirs, *rest)

        monkeypatch.setattr(checkpoint, "check_equal", strict)
        with pytest.raises(IdentityError, match=what):
            walk(recipe(), tmp_path / "out" / "cut")
        assert listing(tmp_path / "out") == []


def test_a_page_that_fails_leaves_nothing(recipe: Make, tmp_path: Path) -> None:
    def broken(*_: Any) -> dict[str, str]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        road.run(recipe(), tmp_path / "out" / "cut", page=broken)
    assert listing(tmp_path / "out") == []


def test_the_budget_is_checked_before_the_scores(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, "score", "calibration")
    with pytest.raises(BudgetError, match="cannot be met"):
        walk(recipe(keep="1%"), tmp_path / "cut")


# ---- what a run tells


def test_the_report_says_what_was_done(recipe: Make, tmp_path: Path) -> None:
    report = walk(recipe(keep="75%", evaluate={"samples": ["Once", "Why?"]}, seed=4), tmp_path / "cut")
    assert list(report.stages) == ["load", "score", "plan", "evaluate before", "apply", "evaluate after"]
    assert all(stage["seconds"] >= 0 for stage in report.stages.values())
    assert report.made_by["keep"] == report.made_by["budget"] == "75%"
    assert report.made_by["seed"] == 4
    assert set(report.made_by["split_realised"]) == {"layer", "group", "head", "neuron", "channel"}
    assert [s["prompt"] for s in report.samples] == ["Once", "Why?"]
    assert all(s["before"] and s["after"] for s in report.samples)
    assert set(report.before) == set(report.after)
    assert "trained from scratch" in report.notes[0]
    assert any("masked and sliced logits differ by" in note for note in report.notes)
    assert "path" not in report.model
    written = Report.from_json(json.loads((tmp_path / "cut" / "report.json").read_text()))
    assert json.dumps(written.to_json()) == json.dumps(report.to_json())
    perplexity = next(k for k in report.before if k.endswith("/perplexity"))
    assert report.after[perplexity].value > report.before[perplexity].value


def test_the_recipe_in_the_folder_makes_the_folder_again(recipe: Make, tmp_path: Path) -> None:
    asked = recipe(keep="75%", recover={"tokens": 512, "block": 64, "batch": 4, "rank": 2})
    walk(asked, tmp_path / "one")
    again = parse(read_recipe(tmp_path / "one" / "recipe.yaml"))
    assert again == asked
    walk(again, tmp_path / "two")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


def test_nothing_need_be_measured(recipe: Make, tmp_path: Path) -> None:
    asked = parse(overlay(recipe().model_dump(), {}) | {"evaluate": {"text": None, "speed": False, "samples": []}})
    report = walk(asked, tmp_path / "cut")
    assert {name.split("/")[0] for name in report.before} == {"size"}


def test_the_python_door(sprout_dir: Path, tmp_path: Path) -> None:
    import regrow

    report = regrow.prune(
        str(sprout_dir),
        tmp_path / "cut",
        recipe="llm-pruner",
        keep="85%",
        criterion="magnitude",
        recover={"tokens": 0},
        evaluate={"tasks": [], "speed": False, "max_tokens": 512, "seqlen": 64},
    )
    assert isinstance(report, regrow.Report)
    assert report.made_by["spread"] == "ends"
    assert report.after["size/decoder_weights"].value <= 0.85 * report.before["size/decoder_weights"].value
    assert (tmp_path / "cut" / "report.html").exists()
    with pytest.raises(UnknownName, match="did you mean 'keep'"):
        regrow.prune(str(sprout_dir), tmp_path / "other", kepe="85%")


def test_zeros_and_their_recovery_at_the_python_door(sprout_dir: Path, tmp_path: Path) -> None:
    """Keys of the part and of the run side by side; defaults are those of the commands."""
    import regrow

    quiet = {"text": None, "samples": []}
    sparse = regrow.sparsify(
        str(sprout_dir), tmp_path / "sparse", pattern="2:4", criterion="magnitude", evaluate=quiet, seed=3
    )
    assert sparse.after["size/nonzero_weights"].value * 2 == sparse.before["size/nonzero_weights"].value
    assert (sparse.made_by["seed"], sparse.made_by["evaluate"]["speed"]) == (3, False)
    assert sparse.made_by["calibration"] == {"text": "demo", "tokens": 8192, "block": 512}
    short = {"tokens": 256, "block": 32, "batch": 2, "micro_batch": 2}
    tuned = regrow.recover(str(tmp_path / "sparse"), tmp_path / "tuned", **short, teacher="base", evaluate=quiet)
    assert (tuned.made_by["recover"]["method"], tuned.made_by["recover"]["teacher"]) == ("spp", str(sprout_dir))
    assert tuned.training[-1]["tokens"] == 256
    with pytest.raises(UnknownName, match=r"did you mean 'sparsify\.pattern'"):
        regrow.sparsify(str(sprout_dir), tmp_path / "other", sparsify={"patern": "2:4"})
    with pytest.raises(UnknownName, match="unknown recipe key 'patern'"):
        regrow.sparsify(str(sprout_dir), tmp_path / "other", patern="2:4")


def test_home_is_home_at_every_door(sprout_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves the tilde of `--out=~/x` alone."""
    import regrow
    from regrow.cli.finish import finish

    class Seen(Exception):
        pass

    def run(_: Recipe, out: Path, **__: Any) -> None:
        raise Seen(str(out))

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("regrow.door.run", run)
    monkeypatch.setattr("regrow.run.run", run)
    for door in (regrow.prune, regrow.sparsify, regrow.recover):
        with pytest.raises(Seen, match=str(tmp_path / "x")):
            door(str(sprout_dir), "~/x")
    with pytest.raises(Seen, match=str(tmp_path / "x")):
        finish(parse({}), Path("~/x"), as_json=False, quiet=True)


def test_none_at_the_python_door_is_a_recipe_s_null(
    sprout_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is recovered and no text measured, though the recipe and the defaults say so."""
    import regrow

    asked: list[Recipe] = []
    monkeypatch.setattr("regrow.door.run", lambda recipe, *_, **__: asked.append(recipe))
    regrow.prune(str(sprout_dir), tmp_path / "cut", recipe="demo", recover=None, evaluate={"text": None})
    assert asked[0].recover is None
    assert asked[0].evaluate.text is None
    assert asked[0].evaluate.tasks == ("piqa", "arc_easy")  # what was not named stays
    regrow.prune(str(sprout_dir), tmp_path / "cut", keep=None)
    assert asked[1].keep is None
    with pytest.raises(SettingsError, match="a run that changes nothing"):
        road.check(asked[1])
    with pytest.raises(SettingsError, match="model = None"):
        regrow.prune(None, tmp_path / "cut")  # type: ignore[arg-type]


# ---- recipes and dry runs

BIG = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    vocab_size=32000,
    dtype="float16",
)


def test_recipe_head_count() -> None:
    assert recipe_names() == sorted(path.stem for path in RECIPES.iterdir())
    assert len(recipe_names()) >= 3


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("size", ["small", "big"])
def test_every_recipe_parses_and_dry_runs(
    name: str, size: str, sprout_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a configuration alone."""
    monkeypatch.setattr(checkpoint, "read", lambda *_, **__: pytest.fail("weights were loaded"))
    folder = sprout_dir
    if size == "big":
        folder = tmp_path / "llama-7b"
        BIG.save_pretrained(folder)
    found = parse(overlay(read_recipe(find_recipe(name)), {"model": str(folder)}), name)
    assert found.name == name
    assert found.about.endswith(".")
    assert found.paper.startswith("arXiv:")
    road.check(found)
    foretold = dry_run(found, gflops=100.0)
    dense, cut = foretold["before"], foretold["after"]
    names = [row["stage"] for row in foretold["stages"]]
    assert json.loads(json.dumps(foretold)) == foretold
    if found.keep is None:
        assert dense == cut
        recovered = ["recover"] if found.recover else []
        assert names == ["measure before", "sparsify and write", *recovered, "measure after"]
        return
    target = float(found.keep.rstrip("%")) / 100 * dense["decoder_weights"]
    layer = dense["decoder_weights"] / (6 if size == "small" else 32)
    assert target - layer < cut["decoder_weights"] <= target
    searched = ["score shapes", "train the best"] if found.search else []
    if found.learn is not None:
        searched = ["try masks"] if found.learn.gates == "policy-gradient" else ["learn"]
    assert names == ["score", "measure before", *searched, "cut and write", "recover", "measure after"]


def test_a_dry_run_by_hand(tmp_path: Path) -> None:
    """LLaMA-7B, 1000 tokens of Taylor at 100 GFLOP/s: three forward passes."""
    BIG.save_pretrained(tmp_path / "llama-7b")
    found = dry_run(
        parse(
            {
                "model": str(tmp_path / "llama-7b"),
                "criterion": "taylor",
                "calibration": {"tokens": 1000, "block": 100},
            }
        ),
        gflops=100.0,
    )
    score = found["stages"][0]
    flops = 3 * 1000 * found["before"]["flops_per_token"]
    assert score["minutes"] == pytest.approx(flops / (100e9 * 0.6) / 60, abs=0.01)
    logits = 100 * 4 * 3 * 32000
    assert score["peak_gb"] == pytest.approx((2 * 4 * 6_738_415_616 + logits) / 1e9, abs=0.001)
    assert found["loads_as"].startswith("regrow_llama")
    assert found["shape_text"].startswith("32 layers x (")


def test_where_a_dry_run_says_it_will_load(sprout_dir: Path) -> None:
    def loads(**changes: Any) -> str:
        return str(dry_run(parse({"model": str(sprout_dir), **changes}), gflops=1.0)["loads_as"])

    assert loads(uniform=True, axes=["neuron"]) == "llama"
    assert loads(uniform=True) == "mistral (carrier)"  # 6 heads and width 128 are refused by a Llama configuration
    assert loads(spread="ends").startswith("regrow_llama")
    assert loads(axes=["channel"], spread="ends", keep="75%") == "llama"
    assert loads(axes=["layer"], keep="66.67%") == "llama"
    # 192 neurons in every layer, which `across` will not keep equal
    assert loads(axes=["neuron"], spread="uniform", keep="1001088") == "llama"
    assert loads(axes=["neuron"], spread="across", keep="1001088").startswith("regrow_llama")
    assert loads(spread="across", keep="100%") == "llama"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"spread": "uniform"},
        {"uniform": True},
        {"axes": ["layer", "neuron", "head"], "keep": "60%"},
        {"axes": ["channel", "group"]},
        {"keep": "2MB", "dtype": "bf16"},
    ],
    ids=str,
)
def test_a_dry_run_foretells_the_shape_of_the_run(recipe: Make, tmp_path: Path, change: dict[str, Any]) -> None:
    """All but which layers get the few units that are left over."""
    asked = recipe(criterion="magnitude", evaluate={"samples": []}, **change)
    asked = asked.model_copy(update={"evaluate": asked.evaluate.model_copy(update={"text": None})})
    foretold = dry_run(asked, gflops=1.0)
    report = walk(asked, tmp_path / "cut")
    assert foretold["shape_text"] == str(Shape.from_json(report.shape["after"]))
    for name in ("parameters", "decoder_weights", "file_bytes", "kv_bytes_per_token", "flops_per_token"):
        assert foretold["after"][name] == report.after[f"size/{name}"].value
    config = json.loads((tmp_path / "cut" / "config.json").read_text(encoding="utf-8"))
    assert foretold["loads_as"].split()[0] == config["model_type"]
    assert not any("every layer lost the same" in note for note in foretold["notes"])


def test_a_dry_run_across_says_that_scores_decide(recipe: Make) -> None:
    found = dry_run(recipe(spread="across"), gflops=1.0)
    assert any("every layer lost the same; spread across decides" in note for note in found["notes"])
    for change in ({"axes": ["layer"]}, {"uniform": True}):
        assert len(dry_run(recipe(spread="across", **change), gflops=1.0)["notes"]) == 1


def test_a_dry_run_counts_tasks(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 x 300 items of at most 500, and all 1838 of piqa's rows."""

    def measured(**evaluate: Any) -> tuple[dict[str, Any], str]:
        found = dry_run(recipe(evaluate=evaluate), gflops=1.0)
        rows = {row["stage"]: row for row in found["stages"]}
        assert rows["measure before"]["tokens"] == rows["measure after"]["tokens"]
        return rows["measure before"], " ".join(found["notes"])

    without, said = measured()
    assert without["tokens"] == 512
    assert "items" not in said
    limited, said = measured(tasks=["piqa", "sciq"], limit=300)
    assert limited["tokens"] == 512 + 600 * ITEM_TOKENS
    assert limited["minutes"] > 90 * without["minutes"]
    logits = 4 * 8 * 2048 * 2048  # batch, context and vocabulary: below the cap
    assert limited["peak_gb"] == pytest.approx(without["peak_gb"] + logits / 1e9, abs=0.002)
    assert "600 items of tasks at 80 tokens each, which is rough" in said
    assert "every item" not in said
    whole, said = measured(tasks=["piqa"])
    assert whole["tokens"] == 512 + 1838 * ITEM_TOKENS
    assert "without a limit every item is asked" in said
    capped, _ = measured(tasks=["piqa"], limit=1, batch=10**6)
    assert capped["peak_gb"] == pytest.approx(without["peak_gb"] + 4 * 2**28 / 1e9, abs=0.002)
    with pytest.raises(UnknownName, match="did you mean 'piqa'"):
        measured(tasks=["pika"])

    def absent(*_: Any) -> None:
        raise MissingDemo("no wheel", "a wheel", "install it")

    monkeypatch.setattr("regrow.engines.tasks.check_tasks", absent)
    missing, said = measured(tasks=["piqa"])
    assert missing["tokens"] == 512
    assert "tasks are not counted: no wheel" in said


def test_a_dry_run_says_when_it_does_not_know_how_long_a_text_is(recipe: Make) -> None:
    asked = recipe().model_dump() | {"evaluate": {"max_tokens": None, "speed": False}}
    assert "the whole text is measured" in dry_run(parse(asked), gflops=1.0)["notes"][1]


def test_every_kind_of_sight_has_its_price() -> None:
    from typing import get_args

    from regrow.artifacts.sight import Sees

    assert set(SCORE_COPIES) == set(get_args(Sees))


def test_the_machine_has_a_speed() -> None:
    assert machine_gflops(size=64, seconds=0.02) > 0.01
