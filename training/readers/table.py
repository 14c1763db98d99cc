"""Tables: CSV and TSV with a header line, as spreadsheets write them."""

import csv
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from qwen.errors import QwenError

from ..samples import BadSample
from .opening import is_damaged, open_text

DELIMITERS = ",;\t|"
csv.field_size_limit(1 << 30)  # a cell may hold a whole document


def read(path: Path, encoding: str | None) -> Iterator[tuple[str, Any]]:
    """Each row as an object of its header's columns, after the line in which it begins; empty cells are left out."""
    with open_text(path, encoding, newline="") as file:
        head = file.readline()
        skipped = 0
        if head.lower().startswith("sep="):  # Excel's own
            skipped, head = 1, file.readline()
        delimiter = max(DELIMITERS, key=head.count)
        reader = csv.reader(chain([head], file), delimiter=delimiter, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            if len(header) < 1 or not all(header) or len(set(header)) < len(header):
                raise QwenError(f"{path}: the first line names the columns, each once; it is {head.strip()[:80]!r}")
            line = reader.line_num + skipped + 1
            for cells in reader:
                if cells:
                    yield f"{path}:{line}", as_row(header, cells)
                line = reader.line_num + skipped + 1
        except csv.Error as error:
            raise QwenError(
                f"{path}:{reader.line_num + skipped}: no table with '{delimiter}' between its cells ({error})"
            ) from None


def as_row(header: list[str], cells: list[str]) -> Any:
    if len(cells) != len(header):
        return BadSample(f"{len(cells)} cells, and the header names {len(header)}", "rows with other numbers of cells")
    if any(map(is_damaged, cells)):
        return BadSample("not UTF-8 text, though other lines of the file are: the line is damaged", "damaged text")
    return {name: cell for name, cell in zip(header, cells, strict=True) if cell or name in ("output", "input")}
