"""JSON: a list of samples, one sample over several lines, or a sample a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen.errors import QwenError

from ..forms.chat import is_turns
from ..samples import BadSample
from .opening import is_damaged, open_text

WRAPPERS = ("data", "train", "rows", "examples", "samples", "instances")
BROKEN = "lines that are not JSON"


def read(path: Path, encoding: str | None) -> Iterator[tuple[str, Any]]:
    """Each sample after its place; QwenError if the whole is no JSON, or empty."""
    with open_text(path, encoding) as file:
        number, first = next(((n, line) for n, line in enumerate(file, start=1) if line.strip()), (0, ""))
        if not first:
            raise QwenError(f"{path} is empty: expected samples, see finetune/README.md")
        value = parse_line(first)
        more = next((line for line in file if line.strip()), None)
        if not isinstance(value, BadSample) and more is None:
            yield from split_document(value, path, number)
            return
    if isinstance(value, BadSample) and (document := parse_document(path, encoding)) is not None:
        yield from split_document(document[0], path, number)
        return
    with open_text(path, encoding) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", parse_line(line)


def parse_line(line: str) -> Any:
    """The value in a line, or what is wrong with it."""
    if is_damaged(line):
        return BadSample("not UTF-8 text, though other lines of the file are: the line is damaged", "damaged text")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadSample(f"not valid JSON ({error}); expected one sample a line, or one list of samples", BROKEN)


def parse_document(path: Path, encoding: str | None) -> tuple[Any] | None:
    """The value that a whole file is; None if its lines are better read one by one.

    Raises:
        QwenError: neither the file nor any of its lines is JSON.
    """
    with open_text(path, encoding) as file:
        text = file.read()
    try:
        return (json.loads(text),)
    except json.JSONDecodeError as error:
        lines = [line for line in text.splitlines() if line.strip()]
        if any(isinstance(parse_line(line), dict) for line in lines[1:]):
            return None
        raise QwenError(f"{path}:{error.lineno}: not valid JSON ({error})") from None
    except RecursionError:
        raise QwenError(f"{path} is nested too deeply to be a list of samples") from None


def split_document(value: Any, path: Path, line: int) -> Iterator[tuple[str, Any]]:
    """The samples of a JSON value: a list, an object that holds nothing else, or the value itself."""
    if isinstance(value, dict) and len(lists := [name for name in WRAPPERS if isinstance(value.get(name), list)]) == 1:
        value = value[lists[0]]
    if not isinstance(value, list) or is_turns(value):
        yield f"{path}:{line}", value
        return
    for number, sample in enumerate(value, start=1):
        yield f"{path}: sample {number}", sample
