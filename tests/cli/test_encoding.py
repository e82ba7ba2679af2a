"""Text is UTF-8 wherever a user sits: no door reads or writes in the encoding of the machine."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import regrow
from regrow.cli import console

ROOT = Path(regrow.__file__).parent
DOORS = [*(ROOT / "cli").glob("*.py"), *(ROOT / "page").glob("*.py"), ROOT / "door.py", ROOT / "settings.py"]


def unsaid(source: str) -> Iterator[int]:
    """Lines that read or write text without naming its encoding."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("read_text", "write_text", "open") and "encoding" not in {k.arg for k in node.keywords}:
                yield node.lineno


def test_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """In brackets or not, as files and models are called."""
    console.table("a model[v2] [/b]", ["measure"], [["text/wiki[test].txt/perplexity"]])
    out = capsys.readouterr().out
    assert "a model[v2] [/b]" in out
    assert "text/wiki[test].txt/perplexity" in out


def test_text_is_utf_8() -> None:
    assert len(DOORS) >= 25
    assert [(path.name, line) for path in DOORS for line in unsaid(path.read_text(encoding="utf-8"))] == []
    planted = 'a.read_text()\nb.write_text("x")\nopen(c)\nd.read_text(encoding="utf-8")'
    assert list(unsaid(planted)) == [1, 2, 3]
