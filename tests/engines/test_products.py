"""Faster products are the same products: right to fp32, in every layout, and nobody's choice is overruled."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

from regrow.engines import products
from regrow.stages.load import load

AMD = "vendor_id\t: AuthenticAMD\nmodel name : AMD EPYC\nflags\t\t: fpu avx2 avx512f avx512bw\nbugs : none\n"


@pytest.fixture(autouse=True)
def setting() -> Iterator[None]:
    chosen = torch.backends.mkldnn.matmul
    before = chosen.fp32_precision
    chosen.fp32_precision = "none"
    yield
    chosen.fp32_precision = before


def matrices(rows: int, inner: int, columns: int, turned: tuple[bool, bool]) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(rows + inner + columns)
    a = torch.randn(inner, rows, generator=draw).T if turned[0] else torch.randn(rows, inner, generator=draw)
    b = torch.randn(columns, inner, generator=draw).T if turned[1] else torch.randn(inner, columns, generator=draw)
    return a, b


@pytest.mark.parametrize("turned", list(product((False, True), repeat=2)))
def test_products_are_right_to_fp32_in_every_layout(turned: tuple[bool, bool]) -> None:
    products.speed_up()
    for shape in product((1, 16, 129, 577), repeat=3):
        a, b = matrices(*shape, turned)
        assert products.rounds_as_fp32(a @ b, a, b), shape
        assert products.rounds_as_fp32(torch.nn.functional.linear(a[None], b.T)[0], a, b), shape
        assert torch.equal(a @ b, a @ b)


def test_a_product_rounded_to_bf16_is_found_out() -> None:
    a, b = matrices(64, 64, 64, (False, False))
    assert products.rounds_as_fp32(a @ b, a, b)
    assert not products.rounds_as_fp32((a.bfloat16() @ b.bfloat16()).float(), a, b)
    assert not products.rounds_as_fp32(a.bfloat16().float() @ b, a, b)


def test_loading_a_model_speeds_up_where_the_trial_was_exact(monkeypatch: pytest.MonkeyPatch, sprout_dir: Path) -> None:
    monkeypatch.setattr(products, "_worthwhile", lambda: True)
    monkeypatch.setattr(products, "_exact", lambda: True)
    load(str(sprout_dir))
    assert products.library() == "oneDNN"


@pytest.mark.parametrize("missing", ["_worthwhile", "_exact"])
def test_without_reason_or_proof_nothing_changes(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(products, "_worthwhile", lambda: missing != "_worthwhile")
    monkeypatch.setattr(products, "_exact", lambda: missing != "_exact")
    products.speed_up()
    assert products.library() == "usual"


def test_a_choice_of_the_user_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_worthwhile", lambda: True)
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    products.speed_up()
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


def test_the_trial_leaves_the_setting() -> None:
    products._exact.__wrapped__()
    assert products.library() == "usual"


@pytest.mark.parametrize(
    ("info", "wanted"),
    [
        (AMD, True),
        (AMD.replace("AuthenticAMD", "GenuineIntel"), False),
        (AMD.replace("avx512bw", "amx_tile"), False),
        (AMD.replace("avx512f", "avx"), False),
        ("Features : asimd bf16\n", False),
        ("", False),
    ],
)
def test_which_processors_are_meant(info: str, wanted: bool) -> None:
    assert products.worthwhile(info) is wanted
