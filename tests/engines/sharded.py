"""Run by `torchrun` with two processes: a cut student and its teacher, both sharded, learn as whole ones do in one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard
from training import VOCAB, Stop, patterns, settings
from transformers import LlamaConfig, LlamaForCausalLM

from regrow.artifacts.goal import DIVERGENCES, LIKENESSES
from regrow.engines.adapters import add_adapters
from regrow.engines.correction import correct
from regrow.engines.distil import FromTeacher
from regrow.engines.domains import by_domain, joined
from regrow.engines.head import head_of
from regrow.engines.match import Match, Matcher
from regrow.engines.mixture import Mixture
from regrow.engines.objective import Answer, Objective
from regrow.engines.packed import Packed
from regrow.engines.sharding import shard, whole_again
from regrow.engines.text_loss import by_pieces
from regrow.engines.train import train

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
    text = joined([Packed(patterns(3, 7)), Packed(patterns(2, 8))])
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
            held = by_domain(student, by_pieces, text, 4, torch.device("cpu"))
    return student, {"losses": torch.stack(losses).tolist(), "held": held}


class Plug:
    """A loss that is pulled out of the wall after so many passes."""

    def __init__(self, loss: FromTeacher, passes: int) -> None:
        self.loss, self.teacher, self.left, self.__name__ = loss, loss.teacher, passes, loss.__name__

    def __call__(self, model: Any, batch: Mapping[str, Tensor]) -> Answer:
        self.left -= model.training
        if self.left < 0:
            raise Stop
        return self.loss(model, batch)


def trained(folder: Path, *, micro_batch: int, adapters: bool, passes: int = 1000) -> tuple[Any, list[Any]]:
    """Six steps by the house's own loop."""
    student, teacher = llama(16, 24, False, 0), llama(32, 48, False, 1)
    loss = FromTeacher(teacher, DIVERGENCES.get("forward-kl"))
    model = add_adapters(student, rank=2, dropout=0.0) if adapters else student
    text, heldout = (joined([Packed(patterns(8, s)), Packed(patterns(8, s + 1))]) for s in (0, 2))
    mixture = Mixture(("one", "other"), (1.0, 2.0), 2, (2.0, 3.0))
    asked = settings(micro_batch=micro_batch, learning_rate=1e-3, evaluate_every=3, mixture=mixture)
    result = train(model, text, asked, folder=folder, loss=Objective(Plug(loss, passes)), heldout=heldout)
    return model, list(result.losses)


def as_if_on_gpus() -> None:
    """accelerate shards on GPUs alone and trains whole copies elsewhere, told to shard or not."""
    os.environ |= {
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    usual = AcceleratorState.__init__

    def told(self: Any, *given: Any, **named: Any) -> None:
        usual(self, *given, **named)
        if named.get("fsdp_plugin") is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, named["fsdp_plugin"]

    AcceleratorState.__init__ = told


def by_accelerate(out: Path) -> None:
    """A process makes two passes a step, so nine end in the fifth; it goes on from the checkpoint of the third."""
    for adapters in (False, True):
        folder = out / f"adapters-{adapters}"
        with suppress(Stop):
            trained(folder, micro_batch=1, adapters=adapters, passes=9)
            raise AssertionError("it was not interrupted")
        model, records = trained(folder, micro_batch=1, adapters=adapters)
        if distributed.get_rank() == 0:
            torch.save({"state": model.state_dict(), "records": records}, folder / "end.pt")


def corrected(out: Path, micro_batch: int) -> tuple[Any, Path]:
    """A teacher that learns the text first, and the file that it is kept in."""
    teacher, kept = llama(16, 24, False, 0).requires_grad_(False), out / "kept.safetensors"
    asked = settings(micro_batch=micro_batch, learning_rate=1e-3)
    correct(teacher, Packed(patterns()), asked, folder=out, kept=kept, heldout=Packed(patterns(3, 5)))
    return teacher, kept


def main(out: Path) -> None:
    as_if_on_gpus()
    by_accelerate(out)
    (out / "teacher").mkdir(exist_ok=True)
    corrected(out / "teacher", micro_batch=2)
    raw(out / "raw.json")
    distributed.destroy_process_group()


def raw(out: Path) -> None:
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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
