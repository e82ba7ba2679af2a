"""Adapters through peft: put them on, count them, merge them and prove that the merge changed nothing.

Adapters go on linears inside the decoder layers, those of SPP on fused experts too, found in the live model: widths may
differ from layer to layer, and a layer may lack a branch. What this gives up: adapters that stay apart after training;
regrow always merges.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from regrow.engines.inputs import is_experts
from regrow.errors import IdentityError, SettingsError, guess

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

TOLERANCE = 1e-5  # of the largest output of a layer
PROBE = 16  # inputs of each matrix that a merge is checked on


def add_adapters(
    model: nn.Module,
    kind: str = "lora",
    *,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.05,
    targets: Sequence[str] | Literal["all-linear"] = "all-linear",
    seed: int = 0,
) -> PeftModel:
    """Freeze `model` and add adapters of a kind in `KINDS` to its linears; nothing changes before they are trained.

    `targets` are the last parts of module names, such as `("q_proj", "v_proj")`; by default every linear inside the
    decoder layers, and under SPP fused experts, never the head or the embedding. The adapters are fp32 whatever the
    model is, and equal seeds give equal adapters. Defaults are LLM-Pruner's recovery by LoRA (arXiv:2305.11627). Raises
    `SettingsError`.
    """
    from peft import get_peft_model

    if kind not in KINDS:
        raise SettingsError(f"adapters of kind {kind!r}{guess(kind, KINDS)}", ", ".join(KINDS), "name one of them")
    _check(rank, alpha, dropout)
    config = KINDS[kind](rank, alpha, dropout, _chosen(adaptable(model, kind), targets))
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    config.base_model_name_or_path = None  # a cut model is not the one its config names; peft would ask the hub for it
    return adapted


def _lora(rank: int, alpha: float, dropout: float, targets: list[str]) -> PeftConfig:
    """W + alpha / rank * B A."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")


