"""What scoring costs beside plain forward passes over the same tokens, on SmolLM2; plain and scored runs take turns.

Asked: all axes by activations (neurons, groups, heads, channels, layers by block influence) at most 1.10x one forward;
the loss without each of the L layers at most 0.7 L forwards. A plain forward is the whole model, head included.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from cutting import calibration
from ledger import Ledger, timed
from regrow.artifacts.family import Unit
from regrow.engines.removal import loss_without_layers
from regrow.engines.walk import observe
from regrow.stages.load import load
from regrow.stages.score import choose, score

TOKENS, BLOCK, REPEATS = 4096, 512, 5
REMOVAL_TOKENS, REMOVAL_REPEATS, REMOVAL_PLAIN = 512, 5, 10  # plain forwards in a turn: one alone is too short to time
AXES: tuple[Unit, ...] = ("neuron", "group", "head", "channel", "layer")


def main() -> None:
    ledger = Ledger("scoring_time", __doc__ or "", model="demo", tokens=TOKENS, block=BLOCK, repeats=REPEATS)
    subject = load("demo")
    model: Any = subject.model
    text = calibration(subject, tokens=TOKENS, block=BLOCK, seed=0)
    few = text[: REMOVAL_TOKENS // BLOCK]
    chosen = choose("activation", AXES, {}, {})

    def plain(ids: torch.Tensor) -> None:
        with torch.inference_mode():
            for block in torch.split(ids, 1):
                model(input_ids=block, use_cache=False)

    def body() -> None:
        observe(model, subject.anatomy, text, flow={})

    rows = {
        "activation scores of all axes / one forward": (
            lambda: plain(text),
            lambda: score(subject, chosen, text),
            REPEATS,
            1.0,
        ),
        "the same walk without statistics / one forward": (lambda: plain(text), body, REPEATS, 1.0),
        "loss without each layer / L forwards": (
            lambda: plain(few.repeat(REMOVAL_PLAIN, 1)),
            lambda: loss_without_layers(model, subject.anatomy, few),
            REMOVAL_REPEATS,
            subject.anatomy.sizes["L"] / REMOVAL_PLAIN,
        ),
    }
    for name, (base, work, repeats, share) in rows.items():
        ledger.row(name, partial(compare, base, work, repeats, share))


def compare(base: Callable[[], object], work: Callable[[], object], repeats: int, share: float) -> dict[str, Any]:
    """Ratios of times, taken in turns so that a busy machine slows both."""
    base(), work()
    ratios, seconds = [], []
    for _ in range(repeats):
        before = timed(base)
        after = timed(work)
        ratios.append(after / before / share)
        seconds.append((round(before, 3), round(after, 3)))
    return {
        "ratio": statistics.median(ratios),
        "mean": statistics.fmean(ratios),
        "std": statistics.stdev(ratios),
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
