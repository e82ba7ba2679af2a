"""Lessons: what is asked and what is answered; which rows are recognised as one, and how a template writes it.

A template gives pieces of text, asked and answered in turn. They are tokenised apart, so that an answer is a run of
whole tokens, as it is when a model goes on after a prompt. Without a tokenizer the text of a lesson is Alpaca's.
What this gives up: tools, pictures, and chat templates that write a conversation's beginning anew when it goes on.
Where a tokenizer begins every text with a space (LLaMA 2), an answer begins with one.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, Literal

from regrow.errors import SettingsError, TextError

Template = Literal["alpaca", "chat"]
Piece = tuple[str, bool]
"""Some text, and whether it is an answer."""

ROWS = "instruction (and input) with output; prompt with completion; messages of user and assistant in turn"
FIELDS: dict[str, tuple[str, ...]] = {  # by the first a row is recognised, the last holds the answer
    "messages": ("messages",),
    "instruction": ("instruction", "input", "output"),
    "prompt": ("prompt", "completion"),
}
ALONE = "Below is an instruction that describes a task."
PAIRED = "Below is an instruction that describes a task, paired with an input that provides further context."
REQUEST = "Write a response that appropriately completes the request."


@dataclass(frozen=True, slots=True)
class Turn:
    asked: str
    answer: str
    context: str = ""  # Alpaca's `input`


@dataclass(frozen=True, slots=True)
class Lesson:
    turns: tuple[Turn, ...]
    system: str = ""  # what is said before the first turn
    where: str = field(default="", compare=False)  # it was read, for errors


# ---- rows


def kind(fields: Container[str]) -> str:
    """What rows with these fields are recognised by: a name of `FIELDS`, or `text`.

    A field for what is asked, without its answer, counts only where there is no field `text`.
    """
    asked = [name for name in FIELDS if name in fields]
    whole = [name for name in asked if FIELDS[name][-1] in fields]
    return next(iter(whole or ([] if "text" in fields else asked)), "text")


def no_answer(row: Mapping[str, Any]) -> bool:
    """Whether the field for the answer of an instruction is there and empty, as in some rows of Alpaca."""
    found = kind(row)
    answer = FIELDS.get(found, ("",))[-1]
    return found not in ("text", "messages") and answer in row and not str(row[answer] or "").strip()


def read_lesson(row: Mapping[str, Any], where: str) -> Lesson:
    """The lesson in a row whose `kind` is not `text`; errors say `where` it is. Raises `TextError`."""
    found = kind(row)
    if found == "messages":
        return _conversation(row["messages"], where)
    *_, answer = FIELDS[found]
    context = _text(row, "input", where, needed=False) if found == "instruction" else ""
    return Lesson((Turn(_text(row, found, where), _text(row, answer, where), context),), where=where)


def _conversation(messages: Any, where: str) -> Lesson:
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise _bad(f"{where}: 'messages' is no list of objects")
    roles = [str(message.get("role")) for message in messages]
    start = int(roles[:1] == ["system"])
    for number, (role, due) in enumerate(zip(roles[start:], cycle(("user", "assistant")), strict=False), start + 1):
        if role != due:
            raise _bad(f"{where}, message {number}: {role!r} speaks, where {due!r} should")
    if len(roles) == start or (len(roles) - start) % 2:
        raise _bad(f"{where}: {len(roles)} messages that end without an answer")
    said = [
        _text(message, "content", f"{where}, message {number}", needed=role != "system")
        for number, (role, message) in enumerate(zip(roles, messages, strict=True), 1)
    ]
    return Lesson(tuple(map(Turn, said[start::2], said[start + 1 :: 2])), "".join(said[:start]), where)


def _text(row: Mapping[str, Any], name: str, where: str, *, needed: bool = True) -> str:
    value = row.get(name) or ""
    if not isinstance(value, str):
        raise _bad(f"{where}: {name!r} is no text")
    if needed and not value.strip():
        raise _bad(f"{where}: {name!r} is {'empty' if name in row else 'missing'}")
    return value if value.strip() else ""


def _bad(came: str) -> TextError:
    return TextError(came, ROWS, "complete the row, or leave it out")


# ---- templates


def chosen_template(tokenizer: Any, asked: Template | None) -> Template:
    """What is asked; else the tokenizer's chat template where it has one, else Alpaca's. Raises `SettingsError`."""
    own = bool(getattr(tokenizer, "chat_template", None))
    if asked == "chat" and not own:
        raise SettingsError(
            "template chat with a tokenizer that has no chat template",
            "alpaca, or the tokenizer of a chat model",
            "ask for template alpaca",
        )
    return asked or ("chat" if own else "alpaca")


def alpaca(lesson: Lesson) -> list[Piece]:
    """The template of Alpaca-LoRA, which SPP trains with (arXiv:2405.16057); a system message replaces its first lines.

    Alpaca has one turn; further turns repeat its headings, and only the last is followed by an end token.
    """
    opening = lesson.system or f"{PAIRED if lesson.turns[0].context else ALONE} {REQUEST}"
    pieces: list[Piece] = []
    for turn in lesson.turns:
        context = f"### Input:\n{turn.context}\n\n" if turn.context else ""
        pieces.append((f"{opening}\n\n### Instruction:\n{turn.asked}\n\n{context}### Response:\n", False))
        pieces.append((turn.answer, True))
        opening = ""
    return pieces


def chat(lesson: Lesson, tokenizer: Any) -> list[Piece]:
    """The tokenizer's chat template: an answer is what it writes after its own prompt for one, end tokens too.

    Alpaca's input follows the instruction after a blank line. Raises `TextError` when the template refuses the lesson,
    or writes what came before an answer differently once the answer is there.
    """
    said = [{"role": "system", "content": lesson.system}] if lesson.system else []
    pieces: list[Piece] = []
    before = ""
    for turn in lesson.turns:
        said.append({"role": "user", "content": f"{turn.asked}\n\n{turn.context}" if turn.context else turn.asked})
        prompt = _written(said, lesson.where, tokenizer, add_generation_prompt=True)
        said.append({"role": "assistant", "content": turn.answer})
        whole = _written(said, lesson.where, tokenizer, add_generation_prompt=False)
        if not (prompt.startswith(before) and whole.startswith(prompt)):
            raise _unfit(
                f"{lesson.where}: the chat template writes the beginning of a conversation anew when it goes on"
            )
        pieces += [(prompt.removeprefix(before), False), (whole.removeprefix(prompt), True)]
        before = whole
    return pieces


def _written(messages: list[dict[str, str]], where: str, tokenizer: Any, *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise _unfit(f"{where}: the chat template refuses {len(messages)} messages of {roles}: {error}") from error
    return text


def _unfit(came: str) -> TextError:
    return TextError(came, "conversations that the template writes piece after piece", "ask for template alpaca")
