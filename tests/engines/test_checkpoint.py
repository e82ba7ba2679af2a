"""Folders: whole or not there, equal to memory, and every kind of damage named."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from limits import files_up_to
from models import VOCAB, anatomy_of, cut, difference, families, logits, make, plan, tokenizer
from regrow.engines import checkpoint, provenance
from regrow.errors import (
    BrokenModel,
    IdentityError,
    ModelError,
    OutputError,
    QuantisedModel,
    RegrowError,
    RegrowWarning,
)

PROBE = checkpoint.probe(VOCAB)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole folder; copy it before breaking it."""
    folder = tmp_path_factory.mktemp("good") / "model"
    folder.mkdir()
    checkpoint.write(make("llama"), tokenizer(), folder, torch.float32, None)
    return folder


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **changes}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# ---- whole or not there


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with checkpoint.staged(out) as folder:
        assert folder.parent == out.parent
        assert folder.name.startswith(".out.")
        assert folder.name.endswith(".partial")
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")
        assert not out.exists()
    assert (out / "inner" / "file").read_text() == "x"
    assert os.listdir(out.parent) == ["out"]
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError("inside"), KeyboardInterrupt()])
def test_an_error_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), checkpoint.staged(tmp_path / "out") as folder:  # noqa: PT012
        (folder / "file").write_text("x")
        raise error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_exists_is_not_touched(tmp_path: Path, is_folder: bool) -> None:
    out = tmp_path / "out"
    if is_folder:
        out.mkdir()
        (out / "mine").write_text("mine")
    else:
        out.write_text("mine")
    with pytest.raises(OutputError, match="exists") as caught, checkpoint.staged(out):
        pytest.fail("the block must not run")
    assert "another --out" in caught.value.todo
    assert (out / "mine" if is_folder else out).read_text() == "mine"
    assert os.listdir(tmp_path) == ["out"]


def test_what_appears_meanwhile_is_not_touched(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="cannot be written"), checkpoint.staged(out) as folder:  # noqa: PT012
        (folder / "file").write_text("x")
        out.mkdir()
        (out / "mine").write_text("mine")
    assert os.listdir(out) == ["mine"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"), checkpoint.staged(tmp_path / "file" / "out"):
        pytest.fail("the block must not run")


def test_a_parent_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)  # permissions bind everyone but root
    with pytest.raises(OutputError, match="Permission denied") as caught:
        checkpoint.check_out(tmp_path / "out")
    assert "writable folder" in caught.value.allowed


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match="the disk is full"), checkpoint.staged(tmp_path / "out"):
        full()
    monkeypatch.setattr(checkpoint, "save_file", full)
    with (
        pytest.raises(OutputError, match="weights cannot be written: the disk is full"),
        checkpoint.staged(tmp_path / "out") as folder,
    ):
        checkpoint.write(make("llama"), tokenizer(), folder, torch.float32, None)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="the disk is full"), checkpoint.staged(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("what", "size"), [("weights", 10_000), ("tokenizer", 90_000)])
def test_files_that_may_not_grow(tmp_path: Path, sprout_dir: Path, what: str, size: int) -> None:
    """Libraries say so each in its own way."""
    spoken = AutoTokenizer.from_pretrained(sprout_dir)
    model = make("llama", hidden_size=12, intermediate_size=8, num_hidden_layers=1)
    with (
        pytest.raises(OutputError, match=f"the {what} cannot be written"),
        checkpoint.staged(tmp_path / "out") as folder,
        files_up_to(size),
    ):
        checkpoint.write(model, spoken, folder, torch.float32, None)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", [*dict(families()), "mixtral", "qwen3_moe"])
