"""Llama and the layouts that share its tensors: SmolLM2, TinyLlama, Mistral, Qwen2 (biases on q, k, v), Qwen3 (norms on each head).

A norm over one head (Qwen3) is untouched by every cut, and a bias follows its weight, so one declaration serves all.
"""

from regrow.artifacts.family import Family, declare
from regrow.artifacts.layout import attention, ends, gated_mlp, mlp, split_attention, stream

for name, carriers in (("llama", ("mistral",)), ("mistral", ()), ("qwen2", ()), ("qwen3", ())):
    declare(
        Family(
            name=name,
            model_types=(name,),
            attention=attention(),
            mlp=mlp(),
            cuts={**split_attention(), **gated_mlp(), **stream()},
            whole=ends(),
            carriers=carriers,
        )
    )
