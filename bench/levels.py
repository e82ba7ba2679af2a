"""Do levels and numerous teachers help SPP from 50 % to 75 % zeros: sprout, three seeds, equal tokens.

    python bench/levels.py

Sprout loses 75 % of the weights of its decoder layers by SparseGPT, and SPP learns on 204,800 tokens of demo text, 4 x
128 a step. `at once`: zeros in one shot, then all tokens. `levels`: recipe spp-levels, 50, 55, 60, 65, 70 and 75 %,
each followed by a sixth of the tokens. Who teaches: the text alone, the dense model, or what the model was two levels
before. Every arm tries the same three rates; the one with the lowest loss on the first half of the held-out text is
taken, and the loss on the other half is reported. Several processes may work on it, and it goes on after an
interruption.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from halves import Halves
from ledger import Job, Ledger
from regrow.cache import cache_dir
from regrow.recipe_files import find_recipe, overlay, read_recipe
from regrow.run import run
from regrow.settings import Recipe, parse
from regrow.stages.load import load

SPROUT = Path(__file__).parents[1] / "tests" / "sprout"
TOKENS = 400 * 4 * 128
RATES = (3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)
ARMS: dict[str, dict[str, Any]] = {
    "at once, text": {"sparsify": {"levels": []}, "recover": {"teacher": None, "distil": {"lag": None}}},
    "at once, dense teacher": {"sparsify": {"levels": []}, "recover": {"distil": {"lag": None}}},
    "levels, text": {"recover": {"teacher": None, "distil": {"lag": None}}},
    "levels, dense teacher": {"recover": {"distil": {"lag": None}}},
    "levels, numerous teachers": {},
}
USUAL: dict[str, Any] = {
    "model": str(SPROUT),
    "calibration": {"tokens": 8192, "block": 128},
    "recover": {"tokens": TOKENS, "block": 128, "batch": 4, "micro_batch": 4, "rank": 8, "alpha": 16},
    "evaluate": {"text": None, "tasks": [], "speed": False, "samples": []},
}


def main() -> None:
    bench = Bench()
    with sdpa_kernel(SDPBackend.MATH):  # torch's other kernel takes twice as long for a step of this small model
        bench.ledger.work(bench.jobs())


class Bench:
    def __init__(self) -> None:
        self.halves = Halves(load(str(SPROUT)).tokenizer)
        self.ledger = Ledger("levels", __doc__ or "", model="sprout", tokens=TOKENS, rates=list(RATES))

    def jobs(self) -> list[Job]:
        """In the order of their worth."""
        arms = [self.arm(name, rate, seed) for seed in SEEDS for name in ARMS for rate in RATES]
        return [self.ledger.job("dense", lambda: self.halves.losses(load(str(SPROUT)).model)), *arms]

    def arm(self, name: str, rate: float, seed: int) -> Job:
        def measure() -> dict[str, Any]:
            out = Path(tempfile.mkdtemp(dir=cache_dir("bench-levels"))) / "out"
            report = run(asked(name, rate, seed), out, page=lambda *_: {})
            found = self.halves.losses(load(str(out)).model)
            shutil.rmtree(out.parent)
            kept = report.after["size/nonzero_weights"].value / report.before["size/nonzero_weights"].value
            return {**found, "kept": kept}

        return self.ledger.job(f"{name} rate {rate:g} seed {seed}", measure)


def asked(name: str, rate: float, seed: int) -> Recipe:
    data = overlay(overlay(read_recipe(find_recipe("spp-levels")), USUAL), ARMS[name])
    return parse(overlay(data, {"seed": seed, "recover": {"learning_rate": rate}}))


if __name__ == "__main__":
    main()
