"""Files of the user's: where the cache is, and how a file is written whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import QwenError


def user_cache_dir() -> Path:
    """The directory of what is built once and kept, whether or not it is there; QWEN_CACHE_HOME names another."""
    try:
        if home := os.environ.get("QWEN_CACHE_HOME"):
            return Path(home).expanduser()
        default = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
        return Path(default or "~/.cache").expanduser() / "qwen-7b"
    except RuntimeError as error:
        raise QwenError("There is no home directory to keep the cache in: set QWEN_CACHE_HOME.") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; when the body ends well, that file takes the place of `path` at once."""
    draft = path.with_name(f".{path.name[:200]}.{os.getpid()}.partial")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def check_space(path: Path, needed: int) -> None:
    """QwenError if the disk that `path` is on, or will be, has less than `needed` bytes free."""
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise QwenError(
            f"{path} needs {needed / 2**20:,.1f} MiB, and its disk has {free / 2**20:,.1f} MiB free: free some "
            "space, or give another directory"
        )


@contextmanager
def new_directory(path: Path, needed: int = 0) -> Iterator[Path]:
    """An empty directory beside `path` to fill; when the body ends well it becomes `path`, otherwise it is deleted.

    Raises:
        QwenError: `path` exists and is not an empty directory, nothing can be written there, or not `needed` bytes.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise QwenError(f"{path} exists and is not empty: give another directory, or delete it")
    check_space(path, needed)
    draft = path.absolute().with_name(f".{path.absolute().name}.{os.getpid()}.partial")
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise QwenError(f"{path} can't be written ({error.strerror}): give another directory") from error
    try:
        yield draft
        if path.exists():
            path.rmdir()  # empty: Windows won't replace it
        os.replace(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
