"""Directories as other tools leave them: they load to the same model, or the right place or name is told."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import golden
from convert_to_qwen2 import main as convert_to_qwen2
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


@pytest.mark.parametrize(
    "name", ["gptq_model-4bit-128g.safetensors", "gptq_model-8bit--1g.safetensors", "qwen-7b chat.safetensors"]
)
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_under_another_name(int4: Path, tmp_path: Path, name: str, sharded: bool) -> None:
    """Any one file (or index) will do, as AutoGPTQ writes it; a saved copy has the usual name."""
    copy = shutil.copytree(int4, tmp_path / "copy")
    expected = logits(int4)
    if sharded:
        tensors = load_file(copy / "model.safetensors")
        (copy / "model.safetensors").unlink()
        stem, names = name.removesuffix(".safetensors"), sorted(tensors)
        files = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
        weight_map = {each: files[i % 2] for i, each in enumerate(names)}
        for file in files:
            save_file({k: v for k, v in tensors.items() if weight_map[k] == file}, copy / file, {"format": "pt"})
        (copy / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        (copy / "model.safetensors").rename(copy / name)
    torch.testing.assert_close(logits(copy), expected)
    model = AutoModelForCausalLM.from_pretrained(copy)
    torch.testing.assert_close(model(golden.ids(8)).logits, expected)
    model.save_pretrained(tmp_path / "saved")
    assert "transformers_weights" not in (tmp_path / "saved/config.json").read_text()
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(golden.ids(8)).logits, expected)
    if not sharded:
        convert_to_qwen2(["-c", str(copy), "-o", str(tmp_path / "qwen2")])
        assert (tmp_path / "qwen2/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("names", "said"),
    [(["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "no model.safetensors.index.json"),
     (["pytorch_model-00001-of-00002.bin"], "no pytorch_model.bin.index.json"),
     (["a.safetensors", "b.safetensors"], "2"),
     (["gptq_model-4bit-128g.bin", "training_args.bin"], r"`mv \S*/gptq_model-4bit-128g.bin \S*/pytorch_model.bin`"),
     (["qwen7b-q4_0.gguf"], "is of llama.cpp"),
     (["global_step10"], "zero_to_fp32.py"), (["optimizer.pt"], "no weights")],
)  # fmt: skip
def test_what_lies_in_place_of_weights_is_named(small: Path, tmp_path: Path, names: list[str], said: str) -> None:
    copy = shutil.copytree(small, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    for name in names:
        (copy / name).write_bytes(b"x")
    with pytest.raises(QwenError, match=said):
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
