"""Stage export: a folder that stock tools load, written whole or not at all, and reread before success is said.

What this gives up: formats other than Hugging Face folders.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regrow.engines import checkpoint, provenance
from regrow.engines.bind import Subject
from regrow.engines.hetero import Holder
from regrow.engines.zeros import of_model
from regrow.errors import IdentityError


def export(subject: Subject, holder: Holder, out: Path, files: Mapping[str, str], base: Mapping[str, Any]) -> None:
    """Write the model and `files` (name -> text) to `out`, which must not exist.

    The model is freed before the folder is read back, so two are never held. `subject.model` is the reread one
    afterwards. Raises `IdentityError` when disk and memory disagree, `OutputError` when the folder cannot be written.
    """
    ids = checkpoint.probe(subject.anatomy.sizes["V"])
    reference = checkpoint.logits(subject.model, ids)
    device, dtype = str(subject.model.device), subject.model.dtype
    with checkpoint.staged(out) as folder:
        checkpoint.write(subject.model, subject.tokenizer, folder, subject.store, holder.code)
        (folder / provenance.NOTES).write_text(json.dumps(dict(base), indent=1), encoding="utf-8")
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        del subject.model
        subject.model = checkpoint.reread(folder, reference, ids, device, dtype)
        if "sparsity" in base:
            check_zeros(subject, base["sparsity"]["mask_hash"])


def check_zeros(subject: Subject, mask_hash: str) -> None:
    """Raise `IdentityError` unless the zeros of the model are those of the hash, bit for bit, and none is -0."""
    found = of_model(subject.model, subject.anatomy)
    parameters = dict(subject.model.named_parameters())
    negative = [
        m.name for m in found.matrices if bool((parameters[m.name].signbit() & (parameters[m.name] == 0)).any())
    ]
    if found.mask_hash != mask_hash or negative:
        raise IdentityError(
            f"-0 in {negative[0]}" if negative else f"zeros on disk {found.mask_hash}, in memory {mask_hash}",
            "the same zeros, each of them +0",
            "nothing was written; please report it",
        )
