"""Binds a family to a configuration: which tensors exist, and which units own their dimensions.

The model is built without memory (meta device) and read, so that biases, extra norms and tied heads are seen, not
assumed. What this gives up: nothing is known of layouts no family declares; those are refused here.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import init_empty_weights
from torch import nn

from regrow.artifacts.family import FAMILIES, UNITS, Cut, Family, Unit
from regrow.artifacts.shape import Anatomy, LayerShape, Shape, Tensor, alike
from regrow.engines.hetero import PREFIX, config_class, model_class
from regrow.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FIT = "docs/families.md shows how a layout is declared; `regrow ls families` lists those that are"


@dataclass(slots=True)
class Subject:
    """A model in memory, its tokenizer and what can be cut in it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy
    source: dict[str, Any]  # id, fingerprint, licence, note
    store: torch.dtype  # what weights are stored in


def family_of(config: PreTrainedConfig) -> Family:
    """The family that declares `config.model_type`. Raises `UnsupportedModel` with the reason."""
    by_type = {kind: family for _, family in FAMILIES.items() for kind in family.model_types}
    model_type = config.model_type.removeprefix(PREFIX)
    if model_type in by_type:
        return by_type[model_type]
    raise UnsupportedModel(
        f"no family declares model type {config.model_type!r}", f"model types {', '.join(sorted(by_type))}", FIT
    )


def sizes_of(config: PreTrainedConfig) -> dict[str, int]:
    """L K G H D F C V of a configuration, in the words of `artifacts.family`."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return {
        "L": config.num_hidden_layers,
        "K": groups,
        "G": heads // groups,
        "H": heads,
        "D": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "F": config.intermediate_size,
        "C": config.hidden_size,
        "V": config.vocab_size,
        **({"A": config.num_experts_per_tok} if hasattr(config, "num_experts_per_tok") else {}),
    }


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of this configuration with parameters on the meta device and buffers in memory."""
    with init_empty_weights(include_buffers=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_class(config)(config)
    model.tie_weights()
    return cast("PreTrainedModel", model)


def bind(config: PreTrainedConfig, model: nn.Module | None = None) -> Anatomy:
    """The anatomy of a configuration; `model` spares building an empty one.

    Raises `UnsupportedModel` when no family declares it, when the layout differs from the declared one, or when
    layers differ in width already.
    """
    family = family_of(config)
    if config.is_heterogeneous:
        raise UnsupportedModel(
            f"a {config.model_type} model, which was cut before: its layers differ",
            "models whose layers are alike",
            "cut its base model again with a smaller budget, or make the first cut with --uniform",
        )
    model = empty_model(config) if model is None else model
    sizes = sizes_of(config)
    names = {name for name, _ in model.named_parameters()}
    tensors = tuple(_tensor(family, name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
    anatomy = Anatomy(
        family=family,
        model_type=config.model_type,
        tied=f"{family.head}.weight" not in names,
        sizes=sizes,
        tensors=tensors,
        alike=alike(tensors, sizes["L"]),
        supported=tuple(unit for unit in UNITS if why_not(family, sizes, unit) is None),
        store_bytes=4 if getattr(config, "dtype", None) == torch.float32 else 2,
    )
    _check(anatomy)
    return anatomy


def bind_any(config: PreTrainedConfig) -> tuple[Anatomy, Shape]:
    """Anatomy and shape of any model we know; where layers differ, the anatomy is that of the widest."""
    if not config.model_type.startswith(PREFIX):
        anatomy = bind(config)
        return anatomy, anatomy.dense
    drop = ("model_type", "per_layer_config", "architectures", "auto_map")
    data = {k: v for k, v in config.to_dict().items() if k not in drop}
    widest = config_class(config.model_type)(**data)
    anatomy = bind(widest)
    rows = []
    for own in config.per_layer_config:
        skip = getattr(own, "skip", [])
        sizes = sizes_of(own)
        groups = 0 if "attention" in skip else sizes["K"]
        rows.append(LayerShape(groups, sizes["G"] if groups else 0, 0 if "mlp" in skip else sizes["F"]))
    return anatomy, Shape(config.hidden_size, tuple(rows))


def why_not(family: Family, sizes: dict[str, int], unit: Unit) -> str | None:
    """Why this unit cannot be cut in this model, or None when it can."""
    if unit in family.refuses:
        return family.refuses[unit]
    if unit != "layer" and unit not in family.cuts:
        return f"family {family.name} declares no {unit}s"
    if unit == "head" and sizes["G"] == 1:
        return "every group is a single query head: cut groups"
    if unit == "layer" and sizes["L"] == 1:
        return "the model has one layer"
    return None


def _tensor(family: Family, name: str, shape: tuple[int, ...]) -> Tensor:
    module, _, kind = name.rpartition(".")
    inside = module.removeprefix(family.layers + ".")
    if inside == module:
        return Tensor(name, shape, None, _owners((("channel", cut) for cut in family.whole), module, kind, shape), None)
    index, _, path = inside.partition(".")
    every = ((unit, cut) for unit in UNITS for cut in family.cuts.get(unit, ()))
    branch = next((b for b in ("attention", "mlp") if _serves(family, b, path)), None)
    return Tensor(name, shape, int(index), _owners(every, path, kind, shape), branch)


def _serves(family: Family, branch: str, path: str) -> bool:
    part = family.attention if branch == "attention" else family.mlp
    return path == part.module or path.startswith(part.module + ".") or path in part.norms


def _owners(cuts: Any, path: str, kind: str, shape: tuple[int, ...]) -> tuple[tuple[Unit, Cut], ...]:
    if kind not in ("weight", "bias"):
        return ()
    return tuple((unit, cut) for unit, cut in cuts if cut.path == path and cut.dim < len(shape))


def _check(anatomy: Anatomy) -> None:
    """Every declared cut finds its tensor and stays inside it.

    A tensor that a cut should have named is found when the cut model is built: its shape no longer fits.
    """
    family = anatomy.family
    for tensor in anatomy.tensors:
        for unit, cut in tensor.cuts:
            end = anatomy.offset(cut) + anatomy.width(cut) * anatomy.units(unit)
            if end > tensor.shape[cut.dim]:
                raise UnsupportedModel(
                    f"{tensor.name} has shape {list(tensor.shape)}, but family {family.name} expects {unit}s "
                    f"up to {end} in dimension {cut.dim}",
                    f"models laid out as family {family.name} declares",
                    FIT,
                )
    found = {(unit, cut) for tensor in anatomy.tensors for unit, cut in tensor.cuts}
    declared = [(unit, cut) for unit, cuts in family.cuts.items() for cut in cuts]
    declared += [("channel", cut) for cut in family.whole if not (cut.role == "head" and anatomy.tied)]
    for unit, cut in declared:
        if (unit, cut) not in found:
            raise UnsupportedModel(
                f"family {family.name} declares {unit}s in {cut.path!r}, which this {anatomy.model_type} model lacks",
                f"models laid out as family {family.name} declares",
                FIT,
            )
