"""Bad input to sparsify, recover, inspect --sparse and diff --weights: one clear error, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt import Command, Refused
from safetensors.torch import load_file, save_file

import regrow
from models import make, tokenizer
from regrow.engines import checkpoint

QUICK = ("--criterion", "magnitude", "--text", "none")
READS = ("--calibration-tokens", 256, "--calibration-block", 64, "--text", "none")
TRAIN = ("--tokens", 512, "--set", "recover.block=64", "--text", "none")


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be loaded before this input is refused."""
    monkeypatch.setattr(checkpoint, "read", lambda *_, **__: pytest.fail("a model was loaded"))


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing long may begin before this input is refused."""
    for what in ("measured", "calibration", "in_levels", "_recovered"):
        monkeypatch.setattr(f"regrow.run.{what}", lambda *_, what=what, **__: pytest.fail(f"{what} was begun"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "sparse"


@pytest.fixture
def broken(sprout_dir: Path, tmp_path: Path) -> Path:
    """A copy of the test model to break."""
    folder = tmp_path / "model"
    shutil.copytree(sprout_dir, folder)
    return folder


def spoil(folder: Path, name: str, change: Callable[[torch.Tensor], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_that_is_not_there(refused: Refused, sprout_dir: Path, tmp_path: Path) -> None:
    refused("diff", "--weights", sprout_dir, tmp_path / "no", says=("is no folder", "two folders of models"))


# ---- words


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--pattern", "half"), ("pattern 'half'", "a percentage of zeros such as 50%", "write 50%, say, or 2:4")),
        (("--pattern", "100%"), ("pattern '100%'",)),
        (("--pattern", "4:2"), ("pattern '4:2'", "75% zeros in groups of eight is 2:8")),
        (("--pattern", "4:4"), ("pattern '4:4'",)),
        (("--pattern", "2.5:4"), ("pattern '2.5:4'",)),
        (("--criterion", "wnda"), ("unknown weight criterion 'wnda'", "did you mean 'wanda'", "sparsegpt")),
        (("--criterion", "taylor"), ("unknown weight criterion 'taylor'",)),  # of units, not of weights
        (("--solver", "refti"), ("unknown solver 'refti'", "did you mean 'refit'", "alps")),
        (("--solver", "update,refti"), ("unknown solver 'refti'",)),
        (("--spread", "olw"), ("unknown spread of zeros 'olw'", "did you mean 'owl'")),
        (("--spread", "ends"), ("unknown spread of zeros 'ends'", "uniform")),  # of units
        (("--solver", "refit", "--option", "stps=4"), ("option 'stps' belongs to none of", "steps, tolerance")),
        (("--criterion", "wanda", "--option", "steps=4"), ("option 'steps' belongs to none of the solvers none",)),
        (("--solver", "refit", "--option", "steps=many"), ("option steps='many' of solver 'refit'", "a whole number")),
        (("--solver", "refit", "--option", "steps=2.5"), ("option steps=2.5", "a whole number")),
        (("--solver", "refit", "--option", "tolerance=small"), ("option tolerance='small'", "a number")),
        (("--solver", "update", "--option", "hold=1"), ("option hold=1", "true or false")),
        (("--solver", "alps", "--option", "penalty=0"), ("option penalty=0", "a number, more than 0")),
        (("--option", "steps"), ("NAME=VALUE",)),
        (("--inputs", "prund"), ("unknown sparsify.inputs 'prund'", "did you mean 'pruned'", "both")),
        (("--existing", "maybe"), ("unknown sparsify.existing 'maybe'", "refuse, keep")),
        (("--damping", "-1"), ("sparsify.damping = -1.0", "greater than or equal to 0")),
        (("--calibration", "nowhere.txt"), ("'nowhere.txt' does not exist",)),
    ],
    ids=lambda x: " ".join(map(str, x)),
)
def test_words(refused: Refused, sprout_dir: Path, out: Path, flags: tuple[str, ...], says: tuple[str, ...]) -> None:
    refused("sparsify", sprout_dir, "--out", out, *flags, "--text", "none", says=says)


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--adapter", "sp"), ("unknown recover.method 'sp'", "did you mean 'spp'", "lora-masked")),
        (("--loss", "forward-kll"), ("unknown loss 'forward-kll'", "did you mean 'forward-kl'")),
        (("--teacher", "no/where/at/all"), ("model 'no/where/at/all' is neither a folder here",)),
        (("--tokens", "0"), ("a run that changes nothing", "keep, sparsify or recover")),
        (("--rank", "0"), ("recover.rank = 0", "greater than or equal to 1")),
        (("--dropout", "1"), ("recover.dropout = 1", "less than 1")),
        (("--adapter", "full", "--dtype", "bf16"), ("recovery of all weights in bf16", "recover.method=spp")),
        (("--adapter", "spp", "--dtype", "fp16"), ("recovery in fp16", "fp32 or bf16", "use --dtype bf16")),
        (("--adapter", "ast", "--dtype", "bf16"), ("recovery of all weights in bf16", "recover.method=spp")),
        (("--set", "recover.adapter=spp"), ("unknown recipe key 'recover.adapter'",)),
        (("--template", "alpca"), ("unknown recover.template 'alpca'", "did you mean 'alpaca'", "chat")),
        (("--learn", "answer"), ("unknown recover.learn 'answer'", "did you mean 'answers'", "all")),
        (("--learn", "answers"), ("learn answers of plain text", "whose rows are instructions and answers")),
        (("--template", "chat"), ("template chat of plain text", "leave template and learn out")),
    ],
    ids=lambda x: " ".join(map(str, x)),
)
def test_words_of_recovery(
    refused: Refused, sprout_dir: Path, out: Path, flags: tuple[str, ...], says: tuple[str, ...]
) -> None:
    code = 1 if "--teacher" in flags else 2
    refused("recover", sprout_dir, "--out", out, "--text", "none", *flags, says=says, code=code)


@pytest.mark.usefixtures("cheap")
def test_a_row_without_an_answer(refused: Refused, sprout_dir: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "c", "input": "d"}\n', encoding="utf-8")
    says = ("rows.jsonl: line 2: 'output' is missing", "instruction (and input) with output", "complete the row")
    refused("recover", sprout_dir, "--train", rows, "--out", tmp_path / "out", "--text", "none", says=says)


@pytest.mark.usefixtures("early")
def test_no_chat_template(refused: Refused, broken: Path, tmp_path: Path) -> None:
    (broken / "chat_template.jinja").unlink()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "a {i}", "completion": "b"}}\n' for i in range(40)), encoding="utf-8")
    says = ("template chat with a tokenizer that has no chat template", "ask for template alpaca")
    refused("recover", broken, "--train", rows, "--template", "chat", "--out", tmp_path / "out", *TRAIN, says=says)


@pytest.mark.usefixtures("cheap")
def test_units_and_zeros_in_one_run(refused: Refused, sprout_dir: Path, out: Path) -> None:
    says = ("keep = 80% and sparsify in one run", "cut first, then `regrow sparsify` the folder")
    refused("run", "wanda", "--model", sprout_dir, "--keep", "80%", "--out", out, says=says)


# ---- patterns and models that do not go together


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("pattern", ["3:5", "1:3", "64:256"])
def test_a_pattern_that_does_not_divide(refused: Refused, sprout_dir: Path, out: Path, pattern: str) -> None:
    says = (f"pattern {pattern} on model.layers.0.self_attn.q_proj.weight, whose rows have 128", "groups that divide")
    refused("sparsify", sprout_dir, "--pattern", pattern, "--out", out, *QUICK, says=says)


@pytest.mark.usefixtures("early")
def test_only_what_is_to_be_sparse_must_divide(refused: Refused, sprout_dir: Path, out: Path) -> None:
    """352 inputs of the down projection do not divide into 128; the others do, and so the first is named."""
    ask = ("sparsify", sprout_dir, "--pattern", "64:128", "--out", out, *QUICK)
    refused(*ask, says=("model.layers.0.mlp.down_proj.weight, whose rows have 352 weights",))


def test_what_does_not_divide_may_be_left_dense(regrow: Command, sprout_dir: Path, out: Path) -> None:
    done = regrow("sparsify", sprout_dir, "--pattern", "64:128", "--leave", "down_proj", "--out", out, *QUICK)
    assert done.code == 0, done.err


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize(
    ("leave", "says"),
    [
        ("o_prj", ("leave = 'o_prj', which names no linear", "o_proj, q_proj")),
        ("proj", ("leave = 'proj'",)),  # whole names, from a dot on
        ("o_proj,lm_head", ("leave = 'lm_head'",)),  # stays dense anyway
        ("q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", ("every linear is left out", "leave fewer out")),
    ],
)
def test_names_to_leave(refused: Refused, sprout_dir: Path, out: Path, leave: str, says: tuple[str, ...]) -> None:
    refused("sparsify", sprout_dir, "--leave", leave, "--out", out, *QUICK, says=says)


@pytest.fixture(scope="module")
def sparse(sprout_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sprout with 2:4 zeros."""
    from regrow.cli.main import main

    folder = tmp_path_factory.mktemp("magnitude") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGROW_CACHE", str(tmp_path_factory.mktemp("cache")))
        ask = ("sparsify", sprout_dir, "--pattern", "2:4", *QUICK, "--out", folder, "-q")
        assert main([str(a) for a in ask]) == 0
    return folder


