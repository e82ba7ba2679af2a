"""Stage load: a name becomes a subject, the model with its tokenizer and anatomy.

What this gives up: one device holds the whole model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from regrow.engines import checkpoint, processes, provenance
from regrow.engines.bind import Subject, bind
from regrow.engines.distil import Teacher
from regrow.engines.hetero import PREFIX
from regrow.errors import SettingsError, UnsupportedModel
from regrow.settings import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(model: str, *, dtype: str = "fp32", device: str = "auto", trust_remote_code: bool = False) -> Subject:
    """Read the model and find what can be cut. Computes in `dtype`; `device` is auto, cpu, cuda, cuda:1, mps ...

    Raises `ModelError` for anything that cannot be cut, with the reason.
    """
    folder = checkpoint.locate(model)
    config = checkpoint.read_config(folder, trust_remote_code=trust_remote_code)
    if config.model_type.startswith(PREFIX):
        raise UnsupportedModel(
            f"{model} was cut before, into a shape that no stock configuration takes",
            "models of a stock class, whose layers are alike",
            "cut its base model again with a smaller budget, or make the first cut with --uniform",
        )
    anatomy = bind(config)
    loaded, tokenizer, source = read_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    store = min(checkpoint.check_files(folder), as_dtype(dtype), key=lambda kind: kind.itemsize)
    return Subject(loaded, tokenizer, replace(anatomy, store_bytes=store.itemsize), source, store)


def read_model(
    model: str, *, dtype: str = "fp32", device: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """Model, tokenizer and a record of what they are, for any causal LM, whether it can be cut or not."""
    folder = checkpoint.locate(model)
    loaded, tokenizer = checkpoint.read(
        folder, dtype=as_dtype(dtype), device=pick_device(device), trust_remote_code=trust_remote_code
    )
    source = {**provenance.notes(folder, model), "path": str(folder), "fingerprint": provenance.fingerprint(folder)}
    return loaded, tokenizer, source if model == "demo" else {**source, "asked": model}


def read_teacher(recipe: Recipe) -> Teacher | None:
    """Who teaches the recovery of a recipe, if anybody: any causal model, whether it can be cut or not."""
    asked = recipe.recover
    if asked is None or asked.teacher is None:
        return None
    folder, device = checkpoint.locate(asked.teacher), pick_device(recipe.device)
    stored = {kind: name for name, kind in DTYPES.items()}.get(checkpoint.check_files(folder), recipe.dtype)
    learns = asked.distil.teacher_tokens or asked.distil.online_rate is not None
    usual = "fp32" if learns else stored if device.startswith("cuda") else recipe.dtype
    dtype = asked.distil.teacher_dtype or usual
    return Teacher(
        *read_model(asked.teacher, dtype=dtype, device=recipe.device, trust_remote_code=recipe.trust_remote_code)
    )


def as_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise SettingsError(f"dtype {name!r}", ", ".join(DTYPES), "use fp32 on a CPU, bf16 on a recent GPU")
    return DTYPES[name]


def pick_device(name: str) -> str:
    """The device meant by `name`, tried with an empty tensor. Raises `SettingsError` when there is none such.

    Of several processes each has its own GPU, whether "auto" or "cuda" was said.
    """
    if name != "auto" and not (name == "cuda" and processes.count() > 1 and torch.cuda.is_available()):
        try:
            return str(torch.empty(0, device=name).device)
        except (RuntimeError, AssertionError, ImportError) as error:
            why = str(error).splitlines()[0]
            raise SettingsError(
                f"device {name!r} cannot be used: {why}", "auto, cpu, cuda, cuda:N, mps", "use --device auto"
            ) from error
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{processes.local()}" if processes.count() > 1 else "cuda"
