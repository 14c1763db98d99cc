"""The folder of a run: answers as they come, what they depend on, and the result.

settings.json      what the answers depend on; written first
batch_limits.json  how large --batch-size auto makes batches, for whoever resumes
samples.jsonl      a line for each answer, flushed batch by batch; while several processes work, one file for each
result.json        scores, made from settings and answers; the same bytes however often the run was interrupted
log.jsonl          with --log-samples: question, answer, what was read from it, the right answer
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from eval.task import Record
from qwen import QwenError
from qwen.checkpoint import read_json
from qwen.paths import replacing
from utils import find_checkpoint

PROBE_BYTES = 1 << 16  # of a large file, at its beginning, middle and end


def fingerprint(directory: Path) -> str:
    """A short hash of a checkpoint's files: of small ones all bytes, of weights their sizes and three places.

    Names and dates don't count: a copy has the same fingerprint, another model under the same name has not. An adapter
    is nothing without its base: the base's fingerprint is part of its own.
    """
    digest = hashlib.sha256()
    if (directory / "adapter_config.json").is_file():
        settings = read_json(directory / "adapter_config.json")
        if base := settings.get("base_model_name_or_path"):
            digest.update(fingerprint(find_checkpoint(base, revision=settings.get("revision"))).encode())
    weights_and_settings = (".json", ".safetensors", ".bin", ".tiktoken")
    for path in sorted(p for p in directory.iterdir() if p.suffix in weights_and_settings and p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            for place in sorted({0, max(0, size // 2 - PROBE_BYTES // 2), max(0, size - PROBE_BYTES)}):
                file.seek(place)
                digest.update(file.read(PROBE_BYTES if size > 4 * PROBE_BYTES else -1))
    return digest.hexdigest()[:16]


def prompt_hash(ids: Sequence[int]) -> str:
    return text_hash(json.dumps(list(ids)))


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def check_writable(directory: Path, flag: str) -> None:
    """Make a directory and write into it; QwenError, naming the flag, if that can't be done."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise QwenError(f"{flag} {directory} can't be written ({error.strerror}): give another directory") from None


def write_json(path: Path, value: Any) -> None:
    """Write whole or not at all."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def as_lines(records: Iterable[Any]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


class RunFolder:
    """One run of one benchmark with one model and one set of settings.

    Its name ends in a hash of the settings, so two models, or two protocols, never share a folder.
    """

    def __init__(self, path: Path, rank: int = 0, processes: int = 1) -> None:
        self.path = path
        self.merged = path / "samples.jsonl"
        self.journal = self.merged if processes == 1 else path / f"samples.{rank}.jsonl"

    @classmethod
    def of_settings(
        cls, parent: Path, name: str, checkpoint: str, settings: dict[str, Any], rank: int = 0, processes: int = 1
    ) -> "RunFolder":
        label = re.sub(r"[^\w.-]+", "-", checkpoint.strip("./")).strip("-")[-60:] or "model"
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        return cls(parent / f"{name}-{label}-{settings['protocol']}-{key}", rank, processes)

    def begin(self, resume: bool, overwrite: bool) -> None:
        """Make the folder; QwenError if it holds answers already and neither flag says what to do with them."""
        if overwrite and self.path.exists():
            shutil.rmtree(self.path)
        if not resume and not overwrite and self.answers():
            raise QwenError(
                f"{self.path} holds {len(self.answers())} answers of this model and these settings already: "
                "add --resume to go on with them, or --overwrite to begin anew"
            )
        self.path.mkdir(parents=True, exist_ok=True)

    def answers(self) -> dict[str, Record]:
        """Records by id, from all processes' files; a line that a crash cut short is left out."""
        records: dict[str, Record] = {}
        for path in sorted(self.path.glob("samples*.jsonl")):
            for line in path.read_bytes().split(b"\n")[:-1]:
                try:
                    record = json.loads(line)
                    records[record["id"]] = record
                except (ValueError, KeyError, TypeError):
                    continue  # the same answer is computed again
        return records

    def append(self, records: Sequence[Record]) -> None:
        """Add answers and make sure they are on the disk."""
        self.path.mkdir(parents=True, exist_ok=True)  # on another machine the first process has made none
        with open(self.journal, "ab") as file:
            if file.tell() and not self._ends_in_newline():
                file.write(b"\n")
            file.write(as_lines(records).encode())
            file.flush()
            os.fsync(file.fileno())

    def _ends_in_newline(self) -> bool:
        with open(self.journal, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"

    def merge(self, records: Sequence[Record]) -> None:
        """One file of all answers in the order of the benchmark; other answers of the folder follow it."""
        ids = {record["id"] for record in records}
        others = [record for id, record in sorted(self.answers().items()) if id not in ids]
        write_whole(self.merged, as_lines([*records, *others]))
        for path in self.path.glob("samples.*.jsonl"):
            path.unlink()

    def settings(self) -> dict[str, Any]:
        path = self.path / "settings.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise QwenError(f"{self.path} is no folder of a run: {path} is missing") from None
        except ValueError as error:
            raise QwenError(f"{path} is damaged ({error}): run again without --rescore") from None
