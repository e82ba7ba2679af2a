"""What each command prints and leaves behind."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from prompt import Command, Done
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.main import get_command

from regrow.artifacts.plan import Plan
from regrow.artifacts.report import Report
from regrow.cli.main import app
from regrow.engines import checkpoint
from regrow.recipe_files import recipe_names
from regrow.settings import Recipe

FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "plan.json",
    "recipe.yaml",
    "regrow.json",
    "report.html",
    "report.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
QUICK = ("--calibration-tokens", 512, "--calibration-block", 64, "--text", "none", "--no-speed")


@pytest.fixture(scope="module")
def pruned(sprout_dir: Path, tmp_path_factory: pytest.TempPathFactory, words: Path) -> Path:
    """One cut folder that commands which read folders share."""
    from regrow.door import prune

    out = tmp_path_factory.mktemp("pruned") / "cut"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGROW_CACHE", str(tmp_path_factory.mktemp("cache")))
        prune(
            str(sprout_dir),
            out,
            criterion="magnitude",
            keep="70%",
            evaluate={"text": str(words), "seqlen": 64, "speed": False},
        )
    return out


def read_report(out: Path) -> Report:
    return Report.from_json(json.loads((out / "report.json").read_text(encoding="utf-8")))


def check_folder(out: Path) -> str:
    """Everything a user needs is there, says one thing, and loads; returns what kind of checkpoint it is."""
    names, report = {path.name for path in out.iterdir()}, read_report(out)
    remote = report.model["holder"] == "heterogeneous"
    beside = {"modeling_regrow.py": remote, "train.jsonl": report.training}
    assert names == FILES | {name for name, there in beside.items() if there}
    plan = Plan.from_json(json.loads((out / "plan.json").read_text(encoding="utf-8")))
    recipe = Recipe(**yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8")))
    assert recipe.model_dump(mode="json").items() <= {**report.made_by, "name": recipe.name}.items()
    assert report.shape["after"] == plan.shape().to_json()
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert "base_model:" not in card  # these tests cut folders, which no hub has
    assert recipe.model not in card.replace(f"model: {recipe.model}\n", "")
    assert "license: apache-2.0" in card
    assert card.count("trust_remote_code=True") == (2 if remote else 0)  # model and tokenizer
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert recipe.model not in page.replace(f"model: {recipe.model}\n", "")
    assert "http://" not in page.replace("http://www.w3.org", "")
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=remote)
    assert sum(p.numel() for p in model.parameters()) == report.after["size/parameters"].value
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=remote)
    assert tokenizer.chat_template
    with torch.no_grad():
        assert bool(model(**tokenizer("a river", return_tensors="pt")).logits.isfinite().all())
    notes = json.loads((out / "regrow.json").read_text(encoding="utf-8"))
    assert notes["licence"] == "apache-2.0"
    assert notes["base_model"]
    return str(report.model["holder"])


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "differing"])
def test_prune_leaves_a_whole_folder(
    regrow: Command, sprout_dir: Path, tmp_path: Path, words: Path, uniform: bool
) -> None:
    out = tmp_path / "new" / "cut"
    flags = ["--uniform", "--divisors", "neuron=16"] if uniform else ["--spread", "ends"]
    done = regrow(
        "prune", sprout_dir, "--keep", "80%", "--criterion", "activation", "--out", out, *flags,
        "--calibration-tokens", 512, "--text", words, "--no-speed", "--seed", 3 + uniform, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    kind = check_folder(out)
    assert (kind in ("stock", "carrier")) is uniform
    found = done.json
    assert found["out"] == str(out)
    before, after = (found[side]["size/decoder_weights"]["value"] for side in ("before", "after"))
    step = 16 * 6 if uniform else 1
    assert 0.8 * before - step * 3 * 128 < after <= 0.8 * before
    assert found["after"][f"text/{words.name}/perplexity"]["value"] > 1
    assert "activations" in done.err
    assert "retained" not in done.out  # of tasks, and there were none
    for line in ("measure", "size/parameters", f"model:  {out}", "report: ", "cache:  ", "cut:    "):
        assert line in done.out
    assert ("trust_remote_code=True" in done.out) is not uniform
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]
    assert list((tmp_path / "new").iterdir()) == [out]


def test_quiet_prints_one_line_of_json_and_nothing_else(
    regrow: Command, sprout_dir: Path, tmp_path: Path, words: Path
) -> None:
    ask = ("prune", sprout_dir, "--criterion", "activation", "--calibration-tokens", 640, "--no-speed", "--quiet")
    done = regrow(*ask, "--text", words, "--out", tmp_path / "a", "--json")
    assert (done.code, done.err) == (0, "")
    assert len(done.out.splitlines()) == 1
    assert done.json["shape"]["after"]["layers"]
    assert regrow(*ask, "--text", "none", "--out", tmp_path / "b") == Done(0, "", "")


def test_all_axes_options_and_a_criterion_of_its_own_for_layers(
    regrow: Command, sprout_dir: Path, tmp_path: Path
) -> None:
    done = regrow(
        "prune", sprout_dir, "--axes", "neuron,group,head,channel,layer", "--criterion", "activation,layer=contiguous",
        "--option", "batch=mean,sequence=var", "--split", "layer=0.5,channel=0.25", "--rescale-norms", "--keep", "60%",
        "--out", tmp_path / "cut", "--reduce", "mean", *QUICK,
    )  # fmt: skip
    assert done.code == 0, done.err
    recipe = Recipe(**yaml.safe_load((tmp_path / "cut" / "recipe.yaml").read_text(encoding="utf-8")))
    assert recipe.criteria == {"layer": "contiguous"}
    assert recipe.options == {"batch": "mean", "sequence": "var"}
    assert recipe.split == {"layer": 0.5, "channel": 0.25}
    plan = Plan.from_json(json.loads((tmp_path / "cut" / "plan.json").read_text(encoding="utf-8")))
    assert plan.rescale_norms
    assert plan.made_by["scores"]["criteria"]["layer"]["name"] == "contiguous"


def test_equal_seeds_leave_equal_folders(regrow: Command, sprout_dir: Path, tmp_path: Path) -> None:
    ask = ("prune", sprout_dir, "--criterion", "random", "--text", "none", "--no-speed", "-q")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert regrow(*ask, "--out", tmp_path / name, "--seed", seed).code == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_run_a_recipe_by_path_with_flags_on_top(regrow: Command, sprout_dir: Path, tmp_path: Path, words: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "name: mine\nabout: a test\ncriterion: taylor\nkeep: 90%\ncalibration: {tokens: 512, block: 64}\n"
        "recover: {method: lora, rank: 2, tokens: 50000, block: 64, batch: 4, micro_batch: 2}\n"
        "evaluate: {speed: false, seqlen: 64}\n",
        encoding="utf-8",
    )
    done = regrow(
        "run", recipe, "--model", sprout_dir, "--out", tmp_path / "cut", "--recover-tokens", 2048, "--keep", "75%",
        "--text", words, "--set", "recover.rank=4", "--set", "evaluate.samples=[Hello]", "--tasks", "piqa",
        "--limit", 4, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    check_folder(tmp_path / "cut")
    report = read_report(tmp_path / "cut")
    asked: Any = report.made_by
    assert asked["recipe"] == "mine"
    assert (asked["keep"], asked["recover"]["rank"], asked["recover"]["tokens"]) == ("75%", 4, 2048)
    assert report.training[-1]["tokens"] == 2048
    assert "heldout_loss" in report.training[-1]
    assert report.stages["recover"]["seconds"] > 0
    assert [s["prompt"] for s in report.samples] == ["Hello"]
    assert report.after["task/piqa/acc"].samples == 4
    assert done.json["retention"]["tasks"] == 1
    left = next(line for line in done.out.splitlines() if line.startswith("retained: "))
    assert f"{100 * done.json['retention']['raw']:.1f} % of the zero-shot accuracy" in left
    assert regrow("show", tmp_path / "cut").out.count(left) == 1
    for what in ("gradients", "recovery", "piqa", words.name):
        assert what in done.err


def test_nothing_is_recovered_when_no_tokens_are_asked(regrow: Command, sprout_dir: Path, tmp_path: Path) -> None:
    quick = ("--recover-tokens", 0, "--calibration-tokens", 512, "--text", "none", "--set", "evaluate.speed=false")
    done = regrow(
        "run", "llm-pruner", "--model", sprout_dir, "--out", tmp_path / "c", "--set", "evaluate.tasks=[]", *quick
    )
    assert done.code == 0, done.err
    assert read_report(tmp_path / "c").training == ()


def test_full_recovery_lowers_the_loss(regrow: Command, sprout_dir: Path, tmp_path: Path) -> None:
    done = regrow(
        "run", "demo", "--model", sprout_dir, "--out", tmp_path / "c", "--keep", "50%", "--recover-tokens", 16384,
        "--set", "recover.block=128", "--set", "recover.learning_rate=0.001", "--set", "evaluate.tasks=[]",
        "--set", "evaluate.speed=false", "--set", "evaluate.max_tokens=2048", "--calibration-tokens", 512,
    )  # fmt: skip
    assert done.code == 0, done.err
    report = read_report(tmp_path / "c")
    assert report.training[-1]["loss"] < report.training[0]["loss"]
    assert check_folder(tmp_path / "c") == "stock"


def test_eval_a_text(regrow: Command, sprout_dir: Path, words: Path) -> None:
    ask = ("eval", sprout_dir, "--text", words, "--seqlen", 64, "--json")
    done = regrow(*ask)
    assert done.code == 0, done.err
    found = done.json
    assert found["tokens"] % 63 == 0
    assert found["record"]["seqlen"] == 64
    assert found["perplexity"] == pytest.approx(found["measures"][f"text/{words.name}/perplexity"]["value"])
    few = regrow(*ask, "--max-tokens", 128).json
    assert few["tokens"] == 2 * 63
    assert found["bits_per_byte"] > 0
    model = AutoModelForCausalLM.from_pretrained(sprout_dir, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(sprout_dir)(words.read_text(encoding="utf-8"), return_tensors="pt").input_ids[
        :, :128
    ]
    with torch.no_grad():
        loss = model(input_ids=ids.view(2, 64), labels=ids.view(2, 64)).loss
    assert few["perplexity"] == pytest.approx(math.exp(float(loss)), rel=1e-4)


def test_eval_tasks_and_speed_of_a_cut_folder(regrow: Command, pruned: Path) -> None:
    done = regrow("eval", pruned, "--tasks", "piqa,sciq", "--limit", 4, "--speed", "--json")
    assert done.code == 0, done.err
    measures = done.json["measures"]
    assert measures["task/piqa/acc"]["samples"] == 4
    assert {"task/sciq/acc_norm", "task/piqa/gold_bits_per_byte", "memory/peak_bytes"} <= set(measures)
    assert any(name.startswith("speed/") for name in measures)
    assert done.json["machine"]["versions"]
    assert "task/piqa/acc" in done.out.splitlines()[2] or "task/piqa/acc" in done.out


def test_inspect(regrow: Command, sprout_dir: Path, pruned: Path) -> None:
    dense, cut = (regrow("inspect", path, "--json") for path in (sprout_dir, pruned))
    assert dense.json["costs"]["parameters"] == 1_369_728
    assert dense.json["family"] == "llama"
    assert dense.json["exports"]["transformers"] == "AutoModelForCausalLM"
    assert cut.json["costs"]["parameters"] < 1_369_728
    assert cut.json["shape"] == json.loads((pruned / "report.json").read_text(encoding="utf-8"))["shape"]["after"]
    assert "trust_remote_code" in cut.json["exports"]["transformers"]
    assert "6 layers x" in dense.out


def test_estimate_is_what_prune_does(regrow: Command, sprout_dir: Path, pruned: Path) -> None:
    done = regrow("estimate", sprout_dir, "--keep", "70%", "--gflops", 10, "--json")
    assert done.code == 0, done.err
    found = done.json
    report = json.loads((pruned / "report.json").read_text(encoding="utf-8"))
    assert found["before"]["parameters"] == report["before"]["size/parameters"]["value"]
    assert found["after"]["decoder_weights"] == pytest.approx(
        report["after"]["size/decoder_weights"]["value"], abs=3 * 128
    )
    stages = {row["stage"]: row for row in found["stages"]}
    assert set(stages) == {"score", "measure before", "cut and write", "recover", "measure after"}
    assert stages["recover"]["tokens"] == 400_000
    assert stages["recover"]["minutes"] > 0
    assert min(row["peak_gb"] for row in found["stages"]) > 0
    assert "GFLOP/s" in done.out
    assert "loads as: regrow_llama (trust_remote_code)" in done.out
    assert any("items of tasks" in note for note in found["notes"])
    short = regrow("estimate", sprout_dir, "--recover-tokens", 0, "--gflops", 10, "--criterion", "magnitude", "--json")
    assert {row["stage"] for row in short.json["stages"]} == set(stages) - {"recover"}
    assert short.json["stages"][0]["tokens"] == 0


def test_doctor(regrow: Command, sprout_dir: Path) -> None:
    done = regrow("doctor", sprout_dir, "--json")
    assert done.code == 0
    assert done.json["family"] == "llama"
    assert done.json["cut"] == dict.fromkeys(("layer", "group", "head", "neuron", "channel"), True)
    assert done.json["sizes"]["F"] == 352
    assert "can be cut" in done.out
    assert "head tied to the embedding" in done.out


def test_no_weights_are_downloaded_to_look_at_a_model(
    regrow: Command, sprout_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the hub would give for small files is a folder under a name of its own."""
    snapshot = tmp_path / "0123abcd"
    snapshot.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(sprout_dir / name, snapshot / name)
    asked: list[list[str]] = []

    def download(_: str, *, allow_patterns: list[str], **__: Any) -> str:
        asked.append(allow_patterns)
        return str(snapshot)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    doctor = regrow("doctor", "org/model", "--json")
    assert doctor.json["weights_checked"] is False
    assert "on the hub, not looked at" in doctor.out
    assert regrow("inspect", "org/model", "--json").json["model"]["id"] == "org/model"
    assert regrow("estimate", "org/model", "--gflops", 10, "--json").json["before"]["parameters"] == 1_369_728
    assert len(asked) == 3
    assert not any("safetensors" in pattern or pattern == "*" for patterns in asked for pattern in patterns)
    whole = regrow("doctor", sprout_dir, "--json")
    assert whole.json["weights_checked"] is True
    assert "whole, in plain floating point" in whole.out


