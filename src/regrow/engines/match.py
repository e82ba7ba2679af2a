"""States inside a student compared with those of its teacher: which of them, through which projection, how heavily.

Places are counted from the end, so that models of different depth meet where they do the same work. One projection
serves all of them and is thrown away after the training. What this gives up: layouts whose decoder has no `layers`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regrow.artifacts.goal import Likeness
from regrow.errors import SettingsError, UnsupportedModel

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

Heard = dict[str, Tensor]  # (b, T, C) each


@dataclass(frozen=True, slots=True)
class Match:
    """`places`: 0 is what the first block receives, n what the n-th block from the end gives (its queries, keys and
    values, where the likeness is of attention).

    `weight` of the mean over places; None: as much as the loss of logits has, in every pass anew (Minitron).
    """

    likeness: Likeness
    places: tuple[int, ...]
    weight: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        how = "".join(f" {name}={value}" for name, value in sorted(self.options.items()))
        heavy = "balanced" if self.weight is None else f"times {self.weight:g}"
        return f"{self.likeness.name}{how} at {', '.join(map(str, self.places))}, {heavy}"


class Matcher(nn.Module):
    """Means of a likeness over places, and the one projection that brings a student's states to the teacher's width.

    It begins as near to the identity as the widths allow, and there is none where they are equal.
    """

    def __init__(self, match: Match, student: Any, teacher: Any) -> None:
        super().__init__()
        self.match = match
        check_places(match, student, teacher)
        narrow, wide = (model.get_input_embeddings().weight.shape[1] for model in (student, teacher))
        self.projection: nn.Linear | None = None
        if match.likeness.of == "states" and narrow != wide:
            self.projection = nn.Linear(narrow, wide, bias=False)
            nn.init.eye_(self.projection.weight)

    def forward(self, theirs: Heard, ours: Heard, mask: Tensor | None) -> Tensor:  # () fp32
        """`mask` (b, T - 1): which positions count; None: all."""
        measure, options = self.match.likeness.measure, self.match.options
        found = []
        for place, mine in ours.items():
            brought = mine.float() if self.projection is None else self.projection(mine.float())
            each = measure(theirs[place].to(brought), brought, **options)  # (b, T)
            found.append(_mean(each, mask))
        return torch.stack(found).mean()

    @torch.no_grad()
    def size(self, theirs: Heard, mask: Tensor | None) -> Tensor:  # () fp32
        """The same for a student whose states are all zero: what a likeness is to be measured by."""
        measure, options = self.match.likeness.measure, self.match.options
        states = [state.float() for state in theirs.values()]
        return torch.stack([_mean(measure(x, torch.zeros_like(x), **options), mask) for x in states]).mean()


def _mean(each: Tensor, mask: Tensor | None) -> Tensor:
    """Of (b, T) at positions that count, `mask` (b, T - 1); 0 where none does."""
    return each.mean() if mask is None else each[:, :-1][mask].sum() / mask.sum().clamp_min(1)


def check_places(match: Match, student: Any, teacher: Any) -> None:
    """Raise `SettingsError` for a place that one of the models does not have and for heads that do not divide their
    widths, `UnsupportedModel` for other layouts."""
    check_depths(match.likeness, match.places, *(len(blocks_of(model)) for model in (student, teacher)))
    if match.likeness.of != "attention":
        return
    for model in (student, teacher):
        for place in match.places:
            block = blocks_of(model)[-place]
            weights = [getattr(_at(block, path), "weight", None) for path in QKV]
            found = [len(weight) for weight in weights if isinstance(weight, Tensor)]
            if len(found) < len(QKV):
                raise UnsupportedModel(
                    f"a {model.config.model_type} whose block {place} from the end has no {', '.join(QKV)}",
                    "queries, keys and values as three linears in every block that is compared",
                    "compare states by cosine or mse instead, or in other places",
                )
            check_heads(match, found)


def check_heads(match: Match, widths: Sequence[int]) -> None:
    """Raise `SettingsError` unless `heads` divides the widths of queries, keys and values."""
    heads = match.options.get("heads", 1)
    if any(width % heads for width in widths):
        numbers = " and ".join(str(width) for width in dict.fromkeys(widths))
        raise SettingsError(
            f"{heads} heads of relations among queries, keys and values of {numbers} numbers",
            f"divisors of {math.gcd(*widths)}",
            "name another number in likeness_options",
        )


def check_depths(likeness: Likeness, places: Sequence[int], *depths: int) -> None:
    """Raise `SettingsError` for a place that a model of one of these `depths` does not have."""
    attention, least = likeness.of == "attention", min(depths)
    for place in places:
        if not attention <= place <= least:
            raise SettingsError(
                f"states at place {place}",
                f"{'1' if attention else '0 (what the first block receives), or 1'} (the last block) to {least}",
                "name places that both models have",
            )


def blocks_of(model: Any) -> nn.ModuleList:
    """The decoder's blocks. Raises `UnsupportedModel`."""
    found = getattr(model.get_decoder(), "layers", None)
    if not isinstance(found, nn.ModuleList):
        raise UnsupportedModel(
            f"a {model.config.model_type}, whose blocks are not in `layers`",
            "a decoder with a list of blocks called `layers`",
            "train by logits alone",
        )
    return found


@contextmanager
def listening(model: Any, match: Match) -> Iterator[Heard]:
    """What goes by at the places of `match` in the next forward pass of a causal model, with its gradients."""
    heard: Heard = {}
    blocks = blocks_of(model)
    handles = []

    def listen(module: nn.Module, key: str) -> None:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            heard.setdefault(key, out[0] if isinstance(out, tuple) else out)  # a recomputed pass comes too late

        handles.append(module.register_forward_hook(hook))

    def enter(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        heard.setdefault("0", given[0] if given else named["hidden_states"])

    for place in match.places:
        if place == 0:
            handles.append(blocks[0].register_forward_pre_hook(enter, with_kwargs=True))
        elif match.likeness.of == "attention":
            for path in QKV:
                module = _at(blocks[-place], path)
                assert module is not None
                listen(module, f"{place} {path}")
        else:
            listen(blocks[-place], str(place))
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _at(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = getattr(module, name, None)  # type: ignore[assignment]
    return module
