"""Zero-shot tasks item by item, so that two models can be compared on the same items."""

from __future__ import annotations

from typing import Any

from regrow.engines.bind import Subject
from regrow.engines.tasks import answer_tasks

TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "rte", "winogrande")


def answered(subject: Subject, task: str, *, limit: int) -> dict[str, Any]:
    """Which of the first `limit` items the model gets right, and what the right answers cost it."""
    items = answer_tasks(subject.model, subject.tokenizer, [task], limit=limit)[task]
    return {
        "correct": "".join("01"[right] for right in items.correct),
        "gold_bits": [round(bits, 3) for bits in items.gold_bits],
        "gold_bytes": items.gold_bytes,
        "chance": sum(1 / n for n in items.choices) / len(items.choices),
    }