@pytest.mark.parametrize("kind", ["criteria", "families", "recipes", "spreads", "tasks", "units"])
def test_ls(regrow: Command, kind: str) -> None:
    rows = regrow("ls", kind, "--json").json[kind]
    assert rows
    table = regrow("ls", kind).out
    for row in rows:
        first = next(iter(row.values()))
        assert first in table
        assert all(isinstance(value, str) for value in row.values())
    assert regrow("ls", "--json").json[kind] == rows


def test_show(regrow: Command, pruned: Path) -> None:
    assert "after / before" in regrow("show", pruned).out
    assert regrow("show", pruned, "--json").json == json.loads((pruned / "report.json").read_text(encoding="utf-8"))
    table = regrow("show", pruned / "plan.json").out
    assert "6 layers x" in table
    assert "query heads" in table
    assert regrow("show", pruned / "plan.json", "--json").json["format"] == 1
    for name in recipe_names():
        assert f"name: {name}" in regrow("show", name).out
        assert regrow("show", name, "--json").json["name"] == name


def test_diff(regrow: Command, pruned: Path, tmp_path: Path) -> None:
    plan = json.loads((pruned / "plan.json").read_text(encoding="utf-8"))
    plan["layers"][0]["neurons"] = plan["layers"][0]["neurons"][1:]
    plan["layers"] = plan["layers"][:-1]
    plan["channels"] = plan["channels"][1:]
    other = tmp_path / "plan.json"
    other.write_text(json.dumps(plan), encoding="utf-8")
    rows = {row[0]: row[1:] for row in regrow("diff", pruned / "plan.json", other, "--json").json["rows"]}
    assert rows["channels"] == ["127", "1", "0"]
    kept = len(plan["layers"][0]["neurons"])
    assert rows["0 neurons"] == [str(kept), "1", "0"]
    assert rows["5 groups"][0] == "0"
    assert {"5 heads", "5 neurons"} <= set(rows)
    assert "1 neurons" not in rows
    same = regrow("diff", pruned / "plan.json", pruned / "plan.json", "--json").json["rows"]
    assert same == []
    reports = regrow("diff", pruned, pruned, "--json").json
    assert reports["columns"] == ["measure after", "first", "second"]
    assert all(one == two for _, one, two in reports["rows"])
    mixed = regrow("diff", pruned, pruned / "plan.json")
    assert mixed.code == 2
    assert "two plans or two reports" in mixed.err


