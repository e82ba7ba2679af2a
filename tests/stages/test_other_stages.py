"""Load, apply, evaluate, recover, export on their own: what each gives, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from regrow.artifacts.budget import Budget
from regrow.artifacts.plan import Plan
from regrow.artifacts.shape import costs, count
from regrow.engines import checkpoint, clock, provenance
from regrow.engines.asked import as_train
from regrow.engines.bind import Subject
from regrow.engines.gates import from_plan, gated
from regrow.engines.texts import documents
from regrow.engines.tokens import blocks
from regrow.errors import IdentityError, OutputError, SettingsError, TextError, UnknownName
from regrow.recipe_files import dump
from regrow.recovery import RATES, Recover
from regrow.settings import Evaluate, parse
from regrow.stages import apply as applying
from regrow.stages.apply import apply
from regrow.stages.evaluate import check_asked, evaluate, read_text, sizes, write_samples
from regrow.stages.export import export
from regrow.stages.load import as_dtype, load, pick_device, read_model
from regrow.stages.plan import Wish, make_plan
from regrow.stages.recover import recover
from regrow.stages.score import choose, score


@pytest.fixture
def subject(sprout_dir: Path) -> Subject:
    return load(str(sprout_dir))


def plan_of(subject: Subject, keep: str = "70%", **wish: Any) -> Plan:
    scores = score(subject, choose("magnitude", ("neuron", "group"), {}, {}), None)
    return make_plan(subject.anatomy, scores, Wish(budget=Budget.parse(keep), **wish))


# ---- load


def test_load_reads_model_tokenizer_and_what_is_known(subject: Subject, sprout_dir: Path) -> None:
    assert not subject.model.training
    assert next(subject.model.parameters()).dtype == torch.float32
    assert subject.store == torch.bfloat16
    assert subject.source["id"] == "sprout"
    assert subject.source["licence"] == "apache-2.0"
    assert subject.source["asked"] == subject.source["path"] == str(sprout_dir)
    assert subject.source["fingerprint"] == provenance.fingerprint(sprout_dir)
    assert len(subject.tokenizer) == subject.anatomy.sizes["V"]
    assert count(subject.anatomy, subject.anatomy.dense) == sum(p.numel() for p in subject.model.parameters())
    half, _, _ = read_model(str(sprout_dir), dtype="bf16", device="cpu")
    assert next(half.parameters()).dtype == torch.bfloat16


def test_dtypes_and_devices() -> None:
    assert as_dtype("fp16") == torch.float16
    with pytest.raises(SettingsError, match="dtype 'int4'"):
        as_dtype("int4")
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") in ("cpu", "cuda")
    for name in ("cuda:99", "mps:7", "toaster", ""):
        with pytest.raises(SettingsError, match="--device auto"):
            pick_device(name)


# ---- apply


@pytest.mark.parametrize("uniform", [True, False])
def test_apply_gives_what_the_gates_foretell(subject: Subject, uniform: bool) -> None:
    plan = plan_of(subject, uniform=uniform)
    ids = checkpoint.probe(subject.anatomy.sizes["V"])
    with gated(subject.model, subject.anatomy, from_plan(subject.anatomy, plan)):
        masked = checkpoint.logits(subject.model, ids)
    intact = subject.model
    cut = apply(subject, plan)
    assert cut.difference <= 1e-5
    assert cut.subject is subject
    assert subject.model is not intact
    assert sum(p.numel() for p in subject.model.parameters()) == count(subject.anatomy, plan.shape())
    assert all(torch.equal(p, p.to(torch.bfloat16).float()) for p in subject.model.parameters())
    now = checkpoint.logits(subject.model, ids)
    assert float((now - masked).abs().max() / masked.abs().max()) < 0.02  # rounding to bf16 only
    assert subject.model.generation_config.eos_token_id == 1


def test_weights_end_rounded_to_what_they_are_stored_in(subject: Subject) -> None:
    """Norms that keep their old statistics scale the weights by factors that 16 bits do not hold."""
    layers = Plan.everything(subject.anatomy).layers
    apply(subject, Plan(tuple(range(100)), layers, rescale_norms=True))
    assert all(torch.equal(p, p.to(torch.bfloat16).float()) for p in subject.model.parameters())


def test_keeping_everything_changes_nothing(subject: Subject) -> None:
    before = {name: p.detach().clone() for name, p in subject.model.named_parameters()}
    cut = apply(subject, Plan.everything(subject.anatomy))
    assert (cut.difference, cut.holder.kind) == (0.0, "stock")
    assert all(torch.equal(before[name], p) for name, p in subject.model.named_parameters())


def test_apply_refuses_a_plan_of_another_model(subject: Subject) -> None:
    whole = Plan.everything(subject.anatomy)
    with pytest.raises(SettingsError, match="plan: channels"):
        apply(subject, Plan((*whole.channels, 128), whole.layers))


def test_a_wrong_slice_is_found(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: the rows of one projection come back in another order."""
    real = applying.slice_model

    def wrong(*arguments: Any) -> Any:
        for name, tensor in real(*arguments):
            yield name, tensor.flip(0) if name.endswith("layers.3.mlp.up_proj.weight") else tensor

    monkeypatch.setattr(applying, "slice_model", wrong)
    with pytest.raises(IdentityError, match="masked and sliced logits differ"):
        apply(subject, plan_of(subject))


