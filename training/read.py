"""Training data from where they lie: files, folders, patterns, saved datasets and names of the hub."""

import glob
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from lzma import LZMAError
from pathlib import Path
from typing import Any

from qwen.errors import QwenError, first_line

from .forms import read_sample
from .readers import Rows, columns, find_reader, json_text
from .samples import BadSample, Conversation, Notes, Sample

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", re.ASCII)  # owner/name, and a configuration where it has several


@dataclass(frozen=True)
class Source:
    """Data given by one name on the command line, to be read any number of times.

    Attributes:
        columns: the names that forms know, by the names of these data.
    """

    name: str
    stage: str = "sft"
    encoding: str | None = None
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def rows(self) -> Rows:
        """All rows after their places.

        Raises:
            QwenError: a file is missing, unreadable or of no known format.
        """
        path = Path(self.name)
        if path.is_dir() and columns.is_saved(path):
            yield from columns.read_saved(path, self.split)
        elif not path.exists() and not glob.has_magic(self.name) and HUB_NAME.fullmatch(self.name) and not path.suffix:
            yield from columns.read_hub(self.name, self.split)
        else:
            for file in find_files(self.name):
                try:
                    yield from (find_reader(file) or json_text.read)(file, self.encoding)
                except (EOFError, OSError, LZMAError, zlib.error) as error:  # of a packed file, after its beginning
                    raise QwenError(f"{file} breaks off or is damaged ({first_line(error)}): copy it again") from None

    def samples(self, notes: Notes) -> Iterator[Sample]:
        """All samples that are good; what is wrong with the others goes into the notes."""
        for where, row in self.rows():
            notes.samples += 1
            try:
                if isinstance(row, BadSample):
                    raise row
                yield from read_sample(self.rename(row), where, self.stage, notes, self.ignored)
            except BadSample as fault:
                notes.add_fault(where, fault)

    def rename(self, row: Any) -> Any:
        if not self.columns or not isinstance(row, dict):
            return row
        return {self.columns.get(name, name): value for name, value in row.items()}


def find_files(name: str) -> list[Path]:
    """The files that a name, a folder or a pattern stands for, in order."""
    path = Path(name)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and find_reader(file)
                 and not any(part.startswith(".") for part in file.relative_to(path).parts)]  # fmt: skip
        if any(".txt" not in file.suffixes for file in files):  # beside data, texts are about them
            files = [file for file in files if ".txt" not in file.suffixes]
        if not files:
            raise QwenError(f"the folder {path} holds no data: no .json, .jsonl, .csv, .tsv, .parquet, .arrow or .txt")
        return files
    if glob.has_magic(name) and not path.exists():
        files = [Path(found) for found in sorted(glob.glob(name, recursive=True)) if Path(found).is_file()]
        if not files:
            raise QwenError(f"no file matches {name}")
        return files
    return [path]


def read_conversations(path: Path) -> list[Conversation]:
    """All conversations of a file or folder; with tools there may be several to a sample.

    Raises:
        QwenError: names the file, the line or index, the turn and the reason of the first bad sample, and how many
            others are bad.
    """
    notes = Notes()
    conversations = [each for each in Source(str(path)).samples(notes) if isinstance(each, Conversation)]
    check_notes(notes, [str(path)])
    if not conversations:
        raise QwenError(f"{path} holds no conversations")
    return conversations


def check_notes(notes: Notes, names: Sequence[str]) -> None:
    """QwenError for the first fault found, and how many more there are; or where nothing was found at all."""
    if not notes.samples:
        raise QwenError(f"{', '.join(names)} holds no samples")
    if notes.bad:
        first = next(iter(notes.faults.values()))[0]
        more = f" ({notes.bad - 1:,} more of {notes.samples:,} samples are bad)" if notes.bad > 1 else ""
        raise QwenError(first + more)
