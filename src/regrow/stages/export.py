"""Stage export: a folder that stock tools load, written whole or not at all, and reread before success is said.

What this gives up: formats other than Hugging Face folders.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regrow.engines import checkpoint
from regrow.engines.bind import Subject
from regrow.engines.hetero import Holder


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
        (folder / checkpoint.NOTES).write_text(json.dumps(dict(base), indent=1), encoding="utf-8")
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        del subject.model
        subject.model = checkpoint.reread(folder, reference, ids, device, dtype)
