"""The rules of the house: each a function from a source tree to what breaks it, each shown to fail on a planted fault.

The picture they guard is docs/architecture.md.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

import regrow
from regrow import errors

REPO = Path(__file__).parents[1]
SRC = REPO / "src" / "regrow"

FLOORS = {
    **dict.fromkeys(("errors", "registry", "settings", "recovery", "learning", "recipe_files", "cache"), 0),
    "artifacts": 1,
    **dict.fromkeys(("families", "criteria", "spreads", "solvers", "losses", "schedules", "predictors"), 2),
    "engines": 3,
    "stages": 4,
    **dict.fromkeys(("prepare", "record", "run", "kept", "search", "study", "dryrun", "sparse_costs", "references"), 5),
    **dict.fromkeys(
        ("foretold", "staged", "cut_checks", "recovery_checks", "plan_checks", "trials", "learn_checks", "learned"), 5
    ),
    **dict.fromkeys(("level_checks", "levels", "trained"), 5),
    **dict.fromkeys(("", "__main__", "cli", "page", "door"), 6),
}
HOOKED = tuple(f"engines.{name}" for name in ("walk", "inputs", "gates", "head", "match"))
TAKING = ("engines.surgery", "engines.banks")
NO_SIDEWAYS = (2, 4)  # knowledge and stages: a file imports no other file of its floor
BANNED = {"utils", "helpers", "common", "misc", "base", "core"}
HEAVY = ("torch", "transformers", "peft", "lm_eval", "datasets", "matplotlib", "accelerate")
BUILTIN = {
    "ValueError",
    "TypeError",
    "AttributeError",
    "NotImplementedError",
}  # the programmer's mistake, not the user's
HOOKS = {"register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_hook"}


@dataclass(frozen=True)
class Module:
    """`name` is dotted and relative to the package: `engines.walk`; a package is named by its folder, the root ``."""

    name: str
    path: Path
    tree: ast.Module
    lines: int

    @property
    def part(self) -> str:
        return self.name.partition(".")[0]

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"


House = dict[str, Module]
Rule = Callable[[House], list[str]]


def read_house(root: Path) -> House:
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        found[name] = Module(name, path, ast.parse(text), len(text.splitlines()))
    return found


def imports(module: Module) -> Iterator[tuple[str, str | None, ast.AST]]:
    """(module, name or None) of every import, wherever it stands: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            yield from ((origin, alias.name, node) for alias in node.names)


def own(house: House, module: Module) -> Iterator[str]:
    """Modules of the house that `module` imports, by name."""
    for origin, name, _ in imports(module):
        if origin == "regrow" or origin.startswith("regrow."):
            target = origin.removeprefix("regrow").removeprefix(".")
            inner = f"{target}.{name}".removeprefix(".")
            yield inner if inner in house else target


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


# ---- rules


def floors_are_known(house: House) -> list[str]:
    return [f"{m.name}: no floor is known for {m.part!r}" for m in house.values() if m.part not in FLOORS]


def imports_go_down(house: House) -> list[str]:
    found = []
    for module in house.values():
        for target in own(house, module):
            here, there = FLOORS[module.part], FLOORS[target.partition(".")[0]]
            if there > here:
                found.append(f"{module.name} (floor {here}) imports {target} (floor {there})")
            if here == there and here in NO_SIDEWAYS:
                found.append(f"{module.name} imports its neighbour {target}")
    return found


def imports_have_no_cycle(house: House) -> list[str]:
    """Among modules, and among the parts of a floor."""
    modules = {m.name: set(own(house, m)) - {m.name} for m in house.values()}
    parts: dict[str, set[str]] = {}
    for name, targets in modules.items():
        part = name.partition(".")[0]
        parts.setdefault(part, set()).update(t.partition(".")[0] for t in targets)
        parts[part].discard(part)
    return [f"cycle: {' -> '.join(way)}" for graph in (modules, parts) for way in [cycle(graph)] if way]


def cycle(graph: dict[str, set[str]]) -> list[str]:
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph.get(name, ())):
            if found := walk(target, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in graph if (found := walk(name, []))), [])


def nothing_comes_from_a_package(house: House) -> list[str]:
    """`from regrow.engines import walk` names a module and is fine; a name out of an `__init__` is not."""
    found = []
    for module in house.values():
        for origin, name, _ in imports(module):
            if origin.startswith("."):
                found.append(f"{module.name}: relative import {origin}{name}")
            if origin != "regrow" and not origin.startswith("regrow."):
                continue
            target = origin.removeprefix("regrow").removeprefix(".")
            if house[target].is_package and (name is None or f"{target}.{name}".removeprefix(".") not in house):
                found.append(f"{module.name} imports {name or 'it'} from the package {origin}")
    return found


