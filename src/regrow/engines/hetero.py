"""Finds the class that can hold a cut model and builds it: stock, a carrier, or one whose layers differ in width.

Stock first, since it loads everywhere; then a carrier, a model type that computes the same function but checks less
(Llama with 9 heads and width 512 is a Mistral without sliding window); else `per_layer_config` and a small modelling
file in the folder. What this gives up: the last kind needs `trust_remote_code=True`.
"""

from __future__ import annotations

import inspect
import linecache
import re
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Literal, cast

from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from regrow.artifacts.plan import Plan
from regrow.artifacts.shape import Anatomy
from regrow.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

CODE_FILE = "modeling_regrow.py"
TEMPLATE = Path(__file__).with_name("heterogeneous.template")
PREFIX = "regrow_"


@dataclass(frozen=True, slots=True)
class Holder:
    """A configuration that fits the cut model, and what the reader of the report must know of it."""

    kind: Literal["stock", "carrier", "heterogeneous"]
    config: PreTrainedConfig
    note: str

    @property
    def code(self) -> str | None:
        """The modelling file that must lie in the folder, if any."""
        return render(self.config) if self.kind == "heterogeneous" else None


def holder(config: PreTrainedConfig, anatomy: Anatomy, plan: Plan) -> Holder:
    """The best class for the shape that `plan` leaves of a model of this `config`."""
    shape = plan.shape()
    changes = _changes(config, anatomy, plan)
    if shape.uniform:
        own = _accepted(type(config), config, changes)
        if own is not None:
            return Holder("stock", own, f"stock {anatomy.model_type} checkpoint")
        for name in anatomy.family.carriers:
            if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
                continue
            carried = _accepted(CONFIG_MAPPING[name], config, {**changes, "sliding_window": None})
            if carried is not None:
                return Holder(
                    "carrier",
                    carried,
                    f"stored as {name}, which computes the same function: {anatomy.model_type} configurations refuse "
                    f"{changes['num_attention_heads']} heads with width {changes['hidden_size']}",
                )
    return Holder(
        "heterogeneous",
        _heterogeneous(config, plan, changes),
        "layers differ in width"
        if not shape.uniform
        else f"no stock {anatomy.model_type} configuration takes this shape",
    )


