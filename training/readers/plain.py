"""Text files: each is one document."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..samples import BadSample
from .opening import is_damaged, open_text


def read(path: Path, encoding: str | None) -> Iterator[tuple[str, Any]]:
    with open_text(path, encoding) as file:
        text = file.read()
    for number, line in enumerate(text.split("\n") if is_damaged(text) else (), start=1):
        if is_damaged(line):
            yield f"{path}:{number}", BadSample("not UTF-8 text, though other lines are: damaged", "damaged text")
            return
    yield f"{path}:1", {"text": text.removesuffix("\n")}
