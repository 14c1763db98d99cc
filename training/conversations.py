"""Read conversations from JSON and JSON lines, and refuse what training would silently get wrong.

A sample holds `conversations` ({"from", "value"} or {"role", "content"}) or OpenAI's `messages` (with `tools`).
"""

import codecs
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen.errors import QwenError

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
Span = tuple[int, int]  # of characters


@dataclass(frozen=True)
class Message:
    """A block of the prompt; text is NFC, as the tokenizer wants it."""

    role: str  # system, user or assistant
    content: str
    train: bool = True  # False where the sample says that this reply carries no loss
    spans: tuple[Span, ...] | None = None  # the parts of a reply that the model writes; None is all of it


@dataclass(frozen=True)
class Conversation:
    """Messages in order: an optional system message, then user and assistant in turns."""

    messages: tuple[Message, ...]
    where: str  # file and line or index, for people


class BadSample(ValueError):
    """What is wrong with a sample, without saying where it stands."""


def read_conversations(path: Path) -> list[Conversation]:
    """All conversations of a file.

    Raises:
        QwenError: names the file, the line or index, the turn and the reason of the first bad sample, and how many
            others are bad.
    """
    conversations: list[Conversation] = []
    problems: list[str] = []
    for where, sample in read_samples(path):
        try:
            conversations.append(Conversation(parse_messages(sample), where))
        except BadSample as problem:
            problems.append(f"{where}: {problem}")
    if problems:
        more = f" ({len(problems) - 1} more samples of this file are bad)" if len(problems) > 1 else ""
        raise QwenError(problems[0] + more)
    return conversations


# ---- files ----


def read_samples(path: Path) -> Iterator[tuple[str, Any]]:
    """Each sample of a JSON list or of JSON lines, after the place to name when it is wrong."""
    try:
        with path.open("rb") as file:
            start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
        if not start:
            raise QwenError(f"{path} is empty: expected conversations, see finetune/README.md")
        with path.open(encoding="utf-8-sig") as file:
            yield from _read_list(file.read(), path) if start.startswith(b"[") else _read_lines(file, path)
    except UnicodeDecodeError as error:
        raise QwenError(f"{path} is not UTF-8 text ({error}): convert it") from None
    except OSError as error:
        raise QwenError(f"{path} can't be read: {error.strerror}") from None


def _read_list(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        samples = json.loads(text)
    except json.JSONDecodeError as error:
        raise QwenError(f"{path}:{error.lineno}: not valid JSON ({error})") from None
    for index, sample in enumerate(samples):
        yield f"{path}: sample {index + 1}", sample


def _read_lines(lines: Iterator[str], path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as error:
                raise QwenError(
                    f"{path}:{number}: not valid JSON ({error}); expected one sample a line, or one list of samples"
                ) from None


# ---- samples ----


def parse_messages(sample: Any) -> tuple[Message, ...]:
    """The messages of one sample; BadSample says in which turn what is wrong."""
    if not isinstance(sample, dict):
        raise BadSample(f'a sample is {{"messages": [...]}} or {{"conversations": [...]}}, not {_kind(sample)}')
    given = [name for name in ("messages", "conversations") if name in sample]
    if len(given) != 1:
        raise BadSample(
            f'a sample is {{"messages": [...]}} or {{"conversations": [...]}}, and this has {_keys(sample)}'
        )
    turns = sample[given[0]]
    if not isinstance(turns, list) or not turns:
        raise BadSample(f'"{given[0]}" is a list of messages, not {_kind(turns)}')
    messages = [_parse_message(turn, number) for number, turn in enumerate(turns, start=1)]
    if isinstance(system := sample.get("system"), str) and messages[0].role != "system":
        messages.insert(0, Message("system", _text(system, "system")))
    _check_order(messages)
    return tuple(messages)


def _parse_message(turn: Any, number: int) -> Message:
    place = f"turn {number}"
    if not isinstance(turn, dict):
        raise BadSample(f'{place}: a message has "role" and "content", or "from" and "value", and is not {_kind(turn)}')
    name = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if name is None or ("content" not in turn and "value" not in turn):
        raise BadSample(f'{place}: a message has "role" and "content", or "from" and "value"; this has {_keys(turn)}')
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise BadSample(f"{place}: the role {name!r} is unknown; a message has one of {', '.join(ROLES)}")
    train = turn.get("train")
    if train not in (None, True, False) or isinstance(train, (int, float)) and not isinstance(train, bool):
        raise BadSample(f'{place}: "train" is {train!r}: write true or false')
    if train and role != "assistant":
        raise BadSample(f'{place}: "train" is true for a message of the {role}: only replies can carry loss')
    text = _text(content, place)
    if role == "assistant" and not text.strip() and train is not False:
        raise BadSample(f'{place}: the reply is empty; fill it, leave it out, or give it "train": false')
    return Message(role, text, train is not False)


def _text(content: Any, place: str) -> str:
    """The text of a message, which may come in OpenAI's parts."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
                 for part in content]  # fmt: skip
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else content
    if not isinstance(content, str):
        raise BadSample(f"{place}: the content is {_kind(content)}, not text")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise BadSample(f"{place}: character {error.start} is half of a surrogate pair: the text is damaged") from None
    return unicodedata.normalize("NFC", content)


def _check_order(messages: list[Message]) -> None:
    """BadSample unless user and assistant take turns after an optional system message."""
    expected = ("system", "user")
    for number, message in enumerate(messages, start=1):
        if message.role not in expected:
            reason = "a conversation begins with the user (after an optional system message)"
            if number > 1:
                reason = f"after {messages[number - 2].role} comes {' or '.join(expected)}"
            raise BadSample(f"turn {number}: {message.role} is out of place: {reason}")
        expected = ("assistant",) if message.role == "user" else ("user",)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "true or false"}
    name = names.get(type(value), "a number")
    return f"an empty {name.split()[-1]}" if value in ({}, [], "") else name


def _keys(fields: dict[str, Any]) -> str:
    return ", ".join(f'"{key}"' for key in list(fields)[:6]) or "nothing"
