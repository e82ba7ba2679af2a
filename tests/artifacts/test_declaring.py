"""Registries and the decorators that fill them: names, refusals, and folders that are walked when first asked."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from regrow.artifacts.ask import SPREADS, Ask, spread
from regrow.artifacts.family import FAMILIES, declare
from regrow.artifacts.sight import CRITERIA, Moments, Sight, criterion
from regrow.errors import UnknownName
from regrow.registry import Registry


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    for registry in (CRITERIA, SPREADS, FAMILIES):
        registry.names()  # walk first
        monkeypatch.setattr(registry, "_items", dict(registry._items))


def test_a_criterion_is_registered_with_what_it_needs() -> None:
    @criterion(sees="weight", paper="arXiv:0", units=("neuron",), comparable=True)
    def my_own(sight: Sight, power: int = 3) -> torch.Tensor:
        """What it measures.

        More.
        """
        assert sight.weight is not None
        return sight.weight.abs().pow(power).sum((1, 2))

    found = CRITERIA.get("my-own")
    assert (found.sees, found.units, found.about, found.options) == (
        "weight",
        ("neuron",),
        "What it measures.",
        {"power": 3},
    )
    assert found.score is my_own
    assert "my-own" in CRITERIA.names()


def test_a_criterion_without_a_docstring_is_refused() -> None:
    with pytest.raises(TypeError, match="no docstring"):

        @criterion(sees="weight", paper="-")
        def silent(sight: Sight) -> torch.Tensor:
            return torch.zeros(sight.units)


def test_an_option_needs_a_default_and_a_type() -> None:
    with pytest.raises(TypeError, match="'power' needs a default"):

        @criterion(sees="weight", paper="-")
        def forced(sight: Sight, power: int) -> torch.Tensor:
            """Has an option nobody can leave out."""
            return torch.full((sight.units,), float(power))

    with pytest.raises(TypeError, match="'power' needs a default"):

        @criterion(sees="weight", paper="-")
        def loose(sight: Sight, power=2) -> torch.Tensor:  # type: ignore[no-untyped-def]
            """Has an option nobody can check."""
            return torch.full((sight.units,), float(power))


def test_a_criterion_cannot_see_or_score_what_is_not_there() -> None:
    with pytest.raises(TypeError, match="hessian"):
        criterion(sees="hessian", paper="-")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expert"):
        criterion(sees="weight", paper="-", units=("neuron", "expert"))  # type: ignore[arg-type]


def test_what_is_seen_and_what_is_scored_must_go_together() -> None:
    with pytest.raises(TypeError, match="whole layers"):
        criterion(sees="angles", paper="-")
    with pytest.raises(TypeError, match="leave 'layer' out"):
        criterion(sees="flow", paper="-")
    with pytest.raises(TypeError, match="sequence: Reduction"):

        @criterion(sees="flow", paper="-", units=("neuron",))
        def unsaid(sight: Sight) -> torch.Tensor:
            """Does not say how a sequence is reduced."""
            return torch.zeros(sight.units)

    with pytest.raises(TypeError, match="'task: str' and 'limit: int'"):

        @criterion(sees="task", paper="-", units=("layer",))
        def unasked(sight: Sight, task: str = "piqa") -> torch.Tensor:
            """Does not say how many items are asked."""
            return torch.zeros(sight.units, sight.units + len(task))


def test_the_code_of_a_criterion_is_that_of_its_file(tmp_path: Path) -> None:
    def made(body: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(f'def mine(sight):\n    """Mine."""\n    return {body}\n')
        scope: dict[str, Any] = {}
        exec(compile(path.read_text(), str(path), "exec"), scope)
        CRITERIA._items.pop("mine", None)
        criterion(sees="weight", paper="-")(scope["mine"])
        return CRITERIA.get("mine").code

    assert made("1") == made("1") != made("2")


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="'taylor' is registered twice"):

        @criterion(sees="grad", paper="-")
        def taylor(sight: Sight) -> torch.Tensor:
            """Another one."""
            return torch.zeros(sight.units)

    with pytest.raises(ValueError, match="'llama' is registered twice"):
        declare(FAMILIES.get("llama"))


def test_a_spread_is_registered() -> None:
    @spread(paper="-")
    def first_come(ask: Ask) -> list[int]:
        """The first layers keep all they can."""
        return [ask.total // ask.layers] * ask.layers

    assert SPREADS.get("first-come").share is first_come
    with pytest.raises(TypeError, match="no docstring"):
        spread(paper="-")(lambda ask: [ask.total])


@pytest.mark.parametrize("registry", [CRITERIA, SPREADS, FAMILIES], ids=lambda r: r.noun)
def test_an_unknown_name_gets_the_nearest(registry: Registry[object]) -> None:
    name = registry.names()[0]
    with pytest.raises(UnknownName) as caught:
        registry.get(name + "x")
    assert f"did you mean {name!r}" in caught.value.came
    assert all(n in caught.value.allowed for n in registry.names())
    assert "regrow ls" in caught.value.todo
    assert dict(registry.items()).keys() == set(registry.names())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    package = tmp_path / "strange_knowledge"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    for name in [n for n in sys.modules if n.startswith("strange_knowledge")]:
        del sys.modules[name]


def test_a_folder_is_walked_when_first_asked(folder: Path) -> None:
    registry: Registry[int] = Registry("thing", "strange_knowledge")
    (folder / "one.py").write_text("import sys\nsys.modules['strange_knowledge'].REGISTRY.add('one', 1)\n")
    assert "strange_knowledge" not in sys.modules
    import strange_knowledge  # type: ignore[import-not-found]

    strange_knowledge.REGISTRY = registry
    assert registry.names() == ["one"]
    assert registry.get("one") == 1


def test_an_import_error_is_raised_and_not_swallowed(folder: Path) -> None:
    (folder / "broken.py").write_text("import not_there_at_all\n")
    registry: Registry[int] = Registry("thing", "strange_knowledge")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
            registry.names()


def test_moments_by_hand() -> None:
    """Two sequences, one unit of two channels: 1 and 3, 2 and 2."""
    moments = Moments(torch.tensor([[4.0, 4.0]]), torch.tensor([[10.0, 8.0]]), 2)
    assert moments.reduce("mean").tolist() == [[2, 2]]
    assert moments.reduce("l2").tolist() == [pytest.approx([10**0.5, 8**0.5])]
    assert moments.reduce("var").tolist() == [[1, 0]]
