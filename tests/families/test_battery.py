"""Every registered family x every unit it supports: masked equals sliced, reloaded equals memory, cached equals not.

A family that is newly registered is picked up here by itself; only the head count must be told.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models import anatomy_of, config_of, cut, difference, families, ids, logits, make, plan, soft, tokenizer, without
from regrow.artifacts.family import FAMILIES, UNITS, Family, Unit
from regrow.artifacts.shape import count
from regrow.engines import checkpoint
from regrow.engines.bind import sizes_of, why_not

FAMILIES_NOW, WHOLE = 11, 2  # in all; those of which no unit can go
EXACT = 1e-5  # of the logits' scale
KINDS = families()
TIED = (False, True)


def supported(kind: str, family: Family) -> tuple[Unit, ...]:
    return tuple(unit for unit in UNITS if why_not(family, sizes_of(config_of(kind)), unit) is None)


def cases() -> Iterator[tuple[str, tuple[Unit, ...]]]:
    """(model type, units to cut at once): each unit alone, then all together."""
    for kind, family in KINDS:
        units = supported(kind, family)
        yield from ((kind, (unit,)) for unit in units)
        yield kind, units


def names(value: Any) -> str:
    return "+".join(value) if isinstance(value, tuple) else str(value)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrow.engines.checkpoint.gc.collect", lambda: 0)  # tiny models leave little to collect


def test_head_count() -> None:
    assert len(FAMILIES.names()) == FAMILIES_NOW
    assert len(KINDS) == len({kind for kind, _ in KINDS}) >= FAMILIES_NOW - WHOLE
    with_all = [kind for kind, family in KINDS if supported(kind, family) == UNITS]
    assert len(with_all) >= 8  # all but GPT-NeoX
    assert len(list(cases())) >= 8 * 6 + 3


@pytest.mark.parametrize("tied", TIED, ids=["untied", "tied"])
@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "differing"])
@pytest.mark.parametrize(("kind", "units"), cases(), ids=names)
def test_masked_sliced_reloaded_cached(
    tmp_path: Path, kind: str, units: tuple[Unit, ...], uniform: bool, tied: bool
) -> None:
    model = make(kind, tie_word_embeddings=tied)
    anatomy = anatomy_of(model)
    found = cut(model, plan(anatomy, units, uniform=uniform))
    assert found.error() <= EXACT
    assert difference(found.intact, found.masked) > 0.05  # the cut was felt, so equality says something
    assert sum(p.numel() for p in found.model.parameters()) == count(anatomy, found.plan.shape())
    stock = found.plan.shape().uniform
    assert found.holder.kind == ("stock" if stock else "heterogeneous")
    probe = checkpoint.probe(anatomy.sizes["V"])
    before = logits(found.model, probe)
    checkpoint.write(found.model, tokenizer(), tmp_path, torch.float32, found.holder.code)
    again = checkpoint.reread(tmp_path, before, probe)  # raises when the reload or its cached generation differ
    assert torch.equal(logits(again, probe), before)
    for (name, ours), (_, theirs) in zip(found.model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


SOFT = ("neuron", "group", "head", "channel", "branch")


def soft_cases() -> Iterator[tuple[str, tuple[str, ...]]]:
    for kind, family in KINDS:
        units = [unit for unit in SOFT if unit == "branch" or unit in supported(kind, family)]
        yield from ((kind, (unit,)) for unit in units)
        yield kind, tuple(units)


@pytest.mark.parametrize("tied", TIED, ids=["untied", "tied"])
@pytest.mark.parametrize(("kind", "units"), soft_cases(), ids=names)
def test_soft_gates_fold_into_the_weights(kind: str, units: tuple[str, ...], tied: bool) -> None:
    model = make(kind, tie_word_embeddings=tied)
    anatomy = anatomy_of(model)
    kept = plan(anatomy, [unit for unit in UNITS if unit in units], uniform=False)
    gates = soft(anatomy, kept, units)
    closed = cut(make(kind, tie_word_embeddings=tied), kept).masked
    found = cut(model, kept, gates)
    assert found.error() <= EXACT
    assert difference(closed, found.masked) > 0.02  # softness was felt


@pytest.mark.parametrize("tied", TIED, ids=["untied", "tied"])
@pytest.mark.parametrize("softly", [False, True], ids=["binary", "soft"])
@pytest.mark.parametrize("kind", [kind for kind, family in KINDS if "channel" in supported(kind, family)])
def test_norms_over_the_original_width(kind: str, softly: bool, tied: bool) -> None:
    """`rescale_norms`: masked statistics over all channels, zeros included; the stream shrinks to make up for it."""
    model = make(kind, tie_word_embeddings=tied)
    anatomy = anatomy_of(model)
    units = supported(kind, FAMILIES.get(anatomy.family.name))
    kept = plan(anatomy, units, uniform=False, rescale=True)
    other = cut(make(kind, tie_word_embeddings=tied), plan(anatomy, units, uniform=False)).masked
    found = cut(model, kept, soft(anatomy, kept, SOFT) if softly else None)
    assert found.error() <= EXACT
    assert difference(other, found.masked) > 0.02  # it is not the same function


BRANCHES = ({"attention": True}, {"mlp": True}, {"attention": True, "mlp": True})


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("gone", BRANCHES, ids=lambda x: "+".join(x))
@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS])
def test_a_branch_without_units_goes_whole(kind: str, gone: dict[str, bool], layer: int) -> None:
    """Its biases and norms go with it, and positions in the cache stay right, also without attention in layer 0."""
    model = make(kind)
    anatomy = anatomy_of(model)
    kept = without(anatomy, layer, **gone)
    found = cut(model, kept)
    assert found.error() <= EXACT
    assert difference(found.intact, found.masked) > 0.01
    assert sum(p.numel() for p in found.model.parameters()) == count(anatomy, kept.shape())
    assert not [n for n, _ in found.model.named_parameters() if _serves(anatomy.family, n, layer, gone)]
    whole = logits(found.model, ids())
    assert difference(whole[:, -12:], checkpoint.cached_logits(found.model, ids(), 12)) <= EXACT


def _serves(family: Family, name: str, layer: int, gone: dict[str, bool]) -> bool:
    path = name.removeprefix(f"{family.layers}.{layer}.")
    branches = [getattr(family, branch) for branch in gone]
    return path != name and any(path.startswith((b.module + ".", *(f"{n}." for n in b.norms))) for b in branches)


@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS])
def test_generation_with_padding_and_without_first_attention(kind: str) -> None:
    """Rows of different length, padded on the left, generate what each generates alone and without a cache."""
    model = make(kind)
    small = cut(model, without(anatomy_of(model), 0, attention=True)).model
    rows = [ids(1, length, seed=length) for length in (5, 9)]
    padded = torch.zeros(2, 9, dtype=torch.long)
    for row, tokens in zip(padded, rows, strict=True):
        row[-tokens.shape[1] :] = tokens
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    together = small.generate(padded, attention_mask=(padded > 0).long(), **options)
    for row, tokens in zip(together, rows, strict=True):
        alone = small.generate(tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **options)
        assert row[9:].tolist() == alone[0, tokens.shape[1] :].tolist()


@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS])
def test_every_attention_gone(kind: str) -> None:
    model = make(kind)
    anatomy = anatomy_of(model)
    kept = without(anatomy, 0, attention=True)
    for layer in range(1, anatomy.sizes["L"]):
        rows = list(kept.layers)
        rows[layer] = without(anatomy, layer, attention=True).layers[layer]
        kept = type(kept)(kept.channels, tuple(rows))
    found = cut(model, kept)
    assert found.error() <= EXACT
    whole = logits(found.model, ids())
    assert difference(whole[:, -12:], checkpoint.cached_logits(found.model, ids(), 12)) <= EXACT


@pytest.mark.parametrize(("kind", "tied"), itertools.product([kind for kind, _ in KINDS], TIED))
def test_keeping_everything_changes_no_bit(kind: str, tied: bool) -> None:
    model = make(kind, tie_word_embeddings=tied)
    found = cut(model, type(plan(anatomy_of(model), (), uniform=True)).everything(anatomy_of(model)))
    assert found.holder.kind == "stock"
    for (name, ours), (same, theirs) in zip(
        found.model.named_parameters(), make(kind, tie_word_embeddings=tied).named_parameters(), strict=True
    ):
        assert name == same
        assert torch.equal(ours, theirs), name
