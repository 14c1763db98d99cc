"""What a run may go on from, and where it may write."""

import json
from pathlib import Path

import pytest

import golden
from qwen import QwenError
from training.checkpoints import check_output, check_same_run, identify_base, mark_complete


def checkpoint(path: Path) -> Path:
    path.mkdir()
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        (path / name).write_bytes(b"0")
    (path / "trainer_state.json").write_text("{}")
    mark_complete(path, {"lora_r": 4, "lora_alpha": 16, "seed": 1})
    return path


def test_all_that_differs_is_named(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "checkpoint-1")
    check_same_run(path, {"lora_r": 4, "lora_alpha": 16, "seed": 1, "new": 1})
    with pytest.raises(QwenError, match=r"another lora_r \(4, now 8\), another lora_alpha \(16, now 64\)"):
        check_same_run(path, {"lora_r": 8, "lora_alpha": 64, "seed": 1})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_model.safetensors", "lacks weights"),
        ("optimizer.pt", "lacks the optimiser's state"),
        ("trainer_state.json", "missing or damaged"),
    ],
)
def test_a_checkpoint_with_gaps_is_refused(tmp_path: Path, name: str, message: str) -> None:
    path = checkpoint(tmp_path / "checkpoint-1")
    (path / name).unlink()
    with pytest.raises(QwenError, match=message):
        check_same_run(path, {})


def test_the_base_is_known_by_its_weights(tmp_path: Path) -> None:
    base = golden.checkpoint(tmp_path / "base", vocab_size=1000)
    before = identify_base(base)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings, indent=3))
    assert identify_base(base) == before
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-100:] = bytes(100)
    weights[len(weights) // 2 : len(weights) // 2 + 5000] = bytes(5000)
    (base / "model.safetensors").write_bytes(weights)
    assert identify_base(base) != before


def test_outputs_do_not_mix(tmp_path: Path) -> None:
    with pytest.raises(QwenError, match="is the model to be trained"):
        check_output(tmp_path, str(tmp_path), True)
    (tmp_path / "adapter_config.json").write_text("{}")
    check_output(tmp_path, "demo", True)
    with pytest.raises(QwenError, match="holds an adapter"):
        check_output(tmp_path, "demo", False)
    (tmp_path / "adapter_config.json").rename(tmp_path / "model.safetensors")
    with pytest.raises(QwenError, match="holds a whole model"):
        check_output(tmp_path, "demo", True)
