"""Checkpoints of a run: which are whole, which to go on from, and what an adapter's directory says about its base."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from qwen.checkpoint import list_weight_files, read_json
from qwen.errors import QwenError

COMPLETE = "complete.json"  # written when everything else is; a checkpoint without it was interrupted
RATE = ("learning_rate", "lr_scheduler_type")
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


def check_same_run(checkpoint: Path, facts: dict[str, Any], new_rate: bool = False) -> None:
    """QwenError if a run with these facts would not go on where the checkpoint's stopped; the learning rate and its
    schedule may differ where a new rate is asked for."""
    saved = read_json(checkpoint / COMPLETE)
    differing = [name for name, value in facts.items() if name in saved and saved[name] != value]
    rate = set(differing) & set(RATE)
    if new_rate:
        differing = [name for name in differing if name not in RATE]
    if differing:
        listed = ", another ".join(f"{name} ({saved[name]}, now {facts[name]})" for name in differing)
        allowed = "; --new_learning_rate True goes on with another rate" if rate else ""
        raise QwenError(
            f"{checkpoint} was written with another {listed}: take the same, or start anew in another "
            f"--output_dir{allowed}"
        )
    check_state(checkpoint)


def check_state(checkpoint: Path) -> None:
    """QwenError if a checkpoint lacks what is needed to go on: weights, the optimiser's state, the Trainer's."""
    instead = "delete it to go on from the one before, or start anew in another --output_dir"
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise QwenError(f"{checkpoint / 'trainer_state.json'} is missing or damaged: {instead}") from None
    needed = {
        "weights": ("*.safetensors", "pytorch_model*", "adapter_model.bin", "global_step*"),
        "the optimiser's state": ("optimizer*", "global_step*"),
    }
    for what, patterns in needed.items():
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            raise QwenError(f"{checkpoint} lacks {what}: {instead}")


def identify_base(directory: Path, adapter: Path | None = None) -> str:
    """The same for the same weights, an adapter's included: sizes of the weight files and 64 pieces of each."""
    digest = hashlib.sha256()
    for path in [*list_weight_files(directory), *sorted(adapter.glob("adapter_model.*") if adapter else [])]:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for number in range(64):
                file.seek(number * size // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def check_output(output: Path, base: str, adapter: bool) -> None:
    """QwenError if the output would replace the base model, or mix with another method's result."""
    if Path(base).is_dir() and output.resolve() == Path(base).resolve():
        raise QwenError(f"--output_dir {output} is the model to be trained, which would be lost: give another one")
    weights = any((output / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    other = "a whole model" if adapter and weights else ""
    if not adapter and (output / "adapter_config.json").is_file():
        other = "an adapter"
    if other:
        raise QwenError(f"--output_dir {output} holds {other} of an earlier training: give another one")


def record_base(directory: Path, name: str, revision: str | None) -> None:
    """Write into an adapter's directory which checkpoint it belongs to, by the name that it was asked for."""
    path = directory / "adapter_config.json"
    settings = read_json(path) | {"base_model_name_or_path": name, "revision": revision}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
