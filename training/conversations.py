"""Read conversations from JSON and JSON lines, and refuse what training would silently get wrong.

A sample holds `conversations` ({"from", "value"} or {"role", "content"}) or OpenAI's `messages` (with `tools`).
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen.errors import QwenError

from .messages import BadSample, Message, check_order, read_turns
from .tool_calls import has_tools, render_questions


@dataclass(frozen=True)
class Conversation:
    """Messages in order: an optional system message, then user and assistant in turns."""

    messages: tuple[Message, ...]
    where: str  # file and line or index, for people


def read_conversations(path: Path) -> list[Conversation]:
    """All conversations of a file; with tools there may be several to a sample.

    Raises:
        QwenError: names the file, the line or index, the turn and the reason of the first bad sample, and how many
            others are bad.
    """
    conversations: list[Conversation] = []
    problems: list[str] = []
    for where, sample in read_samples(path):
        try:
            conversations += [Conversation(messages, where) for messages in parse_sample(sample)]
        except BadSample as problem:
            problems.append(f"{where}: {problem}")
    if problems:
        more = f" ({len(problems) - 1} more samples of this file are bad)" if len(problems) > 1 else ""
        raise QwenError(problems[0] + more)
    if not conversations:
        raise QwenError(f"{path} holds no samples")
    return conversations


def parse_sample(sample: Any) -> list[tuple[Message, ...]]:
    """The conversations of one sample; BadSample says in which turn what is wrong."""
    turns = read_turns(sample)
    check_order(turns)
    if has_tools(sample, turns):
        return render_questions(turns, sample.get("tools") or sample.get("functions"))
    return [tuple(Message(turn["role"], turn["content"], turn["train"] is not False) for turn in turns)]


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
    except RecursionError:
        raise QwenError(f"{path} is nested too deeply to be a list of samples") from None
    for number, sample in enumerate(samples, start=1):
        yield f"{path}: sample {number}", sample


def _read_lines(lines: Iterator[str], path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise QwenError(
                    f"{path}:{number}: not valid JSON ({error}); expected one sample a line, or one list of samples"
                ) from None
