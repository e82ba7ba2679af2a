"""The stage that makes zeros: which chains of solvers make sense, what counts as sparse already, what rounding adds."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import anatomy_of, make
from regrow.artifacts.curvature import Curvature
from regrow.artifacts.linear import SOLVERS, Inputs, Linear, Lowest, Sparse
from regrow.artifacts.pattern import Pattern
from regrow.artifacts.sparsity import SPARSE
from regrow.artifacts.weight_sight import WEIGHT_CRITERIA, WeightCriterion
from regrow.engines import checkpoint
from regrow.engines.bind import Subject
from regrow.engines.hetero import Holder
from regrow.engines.sparsify import task_of
from regrow.engines.zeros import of_model, prunable
from regrow.errors import BrokenModel, IdentityError, SettingsError
from regrow.settings import Sparsify
from regrow.stages import sparsify
from regrow.stages.export import export
from regrow.stages.load import load


@pytest.fixture
def sprout(sprout_dir: Path) -> Subject:
    return load(str(sprout_dir))


SPARSEGPT = WEIGHT_CRITERIA.get("sparsegpt")
COLUMNS = 160  # two blocks


def problem(criterion: WeightCriterion = SPARSEGPT, pattern: str = "50%") -> Any:
    source = torch.Generator().manual_seed(3)
    mix = torch.randn(COLUMNS, COLUMNS, generator=source, dtype=torch.float64)
    x = torch.randn(400, COLUMNS, generator=source, dtype=torch.float64) @ mix
    w = torch.randn(12, COLUMNS, generator=source, dtype=torch.float64)
    seen = Inputs(x.square().sum(0), x.sum(0), x.var(0, correction=0))
    return task_of(w, seen, Curvature(x.T @ x), criterion, Pattern.parse(pattern))


def answer(*solvers: str, criterion: str = "sparsegpt", **options: Any) -> Sparse:
    method = sparsify.choose(Sparsify(pattern="50%", criterion=criterion, solver=solvers, options=options))
    task = problem(method.criterion)
    found: Sparse = Lowest(task)
    for solver, own in method.solvers:
        found = solver.solve(task, found, **own)
    return found


# ---- chains


def test_a_later_solver_keeps_the_mask_it_is_given() -> None:
    for first, then in (("dsnot", "update"), ("alps", "update"), ("update", "alps"), ("mrp", "refit"), ("alps", "mrp")):
        alone, both = answer(first), answer(first, then)
        assert torch.equal(alone.gone, both.gone), (first, then)
        assert not torch.equal(alone.weight, both.weight), (first, then)
        assert not torch.equal(both.weight, answer(then).weight), (first, then)


def test_dsnot_refines_any_start() -> None:
    """And changes no weight, whatever moved them before."""
    start, found = answer("update"), answer("update", "dsnot")
    assert not torch.equal(start.gone, found.gone)
    assert torch.equal(start.gone.sum(1), found.gone.sum(1))
    kept = ~found.gone
    assert torch.equal(found.weight[kept], problem().weight[kept])


@pytest.mark.parametrize("criterion", WEIGHT_CRITERIA.names())
def test_dsnot_starts_with_as_many_zeros_in_every_row(criterion: str) -> None:
    """Whatever chooses them; of what another solver leaves it keeps each row's count, as above."""
    alone = answer("none", criterion=criterion).gone
    within = WEIGHT_CRITERIA.get(criterion).within
    assert (alone.sum(1) == COLUMNS // 2).all() == (within == "row")
    for solvers in (("dsnot",), ("dsnot", "refit")):
        assert bool((answer(*solvers, criterion=criterion).gone.sum(1) == COLUMNS // 2).all())


@pytest.mark.parametrize(
    "chain", [("refit", "update"), ("none", "dsnot"), ("refit", "mrp"), ("dsnot", "update", "mrp"), ("refit", "dsnot")]
)
def test_work_that_the_next_would_undo_is_refused(chain: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError, match="finds all weights anew"):
        sparsify.choose(Sparsify(pattern="50%", solver=chain))


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "isc", "magnitude"])
@pytest.mark.parametrize("first", ["update", "mrp", "alps", "refit", "none"])
def test_it_is_refused_when_the_first_keeps_the_mask(first: str, criterion: str, pattern: str) -> None:
    """SparseGPT's update scores again only where that means something, MRP tries subsets only of groups."""
    asked = Sparsify(pattern=pattern, criterion=criterion, solver=(first,))
    ((solver, options),) = sparsify.choose(asked).solvers
    task = problem(WEIGHT_CRITERIA.get(criterion), pattern)
    start = Lowest(task)
    same = torch.equal(solver.solve(task, start, **options).gone, start.gone)
    if same:
        with pytest.raises(SettingsError, match="finds all weights anew"):
            sparsify.choose(asked.model_copy(update={"solver": (first, "dsnot")}))
    else:
        sparsify.choose(asked.model_copy(update={"solver": (first, "dsnot")}))


def test_a_solver_named_as_the_criterion_works_first() -> None:
    named = sparsify.choose(Sparsify(pattern="50%", criterion="dsnot", solver=("update",)))
    assert [solver.name for solver, _ in named.solvers] == ["dsnot", "update"]
    assert [dict(options) for _, options in named.solvers] == [{}, {"hold": True}]
    assert named.criterion.name == "wanda"


def test_every_solver_says_what_it_does_to_a_mask() -> None:
    for name in SOLVERS.names():
        solver = SOLVERS.get(name)
        task = problem()
        start = Lowest(task)
        held = solver.solve(task, start, **({"hold": True} if "hold" in solver.options else {}))
        assert torch.equal(held.gone, start.gone) is (solver.mask != "moves"), name
        assert ("hold" in solver.options) is (solver.mask not in ("keeps", "moves")), name
        other = Sparse(task.weight.masked_fill(start.gone, 0) * 1.5, start.gone)
        again = solver.solve(task, other, **({"hold": True} if "hold" in solver.options else {}))
        assert torch.equal(held.weight, again.weight) is (solver.takes == "mask"), name


# ---- sparse already


def test_five_percent_is_sparse(sprout: Subject) -> None:
    parameters = dict(sprout.model.named_parameters())
    names = prunable(sprout.anatomy)
    total = sum(parameters[name].numel() for name in names)
    left = math.ceil(SPARSE * total) - 1
    with torch.no_grad():
        for name in names:
            flat = parameters[name].view(-1)
            count = min(left, flat.numel() // 2)
            flat[:count] = 0
            left -= count
    sparsify.check(sprout, Sparsify(pattern="2:4"))
    with torch.no_grad():
        parameters[names[-1]].view(-1)[-1] = 0
    with pytest.raises(SettingsError, match=r"5\.0 % zeros already"):
        sparsify.check(sprout, Sparsify(pattern="2:4"))


# ---- rounding


@pytest.mark.parametrize(("store", "faint"), [(torch.float16, 1e-9), (torch.bfloat16, 1e-41)])
def test_zeros_that_rounding_makes_are_told_apart(sprout: Subject, store: torch.dtype, faint: float) -> None:
    """2:4 of weights that 16 bits cannot hold: half of them were asked for, the others are noted, and none is -0."""
    narrow = replace(sprout, model=copy.deepcopy(sprout.model), store=store)
    weight = narrow.model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        signs = torch.tensor([1.0, -1.0]).repeat(weight.shape[1] // 2)
        weight[0] = signs * faint * (1 + torch.arange(weight.shape[1]) / weight.shape[1])
    found = sparsify.apply(narrow, Sparsify(pattern="2:4", criterion="magnitude"), None, seed=0)
    asked = sum(matrix.zeros for matrix in found.matrices)
    assert 2 * asked == found.sparsity.weights
    vanished = found.sparsity.zeros - asked
    assert vanished > 0
    assert found.notes == (
        f"{vanished:,} kept weights are too small for {str(store).removeprefix('torch.')}: zero too",
    )
    for parameter in narrow.model.parameters():
        assert not bool((parameter.signbit() & (parameter == 0)).any())


def test_zeros_that_rounding_makes_in_a_model_of_16_bits(sprout: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver whose weights fp16 cannot hold, on a model that computes in it."""

    def faint(task: Linear, start: Sparse) -> Sparse:
        return Sparse(torch.full_like(task.weight, 1e-9).masked_fill(start.gone, 0), start.gone)

    monkeypatch.setattr(sparsify, "_named", lambda _: (magnitude, (replace(SOLVERS.get("none"), solve=faint),)))
    magnitude = WEIGHT_CRITERIA.get("magnitude")
    narrow = replace(sprout, model=copy.deepcopy(sprout.model).half(), store=torch.float16)
    left = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"
    found = sparsify.apply(narrow, Sparsify(pattern="2:4", criterion="faint", leave=left), None, seed=0)
    weights = sum(matrix.weights for matrix in found.matrices)
    assert sum(matrix.zeros for matrix in found.matrices) * 2 == weights
    assert found.notes == (f"{weights // 2:,} kept weights are too small for float16: zero too",)


def test_the_embedding_alone(sprout: Subject) -> None:
    """In a run of its own, then with zeros elsewhere: no rounding is blamed for zeros that were there or were asked."""
    ends = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    asked = Sparsify(pattern="50%", criterion="magnitude", also=("embed_tokens",), leave=ends)
    found = sparsify.apply(sprout, asked, None, seed=0)
    assert [matrix.name for matrix in found.matrices] == ["model.embed_tokens"]
    assert not found.notes
    more = Sparsify(pattern="50%", criterion="magnitude", existing="keep")
    assert not sparsify.apply(sprout, more, None, seed=0).notes


def test_zeros_of_one_matrix_are_not_filled_in_silence(sprout: Subject) -> None:
    """Half of one matrix is far from 5 % of the model, which is not refused then."""
    ends = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    sparsify.apply(sprout, Sparsify(pattern="50%", criterion="magnitude", leave=ends), None, seed=0)
    assert of_model(sprout.model, sprout.anatomy).share < SPARSE
    again = copy.deepcopy(sprout)
    empty = {name: weight == 0 for name, weight in sprout.model.named_parameters() if "k_proj" in name}
    text = torch.randint(3, 2000, (2, 32), generator=torch.Generator().manual_seed(0))
    found = sparsify.apply(sprout, Sparsify(pattern="3:4", criterion="sparsegpt"), text, seed=0)
    (note,) = (note for note in found.notes if "zeros of matrices that were sparse" in note)
    filled = sum(int((sprout.model.get_parameter(name)[mask] != 0).sum()) for name, mask in empty.items())
    assert int(note.split()[0].replace(",", "")) == filled > 0
    kept = sparsify.apply(again, Sparsify(pattern="3:4", criterion="sparsegpt", existing="keep"), text, seed=0)
    assert not any("zeros of matrices" in note for note in kept.notes)


def test_few_zeros_in_the_embedding_are_no_negative_rounding(sprout: Subject) -> None:
    asked = Sparsify(pattern="3%", criterion="magnitude", also=("embed_tokens",))
    assert not sparsify.apply(sprout, asked, None, seed=0).notes


def test_weights_that_are_no_numbers_are_not_written(sprout: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(task: Linear, start: Sparse) -> Sparse:
        return Sparse(task.weight / 0, start.gone)

    update = replace(SOLVERS.get("update"), solve=lost, options={})
    monkeypatch.setattr(sparsify, "_named", lambda _: (SPARSEGPT, (update,)))
    text = torch.randint(3, 2000, (2, 32), generator=torch.Generator().manual_seed(0))
    with pytest.raises(BrokenModel, match=r"update found no finite weights for model\.layers\.0\.self_attn\.q_proj"):
        sparsify.apply(sprout, Sparsify(pattern="2:4", criterion="lost"), text, seed=0)


def test_weights_that_storage_cannot_hold_are_named(sprout: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def large(task: Linear, start: Sparse) -> Sparse:
        return Sparse((7e4 * task.weight.sign()).masked_fill(start.gone, 0), start.gone)

    none = replace(SOLVERS.get("none"), solve=large)
    monkeypatch.setattr(sparsify, "_named", lambda _: (WEIGHT_CRITERIA.get("magnitude"), (none,)))
    narrow = replace(sprout, store=torch.float16)
    with pytest.raises(BrokenModel, match=r"model\.layers\.0\.self_attn\.q_proj\.weight has weights beyond float16"):
        sparsify.apply(narrow, Sparsify(pattern="2:4", criterion="large"), None, seed=0)


def test_a_penalty_of_nothing() -> None:
    with pytest.raises(SettingsError, match=r"penalty=0 of solver 'alps'") as caught:
        sparsify.choose(Sparsify(criterion="alps", options={"penalty": 0}))
    assert caught.value.allowed == "a number, more than 0"


def test_what_says_nothing_is_said(sprout: Subject) -> None:
    asked = Sparsify(criterion="magnitude", inputs="both", mend=0.5, damping=0.1)
    assert sparsify.apply(sprout, asked, None, seed=0).notes == (
        "nothing came of damping and inputs = both and mend: that takes a method that reads Gram matrices, and "
        "inputs = both",
    )


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "dsnot"])
def test_methods_without_a_gram_matrix_need_few_tokens(sprout: Subject, criterion: str) -> None:
    assert sparsify.warning(sprout.anatomy, Sparsify(criterion=criterion), 8) is None


def test_fewer_tokens_than_inputs(sprout: Subject) -> None:
    """Said before and after; sprout's widest inputs are 352."""
    asked = Sparsify(criterion="sparsegpt", pattern="2:4")
    assert sparsify.warning(sprout.anatomy, asked, 352) is None
    said = sparsify.warning(sprout.anatomy, asked, 351)
    assert said is not None
    assert said.startswith("351 tokens for 352 inputs of model.layers.0.mlp.down_proj.weight: a Gram matrix of so few")
    assert sparsify.warning(sprout.anatomy, asked.model_copy(update={"leave": ("down_proj",)}), 351) is None
    text = torch.randint(3, 2000, (11, 32), generator=torch.Generator().manual_seed(0))
    few = sparsify.apply(copy.deepcopy(sprout), asked, text[:10], seed=0).notes
    assert len(few) == 1
    assert few[0].startswith(
        "6 of 42 matrices met fewer tokens than they have inputs, model.layers.0.mlp.down_proj 320 "
    )
    assert not sparsify.apply(sprout, asked, text, seed=0).notes


def test_an_expert_meets_its_share() -> None:
    """Two of four experts a token: half of the tokens each."""
    model = make("mixtral")
    anatomy = anatomy_of(model)
    widest = max(stack.shape[-1] for name, stack in model.named_parameters() if "experts" in name)
    asked = Sparsify(criterion="sparsegpt")
    assert sparsify.warning(anatomy, asked, 2 * widest) is None
    said = sparsify.warning(anatomy, asked, 2 * widest - 2)
    assert said is not None
    assert said.startswith(
        f"{widest - 1} tokens for each expert, on average, for {widest} inputs of model.layers.0.mlp."
    )


@pytest.mark.parametrize("option", [{"steps": -3}, {"tolerance": -0.1}, {"tolerance": math.inf}])
def test_options_below_zero(option: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="0 or more"):
        sparsify.choose(Sparsify(criterion="refit", options=option))


# ---- what is on disk


@pytest.fixture
def sparse(sprout: Subject) -> Subject:
    sparsify.apply(sprout, Sparsify(pattern="2:4", criterion="magnitude"), None, seed=0)
    return sprout


@pytest.mark.parametrize("wrong", [1e-20, -0.0])
def test_a_zero_that_changes_on_the_way_to_disk_is_seen(
    sparse: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    """Logits would not tell."""
    right = checkpoint.write

    def write(model: Any, *rest: Any) -> None:
        weight: Tensor = model.model.layers[1].mlp.up_proj.weight
        with torch.no_grad():
            place = tuple((weight == 0).nonzero()[0])
            weight[place] = wrong
            right(model, *rest)
            weight[place] = 0.0

    found = of_model(sparse.model, sparse.anatomy)
    notes = {"sparsity": {"pattern": "2:4", "share": found.share, "mask_hash": found.mask_hash}}
    held = Holder("stock", sparse.model.config, "")
    monkeypatch.setattr(checkpoint, "write", write)
    with pytest.raises(IdentityError, match="zeros on disk" if wrong else "-0 in"):
        export(sparse, held, tmp_path / "out", {}, notes)
    assert not (tmp_path / "out").exists()
