"""Disks that are too small, or full in the middle: one sentence, and nothing left that stops the next run."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model

import convert_to_qwen2
import finetune
import golden
import merge_lora
import quantize
from qwen import QwenError, QWenLMHeadModel
from utils import load_model_and_tokenizer


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, an adapter of it and a sample to train on."""
    path = tmp_path_factory.mktemp("space")
    base = golden.checkpoint(path / "base", vocab_size=1000)
    model, _ = load_model_and_tokenizer(base, device="cpu", dtype="fp32")
    lora = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(path / "adapter")
    settings = json.loads((path / "adapter/adapter_config.json").read_text())
    (path / "adapter/adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    (path / "data.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    return path


def run_tool(name: str, work: Path, output: Path) -> None:
    base, out = str(work / "base"), str(output)
    if name == "merge":
        merge_lora.main(["-c", str(work / "adapter"), "-o", out])
    elif name == "convert":
        convert_to_qwen2.main(["-c", base, "-o", out])
    elif name == "quantise":
        size = ["--group-size", "32", "--samples", "2", "--max-length", "64"]
        quantize.main(["-c", base, "-o", out, "--cpu-only", *size])
    else:
        steps = ["--max_steps", "1", "--use_cpu", "True", "--fp32", "True", "--report_to", "none"]
        finetune.main(["-c", base, "-d", str(work / "data.jsonl"), "--output_dir", out, *steps])


@pytest.mark.parametrize("name", ["merge", "convert", "quantise", "finetune"])
def test_too_small_a_disk_is_told_before_loading(
    name: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=50_000))
    monkeypatch.setattr(QWenLMHeadModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(QwenError, match=r"out needs .* MiB, and its disk has 0\.0 MiB free: free some space"):
        run_tool(name, work, tmp_path / "out")
    assert not any((tmp_path / "out").glob("*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A disk of some KiB, which can be made larger; only root can make one."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: int) -> Path:
        options = f"{'remount,' if disk.is_mount() else ''}size={size}k"
        if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk],
                                                           capture_output=True).returncode:  # fmt: skip
            pytest.skip("a disk can't be mounted here")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("name", ["merge", "convert", "quantise"])
def test_disk_that_fills_up_in_the_middle(
    name: str, work: Path, small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk(300)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))  # others fill it later
        with pytest.raises(QwenError, match="out can't be written .*: free some space"):
            run_tool(name, work, disk / "out")
    assert not (disk / "out").exists()
    small_disk(100_000)
    run_tool(name, work, disk / "out")
    assert (disk / "out/model.safetensors").is_file()
