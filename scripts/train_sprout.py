"""Train `tests/sprout`: a model of a few megabytes that has really learned something.

Tests that prune a random model cannot see a wrong cut; sprout's perplexity can. Tokenizer and weights are made from
the recovery part of the demo text alone, so its calibration and held-out parts stay unseen.
What this gives up: quality. It knows words and short phrases, which is all that a test needs.

    python scripts/train_sprout.py tests/sprout
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from regrow.engines.texts import documents
from regrow.engines.tokens import blocks

VOCABULARY = 2048
BLOCK = 256
BATCH = 8  # blocks a step
PEAK = 3e-3  # learning rate
WARM_UP = 0.05  # share of all steps
SEED = 0
BOS, EOS = "<|begin|>", "<|end|>"
CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens: any text round-trips."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator((d.text for d in documents("demo", "recovery")), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token=BOS, eos_token=EOS, chat_template=CHAT, model_max_length=512
    )


def make_model(tokenizer: Any) -> Any:
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=16,
            intermediate_size=352,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to a twentieth of the peak."""
    warm = max(1, int(steps * WARM_UP))
    if step < warm:
        return PEAK * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return PEAK * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def train(model: Any, tokenizer: Any, epochs: int) -> tuple[int, float]:
    """Train in place. Returns the tokens seen and the mean loss (nats a token) of the last 50 steps."""
    text = documents("demo", "recovery")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=PEAK, betas=(0.9, 0.95)
    )
    losses: list[float] = []
    start, steps = time.monotonic(), 0
    for epoch in range(epochs):
        rows = blocks(text, tokenizer, block=BLOCK, tokens=None, seed=SEED + epoch)  # (n, BLOCK)
        batches = rows[: len(rows) // BATCH * BATCH].view(-1, BATCH, BLOCK)
        steps = steps or len(batches) * epochs
        for batch in batches:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(len(losses), steps)
            loss: Tensor = model(input_ids=batch, labels=batch).loss
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
            if len(losses) % 50 == 0:
                speed = len(losses) * BATCH * BLOCK / (time.monotonic() - start)
                print(f"step {len(losses)}/{steps} loss {sum(losses[-50:]) / 50:.3f} {speed:.0f} tokens/s", flush=True)
    return len(losses) * BATCH * BLOCK, sum(losses[-50:]) / len(losses[-50:])


@torch.no_grad()
def heldout_perplexity(folder: Path, tokenizer: Any) -> float:
    """Of the saved model, in fp32, over all held-out demo text in blocks of `BLOCK`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = blocks(documents("demo", "heldout"), tokenizer, block=BLOCK, tokens=None, seed=SEED)
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small test model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    tokens, loss = train(model, tokenizer, asked.epochs)
    model.to(torch.bfloat16).save_pretrained(asked.folder)
    tokenizer.save_pretrained(asked.folder)
    record = {
        "id": "sprout",
        "licence": "apache-2.0",
        "note": "trained from scratch on passages of CoQA, DROP, LAMBADA and SQuAD; for tests only",
        "origin": "scripts/train_sprout.py",
        "training": {
            "tokens": tokens,
            "epochs": asked.epochs,
            "train_loss": round(loss, 4),
            "heldout_perplexity": round(heldout_perplexity(asked.folder, tokenizer), 3),
        },
    }
    (asked.folder / "regrow.json").write_text(json.dumps(record, indent=2) + "\n")
    print(record)


if __name__ == "__main__":
    main()
