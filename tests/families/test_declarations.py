"""Declarations: the documented table is the registry, every cut is needed, and the documented example works."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import test_battery as battery
from transformers import CONFIG_MAPPING

from models import anatomy_of, cut, difference, families, make, plan, soft
from regrow.artifacts.family import FAMILIES, UNITS, Family, Role
from regrow.artifacts.plan import Plan
from regrow.artifacts.shape import count
from regrow.engines.hetero import stock_classes
from regrow.errors import UnsupportedModel

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "families.md").read_text()
KINDS = [kind for kind, _ in families()]


# ---- the page


def table() -> str:
    rows = [("family", "model types", *UNITS), ("---",) * 7]
    for name, family in FAMILIES.items():
        types = ", ".join(f"`{kind}`" for kind in family.model_types)
        rows.append((name, types, *("no" if unit in family.refuses else "yes" for unit in UNITS)))
    return "\n".join("|" + "|".join("---" if c == "---" else f" {c} " for c in row) + "|" for row in rows)


def test_the_table_is_the_registry() -> None:
    assert table() in PAGE
    for name, family in FAMILIES.items():
        for unit, reason in family.refuses.items():
            (line,) = [x for x in PAGE.splitlines() if x.startswith(f"- {name}, ")]
            assert reason in line
            assert unit + "s" in line


def test_every_role_is_on_both_pages() -> None:
    surgery = (DOCS / "surgery.md").read_text()
    for role in get_args(Role):
        assert f"`{role}`" in PAGE
        assert f"`{role}`" in surgery


# ---- the example


def example() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    return str(code)


@pytest.fixture
def arcee() -> Iterator[Family]:
    assert "arcee" not in FAMILIES.names()
    try:
        exec(compile(example(), "arcee.py", "exec"), {})
        yield FAMILIES.get("arcee")
    finally:
        FAMILIES._items.pop("arcee", None)
        sys.modules.pop("regrow.engines._heterogeneous_arcee", None)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "differing"])
def test_the_documented_example_passes_the_battery(
    arcee: Family, tmp_path: Path, uniform: bool, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regrow.engines.checkpoint.gc.collect", lambda: 0)
    assert battery.supported("arcee", arcee) == UNITS
    for index, units in enumerate([*((unit,) for unit in UNITS), UNITS]):
        folder = tmp_path / str(index)
        folder.mkdir()
        battery.test_masked_sliced_reloaded_cached(folder, "arcee", units, uniform, tied)
    for softened in [*((unit,) for unit in battery.SOFT), battery.SOFT]:
        battery.test_soft_gates_fold_into_the_weights("arcee", softened, tied)
    battery.test_norms_over_the_original_width("arcee", True, tied)
    for gone in battery.BRANCHES:
        battery.test_a_branch_without_units_goes_whole("arcee", gone, 0)


def test_the_example_leaves_the_registry_alone() -> None:
    assert "arcee" not in FAMILIES.names()
    with pytest.raises(UnsupportedModel, match="arcee"):
        anatomy_of(make("arcee"))


# ---- every word of a declaration is needed


def mutants(kind: str) -> Iterator[tuple[str, Family]]:
    """The family with one cut taken away, or with one role forgotten."""
    family = dict(families())[kind]
    for unit, cuts in family.cuts.items():
        for index, one in enumerate(cuts):
            rest = (*cuts[:index], *cuts[index + 1 :])
            yield f"no {unit}s in {one.path} {one.dim} {one.offset}", replace(family, cuts={**family.cuts, unit: rest})
            if one.role != "select":
                plain = (*cuts[:index], replace(one, role="select"), *cuts[index + 1 :])
                yield f"{unit}s in {one.path} not {one.role}", replace(family, cuts={**family.cuts, unit: plain})
    for index, one in enumerate(family.whole):
        rest = (*family.whole[:index], *family.whole[index + 1 :])
        yield f"no channel in {one.path}", replace(family, whole=rest)
        if one.role != "head":  # a name, so that a tied one may be missing
            plain = (*family.whole[:index], replace(one, role="select"), *family.whole[index + 1 :])
            yield f"{one.path} not {one.role}", replace(family, whole=plain)
    if family.whole:
        yield "gain offset", replace(family, gain_offset=1 - family.gain_offset)
        scale: Literal["1", "sqrt(C)"] = "1" if family.embed_scale == "sqrt(C)" else "sqrt(C)"
        yield "embedding scale", replace(family, embed_scale=scale)


NEEDLESS = {
    # OLMo 2: a group that goes takes its query heads along, and those say the same of q
    "groups in self_attn.q_proj not fold",
    "groups in self_attn.q_norm not span",
    # and the norm behind the MLP undoes any scale of its output
    "channels in mlp.up_proj not raw",
}


def is_told(kind: str, kept: Plan) -> bool:
    """What the battery and `apply` look at: shapes, masked against sliced, the count, and that soft gates are felt."""
    try:
        anatomy = anatomy_of(make(kind, tie_word_embeddings=False))
        units = anatomy.supported
        found = cut(make(kind, tie_word_embeddings=False), kept, soft(anatomy, kept, units))
    except (UnsupportedModel, RuntimeError):
        return True
    if found.error() > 1e-3 or sum(p.numel() for p in found.model.parameters()) != count(anatomy, kept.shape()):
        return True
    closed = cut(make(kind, tie_word_embeddings=False), kept).masked
    alone = (
        cut(make(kind, tie_word_embeddings=False), kept, soft(anatomy, kept, (unit,)))
        for unit in units
        if unit != "layer"
    )
    return any(difference(closed, one.masked) < 0.02 for one in alone)


@pytest.mark.parametrize("kind", KINDS)
def test_a_declaration_that_misses_one_place_is_told(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing passes in silence."""
    whole = anatomy_of(make(kind, tie_word_embeddings=False))
    norms = (False, True) if "channel" in whole.supported else (False,)
    plans = [plan(whole, whole.supported, uniform=False, rescale=rescale) for rescale in norms]
    assert not any(is_told(kind, kept) for kept in plans)
    tried = 0
    for what, family in mutants(kind):
        monkeypatch.setitem(FAMILIES._items, whole.family.name, family)
        assert any(is_told(kind, kept) for kept in plans) == (what not in NEEDLESS), what
        tried += 1
    assert tried >= (3 if kind == "gpt_neox" else 29)