def test_merged_heads_are_shown(regrow: Command, pruned: Path, tmp_path: Path) -> None:
    plan = json.loads((pruned / "plan.json").read_text(encoding="utf-8"))
    assert "into" not in regrow("show", pruned / "plan.json").out
    plan["merge"], plan["layers"][1]["merged"] = "laco", [[0, 2], [0, 3]]
    other = tmp_path / "plan.json"
    other.write_text(json.dumps(plan), encoding="utf-8")
    shown = regrow("show", other).out
    assert "laco" in shown
    assert "2 into 0, 3 into 0" in shown
    rows = regrow("diff", pruned / "plan.json", other, "--json").json["rows"]
    assert rows == [["1 merged", "0", "0", "2"]]


def test_report_makes_the_page_anew(regrow: Command, pruned: Path, tmp_path: Path) -> None:
    """With the importance maps of the page that was there, as long as it is there."""
    copied = tmp_path / "copy"
    shutil.copytree(pruned, copied)
    page, other = copied / "report.html", tmp_path / "page.html"
    first = page.read_text(encoding="utf-8")
    assert 'id="importance"' in first
    assert regrow("report", copied, "--out", other).out.strip() == str(other)
    assert regrow("report", copied, "--json").json == {"page": str(page), "maps": True}
    assert page.read_text(encoding="utf-8") == other.read_text(encoding="utf-8") == first
    page.unlink()
    assert "without importance maps" in regrow("report", copied).out
    assert regrow("report", copied, "--json").json == {"page": str(page), "maps": False}
    again = page.read_text(encoding="utf-8")
    assert again.startswith("<!doctype html>")
    assert 'id="importance"' not in again
    assert sorted(p.name for p in copied.iterdir()) == sorted(p.name for p in pruned.iterdir())


