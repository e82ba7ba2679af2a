"""SPP (arXiv:2405.16057) as a PEFT method: tunes a sparse model, and merges with every zero kept.

`SppConfig` goes where a `LoraConfig` would: `get_peft_model`, `save_pretrained`, `PeftModel.from_pretrained`. PEFT has
no door for methods of others, so importing this module adds one member to its list of types; import it (or
`from regrow import SppConfig`) before an SPP adapter is loaded. What this gives up: biases, embeddings, quantised
weights, and linears whose rows the rank does not divide.
"""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

from regrow.engines import spp_forward
from regrow.errors import SettingsError


def _enlist(name: str) -> Any:
    """A new member of PEFT's enumeration of methods, once a process."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    return member


SPP: Any = _enlist("SPP")


@dataclass
class SppConfig(PeftConfig):  # type: ignore[misc]
    """Settings of an SPP adapter; each linear trains r * n + m numbers."""

    r: int = field(default=16, metadata={"help": "rows of alpha; must divide the outputs of every linear"})
    spp_alpha: float = field(default=32.0, metadata={"help": "the adapter is scaled by spp_alpha / r"})
    spp_dropout: float = field(default=0.0, metadata={"help": "of the adapter's input; 0 lets the fastest form run"})
    form: str = field(default="auto", metadata={"help": "auto, checkpointed, lean or folded: equal results"})
    target_modules: list[str] | str | None = field(default="all-linear", metadata={"help": "as in LoRA"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "as in LoRA"})
    mask_hash: str | None = field(default=None, metadata={"help": "of the zeros it was trained on; set by itself"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SPP
        if isinstance(self.target_modules, list):
            self.target_modules = sorted(set(self.target_modules))
        for came, good, allowed in (
            (f"r = {self.r}", self.r >= 1, "a whole number, at least 1"),
            (f"spp_dropout = {self.spp_dropout}", 0 <= self.spp_dropout < 1, "0 <= spp_dropout < 1"),
            (f"form = {self.form}", self.form in ("auto", *spp_forward.FORMS), f"auto, {', '.join(spp_forward.FORMS)}"),
            (
                f"form = folded with spp_dropout = {self.spp_dropout}",
                self.form != "folded" or not self.spp_dropout,
                "no dropout with the folded form",
            ),
        ):
            if not good:
                raise SettingsError(f"SPP with {came}", allowed, "change it; rank 16 without dropout is usual")


class SppLayer(BaseTunerLayer):  # type: ignore[misc]
    """What PEFT needs to know of a layer with SPP adapters."""

    adapter_layer_names = ("spp_alpha", "spp_beta")
    other_param_names = ("r", "scaling", "dropout", "form")


class Linear(nn.Module, SppLayer):
    """A frozen sparse linear with any number of SPP adapters, which add up."""

    def __init__(self, base_layer: nn.Linear, adapter: str, name: str, config: SppConfig) -> None:
        super().__init__()
        self.base_layer, self.name = base_layer, name
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.form: dict[str, str] = {}
        self.spp_alpha: nn.ParameterDict = nn.ParameterDict({})  # (r, n)
        self.spp_beta: nn.ParameterDict = nn.ParameterDict({})  # (m,)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = adapter
        self.kept: Tensor | None = None  # (m, n) the weight before a merge
        self.update_layer(adapter, config)

    def update_layer(self, adapter: str, config: SppConfig) -> None:
        """Add an adapter: alpha uniform in +-1/sqrt(n), beta zero; r divides the rows."""
        rows, columns = self.base_layer.weight.shape
        self.r[adapter], self.scaling[adapter] = config.r, config.spp_alpha / config.r
        self.dropout[adapter], self.form[adapter] = config.spp_dropout, config.form
        alpha = torch.empty(config.r, columns)
        nn.init.kaiming_uniform_(alpha, a=math.sqrt(5))
        self.spp_alpha[adapter], self.spp_beta[adapter] = nn.Parameter(alpha), nn.Parameter(torch.zeros(rows))
        layer = cast(Any, self)  # PEFT is not typed
        layer._move_adapter_to_device_of_base_layer(adapter)
        layer.set_adapter(layer.active_adapters)

    def get_delta_weight(self, adapter: str) -> Tensor:  # (m, n)
        """What the adapter adds to the weight as it was before any merge."""
        weight = self.base_layer.weight if self.kept is None else self.kept.to(self.base_layer.weight.device)
        alpha, beta = self.spp_alpha[adapter], self.spp_beta[adapter]
        return spp_forward.delta(weight, alpha, beta, self.scaling[adapter])

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active adapters to the weight, by addition, so that a pruned zero stays +0."""
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.spp_alpha]
        if not names:
            return
        weight = self.base_layer.weight
        added = sum(self.get_delta_weight(name) for name in names)
        merged = (weight + added).to(weight.dtype) + 0.0
        if safe_merge and not bool(merged.isfinite().all()):
            raise ValueError(f"merging {', '.join(names)} into {self.name} gives weights that are not finite")
        self.kept = weight.detach().clone() if self.kept is None else self.kept
        weight.copy_(merged)
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """The weight as it was before the merge, bit for bit."""
        if self.kept is not None:
            self.base_layer.weight.copy_(self.kept)
        self.kept = None
        self.merged_adapters.clear()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., n) -> (..., m)"""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        active = [name for name in cast(Any, self).active_adapters if name in self.spp_alpha]
        if self.merged or not active:
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


def _outputs(module: Any) -> int:
    """Of a linear, with adapters or without."""
    return len(module.weight)


class SppModel(BaseTuner):  # type: ignore[misc]
    """A model whose linears carry SPP adapters."""

    prefix = "spp_"
    tuner_layer_cls = SppLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _create_and_replace(
        self,
        peft_config: SppConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if not isinstance(target, Linear | nn.Linear):
            raise SettingsError(f"SPP on {current_key}, a {type(target).__name__}", "linears", "leave it out")
        if _outputs(target) % peft_config.r:
            spp_forward.check_rank(peft_config.r, {current_key: _outputs(target), **self._all_outputs(peft_config)})
        if isinstance(target, Linear):
            target.update_layer(adapter_name, peft_config)
        else:
            module = Linear(target, adapter_name, current_key, peft_config)
            self._replace_module(parent, target_name, module, target)

    def _all_outputs(self, config: SppConfig) -> dict[str, int]:
        """Outputs of every linear that the adapter is for, by name."""
        return {
            name: _outputs(module)
            for name, module in self.model.named_modules()
            if isinstance(module, Linear | nn.Linear) and self._check_target_module_exists(config, name)
        }

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """The adapter remembers the zeros it was made for. Raises `SettingsError` on a model with others, or a rank
        that does not divide, and leaves the model as it was."""
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            config, found = self.peft_config[adapter_name], mask_hash(model, adapter_name)
            if config.mask_hash not in (None, found):
                raise SettingsError(
                    f"an SPP adapter trained on zeros {config.mask_hash}, loaded on a model with zeros {found}",
                    "the sparse model that it was trained on",
                    "load that model, or train the adapter anew",
                )
        except SettingsError:
            withdraw(model, adapter_name)
            raise
        self.peft_config[adapter_name] = copy.copy(config)  # the caller's may serve another model
        self.peft_config[adapter_name].mask_hash = found


def withdraw(model: nn.Module, adapter: str) -> None:
    """Take an adapter off, and what held it off every linear that has no other."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and adapter in module.spp_alpha:
            cast(Any, module).delete_adapter(adapter)
            if not module.spp_alpha:
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, module.base_layer)


def mask_hash(model: nn.Module, adapter: str) -> str:
    """16 hex digits of where the weights under an adapter are zero."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        if isinstance(module, Linear) and adapter in module.spp_alpha:
            weight = module.base_layer.weight if module.kept is None else module.kept
            digest.update(name.encode() + (weight == 0).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


register_peft_method(name="spp", config_cls=SppConfig, model_cls=SppModel)
