"""What a run would take and leave, from shapes alone: resulting counts, peak memory, tokens, rough time.

Memory is reckoned in copies of the model in fp32 (weights, gradients, optimiser), time in FLOPs at a speed measured
for a second on a matrix product. What this gives up: input and output, generation, and anything but one device.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from regrow.artifacts.shape import Anatomy, Shape, costs, even
from regrow.engines.bind import bind
from regrow.engines.checkpoint import locate, read_config
from regrow.engines.hetero import PREFIX
from regrow.run import as_wish, chosen_criteria
from regrow.settings import Recipe
from regrow.stages.plan import check_wish, meet

SCORE_COPIES = {"nothing": 1.0, "weight": 1.0, "flow": 1.0, "angles": 1.0, "removal": 1.0, "grad": 2.0, "fisher": 2.2}
PASSES = {"flow": 1.0, "angles": 1.0, "grad": 3.0, "fisher": 7.0}  # in forward passes; removal depends on depth
EFFICIENCY = 0.6  # of a large matrix product's speed that a whole model reaches


def dry_run(recipe: Recipe, *, gflops: float | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Everything a user asks before a long run. Loads no weights."""
    config = read_config(locate(recipe.model), trust_remote_code=trust_remote_code)
    anatomy = bind(config)
    wish = as_wish(recipe)
    check_wish(anatomy, wish)
    shape = even(anatomy, meet(anatomy, wish, wish.budget.target(anatomy)))
    speed = gflops or machine_gflops()
    inside = {"group", "head", "neuron"} & set(wish.axes)
    same = shape.uniform and (wish.uniform or wish.spread == "uniform" or not inside)
    return {
        "shape": shape.to_json(),
        "shape_text": str(shape),
        "before": costs(anatomy, anatomy.dense).to_json(),
        "after": costs(anatomy, shape).to_json(),
        "gflops": speed,
        "stages": stages(recipe, anatomy, shape, speed),
        "loads_as": config.model_type if same else f"{PREFIX}{config.model_type} (trust_remote_code)",
        "notes": ["minutes are rough: FLOPs over a measured speed, one device"],
    }


def stages(recipe: Recipe, anatomy: Anatomy, shape: Shape, gflops: float) -> list[dict[str, Any]]:
    """Tokens, minutes and peak memory of each stage."""
    dense, cut = costs(anatomy, anatomy.dense), costs(anatomy, shape)
    asked, trained = recipe.calibration, recipe.recover
    sees = {c.criterion.sees for c in chosen_criteria(recipe).values()}
    forwards = sum(PASSES.get(s, 0.0) for s in sees) + (0.6 * anatomy.sizes["L"] if "removal" in sees else 0.0)
    copies = max(SCORE_COPIES[s] for s in sees)
    measured = (recipe.evaluate.max_tokens or 0) if recipe.evaluate.text else 0
    logits = 4 * 3 * anatomy.sizes["V"]  # logits, log-probabilities and their gradient, fp32, a token
    rows = [
        _row(
            "score",
            asked.tokens if forwards else 0,
            forwards * dense.flops_per_token,
            copies * 4 * dense.parameters + asked.block * logits,
            gflops,
        ),
        _row("measure before", measured, dense.flops_per_token, 4 * dense.parameters, gflops),
        _row("cut and write", 0, 0, 4 * dense.parameters + anatomy.store_bytes * cut.parameters, gflops),
    ]
    if trained is not None and trained.tokens:
        held = 4 * 4 * cut.parameters if trained.method == "full" else 4 * cut.parameters
        rows.append(
            _row(
                "recover",
                trained.tokens,
                3 * cut.flops_per_token,
                held + trained.micro_batch * trained.block * logits,
                gflops,
            )
        )
    rows.append(_row("measure after", measured, cut.flops_per_token, 4 * cut.parameters, gflops))
    return rows


def _row(stage: str, tokens: int, flops_per_token: float, peak: float, gflops: float) -> dict[str, Any]:
    minutes = tokens * flops_per_token / (gflops * 1e9 * EFFICIENCY) / 60
    return {"stage": stage, "tokens": tokens, "minutes": round(minutes, 2), "peak_gb": round(peak / 1e9, 3)}


def machine_gflops(size: int = 1024, seconds: float = 0.5) -> float:
    """Speed of an fp32 matrix product on this machine."""
    a = torch.randn(size, size)
    a @ a
    began, runs = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        a @ a
        runs += 1
    return runs * 2 * size**3 / (time.perf_counter() - began) / 1e9
