"""Llama and the layouts that share its tensors: Mistral, Qwen2, Qwen3; also SmolLM2 and TinyLlama.

Qwen2 has biases on q, k, v, which follow their weights; Qwen3 has norms over one head, which no cut touches: one
declaration serves all.
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
