"""Text of several domains in one training: blocks drawn by weights, and the loss of a model on each of them.

What this gives up: a pass over the held-out text less; each domain's loss is of the text's next token, also where a
student learns from a teacher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regrow.engines.mixture import Mixture, Weights
from regrow.engines.objective import Loss
from regrow.engines.packed import Packed, Stream, order, rounds
from regrow.engines.train_settings import TrainSettings
from regrow.errors import SettingsError, TextError


def joined(parts: Sequence[Packed]) -> Packed:
    """Blocks of equal length of several domains, of all of which some tokens are learnt, or all."""
    domain = torch.cat([torch.full((len(part.ids),), number) for number, part in enumerate(parts)])  # (n,) int64
    learn = [part.learn for part in parts if part.learn is not None]
    return Packed(torch.cat([part.ids for part in parts]), torch.cat(learn) if learn else None, domain)


def check_domains(mixture: Mixture, text: Packed, heldout: Packed | None) -> None:
    """Raise `TextError` unless there are blocks of every domain, `SettingsError` where nothing says how to balance."""
    for what, packed in (("training text", text), ("held-out text", heldout)):
        found = set() if packed is None or packed.domain is None else set(packed.domain.tolist())
        if found != set(range(len(mixture.names))) and (packed is not None or mixture.every):
            raise TextError(
                f"{what} with blocks of domains {sorted(found)}",
                f"of each of {len(mixture.names)}, and no other",
                "join what is read of every domain, in the order of their names",
            )
    if mixture.every and not mixture.references:
        raise SettingsError(
            "weights that are balanced, and no losses to compare with",
            "references: one loss for each domain",
            "measure them on the model that all began with, or on the teacher",
        )


class Drawn(Stream):
    """All sequences of a run: each one's domain is drawn by the weights of its step, its block is the next of that
    domain, whose order is its own. Drawn a step at a time, when its first sequence is asked for."""

    def __init__(self, packed: Packed, weights: Weights, steps: int, settings: TrainSettings) -> None:
        assert packed.domain is not None
        self.packed, self.weights, self.steps, self.batch = packed, weights, steps, settings.batch
        self.sequence, self.targets = [], packed.targets()  # (n,)
        self.usual: list[Tensor] = []  # () each, of a step
        self.chance = torch.Generator().manual_seed(settings.seed)
        self.blocks = [(packed.domain == d).nonzero()[:, 0].tolist() for d in range(len(weights.mixture.names))]
        self.turns = [rounds(len(own), settings.seed + 1 + d) for d, own in enumerate(self.blocks)]

    def __len__(self) -> int:
        return self.steps * self.batch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        while len(self.sequence) <= index:
            self._draw()
        return super().__getitem__(index)

    def _draw(self) -> None:
        chances = torch.tensor(self.weights.at(len(self.usual) + 1), dtype=torch.float64)  # (domains,)
        drawn = torch.multinomial(chances, self.batch, replacement=True, generator=self.chance).tolist()
        here = [self.blocks[domain][next(self.turns[domain])] for domain in drawn]
        self.sequence += here
        self.usual.append(self.targets[here].float().mean())


def stream_of(text: Packed, settings: TrainSettings, steps: int, weights: Weights | None) -> Stream:
    """What a run reads: by weights where there are any."""
    if weights is not None:
        return Drawn(text, weights, steps, settings)
    return Stream(text, order(len(text.ids), steps * settings.batch, settings.seed), settings.batch)


@torch.no_grad()
def mean_loss(model: nn.Module, loss: Loss, text: Packed, size: int, device: torch.device) -> float:
    """Mean over what is learnt of all blocks, without dropout, `size` blocks at a time."""
    mode, total = model.training, 0.0
    model.eval()
    targets = text.targets()  # (n,)
    for start in range(0, len(targets), size):
        rows = slice(start, start + size)
        batch = {name: value.to(device) for name, value in text.batch(rows).items()}
        answer = loss(model, batch)
        total += float(answer[0] if isinstance(answer, tuple) else answer) * int(targets[rows].sum())
    model.train(mode)
    return total / int(targets.sum())


def by_domain(model: nn.Module, loss: Loss, text: Packed, size: int, device: torch.device) -> list[float]:
    """`mean_loss` of each domain of `text`."""
    assert text.domain is not None
    count = int(text.domain.max()) + 1
    return [mean_loss(model, loss, text[text.domain == domain], size, device) for domain in range(count)]
