"""Mixtral and Qwen3-MoE: attention as in Llama, experts fused into three-dimensional parameters behind a router.

Neurons of experts and hidden channels stay; groups, query heads and whole layers can go, and every matrix but the
router may become sparse.
"""

from regrow.artifacts.family import Family, declare
from regrow.artifacts.layout import attention, ends, mlp, split_attention

EXPERTS = "neurons of an expert model are shared among experts, which no cut declares yet"
STREAM = "routers and fused experts read the stream too, which no cut declares yet"

for name in ("mixtral", "qwen3_moe"):
    declare(
        Family(
            name=name,
            model_types=(name,),
            attention=attention(),
            mlp=mlp(end="mlp"),
            cuts={**split_attention()},
            whole=ends(),
            routers=("mlp.gate",),
            refuses={"neuron": EXPERTS, "channel": STREAM},
        )
    )
