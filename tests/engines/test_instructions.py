"""Instructions: rows are recognised, templates write what they should, and a mask covers answers and nothing else."""

from __future__ import annotations

import itertools
import json
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from regrow.engines import texts
from regrow.engines.instructions import Lesson, Turn, alpaca, chat, chosen_template, kind, read_lesson
from regrow.engines.packed import Packed
from regrow.engines.texts import Document, documents
from regrow.engines.tokens import blocks, lessons
from regrow.errors import RegrowError, SettingsError, TextError

END = "<|end|>"
ALONE = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Name a river.

### Response:
"""
PAIRED = """Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Add the numbers.

### Input:
2 and 3

### Response:
"""
RIVER = {"instruction": "Name a river.", "input": "", "output": "The Nile."}
SUM = {"instruction": "Add the numbers.", "input": "2 and 3", "output": "They give 5."}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me"},
]


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "sprout")


def with_template(template: str | None) -> Any:
    made = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "sprout")
    made.chat_template = template
    return made


def rows(count: int) -> list[dict[str, str]]:
    """Lessons whose answers all differ, half of them with an input."""
    return [
        {
            "instruction": f"Count to {i}.",
            "input": f"from {i // 2}" * (i % 2),
            "output": f"Here {'and ' * (i % 5)}are {i}.",
        }
        for i in range(count)
    ]


def lines(path: Path, data: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
    return str(path)


def taught(*data: dict[str, Any]) -> list[Document]:
    """As a file of these rows is read."""
    return [texts._lesson("test", row, "here") for row in data]


# ---- templates


def test_alpaca_by_hand() -> None:
    assert alpaca(read_lesson(RIVER, "")) == [(ALONE, False), ("The Nile.", True)]
    assert alpaca(read_lesson(SUM, "")) == [(PAIRED, False), ("They give 5.", True)]


def test_further_turns_repeat_the_headings() -> None:
    assert alpaca(read_lesson({"messages": TALK}, "")) == [
        ("Be brief.\n\n### Instruction:\nHi\n\n### Response:\n", False),
        ("Hello", True),
        ("\n\n### Instruction:\nWho?\n\n### Response:\n", False),
        ("Me", True),
    ]


def test_chat_by_hand() -> None:
    """sprout's own template ends every message with a token, and an answer ends with it."""
    assert chat(read_lesson({"messages": TALK}, ""), tokenizer()) == [
        (f"system: Be brief.{END}user: Hi{END}assistant: ", False),
        (f"Hello{END}", True),
        (f"user: Who?{END}assistant: ", False),
        (f"Me{END}", True),
    ]
    assert chat(read_lesson(SUM, ""), tokenizer())[0][0] == f"user: Add the numbers.\n\n2 and 3{END}assistant: "


def test_the_template_is_the_tokenizers_unless_asked() -> None:
    bare = with_template(None)
    found = [chosen_template(t, asked) for t in (tokenizer(), bare) for asked in (None, "alpaca")]
    assert found == ["chat", "alpaca", "alpaca", "alpaca"]
    assert chosen_template(tokenizer(), "chat") == "chat"
    with pytest.raises(SettingsError, match=r"no chat template\n.*\n  next:    ask for template alpaca"):
        chosen_template(bare, "chat")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "here: the chat template writes the beginning of a conversation",
        ),
        ("{{ messages[-1]['content'] }}", "the beginning of a conversation"),
        (
            "{{ raise_exception('no system here') }}",
            "here: the chat template refuses 2 messages of system, user: no system here",
        ),
    ],
)
def test_chat_templates_that_do_not_fit(template: str, says: str) -> None:
    with pytest.raises(TextError, match=says) as caught:
        chat(read_lesson({"messages": TALK}, "here"), with_template(template))
    assert caught.value.todo == "ask for template alpaca"


# ---- rows


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("instruction output", "instruction"),
        ("instruction input output text", "instruction"),
        ("prompt completion", "prompt"),
        ("messages prompt id", "messages"),
        ("instruction prompt completion", "prompt"),  # of two the one with an answer
        ("prompt text", "text"),
        ("prompt", "prompt"),
        ("text", "text"),
        ("body", "text"),
    ],
)
def test_rows_are_recognised_by_their_fields(fields: str, expected: str) -> None:
    assert kind(fields.split()) == expected


def test_three_kinds_of_rows_say_the_same() -> None:
    expected = Lesson((Turn("Hi", "Hello"),))
    pair = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    nobody = {"role": "system", "content": ""}
    for row in (
        {"instruction": "Hi", "output": "Hello"},
        {"instruction": "Hi", "input": None, "output": "Hello"},
        {"prompt": "Hi", "completion": "Hello"},
        {"messages": pair},
        {"messages": [nobody, *pair]},
    ):
        assert read_lesson(row, "") == expected


