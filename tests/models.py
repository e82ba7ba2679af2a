"""Tiny random models of every family, plans for them, and the comparison the whole house stands on.

A fresh model is blind to most mistakes (gains are 1, biases 0), so everything here is drawn with spread .3.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from regrow.artifacts.family import FAMILIES, UNITS, Family, Unit
from regrow.artifacts.plan import LayerPlan, Plan
from regrow.artifacts.shape import Anatomy
from regrow.engines.bind import bind
from regrow.engines.gates import Gates, from_plan, gated
from regrow.engines.hetero import Holder, build, holder
from regrow.engines.surgery import merged, slice_model

torch.set_num_threads(1)  # at this size a second thread only costs

VOCAB, LENGTH, WINDOW = 64, 20, 6  # the sliding window is shorter than the text, so masks differ by layer type
BASE: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 6,  # heads x head_dim is not the width, where a type lets us choose
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": None,
    "attention_bias": True,
    "mlp_bias": True,
}
MIXED: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "sliding_window": WINDOW,
}
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {**MIXED, "use_sliding_window": True},
    "qwen3": {**MIXED, "use_sliding_window": True},
    "gemma2": {**MIXED, "query_pre_attn_scalar": 4},
    "gemma3_text": {**MIXED, "query_pre_attn_scalar": 4},
    "gpt_neox": {"rotary_pct": 0.5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
"""What a model type needs beside the base; one that is not listed gets the base alone."""


def config_of(model_type: str, **changes: Any) -> Any:
    """A small configuration with every bias the type can have; keys the type does not know are left out."""
    kind = CONFIG_MAPPING[model_type]
    known = set(kind().to_dict())
    base = {k: v for k, v in BASE.items() if k in known}
    return kind(**{**base, **OWN.get(model_type, {}), **changes})


def randomise(model: nn.Module, *, gains: float, seed: int = 0) -> None:
    """Weights, biases and gains with spread .3; gains around what makes the norm neutral."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3, generator=source)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.add_(gains)


@cache
def _pattern(model_type: str, changes: tuple[tuple[str, Any], ...]) -> Any:
    model = AutoModelForCausalLM.from_config(config_of(model_type, **dict(changes))).eval()
    family = next((f for _, f in FAMILIES.items() if model_type in f.model_types), None)
    randomise(model, gains=1 - (family.gain_offset if family else 0.0))
    return model


def make(model_type: str, **changes: Any) -> Any:
    """A model of one's own, quickly: built once for equal arguments, then copied."""
    return copy.deepcopy(_pattern(model_type, tuple(sorted(changes.items()))))


def anatomy_of(model: Any) -> Anatomy:
    return bind(model.config, model)


def families() -> list[tuple[str, Family]]:
    """(model type, family) for every registered family of which something can be cut, and each of its model types."""
    found = [family for _, family in FAMILIES.items() if set(family.refuses) != set(UNITS)]
    return [(kind, family) for family in found for kind in family.model_types]


def ids(rows: int = 2, length: int = LENGTH, seed: int = 3) -> Tensor:  # (rows, length) int64
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def plan(anatomy: Anatomy, units: Iterable[Unit], *, uniform: bool, seed: int = 1, rescale: bool = False) -> Plan:
    """A random plan that cuts `units`: equal counts in every layer, or counts of their own (never none)."""
    draw, size, units = random.Random(seed), anatomy.sizes, set(units)

    def pick(n: int, k: int) -> tuple[int, ...]:
        return tuple(sorted(draw.sample(range(n), k)))

    def many(unit: Unit, full: int, usual: int) -> int:
        if unit not in units:
            return full
        return usual if uniform else draw.randint(1, full)

    layers = []
    for index in range(size["L"]):
        if "layer" in units and index == 1:
            continue
        groups = pick(size["K"], many("group", size["K"], 2))
        each = many("head", size["G"], 1)
        heads = tuple(sorted(h for g in groups for h in draw.sample(range(g * size["G"], (g + 1) * size["G"]), each)))
        layers.append(LayerPlan(index, groups, heads, pick(size["F"], many("neuron", size["F"], 12))))
    channels = pick(size["C"], 18) if "channel" in units else tuple(range(size["C"]))
    made = Plan(channels, tuple(layers), rescale_norms=rescale)
    made.check(anatomy)
    return made


def without(anatomy: Anatomy, layer: int, *, attention: bool = False, mlp: bool = False) -> Plan:
    """Everything stays but the named branches of one layer."""
    whole = Plan.everything(anatomy)
    layers = list(whole.layers)
    if attention:
        layers[layer] = replace(layers[layer], groups=(), heads=())
    if mlp:
        layers[layer] = replace(layers[layer], neurons=())
    return replace(whole, layers=tuple(layers))


def soft(anatomy: Anatomy, kept: Plan, units: Iterable[Unit | str], seed: int = 5) -> Gates:
    """Gates of a plan with values in (.3, 1.5) on units that stay; `branch` softens whole branches too."""
    source = torch.Generator().manual_seed(seed)
    gates, size = from_plan(anatomy, kept), anatomy.sizes

    def softened(gate: Tensor | None, *shape: int) -> Tensor:
        values = torch.rand(shape, generator=source) * 1.2 + 0.3
        return values if gate is None else gate * values

    for index in (layer.index for layer in kept.layers):
        layer = gates.layers[index]
        for unit, letter in (("group", "K"), ("head", "H"), ("neuron", "F")):
            if unit in units:
                setattr(layer, unit, softened(getattr(layer, unit), size[letter]))
        if "branch" in units:
            layer.attention, layer.mlp = softened(layer.attention), softened(layer.mlp)
    if "channel" in units:
        gates.channel = softened(gates.channel, size["C"])
    return gates


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:  # (b, T, V)
    found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the scale of `ours`; infinite when shapes or values are no numbers."""
    if ours.shape != theirs.shape or not bool(theirs.isfinite().all()):
        return float("inf")
    return float((ours - theirs).abs().max() / ours.abs().max())


@dataclass(slots=True)
class Cut:
    """A cut model beside the logits of the intact one, open and with units shut."""

    model: Any
    holder: Holder
    anatomy: Anatomy
    plan: Plan
    intact: Tensor  # (b, T, V)
    masked: Tensor  # (b, T, V)

    def error(self, tokens: Tensor | None = None) -> float:
        return difference(self.masked, logits(self.model, ids() if tokens is None else tokens))


def cut(model: Any, kept: Plan, gates: Gates | None = None) -> Cut:
    """Mask, then slice; `model` is consumed."""
    anatomy = anatomy_of(model)
    intact = logits(model, ids())
    with merged(model, anatomy, kept), gated(model, anatomy, from_plan(anatomy, kept) if gates is None else gates):
        masked = logits(model, ids())
    found = holder(model.config, anatomy, kept)
    small = build(found.config, dict(slice_model(model, anatomy, kept, gates)))
    return Cut(small, found, anatomy, kept, intact, masked)


def tokenizer(vocabulary: int = VOCAB) -> PreTrainedTokenizerFast:
    """One word a token: w3 is token 3."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return made
