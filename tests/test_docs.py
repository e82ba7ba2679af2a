"""The documents tell the truth: examples run as they stand, tables are what the code says, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from regrow.artifacts.ask import SPREADS
from regrow.artifacts.budget import Budget
from regrow.artifacts.curvature import Curvature
from regrow.artifacts.family import FAMILIES, Unit
from regrow.artifacts.linear import SOLVERS, Linear, Sparse
from regrow.artifacts.pattern import Pattern
from regrow.artifacts.share import ZERO_SPREADS
from regrow.artifacts.sight import CRITERIA
from regrow.artifacts.weight_sight import WEIGHT_CRITERIA, WeightSight
from regrow.dryrun import dry_run
from regrow.engines.bind import Subject, bind
from regrow.prepare import check
from regrow.recipe_files import overlay, read_recipe
from regrow.recovery import Recover
from regrow.settings import PARTS, Recipe, Sparsify, parse
from regrow.stages import sparsify
from regrow.stages.apply import apply
from regrow.stages.load import load
from regrow.stages.plan import Wish, make_plan
from regrow.stages.score import choose, score

REPO = Path(__file__).parents[1]
PAGES = [*REPO.glob("*.md"), *(REPO / "docs").glob("*.md")]


def examples() -> dict[str, str]:
    """Path a block of CONTRIBUTING.md would have -> its text."""
    pattern = re.compile(r"<!-- example: (\S+) -->\n```\w+\n(.*?)```", re.DOTALL)
    return dict(pattern.findall((REPO / "CONTRIBUTING.md").read_text()))


CRITERION, FAMILY, RECIPE = "criteria/largest.py", "families/starcoder2.py", "recipes/shallow.yaml"
WEIGHTS, SOLVER = "criteria/mild.py", "solvers/rescale.py"


@pytest.fixture(autouse=True)
def _registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an example registers is gone after the test."""
    for registry in (CRITERIA, SPREADS, FAMILIES, WEIGHT_CRITERIA, SOLVERS):
        registry.names()
        monkeypatch.setattr(registry, "_items", dict(registry._items))


@pytest.fixture
def run_example(tmp_path: Path) -> Iterator[Any]:
    """Import a block as the file it says it is."""
    names: list[str] = []

    def run(path: str) -> ModuleType:
        text = examples()[f"src/regrow/{path}"]
        file = tmp_path / Path(path).name
        file.write_text(text)
        name = f"example_{file.stem}"
        names.append(name)
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    yield run
    for name in names:
        del sys.modules[name]


def test_every_example_has_a_test() -> None:
    assert set(examples()) == {f"src/regrow/{path}" for path in (CRITERION, WEIGHTS, SOLVER, FAMILY, RECIPE)}


def test_the_criterion_scores_a_real_model(run_example: Any, sprout_dir: Path) -> None:
    run_example(CRITERION)
    assert len(examples()[f"src/regrow/{CRITERION}"].splitlines()) < 100
    axes: tuple[Unit, ...] = ("neuron", "group", "head", "layer")
    subject = load(str(sprout_dir))
    scores = score(subject, choose("largest", axes, {}, {"power": 2}), None)
    for values in scores.table.values():
        assert bool(values.isfinite().all())
    mlp: Any = subject.model.get_submodule("model.layers.0.mlp")
    rows = [mlp.gate_proj.weight.data[3], mlp.up_proj.weight.data[3], mlp.down_proj.weight.data[:, 3]]
    assert float(scores.table["neuron"][0, 3]) == pytest.approx(sum(float(row.abs().max()) ** 2 for row in rows))
    plan = make_plan(subject.anatomy, scores, Wish(budget=Budget.parse("70%"), axes=axes))
    assert plan.made_by["scores"]["criteria"]["neuron"]["options"] == {"power": 2}
    assert plan.made_by["scores"]["criteria"]["layer"]["name"] == "magnitude"


def test_the_criterion_of_weights_by_hand(run_example: Any) -> None:
    run_example(WEIGHTS)
    assert len(examples()[f"src/regrow/{WEIGHTS}"].splitlines()) < 100
    mild = WEIGHT_CRITERIA.get("mild")
    weight, norm = torch.tensor([[1.0, -2.0, 0.0], [3.0, 1.0, -1.0]]), torch.tensor([4.0, 1.0, 9.0])
    assert mild.score(WeightSight(weight, norm)).tolist() == [[2, 2, 0], [6, 1, 3]]
    assert mild.score(WeightSight(weight[:, 1:], norm[1:])).tolist() == [[2, 0], [1, 3]]
    assert (mild.within, mild.solver, mild.adapts) == ("row", "none", False)