def parquet_of(path: Path, data: list[dict[str, Any]]) -> str:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist([{"id": i, **row} for i, row in enumerate(data)]), path)
    return str(path)


@pytest.mark.parametrize("data", [[RIVER, SUM], [{"messages": TALK}]], ids=["instruction", "messages"])
def test_every_form_of_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: list[dict[str, Any]]) -> None:
    (tmp_path / "x.json").write_text(json.dumps(data), encoding="utf-8")
    (tmp_path / "y.json").write_text(json.dumps({"version": 1, "data": data}), encoding="utf-8")
    texts._hub.cache_clear()
    hub = SimpleNamespace(load_dataset=lambda *_, **__: SimpleNamespace(take=lambda _: iter(data)))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    files = [lines(tmp_path / "z.jsonl", data), parquet_of(tmp_path / "p.parquet", data), "hub:o/n"]
    expected = [("".join(piece for piece, _ in alpaca(read_lesson(row, ""))), read_lesson(row, "")) for row in data]
    for source in (*(str(tmp_path / f"{name}.json") for name in "xy"), *files):
        assert [(d.text, d.lesson) for d in documents(source, None)] == expected
    texts._hub.cache_clear()


def test_a_column_that_is_named_is_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    texts._hub.cache_clear()
    hub = SimpleNamespace(load_dataset=lambda *_, **__: SimpleNamespace(take=lambda _: iter([{**RIVER, "text": "T"}])))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert documents("hub:o/n", None)[0].text == f"{ALONE}The Nile."
    assert documents("hub:o/n#text", None) == [Document("o/n", "T")]
    texts._hub.cache_clear()


def test_json_of_plain_text(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"text": "one", "n": 1}, {"body": "two"}]', encoding="utf-8")
    assert documents(str(tmp_path / "x.json"), None) == [Document("x", "one"), Document("x", "two")]


def test_parts_share_no_lesson(tmp_path: Path) -> None:
    sources = [lines(tmp_path / "a.jsonl", rows(300)), lines(tmp_path / "b.jsonl", rows(300)[::-1])]
    parts: dict[str, set[str]] = {}
    names: tuple[texts.Part, ...] = ("calibration", "recovery", "heldout")
    for source, part in itertools.product(sources, names):
        for document in documents(source, part):
            parts.setdefault(document.text, set()).add(part)
    assert len(parts) == 300
    assert all(len(found) == 1 for found in parts.values())
    assert sum(found == {"recovery"} for found in parts.values()) == pytest.approx(240, abs=25)


# ---- bad rows


@pytest.mark.parametrize("empty", ["", " \n", None], ids=repr)
def test_rows_with_an_empty_answer_are_left_out_and_counted(tmp_path: Path, empty: str | None) -> None:
    """Alpaca's own file has some."""
    kept = [{"instruction": "a", "output": "b"}, {"instruction": "c", "input": "d", "output": "e"}]
    source = lines(tmp_path / "x.jsonl", [kept[0], {"instruction": "x", "output": empty}, kept[1]])
    assert [d.lesson.turns[0].answer for d in documents(source, None) if d.lesson] == ["b", "e"]
    assert texts.unanswered(source) == 1
    assert texts.unanswered(lines(tmp_path / "y.jsonl", kept)) == 0
    with pytest.raises(TextError, match="0 different documents"):
        documents(lines(tmp_path / "z.jsonl", [{"prompt": "x", "completion": empty}]), None)


