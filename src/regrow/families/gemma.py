"""Gemma 2 and 3 (text): a norm before and after each branch, gains stored minus one, embeddings times sqrt(width)."""

from regrow.artifacts.family import Family, declare
from regrow.artifacts.layout import attention, ends, gated_mlp, mlp, split_attention, stream

for name, model_type in (("gemma2", "gemma2"), ("gemma3", "gemma3_text")):
    declare(
        Family(
            name=name,
            model_types=(model_type,),
            attention=attention(("input_layernorm", "post_attention_layernorm"), end="post_attention_layernorm"),
            mlp=mlp(("pre_feedforward_layernorm", "post_feedforward_layernorm"), end="post_feedforward_layernorm"),
            cuts={
                **split_attention(),
                **gated_mlp(),
                **stream(
                    before=("input_layernorm", "pre_feedforward_layernorm"),
                    after=("post_attention_layernorm", "post_feedforward_layernorm"),
                ),
            },
            whole=ends(),
            gain_offset=1.0,
            embed_scale="sqrt(C)",
        )
    )
