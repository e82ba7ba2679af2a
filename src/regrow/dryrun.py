"""What a run would take and leave, from shapes alone: resulting counts, peak memory, tokens, rough time.

Memory is reckoned in copies of the model in fp32 (weights, gradients, optimiser), time in FLOPs at a speed measured
for a second on a matrix product. What this gives up: input and output, generation, and anything but one device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from regrow.artifacts.pattern import Pattern
from regrow.artifacts.plan import Plan
from regrow.artifacts.shape import Anatomy, Costs, Shape, costs
from regrow.artifacts.share import ZERO_SPREADS
from regrow.artifacts.space import space_of
from regrow.cut_checks import chosen_criteria
from regrow.engines import head, likelihood, products, tasks
from regrow.engines.bind import bind
from regrow.engines.checkpoint import locate, read_config
from regrow.engines.hetero import PREFIX, holder
from regrow.errors import MissingDemo
from regrow.foretold import foretold_plan
from regrow.prepare import check_words, fitted
from regrow.recovery import Distil
from regrow.settings import Evaluate, Recipe
from regrow.sparse_costs import sparse_bytes, sparse_flops
from regrow.stages import sparsify
from regrow.stages.load import as_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SCORE_COPIES = {
    **dict.fromkeys(("nothing", "weight", "flow", "angles", "removal", "task"), 1.0),
    "grad": 2.0,
    "fisher": 2.2,
}
PASSES = {"flow": 1.0, "angles": 1.0, "grad": 3.0, "fisher": 7.0}  # in forward passes; removal depends on depth
TRAIN_COPIES = {"full": 4.0, "cut": 4.0, "ast": 5.25}  # cut: at most; ast: the weights as seen, a byte for the mask
PIECES = 6  # tensors of a piece of logits while a student learns from a teacher: both models', and what follows of them
EFFICIENCY = 0.6  # of a large matrix product's speed that a whole model reaches
PROBES, PROBE_PASSES, PROBE_COPIES = 4, 9.0, 4.0  # of a Hessian's trace: blocks, forward passes each, of the model
ITEM_TOKENS = 80  # of a task's item: about forty that its choices share, and ten of each of four


def dry_run(recipe: Recipe, *, gflops: float | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Everything a user asks before a long run. Loads no weights."""
    config = read_config(locate(recipe.model, weights=False), trust_remote_code=trust_remote_code)
    anatomy = bind(config)
    anatomy = replace(anatomy, store_bytes=min(anatomy.store_bytes, as_dtype(recipe.dtype).itemsize))
    recipe = fitted(recipe, anatomy)
    wish = check_words(recipe)
    if wish is not None and recipe.search is not None:
        space_of(anatomy, recipe.axes, recipe.search.choices, recipe.divisors)
        wish = replace(wish, uniform=True)
    if recipe.sparsify is not None:
        sparsify.check_shapes(anatomy, recipe.sparsify)
    plan, guessed = (
        (Plan.everything(anatomy), False) if wish is None else foretold_plan(config, anatomy, wish, recipe.stages)
    )
    shape, asked = plan.shape(), measuring(recipe.evaluate)
    speed = gflops or machine_gflops()
    notes = ["minutes are rough: FLOPs over a measured speed, one device", *asked.notes]
    if recipe.search is not None:
        notes.append("shape: as if every axis lost the same; the search decides")
    elif guessed:
        notes.append(f"shape: as if every layer lost the same; spread {recipe.spread} decides by scores")
    return {
        "shape": shape.to_json(),
        "shape_text": str(shape),
        "before": costs(anatomy, anatomy.dense).to_json(),
        "after": costs(anatomy, shape).to_json(),
        "gflops": speed,
        "stages": stages(recipe, anatomy, shape, asked.tokens, speed),
        "loads_as": loads_as(config, anatomy, plan, guessed),
        "notes": notes,
    }


def loads_as(config: PreTrainedConfig, anatomy: Anatomy, plan: Plan, guessed: bool) -> str:
    """The model type of the folder, and what a reader of it must know."""
    found = holder(config, anatomy, plan)
    if guessed or found.kind == "heterogeneous":
        return f"{PREFIX}{config.model_type} (trust_remote_code)"
    return found.config.model_type if found.kind == "stock" else f"{found.config.model_type} (carrier)"


@dataclass(frozen=True, slots=True)
class Measuring:
    """What is read to measure a model once."""

    tokens: int
    notes: Sequence[str]


def measuring(asked: Evaluate) -> Measuring:
    """Tokens of the text and of the tasks, and what of them is rough or not known here."""
    tokens, notes = 0, []
    if asked.text is not None:
        tokens = asked.max_tokens or 0
        if asked.max_tokens is None:
            notes.append("the whole text is measured; how long it is is not known here, so it is not counted")
    if asked.tasks:
        try:
            items = sum(tasks.count_items(name, asked.limit) for name in dict.fromkeys(asked.tasks))
        except MissingDemo as missing:
            return Measuring(tokens, [*notes, f"tasks are not counted: {missing.came}"])
        tokens += items * ITEM_TOKENS
        every = "" if asked.limit else ": without a limit every item is asked"
        notes.append(f"{items:,} items of tasks at {ITEM_TOKENS} tokens each, which is rough{every}")
    return Measuring(tokens, notes)


