"""Faster products are the same products: right to fp32, in every layout, and nobody's choice is overruled."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

import regrow
from regrow.engines import products

NOTHING = {"text": None, "tasks": [], "speed": False}
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
    with products.faster():
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


def test_a_run_is_faster_where_that_is_exact_and_leaves_torch_as_it_was(
    monkeypatch: pytest.MonkeyPatch, sprout_dir: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(products, "_known", lambda: True)
    report = regrow.sparsify(str(sprout_dir), tmp_path / "out", criterion="magnitude", pattern="2:4", evaluate=NOTHING)
    assert report.machine["fp32_products"] == "oneDNN"
    assert products.library() == "usual"


def test_it_ends_with_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_known", lambda: True)
    fails = products.faster()(lambda: pytest.fail(products.library()))
    with pytest.raises(pytest.fail.Exception, match="oneDNN"):
        fails()
    assert products.library() == "usual"


def test_without_reason_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_known", lambda: False)
    with products.faster():
        assert products.library() == "usual"


@pytest.mark.parametrize(("reason", "proof"), [(False, True), (True, False)])
def test_both_reason_and_proof_are_asked(monkeypatch: pytest.MonkeyPatch, reason: bool, proof: bool) -> None:
    monkeypatch.setattr(products, "worthwhile", lambda _: reason)
    monkeypatch.setattr(products, "_exact", lambda: proof)
    assert not products._known.__wrapped__()


@pytest.mark.parametrize(("chosen", "says"), [("ieee", "ieee"), ("bf16", "bf16")])
def test_a_choice_of_the_user_stands_and_is_told(monkeypatch: pytest.MonkeyPatch, chosen: str, says: str) -> None:
    monkeypatch.setattr(products, "_known", lambda: False)  # where bf16 is what it says
    torch.backends.mkldnn.matmul.fp32_precision = chosen
    with products.faster():
        assert torch.backends.mkldnn.matmul.fp32_precision == chosen
        assert products.library() == says
    assert torch.backends.mkldnn.matmul.fp32_precision == chosen


def test_the_trial_leaves_the_setting() -> None:
    products._exact()
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
