"""What sparsify, recover, inspect --sparse and diff --weights print and leave behind; every pattern is exact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from prompt import WORDS, Command, Done, Sparsifier
from safetensors.torch import load_file, save_file
from sparse_folders import (
    check_manifest,
    check_pattern,
    kept_as_they_were,
    matrices,
    read,
    read_report,
    untouched,
    weights,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from regrow.artifacts.pattern import Pattern
from regrow.engines import checkpoint
from regrow.engines.packed import Packed
from regrow.engines.train import TrainResult
from regrow.errors import BrokenModel
from regrow.stages.recover import Recovered

ENDS = ("q", "k", "v", "o", "gate", "up", "down")
TRAIN = ("--tokens", 512, "--set", "recover.block=64", "--set", "recover.batch=2", "--text", "none")


@pytest.fixture(scope="module")
def short(sprout_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two layers of sprout."""
    folder = tmp_path_factory.mktemp("short") / "short"
    shutil.copytree(sprout_dir, folder)
    model: Any = AutoModelForCausalLM.from_pretrained(sprout_dir)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.config.layer_types = None
    checkpoint.write(model, AutoTokenizer.from_pretrained(sprout_dir), folder, torch.bfloat16, None)
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are continued, memory collected and items of tasks counted by other tests, the first two once below."""
    monkeypatch.setattr("regrow.run.write_samples", lambda *seen: ["" for _ in seen[2]])
    monkeypatch.setattr(checkpoint.gc, "collect", lambda: 0)
    monkeypatch.setattr("regrow.engines.tasks.count_items", lambda *_: 100)


@pytest.fixture(scope="module")
def two_of_four(sprout_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sprout with a 2:4 pattern by Wanda, on demo texts, for commands that only read."""
    from regrow.cli.main import main

    out = tmp_path_factory.mktemp("wanda") / "sparse"
    ask = ("sparsify", sprout_dir, "--criterion", "wanda", "--pattern", "2:4", *WORDS, "--out", out, "-q")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGROW_CACHE", str(tmp_path_factory.mktemp("cache")))
        assert main([str(a) for a in ask]) == 0
    return out


