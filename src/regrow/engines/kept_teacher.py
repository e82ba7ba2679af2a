"""A teacher asked once: what it predicts for every block lies on disk, and the training holds only the student.

Of each position the k largest log-probabilities are kept, and how likely all other tokens are together. Both
predictions are looked at through these k + 1 classes, which never makes them differ more than they do. Blocks are known
by their tokens, in whatever order and from whichever data set they come.
What this gives up: 8 k bytes of disk for each token; a temperature, which one class for many tokens cannot have; states
inside the teacher; and what sets tokens apart that the teacher deems unlikely.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from regrow.artifacts.goal import Divergence
from regrow.engines.chunks import in_chunks
from regrow.engines.distil import checked_head, counting, predictions, read, targets
from regrow.engines.head import Head, at_a_time, final_states
from regrow.engines.objective import Answer
from regrow.engines.packed import learnt
from regrow.errors import SettingsError

CHUNK = 64  # blocks in a file

Say = Callable[[int], None]


@dataclass(slots=True)
class Kept:
    """Predictions for blocks of tokens, on disk: `k` tokens of each position, of the first `rows` of a vocabulary."""

    k: int
    rows: int
    teacher: str  # its fingerprint
    places: dict[bytes, tuple[Path, int]] = field(default_factory=dict)

    def add(self, blocks: Tensor, files: Sequence[Path]) -> None:
        """`files` hold the predictions for `blocks` (n, T), `CHUNK` in each."""
        for index, block in enumerate(blocks):
            self.places[_name(block)] = files[index // CHUNK], index % CHUNK

    def of(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (b, T, k) int64 and log chances (b, T, k + 1) fp32 for blocks `ids` (b, T); the last is the rest's.

        Raises `SettingsError` for a block that the teacher has not read.
        """
        found: tuple[list[Tensor], list[Tensor]] = [], []
        for block in ids:
            if (place := self.places.get(_name(block))) is None:
                raise SettingsError(
                    "a block of text that the teacher has not read",
                    "the blocks whose predictions are kept",
                    "keep what the teacher predicts for all of the text, or leave recover.distil.cache out",
                )
            with safe_open(place[0], "pt") as file:
                for name, several in zip(("ids", "logs"), found, strict=True):
                    several.append(file.get_slice(name)[place[1]])
        return torch.stack(found[0]).to(ids.device).long(), torch.stack(found[1]).to(ids.device)


def check_k(k: int, *vocabularies: int) -> None:
    """Raise `SettingsError` unless a token is left for the rest."""
    if k >= min(vocabularies):
        raise SettingsError(
            f"recover.distil.cache = {k:,} of a vocabulary of {min(vocabularies):,} tokens",
            f"fewer than {min(vocabularies):,}",
            "keep fewer, or leave it out: the teacher then predicts while the student learns",
        )


@torch.no_grad()
def keep(teacher: Any, blocks: Tensor, kept: Kept, folder: Path, *, batch: int, say: Say = lambda _: None) -> None:
    """Add to `kept` what `teacher` predicts for `blocks` (n, T) int64, `batch` of them in a pass; files go to `folder`.

    Raises `SettingsError` for a `k` that leaves no rest, `UnsupportedModel` for a head that is no plain linear.
    """
    head = checked_head(teacher.eval(), "teacher").first(kept.rows)
    check_k(kept.k, kept.rows)

    def make(rows: slice) -> dict[str, Tensor]:
        passes = torch.split(blocks[rows].long(), batch)
        found = [_likeliest(head, final_states(teacher, ids.to(teacher.device)), kept.k) for ids in passes]
        return {"ids": torch.cat([ids for ids, _ in found]), "logs": torch.cat([logs for _, logs in found])}

    kept.add(blocks, in_chunks(folder, len(blocks), CHUNK, make, say=say))


def coarse(logits: Tensor, ids: Tensor) -> Tensor:  # (n, k + 1) fp32
    """Log chances of the tokens `ids` (n, k), and of all others together, from logits (n, V)."""
    rest = logits.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)  # (n, 1)
    return torch.cat([logits.gather(-1, ids), rest], -1) - logits.logsumexp(-1, keepdim=True)


class FromKept:
    """The loss (model, batch) of the training loop: as `FromTeacher`, of the classes that are kept.

    `text` is the weight of the text's next token beside it.
    """

    def __init__(
        self, kept: Kept, divergence: Divergence, options: Mapping[str, Any] | None = None, *, text: float = 0.0
    ) -> None:
        self.kept, self.divergence, self.options, self.text = kept, divergence, dict(options or {}), text
        if self.options.get("temperature", 1) != 1:
            raise SettingsError(
                f"temperature {self.options['temperature']} of predictions that are kept",
                "1: the tokens that are one class cannot be tempered one by one",
                "leave recover.distil.cache or the temperature out",
            )
        how = "".join(f" {name}={value}" for name, value in sorted(self.options.items()))
        also = f" + {text:g} next token" if text else ""
        # what a resumed run must share
        self.__name__ = f"{divergence.name}{how}{also} from the {kept.k} likeliest tokens of {kept.teacher}"

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Answer:
        ids, mask = batch["input_ids"], learnt(batch)  # (b, T), (b, T - 1)
        tokens, logs = (counting(kept, mask) for kept in self.kept.of(ids))  # (n, k), (n, k + 1)
        states, head = read(model, ids, "student")
        ours, head = counting(states, mask), head.first(self.kept.rows)  # (n, C)

        def measure(logits: Tensor, piece: slice) -> Tensor:  # (p,)
            return self.divergence.measure(logs[piece], coarse(logits, tokens[piece]), **self.options)

        loss, parts = predictions(head, ours, targets(batch), measure, self.text)
        return (loss, parts) if len(parts) > 1 else loss


def _likeliest(head: Head, states: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Tokens (b, T, k) int32 and log chances (b, T, k + 1) fp32 from states (b, T, C); not all logits at a time."""
    flat = states.flatten(0, 1)  # (b * T, C)
    found = []
    for piece in torch.split(flat, max(1, at_a_time(flat.device) // len(head.weight))):
        logits = head.logits(piece)  # (p, V)
        ids = logits.topk(k, -1).indices  # (p, k)
        found.append((ids.int(), coarse(logits, ids)))
    tokens, logs = (torch.cat(several).view(*states.shape[:2], -1) for several in zip(*found, strict=True))
    return tokens, logs


def _name(block: Tensor) -> bytes:
    return hashlib.blake2b(block.long().cpu().numpy().tobytes(), digest_size=16).digest()