@pytest.mark.usefixtures("early")
def test_a_model_that_is_sparse_already(refused: Refused, sparse: Path, out: Path) -> None:
    says = ("first has 50.0 % zeros already", "fewer than 5 %", "say --existing keep")
    refused("sparsify", sparse, "--pattern", "2:8", "--out", out, *QUICK, says=says)
    refused("run", "wanda", "--model", sparse, "--text", "none", "--set", "evaluate.tasks=[]", "--out", out, says=says)


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_zeros_may_be_kept(regrow: Command, sparse: Path, out: Path, criterion: str) -> None:
    """75 % of which the half that was zero stays zero: inside every group of eight two of the four are left."""
    ask = ("sparsify", sparse, "--pattern", "2:8", "--existing", "keep", "--criterion", criterion, *READS)
    done = regrow(*ask, "--out", out)
    assert done.code == 0, done.err
    compared = regrow("diff", sparse, out, "--weights", "--json").json
    assert (compared["intact"], compared["lost"], compared["same_mask"]) == (True, 0, False)
    assert compared["share"] == [0.5, 0.75]
    weights = load_file(out / "model.safetensors")
    for name in (n for n in weights if n.endswith("_proj.weight")):
        assert set((weights[name] != 0).reshape(-1, 8).sum(-1).tolist()) == {2}


