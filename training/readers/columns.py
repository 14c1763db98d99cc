"""Parquet, Arrow, saved datasets and those of the hub, by `datasets`."""

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qwen.errors import QwenError, first_line


def load_datasets() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import datasets
    except ImportError:
        raise QwenError("Parquet, Arrow and hub data need the package datasets: pip install datasets") from None
    datasets.disable_progress_bars()
    return datasets


def read_parquet(path: Path, encoding: str | None) -> Iterator[tuple[str, Any]]:
    return number_rows(path, lambda datasets: datasets.load_dataset(
        "parquet", data_files=str(path), split="train", streaming=True))  # fmt: skip


def read_arrow(path: Path, encoding: str | None) -> Iterator[tuple[str, Any]]:
    return number_rows(path, lambda datasets: datasets.load_dataset(
        "arrow", data_files=str(path), split="train", streaming=True))  # fmt: skip


def is_saved(path: Path) -> bool:
    """Whether a directory was written by `save_to_disk`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def read_saved(path: Path, split: str) -> Iterator[tuple[str, Any]]:
    def load(datasets: Any) -> Any:
        saved = datasets.load_from_disk(str(path))
        return choose_split(saved, split, path) if isinstance(saved, datasets.DatasetDict) else saved

    return number_rows(path, load)


def read_hub(name: str, split: str) -> Iterator[tuple[str, Any]]:
    """A data set of the Hugging Face Hub, `owner/name` or `owner/name:configuration`, through its cache; none of its
    code is executed."""
    repository, _, config = name.partition(":")
    return number_rows(name, lambda datasets: choose_split(
        datasets.load_dataset(repository, config or None), split, name))  # fmt: skip


def choose_split(splits: Any, split: str, name: str | Path) -> Any:
    if split not in splits:
        raise QwenError(f"{name} has no split {split}: give one of {', '.join(splits)} with --data_split")
    return splits[split]


def number_rows(path: Path | str, load: Any) -> Iterator[tuple[str, Any]]:
    """Rows after their numbers; QwenError if they can't be had."""
    datasets = load_datasets()
    try:
        rows: Iterable[Any] = load(datasets)
        for number, row in enumerate(rows, start=1):
            yield f"{path}: row {number}", row
    except QwenError:
        raise
    except Exception as error:  # pyarrow's, datasets', the hub's and the system's own
        reason, advice = first_line(error)[:200], "is it whole, and is its name right?"
        if "OfflineMode" in reason or isinstance(error, ConnectionError):
            advice = "it is no file here, and the hub can't be reached; give a path, or go online"
        elif "Config name is missing" in reason:
            advice = f"it has several; give one as {path}:CONFIGURATION"
        raise QwenError(f"{path} can't be read ({reason}): {advice}") from None
