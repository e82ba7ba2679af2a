"""What carries SPP adapters: linears, and stacks of experts that are one parameter each; any number, which add up.

Weights are frozen; factors (alpha, beta) belong to one weight and one adapter. What this gives up: dropout on experts,
since nobody outside sees what one of them reads, and there the cheaper forms: a stack is made anew in both passes.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Protocol, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from regrow.engines import spp_forward
from regrow.engines.inputs import FUSED


class Settings(Protocol):
    """What a layer must know of an adapter."""

    r: int
    spp_alpha: float
    spp_dropout: float
    form: str


class SppLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """Frozen weights of a base layer, and adapters of each."""

    adapter_layer_names: tuple[str, ...]
    parts: ClassVar[dict[str, tuple[str, str]]]
    """Name of a weight (..., m, n) -> names of its factors, alpha (..., r, n) and beta (..., m)."""
    other_param_names = ("r", "scaling", "dropout", "form")

    def __init__(self, base_layer: nn.Module, adapter: str, name: str, config: Settings) -> None:
        super().__init__()
        self.base_layer, self.name = base_layer, name
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.form: dict[str, str] = {}
        for factor in self.adapter_layer_names:
            setattr(self, factor, nn.ParameterDict({}))
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = adapter
        self.kept: dict[str, Tensor] = {}  # weights as they were before a merge
        self.update_layer(adapter, config)

    def update_layer(self, adapter: str, config: Settings) -> None:
        """Add an adapter: alpha uniform in +-1/sqrt(n), beta zero; r divides the rows."""
        self.r[adapter], self.scaling[adapter] = config.r, config.spp_alpha / config.r
        self.dropout[adapter], self.form[adapter] = config.spp_dropout, config.form
        for part, names in self.parts.items():
            *stack, rows, columns = self.weight_of(part).shape
            alpha = torch.empty(*stack, config.r, columns)
            nn.init.kaiming_uniform_(alpha.view(-1, columns), a=math.sqrt(5))
            for name, start in zip(names, (alpha, torch.zeros(*stack, rows)), strict=True):
                getattr(self, name)[adapter] = nn.Parameter(start.to(self.weight_of(part)))
        cast(Any, self).set_adapter(cast(Any, self).active_adapters)  # PEFT is not typed

    def weight_of(self, part: str) -> Tensor:  # (..., m, n)
        return cast(Tensor, getattr(self.base_layer, part))

    def original(self, part: str) -> Tensor:  # (..., m, n)
        """The weight before any merge."""
        weight = self.weight_of(part)
        return self.kept[part].to(weight.device) if part in self.kept else weight

    def get_delta_weight(self, adapter: str, part: str = "weight") -> Tensor:  # (..., m, n)
        """What the adapter adds to the weight as it was before any merge."""
        alpha, beta = (getattr(self, name)[adapter] for name in self.parts[part])
        return spp_forward.delta(self.original(part), alpha, beta, self.scaling[adapter])

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active adapters to the weights, by addition, so that a pruned zero stays +0."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.r]
        if not names:
            return
        merged = {part: self.with_adapters(part, names) + 0.0 for part in self.parts}
        if safe_merge and not all(bool(weight.isfinite().all()) for weight in merged.values()):
            raise ValueError(f"merging {', '.join(names)} into {self.name} gives weights that are not finite")
        for part, weight in merged.items():
            if part not in self.kept:
                self.kept[part] = self.weight_of(part).detach().clone()
            self.weight_of(part).copy_(weight)
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """The weights as they were before the merge, bit for bit."""
        for part, weight in self.kept.items():
            self.weight_of(part).copy_(weight)
        self.kept.clear()
        self.merged_adapters.clear()

    def with_adapters(self, part: str, names: list[str]) -> Tensor:  # (..., m, n)
        """The weight as it is, and what adapters add, rounded to its type."""
        weight = self.weight_of(part)
        added = self.get_delta_weight(names[0], part)
        for name in names[1:]:
            added = added + self.get_delta_weight(name, part)
        return (weight + added).to(weight.dtype)

    def at_work(self) -> list[str]:
        """Adapters that the base layer must run with; what is switched off is unmerged too."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        return [] if self.merged else [name for name in cast(Any, self).active_adapters if name in self.r]


class Linear(SppLayer):
    """A frozen sparse linear."""

    base_layer: nn.Linear
    spp_alpha: nn.ParameterDict  # (r, n)
    spp_beta: nn.ParameterDict  # (m,)
    parts: ClassVar[dict[str, tuple[str, str]]] = {"weight": ("spp_alpha", "spp_beta")}
    adapter_layer_names = ("spp_alpha", "spp_beta")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., n) -> (..., m)"""
        active = self.at_work()
        if not active:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        y = self._adapted(x, active[0], self.base_layer.bias)
        for name in active[1:]:  # each adds its own residual to the same linear
            y = y + self._adapted(x, name, None) - nn.functional.linear(x, self.base_layer.weight)
        return y

    def _adapted(self, x: Tensor, name: str, bias: Tensor | None) -> Tensor:
        dropout = self.dropout[name] if self.training else 0.0
        form = self.form[name]
        if form == "auto":
            form = spp_forward.choose(dropout, x.numel() // x.shape[-1], self.base_layer.weight)
        dropped = nn.functional.dropout(x, dropout) if dropout else x
        weight, alpha, beta = self.base_layer.weight, self.spp_alpha[name], self.spp_beta[name]
        if form != "folded" and not torch.is_autocast_enabled(x.device.type):
            alpha, beta = alpha.to(x.dtype), beta.to(x.dtype)
        return spp_forward.FORMS[form](x, dropped, weight, bias, alpha, beta, self.scaling[name])


class Experts(SppLayer):
    """Frozen experts; of a stack (E, m, n) every matrix has factors of its own, gate and up of an expert are one."""

    parts: ClassVar[dict[str, tuple[str, str]]] = {part: (f"spp_alpha_{part}", f"spp_beta_{part}") for part in FUSED}
    adapter_layer_names = tuple(f"spp_{factor}_{part}" for part in FUSED for factor in ("alpha", "beta"))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the base layer's; stacks with their adapters are made for this pass, and again for the one back."""
        active = self.at_work()
        if not active:
            return self.base_layer(*args, **kwargs)  # type: ignore[no-any-return]

        def run(*args: Any, **kwargs: Any) -> Tensor:
            stacks = {part: self.with_adapters(part, active) for part in self.parts}
            return cast(Tensor, functional_call(self.base_layer, stacks, args, kwargs))

        return cast(Tensor, checkpoint(run, *args, use_reentrant=False, **kwargs))
