"""`regrow inspect`: shape, counts, memory, and where the model will load."""

from __future__ import annotations

from typing import Any

from regrow.cli import console
from regrow.cli import options as o


def inspect(
    model: o.Model,
    _seed: o.NoSeed = None,
    trust_remote_code: o.Trust = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Shape, counts and memory of a model, from its configuration alone; where it will load."""
    console.hush()
    from regrow.artifacts.shape import costs
    from regrow.engines.bind import bind_any
    from regrow.engines.checkpoint import locate, notes, read_config

    folder = locate(model, weights=False)
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
    if not quiet:
        print(f"{data['model']['id']}: {config.model_type} (family {anatomy.family.name})\n{shape}")
        console.table("", ["count", "value"], [[k.replace("_", " "), f"{v:,}"] for k, v in counts.items()])
        console.table("", ["loads in", "how"], [[k, v] for k, v in exports.items()])
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
