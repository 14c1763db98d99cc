"""Directories as other tools leave them: they load to the same model, or the right place or name is told."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import golden
from quantize import main as quantize
from qwen import QwenError
from utils import load_model_and_tokenizer


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.checkpoint(tmp_path_factory.mktemp("directories") / "small", vocab_size=1000)


@pytest.fixture(scope="module")
def int4(small: Path) -> Path:
    output = small.parent / "int4"
    size = ["--group-size", "32", "--samples", "2", "--max-length", "64"]
    quantize(["-c", str(small), "-o", str(output), "--cpu-only", *size])
    return output


def logits(path: Path) -> torch.Tensor:
    model, _ = load_model_and_tokenizer(path, device="cpu", dtype="fp32")
    return model(golden.ids(8)).logits


# ---- AutoGPTQ, bitsandbytes ----


def without_quantization(directory: Path, copy: Path) -> dict[str, Any]:
    """A copy whose config.json says nothing of it; what it said."""
    shutil.copytree(directory, copy)
    config = json.loads((copy / "config.json").read_text())
    settings = config.pop("quantization_config")
    settings.pop("quant_method")
    (copy / "config.json").write_text(json.dumps(config))
    return settings


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json"])
def test_gptq_settings_of_other_tools(int4: Path, tmp_path: Path, name: str) -> None:
    """Without quant_method, or in AutoGPTQ's own file alone."""
    copy = tmp_path / "copy"
    settings = without_quantization(int4, copy)
    if name == "config.json":
        settings = {**json.loads((copy / name).read_text()), "quantization_config": settings}
    (copy / name).write_text(json.dumps(settings))
    expected = logits(int4)
    torch.testing.assert_close(logits(copy), expected)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(copy)(golden.ids(8)).logits, expected)


@pytest.mark.parametrize("name", ["gptq_model-4bit-128g.safetensors", "gptq_model-8bit--1g.safetensors"])
def test_weight_files_of_autogptq_are_to_be_renamed(int4: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(int4, tmp_path / "copy")
    (copy / "model.safetensors").rename(copy / name)
    with pytest.raises(QwenError, match=f"AutoGPTQ's name.*mv {copy / name} {copy / 'model.safetensors'}"):
        logits(copy)


def test_bitsandbytes_directory(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(small, quantization_config=nf4, device_map="cpu")
    expected = model(golden.ids(8)).logits
    copy = shutil.copytree(small, tmp_path / "nf4")
    model.save_pretrained(copy)
    torch.testing.assert_close(logits(copy), expected, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr("qwen.int4.find_spec", lambda _: None)
    with pytest.raises(QwenError, match="quantised by bitsandbytes: pip install bitsandbytes"):
        logits(copy)


# ---- places ----


@pytest.mark.parametrize("given", [".", "snapshots", "snapshots/abc"])
@pytest.mark.parametrize("refs", [["main"], ["v1", "main"], ["v1"], []])
def test_folders_of_a_hub_cache(small: Path, tmp_path: Path, given: str, refs: list[str]) -> None:
    root = tmp_path / "models--Qwen--Qwen-7B-Chat"
    shutil.copytree(small, root / "snapshots" / "abc")
    (root / "refs").mkdir()
    for ref in refs:
        (root / "refs" / ref).write_text("abc" if ref == refs[-1] else "gone")
    torch.testing.assert_close(logits(root / given), logits(small))


@pytest.mark.parametrize("names", [["checkpoint-1"], ["checkpoint-9", "checkpoint-10"]])
def test_parent_of_checkpoints(small: Path, tmp_path: Path, names: list[str]) -> None:
    for name in names:
        shutil.copytree(small, tmp_path / "run" / name)
    with pytest.raises(QwenError, match="run holds checkpoints but is none itself: give one.*/run/checkpoint-"):
        logits(tmp_path / "run")
    with pytest.raises(QwenError, match="config.json is missing"):
        (tmp_path / "empty").mkdir()
        logits(tmp_path / "empty")


def test_vocabulary_of_another_checkpoint(small: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(small, tmp_path / "copy")
    shutil.copy(golden.DATA / "qwen.tiktoken", copy)
    with pytest.raises(QwenError, match="has ids up to 151850, and the model has only 1000 rows"):
        logits(copy)