def test_weights_are_called_as_everywhere(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and shapes are those that stock transformers write, in one file and in several."""
    model = make(kind, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "stock")
    expected = load_file(tmp_path / "stock" / "model.safetensors")
    for size in (checkpoint._FILE, 20_000):
        monkeypatch.setattr(checkpoint, "_FILE", size)
        folder = tmp_path / str(size)
        folder.mkdir()
        checkpoint.write(model, tokenizer(), folder, torch.float32, None)
        files = checkpoint.weight_files(folder)
        assert (len(files) > 1) is (size == 20_000)
        found = {name: value for file in files for name, value in load_file(folder / file).items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        ids = checkpoint.probe(model.config.vocab_size)
        checkpoint.reread(folder, checkpoint.logits(model, ids), ids)


def test_out_is_tried_before_the_work(tmp_path: Path) -> None:
    checkpoint.check_out(tmp_path / "out")
    assert os.listdir(tmp_path) == []


KILLED = """
import sys, time
from pathlib import Path
from regrow.engines.checkpoint import staged
with staged(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("x")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_killed_run_leaves_only_a_hidden_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".out.")
    assert left.endswith(".partial")
    with checkpoint.staged(out):  # and it is not in the way
        pass
    assert out.is_dir()


# ---- equal to memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_memory_equals_disk_bit_for_bit(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    """Weights are rounded to the storage type before anything is measured."""
    model = cut(make("gemma2", tie_word_embeddings=tied), plan(anatomy_of(make("gemma2")), ("neuron",), uniform=False))
    before = logits(model.model, PROBE)
    checkpoint.round_to(model.model, dtype)
    assert (difference(before, logits(model.model, PROBE)) > 0) == (dtype != torch.float32)
    memory = {name: parameter.clone() for name, parameter in model.model.named_parameters()}
    computed = logits(model.model, PROBE)
    checkpoint.write(model.model, tokenizer(), tmp_path, dtype, model.holder.code)
    assert {parameter.dtype for parameter in model.model.parameters()} == {dtype}  # no second copy was made
    assert checkpoint.check_files(tmp_path) == dtype
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    again, _ = checkpoint.read(tmp_path)
    for (name, ours), (same, theirs) in zip(memory.items(), again.named_parameters(), strict=True):
        assert name == same
        assert torch.equal(ours, theirs), name
    assert torch.equal(computed, logits(again, PROBE))
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied


def test_finite_and_rounded_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_PIECE", 8)
    model = torch.nn.Linear(5, 7)
    whole = model.weight.detach().to(torch.bfloat16).float()
    checkpoint.round_to(model, torch.bfloat16)
    assert torch.equal(model.weight, whole)
    for place in ((0, 0), (6, 4)):
        broken = whole.clone()
        assert checkpoint._finite(broken)
        broken[place] = float("nan")
        assert not checkpoint._finite(broken)


def test_a_tokenizer_is_part_of_the_fingerprint(copy: Path) -> None:
    before = provenance.fingerprint(copy)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    after = provenance.fingerprint(copy)
    assert before != after
    (copy / "README.md").write_text("words for people")
    assert provenance.fingerprint(copy) == after


def test_a_hub_model_is_looked_at_without_its_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = ["config.json", "tokenizer.json", "README.md", "model-00001-of-00002.safetensors", "modeling_x.py"]
    files += ["consolidated.safetensors", "pytorch_model.bin", "original/model.safetensors", "onnx/config.json"]
    found: list[list[str]] = []

    def download(_: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        chosen = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        found.append(sorted(chosen))
        return str(tmp_path)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert checkpoint.locate("org/model", weights=False) == checkpoint.locate("org/model") == tmp_path
    assert found[0] == ["README.md", "config.json", "modeling_x.py", "tokenizer.json"]
    assert found[1] == sorted([*found[0], "model-00001-of-00002.safetensors"])


def test_a_flipped_bit_is_found(good: Path, copy: Path) -> None:
    reference = logits(make("llama"), PROBE)
    checkpoint.reread(good, reference, PROBE)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-2] ^= 0x20  # the exponent's lowest bits of the last weight
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(IdentityError, match="reloaded folder") as caught:
        checkpoint.reread(copy, reference, PROBE)
    assert "nothing was written" in caught.value.todo
    assert provenance.fingerprint(good) != provenance.fingerprint(copy)


def test_a_cache_that_generates_something_else_is_found(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = logits(make("llama"), PROBE)
    right = checkpoint.cached_logits
    monkeypatch.setattr(checkpoint, "cached_logits", lambda *a: right(*a).roll(1, 1))
    with pytest.raises(IdentityError, match="generation with and without a cache"):
        checkpoint.reread(good, reference, PROBE)


def test_a_model_that_makes_much_of_a_rounding_is_no_wrong_layout(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What differs in fp32 alone is rounding; what differs in fp64 too is not."""
    reference, right = logits(make("llama"), PROBE), checkpoint.cached_logits

    def rough(model: Any, ids: torch.Tensor, steps: int) -> torch.Tensor:
        return right(model, ids, steps) * (1.01 if model.dtype == torch.float32 else 1)

    monkeypatch.setattr(checkpoint, "cached_logits", rough)
    again = checkpoint.reread(good, reference, PROBE)
    assert again.dtype == torch.float32
    assert torch.equal(logits(again, PROBE), reference)
    monkeypatch.setattr(checkpoint, "cached_logits", lambda *a: rough(*a).roll(1, 1))
    with pytest.raises(IdentityError, match="generation with and without a cache"):
        checkpoint.reread(good, reference, PROBE)


@pytest.mark.parametrize("theirs", [torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.1])])
def test_difference_by_hand(theirs: torch.Tensor) -> None:
    ours = torch.tensor([1.0, 2.0])
    assert checkpoint.check_equal("two", ours, ours + torch.tensor([0.0, 1e-5])) == pytest.approx(5e-6, rel=0.05)
    with pytest.raises(IdentityError, match="two differ"):
        checkpoint.check_equal("two", ours, theirs)


def test_what_travels_beside_the_weights(tmp_path: Path) -> None:
    model, words = make("llama"), tokenizer()
    model.generation_config.update(do_sample=True, temperature=0.7, max_new_tokens=33)
    checkpoint.write(model, words, tmp_path, torch.float32, "# code\n")
    again, read = checkpoint.read(tmp_path)
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    assert read.chat_template == words.chat_template
    turns = [{"role": "user", "content": "w5"}]
    assert read.apply_chat_template(turns, tokenize=False) == words.apply_chat_template(turns, tokenize=False)
    assert read("w3 w9 w63")["input_ids"] == [3, 9, 63]
    assert (read.eos_token_id, read.bos_token_id, read.pad_token_id) == (2, 1, 0)
    assert (tmp_path / "modeling_regrow.py").read_text() == "# code\n"


def test_sampling_settings_that_no_longer_make_sense_survive(copy: Path, tmp_path: Path) -> None:
    """Many published folders set a temperature without sampling; writing must not stumble over it."""
    odd = {"do_sample": False, "temperature": 0.6, "top_p": 0.9}
    (copy / "generation_config.json").write_text(json.dumps(odd))
    model, words = checkpoint.read(copy)
    (tmp_path / "out").mkdir()
    checkpoint.write(model, words, tmp_path / "out", torch.float32, None)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert odd.items() <= written.items()


# ---- every kind of damage


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def shard_missing(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def index_broken(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")
    (folder / "model.safetensors").unlink()


def not_a_number(folder: Path) -> None:
    edit_weights(folder, lambda w: w["model.layers.1.mlp.up_proj.weight"].view(-1)[5].fill_(float("nan")))


def infinite(folder: Path) -> None:
    edit_weights(folder, lambda w: w["model.norm.weight"][0].fill_(float("inf")))


def tensor_missing(folder: Path) -> None:
    edit_weights(folder, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))


def tensor_misshapen(folder: Path) -> None:
    edit_weights(folder, lambda w: w.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 3)}))


def whole_numbers(folder: Path) -> None:
    edit_weights(folder, lambda w: w.update({"lm_head.weight": torch.zeros(64, 24, dtype=torch.int8)}))


def other_words(folder: Path) -> None:
    tokenizer(VOCAB + 5).save_pretrained(folder)


def no_words(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


DAMAGE: list[tuple[Callable[[Path], object], type[RegrowError], str]] = [
    (truncate, BrokenModel, r"model\.safetensors cannot be read"),
    (only_pickled, BrokenModel, r"model\.safetensors cannot be read"),
    (shard_missing, BrokenModel, "model-00002-of-00002"),
    (lambda f: (f / "model.safetensors").unlink(), BrokenModel, r"model\.safetensors cannot be read"),
    (index_broken, BrokenModel, r"index\.json cannot be read"),
    (not_a_number, BrokenModel, r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"),
    (infinite, BrokenModel, r"model\.norm\.weight holds NaN or infinite"),
    (tensor_missing, BrokenModel, r"missing: model\.layers\.1\.mlp\.up_proj\.weight"),
    (tensor_misshapen, BrokenModel, r"do not fit the configuration: model\.layers\.1\.mlp\.up_proj\.weight"),
    (whole_numbers, QuantisedModel, "I8"),
    (lambda f: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}), QuantisedModel, "gptq"),
    (other_words, BrokenModel, "token id 68"),
    (no_words, BrokenModel, "no readable tokenizer"),
    (lambda f: (f / "tokenizer.json").write_text("{"), BrokenModel, "no readable tokenizer"),
    (lambda f: (f / "tokenizer.json").write_text('{"version": "1.0"}'), BrokenModel, "no readable tokenizer"),
    (lambda f: (f / "config.json").write_text('{"model_type": "lla'), BrokenModel, r"config\.json cannot be read"),
    (lambda f: edit_config(f, model_type="nonsense"), ModelError, "nonsense"),
    (lambda f: edit_config(f, model_type="regrow_nonsense"), ModelError, "nonsense"),
    (lambda f: edit_config(f, num_attention_heads=5), ModelError, "not a multiple"),
    (lambda f: edit_config(f, num_attention_heads="six"), ModelError, "num_attention_heads"),
]


@pytest.mark.parametrize(("damage", "error", "says"), DAMAGE, ids=[says for _, _, says in DAMAGE])
def test_damage_is_named(copy: Path, damage: Callable[[Path], object], error: type[RegrowError], says: str) -> None:
    damage(copy)
    with pytest.raises(error, match=says) as caught:
        checkpoint.read(copy)
    assert type(caught.value) is error
    assert caught.value.allowed
    assert caught.value.todo


def test_a_pickled_checkpoint_says_what_to_do(copy: Path) -> None:
    only_pickled(copy)
    with pytest.raises(BrokenModel) as caught:
        checkpoint.check_files(copy)
    assert "converted to safetensors" in caught.value.todo


def test_masks_among_the_weights_are_not_quantisation(copy: Path) -> None:
    """Old GPT-NeoX folders store their causal mask as booleans."""
    edit_weights(copy, lambda w: w.update({"model.layers.0.attention.bias": torch.ones(2, 2, dtype=torch.bool)}))
    assert checkpoint.check_files(copy) == torch.float32
    checkpoint.read(copy)


@pytest.mark.parametrize("said", [{"dtype": "float16"}, {"dtype": None, "torch_dtype": "bfloat16"}, {"dtype": None}])
def test_what_it_is_stored_in(copy: Path, said: dict[str, Any]) -> None:
    """The files say, by what most weights are in; the configuration may be wrong."""
    edit_config(copy, **said)
    assert checkpoint.check_files(copy) == torch.float32
    edit_weights(copy, lambda w: w.update({n: t.half() for n, t in w.items() if "norm" not in n}))
    assert checkpoint.check_files(copy) == torch.float16


def test_weights_that_have_no_place_are_said(copy: Path) -> None:
    """Biases that the configuration denies, say: the model would be another one without a word."""
    more = {
        "model.layers.0.self_attn.q_norm.weight": torch.ones(36),
        "model.layers.9.mlp.up_proj.weight": torch.ones(3),
    }
    edit_weights(copy, lambda w: w.update({**more, "model.rotary_emb.inv_freq": torch.ones(3)}))
    with pytest.warns(RegrowWarning, match="2 weights of the files have no place") as caught:
        checkpoint.read(copy)
    assert "model.layers.0.self_attn.q_norm.weight, model.layers.9.mlp.up_proj.weight" in str(caught[0].message)


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ('license: "apache-2.0"', "apache-2.0"),
        ("license:\n- apache-2.0\n- mit", "apache-2.0, mit"),
        ("license:\nlanguage: en", "unknown"),
        ("license: other\nlicense_name: llama3", "llama3"),
        ("license: [broken", "unknown"),
    ],
)
def test_the_licence_of_a_card(copy: Path, front: str, licence: str) -> None:
    (copy / "README.md").write_bytes(f"---\n{front}\n---\n\xe9 license: mit\n".encode("latin-1"))
    assert provenance.notes(copy)["licence"] == licence


def test_a_model_named_by_a_dot_has_its_folder_s_name(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    assert provenance.notes(Path("."), ".")["id"] == copy.name


@pytest.mark.parametrize("file", ["special_tokens_map.json", "added_tokens.json", "x.model", "modeling.py", "x.jinja"])
def test_what_decides_tokens_is_in_the_fingerprint(copy: Path, file: str) -> None:
    before = provenance.fingerprint(copy)
    (copy / file).write_text("{}")
    assert provenance.fingerprint(copy) != before
    (copy / "README.md").write_text("words")


# ---- what it was made from


def made_of(folder: Path, base: Path) -> None:
    noted = {"base_model": str(base), "base": {"fingerprint": provenance.fingerprint(base)}}
    (folder / "regrow.json").write_text(json.dumps(noted))


def test_the_root_is_what_it_was(copy: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    shutil.copytree(copy, made)
    assert provenance.root(str(made)) == str(made)
    made_of(made, copy)
    assert provenance.root(str(made)) == str(copy)
    edit_config(copy, rope_theta=3.0)
    with pytest.raises(ModelError, match="holds another model now"):
        provenance.root(str(made))


def test_a_lasting_name_is_a_path_in_full(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    assert provenance.lasting(copy.name) == provenance.lasting(f"./{copy.name}/") == str(copy.resolve())
    assert provenance.lasting("demo") == "demo"
    assert provenance.lasting("owner/name") == "owner/name"


# ---- names


def test_a_folder_is_found(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint.locate(str(good)) == good
    monkeypatch.setenv("HOME", str(good.parent))
    assert checkpoint.locate("~/model") == good
    with pytest.raises(BrokenModel, match=r"no config\.json"):
        checkpoint.locate(str(tmp_path))


@pytest.mark.parametrize("name", ["nobody/has-this", "not a name at all", "./missing/folder"])
def test_a_name_that_leads_nowhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    began = time.monotonic()
    with pytest.raises(ModelError, match="neither a folder here nor to be had") as caught:
        checkpoint.locate(name)
    assert repr(name) in caught.value.came
    assert "demo" in caught.value.allowed
    assert time.monotonic() - began < 20


def test_notes(copy: Path) -> None:
    assert provenance.notes(copy) == {"id": "model", "licence": "unknown", "note": ""}
    (copy / "README.md").write_text("---\nlicense: mit\n---\n")
    assert provenance.notes(copy, "someone/thing") == {"id": "someone/thing", "licence": "mit", "note": ""}
    (copy / provenance.NOTES).write_text('{"id": "mine", "note": "rounded"}')
    assert provenance.notes(copy) == {"id": "mine", "licence": "mit", "note": "rounded"}
    (copy / provenance.NOTES).write_text("{")
    with pytest.raises(BrokenModel, match=r"regrow\.json"):
        provenance.notes(copy)


def test_the_probe_is_the_same_every_time() -> None:
    assert torch.equal(checkpoint.probe(VOCAB), PROBE)
    assert PROBE.shape == (1, 48)
    assert 0 <= int(PROBE.min()) <= int(PROBE.max()) < VOCAB
