"""OLMo 2: norms only after each branch, and norms over all heads of q and of k.

The residual stream is read without a norm, and a head that is gone must also be gone from the statistics of those
two norms: gates act on q and k before them.
"""

from regrow.artifacts.family import Cut, Family, declare
from regrow.artifacts.layout import attention, ends, gated_mlp, mlp, split_attention, stream

split = split_attention(query_key="fold")

declare(
    Family(
        name="olmo2",
        model_types=("olmo2",),
        attention=attention(("post_attention_layernorm",), end="post_attention_layernorm"),
        mlp=mlp(("post_feedforward_layernorm",), end="post_feedforward_layernorm"),
        cuts={
            "group": (
                *split["group"],
                Cut("self_attn.q_norm", 0, "G*D", role="span"),
                Cut("self_attn.k_norm", 0, "D", role="span"),
            ),
            "head": (*split["head"], Cut("self_attn.q_norm", 0, "D", role="span")),
            **gated_mlp(),
            **stream(before=(), after=("post_attention_layernorm", "post_feedforward_layernorm"), reads="raw"),
        },
        whole=ends(),
    )
)
