"""What the linears of one decoder block read: which there are, and statistics of their inputs, each input once.

Linears that read the same tensor (q, k, v; gate, up) share one reading. Fused experts, three-dimensional parameters,
are read expert by expert on the tokens the router sent there. What this gives up: raw inputs; they are reduced as they
come.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from regrow.artifacts.family import Family
from regrow.artifacts.linear import Inputs
from regrow.engines.walk import check_finite
from regrow.errors import UnsupportedModel

FUSED = ("gate_up_proj", "down_proj")  # parameters (experts, outputs, inputs) of a fused experts module
STRIPE = 192  # columns of a Gram matrix that are computed together: only what lies on or above the diagonal
ROWS = 1024  # of a batch, squared at a time: the norm over rows is ten times slower than squares and their sum
SIZES = 64  # numbers of tokens of an expert are rounded up to multiples of it
SAME = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of the outputs' scale: how far our own run through the experts and the model's may differ; 1e-4 in wider types."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight matrix inside a block that may become sparse."""

    name: str  # in the whole model; of an expert, with its index in brackets
    weight: Tensor  # (m, n) a view into the parameter
    site: str  # whose reading it has


class Reading:
    """Sums over the inputs of one site: of squares always, of means and products when asked."""

    def __init__(self, channels: int, sees: str, device: torch.device) -> None:
        self.wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no fp64
        wide = partial(torch.zeros, channels, dtype=self.wide, device=device)
        self.tokens = 0
        self.squares, self.mean, self.spread = wide(), wide(), wide()  # (n,)
        self.moments = sees in ("moments", "all")
        gram = sees in ("gram", "all")
        self.products = torch.zeros(channels, channels, device=device) if gram else None  # (n, n) upper stripes
        self.cross: Tensor | None = None  # (n, n) fp32 sum of x_dense x^T

    def add(self, x: Tensor, dense: Tensor | None = None, *, rows: int | None = None) -> None:
        """`x` (N, n) in any float type; sums of squares are fp64, other sums fp32 within a batch.

        `dense` (N, n) is what the same site reads in the dense model. Behind the first `rows` of `x` there is nothing
        but zeros.
        """
        rows = len(x) if rows is None else rows
        if not rows:
            return
        x = x.float()
        if dense is not None:
            self.cross = x.new_zeros(x.shape[1], x.shape[1]) if self.cross is None else self.cross
            self.cross.addmm_(dense.float().T, x)
        if self.products is not None:
            for a, part in zip(range(0, x.shape[1], STRIPE), _stripes(self.products), strict=True):
                part.addmm_(x[:, a : a + STRIPE].T, x[:, a:])
        else:
            for part in torch.split(x, ROWS):
                self.squares += part.square().sum(0, dtype=self.wide)
        if self.moments:  # Chan's formula: the means of two batches differ
            variance, mean = (v.to(self.wide) for v in torch.var_mean(x[:rows], 0, correction=0))
            total, gap = self.tokens + rows, mean - self.mean
            self.spread += rows * (variance + gap.square() * self.tokens / total)
            self.mean += gap * rows / total
        self.tokens += rows

    def take_gram(self) -> Tensor:  # (n, n) fp32
        """The whole matrix, mirrored in place; the squares are kept, the reading is used up."""
        assert self.products is not None
        gram, self.products = self.products, None
        self.squares = gram.diagonal().to(self.wide)
        for a in range(0, len(gram), STRIPE):
            b = a + STRIPE
            gram[b:, a:b] = gram[a:b, b:].T
        return gram

    def tensors(self) -> dict[str, Tensor]:
        """Everything that was added up; of the products the upper stripes, one after the other."""
        found = {"tokens": torch.tensor(self.tokens), "squares": self.squares, "mean": self.mean, "spread": self.spread}
        if self.products is not None:
            found["squares"] = self.products.diagonal().to(self.wide)
            found["products"] = torch.cat([part.flatten() for part in _stripes(self.products)])
        return found

    @classmethod
    def made_of(cls, tensors: dict[str, Tensor], sees: str) -> Reading:
        """The reading that gave `tensors`, as far as `sees` asks."""
        squares = tensors["squares"]
        made = cls(len(squares), sees, squares.device)
        made.tokens = int(tensors["tokens"])
        made.squares, made.mean, made.spread = squares, tensors["mean"], tensors["spread"]
        if made.products is not None:
            parts = list(_stripes(made.products))
            flat = torch.split(tensors["products"], [part.numel() for part in parts])
            for part, values in zip(parts, flat, strict=True):
                part.copy_(values.view_as(part))
        return made

    def inputs(self, sequences: int) -> Inputs:
        return Inputs(
            squares=(self.squares / sequences).float(),
            sums=(self.mean * self.tokens / sequences).float(),
            variance=(self.spread / max(1, self.tokens)).float(),
        )


def _stripes(square: Tensor) -> Iterator[Tensor]:
    """Views of rows of `square` (n, n), each from its first diagonal entry on."""
    return (square[a : a + STRIPE, a:] for a in range(0, len(square), STRIPE))


def named(name: str, ends: Sequence[str]) -> bool:
    """Whether a module is named by its end: `o_proj`, `layers.0.mlp.down_proj`; an expert by its stack's."""
    plain = re.sub(r"\[\d+\]$", "", name)
    return any(f".{plain}".endswith(f".{end}") for end in ends)


