"""Recovery of a sparse model keeps every zero where it was, by every method but plain LoRA, which says so first.

And but for AST, which moves zeros inside their groups or rows, and says how many.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from regrow.artifacts.mask import lowest
from regrow.artifacts.pattern import Pattern
from regrow.engines import moving_masks, zeros
from regrow.engines.adapters import layer_linears
from regrow.engines.bind import Subject
from regrow.engines.spp import SppConfig
from regrow.engines.texts import documents
from regrow.engines.tokens import blocks
from regrow.errors import IdentityError, SettingsError, UnknownName
from regrow.losses.forward_kl import forward_kl
from regrow.recovery import Recover
from regrow.stages import recover as recovering
from regrow.stages.load import load
from regrow.stages.recover import recover, warning

KEEPING = ("spp", "hira", "ia3", "full", "lora-masked")
RATES = {"spp": 0.1, "hira": 0.1, "ia3": 0.1, "full": 3e-3, "lora-masked": 1e-2, "lora": 1e-2, "ast": 3e-3}
BLOCK, TOKENS = 16, 256  # so few that slower rates move weights by less than the storage type can hold
SPROUT = Path(__file__).parents[1] / "sprout"


@cache
def loaded(dtype: str) -> Subject:
    return load(str(SPROUT), dtype=dtype, device="cpu")


def dense(dtype: str = "fp32") -> Subject:
    subject = loaded(dtype)
    return replace(subject, model=copy.deepcopy(subject.model))


def sparse(dtype: str = "fp32", pattern: str = "2:4") -> Subject:
    """sprout, sparse by magnitude."""
    subject = dense(dtype)
    with torch.no_grad():
        for weight in matrices(subject).values():
            weight[lowest(weight.abs(), Pattern.parse(pattern), "matrix")] = 0.0
    return subject


def matrices(subject: Subject) -> dict[str, Tensor]:
    parameters = dict(subject.model.named_parameters())
    return {name: parameters[name] for name in zeros.prunable(subject.anatomy)}


@cache
def text() -> Tensor:  # (n, BLOCK) int64
    return blocks(documents("demo", "recovery"), loaded("fp32").tokenizer, block=BLOCK, tokens=TOKENS, seed=0)


def settings(method: str, **changes: Any) -> Recover:
    usual = {"tokens": TOKENS, "block": BLOCK, "batch": 4, "learning_rate": RATES[method]}
    return Recover(method=method, **{**usual, **changes})  # type: ignore[arg-type]


def run(subject: Subject, method: str, folder: Path, **changes: Any) -> Any:
    teacher, heldout = changes.pop("teacher", None), changes.pop("heldout", None)
    chosen = settings(method, **changes)
    done = recover(subject, text(), chosen, folder=folder, seed=0, teacher=teacher, heldout=heldout)
    assert any("elsewhere" in note for note in done.notes) == (method == "ast")
    return done


@torch.no_grad()
def loss(subject: Subject) -> float:
    return float(subject.model(input_ids=text(), labels=text()).loss)


# --- adapters on a trained model


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_fresh_spp_adapter_changes_no_bit_and_a_trained_one_is_merged_as_it_was(dtype: str) -> None:
    """To the bit, in the form that is taken without dropout."""

    @torch.no_grad()
    def logits(model: Any) -> Tensor:
        found: Tensor = model(input_ids=text()[:4]).logits
        return found.float()

    subject = sparse(dtype)
    before = logits(subject.model)
    adapted = get_peft_model(subject.model, SppConfig(r=4, target_modules=layer_linears(subject.model))).eval()
    assert torch.equal(logits(adapted), before)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "spp_beta" in name:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(len(name)))
    expected = logits(adapted)
    assert (expected - before).abs().max() > 0.1 * before.abs().max()
    assert torch.equal(logits(adapted.merge_and_unload()), expected)


# --- zeros stay


@pytest.mark.parametrize("method", KEEPING)
def test_every_zero_stays(method: str, tmp_path: Path) -> None:
    subject = sparse()
    census = zeros.of_model(subject.model, subject.anatomy)
    before = {name: weight.detach().clone() for name, weight in matrices(subject).items()}
    start = loss(subject)
    assert (census.groups, census.share) == ("2:4", 0.5)
    assert warning(subject, settings(method)) is None
    result = run(subject, method, tmp_path).training
    assert result.tokens == TOKENS
    after = zeros.of_model(subject.model, subject.anatomy)
    assert (after.mask_hash, after.groups, after.zeros) == (census.mask_hash, "2:4", census.zeros)
    changed = 0
    for name, weight in matrices(subject).items():
        empty = before[name] == 0
        assert torch.equal(weight == 0, empty), name
        assert not bool(weight[empty].signbit().any()), name
        changed += int(not torch.equal(weight, before[name]))
    assert changed >= 3 * subject.anatomy.sizes["L"], "keys, values and down projections at least"
    if method != "lora-masked":  # which loses a part of what it learnt
        assert loss(subject) < start - 0.02
    assert not subject.model.training
    assert not hasattr(subject.model, "peft_config")
    assert all(torch.equal(p, p.to(subject.store).to(p.dtype)) for p in subject.model.parameters())


def test_lora_loses_them_and_says_so(tmp_path: Path) -> None:
    subject = sparse()
    said = warning(subject, settings("lora"))
    assert said is not None
    assert all(name in said for name in (*KEEPING, "filled", "LoRA"))
    run(subject, "lora", tmp_path)
    after = zeros.of_model(subject.model, subject.anatomy)
    assert after.share < 0.01
    assert after.groups is None


def test_a_dense_model_needs_no_warning(tmp_path: Path) -> None:
    """And keeps no mask: what happens to be zero may move."""
    subject = dense()
    assert warning(subject, settings("lora")) is None
    with torch.no_grad():
        matrices(subject)["model.layers.0.self_attn.q_proj.weight"].zero_()
    assert warning(subject, settings("lora")) is None
    run(subject, "full", tmp_path)
    assert not bool((matrices(subject)["model.layers.0.self_attn.q_proj.weight"] == 0).any())


def test_masked_lora_is_lora_with_zeros_put_back(tmp_path: Path) -> None:
    masked, plain = sparse(), sparse()
    empty = {name: weight == 0 for name, weight in matrices(masked).items()}
    run(masked, "lora-masked", tmp_path / "masked")
    run(plain, "lora", tmp_path / "plain")
    for name, weight in matrices(plain).items():
        assert torch.equal(weight.masked_fill(empty[name], 0), matrices(masked)[name]), name


@pytest.mark.parametrize("method", ["spp", "ia3"])
def test_zeros_stay_in_sixteen_bits(method: str, tmp_path: Path) -> None:
    subject = sparse("bf16")
    before = zeros.of_model(subject.model, subject.anatomy)
    empty = {name: weight == 0 for name, weight in matrices(subject).items()}
    run(subject, method, tmp_path)
    assert {p.dtype for p in subject.model.parameters()} == {torch.bfloat16}
    assert zeros.of_model(subject.model, subject.anatomy).mask_hash == before.mask_hash
    assert not any(bool(weight[empty[name]].signbit().any()) for name, weight in matrices(subject).items())


# --- zeros move


@pytest.mark.parametrize(("pattern", "group"), [("2:4", 4), ("50%", None)])
def test_ast_moves_zeros_and_keeps_their_number(pattern: str, group: int | None, tmp_path: Path) -> None:
    """Eleven steps or more: the zeros are chosen anew after the tenth."""
    subject = sparse(pattern=pattern)
    census = zeros.of_model(subject.model, subject.anatomy)
    empty = {name: weight == 0 for name, weight in matrices(subject).items()}
    start = loss(subject)
    assert warning(subject, settings("ast")) is None
    done = run(subject, "ast", tmp_path, tokens=12 * 4 * BLOCK)
    assert done.training.steps == 12
    after = zeros.of_model(subject.model, subject.anatomy)
    assert [m.zeros for m in after.matrices] == [m.zeros for m in census.matrices]
    assert after.groups == census.groups
    assert after.mask_hash != census.mask_hash
    moved = 0
    for name, weight in matrices(subject).items():
        now, run_of = weight == 0, group or weight.shape[1]
        assert torch.equal(now.view(-1, run_of).sum(1), empty[name].view(-1, run_of).sum(1)), name
        assert not bool(weight[now].signbit().any()), name
        moved += int((empty[name] & ~now).sum())
    assert moved > 0
    assert done.notes == (f"{100 * moved / census.zeros:.1f} % of the zeros lie elsewhere now",)
    assert loss(subject) < start - 0.1
    assert not subject.model.training
    assert all(torch.equal(p, p.to(subject.store).to(p.dtype)) for p in subject.model.parameters())


def test_ast_in_a_short_run_moves_none(tmp_path: Path) -> None:
    """Masked weights live on unseen, and go when it ends."""
    subject = sparse()
    before = zeros.of_model(subject.model, subject.anatomy)
    done = run(subject, "ast", tmp_path)
    assert done.training.steps < 10
    assert done.notes == ("0.0 % of the zeros lie elsewhere now",)
    assert zeros.of_model(subject.model, subject.anatomy).mask_hash == before.mask_hash


def test_ast_of_a_dense_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no zeros to move"):
        run(dense(), "ast", tmp_path)


def test_ast_that_loses_a_zero_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Planted: the choice forgets one zero of a group."""
    right = moving_masks.lowest_of_counts
    monkeypatch.setattr(moving_masks, "lowest_of_counts", lambda sizes, counts: right(sizes, counts - 1))
    with pytest.raises(IdentityError, match="have fewer zeros than before"):
        run(sparse(), "ast", tmp_path, tokens=12 * 4 * BLOCK)