def _hira(rank: int, alpha: float, dropout: float, targets: list[str]) -> PeftConfig:  # noqa: ARG001
    """W + W * (B A): zeros stay. It has no scale."""
    from peft import HiraConfig

    return HiraConfig(r=rank, hira_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")


def _ia3(rank: int, alpha: float, dropout: float, targets: list[str]) -> PeftConfig:  # noqa: ARG001
    """Scales keys, values and the inputs of down projections, as in the paper (arXiv:2205.05638): zeros stay."""
    from peft import IA3Config

    scaled = [n for n in targets if n.endswith(("k_proj", "v_proj", "qkv_proj", "query_key_value"))]
    inside = [n for n in targets if n.endswith(("down_proj", "dense_4h_to_h"))]
    if not scaled and not inside:
        raise SettingsError(
            f"ia3 adapters on {', '.join(sorted({n.rpartition('.')[2] for n in targets}))}",
            "keys, values or down projections among the targets",
            "leave targets out, or choose another kind",
        )
    return IA3Config(target_modules=[*scaled, *inside], feedforward_modules=inside, task_type="CAUSAL_LM")


def _spp(rank: int, alpha: float, dropout: float, targets: list[str]) -> PeftConfig:
    """W + alpha / rank * W * (repeated row * column): zeros stay (arXiv:2405.16057)."""
    from regrow.engines.spp import SppConfig

    return SppConfig(r=rank, spp_alpha=alpha, spp_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")


KINDS: dict[str, Callable[[int, float, float, list[str]], PeftConfig]] = {
    "lora": _lora,
    "hira": _hira,
    "ia3": _ia3,
    "spp": _spp,
}


def merge(model: PeftModel) -> nn.Module:
    """The model with its adapters added to its weights, in fp32 and eval mode; peft's wrapper is gone.

    What every adapted layer answers to a fixed probe, in fp32, is compared before returning; the whole model's logits
    would not do, since some models make a thousand times more of a rounding. The caller rounds to the storage dtype.
    Raises `IdentityError` when they differ.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    model.float().eval()
    layers = model.get_base_model().named_modules()
    adapted = {name: _answer(layer) for name, layer in layers if isinstance(layer, BaseTunerLayer)}
    merged = cast(nn.Module, model.merge_and_unload())
    for name, before in adapted.items():
        check_same(name, before, _answer(merged.get_submodule(name)))
    return merged.requires_grad_(True).eval()


@torch.no_grad()
def moved(model: PeftModel, store: torch.dtype) -> float:
    """Share of the weights under adapters, zeros aside, that a merge will change once they are rounded to `store`.

    Exact: each linear is merged in a copy, so that memory grows by one of them.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    changed = total = 0
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            merged = copy.deepcopy(layer).float()
            merged.merge()
            for part in getattr(layer, "parts", ("weight",)):
                before, after = (
                    getattr(each.get_base_layer(), part).to(store) for each in (layer, merged)
                )  # (..., m, n)
                changed += int(((after != before) & (before != 0)).sum())
                total += int((before != 0).sum())
    return changed / max(1, total)


def check_same(name: str, adapted: Tensor, merged: Tensor) -> None:
    """Raise `IdentityError` unless outputs of a layer differ by at most `TOLERANCE` of the largest of them."""
    scale = float(adapted.abs().max())
    off = float((adapted - merged).abs().max())
    if not off <= TOLERANCE * scale:
        raise IdentityError(
            f"merging the adapters of {name} moved its outputs by {off:.3g}, where the largest is {scale:.3g}",
            f"at most {TOLERANCE:g} of the largest",
            "nothing was written; look for weights that are not finite, then report it",
        )


def trainable_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def layer_linears(model: nn.Module) -> list[str]:
    """Names of the linears inside decoder layers: those on a path through a list of modules."""
    return adaptable(model, "")


def adaptable(model: nn.Module, kind: str) -> list[str]:
    """Names of what adapters of a kind go on inside decoder layers: linears, and under SPP stacks of experts."""
    lists = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return [
        name
        for name, module in model.named_modules()
        if name.startswith(lists) and (isinstance(module, nn.Linear) or (kind == "spp" and is_experts(module)))
    ]


def _chosen(linears: list[str], targets: Sequence[str] | str) -> list[str]:
    """The linears that `targets` name. Raises `SettingsError` when one of them names none."""
    wanted = ("",) if targets == "all-linear" else tuple(targets)
    found = {end: [n for n in linears if not end or f".{n}".endswith(f".{end}")] for end in wanted}
    for end, names in found.items():
        if not names:
            raise SettingsError(
                f"adapter target {end!r} is no linear inside a decoder layer" if end else "no linear to adapt",
                "all-linear, or any of " + ", ".join(sorted({n.rpartition(".")[2] for n in linears})),
                "name linears of this model",
            )
    if not found:
        raise SettingsError("no adapter targets", "all-linear, or at least one name", "leave targets out")
    return sorted({n for names in found.values() for n in names})


def _check(rank: int, alpha: float, dropout: float) -> None:
    for came, good, allowed in (
        (f"rank = {rank}", rank >= 1, "a whole number, at least 1"),
        (f"alpha = {alpha}", alpha > 0, "above 0"),
        (f"dropout = {dropout}", 0 <= dropout < 1, "0 <= dropout < 1"),
    ):
        if not good:
            raise SettingsError(f"adapters with {came}", allowed, "change it; 8, 16 and 0.05 are the usual values")


@torch.no_grad()
def _answer(layer: Any) -> Tensor:  # (PROBE, m) fp32, on the CPU
    """Outputs of a linear, or of a stack of experts that all get a share, for inputs that are always the same."""
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    stack = is_experts(base)
    weight = base.gate_up_proj if stack else base.weight  # (E, m, n) or (m, n)
    rows = PROBE * len(weight) if stack else PROBE
    x = torch.randn(rows, weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(weight)
    if not stack:
        return cast(Tensor, layer(x)).cpu()
    chosen = torch.arange(rows, device=x.device)[:, None] % len(weight)  # (rows, 1)
    return cast(Tensor, layer(x, chosen, torch.ones_like(chosen, dtype=x.dtype))).cpu()