def packages_are_empty(house: House) -> list[str]:
    """An `__init__` below the root is its docstring, so nothing can be imported from it."""
    return [m.name for m in house.values() if m.is_package and m.name and len(m.tree.body) > 1]


def no_drawer_for_everything(house: House) -> list[str]:
    return [name for name in house if BANNED & set(name.split("."))]


def modules_say_why(house: House) -> list[str]:
    """Every module has a docstring; below the door of a package it also says what it gives up."""
    found = [f"{m.name or 'regrow'}: no docstring" for m in house.values() if not ast.get_docstring(m.tree)]
    quiet = ("cli", "page", "families", "", "door")
    for m in house.values():
        text = ast.get_docstring(m.tree) or ""
        if not m.is_package and m.part not in quiet and "gives up" not in " ".join(text.split()):
            found.append(f"{m.name}: the docstring does not say what it gives up")
    return found


def everything_is_small(house: House) -> list[str]:
    found = [f"{m.name}: {m.lines} lines" for m in house.values() if m.lines > 400]
    found += [f"{m.name}: {m.lines} lines" for m in house.values() if m.part == "criteria" and m.lines >= 100]
    for module in house.values():
        for function in functions(module):
            length = (function.end_lineno or 0) - function.lineno + 1
            if length > 60 and module.part != "cli":
                found.append(f"{module.name}.{function.name}: {length} lines")
            given = function.args
            parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs]
            parameters += [p for p in (given.vararg, given.kwarg) if p is not None]
            count = len([p for p in parameters if p.arg not in ("self", "cls")])
            if count > 8 and module.part != "cli":
                found.append(f"{module.name}.{function.name}: {count} parameters")
    return found


def errors_come_from_the_tree(house: House) -> list[str]:
    """A raise names an error of errors.py, a function that is annotated to make one, or a programmer's mistake."""
    tree = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    found = []
    for module in house.values():
        makers = {f.name for f in functions(module) if isinstance(f.returns, ast.Name) and f.returns.id in tree}
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Raise) or node.exc is None:
                continue
            call = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "?")
            if name not in tree | BUILTIN | makers:
                found.append(f"{module.name}:{node.lineno} raises {name}")
    return found