@pytest.mark.parametrize(
    "row", [{"text": "\ud83d no"}, {"prompt": "a", "completion": "b \ud83d"}], ids=["text", "lesson"]
)
def test_half_a_character_is_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(TextError, match=r"line 1 holds half a character \('\\ud83d'\)"):
        documents(lines(tmp_path / "x.jsonl", [row]), None)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"instruction": "a", "input": "b"}, "line 2: 'output' is missing"),
        ({"prompt": "a"}, "line 2: 'completion' is missing"),
        ({"instruction": "", "output": "a"}, "line 2: 'instruction' is empty"),
        ({"instruction": "a", "output": ["b"]}, "line 2: 'output' is no text"),
        ({"instruction": "a", "input": {"b": 1}, "output": "c"}, "line 2: 'input' is no text"),
        ({"messages": "a"}, "line 2: 'messages' is no list of objects"),
        ({"messages": ["a"]}, "line 2: 'messages' is no list of objects"),
        ({"messages": []}, "line 2: 0 messages that end without an answer"),
        ({"messages": TALK[:1]}, "line 2: 1 messages that end without an answer"),
        ({"messages": TALK[:2]}, "line 2: 2 messages that end without an answer"),
        ({"messages": TALK[1:4]}, "line 2: 3 messages that end without an answer"),
        (
            {"messages": [*TALK[1:], {"role": "tool", "content": "a"}]},
            "line 2, message 5: 'tool' speaks, where 'user' should",
        ),
        ({"messages": TALK[1:3] * 100 + TALK[1:2]}, "line 2: 201 messages that end without an answer"),
        ({"messages": [TALK[0], TALK[2], TALK[1]]}, "line 2, message 2: 'assistant' speaks, where 'user' should"),
        ({"messages": [TALK[1], {"role": "assistant"}]}, "line 2, message 2: 'content' is missing"),
        ({"messages": [TALK[1], {"role": "assistant", "content": [1]}]}, "message 2: 'content' is no text"),
    ],
)
def test_rows_that_teach_nothing(tmp_path: Path, row: dict[str, Any], why: str) -> None:
    first = {"instruction": "a", "output": "b"} if "instruction" in row else {"prompt": "a", "completion": "b"}
    source = lines(tmp_path / "x.jsonl", [{"messages": TALK} if "messages" in row else first, row])
    with pytest.raises(TextError, match=why) as caught:
        documents(source, None)
    assert source in caught.value.came
    assert caught.value.allowed == (
        "instruction (and input) with output; prompt with completion; messages of user and assistant in turn"
    )


@pytest.mark.parametrize("other", [{"text": "a"}, {"prompt": "a", "completion": "b"}, {"messages": TALK}])
def test_one_kind_of_rows_in_a_file(tmp_path: Path, other: dict[str, Any]) -> None:
    for data in ([RIVER, other], [other, RIVER]):
        with pytest.raises(TextError, match=r"line 2 is recognised by '\w+', and those before it by '\w+'"):
            documents(lines(tmp_path / "x.jsonl", data), None)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "it is not JSON"),
        ("5", "neither a list nor an object with one list"),
        ('{"a": [], "b": []}', "neither a list nor an object with one list"),
        ('{"text": "a"}\n{"text": "b"}', "it is not JSON"),
        ('["a"]', "row 1 is not an object"),
        ('[{"text": "a"}, {"a": "1", "b": "2"}]', r"row 2 has no field 'text'; its fields of text are \['a', 'b'\]"),
        ("[]", "has 0 different documents"),
    ],
)
def test_json_that_cannot_be_used(tmp_path: Path, content: str, why: str) -> None:
    (tmp_path / "x.json").write_text(content, encoding="utf-8")
    with pytest.raises(TextError, match=why):
        documents(str(tmp_path / "x.json"), None)


# ---- packing


def runs(ids: Tensor, learn: Tensor) -> list[str]:
    """What stands in each run of learnt tokens."""
    flat = zip(ids.flatten().tolist(), learn.flatten().tolist(), strict=True)
    return [
        tokenizer().decode([i for i, _ in run]) for learnt, run in itertools.groupby(flat, lambda x: x[1]) if learnt
    ]


def in_one(given: list[Document], tok: Any, **asked: Any) -> Packed:
    """All answers in one block, so that none is left out."""
    size = lessons(given, tok, block=4, tokens=None, **asked).ids.numel()
    return lessons(given, tok, block=size, tokens=None, learn="answers", **asked)


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_the_mask_is_the_answers(template: Any) -> None:
    """Each with what ends it; the last may have lost some with the tail. A mask that is off by one shows others."""
    given = rows(40)
    found = in_one(taught(*given), tokenizer(), seed=1, template=template)
    assert found.learn is not None
    assert (found.ids.dtype, found.learn.dtype) == (torch.int64, torch.bool)
    assert found.ids.shape == found.learn.shape
    expected = {f"{row['output']}{END}" for row in given}
    *whole, _ = runs(found.ids, found.learn)
    assert len(whole) >= 38
    assert set(whole) <= expected
    for shift in (-1, 1):
        assert not set(runs(found.ids, found.learn.flatten().roll(shift))) & expected


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_packing_by_hand(template: Any) -> None:
    """The seed's order; prompt and answer tokenised apart; one end token behind each answer."""
    given, tok = taught(*rows(12)), tokenizer()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3)).tolist()
    ids: list[int] = []
    flags: list[bool] = []
    for row in (rows(12)[i] for i in order):
        if template == "alpaca":
            asked, answered = alpaca(read_lesson(row, ""))
            pieces = [(asked[0], False), (answered[0] + END, True)]
        else:
            context = f"\n\n{row['input']}" if row["input"] else ""
            question = f"user: {row['instruction']}{context}{END}assistant: "
            pieces = [(question, False), (row["output"] + END, True)]
        for text, answer in pieces:
            more = tok(text, add_special_tokens=False)["input_ids"]
            ids, flags = ids + more, flags + [answer] * len(more)
    count = len(ids) // 8
    found = lessons(given, tok, block=8, tokens=None, seed=3, template=template, learn="answers")
    assert found.learn is not None
    useful = [i for i in range(0, 8 * count, 8) if any(flags[i + 1 : i + 8])]
    assert found.ids.tolist() == [ids[i : i + 8] for i in useful]
    assert found.learn.tolist() == [flags[i : i + 8] for i in useful]
    whole = lessons(given, tok, block=8, tokens=None, seed=3, template=template)
    assert whole.ids.flatten().tolist() == ids[: 8 * count]
    assert whole.learn is None
    few = lessons(given, tok, block=8, tokens=40, seed=3, template=template, learn="answers")
    assert few.learn is not None
    assert torch.equal(few.ids, found.ids[:5])
    assert torch.equal(few.learn, found.learn[:5])


