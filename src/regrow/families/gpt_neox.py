"""GPT-NeoX and Pythia: attention and MLP side by side, LayerNorm, q, k, v of a head next to each other.

Only neurons and layers can go: the configuration has no head dimension (it is width / heads).
"""

from regrow.artifacts.family import Branch, Cut, Family, declare

WIDTH = "GPTNeoXConfig derives the head dimension from hidden_size / num_attention_heads, so neither can change alone"

declare(
    Family(
        name="gpt_neox",
        model_types=("gpt_neox",),
        layers="gpt_neox.layers",
        embed="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        attention=Branch("attention", "attention.dense", "attention.dense", ("input_layernorm",)),
        mlp=Branch("mlp", "mlp.dense_4h_to_h", "mlp.dense_4h_to_h", ("post_attention_layernorm",)),
        cuts={"neuron": (Cut("mlp.dense_h_to_4h", 0), Cut("mlp.dense_4h_to_h", 1, role="fold"))},
        whole=(),
        norm="layer",
        refuses={"group": WIDTH, "head": WIDTH, "channel": WIDTH},
    )
)