def only_commands_print(house: House) -> list[str]:
    return [
        f"{m.name}:{node.lineno} prints"
        for m in house.values()
        if m.part != "cli"
        for node in ast.walk(m.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def hooks_and_weights_have_one_home(house: House) -> list[str]:
    """Hooks: the walk (statistics), gates, and where a student hears its teacher. Tensors are taken away: surgery,
    and for a pass the banks of adapters."""
    found = []
    for module in house.values():
        for node in ast.walk(module.tree):
            hook = isinstance(node, ast.Attribute) and node.attr in HOOKS
            if hook and module.name not in HOOKED:
                found.append(f"{module.name}:{node.lineno} sets a hook")
            targets = node.targets if isinstance(node, ast.Assign) else []
            taken = any(isinstance(t, ast.Attribute) and t.attr == "data" for t in targets)
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            taken |= named and node.func.attr in ("register_parameter", "set_submodule")  # type: ignore[attr-defined]
            if taken and module.name not in TAKING:
                found.append(f"{module.name}:{node.lineno} replaces a tensor")
    return found


def heavy_things_come_late(house: House) -> list[str]:
    """At the head of a module: torch from knowledge to `run`, transformers only in engines, the rest nowhere.

    But for `engines.spp` and its layers, whose classes are PEFT's; nobody imports them before they are needed.
    """
    found = []
    for module in house.values():
        late = {
            inner
            for node in ast.walk(module.tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _type_checking(node)
            for inner in ast.walk(node)
        }
        for origin, _, node in imports(module):
            top, floor = origin.partition(".")[0], FLOORS[module.part]
            if top not in HEAVY or node in late:
                continue
            fine = (top == "torch" and 2 <= floor <= 5) or (top in ("transformers", "accelerate") and floor == 3)
            fine = fine or (top == "peft" and module.name in ("engines.spp", "engines.spp_layers"))
            if not fine:
                found.append(f"{module.name} imports {origin} when it is imported")
    return found


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


RULES: list[Rule] = [
    floors_are_known,
    imports_go_down,
    imports_have_no_cycle,
    nothing_comes_from_a_package,
    packages_are_empty,
    no_drawer_for_everything,
    modules_say_why,
    everything_is_small,
    errors_come_from_the_tree,
    only_commands_print,
    hooks_and_weights_have_one_home,
    heavy_things_come_late,
]


@pytest.fixture(scope="module")
def house() -> House:
    return read_house(SRC)


def test_every_module_was_seen(house: House) -> None:
    on_disk = [p for p in SRC.glob("**/*") if p.suffix == ".py" and "__pycache__" not in p.parts]
    assert len(house) == len(on_disk)
    assert len(house) >= 70
    assert {m.part for m in house.values()} >= {"artifacts", "criteria", "engines", "stages", "cli", "page", "families"}
    assert sum(1 for m in house.values() for _ in own(house, m)) >= 200


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(house: House, rule: Rule) -> None:
    assert rule(house) == []


# ---- every rule can fail


LONG = "def f():\n" + "    x = 1\n" * 60
FAULTS: list[tuple[Rule, dict[str, str], str]] = [
    (floors_are_known, {"attic/box.py": ""}, "attic"),
    (imports_go_down, {"artifacts/a.py": "from regrow.engines.e import x", "engines/e.py": ""}, "floor 3"),
    (imports_go_down, {"errors.py": "def f():\n    import regrow.stages.s", "stages/s.py": ""}, "floor 4"),
    (
        imports_go_down,
        {
            "artifacts/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from regrow.run import r",
            "run.py": "",
        },
        "floor 5",
    ),
    (imports_go_down, {"criteria/a.py": "from regrow.criteria.b import x", "criteria/b.py": ""}, "neighbour"),
    (imports_go_down, {"criteria/a.py": "from regrow.spreads.b import x", "spreads/b.py": ""}, "neighbour"),
    (imports_go_down, {"stages/a.py": "from regrow.stages import b", "stages/b.py": ""}, "neighbour"),
    (
        imports_have_no_cycle,
        {
            "engines/a.py": "from regrow.engines.b import x",
            "engines/b.py": "def f():\n    from regrow.engines import a",
        },
        "engines.a -> engines.b -> engines.a",
    ),
    (
        imports_have_no_cycle,
        {"cli/a.py": "from regrow.page.x import y", "page/x.py": "", "page/z.py": "import regrow.cli.a"},
        "cli -> page -> cli",
    ),
    (nothing_comes_from_a_package, {"run.py": "from regrow.engines import Thing"}, "Thing"),
    (nothing_comes_from_a_package, {"run.py": "from regrow import prune"}, "prune"),
    (nothing_comes_from_a_package, {"run.py": "import regrow.engines"}, "regrow.engines"),
    (nothing_comes_from_a_package, {"engines/a.py": "from . import b"}, "relative"),
    (packages_are_empty, {"engines/__init__.py": '"""Doc."""\nx = 1'}, "engines"),
    (no_drawer_for_everything, {"engines/helpers.py": ""}, "helpers"),
    (no_drawer_for_everything, {"core/x.py": ""}, "core"),
    (modules_say_why, {"cli/x.py": "x = 1"}, "no docstring"),
    (modules_say_why, {"engines/x.py": '"""Does."""'}, "gives up"),
    (everything_is_small, {"engines/x.py": "x = 1\n" * 401}, "401 lines"),
    (everything_is_small, {"criteria/x.py": "x = 1\n" * 100}, "100 lines"),
    (everything_is_small, {"engines/x.py": LONG}, "61 lines"),
    (everything_is_small, {"engines/x.py": "def f(a, b, c, d, e, *, f, g, h, **i): ..."}, "9 parameters"),
    (errors_come_from_the_tree, {"engines/x.py": "raise RuntimeError('no')"}, "RuntimeError"),
    (errors_come_from_the_tree, {"engines/x.py": "def f(e):\n    raise e"}, "raises e"),
    (errors_come_from_the_tree, {"engines/x.py": "def _bad():\n    ...\nraise _bad()"}, "_bad"),
    (only_commands_print, {"stages/x.py": "def f():\n    print(1)"}, "prints"),
    (hooks_and_weights_have_one_home, {"stages/x.py": "m.register_forward_hook(f)"}, "hook"),
    (hooks_and_weights_have_one_home, {"engines/x.py": "p.data = y"}, "replaces"),
    (heavy_things_come_late, {"cli/x.py": "import torch"}, "torch"),
    (heavy_things_come_late, {"artifacts/x.py": "from torch import Tensor"}, "torch"),
    (heavy_things_come_late, {"engines/x.py": "import lm_eval.tasks"}, "lm_eval"),
    (heavy_things_come_late, {"stages/x.py": "from transformers import AutoModel"}, "transformers"),
]


def build(root: Path, files: dict[str, str]) -> House:
    for name, text in {"__init__.py": '"""Root."""', "engines/__init__.py": '"""Engines."""', **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if path.parent != root and not (path.parent / "__init__.py").exists():
            (path.parent / "__init__.py").write_text('"""Package."""')
    return read_house(root)


@pytest.mark.parametrize(("rule", "files", "names"), FAULTS, ids=lambda x: getattr(x, "__name__", None))
def test_a_planted_fault_breaks_the_rule(tmp_path: Path, rule: Rule, files: dict[str, str], names: str) -> None:
    found = rule(build(tmp_path, files))
    assert found
    assert names in " ".join(found)


def test_every_rule_has_a_planted_fault() -> None:
    assert {rule for rule, _, _ in FAULTS} == set(RULES)


def test_what_the_rules_allow(tmp_path: Path) -> None:
    """Downwards, sideways among engines, modules out of packages, late imports, re-raising, makers of errors."""
    files = {
        "engines/a.py": (
            '"""A. What this gives up: b."""\nimport torch\nfrom regrow.engines import b\nfrom regrow.errors import '
            "BrokenModel\n\ndef _bad() -> BrokenModel:\n    ...\n\n"
            "def f(self, a, b, c, d, e, f, g, h):\n    import peft\n"
            "    try:\n        raise _bad()\n    except ValueError:\n        raise\n"
        ),
        "engines/b.py": '"""B. What this gives up: a."""\n',
        "errors.py": '"""E. What this gives up: codes."""\n',
        "cli/a.py": '"""C."""\nfrom regrow.engines.a import f\nprint(f)\n',
    }
    house = build(tmp_path, files)
    assert [found for rule in RULES for found in rule(house)] == []


# ---- rules about what is around the code


def test_light_things_stay_light() -> None:
    """In processes of their own: this one has imported everything."""
    heavy = f"[m for m in {(*HEAVY, 'pydantic', 'yaml')!r} if m in sys.modules]"
    door = f"import sys, json, regrow; print(json.dumps({heavy}))"
    command = (
        "import sys, json\nfrom regrow.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print(json.dumps({heavy}))"
    )
    for code in (door, command):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout.splitlines()[-1]) == []
    assert "Usage" in done.stdout
    for name in ("run", "prune", "eval", "inspect", "estimate", "doctor", "ls", "show", "diff", "report"):
        assert re.search(rf"^  {name} ", done.stdout, re.MULTILINE), name


def test_the_door_has_the_names_it_says() -> None:
    assert regrow.__all__ == sorted(regrow.__all__)
    assert set(regrow.__all__) == set(regrow._HOMES) == set(dir(regrow))
    for name in regrow.__all__:
        value = getattr(regrow, name)
        assert value is getattr(import_module(f"regrow.{regrow._HOMES[name]}"), name)
        assert value.__doc__, name
    with pytest.raises(AttributeError, match="nonsense"):
        _ = regrow.nonsense


def test_the_type_checker_sees_the_same_names(house: House) -> None:
    listed = {name for _, name, node in imports(house[""]) if isinstance(node, ast.ImportFrom)}
    assert set(regrow.__all__) <= listed


def test_one_version() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    top = re.search(r"^## \[?(\d+\.\d+\.\d+)", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert top is not None
    assert regrow.__version__ == project["version"] == top[1]


def written() -> list[Path]:
    """Every text file of the project."""
    folders = [REPO / name for name in ("src", "tests", "docs", "bench", "scripts")]
    kinds = {".py", ".md", ".yaml", ".json", ".toml", ".template", ".html", ".css", ".txt", ".jinja"}
    inside = [p for folder in folders for p in folder.rglob("*") if p.suffix in kinds and "__pycache__" not in p.parts]
    return [*inside, *REPO.glob("*.md"), *REPO.glob("*.toml"), REPO / "Makefile", REPO / "constraints.txt"]


MACHINE = re.compile(r"(?<![\w.<>])/(?:work|root|home|Users|tmp)/\w")


def test_no_path_of_a_machine() -> None:
    files = written()
    assert len(files) >= 120
    found = [f"{p.relative_to(REPO)}: {m[0]}" for p in files for m in [MACHINE.search(p.read_text())] if m]
    assert found == []
    planted = "/" + "home/someone/model"
    assert MACHINE.search(f"path = '{planted}'")
    assert not MACHINE.search("docs/home/page and work/x")


def test_recipes_and_the_page_are_in_the_wheel() -> None:
    data = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["regrow"]
    shipped = {path for pattern in data for path in SRC.glob(pattern)}
    others = {p for p in SRC.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert others == shipped