def test_the_solver_by_hand(run_example: Any) -> None:
    """Inputs go together half the way: without the second weight the first does best at 1 + 2 * 0.5 of itself."""
    run_example(SOLVER)
    rescale = SOLVERS.get("rescale")
    assert rescale.options == {"most": 2.0}
    weight, gone = torch.tensor([[1.0, 2.0], [1.0, -8.0]]), torch.tensor([[False, True], [False, True]])
    curvature = Curvature(torch.tensor([[1.0, 0.5], [0.5, 1.0]]), damping=0)
    task = Linear(weight, Pattern.parse("1:2"), "row", lambda w, _: w.abs(), curvature=curvature)
    start = Sparse(weight.masked_fill(gone, 0), gone)
    assert rescale.solve(task, start).weight.tolist() == [[2, 0], [0, 0]]  # and never the other way round
    assert rescale.solve(task, start, most=1.5).weight.tolist() == [[1.5, 0], [0, 0]]
    assert torch.equal(rescale.solve(task, start).gone, gone)


def test_criterion_and_solver_on_a_real_model(run_example: Any, sprout_dir: Path) -> None:
    run_example(WEIGHTS)
    run_example(SOLVER)
    errors = []
    for solver in ("none", "rescale"):
        subject = load(str(sprout_dir))
        ids = torch.randint(3, 500, (4, 64), generator=torch.Generator().manual_seed(0))
        asked = Sparsify(pattern="2:4", criterion="mild", solver=(solver, "rescale"), options={"most": 4.0})
        found = sparsify.apply(subject, asked, ids, seed=0)
        assert found.sparsity.groups == "2:4"
        assert found.sparsity.share == 0.5
        errors.append(found.matrices[0].error)
    assert errors[0] == pytest.approx(errors[1])  # once is as good as twice
    plain = load(str(sprout_dir))
    asked = Sparsify(pattern="2:4", criterion="mild", solver=("none", "rescale"), options={"most": 0.0})
    nothing = sparsify.apply(plain, asked, ids, seed=0).matrices[0]
    assert nothing.error == pytest.approx(1)  # factor 0 leaves an output of 0
    assert errors[0] < 0.5


def test_the_family_cuts_a_real_layout_exactly(run_example: Any) -> None:
    """Masked equals sliced for every unit it says can go, and it says why the others cannot."""
    run_example(FAMILY)
    config = CONFIG_MAPPING["starcoder2"](
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=40,
        use_bias=True,
    )
    supported = bind(config).supported
    assert supported == ("layer", "group", "head", "neuron")
    sets: list[tuple[Unit, ...]] = [*((unit,) for unit in supported), supported]
    for axes in sets:
        for uniform in (True, False):
            model: Any = AutoModelForCausalLM.from_config(config).eval()
            source = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(0, 0.3, generator=source)
            subject = Subject(model, None, bind(config, model), {}, torch.float32)  # type: ignore[arg-type]
            scores = score(subject, choose("magnitude", axes, {}, {}), None)
            steps: dict[Unit, int] = {"neuron": 4} if "neuron" in axes else {}
            wish = Wish(budget=Budget.parse("90%"), axes=axes, uniform=uniform, divisors=steps, spread="across")
            cut = apply(subject, make_plan(subject.anatomy, scores, wish))
            assert cut.difference <= 1e-5


def test_the_recipe_parses_and_dry_runs(tmp_path: Path, sprout_dir: Path) -> None:
    path = tmp_path / Path(RECIPE).name
    path.write_text(examples()[f"src/regrow/{RECIPE}"])
    recipe: Recipe = parse(overlay(read_recipe(path), {"model": str(sprout_dir)}), path.name)
    assert recipe.name == path.stem
    check(recipe)
    assert len(dry_run(recipe, gflops=1.0)["shape"]["layers"]) == 4


