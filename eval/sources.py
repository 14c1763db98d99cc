"""Read benchmarks: files in their official layouts, or the datasets library where no directory is given."""

import difflib
import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from qwen import QwenError
from qwen.errors import first_line

DATA = Path(__file__).resolve().parent / "data"

Row = dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """Where a benchmark comes from, for error messages and for the datasets library."""

    name: str
    where: str  # to download the official files from
    hub: str | None = None  # its name on the Hugging Face Hub


def load_data(name: str) -> Any:
    """A table of this package, from eval/data/."""
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def read_table(
    path: Path, columns: Sequence[str], origin: Origin, header: bool = True, as_published: bool = False
) -> list[Row]:
    """Rows of a CSV file, every cell as it is written.

    `as_published` reads cells as pandas does on its own, as the published scripts did: "None" is nan, 1.50 is 1.5.
    """
    names: dict[str, Any] = {} if header else {"names": list(columns)}
    exactly: dict[str, Any] = {} if as_published else {"dtype": str, "keep_default_na": False}
    try:
        table = pd.read_csv(path, **names, **exactly)
    except FileNotFoundError:
        raise missing(path, columns, origin, header) from None
    except (OSError, ValueError) as error:  # not CSV, not UTF-8, empty
        raise QwenError(f"cannot read {path} ({first_line(error)}): download it again from {origin.where}") from error
    absent = [column for column in columns if column not in table.columns]
    if absent:
        found = ", ".join(map(str, table.columns))
        raise QwenError(f"{path} has no column {', '.join(absent)} (it has {found}): take the files of {origin.where}")
    short = table[columns[-1]].isin([""]) | table[columns[-1]].isna()
    if not header and not as_published and short.any():
        line = int(short.idxmax()) + 1
        raise QwenError(f"{path}, row {line}: fewer than {len(columns)} columns ({', '.join(columns)})")
    return [{str(name): str(cell) for name, cell in row.items()} for row in table[list(columns)].to_dict("records")]


def read_json_lines(path: Path, columns: Sequence[str], origin: Origin) -> list[Row]:
    """Objects of a .jsonl or .jsonl.gz file; a plain name is also found with .gz behind it."""
    if not path.exists() and (packed := path.with_name(path.name + ".gz")).exists():
        path = packed
    opener = gzip.open if path.suffix == ".gz" else open
    rows = []
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise QwenError(f"{path}, line {number}: no JSON ({error}): download it again") from None
                absent = [name for name in columns if not isinstance(row, dict) or name not in row]
                if absent:
                    raise QwenError(f"{path}, line {number}: no field {', '.join(absent)}; see {origin.where}")
                rows.append(row)
    except FileNotFoundError:
        raise missing(path, columns, origin, header=True) from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise QwenError(f"cannot read {path} ({first_line(error)}): download it again from {origin.where}") from error
    if not rows:
        raise QwenError(f"{path} is empty: download it again from {origin.where}")
    return rows


def missing(path: Path, columns: Sequence[str], origin: Origin, header: bool) -> QwenError:
    kind = "columns" if header else "columns without a header line,"
    return QwenError(
        f"{path} is missing: -d takes the directory of {origin.name} as unpacked from {origin.where}; "
        f"the file has the {kind} {', '.join(columns)}"
    )


def read_hub(origin: Origin, config: str | None, split: str) -> list[Row]:
    """Rows of a split through the datasets library; its own cache makes a second run work offline."""
    try:
        import datasets
    except ImportError:
        raise QwenError(
            f"without -d the data comes through the package datasets: pip install datasets, or download "
            f"{origin.name} from {origin.where} and name its directory with -d"
        ) from None
    try:
        return list(datasets.load_dataset(origin.hub, config, split=split))
    except Exception as error:  # the library raises what its many backends raise
        raise QwenError(
            f"{origin.name} could not be loaded as {origin.hub} from the hub ({first_line(error)[:160]}): download it "
            f"from {origin.where} and name its directory with -d"
        ) from error


def choose_subjects(wanted: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """The wanted subjects in the benchmark's order, all of them by default; QwenError for an unknown name."""
    known = list(known)
    wanted = [name for word in wanted or known for name in word.split(",") if name]
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
            raise QwenError(f"--subjects: {name} is no subject of this benchmark; {hint}")
    return [name for name in known if name in wanted]