def stages(recipe: Recipe, anatomy: Anatomy, shape: Shape, measured: int, gflops: float) -> list[dict[str, Any]]:
    """Tokens, minutes and peak memory of each stage; `measured` tokens are read to measure a model once."""
    dense, cut = costs(anatomy, anatomy.dense), costs(anatomy, shape)
    trained = recipe.recover
    answers = task_logits(recipe.evaluate, anatomy)
    before = _row("measure before", measured, dense.flops_per_token, 4 * dense.parameters + answers, gflops)
    if not recipe.cuts:
        rows = [before, *sparse_rows(recipe, anatomy, dense, gflops)]
    else:
        rows = [*cut_rows(recipe, anatomy, dense, cut, gflops)]
        rows[1:1] = [*asking_rows(recipe, anatomy, shape, gflops), before]
        rows[2:2] = search_rows(recipe, dense, cut, gflops) or learn_rows(recipe, anatomy, dense, gflops)
        if recipe.learn is not None and not recipe.learn.scored:
            del rows[0]  # gates are the scores
    if trained is not None and trained.tokens:
        held = round(4 * TRAIN_COPIES.get(trained.method, 1.0) * cut.parameters)
        flops = 3 * cut.flops_per_token
        made = 4 * 3 * min(head.NUMBERS, trained.micro_batch * trained.block * anatomy.sizes["V"])  # as gradients too
        if trained.teacher is not None and (more := trained.distil.teacher_tokens):
            whole = 4 * TRAIN_COPIES["full"] * dense.parameters + 4 * cut.parameters + made
            rows.append(_row("correct the teacher", more, 3 * dense.flops_per_token, round(whole), gflops))
        if trained.teacher is not None:  # taken to be as large as the dense model; logits come in pieces then
            held, flops, made = held + 4 * dense.parameters, flops + dense.flops_per_token, 4 * PIECES * head.NUMBERS
            flops += _by_themselves(trained.distil, dense, cut)
        rows.append(_row("recover", trained.tokens, flops, held + made, gflops))
    rows.append(_row("measure after", measured, cut.flops_per_token, 4 * cut.parameters + answers, gflops))
    return rows


def _by_themselves(asked: Distil, dense: Costs, cut: Costs) -> int:
    """FLOPs a token of a student that writes, and of a teacher that learns: gradients pass through it, and its frozen
    weights get none."""
    return round(asked.on_policy * cut.flops_per_token) + (asked.online_rate is not None) * dense.flops_per_token


def cut_rows(recipe: Recipe, anatomy: Anatomy, dense: Costs, cut: Costs, gflops: float) -> list[dict[str, Any]]:
    """Scoring and surgery. What lies between the steps of a cut is taken to be as large as the dense model."""
    asked = recipe.calibration
    sees = {c.criterion.sees for c in chosen_criteria(recipe).values()}
    forwards = sum(PASSES.get(s, 0.0) for s in sees) + (0.6 * anatomy.sizes["L"] if "removal" in sees else 0.0)
    copies = max(SCORE_COPIES[s] for s in sees)
    logits = 4 * 3 * anatomy.sizes["V"]
    return [
        _row(
            "score",
            recipe.stages * asked.tokens if forwards else 0,
            forwards * dense.flops_per_token,
            (copies + (recipe.stages > 1)) * 4 * dense.parameters + asked.block * logits,
            gflops,
        ),
        *refit_rows(recipe, anatomy, dense, gflops),
        _row("cut and write", 0, 0, 4 * dense.parameters + anatomy.store_bytes * cut.parameters, gflops),
    ]


