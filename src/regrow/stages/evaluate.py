"""Stage evaluate: measured numbers of one model; called before and after a cut with the same settings.

What this gives up: texts and tasks are measured one after the other, each with a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from regrow.artifacts.report import Measure
from regrow.artifacts.shape import Anatomy, Shape, costs
from regrow.engines.clock import PeakMemory, measure_speed
from regrow.engines.perplexity import score_text
from regrow.engines.tasks import check_tasks, evaluate_tasks
from regrow.engines.texts import documents, is_rows
from regrow.engines.tokens import text_blocks
from regrow.errors import TextError
from regrow.settings import Evaluate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]
WORDS = 24  # new tokens of a sample
PROMPT, DECODE = 256, 32  # tokens read and written when speed and memory are measured
HELD = "heldout:"  # before the name of a file


def check_asked(settings: Evaluate) -> None:
    """Raise now for a task nobody knows or whose rows are missing, or a text that is not there."""
    check_tasks(settings.tasks)
    if settings.text is not None:
        read_text(settings.text)


def check_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Evaluate) -> None:
    """Raise `TextError` now for a text that does not fill one block."""
    if settings.text is not None:
        _, text, _ = read_text(settings.text)
        text_blocks(text, tokenizer, seqlen=_seqlen(model, settings), max_tokens=settings.max_tokens)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Evaluate,
    *,
    progress: Progress | None = None,
) -> dict[str, Measure]:
    """Perplexity and bits per byte of the text, zero-shot tasks, speed and peak memory of a forward pass."""
    found: dict[str, Measure] = {}
    if settings.text is not None:
        found |= measure_text(model, tokenizer, settings, progress)
    if settings.tasks:
        found |= evaluate_tasks(
            model,
            tokenizer,
            settings.tasks,
            limit=settings.limit,
            batch=settings.batch,
            progress=progress,
        )
    if settings.speed:
        # once before, since what libraries set up at their first product is not the model's memory
        measure_speed(model, prompt=PROMPT, decode=DECODE, repeats=1, warmup=0)
        with PeakMemory(model.device) as memory:
            found |= measure_speed(model, prompt=PROMPT, decode=DECODE, repeats=settings.repeats)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        how = {
            "how": f"weights, and {memory.how}",
            "while": f"prompts of {PROMPT} and {DECODE} decoded tokens, batch 1 and 8",
        }
        found["memory/peak_bytes"] = Measure(weights + memory.bytes, "bytes", "lower", how=how)
    return found


def measure_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Evaluate, progress: Progress | None = None
) -> dict[str, Measure]:
    """`text/NAME/perplexity` and `text/NAME/bits_per_byte`."""
    assert settings.text is not None
    name, text, origin = read_text(settings.text)
    score = score_text(
        model,
        tokenizer,
        text,
        name=name,
        seqlen=_seqlen(model, settings),
        max_tokens=settings.max_tokens,
        progress=progress,
    )
    record = {**score.record, **origin}
    return {
        f"text/{name}/perplexity": Measure(
            score.perplexity,
            "perplexity",
            "lower",
            score.perplexity_stderr,
            score.tokens,
            how=record,
            each=score.losses,
        ),
        f"text/{name}/bits_per_byte": Measure(
            score.bits_per_byte,
            "bits/byte",
            "lower",
            score.bits_per_byte_stderr,
            score.tokens,
            how=record,
            each=score.losses,
        ),
    }


def _seqlen(model: PreTrainedModel, settings: Evaluate) -> int:
    """Tokens in a block: what is asked, or the most that the model allows."""
    return min(settings.seqlen, getattr(model.config, "max_position_embeddings", settings.seqlen))


def read_text(source: str) -> tuple[str, str, dict[str, Any]]:
    """(name, text, where it is from): a file whole, or the held-out documents of a source, in a fixed random order.

    A file is text as it is, or rows, which blank lines join; `heldout:FILE` is a source. Sources list one domain after
    the other; shuffled, the first tokens are of all of them.
    """
    path = Path(source).expanduser()
    if path.is_file() and is_rows(path):
        rows = [document.text for document in documents(source, None)]
        return path.name, "\n\n".join(rows), {"split": "the whole file", "join": "blank lines", "documents": len(rows)}
    if path.is_file():
        try:
            return path.name, path.read_text(encoding="utf-8"), {"split": "the whole file", "join": "as it is"}
        except UnicodeDecodeError as error:
            raise TextError(
                f"{path} is not text ({error.reason})", "a UTF-8 text file", "convert it to UTF-8"
            ) from error
    plain = source.removeprefix(HELD)
    found = documents(plain, "heldout")
    Random(0).shuffle(found)
    domains = sorted({document.domain for document in found})
    origin = {"split": "held out", "join": "blank lines", "documents": len(found), "domains": domains}
    name = source.replace("/", "-") if plain == source else Path(plain).name
    return f"{name} held out", "\n\n".join(document.text for document in found), origin


def sizes(anatomy: Anatomy, shape: Shape) -> dict[str, Measure]:
    """`size/...`: every count of a shape."""
    units = {"file_bytes": "bytes", "kv_bytes_per_token": "bytes per token", "flops_per_token": "FLOPs"}
    found = costs(anatomy, shape).to_json()
    context = found.pop("context")
    return {
        f"size/{name}": Measure(
            value, units.get(name, ""), "lower", how={"context": context} if "flops" in name else {}
        )
        for name, value in found.items()
    }


@torch.inference_mode()
def write_samples(model: Any, tokenizer: Any, prompts: tuple[str, ...]) -> list[str]:
    """Greedy continuations, through the chat template where the tokenizer has one and the prompt is a question."""
    found = []
    for prompt in prompts:
        chat = tokenizer.chat_template and prompt.rstrip().endswith("?")
        text = prompt
        if chat:
            messages = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).input_ids.to(model.device)
        if not ids.shape[1]:
            found.append("")
            continue
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        mask = torch.ones_like(ids)
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=WORDS,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
        )
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return found
