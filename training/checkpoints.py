"""Checkpoints of a run: which are whole, which to go on from, and what an adapter's directory says about its base."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from qwen.checkpoint import read_json
from qwen.errors import QwenError

COMPLETE = "complete.json"  # written when everything else is; a checkpoint without it was interrupted
NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(output: Path) -> list[Path]:
    """Checkpoint directories of a run, the oldest first, interrupted ones included."""
    found = [path for path in output.glob("checkpoint-*") if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(NAME.fullmatch(path.name)[1]))


def is_complete(checkpoint: Path) -> bool:
    return (checkpoint / COMPLETE).is_file()


def mark_complete(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Say that a checkpoint is whole, and what it can be continued with."""
    partial = checkpoint / f"{COMPLETE}.partial"
    partial.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    partial.replace(checkpoint / COMPLETE)


def remove_old(output: Path, keep: int | None, best: str | None) -> None:
    """Delete interrupted checkpoints, and all but the newest `keep` and the best of the others."""
    whole = [path for path in list_checkpoints(output) if is_complete(path)]
    for path in list_checkpoints(output):
        outdated = keep and path in whole[:-keep] and str(path) != best
        if outdated or path not in whole:
            (path / COMPLETE).unlink(missing_ok=True)  # first: a half deleted one must not look whole
            shutil.rmtree(path, ignore_errors=True)


def find_resumable(output: Path, resume: str | None) -> Path | None:
    """The checkpoint to go on from: the given directory, or for `True` the newest whole one; None to start anew.

    Raises:
        QwenError: there is no such checkpoint, it is not whole, or the run's directory is in use.
    """
    whole = [path for path in list_checkpoints(output) if is_complete(path)]
    if resume is None or resume.lower() == "false":
        if whole:
            raise QwenError(
                f"{output} holds {whole[-1].name} of an earlier run: go on with --resume_from_checkpoint True, or give "
                "another --output_dir"
            )
        return None
    if resume.lower() in ("true", "latest"):
        return whole[-1] if whole else None
    checkpoint = Path(resume)
    if not checkpoint.is_dir() or not NAME.fullmatch(checkpoint.name):
        raise QwenError(f"--resume_from_checkpoint {resume} is no checkpoint: give a directory checkpoint-N, or True")
    if not is_complete(checkpoint):
        raise QwenError(
            f"{checkpoint} was interrupted while it was written: --resume_from_checkpoint True takes a whole one"
        )
    return checkpoint


def check_same_run(checkpoint: Path, facts: dict[str, Any]) -> None:
    """QwenError if a run with these facts would not go on where the checkpoint's stopped."""
    saved = read_json(checkpoint / COMPLETE)
    for name, value in facts.items():
        if saved.get(name) != value:
            raise QwenError(
                f"{checkpoint} was written with another {name} ({saved.get(name)}, now {value}): take the same, or "
                "start anew in another --output_dir"
            )


def record_base(directory: Path, name: str, revision: str | None) -> None:
    """Write into an adapter's directory which checkpoint it belongs to, by the name that it was asked for."""
    path = directory / "adapter_config.json"
    settings = read_json(path) | {"base_model_name_or_path": name, "revision": revision}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
