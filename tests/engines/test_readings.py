"""Readings on disk: the same answer as without them, for other criteria too, and no block runs any more."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import make
from regrow.artifacts.linear import SOLVERS
from regrow.artifacts.pattern import Pattern
from regrow.artifacts.weight_sight import WEIGHT_CRITERIA
from regrow.engines import sparsify as engine
from regrow.engines.bind import Subject, bind
from regrow.engines.inputs import STRIPE, Reading
from regrow.engines.readings import SERVED_BY, Readings
from regrow.engines.sparsify import Method, layer_values, sparsify
from regrow.engines.texts import documents
from regrow.engines.tokens import blocks
from regrow.errors import SettingsError
from regrow.settings import Sparsify
from regrow.stages.load import load
from regrow.stages.sparsify import choose, reads_kept


@pytest.fixture(scope="module")
def sprout(sprout_dir: Path) -> Subject:
    return load(str(sprout_dir))


@pytest.fixture(scope="module")
def text(sprout: Subject) -> Tensor:  # (6, 64)
    return blocks(documents("demo", "calibration"), sprout.tokenizer, block=64, tokens=6 * 64, seed=0)


@pytest.fixture
def shelf(sprout: Subject, tmp_path: Path) -> Readings:
    return Readings(tmp_path, sprout.anatomy.sizes["L"])


def dense(criterion: str, *solvers: str) -> Method:
    found = WEIGHT_CRITERIA.get(criterion)
    chain = tuple((SOLVERS.get(name), {}) for name in solvers or (found.solver,))
    return Method(found, chain, inputs="dense")


def cut(subject: Subject, text: Tensor, method: Method, pattern: str = "50%", **more: Any) -> dict[str, Tensor]:
    model = copy.deepcopy(subject.model)
    sparsify(model, subject.anatomy, text, method, [Pattern.parse(pattern)] * len(list(model.model.layers)), **more)
    return {name: p.detach() for name, p in model.named_parameters()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> Any:
    """From here on no block may run."""

    def stop() -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("a block ran")

        monkeypatch.setattr(engine, "run_layer", refuse)
        monkeypatch.setattr(engine, "enter", refuse)

    return stop


@pytest.mark.parametrize("width", [5, STRIPE, STRIPE + 3])
@pytest.mark.parametrize("sees", SERVED_BY)
def test_a_reading_comes_back(sees: str, width: int) -> None:
    first = Reading(width, "all", torch.device("cpu"))
    first.add(torch.randn(40, width, generator=torch.Generator().manual_seed(0)))
    made, gram = Reading.made_of(first.tensors(), sees), first.take_gram()
    assert made.tokens == 40
    assert (made.products is not None) == (sees in ("gram", "all"))
    if made.products is not None:
        assert torch.equal(made.take_gram(), gram)
    for name in ("squares", "sums", "variance"):
        assert torch.equal(getattr(made.inputs(4), name), getattr(first.inputs(4), name)), name


def test_the_same_with_them_as_without(sprout: Subject, text: Tensor, shelf: Readings, silence: Any) -> None:
    method = dense("sparsegpt")
    plain = cut(sprout, text, method)
    assert equal(plain, cut(sprout, text, method, kept=shelf))
    silence()
    assert equal(plain, cut(sprout, text, method, kept=shelf))


@pytest.mark.parametrize(
    ("criterion", "solvers", "pattern"),
    [("wanda", (), "50%"), ("sparsegpt", ("update", "refit"), "2:4"), ("sparsegpt", ("alps",), "75%")],
)
def test_gram_matrices_serve_others(
    sprout: Subject, text: Tensor, shelf: Readings, silence: Any, criterion: str, solvers: tuple[str, ...], pattern: str
) -> None:
    wanted = cut(sprout, text, dense(criterion, *solvers), pattern)
    cut(sprout, text, dense("sparsegpt"), kept=shelf)
    silence()
    found = cut(sprout, text, dense(criterion, *solvers), pattern, kept=shelf)
    for name, weight in wanted.items():  # squares come from the products' diagonal: another order of adding up
        assert torch.equal(found[name] == 0, weight == 0), name
        assert torch.allclose(found[name], weight, atol=1e-5), name


def test_a_spread_by_inputs_is_served(sprout: Subject, text: Tensor, shelf: Readings, silence: Any) -> None:
    def mean(scores: Callable[[], Iterable[Tensor]]) -> float:
        return float(torch.cat([part.flatten() for part in scores()]).mean())

    wanted = layer_values(sprout.model, sprout.anatomy, text, mean)
    cut(sprout, text, dense("wanda"), kept=shelf)
    silence()
    assert layer_values(sprout.model, sprout.anatomy, text, mean, kept=shelf) == wanted


def test_what_serves_whom(sprout: Subject, text: Tensor, shelf: Readings) -> None:
    cut(sprout, text, dense("wanda"), kept=shelf)
    assert shelf.holds("inputs", False)
    assert not shelf.holds("inputs", True), "inputs weighted by a router are others"
    assert not any(shelf.holds(sees, False) for sees in ("gram", "moments", "all"))


def test_a_pass_that_broke_off_is_read_again(sprout: Subject, text: Tensor, shelf: Readings) -> None:
    wanted = cut(sprout, text, dense("wanda"), kept=shelf)
    next(shelf.folder.glob("inputs-1.*")).unlink()
    assert not shelf.holds("inputs", False)
    assert equal(wanted, cut(sprout, text, dense("wanda"), kept=shelf))
    assert shelf.holds("inputs", False)


def test_experts_are_kept_one_by_one(tmp_path: Path, silence: Any) -> None:
    model = make("mixtral")
    anatomy = bind(model.config)
    ids = torch.randint(0, model.config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(0))
    patterns = [Pattern.parse("50%")] * anatomy.sizes["L"]
    shelf, other = Readings(tmp_path, anatomy.sizes["L"]), copy.deepcopy(model)
    sparsify(model, anatomy, ids, dense("moe-pruner"), patterns, kept=shelf)
    assert shelf.holds("inputs", True)
    silence()
    sparsify(other, anatomy, ids, dense("moe-pruner"), patterns, kept=shelf)
    assert equal(dict(model.named_parameters()), dict(other.named_parameters()))


def test_only_dense_inputs_are_kept() -> None:
    with pytest.raises(SettingsError, match="inputs = dense"):
        choose(Sparsify(keep_statistics=True))
    choose(Sparsify(keep_statistics=True, inputs="dense"))


def test_weights_alone_need_no_readings(shelf: Readings) -> None:
    assert not reads_kept(Sparsify(criterion="magnitude", inputs="dense"), shelf)