def test_fewer_zeros_than_there_are(regrow: Command, sparse: Path, out: Path) -> None:
    done = regrow("sparsify", sparse, "--pattern", "20%", "--existing", "keep", *QUICK, "--out", out)
    assert done.code == 0, done.err
    assert "20 % zeros; 50.00 % of the weights inside decoder layers are zero" in done.out
    assert regrow("diff", sparse, out, "--weights", "--json").json["same_mask"] is True


@pytest.mark.usefixtures("early")
def test_a_rank_that_does_not_divide(refused: Refused, sprout_dir: Path, out: Path) -> None:
    """Outputs are 128, 64 and 352; it is said before anything is calibrated, pruned or measured."""
    ask = ("recover", sprout_dir, "--adapter", "spp", *TRAIN, "--out", out)
    done = refused(*ask, "--rank", 7, says=("SPP of rank 7 on model.layers.0.self_attn.q_proj, which has 128 outputs",))
    assert done.json["allowed"].endswith(": 1, 2, 4, 8, 16")
    refused(*ask, "--rank", 64, says=("SPP of rank 64 on model.layers.0.mlp.gate_proj, which has 352 outputs",))
    whole = ("run", "spp", "--model", sprout_dir, "--text", "none", "--set", "evaluate.tasks=[]", "--out", out)
    refused(*whole, "--set", "recover.rank=12", says=("SPP of rank 12",))


@pytest.mark.usefixtures("early")
def test_a_rank_that_does_not_divide_what_a_cut_leaves(refused: Refused, sprout_dir: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "cut.yaml"
    recipe.write_text(
        "{keep: 71%, criterion: magnitude, recover: {method: spp, tokens: 2048, block: 64, rank: 16},"
        " evaluate: {text: null, speed: false}}",
        encoding="utf-8",
    )
    says = ("SPP of rank 16 on model.layers.", "a rank that divides the outputs of every linear")
    refused("run", recipe, "--model", sprout_dir, "--out", tmp_path / "out", says=says)


def test_a_dense_model_has_no_zeros_to_move(refused: Refused, sprout_dir: Path, out: Path) -> None:
    says = ("a model that is not sparse", "no zeros to move", "at least 5 % zeros", "regrow sparsify")
    refused("recover", sprout_dir, "--adapter", "ast", *TRAIN, "--out", out, says=says)


@pytest.mark.usefixtures("early")
def test_a_teacher_of_another_tongue(refused: Refused, sprout_dir: Path, out: Path, tmp_path: Path) -> None:
    """Said before anything is calibrated, pruned or measured."""
    other = tmp_path / "other"
    other.mkdir()
    checkpoint.write(make("llama"), tokenizer(), other, torch.float32, None)
    says = ("a teacher whose tokens are others (embeddings of 64 rows there and", "choose another teacher")
    refused("recover", sprout_dir, "--teacher", other, *TRAIN, "--out", out, says=says)
    whole = ("run", "spp", "--model", sprout_dir, "--text", "none", "--set", "evaluate.tasks=[]", "--out", out)
    refused(*whole, "--set", f"recover.teacher={other}", says=says)
    cut = ("run", "demo", "--model", sprout_dir, "--text", "none", "--out", out)
    refused(*cut, "--set", f"recover.teacher={other}", says=says)


@pytest.mark.usefixtures("early")
def test_a_teacher_whose_tokens_are_others(refused: Refused, sprout_dir: Path, out: Path, broken: Path) -> None:
    """As many tokens, two of them swapped."""
    path = broken / "tokenizer.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = found["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(found), encoding="utf-8")
    says = ("whose tokens are others (token 'a' is",)
    refused("recover", sprout_dir, "--teacher", broken, *TRAIN, "--out", out, says=says)


