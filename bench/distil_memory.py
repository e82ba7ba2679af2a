"""Peak memory of learning from a teacher against the vocabulary, and how long a step waits for its text.

Memory: two random Llamas of 8 layers and 384 channels with a tied head, as student and teacher, a process for each, the
median of five; all weights train, three steps of 4 x 256 tokens. What a larger vocabulary adds is set against what must
be added: the student's embedding with its gradient and two numbers of the optimiser, and the teacher's.
Waiting: SmolLM2 at 80 % learns from SmolLM2. Packed and tokenised text of a run, and what the loop waits for batches,
as shares of the time that the training takes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distil import subject
from ledger import Ledger
from regrow.artifacts.goal import DIVERGENCES
from regrow.engines import loop
from regrow.engines.clock import PeakMemory
from regrow.engines.distil import FromTeacher
from regrow.engines.texts import documents
from regrow.engines.tokens import blocks
from regrow.engines.train import train
from regrow.engines.train_settings import TrainSettings
from regrow.stages.load import load

VOCABULARIES = (49_152, 256_000)
CHANNELS, LAYERS = 384, 8
BLOCK, BATCH, STEPS = 256, 4, 3
TURNS = 5  # processes for each vocabulary; the median counts
WAITED = 24  # steps
COPIES = 5  # of an embedding: weights, gradient, two of the optimiser; the teacher's


def main() -> None:
    if len(sys.argv) == 2:
        print(json.dumps(peak(int(sys.argv[1]))))
        return
    ledger = Ledger("distil_memory", __doc__ or "", channels=CHANNELS, layers=LAYERS, block=BLOCK, batch=BATCH)
    turns = [(words, turn) for turn in range(TURNS) for words in VOCABULARIES]
    rows = [ledger.row(f"vocabulary {words} turn {turn}", partial(apart, words)) for words, turn in turns]
    due = 4 * COPIES * CHANNELS * (VOCABULARIES[1] - VOCABULARIES[0])
    few, many = (statistics.median(row["peak_bytes"] for row in rows[first::2]) for first in (0, 1))
    grown = many - few
    ledger.row("growth", lambda: {"bytes": grown, "due": due, "ratio": grown / due})
    ledger.row("waiting", waiting)


def apart(words: int) -> dict[str, Any]:
    """In a process of its own."""
    done = subprocess.run([sys.executable, __file__, str(words)], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def settings(steps: int) -> TrainSettings:
    return TrainSettings(tokens=steps * BATCH * BLOCK, batch=BATCH, micro_batch=BATCH, save_every=10**6)


def peak(words: int) -> dict[str, Any]:
    """Bytes at the peak, beyond those of an idle process."""
    ids = torch.randint(VOCABULARIES[0], (BATCH * STEPS, BLOCK), generator=torch.Generator().manual_seed(0))
    with TemporaryDirectory() as folder, PeakMemory() as memory:
        config = LlamaConfig(
            vocab_size=words, hidden_size=CHANNELS, intermediate_size=1024, num_hidden_layers=LAYERS,
            num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
        student, teacher = LlamaForCausalLM(config), LlamaForCausalLM(config).eval()
        loss = FromTeacher(teacher, DIVERGENCES.get("forward-kl"))
        train(student, ids, settings(STEPS), folder=Path(folder), loss=loss)
    return {"peak_bytes": memory.bytes, "parameters": student.num_parameters(), "how": memory.how}


def waiting() -> dict[str, Any]:
    """Shares of a training's time."""
    student, teacher = subject("start").model, load("demo")
    tokens = WAITED * BATCH * BLOCK
    text = documents("demo", "recovery")
    began = time.perf_counter()
    ids = blocks(text, teacher.tokenizer, block=BLOCK, tokens=tokens, seed=0)
    packing, waited = time.perf_counter() - began, 0.0
    plain = loop.Loop.get_batch_samples

    def timed(*given: Any, **named: Any) -> Any:
        nonlocal waited
        start = time.perf_counter()
        try:
            return plain(*given, **named)
        finally:
            waited += time.perf_counter() - start

    loop.Loop.get_batch_samples = timed
    with TemporaryDirectory() as folder:
        loss = FromTeacher(teacher.model, DIVERGENCES.get("forward-kl"))
        done = train(student, ids, settings(WAITED), folder=Path(folder), loss=loss)
    return {
        "seconds": done.seconds, "waiting": waited / done.seconds, "packing": packing / done.seconds, "tokens": tokens
    }  # fmt: skip


if __name__ == "__main__":
    main()
