"""Files as text: unpacked, in whatever encoding they are."""

import codecs
import io
from importlib import import_module
from pathlib import Path
from typing import IO, TextIO

from qwen.errors import QwenError

PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ": "lzma"}
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
LIKELY = ["gb18030", "big5", "shift_jis", "euc_kr", "cp1252", "cp1251", "utf_16_le", "utf_16_be"]
SAMPLE = 1 << 18


def open_bytes(path: Path) -> IO[bytes]:
    """A file's bytes, unpacked; QwenError if it can't be read."""
    try:
        with path.open("rb") as file:
            head = file.read(6)
        if head.startswith(b"PK\x03\x04"):
            raise QwenError(f"{path} is a zip archive or an Excel file: unpack it, or save it as CSV")
        method = next((name for start, name in PACKED.items() if head.startswith(start)), None)
        if method is None:
            return path.open("rb")
        return import_module(method).open(path, "rb") if method != "zstd" else open_zstd(path)
    except OSError as error:
        raise QwenError(f"{path} can't be read: {error.strerror or error}") from None


def open_zstd(path: Path) -> IO[bytes]:
    """A file's bytes, of all its frames; OSError where the last one breaks off."""
    try:
        import pyarrow
    except ImportError:
        raise QwenError(f"{path} is packed with zstd: pip install pyarrow, or unpack it") from None
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))


def open_text(path: Path, encoding: str | None, newline: str | None = None) -> TextIO:
    """A file's text. Bytes that are no text in its encoding come as half surrogate pairs, for the line to be named.

    Raises:
        QwenError: the file can't be read, or its encoding not be told.
    """
    try:
        found = encoding or find_encoding(path)
        return io.TextIOWrapper(open_bytes(path), encoding=found, errors="surrogateescape", newline=newline)
    except LookupError:
        raise QwenError(f"--data_encoding {encoding} is unknown: write utf-8, gb18030, cp1252, ...") from None
    except EOFError as error:
        raise QwenError(f"{path} breaks off ({error}): copy it again") from None
    except OSError as error:
        raise QwenError(f"{path} can't be unpacked or read ({error.strerror or error}): copy it again") from None


def find_encoding(path: Path) -> str:
    """UTF-8 where a line of it says so, else what the bytes look like most."""
    with open_bytes(path) as file:
        head = file.read(SAMPLE)
    for mark, name in MARKS.items():
        if head.startswith(mark):
            return name
    foreign = None  # the first lines that are not UTF-8
    with open_bytes(path) as file:
        for line in file:
            try:
                line.decode()
                if not line.isascii() or (foreign and b"\0" in line):
                    return "utf-8"  # whatever else there is, is damaged
            except UnicodeDecodeError:
                foreign = (foreign or b"") + line
                if len(foreign) > SAMPLE:
                    break
    if foreign is None and b"\0" not in head:
        return "utf-8"
    from charset_normalizer import from_bytes

    best = from_bytes(foreign or head, cp_isolation=LIKELY).best()
    if best is None:
        raise QwenError(f"{path} is not UTF-8 text, nor in another encoding that can be told: give --data_encoding")
    return best.encoding


def is_damaged(text: str) -> bool:
    """Whether bytes of this line were no text."""
    return not text.isascii() and any("\udc80" <= character <= "\udcff" for character in text)
