"""Heads that go are added into heads that stay: exact weights, on the intact model, before anything is cut."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models import anatomy_of, cut, families, ids, logits, make, plan
from regrow.artifacts.plan import Plan
from regrow.engines import checkpoint, merging
from regrow.engines.bind import Subject
from regrow.engines.gates import from_plan, gated
from regrow.engines.surgery import merged, slice_model
from regrow.errors import IdentityError
from regrow.stages.apply import apply, cut_copy
from regrow.stages.export import export

EXACT = 1e-5
KINDS = [kind for kind, family in families() if "head" in family.cuts]
GQA = {"num_attention_heads": 6, "num_key_value_heads": 2}  # three query heads a group
MHA = {"num_attention_heads": 4, "num_key_value_heads": 4}
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


def merging_plan(model: Any, how: str) -> Plan:
    """Of every group one head of three goes, or one of four groups of single heads."""
    anatomy = anatomy_of(model)
    whole = Plan.everything(anatomy)
    if anatomy.sizes["G"] == 1:
        rows = [replace(x, groups=(0, 2, 3), heads=(0, 2, 3), merged=((2, 1),)) for x in whole.layers]
    else:
        rows = [replace(x, heads=(0, 2, 3, 4), merged=((0, 1), (4, 5))) for x in whole.layers]
    made = replace(whole, layers=tuple(rows), merge=how)
    made.check(anatomy)
    return made


def subject(model: Any) -> Subject:
    return Subject(model, None, anatomy_of(model), {}, torch.float32)  # type: ignore[arg-type]


@pytest.mark.parametrize(("how", "value"), [("minitron", 2 * 1.0 - 5.0), ("laco", 5.0)])
def test_by_hand(how: str, value: float) -> None:
    """Head 0 holds ones and takes in head 1, all fives: 1 + (1 - 5) = -3, or 1 + (5 - 1) = 5. Nothing else moves."""
    model = make("llama", **GQA)
    width = anatomy_of(model).sizes["D"]
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        for tensor in (attention.q_proj.weight, attention.q_proj.bias):
            tensor[:width] = 1.0
            tensor[width : 2 * width] = 5.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = merging_plan(model, how)
    small = cut_copy(subject(model), kept).model.model.layers[1].self_attn
    assert torch.equal(small.q_proj.weight[:width], torch.full_like(small.q_proj.weight[:width], value))
    assert torch.equal(small.q_proj.bias[:width], torch.full((width,), value))
    assert torch.equal(small.q_proj.weight[width : 3 * width], attention.q_proj.weight[2 * width : 4 * width])
    for name in ("k_proj", "v_proj"):
        assert torch.equal(getattr(small, name).weight, getattr(attention, name).weight)
    columns = torch.arange(6 * width).view(6, width)[list(kept.layers[1].heads)].flatten()
    assert torch.equal(small.o_proj.weight, attention.o_proj.weight[:, columns])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_heads_with_keys_of_their_own() -> None:
    """Rows and biases of q, k and v, and the columns of o as they are."""
    model = make("llama", **MHA)
    width = anatomy_of(model).sizes["D"]
    small = cut_copy(subject(model), merging_plan(model, "minitron")).model.model.layers[0].self_attn
    dense = model.model.layers[0].self_attn
    for name in NAMES[:3]:
        for kind in ("weight", "bias"):
            heads = getattr(getattr(dense, name), kind).unflatten(0, (4, width))
            wanted = torch.stack([heads[0], heads[2] + (heads[2] - heads[1]), heads[3]])
            assert torch.equal(getattr(getattr(small, name), kind), wanted.flatten(0, 1)), (name, kind)
    columns = dense.o_proj.weight.unflatten(1, (4, width))[:, [0, 2, 3]]
    assert torch.equal(small.o_proj.weight, columns.flatten(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [GQA, MHA], ids=["gqa", "mha"])
@pytest.mark.parametrize("how", merging.AWAY)
def test_masked_is_sliced(kind: str, heads: dict[str, int], how: str) -> None:
    """In every family, fused projections and norms over all heads among them; and it is another model than unmerged."""
    found = cut(make(kind, **heads), merging_plan(make(kind, **heads), how))
    assert found.error() <= EXACT
    model = make(kind, **heads)
    with gated(model, found.anatomy, from_plan(found.anatomy, found.plan)):
        unmerged = logits(model, ids())
    assert (unmerged - found.masked).abs().max() > 1e-3 * found.masked.abs().max()


def test_one_after_the_other() -> None:
    """Head 2 is merged into head 1, which is merged into head 0: each sees what the ones before made."""
    model = make("llama", **GQA)
    anatomy = anatomy_of(model)
    whole = Plan.everything(anatomy)
    rows = tuple(replace(x, heads=(0, 3), merged=((1, 2), (0, 1), (3, 4))) for x in whole.layers)
    kept = replace(whole, layers=rows, merge="minitron")
    rows_of = model.model.layers[0].self_attn.q_proj.weight.detach().unflatten(0, (6, -1)).clone()
    with merged(model, anatomy, kept):
        first = model.model.layers[0].self_attn.q_proj.weight.unflatten(0, (6, -1))[0]
        assert torch.allclose(first, 2 * rows_of[0] - (2 * rows_of[1] - rows_of[2]))


def test_the_model_is_what_it_was() -> None:
    """To the bit, also after an error."""
    model = make("phi3", **GQA)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    seen = []
    with suppress(RuntimeError), merged(model, anatomy_of(model), merging_plan(model, "laco")):
        seen += [name for name, p in model.named_parameters() if not torch.equal(p, before[name][1])]
        raise RuntimeError
    assert len(seen) == 3  # the fused projection of each layer
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_nothing_merged_is_nothing_changed() -> None:
    """Not even copied."""
    model = make("llama")
    anatomy = anatomy_of(model)
    kept = plan(anatomy, ("head", "neuron"), uniform=True)
    for spec in anatomy.tensors:
        weight = model.get_parameter(spec.name).data
        assert merging.merge(weight, spec, anatomy, replace(kept, merge="minitron")) is weight


FAULTS: dict[str, Callable[[Plan], Plan]] = {
    "forgets": lambda plan: replace(plan, layers=tuple(replace(x, merged=()) for x in plan.layers)),
    "the other way": lambda plan: replace(plan, merge="laco"),
    "forgets the last layer": lambda plan: replace(
        plan, layers=(*plan.layers[:-1], replace(plan.layers[-1], merged=()))
    ),
    "another pair": lambda plan: replace(plan, layers=tuple(replace(x, merged=((0, 1),)) for x in plan.layers)),
}


@pytest.mark.parametrize("heads", [GQA, MHA], ids=["gqa", "mha"])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_in_merging_is_seen(
    heads: dict[str, int], fault: Callable[[Plan], Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut whose heads are merged otherwise than the masked model's is found before anything is written."""
    kept = merging_plan(make("llama", **heads), "minitron")
    monkeypatch.setattr(
        "regrow.stages.apply.slice_model", lambda model, anatomy, plan, _: slice_model(model, anatomy, fault(plan))
    )
    with pytest.raises(IdentityError, match="masked and sliced"):
        apply(subject(make("llama", **heads)), kept)


def test_a_merged_cut_is_read_again(tmp_path: Path, sprout_dir: Path) -> None:
    from regrow.stages.load import load

    loaded = load(str(sprout_dir), device="cpu")
    whole = Plan.everything(loaded.anatomy)
    rows = tuple(replace(x, heads=tuple(range(0, 8, 2)), merged=((0, 1), (4, 5))) for x in whole.layers)
    done = apply(loaded, replace(whole, layers=rows, merge="minitron"))
    assert done.difference <= EXACT
    export(loaded, done.holder, tmp_path / "out", {}, {"id": "out"})
    again, _ = checkpoint.read(tmp_path / "out")
    tokens = torch.arange(20).view(1, -1)
    assert torch.equal(logits(again, tokens), logits(loaded.model, tokens))
