"""Run by `torchrun` with two processes: a cut student and its teacher, both sharded, learn as whole ones do in one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard
from training import VOCAB, patterns
from transformers import LlamaConfig, LlamaForCausalLM

from regrow.artifacts.goal import DIVERGENCES, LIKENESSES
from regrow.engines.distil import FromTeacher
from regrow.engines.domains import by_domain, joined
from regrow.engines.head import head_of
from regrow.engines.match import Match, Matcher
from regrow.engines.packed import Packed
from regrow.engines.sharding import shard, whole_again

STEPS = 3
Found = dict[str, Any]


def llama(width: int, neurons: int, tied: bool, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=neurons,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def as_accelerate_does(model: Any) -> None:
    """Blocks, embedding, norm with head, root."""
    for block in model.model.layers:
        fully_shard(block)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    tail = [model.model.norm, model.model.embed_tokens, model.lm_head] if tied else [model.model.norm, model.lm_head]
    if not tied:
        fully_shard(model.model.embed_tokens)
    fully_shard(tail, reshard_after_forward=False)
    fully_shard(model)


def everything_at_once(model: Any) -> None:
    fully_shard(model, reshard_after_forward=True)


def learn(spread: Callable[[Any], None] | None, tied: bool) -> tuple[LlamaForCausalLM, Found]:
    """Three steps of SGD, two passes each; the teacher has other widths, and states go through a projection."""
    student, teacher = llama(16, 24, tied, 0), llama(32, 48, tied, 1)
    matcher = Matcher(Match(LIKENESSES.get("cosine"), (0, 1), 1.0), student, teacher)
    loss = FromTeacher(teacher, DIVERGENCES.get("forward-kl"), text=0.5, matcher=matcher)
    world, rank = (1, 0) if spread is None else (distributed.get_world_size(), distributed.get_rank())
    losses: list[Tensor] = []
    with whole_again(student):
        if spread is not None:
            spread(student)
            shard(teacher)
        optimizer = torch.optim.SGD([*student.parameters(), *matcher.parameters()], lr=0.1)
        for step in range(STEPS):
            total = torch.zeros(())
            for rows in patterns(8, step).split(4):
                answer = loss(student, {"input_ids": rows[rank::world]})
                assert isinstance(answer, tuple)
                (answer[0] / 2).backward()
                total += answer[0].detach() / 2 / world
            if spread is not None:
                distributed.all_reduce(total)
                for weight in matcher.parameters():
                    distributed.all_reduce(weight.grad)
                    weight.grad /= world
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
        text = joined([Packed(patterns(3, 7)), Packed(patterns(2, 8))])
        held = by_domain(student, text, torch.device("cpu"))
    return student, {"losses": torch.stack(losses).tolist(), "held": held}


def main(out: Path) -> None:
    distributed.init_process_group("gloo")
    ways = {"blocks and root": shard, "as accelerate does": as_accelerate_does, "at once": everything_at_once}
    report: dict[str, Found] = {}
    for tied in (False, True):
        whole, expected = learn(None, tied)
        start = llama(16, 24, tied, 0).state_dict()
        for name, spread in ways.items():
            student, found = learn(spread, tied)
            state = student.state_dict()
            off = max((state[key] - value).abs().max().item() for key, value in whole.state_dict().items())
            moved = max((state[key] - value).abs().max().item() for key, value in start.items())
            head = head_of(student)
            assert head is not None
            report[f"{name}, tied: {tied}"] = {
                "expected": expected,
                "found": found,
                "off": off,
                "moved": moved,
                "plain": type(student) is LlamaForCausalLM and type(head.weight) is torch.nn.Parameter,
                "tied": head.weight is student.get_input_embeddings().weight,
                "logits": (student(patterns(2)).logits - whole(patterns(2)).logits).abs().max().item(),
            }
    if distributed.get_rank() == 0:
        out.write_text(json.dumps(report), encoding="utf-8")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
