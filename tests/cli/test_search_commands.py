"""`regrow search`, and shapes by name: what is left, what is said, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from prompt import Command, Refused

from regrow import door

QUICK = (
    "--calibration-tokens", 512, "--set", "calibration.block=64", "--set", "search.tokens=512", "--text", "none",
    "--set", "divisors={neuron: 16, channel: 16}", "--set", "recover.block=64", "--set", "evaluate.samples=[]",
)  # fmt: skip


def test_search(regrow: Command, sprout_dir: Path, tmp_path: Path) -> None:
    """A finished folder, its study beside it, and what it took on the page."""
    out, study = tmp_path / "out", tmp_path / "study"
    asked = ("search", sprout_dir, "--method", "grid", "--params", "1.15M", "--candidates", 3, "--top", 2)
    asked = (*asked, "--rank-tokens", 512, "--also", "kv=100%", "--storage", study, *QUICK)
    done = regrow(*asked, "--worker")
    assert done.code == 0, done.err
    assert done.out.startswith("the search is over: ")
    assert list(tmp_path.iterdir()) == [study]
    helped = regrow(*asked, "--worker", "--json", "-q")
    assert helped.code == 0, helped.err
    assert len(helped.out.splitlines()) == 1
    done = regrow(*asked, "--out", out, "--json")
    assert done.code == 0, done.err
    found = json.loads((out / "search.json").read_text(encoding="utf-8"))
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert 0.95 * 1.15e6 <= report["after"]["size/parameters"]["value"] <= 1.15e6
    assert report["search"] == found
    counted = {"scored": len(found["scored"]), "ranked": 2, "tokens": found["tokens"]}
    assert helped.json == {"chosen": found["chosen"], **counted, "notes": helped.json["notes"]}
    assert helped.json["notes"][0] in report["notes"]
    assert report["stages"]["search"]["tokens"] == found["tokens"] > 0
    assert "recover" not in report["stages"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Why this shape" in page
    assert page.count('<tr class="chosen">') == 1
    assert f"{found['chosen']['neuron']}" in page
    assert any("trained, with" in note for note in done.json["notes"])


def test_text_of_your_own(regrow: Command, sprout_dir: Path, tmp_path: Path) -> None:
    """Candidates are trained on `--train`; where it is short, a note says what they were judged by."""
    text = tmp_path / "mine.txt"
    text.write_text("\n\n".join(f"Tale number {i} " + "went on and on. " * 15 for i in range(150)))
    asked = ("search", sprout_dir, "--method", "random", "--keep", "70%", "--candidates", 2, "--rank-tokens", 512)
    own = ("--calibration", text, "--train", text, "--set", "search.tokens=100000")
    done = regrow(*asked, *QUICK, *own, "--out", tmp_path / "out", "--json", "-q")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / "search.json").read_text(encoding="utf-8"))["judged_on"]
    assert 0 < found["tokens"] < found["asked"] == 100_000 // 64 * 64
    assert any(f"{found['tokens']:,} of the {found['asked']:,} tokens to judge" in note for note in done.json["notes"])
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["recover"]["text"] == str(text)


def test_random(regrow: Command, sprout_dir: Path, tmp_path: Path) -> None:
    asked = ("search", sprout_dir, "--method", "random", "--keep", "70%", "--candidates", 2, "--rank-tokens", 0)
    first, second = (tmp_path / name for name in ("a", "b"))
    for out, seed in ((first, 0), (second, 1)):
        done = regrow(*asked, *QUICK, "--seed", seed, "--out", out, "-q")
        assert done.code == 0, done.err
    found = [json.loads((out / "search.json").read_text(encoding="utf-8")) for out in (first, second)]
    assert [row["widths"] for row in found[0]["scored"]] != [row["widths"] for row in found[1]["scored"]]


def test_a_shape_by_name(regrow: Command, sprout_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ("run", "minitron", "--model", sprout_dir, "--shape", "layers=5,neuron=200", "--recover-tokens", 0)
    done = regrow(*asked, "--set", "evaluate.samples=[]", "--set", "evaluate.tasks=[]", "--text", "none", "--out", out)
    assert done.code == 0, done.err
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert (config["num_hidden_layers"], config["intermediate_size"], config["hidden_size"]) == (5, 200, 128)
    assert "layer=5,neuron=200" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("recipe", ["llm-pruner", "demo", "minitron"])
@pytest.mark.parametrize("words", [("--shape", "neuron=200"), ("--set", "shape={neuron: 200}")], ids=["flag", "set"])
def test_a_shape_is_obeyed_by_every_recipe(
    regrow: Command, sprout_dir: Path, tmp_path: Path, recipe: str, words: tuple[str, ...]
) -> None:
    """Also by one that spreads a budget over the layers, has one of its own, or searches."""
    asked = ("run", recipe, "--model", sprout_dir, *words, "--recover-tokens", 0, "--calibration-tokens", 512, "-q")
    quick = ("--text", "none", "--set", "evaluate={tasks: [], samples: [], speed: false, text: null}")
    done = regrow(*asked, *quick, "--set", "criterion=magnitude", "--set", "options={}", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert (config["intermediate_size"], config["num_hidden_layers"]) == (200, 6)
    assert "auto_map" not in config


def test_a_shape_through_the_python_door(sprout_dir: Path, tmp_path: Path) -> None:
    quick = {"text": None, "speed": False, "samples": [], "tasks": []}
    given = {"criterion": "magnitude", "recover": None, "evaluate": quick, "shape": {"neuron": 200}}
    found = door.prune(str(sprout_dir), tmp_path / "out", recipe="minitron", **given)
    assert {layer[2] for layer in found.shape["after"]["layers"]} == {200}


def test_an_estimate_of_a_shape(regrow: Command, refused: Refused, sprout_dir: Path) -> None:
    asked = ("estimate", sprout_dir, "--gflops", 10, "--recipe", "minitron", "--set")
    done = regrow(*asked, "shape={neuron: 200}", "--json")
    assert done.code == 0, done.err
    assert {layer[2] for layer in done.json["shape"]["layers"]} == {200}
    refused(*asked, "shape={neuron: 99999}", says=("neuron=99999", "352 neurons", "1 to 352"))
    refused(*asked, "search.choices={neuron: [99999]}", says=("choices [99999] of neurons", "1 to 352"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--keep", "80%", "--params", "1M"), ("--keep 80% and --params 1M", "leave one")),
        (("--keep", "5%"), ("none of", "the nearest has")),
        (("--also", "kv=10%"), ("kv=10%", "the nearest has")),
        (("--also", "kv=0KB"), ("kv=0KB", "the nearest has")),
        (("--keep", "83%", "--set", "search.band=0.0001"), ("no shape lies within", "widen search.band to 0.")),
        (("--latency", "fast"), ("latency 'fast'", "12ms")),
        (("--method", "best"), ("best", "grid, random")),
        (("--storage", "nosuch://here"), ("nosuch://here", "the URL of a database")),
        (("--axes", "neuron,channel", "--set", "search.choices={layer: [4]}"), ("choices of layers", "add layer")),
        (("--set", "recover.loss=forward-lk"), ("unknown loss 'forward-lk'", "forward-kl")),
        (("--set", "recover.micro_batch=3"), ("micro_batch = 3", "batch")),
        (("--dtype", "bf16"), ("recovery of all weights in bf16", "fp32")),
        (("--set", "recover.block=100000"), ("recover.block = 100000", "the model reads")),
        (("--criterion", "nosuch"), ("nosuch", "criterion")),
    ],
)
def test_what_is_refused(
    refused: Refused, sprout_dir: Path, tmp_path: Path, words: tuple[str, ...], says: tuple[str, ...]
) -> None:
    refused("search", sprout_dir, *QUICK, *words, "--out", tmp_path / "out", says=says)


def test_a_search_needs_a_place_to_end(refused: Refused, sprout_dir: Path) -> None:
    refused("search", sprout_dir, says=("without --out", "--worker"))


def test_a_worker_writes_no_folder(refused: Refused, sprout_dir: Path, tmp_path: Path) -> None:
    refused(
        "search", sprout_dir, "--worker", "--out", tmp_path / "out", says=("--worker, which writes no folder", "--out")
    )


def test_shapes_that_cannot_be(refused: Refused, sprout_dir: Path, tmp_path: Path) -> None:
    asked = ("run", "minitron", "--model", sprout_dir, "--out", tmp_path / "out", "--shape")
    refused(*asked, "neuron=many", says=("neuron=many", "whole numbers"))
    refused(*asked, "neuron=400", says=("shape neuron=400 of a model with 352 neurons", "1 to 352"))
    refused(*asked, "head=9", says=("head=9", "heads a group"))
    refused(*asked, "tail=1", says=("tail", "layer, group, head, neuron, channel"))
    refused(*asked, "neuron=100", "--keep", "80%", says=("shape and keep",))
