"""Budgets in the user's terms: what they mean, and what is refused."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from regrow.artifacts.budget import Budget
from regrow.artifacts.shape import MEASURES
from regrow.engines.bind import bind
from regrow.errors import BudgetError

GOOD = [
    ("80%", "decoder_weights", 0.8, True),
    ("62.5 %", "decoder_weights", 0.625, True),
    (" 100% ", "decoder_weights", 1.0, True),
    ("108M", "parameters", 108e6, False),
    ("1.5B", "parameters", 1.5e9, False),
    ("2G", "parameters", 2e9, False),
    ("700K", "parameters", 7e5, False),
    ("1T", "parameters", 1e12, False),
    ("108000000", "parameters", 108e6, False),
    ("params=90%", "parameters", 0.9, True),
    ("params=108m", "parameters", 108e6, False),
    ("220MB", "file_bytes", 220e6, False),
    ("1.2GB", "file_bytes", 1.2e9, False),
    ("900kb", "file_bytes", 9e5, False),
    ("file=75%", "file_bytes", 0.75, True),
    ("file=220MB", "file_bytes", 220e6, False),
    ("file=220M", "file_bytes", 220e6, False),
    ("kv=75%", "kv_bytes_per_token", 0.75, True),
    ("kv=12KB", "kv_bytes_per_token", 12e3, False),
    ("kv=12000", "kv_bytes_per_token", 12e3, False),
    ("KV=12000B", "kv_bytes_per_token", 12e3, False),
    ("flops=75%", "flops_per_token", 0.75, True),
    ("flops=3G", "flops_per_token", 3e9, False),
    ("decoder=80M", "decoder_weights", 80e6, False),
]
BAD = [
    "",
    "eighty",
    "80 percent",
    "-5%",
    "0%",
    "101%",
    "0.8",
    "1",
    "12 ms/token",
    "latency=5",
    "80%%",
    "5MBB",
    "MB",
    "nan%",
]


@pytest.mark.parametrize(("text", "measure", "limit", "relative"), GOOD, ids=[g[0] for g in GOOD])
def test_forms(text: str, measure: str, limit: float, relative: bool) -> None:
    budget = Budget.parse(text)
    assert (budget.measure, budget.relative) == (measure, relative)
    assert budget.limit == pytest.approx(limit, rel=1e-12)
    assert budget.text == text


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse(text)
    assert repr(text) in caught.value.came
    assert "80%" in caught.value.allowed


def test_a_bare_share_says_what_to_write() -> None:
    with pytest.raises(BudgetError, match="write 80% if a share is meant"):
        Budget.parse("0.8")


def test_target_is_the_largest_count_that_meets_it() -> None:
    config = LlamaConfig(
        hidden_size=12, intermediate_size=10, num_hidden_layers=2, num_attention_heads=2, head_dim=6, vocab_size=7
    )
    anatomy = bind(config)
    dense = MEASURES["decoder_weights"](anatomy, anatomy.dense)
    assert Budget.parse("80%").target(anatomy) == int(dense * 0.8)
    assert Budget.parse("100%").target(anatomy) == dense
    assert Budget.parse("30%").target(anatomy) <= 0.3 * dense + 1e-6
    assert Budget.parse("1234").target(anatomy) == 1234
    for text, measure, *_ in GOOD:
        assert Budget.parse(text).count(anatomy, anatomy.dense) == MEASURES[measure](anatomy, anatomy.dense)


def test_budgets_print() -> None:
    assert str(Budget.parse("80%")) == "80 % of decoder weights"
    assert str(Budget.parse("108M")) == "108,000,000 parameters"
    assert str(Budget.parse("kv=12KB")) == "12,000 kv bytes per token"
