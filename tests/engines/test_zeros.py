"""The census of zeros: counts and groups by hand, one hash a pattern, memory and disk alike, routers left aside."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models import anatomy_of, families, make, tokenizer
from regrow.artifacts.pattern import Pattern
from regrow.artifacts.sparsity import Sparsity, Zeros
from regrow.engines import checkpoint, zeros
from regrow.engines.inputs import matrices
from regrow.engines.zeros import census, lost, of_folder, of_model, prunable, semi_structured, stored
from regrow.errors import BrokenModel

EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
KINDS = pytest.mark.parametrize("kind", EXPERTS)

TWO_OF_FOUR = [[1, 0, 2, 0, 0, 0, 3, 4], [0, 0, 0, 5, 6, 7, 0, 0]]
TWO_OF_EIGHT = [[1, 2, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 8, 0, 0, 9]]
FULL = [[1, 2, 3, 4, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]]


def one(rows: Sequence[Any], name: str = "w") -> Sparsity:
    return census([(name, torch.tensor(rows, dtype=torch.float32))])


def holed(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A random model with every third weight inside its layers zero."""
    model = make(kind, **changes)
    source = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in prunable(anatomy_of(model)):
            parameters[name].masked_fill_(torch.rand(parameters[name].shape, generator=source) < 1 / 3, 0)
    return model


# ---- by hand


def test_counts_by_hand() -> None:
    found = one(TWO_OF_FOUR)
    assert (found.weights, found.zeros, found.share) == (16, 9, 9 / 16)
    assert found.matrices == (Zeros("w", (2, 8), 9, {4: 2, 8: 4}),)
    assert found.bitmask_bytes() == 7 * 2 + 2
    assert found.bitmask_bytes(4) == 7 * 4 + 2
    assert found.to_json()["matrices"] == {"w": {"shape": [2, 8], "zeros": 9, "groups": "2:4"}}


@pytest.mark.parametrize(
    ("rows", "groups"),
    [
        (TWO_OF_FOUR, "2:4"),  # 4 of 8 is no tighter
        (TWO_OF_EIGHT, "2:8"),  # 2 of 4 is true too
        ([[1, 0, 0, 0, 0, 0, 2, 0]], "1:4"),
        ([[1, 2, 3, 0, 0, 0, 0, 0]], "3:8"),
        ([[0] * 8], "0:4"),
        (FULL, "4:8"),
        ([[1] * 8], None),
        ([[1, 2, 0, 0, 3, 4, 0, 0, 5, 6, 0, 0]], "2:4"),  # 12 divides into fours alone
        ([[0, 0, 0, 0, 0, 1]], None),  # 6 divides into nothing
        ([TWO_OF_FOUR, TWO_OF_EIGHT], "2:4"),  # a stack of experts
    ],
)
def test_the_tightest_groups(rows: Sequence[Any], groups: str | None) -> None:
    assert one(rows).groups == groups


@pytest.mark.parametrize("pattern", ["1:2", "1:3", "3:6", "16:48"])
def test_groups_of_the_size_that_was_asked_are_found(pattern: str) -> None:
    asked = Pattern.parse(pattern)
    row = (torch.arange(96) % asked.of < asked.keep).float()
    (found,) = census([("w", row.expand(4, 96))], asked).matrices
    assert found.groups == pattern
    assert found.has(asked)
    assert not found.has(Pattern.groups(asked.keep - 1, asked.of)) or asked.keep == 1
    (full,) = census([("w", row.expand(4, 96).index_fill(1, torch.arange(asked.of), 1))], asked).matrices
    assert not full.has(asked)


@pytest.mark.parametrize(("zeros", "has"), [(12, True), (13, True), (11, False)])
def test_a_percentage_that_a_matrix_has(zeros: int, has: bool) -> None:
    """Half of rows of seven, three rounded down in each of four."""
    weight = torch.ones(28)
    weight[:zeros] = 0
    assert census([("w", weight.view(4, 7))]).matrices[0].has(Pattern.parse("50%")) is has


def test_what_a_matrix_keeps() -> None:
    (found,) = one(TWO_OF_EIGHT).matrices
    assert found.keeps(2, 8)
    assert found.keeps(2, 4)
    assert not found.keeps(1, 4)
    assert not found.keeps(1, 8)
    assert not found.keeps(2, 5)  # nobody counted that


