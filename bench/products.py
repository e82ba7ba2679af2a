"""What `regrow.engines.products` gains: SmolLM2 with fp32 products by oneDNN over the same by what torch takes.

Reading (no gradients) and training (forward and backward, all weights), 4 x 512 tokens; the two take turns. On a
processor where nothing is changed, this says so.
"""

from __future__ import annotations

from typing import Any

import torch

from cutting import calibration
from ledger import Ledger, spread, timed
from regrow.engines import products
from regrow.stages.load import load

TOKENS, BLOCK, TURNS = 2048, 512, 7
SETTING: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made at run time


def main() -> None:
    ledger = Ledger("products", __doc__ or "", model="demo", tokens=TOKENS, block=BLOCK, turns=TURNS)
    subject = load("demo")
    model: Any = subject.model
    blocks = calibration(subject, tokens=TOKENS, block=BLOCK, seed=0)
    chosen = {library: library_setting(library) for library in ("usual", "faster")}

    def read() -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(blocks).logits
        return logits

    def train() -> None:
        model(blocks, labels=blocks).loss.backward()
        model.zero_grad()

    def turn() -> dict[str, Any]:
        found: dict[str, Any] = {}
        logits = {}
        for library, setting in chosen.items():
            SETTING.fp32_precision = setting
            found[library] = {"read": timed(read), "train": timed(train), "library": products.library()}
            logits[library] = read()
        gap = (logits["faster"] - logits["usual"]).abs().max() / logits["usual"].abs().max()
        gains = {what: found["usual"][what] / found["faster"][what] for what in ("read", "train")}
        return {"seconds": found, "times": gains, "largest difference of logits": float(gap)}

    read()
    turns = [ledger.row(f"turn {i}", turn) for i in range(TURNS)]
    ledger.row(
        "summary",
        lambda: (
            {what: spread([one["times"][what] for one in turns]) for what in ("read", "train")}
            | {"largest difference of logits": max(one["largest difference of logits"] for one in turns)}
            | {"library": turns[0]["seconds"]["faster"]["library"]}
        ),
    )


def library_setting(library: str) -> str:
    SETTING.fp32_precision = "none"
    if library == "usual":
        return "none"
    with products.faster():
        return str(SETTING.fp32_precision)


if __name__ == "__main__":
    main()