def test_a_cut_folder_cannot_be_cut_twice_when_its_layers_differ(regrow: Command, pruned: Path, tmp_path: Path) -> None:
    done = regrow("prune", pruned, "--criterion", "magnitude", *QUICK, "--out", tmp_path / "again")
    assert done.code == 1
    assert "error: " in done.err
    assert not (tmp_path / "again").exists()


def test_a_uniform_folder_can_be_cut_again(regrow: Command, sprout_dir: Path, tmp_path: Path) -> None:
    ask = ("--criterion", "magnitude", *QUICK, "--uniform", "--axes", "neuron", "-q")
    assert regrow("prune", sprout_dir, "--keep", "80%", "--out", tmp_path / "one", *ask).code == 0
    done = regrow("prune", tmp_path / "one", "--keep", "80%", "--out", tmp_path / "two", *ask)
    assert done.code == 0, done.err
    assert check_folder(tmp_path / "two") == "stock"
    assert read_report(tmp_path / "two").made_by["model"] == str(tmp_path / "one")


def test_help_of_every_command(regrow: Command) -> None:
    whole = regrow("--help")
    assert whole.code == 0
    assert regrow().out == whole.out
    for name in ("run", "prune", "learn", "eval", "inspect", "estimate", "doctor", "ls", "show", "diff", "report"):
        done = regrow(name, "--help")
        assert done.code == 0
        assert f"Usage: regrow {name}" in done.out