# --- what is left of it in 16 bits


@pytest.mark.parametrize(("method", "rate"), [("spp", 1e-4), ("ia3", 1e-5), ("lora-masked", 1e-6), ("spp", 0.1)])
def test_a_training_that_rounding_takes_back_is_noted(method: str, rate: float, tmp_path: Path) -> None:
    """With the share that a census of the weights under adapters gives."""
    subject = sparse()
    before = {name: weight.detach().clone() for name, weight in matrices(subject).items()}
    asked = settings(method, learning_rate=rate)
    found = recover(subject, text(), asked, folder=tmp_path, seed=0)
    if method == "ia3":
        before = {name: w for name, w in before.items() if any(end in name for end in ("k_proj", "v_proj", "down"))}
    moved = sum(int(((matrices(subject)[name] != w) & (w != 0)).sum()) for name, w in before.items())
    share = moved / sum(int((w != 0).sum()) for w in before.values())
    assert (share < 0.01) is (rate < 0.1)
    note = f"only {100 * share:.2g} % of the weights under adapters changed after rounding to 16 bits"
    assert found.notes == ((f"{note}: raise learning_rate or tokens",) if rate < 0.1 else ())


def test_where_all_is_kept_nothing_is_noted(tmp_path: Path) -> None:
    """Stored in 32 bits, or all weights trained."""
    wide = replace(sparse(), store=torch.float32)
    assert recover(wide, text(), settings("spp", learning_rate=1e-4), folder=tmp_path / "a", seed=0).notes == ()
    assert recover(sparse(), text(), settings("full", learning_rate=1e-7), folder=tmp_path / "b", seed=0).notes == ()


