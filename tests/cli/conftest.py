"""Commands run in this process, with a cache of their own and libraries left as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt import NARROW, WORDS, Command, Done, Refused, Sparsifier, tree

from regrow.cli.main import main


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch, shared_cache: Path) -> Iterator[None]:
    import datasets
    from transformers import logging

    monkeypatch.setenv("REGROW_CACHE", str(shared_cache))
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    quiet = datasets.are_progress_bars_disabled()
    yield
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()
    if not quiet:
        datasets.enable_progress_bars()


@pytest.fixture
def regrow(capsys: pytest.CaptureFixture[str]) -> Command:
    """`regrow("prune", ...)` as at a prompt."""

    def call(*arguments: object) -> Done:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        caught = capsys.readouterr()
        return Done(code, caught.out, caught.err)

    return call


@pytest.fixture
def refused(regrow: Command, tmp_path: Path) -> Refused:
    """Run a command that must fail and leave `tmp_path` as it is; `says` are parts of the message."""

    def call(*arguments: object, says: tuple[str, ...], code: int = 2) -> Done:
        before = tree(tmp_path)
        done = regrow(*arguments, "--json")
        assert done.code == code, (done.out, done.err)
        assert done.err.count("error: ") == 1
        assert sum(line.startswith("error: ") for line in done.err.splitlines()) == 1
        for part in ("\n  allowed: ", "\n  next:    ", *says):
            assert part in done.err
        assert "Traceback" not in done.err
        assert set(done.json) == {"error", "came", "allowed", "next"}
        assert all(done.json.values())
        assert len(done.err) < 2000
        assert tree(tmp_path) == before
        return done

    return call


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of about 700 tokens to measure on."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(
        "The river rose in the night and the people of the town went up the hill with their dogs. " * 30,
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def tale(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that both a real tokenizer and one of a word a token can read."""
    source, path = random.Random(0), tmp_path_factory.mktemp("tale") / "tale.txt"
    lines = [" ".join(f"w{source.randint(3, 63)}" for _ in range(60)) for _ in range(150)]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def sparsify(regrow: Command, tale: Path, tmp_path: Path) -> Sparsifier:
    """`sparsify(model, "--pattern", "2:4", out="b")` -> the folder, and what was printed."""

    def call(model: Path, *arguments: object, out: str = "sparse") -> tuple[Path, Done]:
        done = regrow("sparsify", model, "--calibration", tale, *WORDS, "--out", tmp_path / out, "--json", *arguments)
        assert done.code == 0, done.err
        return tmp_path / out, done

    return call


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory, sprout_dir: Path) -> Path:
    """Sprout with fewer neurons."""
    out = tmp_path_factory.mktemp("narrow") / "cut"
    asked = ("prune", sprout_dir, *NARROW, "--text", "none", "--no-speed", "--out", out, "--quiet")
    assert main([str(a) for a in asked]) == 0
    return out