@pytest.fixture(scope="module")
def thin(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of it with half of each output's weights, which stands in no groups, for recovery."""
    return thinned(short, "50%", tmp_path_factory)


@pytest.fixture(scope="module")
def paired(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two of four."""
    return thinned(short, "2:4", tmp_path_factory)


def thinned(short: Path, pattern: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from regrow.cli.main import main

    out = tmp_path_factory.mktemp("thin") / "thin"
    ask = ("sparsify", short, "--criterion", "magnitude", "--pattern", pattern, "--text", "none", "--out", out, "-q")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGROW_CACHE", str(tmp_path_factory.mktemp("cache")))
        assert main([str(a) for a in ask]) == 0
    return out


# ---- sparsify


@pytest.mark.parametrize("text", ["50%", "2:4", "2:8"])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt", "dsnot"])
def test_a_pattern_is_exact(sparsify: Sparsifier, short: Path, criterion: str, text: str) -> None:
    folder, done = sparsify(short, "--criterion", criterion, "--pattern", text)
    pattern = Pattern.parse(text)
    before, after = weights(short), weights(folder)
    check_pattern(after, pattern)
    untouched(before, after)
    assert kept_as_they_were(before, after) is (criterion != "sparsegpt")
    assert check_manifest(folder, pattern)
    if text == "50%" and criterion in ("wanda", "dsnot"):  # outputs compete within themselves
        rows = {int(n) for w in matrices(after).values() for n in ((w == 0).sum(1) * 2 - w.shape[1]).tolist()}
        assert rows == {0}
    said = {"50%": "50 % zeros", "2:4": "50 % zeros (2 of 4 kept)", "2:8": "75 % zeros (2 of 8 kept)"}[text]
    assert f"{said}; {100 * float(pattern.zeros):.2f} % of the weights" in done.out
    assert "dense kernels gain nothing" in done.out
    assert f"model:  {folder}" in done.out
    assert set(done.json) == {"out", "before", "after", "retention", "shape", "notes"}
    assert done.json["shape"]["before"] == done.json["shape"]["after"]
    errors = read(folder, "sparsity.json")["errors"]
    assert (len(errors) == 14 and all(0 < e < 1 for e in errors.values())) if criterion == "sparsegpt" else not errors


def test_what_breaks_a_pattern_is_seen(two_of_four: Path) -> None:
    """The check above is no rubber stamp: one weight too many, one too few, a negative zero."""
    found = weights(two_of_four)
    check_pattern(found, Pattern.parse("2:4"))
    name = "model.layers.1.mlp.up_proj.weight"
    for value, where in ((1.0, 0), (0.0, 1), (-0.0, 0)):
        planted = {n: w.clone() for n, w in found.items()}
        row = planted[name][5]
        row[(row != 0).nonzero()[0, 0] if where else (row == 0).nonzero()[0, 0]] = value
        with pytest.raises(AssertionError):
            check_pattern(planted, Pattern.parse("2:4"))
    with pytest.raises(AssertionError):
        check_pattern(found, Pattern.parse("2:8"))


def test_a_folder_holds_what_a_user_needs(two_of_four: Path) -> None:
    names = {path.name for path in two_of_four.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml", "report.html", "README.md"} <= names
    report, card = read_report(two_of_four), (two_of_four / "README.md").read_text(encoding="utf-8")
    assert report.model["holder"] == "stock"
    assert "50 % zeros (2 of 4 kept)" in card
    assert "trust_remote_code" not in card.partition("## Make it again")[0]
    assert report.after["size/bitmask_bytes"].value < report.before["size/bitmask_bytes"].value
    assert report.after["size/file_bytes"] == report.before["size/file_bytes"]  # zeros are stored as zeros
    page = (two_of_four / "report.html").read_text(encoding="utf-8")
    assert "50 % zeros (2 of 4 kept)" in page


def test_solvers_in_turn(sparsify: Sparsifier, short: Path) -> None:
    """A refit after the update leaves less error on the same mask, in the layer whose inputs are the same."""
    ask = ("--criterion", "wanda", "--pattern", "2:4", "--solver")
    alone, _ = sparsify(short, *ask, "update", out="alone")
    both, _ = sparsify(short, *ask, "update,refit", "--option", "steps=12", out="both")
    held, refitted = weights(alone), weights(both)
    for name in (n for n in matrices(held) if ".layers.0." in n):
        assert torch.equal(held[name] == 0, refitted[name] == 0), name
        assert not torch.equal(held[name], refitted[name]), name
    before, after = (read(folder, "sparsity.json")["errors"] for folder in (alone, both))
    first = [name for name in before if ".layers.0." in name]
    assert len(first) == 7
    assert all(after[name] < before[name] for name in first)
    recipe = yaml.safe_load((both / "recipe.yaml").read_text(encoding="utf-8"))["sparsify"]
    assert (recipe["solver"], recipe["options"]) == (["update", "refit"], {"steps": 12})
    check_pattern(refitted, Pattern.parse("2:4"))


def test_a_damping_that_was_raised_is_said(sparsify: Sparsifier, short: Path) -> None:
    """64 tokens leave every Gram matrix singular."""
    few = ("--calibration-tokens", 64, "--damping", 0)
    folder, done = sparsify(short, "--criterion", "sparsegpt", "--pattern", "50%", *few)
    said = read(folder, "sparsity.json")["notes"]
    *raised, scarce = said
    assert len(raised) == 14
    assert all(": damping raised to " in note for note in raised)
    assert scarce.startswith("14 of 14 matrices met fewer tokens than they have inputs, ")
    assert "model.layers.0.mlp.down_proj 64 for 352: a Gram matrix" in scarce
    assert "64 tokens for 352 inputs of model.layers.0.mlp.down_proj.weight: a Gram matrix of so few" in done.err
    assert all(f"note: {note}" in done.out for note in said)
    assert set(said) <= set(read_report(folder).notes)
    check_pattern(weights(folder), Pattern.parse("50%"))


def test_a_pattern_too_thin_to_call_sparse_is_recorded(sparsify: Sparsifier, short: Path, regrow: Command) -> None:
    folder, done = sparsify(short, "--criterion", "magnitude", "--pattern", "3%")
    assert read(folder, "regrow.json")["sparsity"]["pattern"] == "3%"
    assert any("was not read: the method looks at weights alone" in note for note in read_report(folder).notes)
    assert "was not read" in done.out
    found = regrow("inspect", folder, "--sparse", "--json").json["sparsity"]
    assert (found["mask_intact"], found["pattern_in"]) == (True, 14)


def test_swaps_come_before_a_refit(sparsify: Sparsifier, short: Path) -> None:
    ask = ("--criterion", "wanda", "--pattern", "2:4", "--solver")
    alone, both = (weights(sparsify(short, *ask, names, out=names)[0]) for names in ("dsnot", "dsnot,refit"))
    for name in (n for n in matrices(alone) if ".layers.0." in n):
        assert torch.equal(alone[name] == 0, both[name] == 0), name


def test_what_a_block_reads(sparsify: Sparsifier, short: Path) -> None:
    """The first block reads the same whatever is asked, but for rounding; the second does not."""
    ask = ("--criterion", "sparsegpt", "--pattern", "2:4", "--inputs")
    usual = weights(sparsify(short, *ask, "pruned", out="pruned")[0])
    for inputs in ("dense", "both"):
        other = weights(sparsify(short, *ask, inputs, out=inputs)[0])
        check_pattern(other, Pattern.parse("2:4"))
        same = {n: float(((usual[n] == 0) == (other[n] == 0)).float().mean()) for n in matrices(usual)}
        assert min(share for n, share in same.items() if ".layers.0." in n) > 0.995
        assert min(share for n, share in same.items() if ".layers.1." in n) < 0.99


def test_a_spread_by_outliers(sparsify: Sparsifier, short: Path) -> None:
    folder, done = sparsify(short, "--criterion", "wanda", "--spread", "owl", "--pattern", "2:8")
    layers = read(folder, "sparsity.json")["layers"]
    assert sorted(layers) == ["62.5 % zeros (3 of 8 kept)", "87.5 % zeros (1 of 8 kept)"]
    assert "75 % zeros (2 of 8 kept) on average over the layers; 75.00 % of" in done.out
    found = matrices(weights(folder))
    for i, said in enumerate(layers):
        keep = int(said.partition("(")[2][0])
        check_pattern({n: w for n, w in found.items() if f".layers.{i}." in n}, Pattern.groups(keep, 8))
    assert "spread owl" in done.err
    uneven, done = sparsify(short, "--criterion", "magnitude", "--spread", "owl", "--pattern", "50%", out="uneven")
    shares = [float(Pattern.parse(t.partition(" zeros")[0]).zeros) for t in read(uneven, "sparsity.json")["layers"]]
    assert max(shares) - min(shares) == pytest.approx(0.16, abs=1e-5)
    assert "50 % zeros on average over the layers" in done.out


def test_linears_that_are_left_dense(sparsify: Sparsifier, short: Path) -> None:
    folder, _ = sparsify(short, "--criterion", "magnitude", "--pattern", "2:4", "--leave", "o_proj,1.mlp.up_proj")
    before, after = weights(short), weights(folder)
    left = [n for n in matrices(before) if n.endswith(("o_proj.weight", "1.mlp.up_proj.weight"))]
    assert len(left) == 3
    assert all(torch.equal(before[n], after[n]) for n in left)
    check_pattern({n: w for n, w in after.items() if n not in left}, Pattern.parse("2:4"))


@pytest.mark.parametrize("spread", ["owl", "hessian", "uniform"])
def test_a_layer_that_is_left_dense_has_no_say(sparsify: Sparsifier, short: Path, spread: str) -> None:
    """All linears of the first of two layers: the second gets what was asked."""
    left = ",".join(f"0.{'mlp' if end in ('gate', 'up', 'down') else 'self_attn'}.{end}_proj" for end in ENDS)
    folder, _ = sparsify(short, "--criterion", "wanda", "--spread", spread, "--pattern", "2:8", "--leave", left)
    found = weights(folder)
    assert all(torch.equal(found[n], w) for n, w in weights(short).items() if ".layers.0." in n)
    check_pattern({n: w for n, w in found.items() if ".layers.1." in n}, Pattern.parse("2:8"))


def test_equal_seeds_give_equal_masks(sparsify: Sparsifier, short: Path) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder, _ = sparsify(short, "--criterion", "wanda", "--pattern", "2:4", "--seed", seed, out=name)
        found.append((check_manifest(folder, Pattern.parse("2:4")), (folder / "model.safetensors").read_bytes()))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]


def test_quiet_prints_one_line_or_none(regrow: Command, short: Path, tmp_path: Path, tale: Path) -> None:
    ask = ("sparsify", short, "--criterion", "wanda", "--calibration", tale, *WORDS, "-q", "--out")
    assert regrow(*ask, tmp_path / "a") == Done(0, "", "")
    done = regrow(*ask, tmp_path / "b", "--json")
    assert (done.code, done.err, len(done.out.splitlines())) == (0, "", 1)
    assert done.json["out"] == str(tmp_path / "b")


# ---- inspect, diff, report


def tampered(folder: Path, out: Path, fill: float = 0.5) -> Path:
    """A copy with one zero filled."""
    shutil.copytree(folder, out)
    stored = load_file(out / "model.safetensors")
    row = stored["model.layers.0.mlp.up_proj.weight"][3]
    row[(row == 0).nonzero()[0]] = fill
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_inspect_sparse(regrow: Command, two_of_four: Path, sprout_dir: Path, tmp_path: Path) -> None:
    done = regrow("inspect", two_of_four, "--sparse", "--json")
    assert done.code == 0, done.err
    found = done.json["sparsity"]
    assert (found["weights"], found["zeros"], found["share"]) == (1_105_920, 552_960, 0.5)
    assert (found["groups"], found["pattern"]) == ("2:4", "50 % zeros (2 of 4 kept)")
    assert found["mask_intact"] is True
    assert found["pattern_in"] == 42
    assert found["mask_hash"] == read(two_of_four, "regrow.json")["sparsity"]["mask_hash"]
    assert len(found["matrices"]) == found["semi_structured"]["of"] == 42
    odd = {n for n in found["matrices"] if n.endswith("down_proj.weight")}  # 352 inputs are no multiple of 64
    assert set(found["semi_structured"]["why_not"]) == odd
    assert found["semi_structured"]["fits"] == 36
    assert found["dense_bytes"] == 2 * 1_105_920
    assert found["bitmask_bytes"] == 552_960 * 2 + 1_105_920 // 8
    for line in ("50.00 % of 1,105,920 weights", "50 % zeros (2 of 4 kept)", "intact", "fit 36 of 42 matrices"):
        assert line in done.out
    assert "NOT" not in done.out
    broken = regrow("inspect", tampered(two_of_four, tmp_path / "broken"), "--sparse", "--json")
    assert broken.json["sparsity"]["mask_intact"] is False
    assert broken.json["sparsity"]["groups"] is None
    assert broken.json["sparsity"]["pattern_in"] == 41
    assert "50 % zeros (2 of 4 kept), in 41 of 42 matrices" in broken.out
    assert "NOT intact" in broken.out
    dense = regrow("inspect", sprout_dir, "--sparse", "--json")
    assert dense.json["sparsity"]["mask_intact"] is None
    assert dense.json["sparsity"]["zeros"] == 0
    assert "not recorded" in dense.out
    assert "sparsity" not in regrow("inspect", sprout_dir, "--json").json


def test_diff_of_weights(regrow: Command, two_of_four: Path, sprout_dir: Path, tmp_path: Path) -> None:
    same = regrow("diff", two_of_four, two_of_four, "--weights")
    assert same.code == 0
    assert "the pattern is intact" in same.out
    more = regrow("diff", sprout_dir, two_of_four, "--weights", "--json").json
    assert (more["intact"], more["lost"], more["same_mask"]) == (None, 0, False)
    assert "the first has no pattern that could be lost" in regrow("diff", sprout_dir, two_of_four, "--weights").out
    assert (more["share"], more["groups"]) == ([0.0, 0.5], [None, "2:4"])
    broken = tampered(two_of_four, tmp_path / "broken")
    done = regrow("diff", two_of_four, broken, "--weights", "--json")
    assert done.json["lost_by_matrix"] == {"model.layers.0.mlp.up_proj.weight": 1}
    assert (done.json["intact"], done.json["lost"], done.json["same_mask"]) == (False, 1, False)
    assert "1 zeros were lost" in regrow("diff", two_of_four, broken, "--weights").out
    fewer = regrow("diff", broken, two_of_four, "--weights", "--json").json
    assert (fewer["intact"], fewer["same_mask"]) == (True, False)
    reports = regrow("diff", two_of_four, two_of_four, "--json").json
    assert reports["columns"][0] == "measure after"  # without --weights, as ever


def test_weights_are_compared_where_there_is_no_report(regrow: Command, two_of_four: Path, tmp_path: Path) -> None:
    """What other tools tuned has none."""
    other = tampered(two_of_four, tmp_path / "tuned")
    (other / "report.json").unlink()
    for pair in ((two_of_four, other), (other, two_of_four)):
        done = regrow("diff", *pair, "--json")
        assert done.code == 0, done.err
        assert done.json == regrow("diff", *pair, "--weights", "--json").json
    assert "measure after" in regrow("diff", two_of_four, two_of_four).out


def test_the_page_of_a_sparse_folder_is_made_anew(regrow: Command, two_of_four: Path, tmp_path: Path) -> None:
    done = regrow("report", two_of_four, "--out", tmp_path / "page.html")
    assert done.code == 0, done.err
    first = (two_of_four / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == first


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("weight-criteria", {"wanda", "wanda-variant", "sparsegpt", "magnitude", "isc", "moe-pruner"}),
        ("solvers", {"none", "update", "refit", "mrp", "alps", "dsnot"}),
        ("zero-spreads", {"uniform", "owl", "hessian"}),
        ("losses", {"forward-kl"}),
    ],
)
def test_what_there_is(regrow: Command, kind: str, names: set[str]) -> None:
    rows = regrow("ls", kind, "--json").json[kind]
    assert names <= {next(iter(row.values())) for row in rows}
    assert all(name in regrow("ls", kind).out for name in names)


# ---- recover


@pytest.mark.parametrize(
    ("adapter", "start"),
    [*((name, "thin") for name in ("spp", "full", "hira", "ia3", "lora-masked")), ("spp", "paired")],
)
def test_recovery_keeps_the_pattern(
    regrow: Command, request: pytest.FixtureRequest, tale: Path, tmp_path: Path, adapter: str, start: str
) -> None:
    """Every zero stays, weights move, and the next step still knows what was asked."""
    out, thin, pattern = tmp_path / "tuned", request.getfixturevalue(start), "50%" if start == "thin" else "2:4"
    rate = ("--learning-rate", 0.01)  # what moves weights by more than 16 bits can hide
    done = regrow("recover", thin, "--adapter", adapter, *TRAIN, "--train", tale, *rate, "--out", out, "--json")
    assert done.code == 0, done.err
    assert "warning" not in done.err
    before, after = weights(thin), weights(out)
    assert all(torch.equal(before[n] == 0, after[n] == 0) for n in matrices(before))
    moved = {n for n in matrices(before) if not torch.equal(before[n], after[n])}
    assert {n.split(".")[2] for n in moved} == {"0", "1"}
    touched = ("k", "v", "down") if adapter == "ia3" else ENDS
    assert {n.split(".")[-2] for n in moved} == {f"{end}_proj" for end in touched}
    check_pattern(after, Pattern.parse(pattern))
    assert read(out, "regrow.json")["sparsity"] == read(thin, "regrow.json")["sparsity"]
    training = read_report(out).training
    assert training[-1]["tokens"] == 512
    assert training[0]["loss"] > 1
    compared = regrow("diff", thin, out, "--weights", "--json").json
    assert (compared["intact"], compared["same_mask"]) == (True, True)
    found = regrow("inspect", out, "--sparse", "--json").json["sparsity"]
    assert (found["mask_intact"], found["pattern"]) == (True, str(Pattern.parse(pattern)))


def test_recovery_that_moves_zeros(regrow: Command, thin: Path, tale: Path, tmp_path: Path) -> None:
    """As many zeros in every row, the report says how many moved, and `diff` agrees."""
    out = tmp_path / "moved"
    ask = ("recover", thin, "--adapter", "ast", *TRAIN, "--train", tale, "--learning-rate", 0.01)
    short = ("--tokens", 512, "--set", "recover.block=16")
    done = regrow(*ask, *short, "--out", out, "--json")
    assert done.code == 0, done.err
    assert "warning" not in done.err
    before, after = weights(thin), weights(out)
    assert all(torch.equal((before[n] == 0).sum(1), (after[n] == 0).sum(1)) for n in matrices(before))
    old, new = (read(folder, "regrow.json")["sparsity"] for folder in (thin, out))
    assert (new["pattern"], new["share"]) == (old["pattern"], old["share"])
    assert new["mask_hash"] != old["mask_hash"]
    compared = regrow("diff", thin, out, "--weights", "--json").json
    zeros = sum(int((before[n] == 0).sum()) for n in matrices(before))
    share = 100 * compared["lost"] / zeros
    assert share > 0
    assert f"{share:.1f} % of the zeros lie elsewhere now" in read_report(out).notes
    assert regrow("inspect", out, "--sparse", "--json").json["sparsity"]["mask_intact"] is True


@pytest.mark.parametrize("named", ["itself", "base"])
def test_a_model_has_nothing_to_learn_from_itself(
    regrow: Command, thin: Path, tale: Path, tmp_path: Path, named: str
) -> None:
    """Named outright, or by `base` where nothing is known of one. From the dense model there is something to learn."""
    stranger = tmp_path / "stranger"
    shutil.copytree(thin, stranger)
    (stranger / "regrow.json").unlink()
    teacher = stranger if named == "itself" else "base"
    ask = ("recover", stranger, "--adapter", "spp", *TRAIN, "--train", tale, "--loss", "forward-kl")
    done = regrow(*ask, "--teacher", teacher, "--out", tmp_path / "taught")
    assert done.code == 2
    assert "which is the model itself: there is nothing to learn from it" in done.err
    assert not (tmp_path / "taught").exists()


def test_the_base_teaches(regrow: Command, thin: Path, short: Path, tale: Path, tmp_path: Path) -> None:
    """`base` is what the steps before began with, however many there were."""
    model = thin
    for name in ("once", "twice"):
        done = regrow(
            "recover", model, "--adapter", "spp", *TRAIN, "--train", tale, "--teacher", "base", "--out", tmp_path / name
        )
        assert done.code == 0, done.err
        model = tmp_path / name
        recipe = yaml.safe_load((model / "recipe.yaml").read_text(encoding="utf-8"))
        assert recipe["recover"]["teacher"] == str(short)
        assert read_report(model).training[0]["loss"] > 1e-4


def test_a_recovery_that_changes_nothing_says_so(regrow: Command, thin: Path, tale: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    ask = ("recover", thin, "--adapter", "spp", *TRAIN, "--train", tale, "--learning-rate", 1e-6)
    done = regrow(*ask, "--out", out, "--json")
    assert done.code == 0, done.err
    note = "only 0 % of the weights under adapters changed after rounding to 16 bits: raise learning_rate or tokens"
    assert done.json["notes"][-1] == read_report(out).notes[-1] == note
    assert f"note: {note}" in done.out
    assert all(torch.equal(weight, weights(thin)[name]) for name, weight in weights(out).items())


def test_the_rate_of_the_method_is_written_down(regrow: Command, thin: Path, tale: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    assert regrow("recover", thin, "--adapter", "spp", *TRAIN, "--train", tale, "--out", out, "-q").code == 0
    assert read_report(out).made_by["recover"]["learning_rate"] == 0.01
    assert yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8"))["recover"]["learning_rate"] == 0.01


def test_a_sparse_model_keeps_its_zeros_unless_asked_otherwise(
    regrow: Command, thin: Path, short: Path, tale: Path, tmp_path: Path
) -> None:
    """Where no method is named: SPP with its own settings; of a dense model LoRA."""
    asked = {}
    for name, model in (("sparse", thin), ("dense", short)):
        done = regrow("recover", model, *TRAIN, "--train", tale, "--out", tmp_path / name)
        assert done.code == 0, done.err
        assert "warning" not in done.err
        recipe = yaml.safe_load((tmp_path / name / "recipe.yaml").read_text(encoding="utf-8"))["recover"]
        asked[name] = [recipe[key] for key in ("method", "rank", "alpha", "dropout", "learning_rate")]
    assert asked == {"sparse": ["spp", 8, 16, 0.0, 0.01], "dense": ["lora", 8, 16, 0.05, 0.0003]}
    assert regrow("diff", thin, tmp_path / "sparse", "--weights", "--json").json["same_mask"] is True


def test_plain_lora_warns_and_fills(regrow: Command, thin: Path, tale: Path, tmp_path: Path) -> None:
    done = regrow("recover", thin, "--adapter", "lora", *TRAIN, "--train", tale, "--out", tmp_path / "filled")
    assert done.code == 0, done.err
    assert done.err.count("warning: zeros are filled by plain LoRA") == 1
    assert "lora-masked keep them" in done.err
    assert any("filled by plain LoRA" in note for note in read_report(tmp_path / "filled").notes)
    assert "sparsity" not in read(tmp_path / "filled", "regrow.json")
    compared = regrow("diff", thin, tmp_path / "filled", "--weights", "--json").json
    assert compared["intact"] is False
    assert compared["lost"] > 100_000
    assert "zeros were lost" in regrow("diff", thin, tmp_path / "filled", "--weights").out


def test_the_warning_comes_before_the_training(
    regrow: Command, thin: Path, tale: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(*_: object) -> None:
        raise BrokenModel("the plug was pulled", "power", "try again")

    monkeypatch.setattr("regrow.run._recovered", torn)
    done = regrow("recover", thin, "--adapter", "lora", *TRAIN, "--train", tale, "--out", tmp_path / "filled")
    assert done.code == 1
    assert done.err.index("warning: zeros are filled by plain LoRA") < done.err.index("error: the plug was pulled")
    assert not (tmp_path / "filled").exists()


@pytest.mark.parametrize("changed", ["text", "calibration", "teacher"])
def test_what_a_recovery_starts_from_is_in_its_key(
    short: Path, tale: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """Another text or teacher under the same name is no run to go on with."""
    from regrow import trained as module
    from regrow.artifacts.plan import Plan
    from regrow.settings import parse
    from regrow.stages.load import load

    files = {name: tmp_path / f"{name}.txt" for name in ("text", "calibration")}
    for file in files.values():
        file.write_text(tale.read_text(encoding="utf-8"), encoding="utf-8")
    teacher = tmp_path / "teacher"
    shutil.copytree(short, teacher)
    recipe = parse(
        {
            "keep": None,
            "sparsify": {"pattern": "2:4"},
            "calibration": {"text": str(files["calibration"]), "tokens": 256, "block": 64},
            "recover": {
                "method": "spp",
                "tokens": 256,
                "block": 16,
                "text": str(files["text"]),
                "teacher": str(teacher),
            },
        },
        "here",
    )
    trained = Recovered(TrainResult(1, 256, 0, (), 0.0, None))
    monkeypatch.setattr(module, "recover", lambda *_, **__: trained)
    monkeypatch.setattr(module, "recovery_text", lambda *_, **__: Packed(torch.zeros(16, 16, dtype=torch.int64)))
    subject = load(str(short))

    def folder() -> Path:
        return module.recovered(subject, recipe, Plan.everything(subject.anatomy), None).work

    before = folder()
    assert folder() == before
    if changed == "teacher":
        config = json.loads((teacher / "generation_config.json").read_text(encoding="utf-8"))
        (teacher / "generation_config.json").write_text(json.dumps({**config, "top_k": 7}), encoding="utf-8")
    else:
        files[changed].write_text(tale.read_text(encoding="utf-8") + "\n\n" + "w3 w4 w5 " * 90, encoding="utf-8")
    assert folder() != before


def test_no_calibration_is_not_the_usual_one(regrow: Command, short: Path, tmp_path: Path) -> None:
    for flag in ("--calibration-tokens", "--calibration-block"):
        done = regrow("sparsify", short, flag, 0, "--text", "none", "--out", tmp_path / "sparse")
        assert done.code == 2
        assert f"calibration.{flag.rpartition('-')[2]} = 0" in done.err


def test_the_commands_on_demo(regrow: Command, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are written down, on `demo` by name; what it is, is smaller here."""
    monkeypatch.setattr(checkpoint, "demo_model", lambda: short)
    texts = ("--calibration-tokens", 1024, "--seed", 1, "--text", "none")
    for criterion, pattern in (("wanda", "50%"), ("sparsegpt", "2:4"), ("magnitude", "75%"), ("dsnot", "2:8")):
        out = tmp_path / criterion
        done = regrow("sparsify", "demo", "--criterion", criterion, "--pattern", pattern, *texts, "--out", out)
        assert done.code == 0, done.err
        check_pattern(weights(out), Pattern.parse(pattern))
    tuned = tmp_path / "tuned"
    ask = ("recover", tmp_path / "sparsegpt", "--adapter", "spp", "--rank", 16, "--tokens", 2048, "--teacher", "demo")
    ask = (*ask, "--text", "none")
    done = regrow(*ask, "--out", tuned)
    assert done.code == 0, done.err
    check_pattern(weights(tuned), Pattern.parse("2:4"))
    found = regrow("inspect", tuned, "--sparse", "--json").json["sparsity"]
    assert (found["share"], found["groups"], found["mask_intact"]) == (0.5, "2:4", True)


# ---- recipes


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "dsnot", "spp"])
def test_recipes_dry_run(regrow: Command, sprout_dir: Path, name: str) -> None:
    done = regrow("estimate", sprout_dir, "--recipe", name, "--gflops", 10, "--json")
    assert done.code == 0, done.err
    found = done.json
    assert found["before"] == found["after"]
    assert found["loads_as"] == "llama"
    stages = {row["stage"]: row for row in found["stages"]}
    assert ("recover" in stages) is (name == "spp")
    assert "score" not in stages  # no unit goes
    assert {"measure before", "measure after"} <= set(stages)
    assert regrow("show", name, "--json").json["name"] == name