def test_long_questions_leave_as_many_blocks_as_were_asked() -> None:
    """Blocks that reach into no answer are passed over, and later ones read."""
    long = [{"instruction": "long " * 50, "input": "", "output": f"w{i}"} for i in range(40)]
    given, tok = taught(*long), tokenizer()
    found = lessons(given, tok, block=8, tokens=64, seed=0, template="alpaca", learn="answers")
    assert len(found.ids) == 8
    assert bool((found.targets() > 0).all())
    every = lessons(given, tok, block=8, tokens=None, seed=0, template="alpaca", learn="answers")
    assert torch.equal(every.ids[:8], found.ids)
    assert len(every.ids) > 30
    block = lessons(given[:1], tok, block=8, tokens=None, seed=0, template="alpaca").ids.numel() - 8
    with pytest.raises(TextError, match=r"a file: \d+ tokens, and none of them is learnt"):
        lessons(given[:1], tok, block=block, tokens=2, seed=0, template="alpaca", learn="answers", what="a file")
    with pytest.raises(TextError, match=r"a file gives \d+ tokens"):
        lessons(given[:1], tok, block=1000, tokens=2, seed=0, template="alpaca", learn="answers", what="a file")


@pytest.mark.parametrize("tail", ["\n", END, f"{END}\n"])
def test_a_chat_template_ends_by_itself_or_is_ended(tail: str) -> None:
    """Exactly one end token behind every answer, and it is learnt."""
    turn = "{{ m['role'] }}: {{ m['content'] }}{{ " + repr(tail) + " }}"
    prompt = "{% if add_generation_prompt %}assistant: {% endif %}"
    tok = with_template(f"{{% for m in messages %}}{turn}{{% endfor %}}{prompt}")
    found = in_one(taught(RIVER, SUM), tok, seed=0)
    assert found.learn is not None
    first = runs(found.ids, found.learn)[0]
    assert first in {f"{row['output']}{tail}{'' if END in tail else END}" for row in (RIVER, SUM)}
    assert first.count(END) == 1


def test_plain_text_is_packed_as_ever() -> None:
    plain = [Document("test", f"word {i} {END}") for i in range(90)]
    found = lessons(plain, tokenizer(), block=8, tokens=None, seed=2)
    assert torch.equal(found.ids, blocks(plain, tokenizer(), block=8, tokens=None, seed=2))
    assert found.learn is None


def test_lessons_are_text_too() -> None:
    """For calibration: Alpaca's, as if it had been written so."""
    given = taught(*rows(20))
    plain = [Document("test", document.text) for document in given]
    first, second = (blocks(d, tokenizer(), block=8, tokens=None, seed=0) for d in (given, plain))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({"learn": "answers"}, SettingsError, "learn answers of plain text"),
        ({"template": "chat"}, SettingsError, "template chat of plain text"),
        ({"template": "alpaca", "learn": "answers"}, SettingsError, "template alpaca of plain text"),
        ({"block": 10**6}, TextError, "at least 1000000, one block"),
    ],
)
def test_plain_text_has_no_answers(asked: dict[str, Any], error: type[RegrowError], says: str) -> None:
    usual = {"block": 4, "tokens": None, "seed": 0}
    with pytest.raises(error, match=says):
        lessons([Document("test", "a b c d e f")], tokenizer(), **{**usual, **asked})
