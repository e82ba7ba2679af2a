"""Floor 0: errors that travel and read well, settings that are checked key by key, a cache that can be deleted."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from regrow import errors
from regrow.cache import cache_dir, key, size_bytes
from regrow.errors import InputError, ModelError, RegrowError, SettingsError, UnknownName
from regrow.prepare import check_words
from regrow.recipe_files import dump, exact, find_recipe, overlay, read_recipe, read_yaml, recipe_names
from regrow.settings import Recipe, hidden, parse

TREE = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, RegrowError)]


def test_the_tree_is_drawn_as_it_is() -> None:
    assert len(TREE) == 13
    lines = (errors.__doc__ or "").splitlines()
    for error in TREE:
        drawn = [line for line in lines if f" {error.__name__} " in f"{line} "]
        assert len(drawn) == 1, error
        parents = {RegrowError: 0, Exception: 0, InputError: 1, ModelError: 1}
        depth = parents[error.__bases__[0]] + (error is not RegrowError)
        assert drawn[0].index(error.__name__) == 4 + 4 * depth


def test_exit_codes() -> None:
    assert {e.__name__ for e in TREE if e.exit_code == 2} == {
        "InputError",
        "UnknownName",
        "SettingsError",
        "BudgetError",
        "TextError",
    }


@pytest.mark.parametrize("error", [e for e in TREE if e is not UnknownName], ids=lambda e: e.__name__)
def test_what_came_what_is_allowed_what_to_do(error: type[RegrowError]) -> None:
    found = error("a plum", "apples", "pick an apple")
    assert str(found) == "a plum\n  allowed: apples\n  next:    pick an apple"
    twin = pickle.loads(pickle.dumps(found))
    assert type(twin) is error
    assert str(twin) == str(found)


def test_an_unknown_name() -> None:
    found = UnknownName("family", "lama", ["llama", "gemma2"])
    assert str(found).splitlines()[:2] == [
        "unknown family 'lama', did you mean 'llama'?",
        "  allowed: families: gemma2, llama",
    ]
    assert found.came.startswith("unknown family")
    for noun, plural in (
        ("criterion", "criteria"),
        ("weight criterion", "weight criteria"),
        ("recipe key", "recipe keys"),
        ("family", "families"),
        ("loss", "losses"),
        ("spread of zeros", "spreads of zeros"),
    ):
        assert UnknownName(noun, "x", ["a"]).allowed == f"{plural}: a"
    assert UnknownName("task", "zzz", ["a", "b"]).came == "unknown task 'zzz'."
    assert UnknownName("task", "arc", ["arc_easy", "arc_hard"]).came.count("' or '") == 1
    twin = pickle.loads(pickle.dumps(found))
    assert type(twin) is UnknownName
    assert str(twin) == str(found)


# ---- settings


def test_a_recipe_is_complete_and_travels() -> None:
    recipe = parse({"keep": "70%", "recover": {"tokens": 5}, "criteria": {"layer": "perplexity"}})
    assert parse(yaml.safe_load(dump(recipe))) == recipe
    written = yaml.safe_load(dump(recipe))
    assert set(written) == set(Recipe.model_fields)
    assert set(written["recover"]) >= {"method", "tokens", "rank", "schedule"}


@pytest.mark.parametrize(
    ("url", "written"),
    [
        ("postgresql://me:secret@host:5432/name", "postgresql://me:***@host:5432/name"),
        ("postgresql+psycopg://me:se:cr@host/name", "postgresql+psycopg://me:***@host/name"),
        ("postgresql://me:se/c?r:et@host/name", "postgresql://me:***@host/name"),
        ("postgresql://me@home:secret@host/name", "postgresql://me@home:***@host/name"),
        ("postgresql://me:sec@ret@host/name", "postgresql://me:***@host/name"),
        ("redis://:secret@host", "redis://:***@host"),
        ("postgresql://host/name?user=me&password=sec@ret", "postgresql://host/name?user=me&password=***"),
        ("mysql+pymysql://host/name?Passwd=s&charset=utf8", "mysql+pymysql://host/name?Passwd=***&charset=utf8"),
        ("postgresql://me:s@host/name?sslpassword=t", "postgresql://me:***@host/name?sslpassword=***"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Ds", "mssql+pyodbc:///?odbc_connect=***"),
        ("postgresql://host/name?sslmode=require", "postgresql://host/name?sslmode=require"),
        ("postgresql://me@host/name", "postgresql://me@host/name"),
        ("/data/pass=1/study.journal", "/data/pass=1/study.journal"),
        ("sqlite:///study:1@home.db", "sqlite:///study:1@home.db"),
        ("study.journal", "study.journal"),
    ],
)
def test_no_password_is_written_down(url: str, written: str) -> None:
    """It reaches the storage all the same."""
    recipe = parse({"search": {"storage": url}})
    assert recipe.search is not None
    assert recipe.search.storage == url
    assert yaml.safe_load(dump(recipe))["search"]["storage"] == written


def test_what_sqlalchemy_takes_for_a_password_is_hidden() -> None:
    from sqlalchemy.engine import make_url

    for url in ("a://u:p9/w?9:x@h/n", "a://u@v:p9w@h:1/n?q=1", "a://:p9@h", "a://u:%709w@h/n", "a://u:p9\nw@h/n"):
        password = make_url(url).password
        assert password
        assert "9" not in hidden(url)
        assert hidden(f"could not connect to {url}: refused").endswith(": refused")


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().keep = "5%"  # type: ignore[misc]


BAD: list[tuple[dict[str, Any], type[RegrowError], str]] = [
    ({"kep": "80%"}, UnknownName, "unknown recipe key 'kep', did you mean 'keep'"),
    ({"recover": {"rnk": 3}}, UnknownName, "'recover.rnk', did you mean 'recover.rank'"),
    ({"evaluate": {"task": []}}, UnknownName, "did you mean 'evaluate.tasks'"),
    ({"axes": ["neurons"]}, SettingsError, "x.yaml: unknown axis 'neurons', did you mean 'neuron'"),
    ({"axes": [5]}, SettingsError, "unknown axis 5."),
    ({"axes": []}, SettingsError, "axes"),
    ({"criteria": {"hed": "taylor"}}, SettingsError, "unknown axis 'hed', did you mean 'head'"),
    ({"split": {"group": float("nan")}}, SettingsError, "split.group"),
    ({"split": {"group": -0.5}}, SettingsError, "split.group"),
    ({"divisors": {"neuron": 0}}, SettingsError, "divisors.neuron"),
    ({"reduce": "men"}, SettingsError, "unknown reduce 'men', did you mean 'mean'"),
    ({"recover": {"schedule": "cosin"}}, SettingsError, "unknown recover.schedule 'cosin', did you mean 'cosine'"),
    ({"recover": {"warmup": 1}}, SettingsError, "recover.warmup = 1"),
    ({"calibration": {"block": 4}}, SettingsError, "calibration.block = 4"),
    ({"keep": 0.8}, SettingsError, "keep = 0.8"),
    ({"seed": 2**32}, SettingsError, "seed"),
    ({1: 2}, SettingsError, "1"),  # type: ignore[dict-item]
]


@pytest.mark.parametrize(("data", "kind", "says"), BAD, ids=[str(b[0]) for b in BAD])
def test_bad_settings(data: dict[str, Any], kind: type[RegrowError], says: str) -> None:
    with pytest.raises(kind) as caught:
        parse(data, "x.yaml")
    assert says in str(caught.value)
    assert caught.value.allowed


def test_a_shape_says_the_rest() -> None:
    """Axes, no budget, no search, the same widths in every layer; of the others only what is about its axes."""
    shape = {"neuron": 200, "layer": 5}
    others = {"search": {"top": 2}, "split": {"group": 1}, "divisors": {"neuron": 8, "channel": 8}, "axes": ["group"]}
    found = parse({"shape": shape, "criteria": {"layer": "angular", "group": "taylor"}, "uniform": False, **others})
    assert (found.axes, found.keep, found.search, found.uniform) == (("neuron", "layer"), None, None, True)
    assert (found.split, found.divisors, found.criteria) == ({}, {"neuron": 8}, {"layer": "angular"})
    assert parse(found.model_dump()) == found
    assert parse({"shape": shape, "keep": "80%"}).keep == "80%"  # both were said, which is refused later


def test_a_shape_on_top_of_a_recipe_replaces_its_budget() -> None:
    data = {"keep": "80%", "shape": {"neuron": 200}}
    assert exact(data, {"shape"})["keep"] is None
    assert exact(data, {"shape", "keep"})["keep"] == "80%"
    assert exact(data, {"seed"})["keep"] == "80%"
    assert exact({"keep": "80%", "shape": {}}, {"shape"})["keep"] == "80%"


def test_flags_over_a_recipe() -> None:
    data = {"keep": "80%", "recover": {"rank": 4, "tokens": 9}, "axes": ["neuron"]}
    changed = overlay(data, {"keep": None, "recover": {"tokens": 5}, "seed": 3, "axes": ["group"]})
    assert changed == {"keep": None, "recover": {"rank": 4, "tokens": 5}, "seed": 3, "axes": ["group"]}
    assert data["recover"] == {"rank": 4, "tokens": 9}
    assert overlay(data, {"recover": None})["recover"] is None
    assert overlay({"recover": None}, {"recover": {"tokens": 5}}) == {"recover": {"tokens": 5}}
    assert overlay({"recover": 7}, {"recover": {"tokens": 5}}) == {"recover": {"tokens": 5}}


def test_recipes_are_found_by_name_or_path(tmp_path: Path) -> None:
    for name in recipe_names():
        assert find_recipe(name).stem == name
        assert read_recipe(find_recipe(name))["name"] == name
    assert find_recipe(str(tmp_path / "x.yml")) == tmp_path / "x.yml"
    with pytest.raises(UnknownName, match=r"ends in \.yaml"):
        find_recipe("nothing")


# ---- cache


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "own"))
    assert cache_dir("a", "b") == tmp_path / "own" / "a" / "b"
    assert cache_dir("a", "b").is_dir()
    monkeypatch.delenv("REGROW_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "regrow"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / "home" / ".cache" / "regrow"


def test_a_key_changes_with_any_input() -> None:
    one = {"a": 1, "b": {"c": [1, 2], "d": None}}
    assert key(one) == key({"b": {"d": None, "c": [1, 2]}, "a": 1})
    others = [{**one, "a": 2}, {**one, "b": {"c": [2, 1], "d": None}}, {**one, "e": 0}, {"a": 1}, {**one, "a": "1"}]
    assert len({key(one), *map(key, others)}) == 1 + len(others)
    assert len(key(one)) == 16


def test_size_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"12")
    assert size_bytes(tmp_path) == 7


def test_a_pattern_is_no_time_of_day() -> None:
    """YAML 1.1 reads an unquoted 2:4 as 124 seconds; here it stays what was written, and other values are as ever."""
    for written in ("2:4", "4:8", "16:32", "1:4", "1:59"):
        assert yaml.safe_load(f"pattern: {written}")["pattern"] != written
        assert read_yaml(f"pattern: {written}")["pattern"] == written
    for written in ("7", "-7", "0x1f", "1_000", "1.5", "1e3", "1.5e+3", ".inf", "true", "null", "a", "[1, b]"):
        assert read_yaml(f"k: {{a: {written}}}") == yaml.safe_load(f"k: {{a: {written}}}"), written
    for number in (50, 64, 124):  # a share of zeros without its sign
        with pytest.raises(SettingsError, match=f"pattern '{number}'"):
            check_words(parse({"keep": None, "sparsify": {"pattern": number}}, "here"))
