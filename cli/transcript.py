"""Conversations as files: JSON with a version, the system message and the turns."""

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import NamedTuple

from qwen import QwenError
from qwen.chatml import Turn

FORMAT = "qwen-chat"
VERSION = 1


class Transcript(NamedTuple):
    system: str
    turns: list[Turn]


def save_transcript(path: Path, transcript: Transcript) -> None:
    """Write the file whole or not at all; only a transcript is ever overwritten.

    Raises:
        QwenError: the path is something else than a transcript, or cannot be written.
    """
    path = Path(os.path.realpath(path))  # replace what a link points to, not the link
    if os.path.exists(path):  # unlike Path.exists, False where one may not look
        try:
            load_transcript(path)
        except QwenError as error:
            raise QwenError(f"{path} is not overwritten: {error}") from None
    content = {
        "format": FORMAT,
        "version": VERSION,
        "system": transcript.system,
        "turns": [{"user": query, "assistant": reply} for query, reply in transcript.turns],
    }
    partial = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "x", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise QwenError(f"cannot write {path}: {error.strerror or error}") from error


def load_transcript(path: Path) -> Transcript:
    """Read a file that `save_transcript` wrote; QwenError says what is wrong with any other."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise QwenError(f"{path} is a directory or device, not a transcript file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QwenError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError):
        raise QwenError(f"{path} is not a chat transcript: it is not JSON") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise QwenError(f'{path} is not a chat transcript: it lacks "format": "{FORMAT}"')
    if content.get("version") != VERSION:
        raise QwenError(f"{path} is a transcript of version {content.get('version')}, and only {VERSION} is known here")
    turns = content.get("turns")
    if not is_text(content.get("system")) or not isinstance(turns, list):
        raise QwenError(f'{path} is a damaged transcript: "system" must be a text and "turns" a list')
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not is_text(turn.get("user")) or not is_text(turn.get("assistant")):
            raise QwenError(f'{path} is a damaged transcript: turn {number} needs the texts "user" and "assistant"')
    return Transcript(content["system"], [(turn["user"], turn["assistant"]) for turn in turns])


def is_text(value: object) -> bool:
    """Whether it is a string without lone surrogates, which JSON can hold but no tokenizer can read."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)