# ---- declarations agree with the code they describe


@pytest.mark.parametrize("kind", KINDS)
def test_declared_modules_exist(kind: str) -> None:
    model = make(kind, tie_word_embeddings=False)
    family = anatomy_of(model).family
    for path in (family.embed, family.final_norm, family.head):
        assert model.get_submodule(path)
    for layer in model.get_submodule(family.layers):
        for branch in (family.attention, family.mlp):
            for path in (branch.module, branch.site, branch.end, *branch.norms):
                assert layer.get_submodule(path)
            assert branch.site.startswith(branch.module + ".")
            assert branch.end == branch.site or branch.end in branch.norms


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_is_what_it_is_said_to_be(kind: str) -> None:
    """A gain stored as offset gives back the normalised stream when it is 1 - offset; only a LayerNorm has a bias."""
    model = make(kind)
    family = anatomy_of(model).family
    norm = model.get_submodule(family.final_norm)
    assert (getattr(norm, "bias", None) is not None) == (family.norm == "layer")
    fresh = stock_classes(kind)["causal"](model.config).get_submodule(family.final_norm)
    assert float(fresh.weight.detach().mean()) == 1 - family.gain_offset


def test_carriers_are_declared_types() -> None:
    for _, family in FAMILIES.items():
        for carrier in family.carriers:
            assert carrier in CONFIG_MAPPING
            other: Any = FAMILIES.get(carrier)
            same = ("attention", "mlp", "cuts", "whole", "norm", "gain_offset", "embed_scale")
            assert all(getattr(other, field) == getattr(family, field) for field in same)


def test_families_are_a_few_lines_and_import_no_other() -> None:
    files = [p for p in (DOCS.parent / "src" / "regrow" / "families").glob("*.py") if p.stem != "__init__"]
    assert len(files) >= 5
    for path in files:
        text = path.read_text()
        assert len(text.splitlines()) <= 40, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                assert node.module in ("regrow.artifacts.family", "regrow.artifacts.layout"), path.name
