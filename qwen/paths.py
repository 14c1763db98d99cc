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


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """An empty directory beside `path` to fill; when the body ends well it becomes `path`, otherwise it is deleted.

    Raises:
        QwenError: `path` exists and is not an empty directory, or nothing can be written there.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise QwenError(f"{path} exists and is not empty: give another directory, or delete it")
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