def refit_rows(recipe: Recipe, anatomy: Anatomy, dense: Costs, gflops: float) -> list[dict[str, Any]]:
    """Three passes, and Gram matrices of what the MLP's last linear reads, which is the widest."""
    if recipe.refit is None:
        return []
    tokens, layers, width, most = (recipe.refit.tokens, *(anatomy.sizes[letter] for letter in "LCF"))
    held = 4 * (dense.parameters + tokens * width + 6 * most**2)
    flops = 3 * dense.flops_per_token + 2 * layers * most**2
    solving = layers * 16 * (most**3 // 3 + 4 * width * most**2)  # eight dampings on either half
    return [_row("refit", tokens, flops, held, gflops, solving)]


def asking_rows(recipe: Recipe, anatomy: Anatomy, shape: Shape, gflops: float) -> list[dict[str, Any]]:
    """A task that is asked without every run of as many layers as go; a search asks for other lengths too."""
    length, dense = anatomy.sizes["L"] - len(shape.layers), costs(anatomy, anatomy.dense)
    rows = []
    for choice in chosen_criteria(recipe).values():
        if choice.criterion.sees == "task" and length:
            items = (len(shape.layers) + 1) * tasks.count_items(choice.asked["task"], choice.asked["limit"])
            peak = 4 * dense.parameters + task_logits(recipe.evaluate, anatomy)
            rows.append(_row("ask without layers", items * ITEM_TOKENS, dense.flops_per_token, peak, gflops))
    return rows


def search_rows(recipe: Recipe, dense: Costs, cut: Costs, gflops: float) -> list[dict[str, Any]]:
    """What candidates are scored and trained on, at most; the intact model stays in memory, as their teacher too."""
    asked = recipe.search
    if asked is None:
        return []
    both = 4 * (dense.parameters + cut.parameters)
    rows = [_row("score shapes", asked.candidates * asked.tokens, cut.flops_per_token, both, gflops)]
    if asked.rank_tokens:
        held = 4 * dense.parameters + round(4 * TRAIN_COPIES["full"] * cut.parameters) + 4 * PIECES * head.NUMBERS
        flops = 3 * cut.flops_per_token + dense.flops_per_token
        rows.append(_row("train the best", asked.top * asked.rank_tokens, flops, held, gflops))
    return rows


def learn_rows(recipe: Recipe, anatomy: Anatomy, dense: Costs, gflops: float) -> list[dict[str, Any]]:
    """Gates that learn on the whole model: with a teacher one pass more, which shares the weights; masks go forward."""
    asked = recipe.learn
    if asked is None:
        return []
    made = 4 * PIECES * min(head.NUMBERS, asked.micro_batch * asked.block * anatomy.sizes["V"])
    held = round(4 * TRAIN_COPIES.get(asked.method, 1.0) * dense.parameters) + made
    if asked.gates == "policy-gradient":
        return [_row("try masks", asked.masks * asked.tokens, dense.flops_per_token, held, gflops)]
    passes = 3 + (asked.teachers != "none")
    return [_row("learn", asked.tokens, passes * dense.flops_per_token, held, gflops)]


def sparse_rows(recipe: Recipe, anatomy: Anatomy, dense: Costs, gflops: float) -> list[dict[str, Any]]:
    """Zeros in one shot; nothing when the recipe asks for none."""
    if recipe.sparsify is None:
        return []
    method, asked = sparsify.choose(recipe.sparsify), recipe.calibration
    passes = 0 if method.sees == "nothing" else {"pruned": 2, "dense": 1, "both": 2 + method.mends}[method.inputs]
    leave = () if recipe.sparsify.keep_statistics else recipe.sparsify.leave
    pattern = Pattern.parse(recipe.sparsify.pattern)
    beyond = sparse_bytes(anatomy, method, pattern, tokens=asked.tokens, block=asked.block, leave=leave)
    peak = 4 * dense.parameters + beyond
    read = asked.tokens if passes else 0
    more = sparse_flops(anatomy, method, tokens=read, leave=leave)
    turns = 1 + len(recipe.sparsify.levels)
    rows = [_row("sparsify and write", turns * read, passes * dense.flops_per_token, peak, gflops, turns * more)]
    how = ZERO_SPREADS.get(recipe.sparsify.spread)
    if how.sees == "inputs":
        wide = 4.0 * (dense.parameters + asked.tokens * anatomy.sizes["C"])
        rows.insert(0, _row(f"spread {how.name}", asked.tokens, dense.flops_per_token, wide, gflops))
    elif how.sees == "trace":
        wide = 4 * PROBE_COPIES * dense.parameters + asked.block * 4 * 3 * anatomy.sizes["V"]
        rows.insert(
            0, _row(f"spread {how.name}", PROBES * asked.block, PROBE_PASSES * dense.flops_per_token, wide, gflops)
        )
    return rows


def task_logits(asked: Evaluate, anatomy: Anatomy) -> int:
    """Most bytes that logits of tasks take, in fp32; long texts go in smaller batches."""
    return 4 * min(likelihood.LOGITS, asked.batch * tasks.CONTEXT * anatomy.sizes["V"]) if asked.tasks else 0


def _row(
    stage: str, tokens: int, flops_per_token: float, peak: float, gflops: float, more: float = 0.0
) -> dict[str, Any]:
    """`more`: operations that no token asks for."""
    minutes = (tokens * flops_per_token + more) / (gflops * 1e9 * EFFICIENCY) / 60
    return {"stage": stage, "tokens": tokens, "minutes": round(minutes, 2), "peak_gb": round(peak / 1e9, 3)}


@products.faster()
def machine_gflops(size: int = 1024, seconds: float = 0.5) -> float:
    """Speed of an fp32 matrix product on this machine."""
    a = torch.randn(size, size)
    a @ a
    began, runs = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        a @ a
        runs += 1
    return runs * 2 * size**3 / (time.perf_counter() - began) / 1e9
