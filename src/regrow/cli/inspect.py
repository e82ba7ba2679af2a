"""`regrow inspect`: shape, counts, memory, and where the model will load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regrow.cli import console
from regrow.cli import options as o

if TYPE_CHECKING:
    from regrow.artifacts.shape import Anatomy


def inspect(
    model: o.Model,
    _seed: o.NoSeed = None,
    sparse: Annotated[bool, typer.Option("--sparse", help="read the weights and count their zeros")] = False,
    trust_remote_code: o.Trust = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Shape, counts and memory of a model, from its configuration alone; where it will load. `--sparse`: its zeros."""
    console.hush()
    from regrow.artifacts.shape import costs
    from regrow.engines.bind import bind_any
    from regrow.engines.checkpoint import locate, read_config
    from regrow.engines.provenance import notes

    folder = locate(model, weights=sparse)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    anatomy, shape = bind_any(config)
    counts = costs(anatomy, shape).to_json()
    exports = where_it_loads(config.model_type, shape.uniform)
    data: dict[str, Any] = {
        "model": notes(folder, model),
        "model_type": config.model_type,
        "family": anatomy.family.name,
        "shape": shape.to_json(),
        "costs": counts,
        "memory_bytes": {"fp32": 4 * counts["parameters"], "bf16": 2 * counts["parameters"]},
        "supported": list(anatomy.supported),
        "exports": exports,
    }
    if sparse:
        data["sparsity"] = zeros_of(folder, anatomy, data["model"])
    if not quiet:
        print(f"{data['model']['id']}: {config.model_type} (family {anatomy.family.name})\n{shape}")
        console.table("", ["count", "value"], [[k.replace("_", " "), f"{v:,}"] for k, v in counts.items()])
        console.table("", ["loads in", "how"], [[k, v] for k, v in exports.items()])
        if sparse:
            show_zeros(data["sparsity"])
    if as_json:
        console.emit(data)


def where_it_loads(model_type: str, uniform: bool) -> dict[str, str]:
    """What is known of each runtime; only transformers was run."""
    if model_type.startswith("regrow_"):
        return {
            "transformers": "AutoModelForCausalLM with trust_remote_code=True",
            "vLLM": "not tested: only through its transformers backend",
            "llama.cpp": "not by the stock converter; widths differ from layer to layer",
        }
    return {
        "transformers": "AutoModelForCausalLM",
        "vLLM": "stock architecture; not run here (no GPU)",
        "llama.cpp": "through its own convert_hf_to_gguf.py; not run here" if uniform else "no",
    }


def zeros_of(folder: Path, anatomy: Anatomy, notes: dict[str, Any]) -> dict[str, Any]:
    """Zeros of a checkpoint: in all and by matrix, whether its pattern is kept, what sparse storage would weigh."""
    from regrow.artifacts.pattern import Pattern
    from regrow.engines.checkpoint import check_files
    from regrow.engines.zeros import names_in, of_folder, semi_structured

    stored = check_files(folder).itemsize
    recorded = notes.get("sparsity", {})
    asked = None if recorded.get("pattern") is None else Pattern.parse(recorded["pattern"])
    found = of_folder(folder, names_in(folder, anatomy), asked)
    unfit = semi_structured(found)
    return {
        **found.to_json(),
        "pattern": None if asked is None else str(asked),
        "pattern_in": None if asked is None else sum(matrix.has(asked) for matrix in found.matrices),
        "mask_intact": recorded["mask_hash"] == found.mask_hash if recorded else None,
        "bitmask_bytes": found.bitmask_bytes(stored),
        "dense_bytes": found.weights * stored,
        "semi_structured": {"fits": len(found.matrices) - len(unfit), "of": len(found.matrices), "why_not": unfit},
    }


def show_zeros(data: dict[str, Any]) -> None:
    rows = [
        [n, " x ".join(map(str, m["shape"])), f"{m['zeros']:,}", m["groups"] or "-"]
        for n, m in data["matrices"].items()
    ]
    console.table("", ["matrix", "shape", "zeros", "groups"], rows)
    fits = data["semi_structured"]
    intact = {True: "intact", False: "NOT intact", None: "not recorded"}[data["mask_intact"]]
    share = f"{100 * data['share']:.2f} % of {data['weights']:,} weights"
    where = f", in {data['pattern_in']} of {len(data['matrices'])} matrices"
    pattern = data["pattern"] + where if data["pattern"] else "none recorded"
    print(f"zeros: {share}; pattern {pattern}")
    print(f"mask:  {data['mask_hash']}, {intact}; groups in all matrices: {data['groups'] or 'none'}")
    print(
        f"size:  {data['dense_bytes'] / 1e6:,.1f} MB as stored, {data['bitmask_bytes'] / 1e6:,.1f} MB as non-zero "
        "weights and one bit a position\n"
        f"speed: dense kernels gain nothing; torch's 2:4 kernels on NVIDIA fit {fits['fits']} of {fits['of']} matrices"
    )