def test_matrices_that_differ_have_no_pattern_in_common() -> None:
    tensors = [("a", torch.tensor(TWO_OF_FOUR)), ("b", torch.tensor(TWO_OF_EIGHT))]
    assert census(tensors).groups is None
    assert census([(n, torch.tensor(TWO_OF_FOUR)) for n in "ab"]).groups == "2:4"
    assert census([]).share == 0


# ---- the hash


def moved(rows: list[list[int]]) -> list[list[int]]:
    """One zero goes to the place of its left neighbour."""
    first, *rest = rows
    return [[first[1], first[0], *first[2:]], *rest]


def test_a_hash_of_places_not_of_values() -> None:
    before = one(TWO_OF_FOUR).mask_hash
    assert len(before) == 16
    assert one([[7 * w for w in row] for row in TWO_OF_FOUR]).mask_hash == before
    assert one([[-0.0 if w == 0 else w for w in row] for row in TWO_OF_FOUR]).mask_hash == before
    assert one(moved(TWO_OF_FOUR)).mask_hash != before
    assert one(moved(TWO_OF_FOUR)).zeros == one(TWO_OF_FOUR).zeros
    assert one(TWO_OF_FOUR, "v").mask_hash != before
    halves = census([("w", torch.tensor(TWO_OF_FOUR, dtype=torch.bfloat16))])
    assert halves.mask_hash == before


def test_a_hash_that_does_not_look_at_places_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zeros, "packed", lambda mask: bytes([int(mask.sum())]))
    with pytest.raises(AssertionError):
        test_a_hash_of_places_not_of_values()


# ---- memory and disk


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "phi3", *EXPERTS])
def test_memory_and_disk_agree(kind: str, tmp_path: Path) -> None:
    model = holed(kind, **EXPERTS.get(kind, {}))
    anatomy = anatomy_of(model)
    names = prunable(anatomy)
    in_memory = of_model(model, anatomy)
    assert 0.3 < in_memory.share < 0.37
    checkpoint.write(model, tokenizer(), tmp_path, torch.float32, None)
    assert of_folder(tmp_path, names) == in_memory
    changed = of_folder(tmp_path, names[1:])
    assert changed.mask_hash != in_memory.mask_hash
    assert changed.weights < in_memory.weights


@pytest.mark.parametrize("kind", ["llama", *EXPERTS])
def test_folders_as_stock_tools_write_them(kind: str, tmp_path: Path) -> None:
    """In several files, and with experts one by one under the hub's names."""
    model = holed(kind, **EXPERTS.get(kind, {}))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    anatomy = anatomy_of(model)
    assert of_folder(tmp_path, prunable(anatomy)) == of_model(model, anatomy)


