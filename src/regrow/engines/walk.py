"""Runs the model over text once and collects what criteria ask for; the only file that sets statistics hooks.

Activations are reduced the moment they appear: a sequence becomes one number a channel, so memory does not grow with
text, and all axes come out of a single forward pass. What this gives up: anything that needs raw activations twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regrow.artifacts.family import Unit
from regrow.artifacts.shape import Anatomy
from regrow.artifacts.sight import Moments, Reduction
from regrow.errors import BrokenModel

Progress = Callable[[int, int], None]  # (sequences done, sequences in all)
Site = tuple[Unit, int, str]  # what is read, in which layer (-1: none), at which module


@dataclass(slots=True)
class _Sums:
    total: Tensor  # (n,) fp64
    squares: Tensor  # (n,) fp64


@dataclass(slots=True)
class Seen:
    """What one pass collected. `flow[reduction][site]` is laid out flat, one entry a channel."""

    sequences: int = 0
    tokens: int = 0
    flow: dict[Reduction, dict[Site, _Sums]] = field(default_factory=dict)
    angles: Tensor | None = None  # (L+1, L+1) fp64, sum over tokens

    def moments(self, reduction: Reduction, site: Site, width: int) -> Moments:
        """The stream at a site as (units, width)."""
        sums = self.flow[reduction][site]
        return Moments(sums.total.view(-1, width), sums.squares.view(-1, width), self.sequences)

    def cosines(self) -> Tensor:
        """(L+1, L+1) mean cosine between the streams entering layers i and j (L: leaving the last)."""
        assert self.angles is not None
        return (self.angles / self.tokens).float()


def flow_sites(anatomy: Anatomy, units: Sequence[Unit]) -> list[tuple[Site, bool]]:
    """Where each unit is read: (site, True when it is the module's input)."""
    family = anatomy.family
    sites: list[tuple[Site, bool]] = []
    for layer in range(anatomy.sizes["L"]):
        prefix = f"{family.layers}.{layer}."
        for unit in units:
            if unit == "neuron":
                sites.append(((unit, layer, prefix + family.mlp.site), True))
            elif unit in ("group", "head"):
                sites.append(((unit, layer, prefix + family.attention.site), True))
            elif unit == "channel":
                norms = [c.path for c in family.cuts["channel"] if c.role == "gain"]
                norms = norms or [c.path for c in family.cuts["channel"] if c.role == "span"]
                sites += [((unit, layer, prefix + path), False) for path in norms]
    return sites


@torch.inference_mode()
def observe(
    model: nn.Module,
    anatomy: Anatomy,
    blocks: Tensor,
    *,
    flow: dict[Reduction, tuple[Unit, ...]],
    angles: bool = False,
    batch: int = 1,
    progress: Progress | None = None,
) -> Seen:
    """One forward pass over `blocks` (n, T) int64, read at the sites of the units in `flow`.

    Raises `BrokenModel` naming the module when a statistic is not finite.
    """
    seen = Seen(flow={reduction: {} for reduction in flow})
    stream: list[Tensor] = []  # inputs of the layers and output of the last, of the batch under way; (b*T, d) unit rows
    with _hooks(model, anatomy, seen, flow, stream if angles else None):
        for part in torch.split(blocks, batch):
            body(model)(input_ids=part.to(_device(model)), use_cache=False)
            seen.sequences += len(part)
            seen.tokens += part.numel()
            if angles:
                rows = torch.stack(stream).flatten(1)  # (L+1, b*T*d)
                seen.angles = (rows @ rows.T).cpu().double() + (0 if seen.angles is None else seen.angles)
                stream.clear()
            if progress is not None:
                progress(seen.sequences, len(blocks))
    for sites in seen.flow.values():
        for (_, _, path), sums in sites.items():
            check_finite(f"activations at {path}", sums.squares)
    if seen.angles is not None:
        streams = [f"entering {anatomy.family.layers}.{i}" for i in range(anatomy.sizes["L"])] + [
            "leaving the last layer"
        ]
        for where, length in zip(streams, seen.angles.diagonal(), strict=True):
            check_finite(f"activations {where}", length)
    return seen


def check_finite(what: str, values: Tensor) -> None:
    """Raise `BrokenModel` naming what is not finite."""
    if not bool(values.isfinite().all()):
        raise BrokenModel(
            f"{what} are not finite",
            "finite numbers on the calibration text",
            "compute in fp32 (--dtype fp32), or look for outliers in the weights of this module",
        )


def body(model: nn.Module) -> Any:
    """The model without its head: statistics need no logits."""
    return model.get_decoder()  # type: ignore[operator]


@contextmanager
def _hooks(
    model: nn.Module,
    anatomy: Anatomy,
    seen: Seen,
    flow: dict[Reduction, tuple[Unit, ...]],
    stream: list[Tensor] | None,
) -> Iterator[None]:
    handles: list[Any] = []
    try:
        readers: dict[tuple[str, bool], list[tuple[Reduction, Site]]] = {}
        for reduction, units in flow.items():
            for site, at_input in flow_sites(anatomy, units):
                readers.setdefault((site[2], at_input), []).append((reduction, site))
        for (path, at_input), wanted in readers.items():
            module = model.get_submodule(path)
            if at_input:
                handles.append(module.register_forward_pre_hook(partial(_read_input, seen, wanted)))
            else:
                handles.append(module.register_forward_hook(partial(_read_output, seen, wanted)))
        if stream is not None:
            layers = list(model.get_submodule(anatomy.family.layers).children())
            for layer in layers:
                handles.append(layer.register_forward_pre_hook(partial(_keep_input, stream), with_kwargs=True))
            handles.append(layers[-1].register_forward_hook(partial(_keep_output, stream)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _read_input(seen: Seen, wanted: list[tuple[Reduction, Site]], _: nn.Module, args: tuple[Tensor, ...]) -> None:
    _add(seen, wanted, args[0])


def _read_output(
    seen: Seen, wanted: list[tuple[Reduction, Site]], _: nn.Module, __: tuple[Tensor, ...], output: Tensor
) -> None:
    _add(seen, wanted, output)


def _add(seen: Seen, wanted: list[tuple[Reduction, Site]], x: Tensor) -> None:
    """Reduce a batch of sequences (b, T, n) and add it up; the same reduction at the same place is done once."""
    done: dict[Reduction, tuple[Tensor, Tensor]] = {}
    for reduction, site in wanted:
        if reduction not in done:
            each = _over_sequence(x, reduction).cpu().double()  # (b, n)
            done[reduction] = each.sum(0), each.square().sum(0)
        total, squares = done[reduction]
        sums = seen.flow[reduction].setdefault(site, _Sums(torch.zeros_like(total), torch.zeros_like(total)))
        sums.total += total
        sums.squares += squares


def _over_sequence(x: Tensor, reduction: Reduction) -> Tensor:
    """(b, T, n) -> (b, n) at least fp32: sums over a sequence overflow in fp16 and tie in bf16."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if reduction == "var":
        return x.to(wide).var(1, correction=0)
    norm: Tensor = torch.linalg.vector_norm(x, 1 if reduction == "mean" else 2, dim=1, dtype=wide)
    return norm / x.shape[1] if reduction == "mean" else norm


def _keep_input(stream: list[Tensor], _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
    stream.append(_unit_rows(args[0] if args else kwargs["hidden_states"]))


def _keep_output(stream: list[Tensor], _: nn.Module, __: tuple[Tensor, ...], output: Any) -> None:
    stream.append(_unit_rows(output[0] if isinstance(output, tuple) else output))


def _unit_rows(x: Tensor) -> Tensor:
    """(b, T, d) -> (b*T, d) with rows of length one."""
    return torch.nn.functional.normalize(x.flatten(0, 1).float(), dim=-1)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
