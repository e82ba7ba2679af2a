"""SPP (arXiv:2405.16057) as a PEFT method: tunes a sparse model, and merges with every zero kept.

`SppConfig` goes where a `LoraConfig` would: `get_peft_model`, `save_pretrained`, `PeftModel.from_pretrained`. PEFT has
no door for methods of others, so importing this module adds one member to its list of types; import it (or
`from regrow import SppConfig`) before an SPP adapter is loaded. Experts that are one parameter are named by their
module (`experts`). What this gives up: biases, embeddings, quantised weights, and rows that the rank does not divide.
"""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper, register_peft_method
from peft.utils.peft_types import PeftType
from torch import nn

from regrow.engines import spp_forward
from regrow.engines.inputs import FUSED, is_experts
from regrow.engines.spp_layers import Experts, Linear, SppLayer
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
TINY = 129.5 * 2.0**-24  # fp16 and bf16 both round what is below down, and what is not up: their steps are equal here


@dataclass
class SppConfig(PeftConfig):  # type: ignore[misc]
    """Settings of an SPP adapter; each linear trains r * n + m numbers."""

    r: int = field(default=16, metadata={"help": "rows of alpha; must divide the outputs of every linear"})
    spp_alpha: float = field(default=32.0, metadata={"help": "the adapter is scaled by spp_alpha / r"})
    spp_dropout: float = field(default=0.0, metadata={"help": "of the adapter's input; 0 lets the fastest form run"})
    form: str = field(default="auto", metadata={"help": "auto, checkpointed, lean or folded: equal results"})
    target_modules: list[str] | str | None = field(default="all-linear", metadata={"help": "as in LoRA"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "as in LoRA"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "as in LoRA"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "as in LoRA"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "as in LoRA: trained whole, and saved"})
    mask_hash: str | None = field(default=None, metadata={"help": "of the zeros it was trained on; set by itself"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SPP
        if isinstance(self.target_modules, list):
            self.target_modules = sorted(set(self.target_modules))
        for came, good, allowed in (
            (f"r = {self.r!r}", type(self.r) is int and self.r >= 1, "a whole number, at least 1"),
            (f"spp_alpha = {self.spp_alpha}", 0 < self.spp_alpha < math.inf, "a number above 0"),
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


def check_dropout(module: nn.Module, name: str, dropout: float) -> None:
    """Raise `SettingsError` where an adapter cannot drop what it reads: in a stack of experts."""
    if dropout and not isinstance(module, Linear | nn.Linear):
        raise SettingsError(
            f"SPP with dropout {dropout} on {name}, a stack of experts",
            "no dropout there",
            "set it to 0, or leave the experts out",
        )


def outputs(module: nn.Module, name: str) -> dict[str, int]:
    """Rows of every matrix that adapters of a module would go on, with some or without, by name; {} of other modules.

    Experts in one stack have equal rows.
    """
    base = module.base_layer if isinstance(module, SppLayer) else module
    if isinstance(base, nn.Linear):  # quantised ones, or in pieces elsewhere, hold something else
        whole = base.weight.is_floating_point() and base.weight.shape == (base.out_features, base.in_features)
        return {name: base.out_features} if whole else {}
    return {f"{name}.{part}": getattr(base, part).shape[-2] for part in FUSED} if is_experts(base) else {}


class SppModel(BaseTuner):  # type: ignore[misc]
    """A model whose linears and experts carry SPP adapters."""

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
        rows = outputs(target, current_key)
        if not rows:
            what = f"SPP on {current_key}, a {type(target).__name__}"
            allowed = "linears whose weights are floating point and whole, and stacks of experts"
            raise SettingsError(what, allowed, "leave it out, or load the model as it was before it was quantised")
        if any(count % peft_config.r for count in rows.values()):
            spp_forward.check_rank(peft_config.r, {**rows, **self._all_outputs(peft_config)})
        check_dropout(target, current_key, peft_config.spp_dropout)
        if isinstance(target, SppLayer):
            target.update_layer(adapter_name, peft_config)
        else:
            kind = Linear if isinstance(target, nn.Linear) else Experts
            self._replace_module(parent, target_name, kind(target, adapter_name, current_key, peft_config), target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:  # noqa: ARG002
        """Adapters are on the device of their weights already, and a base layer that comes back has its weights."""
        setattr(parent, child_name, new_module)

    def _all_outputs(self, config: SppConfig) -> dict[str, int]:
        """Outputs of everything that the adapter is for, by name."""
        modules = ((n, m) for n, m in self.model.named_modules() if self._check_target_module_exists(config, n))
        return {part: rows for name, module in modules for part, rows in outputs(module, name).items()}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """The adapter remembers the zeros it was made for. Raises `SettingsError` on a model with others, or a rank
        that does not divide, and leaves the model as it was."""
        asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        if any(parameter.is_meta for parameter, _ in asked):
            raise SettingsError(
                "SPP on a model whose weights are not loaded (they are on the meta device)",
                "a model in memory: an adapter remembers where its weights are zero",
                "load it on a CPU or a GPU first",
            )
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            config, found = self.peft_config[adapter_name], mask_hash(model, adapter_name)
            if config.mask_hash not in (None, found):
                raise SettingsError(
                    f"an SPP adapter trained on zeros {config.mask_hash}, loaded on a model with zeros {found}",
                    "the sparse model that it was trained on",
                    "load that model, or train the adapter anew",
                )
        except BaseException:
            withdraw(model, adapter_name)
            for parameter, trains in asked:
                parameter.requires_grad_(trains)
            raise
        self.peft_config[adapter_name] = copy.copy(config)  # the caller's may serve another model
        self.peft_config[adapter_name].mask_hash = found


def withdraw(model: nn.Module, adapter: str) -> None:
    """Take an adapter off, and what held it off every module that has no other."""
    for name, module in list(model.named_modules()):
        base: nn.Module | None = None
        if isinstance(module, SppLayer) and adapter in module.r:
            cast(Any, module).delete_adapter(adapter)
            base = None if module.r else module.base_layer
        elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            del module.modules_to_save[adapter]
            base = None if module.modules_to_save else module.original_module
        if base is not None:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, base)


def mask_hash(model: nn.Module, adapter: str) -> str:
    """16 hex digits of where the weights under an adapter are zero, or so small that 16-bit types may differ."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        if isinstance(module, SppLayer) and adapter in module.r:
            for part in module.parts:
                digest.update(name.encode() + (module.original(part).abs() < TINY).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


register_peft_method(name="spp", config_cls=SppConfig, model_cls=SppModel)
