"""Pieces that many layouts share, so that a family is a few lines: split attention, gated MLP, pre-norms.

What this gives up: nothing is inherited; a family that differs in one place spells that piece out.
"""

from __future__ import annotations

from regrow.artifacts.family import Branch, Cut, Role, Unit

Cuts = dict[Unit, tuple[Cut, ...]]


def attention(norms: tuple[str, ...] = ("input_layernorm",), end: str = "self_attn.o_proj") -> Branch:
    return Branch("self_attn", "self_attn.o_proj", end, norms)


def mlp(norms: tuple[str, ...] = ("post_attention_layernorm",), end: str = "mlp.down_proj") -> Branch:
    return Branch("mlp", "mlp.down_proj", end, norms)


def split_attention(query_key: Role = "select") -> Cuts:
    """q, k, v, o as four linears; `query_key="fold"` where gates also act on q and k (before a norm over all heads)."""
    q, k, v, o = (f"self_attn.{name}_proj" for name in "qkvo")
    return {
        "group": (
            Cut(q, 0, "G*D", role=query_key),
            Cut(k, 0, "D", role=query_key),
            Cut(v, 0, "D"),
            Cut(o, 1, "G*D", role="fold"),
        ),
        "head": (Cut(q, 0, "D", role=query_key), Cut(o, 1, "D", role="fold")),
    }


def gated_mlp() -> Cuts:
    """down(act(gate(x)) * up(x)) as three linears; one gate a neuron, at the input of down."""
    return {"neuron": (Cut("mlp.gate_proj", 0), Cut("mlp.up_proj", 0), Cut("mlp.down_proj", 1, role="fold"))}


def stream(
    readers: tuple[str, ...] = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    ),
    writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj"),
    before: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm"),
    after: tuple[str, ...] = (),
    reads: Role = "select",
) -> Cuts:
    """Hidden channels inside a layer: linears that read and write the residual stream, norms before and after them."""
    return {
        "channel": (
            *(Cut(path, 1, role=reads) for path in readers),
            *(Cut(path, 0, role="write") for path in writers),
            *(Cut(path, 0, role="gain") for path in before),
            *(Cut(path, 0, role="span") for path in after),
        )
    }


def ends(embed: str = "model.embed_tokens", norm: str = "model.norm", head: str = "lm_head") -> tuple[Cut, ...]:
    """Hidden channels outside the layers."""
    return (Cut(embed, 1, role="embed"), Cut(norm, 0, role="gain"), Cut(head, 1, role="head"))
