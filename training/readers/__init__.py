"""File formats to rows, a file each. A reader yields each row after its place; a row that can't be read is a BadSample.

JSON and tables are read by the standard library, which knows the line of every row and leaves values as they are;
Parquet, Arrow and the hub by `datasets`, in pieces or mapped from the disk, so that nothing need fit into memory.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import columns, json_text, plain, table

Rows = Iterator[tuple[str, Any]]
READERS: dict[str, Callable[[Path, str | None], Rows]] = {  # by the end of a file's name, packed or not
    ".json": json_text.read,
    ".jsonl": json_text.read,
    ".ndjson": json_text.read,
    ".csv": table.read,
    ".tsv": table.read,
    ".parquet": columns.read_parquet,
    ".arrow": columns.read_arrow,
    ".txt": plain.read,
}
PACKED = (".gz", ".zst", ".bz2", ".xz")


def find_reader(path: Path) -> Callable[[Path, str | None], Rows] | None:
    """The reader for a file of this name."""
    name = path.name.lower()
    for end in PACKED:
        name = name.removesuffix(end)
    return READERS.get(Path(name).suffix)