def test_the_table_of_sights_is_complete() -> None:
    from typing import get_args

    from regrow.artifacts.sight import Sees

    text = (REPO / "CONTRIBUTING.md").read_text()
    table = text.partition("| `sees` |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(get_args(Sees))


def test_the_table_of_what_weights_show_is_complete() -> None:
    from typing import get_args

    from regrow.artifacts.weight_sight import WeightSees

    table = (REPO / "CONTRIBUTING.md").read_text().partition("| it sees |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(get_args(WeightSees))


def rows(mark: str) -> list[list[str]]:
    """Cells of a table of docs/sparse.md, without its head."""
    page = (REPO / "docs" / "sparse.md").read_text()
    table = page.partition(f"<!-- {mark} -->")[2].partition(f"<!-- end of {mark} -->")[0].strip().splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table]


def test_the_tables_of_the_sparse_page_are_the_registries() -> None:
    criteria = [[f"`{c.name}`", c.within, c.sees, f"`{c.solver}`"] for _, c in WEIGHT_CRITERIA.items()]
    assert [[row[0], *row[2:]] for row in rows("criteria")] == criteria
    solvers = [
        [f"`{s.name}`", s.sees, f"`{s.start}`", ", ".join(f"`{k}={v}`".lower() for k, v in s.options.items())]
        for _, s in SOLVERS.items()
    ]
    assert [[row[0], *row[3:]] for row in rows("solvers")] == solvers
    assert [[row[0], row[2]] for row in rows("spreads")] == [[f"`{s.name}`", s.sees] for _, s in ZERO_SPREADS.items()]


def test_the_methods_of_recovery_are_on_the_sparse_page() -> None:
    from typing import get_args

    methods = set(get_args(Recover.model_fields["method"].annotation))
    found = {row[0].strip("`"): row[2] for row in rows("recovery")}
    assert set(found) == methods
    assert {name for name, zeros in found.items() if zeros != "stay"} == {"lora", "ast"}


def test_the_adapter_on_the_sparse_page(sprout_dir: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "sparse.md").read_text(), re.DOTALL)
    found: dict[str, Any] = {"model": load(str(sprout_dir)).model}
    exec(code, found)
    trained = [name for name, parameter in found["tuned"].named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7 * 6
    assert all("spp_" in name for name in trained)


def test_the_keys_of_a_recipe_are_those_of_the_settings() -> None:
    spec = importlib.util.spec_from_file_location("recipe_docs", REPO / "scripts" / "recipe_docs.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.PAGE.read_text()
    written = page.partition(script.BEGIN)[2].partition(script.END)[0].strip()
    assert written == script.tables(), "run python scripts/recipe_docs.py"
    assert set(script.TABLES) == {"", *PARTS}
    for part in script.TABLES.values():
        for key, field in part.model_fields.items():
            assert field.description, key
            assert f"{key}` |" in written


def test_the_floors_on_the_page_are_those_of_the_test() -> None:
    from test_house import FLOORS, NO_SIDEWAYS, SRC

    page = (REPO / "docs" / "architecture.md").read_text()
    rows = page.partition("<!-- floors -->")[2].partition("<!-- end of floors -->")[0].strip().splitlines()[2:]
    drawn = {}
    for row in rows:
        floor, parts, _, sideways = (cell.strip() for cell in row.strip("|").split("|"))
        for part in re.findall(r"`(\w+)`", parts):
            drawn["" if part == "__init__" else part] = int(floor[0])
        assert (sideways == "no") is (int(floor[0]) in NO_SIDEWAYS)
    built = {p.stem for p in SRC.iterdir() if p.is_dir() or p.suffix == ".py"} - {"recipes", "__init__", "__pycache__"}
    assert set(drawn) == built | {""}
    assert {part: FLOORS[part] for part in drawn} == drawn


@pytest.mark.parametrize("part", ["engines", "artifacts"])
def test_every_module_of_a_floor_is_on_the_page(part: str) -> None:
    page = (REPO / "docs" / "architecture.md").read_text()
    section = page.partition(f"## {part.capitalize()}\n")[2].partition("\n## ")[0]
    named = {n for cell in re.findall(r"^\| ((?:`\w+` ?)+)\|", section, re.MULTILINE) for n in re.findall(r"\w+", cell)}
    built = {p.stem for p in (REPO / "src" / "regrow" / part).glob("*.py")} - {"__init__"}
    assert named == built


def test_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text()):
            if not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert broken == []
    assert len(PAGES) >= 7


def test_commands_in_the_documents_exist() -> None:
    from regrow.cli.main import app

    known = {command.name for command in app.registered_commands}
    used = {m for page in PAGES for m in re.findall(r"^\s*regrow (\w+)", page.read_text(), re.MULTILINE)}
    assert used <= known
    assert len(used) >= 6