@pytest.mark.parametrize("method", ["spp", "ast"])
def test_a_recipe_from_dense_to_tuned(regrow: Command, short: Path, tale: Path, tmp_path: Path, method: str) -> None:
    """The files say where the zeros lie in the end, where the training moves them too."""
    more = ("recover.block=16", "recover.batch=2", "recover.micro_batch=2", "recover.learning_rate=0.01")
    settings = (f"recover.method={method}", "evaluate.tasks=[]", "calibration.block=64", *more)
    sets = [
        part for item in (*settings, f"calibration.text={tale}", f"recover.text={tale}") for part in ("--set", item)
    ]
    done = regrow(
        "run", "spp", "--model", short, "--recover-tokens", 512, "--calibration-tokens", 256, "--text", "none", *sets,
        "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    check_pattern(weights(tmp_path / "out"), Pattern.parse("2:4"))
    check_manifest(tmp_path / "out", Pattern.parse("2:4"))
    assert {"sparsify", "recover"} <= set(read_report(tmp_path / "out").stages)


def test_statistics_are_kept_for_the_next_run(
    sparsify: Sparsifier, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = ("--criterion", "sparsegpt", "--inputs", "dense")
    wanted, _ = sparsify(short, *dense, "--pattern", "2:4", out="wanted")
    sparsify(short, *dense, "--pattern", "50%", "--keep-statistics", out="first")

    def refuse(*_: object) -> None:
        raise AssertionError("a block ran")

    monkeypatch.setattr("regrow.engines.sparsify.run_layer", refuse)
    found, _ = sparsify(short, *dense, "--pattern", "2:4", "--keep-statistics", out="second")
    assert all(torch.equal(weights(found)[name], weight) for name, weight in weights(wanted).items())
