"""Sprout has learned: its held-out perplexity is far below a unigram's, and a wrong cut shows in it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from regrow.cache import size_bytes
from regrow.engines.texts import documents
from regrow.engines.tokens import blocks, check_vocabulary

BOUND = 50.0  # held-out perplexity; the whole held-out part is in the model's regrow.json


@pytest.fixture(scope="module")
def sprout(sprout_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(sprout_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(sprout_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(sprout_dir)


@pytest.fixture(scope="module")
def heldout(tokenizer: Any) -> Tensor:  # (12, 256)
    return blocks(documents("demo", "heldout"), tokenizer, block=256, tokens=3072, seed=0)


@torch.no_grad()
def perplexity(model: Any, rows: Tensor) -> float:
    return math.exp(model(input_ids=rows, labels=rows).loss.item())


def test_heldout_perplexity_is_far_below_a_unigram_s(sprout: Any, tokenizer: Any, heldout: Tensor) -> None:
    seen = blocks(documents("demo", "calibration"), tokenizer, block=256, tokens=None, seed=0)
    counts = torch.bincount(seen.flatten(), minlength=len(tokenizer)).double() + 1
    unigram = math.exp(-(counts / counts.sum()).log()[heldout[:, 1:]].mean().item())
    assert 300 < unigram < 900
    assert perplexity(sprout, heldout) < min(BOUND, unigram / 6)


def test_random_weights_know_nothing(sprout: Any, heldout: Tensor) -> None:
    torch.manual_seed(0)
    random = AutoModelForCausalLM.from_config(sprout.config)
    assert perplexity(random, heldout) > 1500


def test_a_wrong_cut_shows(sprout: Any, heldout: Tensor) -> None:
    """Two key heads swapped in one layer, with their values left where they are."""
    whole = perplexity(sprout, heldout)
    wrong = copy.deepcopy(sprout)
    keys = wrong.model.layers[3].self_attn.k_proj.weight  # (4 heads x 16, 128)
    keys.data = keys.data.view(4, 16, 128)[[1, 0, 2, 3]].reshape(64, 128)
    assert perplexity(wrong, heldout) > whole * 1.2


def test_the_folder_is_small_and_says_what_it_is(sprout: Any, sprout_dir: Path, tokenizer: Any) -> None:
    assert size_bytes(sprout_dir) <= 6_000_000
    card = json.loads((sprout_dir / "regrow.json").read_text())
    assert card["id"] == "sprout"
    assert card["licence"] == "apache-2.0"
    assert card["training"]["heldout_perplexity"] < BOUND
    assert sum(weight.numel() for weight in sprout.parameters()) == 1_369_728
    assert sprout.lm_head.weight is sprout.model.embed_tokens.weight
    check_vocabulary(tokenizer, sprout.config.vocab_size)


def test_the_tokenizer_round_trips_and_chats(tokenizer: Any) -> None:
    text = " Fünf 'quotes' — 1984\n\n\t😀 n't"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == 1
    assert tokenizer.bos_token_id == 0
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "user: hi<|end|>assistant: "