@KINDS
def test_experts_in_another_order_are_another_pattern(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What joins gate and up the wrong way round would not be noticed by counts."""
    model = holed(kind, **EXPERTS[kind])
    model.save_pretrained(tmp_path)
    turned = {stack: tuple(tuple(reversed(parts)) for parts in ways) for stack, ways in zeros.APART.items()}
    monkeypatch.setattr(zeros, "APART", turned)
    anatomy = anatomy_of(model)
    here, there = of_model(model, anatomy), of_folder(tmp_path, prunable(anatomy))
    assert there.zeros == here.zeros
    assert there.mask_hash != here.mask_hash


def test_a_weight_that_is_not_there(tmp_path: Path) -> None:
    checkpoint.write(make("llama"), tokenizer(), tmp_path, torch.float32, None)
    with pytest.raises(BrokenModel, match=r"no weight is called model\.layers\.9\.mlp\.up_proj\.weight"):
        of_folder(tmp_path, ["model.layers.9.mlp.up_proj.weight"])
    with pytest.raises(BrokenModel, match="experts"):
        of_folder(tmp_path, ["model.layers.0.mlp.experts.down_proj"])


def test_files_that_nobody_loads_are_not_counted(tmp_path: Path) -> None:
    """Beside the weights: another file; one file of all weights goes before shards and their index, as it is loaded."""
    model = make("llama")
    names = prunable(anatomy_of(model))
    checkpoint.write(model, tokenizer(), tmp_path, torch.float32, None)
    before = of_folder(tmp_path, names)
    empty = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
    save_file(empty, tmp_path / "zz_optimizer.safetensors")
    assert of_folder(tmp_path, names) == before
    shard = {"weight_map": dict.fromkeys(names, "zz_optimizer.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(shard))
    assert of_folder(tmp_path, names) == before
    assert checkpoint.weight_files(tmp_path) == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    assert of_folder(tmp_path, names).share == 1


# ---- who is counted


@KINDS
def test_routers_embeddings_and_heads_are_nobody_s_pattern(kind: str) -> None:
    model = holed(kind, **EXPERTS[kind])
    anatomy = anatomy_of(model)
    names = prunable(anatomy)
    inside = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "gate_up_proj", "down_proj")
    assert len(names) == len(set(names)) == 3 * len(inside)
    assert all(name.endswith(inside) for name in names)
    before = of_model(model, anatomy)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight") or "embed" in name or "norm" in name or "head" in name:
                parameter.zero_()
    assert of_model(model, anatomy) == before
    with torch.no_grad():
        model.lm_head.weight.fill_(1)[:, 1::4] = 0
    assert [m.name for m in of_model(model, anatomy).matrices] == [*names, "lm_head.weight"]
    blind = replace(anatomy, family=replace(anatomy.family, routers=()))
    assert len(prunable(blind)) == len(names) + 3
    assert of_model(model, blind) != before


@pytest.mark.parametrize("kind", [*dict(families()), *EXPERTS])
def test_what_is_counted_is_what_can_be_pruned(kind: str) -> None:
    model = make(kind, **EXPERTS.get(kind, {}))
    anatomy = anatomy_of(model)
    layers = model.get_submodule(anatomy.family.layers).children()
    found = [m.name for i, layer in enumerate(layers) for m in matrices(layer, f"{anatomy.family.layers}.{i}")]
    assert {re.sub(r"\[\d+\]$", "", name) for name in found} == {n.removesuffix(".weight") for n in prunable(anatomy)}


def test_biases_and_norms_are_not_counted() -> None:
    names = prunable(anatomy_of(make("qwen2")))
    assert len(names) == 3 * 7
    assert all(name.endswith("_proj.weight") for name in names)


# ---- what torch's kernels take


def sparse(rows: int, columns: int) -> Tensor:
    return (torch.arange(columns) % 4 < 2).float().expand(rows, columns)


def test_why_a_matrix_does_not_fit() -> None:
    found = semi_structured(
        census(
            [
                ("fits", sparse(32, 64)),
                ("fits too", sparse(64, 128)),
                ("emptier", sparse(32, 64) * (torch.arange(64) % 4 < 1)),
                ("full", sparse(32, 64).index_fill(0, torch.tensor([3]), 1)),
                ("rows", sparse(48, 64)),
                ("columns", sparse(32, 96)),
                ("both", sparse(24, 64)),
                ("stack", sparse(32, 64).expand(4, 32, 64)),
            ]
        )
    )
    assert found == {
        "full": "some group of four has more than two weights",
        "rows": "48 x 64 is no multiple of 32 x 64 (CUTLASS)",
        "columns": "32 x 96 is no multiple of 32 x 64 (CUTLASS)",
        "both": "24 x 64 is no multiple of 16 x 16 (cuSPARSELt) or 32 x 64 (CUTLASS)",
        "stack": "experts are stacked in one tensor",
    }


# ---- what was lost


def test_lost_zeros_by_hand() -> None:
    before = [("a", torch.tensor(TWO_OF_FOUR)), ("b", torch.tensor(FULL))]
    same = [(name, 3 * weight) for name, weight in before]
    assert lost(before, same) == {}
    filled = torch.tensor(TWO_OF_FOUR)
    filled[0, 1], filled[1, 0] = 5, -5
    filled[0, 0] = 0  # one more zero is no loss
    assert lost(before, [("a", filled), before[1]]) == {"a": 2}
    assert lost([("a", filled)], before[:1]) == {"a": 1}


def test_lost_wants_the_same_names() -> None:
    weight = torch.tensor(FULL)
    with pytest.raises(AssertionError):
        lost([("a", weight)], [("b", weight)])
    with pytest.raises(ValueError, match="shorter"):
        lost([("a", weight), ("b", weight)], [("a", weight)])


def test_tensors_come_in_the_order_that_is_asked(tmp_path: Path) -> None:
    model = make("llama")
    checkpoint.write(model, tokenizer(), tmp_path, torch.float32, None)
    names = prunable(anatomy_of(model))[::-1]
    found = list(stored(tmp_path, names))
    assert [name for name, _ in found] == names
    parameters = dict(model.named_parameters())
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in found)