# ---- broken models and texts


@pytest.mark.parametrize("criterion", ["magnitude", "sparsegpt"])
def test_nan_in_weights_names_the_tensor(refused: Refused, broken: Path, out: Path, criterion: str) -> None:
    def change(weight: torch.Tensor) -> None:
        weight[5, 7] = float("nan")

    spoil(broken, "model.layers.3.mlp.up_proj.weight", change)
    says = ("model.layers.3.mlp.up_proj.weight", "NaN", "use another checkpoint")
    refused("sparsify", broken, "--criterion", criterion, *READS, "--out", out, says=says, code=1)


@pytest.mark.parametrize(
    ("criterion", "says"),
    [
        ("wanda", ("model.layers.1.mlp.down_proj", "not finite")),
        ("dsnot", ("model.layers.1.mlp.down_proj", "not finite")),
        ("sparsegpt", ("update found no finite weights for model.layers.1.mlp.up_proj",)),
    ],
)
def test_numbers_that_overflow_name_the_linear(
    refused: Refused, broken: Path, out: Path, criterion: str, says: tuple[str, ...]
) -> None:
    spoil(broken, "model.layers.1.mlp.up_proj.weight", lambda w: w.mul_(1e38 / w.abs().max()))
    refused("sparsify", broken, "--criterion", criterion, *READS, "--out", out, says=says, code=1)


@pytest.mark.usefixtures("early")
def test_text_shorter_than_one_block(refused: Refused, sprout_dir: Path, out: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("\n\n".join(f"Part {i}. " + "And so on it went. " * 12 for i in range(40)), encoding="utf-8")
    ask = ("sparsify", sprout_dir, "--criterion", "wanda", "--text", "none", "--out", out)
    refused(*ask, "--calibration", short, says=("the calibration part of ", "gives 231 tokens", "512, one block"))


def test_an_output_that_exists(refused: Refused, sprout_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    says = ("there exists", "choose another --out")
    refused("sparsify", sprout_dir, *QUICK, "--out", tmp_path / "there", says=says, code=1)
    refused("recover", sprout_dir, *TRAIN, "--out", tmp_path / "there", says=says, code=1)


# ---- folders that are only read


@pytest.mark.parametrize("left", [0, 100, 2_000_000])
def test_truncated_weights(refused: Refused, sprout_dir: Path, broken: Path, left: int) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    says = ("model.safetensors cannot be read",)
    refused("inspect", broken, "--sparse", says=says, code=1)
    refused("diff", sprout_dir, broken, "--weights", says=says, code=1)


def test_missing_weights(refused: Refused, sprout_dir: Path, broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    refused("inspect", broken, "--sparse", says=("model.safetensors cannot be read",), code=1)
    refused("diff", sprout_dir, broken, "--weights", says=("model.safetensors cannot be read",), code=1)


def test_weights_under_other_names(refused: Refused, broken: Path) -> None:
    weights = {f"student.{name}": weight for name, weight in load_file(broken / "model.safetensors").items()}
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    says = ("no weight is called model.layers.0.self_attn.q_proj.weight",)
    refused("inspect", broken, "--sparse", says=says, code=1)


def test_two_models_that_are_not_of_one_kind(refused: Refused, sprout_dir: Path, tmp_path: Path) -> None:
    other: Any = tmp_path / "other"
    other.mkdir()
    checkpoint.write(make("llama"), tokenizer(), other, torch.float32, None)
    says = ("two checkpoints of different shapes", "its own tuned form")
    refused("diff", sprout_dir, other, "--weights", says=says)
    refused("diff", other, sprout_dir, "--weights", says=says)


def test_two_models_alike_but_in_the_widths_of_some_layers(refused: Refused, sprout_dir: Path, tmp_path: Path) -> None:
    """The end layers keep their width, so the widest layer is that of the dense model."""
    cut = tmp_path / "cut"
    little = {"text": None, "speed": False, "samples": []}
    regrow.prune(str(sprout_dir), cut, keep="60%", criteria={"neuron": "magnitude"}, evaluate=little)
    refused("diff", sprout_dir, cut, "--weights", says=("two checkpoints of different shapes",))
