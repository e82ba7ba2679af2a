"""Block losses equal the plain forward's; scores follow from them by hand; broken models are named."""

from __future__ import annotations

import hashlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from regrow.engines import perplexity
from regrow.engines.perplexity import block_losses, evaluating, ratio, score_text
from regrow.errors import BrokenModel, TextError

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "gemma2": Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, final_logit_softcapping=4.0),
    "gpt_neox": GPTNeoXConfig(**SMALL),
    "cohere": CohereConfig(**SMALL, num_key_value_heads=2, logit_scale=0.25),
    "granite": GraniteConfig(**SMALL, num_key_value_heads=2, logits_scaling=3.0),
}


def build(family: str = "llama") -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[family])


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; byte 0 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="\u0100")


def plain(model: Any, blocks: torch.Tensor) -> torch.Tensor:
    """The definition: one forward a block, mean cross entropy of tokens 2..T."""
    model.eval()
    with torch.no_grad():
        return torch.stack([cross_entropy(model(b[None]).logits[0, :-1].double(), b[1:]) for b in blocks])


@pytest.fixture
def blocks() -> torch.Tensor:
    return torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", CONFIGS)
def test_equals_the_plain_forward(family: str, blocks: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "CHUNK", 7)
    monkeypatch.setattr(perplexity, "SLICE", 100)
    model = build(family)
    losses = block_losses(model, blocks, batch=2)
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, plain(model, blocks), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_head_is_run_in_slices(family: str, blocks: torch.Tensor) -> None:
    """Not whole, which would be as right and cost more."""
    assert perplexity._slices_agree(build(family).eval(), blocks[:1, :8])


def test_losses_whose_exp_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "block_losses", lambda *_, **__: torch.tensor([800.0], dtype=torch.float64))
    with pytest.raises(BrokenModel, match="the loss on block 0 of 'x' is 800"):
        score_text(build(), byte_tokenizer(), "many words " * 9, name="x", seqlen=40)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_a_head_it_does_not_know_is_run_whole(
    family: str, blocks: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    monkeypatch.setattr(perplexity, "_shaped", lambda _, logits: logits)
    torch.testing.assert_close(block_losses(model, blocks), plain(model, blocks), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(perplexity, "_slices_agree", lambda *_: True)  # the mutation that the probe prevents
    assert (block_losses(model, blocks) - plain(model, blocks)).abs().min() > 1e-3


def test_logits_are_never_all_there(blocks: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "CHUNK", 10)
    monkeypatch.setattr(perplexity, "SLICE", 100)
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(perplexity, "_shaped", lambda _, logits: seen.append(tuple(logits.shape)) or logits)
    block_losses(build(), blocks)
    assert max(tokens for tokens, _ in seen) == 10
    assert {words for _, words in seen} == {100, 56}


def test_a_head_with_a_bias(blocks: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "SLICE", 100)
    model = build()
    model.lm_head = torch.nn.Linear(model.config.hidden_size, 256)
    torch.nn.init.normal_(model.lm_head.bias)

    def forward(input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:  # the stock one, around a head of our own
        return SimpleNamespace(logits=model.lm_head(model.model(input_ids=input_ids).last_hidden_state))

    model.forward = forward
    own = torch.stack([cross_entropy(forward(b[None]).logits[0, :-1].double(), b[1:]) for b in blocks])
    torch.testing.assert_close(block_losses(model, blocks), own, rtol=1e-5, atol=1e-5)
    assert perplexity._slices_agree(model, blocks[:1, :8])


@pytest.mark.parametrize("how", ["hook", "class"])
def test_what_acts_on_the_head_is_not_passed_by(blocks: torch.Tensor, how: str) -> None:
    """Slices read the head's weights; a hook or a class of its own would be missed, so such heads run whole."""
    model = build()
    if how == "hook":
        model.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * 1.5,))
    else:
        model.lm_head.__class__ = type("Louder", (torch.nn.Linear,), {"forward": lambda self, x: x @ self.weight.T * 2})
    with evaluating(model):
        assert not perplexity._slices_agree(model, blocks[:1, :8])
    torch.testing.assert_close(block_losses(model, blocks), plain(model, blocks), rtol=1e-5, atol=1e-5)


def test_modes_come_back(blocks: torch.Tensor) -> None:
    model = build().train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == before
    with pytest.raises(IndexError):
        block_losses(model, blocks + 256)  # ids the embedding lacks
    assert [m.training for m in model.modules()] == before
    assert torch.is_grad_enabled()


def test_score_by_hand() -> None:
    model, tokenizer, text = build(), byte_tokenizer(), "Nineteen ünder the sun, and one. " * 3
    done: list[tuple[str, int, int]] = []
    score = score_text(model, tokenizer, text, name="sun", seqlen=16, max_tokens=50, progress=lambda *x: done.append(x))
    ids = torch.tensor(tokenizer(text)["input_ids"])[:48].view(3, 16)
    losses = plain(model, ids)
    assert score.tokens == 45
    assert score.perplexity == pytest.approx(math.exp(losses.mean().item()), rel=1e-5)
    assert score.perplexity_stderr == pytest.approx(score.perplexity * (losses.std() / 3**0.5).item(), rel=1e-4)
    assert score.bits_per_byte == pytest.approx(losses.mean().item() / math.log(2), rel=1e-5)  # a token is a byte
    assert score.losses == pytest.approx(losses.tolist(), rel=1e-5)
    assert done == [("sun", 1, 3), ("sun", 2, 3), ("sun", 3, 3)]
    assert score.record == {
        "text": "sun",
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "seqlen": 16,
        "stride": 16,
        "bos": False,
        "blocks": 3,
        "tokens": 45,
        "bytes": "decoded blocks less their first tokens",
    }


def test_one_block_has_no_spread() -> None:
    score = score_text(build(), byte_tokenizer(), "a" * 20, name="a", seqlen=16)
    assert (score.perplexity_stderr, score.bits_per_byte_stderr, score.tokens) == (None, None, 15)


def test_ratio_by_hand() -> None:
    value, stderr = ratio([1.0, 5.0], [1, 2])
    assert value == 2.0
    assert stderr == pytest.approx(math.sqrt(2 * ((1 - 2) ** 2 + (5 - 4) ** 2)) / 3)
    draws = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    assert ratio(draws.tolist(), [1] * 50)[1] == pytest.approx((draws.std() / 50**0.5).item())


def test_nan_is_a_broken_model() -> None:
    model = build()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(BrokenModel, match="loss on block 0 of 'sun' is nan"):
        score_text(model, byte_tokenizer(), "x" * 40, name="sun", seqlen=16)


def test_short_text_is_refused() -> None:
    with pytest.raises(TextError, match="5 tokens"):
        score_text(build(), byte_tokenizer(), "short", name="s", seqlen=16)