def outside(model: Any, family: Family, also: Sequence[str]) -> list[Matrix]:
    """The embedding and a head of its own, when they are named."""
    paths = [path for path in (family.embed, family.head) if named(path, also)]
    return [Matrix(path, model.get_submodule(path).weight, path) for path in paths]


def matrices(block: nn.Module, prefix: str, also: Sequence[str] = ()) -> list[Matrix]:
    """Every linear of a block, and every expert of fused ones; of other matrices, such as routers, those named."""
    found = []
    for path, module in block.named_modules():
        name = f"{prefix}.{path}"
        if isinstance(module, nn.Linear):
            found.append(Matrix(name, module.weight, path))
        elif is_experts(module):
            for part in FUSED:
                stack = getattr(module, part)  # (E, m, n)
                found += [Matrix(f"{name}.{part}[{e}]", stack[e], f"{path}.{part}[{e}]") for e in range(len(stack))]
        elif _is_matrix(module) and named(name, also):
            found.append(Matrix(name, cast(Tensor, module.weight), path))
    return found


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2


def is_experts(module: nn.Module) -> bool:
    return all(
        isinstance(getattr(module, part, None), nn.Parameter) and getattr(module, part).dim() == 3 for part in FUSED
    )


class Observer:
    """Reads the linears of a block whenever it runs, by site; linears with one input share one object.

    `sees` is `inputs`, `moments`, `gram` or `all`; `sites` are read alone when they are given. With `routed`, inputs of
    an expert are weighted by its router. A run under `remembering` is not counted: its inputs are kept as what the
    dense model reads, for the next run.
    """

    def __init__(self, block: nn.Module, sees: str, routed: bool = False, sites: Collection[str] | None = None) -> None:
        self.block, self.sees, self.routed, self.sites = block, sees, routed, sites
        self.readings: dict[str, Reading] = {}
        self.fresh: dict[int, tuple[Tensor, str]] = {}  # inputs of this run, kept so that no address is used twice
        self.dense: dict[str, Tensor] = {}
        self.remembers = False
        self.handles: list[Any] = []

    def __enter__(self) -> Observer:
        for path, module in self.block.named_modules():
            if isinstance(module, nn.Linear) or (self.sites is not None and _is_matrix(module)):
                if self.sites is None or path in self.sites:
                    self.handles.append(module.register_forward_pre_hook(partial(self._linear, path)))
            elif is_experts(module) and (self.sites is None or any(s.startswith(f"{path}.") for s in self.sites)):
                self.handles.append(module.register_forward_hook(partial(self._experts, path)))
        self.handles.append(self.block.register_forward_hook(self._end))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    @contextmanager
    def remembering(self) -> Iterator[None]:
        self.remembers = True
        try:
            yield
        finally:
            self.remembers = False

    def _of(self, site: str, x: Tensor) -> Reading:
        if site not in self.readings:
            self.readings[site] = Reading(x.shape[-1], self.sees, x.device)
        return self.readings[site]

    def _linear(self, site: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if id(x) in self.fresh:
            leader = self.fresh[id(x)][1]
            if not self.remembers:
                self.readings[site] = self.readings[leader]
            return
        self.fresh[id(x)] = (x, site)
        if self.remembers:
            self.dense[site] = x.flatten(0, -2)
        else:
            self._of(site, x).add(x.flatten(0, -2), self.dense.pop(site, None))

    def _experts(self, site: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not self.remembers:
            _read_experts(
                module,
                args,
                output,
                self.routed,
                lambda part, e, x, rows: self._of(f"{site}.{part}[{e}]", x).add(x, rows=rows),
            )

    def _end(self, *_: object) -> None:
        self.fresh.clear()


def _read_experts(
    module: Any, args: tuple[Tensor, ...], output: Tensor, routed: bool, take: Callable[[str, int, Tensor, int], None]
) -> None:
    """What each expert's two matrices read, by a run of our own that must end where the module's did.

    Rows of zeros are added to its tokens: libraries keep a kernel for every number of rows that they have met.
    """
    x, chosen, weights = args  # (N, d), (N, k), (N, k)
    found = torch.zeros_like(output)
    for e in range(len(module.gate_up_proj)):
        tokens, place = torch.where(chosen == e)
        count, more = len(tokens), (0, 0, 0, -len(tokens) % SIZES)
        router = pad(weights[tokens, place, None].to(x.dtype), more)  # (N_e and more, 1)
        inner = pad(x[tokens], more)  # (N_e and more, d)
        gate, up = nn.functional.linear(inner, module.gate_up_proj[e]).chunk(2, -1)
        middle = module.act_fn(gate) * up  # (N_e and more, f)
        found.index_add_(0, tokens, (nn.functional.linear(middle, module.down_proj[e]) * router)[:count])
        take(FUSED[0], e, inner * router if routed else inner, count)
        take(FUSED[1], e, middle * router if routed else middle, count)
    check_finite(f"outputs of {type(module).__name__}", output)
    if not (found - output).abs().max() <= SAME.get(output.dtype, 1e-4) * output.abs().max():
        raise UnsupportedModel(
            f"{type(module).__name__} computes something else than gated experts",
            "experts as in Mixtral and Qwen3-MoE: down(act(gate x) * up x), weighted by the router",
            "leave the experts dense, or report the model type",
        )
