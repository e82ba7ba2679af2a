"""Phi-3 and Phi-4-mini: q, k, v fused in one linear, gate and up in another; one cut for each run inside them."""

from regrow.artifacts.family import Cut, Family, declare
from regrow.artifacts.layout import attention, ends, mlp, stream

QKV, OUT, UP, DOWN = "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"

declare(
    Family(
        name="phi3",
        model_types=("phi3",),
        attention=attention(),
        mlp=mlp(),
        cuts={
            "group": (
                Cut(QKV, 0, "G*D"),
                Cut(QKV, 0, "D", "H*D"),
                Cut(QKV, 0, "D", "H*D+K*D"),
                Cut(OUT, 1, "G*D", role="fold"),
            ),
            "head": (Cut(QKV, 0, "D"), Cut(OUT, 1, "D", role="fold")),
            "neuron": (Cut(UP, 0), Cut(UP, 0, offset="F"), Cut(DOWN, 1, role="fold")),
            **stream(readers=(QKV, UP)),
        },
        whole=ends(),
    )
)
