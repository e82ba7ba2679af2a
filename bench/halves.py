"""Held-out demo text in two halves: one chooses a rate, the other is reported."""

from __future__ import annotations

from typing import Any

from regrow.engines.perplexity import block_losses
from regrow.engines.texts import documents
from regrow.engines.tokens import blocks


class Halves:
    def __init__(self, tokenizer: Any) -> None:
        held = blocks(documents("demo", "heldout"), tokenizer, block=256, tokens=32768, seed=0)
        self.choosing, self.reported = held[::2], held[1::2]

    def losses(self, model: Any) -> dict[str, float]:
        """Nats a token."""
        return {
            "loss": float(block_losses(model, self.reported).mean()),
            "chosen_by": float(block_losses(model, self.choosing).mean()),
        }