def build(config: PreTrainedConfig, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model of this configuration around these tensors, without a copy.

    Raises `UnsupportedModel` when names or shapes differ from what the class expects.
    """
    with init_empty_weights(include_buffers=False):
        model = model_class(config)(config)
    try:
        loaded = model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        raise _misfit(config, str(error)) from error
    tied = set(getattr(model, "_tied_weights_keys", None) or {}) if config.tie_word_embeddings else set()
    missing = set(loaded.missing_keys) - tied
    if missing or loaded.unexpected_keys:
        raise _misfit(config, f"missing {sorted(missing)[:3]}, unexpected {sorted(loaded.unexpected_keys)[:3]}")
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return cast("PreTrainedModel", model.eval())


def _misfit(config: PreTrainedConfig, detail: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the cut tensors do not fit {config.model_type}: {detail}",
        "layouts in which every tensor of a cut unit is declared",
        "docs/families.md shows how to declare the missing tensor",
    )


def _changes(config: PreTrainedConfig, anatomy: Anatomy, plan: Plan) -> dict[str, Any]:
    """Values of the new configuration; widths are those of the widest layer."""
    shape = plan.shape()
    widest_groups = max(x.groups for x in shape.layers) or anatomy.sizes["K"]
    per_group = max(x.heads for x in shape.layers) or anatomy.sizes["G"]
    changes: dict[str, Any] = {
        "hidden_size": shape.channels,
        "num_hidden_layers": len(shape.layers),
        "num_attention_heads": widest_groups * per_group,
        "intermediate_size": max(x.neurons for x in shape.layers) or anatomy.sizes["F"],
    }
    if hasattr(config, "num_key_value_heads"):
        changes |= {"num_key_value_heads": widest_groups, "head_dim": anatomy.sizes["D"]}
    kept = [x.index for x in plan.layers]
    for name, value in config.to_dict().items():
        if isinstance(value, list) and "layer" in name and len(value) == anatomy.sizes["L"]:
            changes[name] = [value[i] for i in kept]
    return changes


def _carried_over(config: PreTrainedConfig) -> dict[str, Any]:
    """Every value but those that name a class or a file of the folder the model came from."""
    own = ("model_type", "architectures", "auto_map", "per_layer_config")
    return {name: value for name, value in config.to_dict().items() if name not in own}


def _accepted(kind: Any, config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig | None:
    """A configuration of class `kind` with these changes, or None when its own checks refuse it."""
    try:
        new = kind(**{**_carried_over(config), **changes})
    except (ValueError, StrictDataclassError):
        return None
    new.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[kind].__name__]
    return cast("PreTrainedConfig", new)


def _heterogeneous(config: PreTrainedConfig, plan: Plan, changes: Mapping[str, Any]) -> PreTrainedConfig:
    layers: dict[int, dict[str, Any]] = {}
    for index, layer in enumerate(plan.shape().layers):
        skip = [name for name, units in (("attention", layer.groups), ("mlp", layer.neurons)) if not units]
        own: dict[str, Any] = {"skip": skip} if skip else {}
        if hasattr(config, "num_key_value_heads"):
            groups, heads = (layer.groups, layer.groups * layer.heads) if layer.groups else (1, 1)
            own |= {"num_key_value_heads": groups, "num_attention_heads": heads}
        if layer.neurons:
            own["intermediate_size"] = layer.neurons
        layers[index] = own
    new = config_class(config.model_type)(**{**_carried_over(config), **changes}, per_layer_config=layers)
    names = _names(config.model_type)
    stem = CODE_FILE.removesuffix(".py")
    new.architectures = [names["causal"]]
    new.auto_map = {
        "AutoConfig": f"{stem}.{names['config']}",
        "AutoModel": f"{stem}.{names['model']}",
        "AutoModelForCausalLM": f"{stem}.{names['causal']}",
    }
    return cast("PreTrainedConfig", new)


def model_class(config: PreTrainedConfig) -> Any:
    """The causal model class of a configuration, ours or stock."""
    if config.model_type.startswith(PREFIX):
        base = config.model_type.removeprefix(PREFIX)
        return getattr(_module(base), _names(base)["causal"])
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def config_class(model_type: str) -> Any:
    """Our configuration class behind `regrow_...`."""
    base = model_type.removeprefix(PREFIX)
    return getattr(_module(base), _names(base)["config"])


def stock_classes(model_type: str) -> dict[str, Any]:
    """The stock classes behind a model type: configuration, model, causal model, decoder layer."""
    config = CONFIG_MAPPING[model_type]
    causal = MODEL_FOR_CAUSAL_LM_MAPPING[config]
    module = inspect.getmodule(causal)
    family = causal.__name__.removesuffix("ForCausalLM")
    layer = next(n for n in (f"{family}DecoderLayer", f"{family}Layer") if hasattr(module, n))
    model = next(n for n in (f"{family}TextModel", f"{family}Model") if hasattr(module, n))
    return {"config": config, "causal": causal, "layer": getattr(module, layer), "model": getattr(module, model)}


def _names(model_type: str) -> dict[str, str]:
    stock = stock_classes(model_type)
    family = stock["causal"].__name__.removesuffix("ForCausalLM")
    return {
        "config": f"Regrow{family}Config",
        "model": f"Regrow{stock['model'].__name__}",
        "causal": f"Regrow{family}ForCausalLM",
    }


def render(config: PreTrainedConfig) -> str:
    """The text of the modelling file for a model type of ours or the stock type behind it."""
    from regrow.artifacts.family import FAMILIES

    base = config.model_type.removeprefix(PREFIX)
    stock = stock_classes(base)
    family = next(f for _, f in FAMILIES.items() if base in f.model_types)
    values = {
        "Family": stock["causal"].__name__.removesuffix("ForCausalLM"),
        "Config": stock["config"].__name__,
        "Model": stock["model"].__name__,
        "Layer": stock["layer"].__name__,
        "model_type": base,
        "module": re.sub(r".*\.modeling_", "", stock["causal"].__module__),
        "attention": family.attention.module,
        "mlp": family.mlp.module,
        "attention_norms": repr(family.attention.norms),
        "mlp_norms": repr(family.mlp.norms),
    }
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values)


def _module(model_type: str) -> types.ModuleType:
    """The rendered file as an imported module, so that memory and disk run the same code."""
    name = f"regrow.engines._heterogeneous_{model_type}"
    if name not in sys.modules:
        source = render(CONFIG_MAPPING[model_type]())
        module = types.ModuleType(name)
        module.__file__ = f"<{name}>"
        linecache.cache[module.__file__] = (len(source), None, source.splitlines(keepends=True), module.__file__)
        sys.modules[name] = module
        exec(compile(source, module.__file__, "exec"), module.__dict__)
    return sys.modules[name]
