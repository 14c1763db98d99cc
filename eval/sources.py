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


def locate(folder: Path, name: str) -> Path:
    """The file `name` below `folder`, or below the one directory in it that has it, as archives unpack."""
    path = folder / name
    if path.exists() or not folder.is_dir():
        return path
    inner = sorted(found for pattern in ("*", "*/*") for found in folder.glob(f"{pattern}/{name}"))
    return inner[0] if len(inner) == 1 else path


def read_table(
    path: Path, columns: Sequence[str], origin: Origin, header: bool = True, as_published: bool = False
) -> list[Row]:
    """Rows of a CSV file by the names in `columns`, every cell as it is written.

    With `header` the file's first line names its columns, in capitals or not, and there may be others. Without, it has
    these and no other; a first line of names is left out.

    `as_published` reads cells as pandas does on its own, as the published scripts did: "None" is nan, 1.50 is 1.5.

    Raises:
        QwenError: the file is missing, empty or no CSV, or has other columns; with the row where there is one.
    """
    grid = read_grid(path, columns, origin, header)
    first = [str(cell).strip().lower() for cell in grid.iloc[0]]
    wanted = [column.lower() for column in columns]
    named = header or (first[0] in ("question", "input") and first[-1] in ("answer", "target", "label"))
    if header:
        absent = [column for column in columns if column.lower() not in first]
        if absent:
            found = ", ".join(map(str, grid.iloc[0]))
            raise QwenError(
                f"{path} has no column {', '.join(absent)} (it has {found}): take the files of {origin.where}"
            )
        places = [first.index(column) for column in wanted]
    elif len(first) != len(columns):
        raise QwenError(
            f"{path} has {len(first)} columns, not {len(columns)} ({', '.join(columns)}): take the files of "
            f"{origin.where}"
        )
    else:
        places = list(range(len(columns)))
    short = grid[len(columns) - 1].isin([""])  # pandas fills a line that ends early
    if not header and short.any():
        raise QwenError(
            f"{path}, row {int(short.idxmax()) + 1}: fewer than {len(columns)} columns ({', '.join(columns)}), or an "
            "empty last one"
        )
    if as_published:
        grid = pd.read_csv(path, header=None, skiprows=1 if named else 0, encoding="utf-8-sig")
    elif named:
        grid = grid.iloc[1:]
    if grid.empty:
        raise QwenError(f"{path} has no rows: download it again from {origin.where}")
    table = grid[places].set_axis(list(columns), axis=1)
    return [{name: str(cell) for name, cell in row.items()} for row in table.to_dict("records")]


def read_grid(path: Path, columns: Sequence[str], origin: Origin, header: bool) -> pd.DataFrame:
    """All cells of a CSV file as text, empty where a line ends early."""
    try:
        return pd.read_csv(path, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except FileNotFoundError:
        raise missing(path, columns, origin, header) from None
    except pd.errors.EmptyDataError:
        raise QwenError(f"{path} is empty: download it again from {origin.where}") from None
    except (OSError, ValueError) as error:  # not CSV, not UTF-8, lines of more columns than the first
        raise QwenError(f"cannot read {path} ({first_line(error)}): download it again from {origin.where}") from error


def read_json_lines(path: Path, columns: Sequence[str], origin: Origin) -> list[Row]:
    """Objects of a .jsonl or .jsonl.gz file, whose `columns` are text; numbers become text.

    A plain name is also found with .gz behind it, or in the one directory that holds it.
    """
    names = (path.name, path.name + ".gz")
    path = next((found for name in names if (found := locate(path.parent, name)).exists()), path)
    opener = gzip.open if path.suffix == ".gz" else open
    rows = []
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
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
                rows.append(row | {name: as_text(row[name], f"{path}, line {number}: {name}") for name in columns})
    except FileNotFoundError:
        raise missing(path, columns, origin, header=True) from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise QwenError(f"cannot read {path} ({first_line(error)}): download it again from {origin.where}") from error
    if not rows:
        raise QwenError(f"{path} is empty: download it again from {origin.where}")
    return rows


def as_text(value: Any, place: str) -> str:
    """Text or a number as text; QwenError for what is neither, or empty."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise QwenError(f"{place} is {json.dumps(value)}: write its text, or leave the line out")
    return value


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