def test_every_command_takes_the_options_that_scripts_pass_everywhere() -> None:
    """Where nothing is drawn, --seed is taken all the same, and says so."""
    group: Any = get_command(app)
    still = {"inspect", "estimate", "doctor", "ls", "show", "diff", "report"}
    assert set(group.commands) == still | {"run", "search", "learn", "prune", "sparsify", "recover", "eval"}
    for name, command in group.commands.items():
        given = {flag: p for p in command.params for flag in p.opts}
        assert {"--json", "--quiet", "-q", "--seed"} <= set(given), name
        assert ("nothing here is random" in given["--seed"].help) is (name in still), name


def test_quiet_commands_print_nothing_and_a_seed_changes_nothing(
    regrow: Command, sprout_dir: Path, pruned: Path, tmp_path: Path
) -> None:
    shutil.copytree(pruned, tmp_path / "copy")
    for command in (
        ("ls", "units"),
        ("show", pruned),
        ("show", pruned / "plan.json"),
        ("show", "demo"),
        ("diff", pruned, pruned),
        ("report", tmp_path / "copy"),
        ("inspect", sprout_dir),
        ("doctor", sprout_dir),
        ("estimate", sprout_dir, "--gflops", 10),
    ):
        assert regrow(*command, "-q") == Done(0, "", "")
        found = regrow(*command, "-q", "--json", "--seed", 3)
        assert (found.code, len(found.out.splitlines())) == (0, 1)
        assert found.json == regrow(*command, "--json").json
        assert regrow(*command).out