# --- when one is lost


def test_a_filled_zero_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Planted: merging fills a single one."""
    right = recovering.merge

    def fills(model: Any) -> Any:
        merged = right(model)
        weight = merged.model.layers[2].mlp.up_proj.weight
        with torch.no_grad():
            weight[tuple((weight == 0).nonzero()[0])] = 1e-20
        return merged

    monkeypatch.setattr(recovering, "merge", fills)
    with pytest.raises(
        IdentityError, match=r"1 zeros were filled, 1 of them in model\.layers\.2\.mlp\.up_proj\.weight"
    ):
        run(sparse(), "spp", tmp_path)


def test_full_training_without_the_hold_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Planted: nobody holds the gradients."""
    right = recovering.masks.held
    monkeypatch.setattr(recovering.masks, "held", lambda model, _: right(model, None))
    with pytest.raises(IdentityError, match="zeros were filled"):
        run(sparse(), "full", tmp_path)


# --- a teacher


@torch.no_grad()
def divergence(student: Subject, teacher: Subject) -> float:
    logits = [x.model(input_ids=text()).logits.float().flatten(0, 1) for x in (teacher, student)]
    return float(forward_kl(*logits).mean())


@pytest.mark.parametrize("method", ["spp", "full", "ast"])
def test_with_a_teacher_the_loss_is_the_divergence(method: str, tmp_path: Path) -> None:
    """One step sees all of the text, so the first recorded loss is that of the untrained student."""
    student, teacher = sparse(), dense()
    before = zeros.of_model(student.model, student.anatomy)
    weights = {name: p.detach().clone() for name, p in teacher.model.named_parameters()}
    start = divergence(student, teacher)
    assert start > 0.1
    whole = {"tokens": TOKENS, "batch": len(text()), "micro_batch": len(text()) // 2, "warmup": 0, "dropout": 0}
    result = run(student, method, tmp_path, teacher=teacher, heldout=text(), **whole).training
    assert result.steps == 1
    assert result.losses[0]["loss"] == pytest.approx(start, rel=1e-4)
    assert divergence(student, teacher) < start - 0.01
    assert result.losses[0]["heldout_loss"] == pytest.approx(divergence(student, teacher), rel=0.03)
    assert zeros.of_model(student.model, student.anatomy).mask_hash == before.mask_hash
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in teacher.model.named_parameters())


def test_another_vocabulary_cannot_teach(tmp_path: Path) -> None:
    teacher = dense()
    teacher.model.config.vocab_size = 1024  # fewer than there are tokens
    with pytest.raises(SettingsError, match="embeddings of 1,024 rows there and 2,048 here"):
        run(sparse(), "spp", tmp_path, teacher=teacher)


def test_an_unknown_loss(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="unknown loss 'forward-k'"):
        run(sparse(), "spp", tmp_path, teacher=dense(), loss="forward-k")
