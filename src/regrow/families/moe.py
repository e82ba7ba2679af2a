"""Mixtral and Qwen3-MoE: attention as in Llama, experts fused into three-dimensional parameters behind a router.

No unit of theirs can go yet; every matrix but the router may become sparse.
"""

from regrow.artifacts.family import UNITS, Family, declare
from regrow.artifacts.layout import attention, mlp

WHY = "no cut of expert models is declared yet; `regrow sparsify` works on them"

for name in ("mixtral", "qwen3_moe"):
    declare(
        Family(
            name=name,
            model_types=(name,),
            attention=attention(),
            mlp=mlp(),
            cuts={},
            whole=(),
            routers=("mlp.gate",),
            refuses=dict.fromkeys(UNITS, WHY),
        )
    )