# ---- evaluate


def test_evaluate_text_by_hand(subject: Subject, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("The boat went down the river and the children waved from the bank. " * 20)
    found = evaluate(subject.model, subject.tokenizer, Evaluate(text=str(path), seqlen=32, speed=False))
    ids = subject.tokenizer(path.read_text(), return_tensors="pt").input_ids
    rows = ids[0, : ids.shape[1] // 32 * 32].view(-1, 32)
    with torch.no_grad():
        loss = float(subject.model(input_ids=rows, labels=rows).loss)
    assert found["text/a.txt/perplexity"].value == pytest.approx(math.exp(loss), rel=1e-4)
    assert found["text/a.txt/perplexity"].samples == len(rows) * 31
    text = "".join(subject.tokenizer.decode(row[1:]) for row in rows)
    bits = loss * rows[:, 1:].numel() / math.log(2) / len(text.encode())
    assert found["text/a.txt/bits_per_byte"].value == pytest.approx(bits, rel=1e-3)
    assert set(found) == {"text/a.txt/perplexity", "text/a.txt/bits_per_byte"}


def test_evaluate_speed_and_nothing(subject: Subject) -> None:
    quick = Evaluate(text=None, repeats=1)
    found = evaluate(subject.model, subject.tokenizer, quick)
    assert found["memory/peak_bytes"].value > 4 * 1_369_728
    assert {name.split("/")[0] for name in found} == {"speed", "memory"}
    assert evaluate(subject.model, subject.tokenizer, Evaluate(text=None, speed=False)) == {}


def test_what_libraries_set_up_at_first_is_not_counted(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of every size are read once before the watch on memory begins."""
    happened: list[str] = []
    lap, enter = clock.run_lap, clock.PeakMemory.__enter__

    def noted(model: Any, ids: Any, decode: int) -> Any:
        happened.append(f"{len(ids)}x{ids.shape[1]}")
        return lap(model, ids, decode)

    def entered(self: Any) -> Any:
        happened.append("watch")
        return enter(self)

    monkeypatch.setattr(clock, "run_lap", noted)
    monkeypatch.setattr(clock.PeakMemory, "__enter__", entered)
    evaluate(subject.model, subject.tokenizer, Evaluate(text=None, repeats=1))
    assert happened == ["1x256", "8x256", "watch", "1x256", "1x256", "8x256", "8x256"]


def test_sizes_are_the_costs(subject: Subject) -> None:
    found = {name.removeprefix("size/"): m.value for name, m in sizes(subject.anatomy, subject.anatomy.dense).items()}
    assert {**found, "context": 1024} == costs(subject.anatomy, subject.anatomy.dense).to_json()


def test_where_text_to_measure_comes_from(tmp_path: Path) -> None:
    name, text, origin = read_text("demo")
    found = documents("demo", "heldout")
    assert name == "demo held out"
    assert sorted(text.split("\n\n")) == sorted("\n\n".join(d.text for d in found).split("\n\n"))
    assert origin == {
        "split": "held out",
        "join": "blank lines",
        "documents": len(found),
        "domains": ["coqa", "drop", "lambada", "squad"],
    }
    assert text == read_text("demo")[1]
    start = text[:40_000]  # about as much as is measured unless told otherwise
    assert {d.domain for d in found if d.text in start} == set(origin["domains"])
    (tmp_path / "x.md").write_text("as it is\n\nall of it\n")
    whole = {"split": "the whole file", "join": "as it is"}
    assert read_text(str(tmp_path / "x.md")) == ("x.md", "as it is\n\nall of it\n", whole)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": f"tale {i}"}) + "\n" for i in range(50)))
    name, text, origin = read_text(str(tmp_path / "x.jsonl"))
    assert (name, origin["documents"]) == ("x.jsonl", 50)
    assert text == "\n\n".join(f"tale {i}" for i in range(50))
    name, text, origin = read_text(f"heldout:{tmp_path / 'x.jsonl'}")
    held = {document.text for document in documents(str(tmp_path / "x.jsonl"), "heldout")}
    assert (name, origin["split"], set(text.split("\n\n"))) == ("x.jsonl held out", "held out", held)
    (tmp_path / "bytes").write_bytes(b"\xff\xff")
    with pytest.raises(TextError, match="UTF-8"):
        read_text(str(tmp_path / "bytes"))


def test_what_is_asked_is_checked_first() -> None:
    check_asked(Evaluate(tasks=("piqa",), text=None))
    with pytest.raises(UnknownName, match="did you mean 'piqa'"):
        check_asked(Evaluate(tasks=("pika",), text=None))
    with pytest.raises(TextError, match=r"nowhere\.txt"):
        check_asked(Evaluate(text="nowhere.txt"))


def test_samples_go_through_the_chat_template_when_they_ask(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    model, real = subject.model, subject.model.generate

    def generate(ids: torch.Tensor, **settings: Any) -> Any:
        seen.append(subject.tokenizer.decode(ids[0]))
        return real(ids, **settings)

    monkeypatch.setattr(model, "generate", generate)
    first = write_samples(model, subject.tokenizer, ("Once upon", "Why is that?"))
    assert seen == ["Once upon", "user: Why is that?<|end|>assistant: "]
    assert first == write_samples(model, subject.tokenizer, ("Once upon", "Why is that?"))
    assert write_samples(model, subject.tokenizer, ("",)) == [""]  # nothing to go on from
    assert all("Once upon" not in text for text in first)


# ---- recover


@pytest.mark.parametrize(("count", "expected"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_passes_are_no_larger_than_a_process_share(monkeypatch: pytest.MonkeyPatch, count: int, expected: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(count))
    assert as_train(Recover(batch=4, micro_batch=4), seed=0).micro_batch == expected


def test_training_settings_follow_the_recipe() -> None:
    found = as_train(Recover(tokens=10**6, batch=4, micro_batch=8, block=64, schedule="wsd", warmup=0.1), seed=7)
    assert (found.tokens, found.batch, found.micro_batch, found.seed) == (10**6, 4, 4, 7)
    assert (found.schedule, found.warmup) == ("wsd", 0.1)
    assert 25 <= found.save_every < found.steps(64)
    assert (found.evaluate_every, found.log_every) == (10**6 // 20 // 256, 10)
    short = as_train(Recover(tokens=10 * 2048, batch=8, block=256), seed=0)
    assert (short.evaluate_every, short.log_every) == (2, 1), "what is held out is never read more than learnt from"
    two = Recover(tokens=10 * 2048, batch=8, block=256, mixture={"demo:coqa": 1.0, "demo:squad": 1.0})
    assert as_train(two, seed=0).evaluate_every == 4
    assert as_train(Recover(tokens=10 * 2048, batch=8, block=256, evaluate_every=2048), seed=0).evaluate_every == 1
    with pytest.raises(SettingsError, match="does not divide"):
        as_train(Recover(batch=6, micro_batch=4), seed=0)


def test_adapters_are_scaled_by_two_unless_named() -> None:
    assert (Recover().alpha, Recover(rank=16).alpha, Recover(rank=16, alpha=16).alpha) == (16, 32, 16)


@pytest.mark.parametrize("method", get_args(Recover.model_fields["method"].annotation))
def test_a_rate_that_is_not_named_is_the_method_s_own(method: str) -> None:
    """And a recipe that is written down names it."""
    assert as_train(Recover(method=method), seed=0).learning_rate == RATES[method]  # type: ignore[arg-type]
    assert as_train(Recover(method=method, learning_rate=0.02), seed=0).learning_rate == 0.02  # type: ignore[arg-type]
    said = dump(parse({"recover": {"method": method}}))
    assert yaml.safe_load(said)["recover"]["learning_rate"] == RATES[method]
    assert yaml.safe_load(dump(parse({"recover": {"method": method, "learning_rate": None}}))) == yaml.safe_load(said)
    assert f"{method} {RATES[method]:g}" in str(Recover.model_fields["learning_rate"].description)
    with pytest.raises(SettingsError, match=r"recover\.learning_rate = 0"):
        parse({"recover": {"method": method, "learning_rate": 0}})


def test_factors_need_a_higher_rate_than_what_is_added() -> None:
    assert RATES["full"] < RATES["lora"] < RATES["lora-masked"] < RATES["spp"] == RATES["hira"] == RATES["ia3"]
    with pytest.raises(SettingsError, match=r"unknown recover\.method 'sp'"):
        parse({"recover": {"method": "sp"}})


@pytest.mark.parametrize("method", ["lora", "full"])
def test_recovery_heals_a_cut_and_ends_rounded(subject: Subject, tmp_path: Path, method: str) -> None:
    apply(subject, plan_of(subject, "60%"))
    rows = blocks(documents("demo", "recovery"), subject.tokenizer, block=64, tokens=4096, seed=0)

    @torch.no_grad()
    def loss() -> float:
        return float(subject.model(input_ids=rows, labels=rows).loss)

    before = loss()
    settings = Recover(method=method, tokens=4096, block=64, learning_rate=2e-3, rank=4)  # type: ignore[arg-type]
    done = recover(subject, rows, settings, folder=tmp_path, seed=0)
    assert (done.training.tokens, done.notes) == (4096, ())
    assert loss() < before - 0.05
    assert not subject.model.training
    assert not any("lora" in name for name, _ in subject.model.named_parameters())
    assert all(torch.equal(p, p.to(torch.bfloat16).float()) for p in subject.model.parameters())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_recovery_leaves_the_type_it_computes_in(sprout_dir: Path, tmp_path: Path, method: str) -> None:
    """What is measured after is computed as what was measured before: adapters are merged in fp32 and rounded back."""
    subject = load(str(sprout_dir), dtype="bf16" if method == "lora" else "fp32", device="cpu")
    device, dtype = subject.model.device, subject.model.dtype
    rows = blocks(documents("demo", "recovery"), subject.tokenizer, block=64, tokens=512, seed=0)
    settings = Recover(method=method, tokens=512, block=64, rank=2)  # type: ignore[arg-type]
    recover(subject, rows, settings, folder=tmp_path, seed=0)
    assert (subject.model.device, {p.dtype for p in subject.model.parameters()}) == (device, {dtype})


def test_what_is_computed_in_fewer_bits_is_stored_in_fewer(sprout_dir: Path, tmp_path: Path) -> None:
    """Weights rounded to 16 bits do not fill a 32-bit file, and budgets in bytes know what is stored."""
    for given, asked, stored in (
        ("float32", "fp32", 4),
        ("float32", "bf16", 2),
        ("bfloat16", "fp32", 2),
        ("", "fp32", 4),
    ):
        folder = tmp_path / f"{given}-{asked}"
        shutil.copytree(sprout_dir, folder)
        config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        kind = getattr(torch, given or "float32")
        save_file({k: v.to(kind) for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
        config.pop("dtype", None)
        (folder / "config.json").write_text(json.dumps(config | ({"dtype": given} if given else {})))
        subject = load(str(folder), dtype=asked, device="cpu")
        assert (subject.store.itemsize, subject.anatomy.store_bytes) == (stored, stored)


# ---- export


def test_export_writes_all_or_nothing(subject: Subject, tmp_path: Path) -> None:
    plan = plan_of(subject, uniform=True)
    cut = apply(subject, plan)
    reference = checkpoint.logits(subject.model, checkpoint.probe(2048))
    export(subject, cut.holder, tmp_path / "a", {"hello.txt": "hi"}, {"id": "a", "licence": "mit"})
    assert (tmp_path / "a" / "hello.txt").read_text() == "hi"
    assert json.loads((tmp_path / "a" / "regrow.json").read_text()) == {"id": "a", "licence": "mit"}
    assert torch.equal(checkpoint.logits(subject.model, checkpoint.probe(2048)), reference)
    with pytest.raises(OutputError, match="exists"):
        export(subject, cut.holder, tmp_path / "a", {}, {})
    with pytest.raises(OutputError, match="cannot be written"):
        export(subject, cut.holder, tmp_path / "b", {"no/such/folder.txt": ""}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_model_that_was_a_teacher_is_measured_as_others_are(subject: Subject) -> None:
    """Torch copies a frozen head for every sequence of a batch: weights are as they are when loaded."""
    model = subject.model.requires_grad_(False)
    evaluate(model, subject.tokenizer, Evaluate(text=None, repeats=1))
    assert all(parameter.requires_grad for parameter in model.parameters())
