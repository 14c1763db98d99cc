"""Keyword arguments as they were published over the years: the same model as today's words give, or a sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPTQConfig, pipeline

import golden
from quantize import main as quantize
from qwen import QwenError, QWenLMHeadModel, QWenModel, hardware
from utils import choose_device


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = golden.checkpoint(tmp_path_factory.mktemp("keywords") / "small", vocab_size=1000)
    settings = {"chat_format": "chatml", "eos_token_id": 700, "pad_token_id": 700, "max_new_tokens": 4}
    (path / "generation_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def int4(small: Path) -> Path:
    output = small.parent / "int4"
    quantize(
        [
            "-c",
            str(small),
            "-o",
            str(output),
            "--cpu-only",
            "--group-size",
            "32",
            "--samples",
            "2",
            "--max-length",
            "64",
        ]
    )
    return output


@pytest.mark.parametrize(
    "keywords",
    [{}, {"resume_download": True}, {"use_auth_token": False}, {"low_cpu_mem_usage": True}, {"load_in_8bit": False},
     {"load_in_4bit": False}, {"use_cache_kernel": True}, {"use_flash_attn": False}, {"disable_exllama": True},
     {"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"device_map": torch.device("cpu")}, {"device_map": "auto"},
     {"device_map": "balanced"}, {"device_map": "balanced_low_0"}, {"device_map": "sequential"},
     {"code_revision": "main"}, {"revision": "main"}, {"quantization_config": None}, {"max_memory": {"cpu": "1GiB"}}],
)  # fmt: skip
def test_keywords_that_change_no_number(small: Path, keywords: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # "auto" is the CPU
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: None)
    expected = golden.model()(golden.ids(8)).logits
    for load in (AutoModelForCausalLM, QWenLMHeadModel):
        model = load.from_pretrained(small, trust_remote_code=True, **keywords).to("cpu")
        torch.testing.assert_close(model(golden.ids(8)).logits, expected)
    options = {name: value for name, value in keywords.items() if name not in ("device_map", "max_memory")}
    tokenizer = AutoTokenizer.from_pretrained(small, trust_remote_code=True, **options)
    assert tokenizer("Hi")["input_ids"] == tokenizer.encode_text("Hi")
    assert "resume_download" not in tokenizer.init_kwargs


@pytest.mark.parametrize("word", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    "dtype", ["bfloat16", "bf16", "torch.bfloat16", torch.bfloat16, "float16", "fp16", "half", "fp32", "auto"]
)
def test_names_of_a_precision(small: Path, word: str, dtype: Any) -> None:
    names = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "auto": "float32"}
    expected = names.get(dtype, str(dtype).removeprefix("torch."))
    for load in (AutoModelForCausalLM, QWenLMHeadModel):
        assert str(load.from_pretrained(small, **{word: dtype}).dtype) == f"torch.{expected}"
    with pytest.raises(QwenError, match="dtype is 'int3': write auto, bfloat16"):
        AutoModelForCausalLM.from_pretrained(small, **{word: "int3"})


@pytest.mark.parametrize("config", [GPTQConfig(bits=4, use_exllama=False), {"quant_method": "gptq", "bits": 4}])
def test_gptq_settings_beside_a_gptq_checkpoint(int4: Path, small: Path, config: Any) -> None:
    expected = AutoModelForCausalLM.from_pretrained(int4)(golden.ids(8)).logits
    for load in (AutoModelForCausalLM, QWenLMHeadModel):
        model = load.from_pretrained(int4, quantization_config=config, device_map="cpu")
        torch.testing.assert_close(model(golden.ids(8)).logits, expected)
        with pytest.raises(QwenError, match=f"not quantised.*quantize.py -c {small}"):
            load.from_pretrained(small, quantization_config=config)


@pytest.mark.parametrize(
    "keywords",
    [{"load_in_4bit": True}, {"load_in_8bit": True}, {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
     {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}],
)  # fmt: skip
def test_bitsandbytes(small: Path, int4: Path, keywords: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    model = AutoModelForCausalLM.from_pretrained(small, device_map="cpu", **keywords)
    bits = "Linear4bit" if "8bit" not in str(keywords) or "load_in_4bit" in keywords else "Linear8bitLt"
    assert type(model.transformer.h[0].mlp.w1).__name__ in (bits, "Linear4bit")
    name = next(iter(keywords))
    with pytest.raises(QwenError, match=f"quantised already .GPTQ.: leave {name} out"):
        AutoModelForCausalLM.from_pretrained(int4, device_map="cpu", **keywords)
    monkeypatch.setattr("qwen.keywords.find_spec", lambda _: None)
    with pytest.raises(QwenError, match=f"{name} needs the package bitsandbytes"):
        AutoModelForCausalLM.from_pretrained(small, device_map="cpu", **keywords)


@pytest.mark.parametrize("place", ["cuda", "cuda:0", 0, {"": 0}, "cuda:9", {"transformer": "cpu", "lm_head": "cuda"}])
def test_gpus_that_are_not_here(small: Path, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: None)
    monkeypatch.setattr(hardware, "nvidia_driver", lambda: None)
    with pytest.raises(QwenError, match=r"device_map names .*: PyTorch finds no GPU here; device_map=.cpu. runs"):
        AutoModelForCausalLM.from_pretrained(small, device_map=place)


@pytest.mark.parametrize("place", ["nonsense", {"": "nowhere"}, 1.5, [0]])
def test_device_maps_of_another_shape(small: Path, place: Any) -> None:
    with pytest.raises(QwenError, match="device_map (names|is)"):
        AutoModelForCausalLM.from_pretrained(small, device_map=place)


@pytest.mark.parametrize(
    ("driver", "cuda", "said"),
    [("470.57.02", "13.0", "470.57.02 is too old.*CUDA 13.0: install driver 580 or newer"),
     ("470.57.02", "12.8", "driver 525 or newer"), ("580.65", None, "built for CPUs only"),
     ("580.65.06", "13.0", "see whether nvidia-smi finds it"), (None, "13.0", None), (None, None, None)],
)  # fmt: skip
def test_gpu_that_pytorch_cannot_use(
    driver: str | None, cuda: str | None, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From what the driver says of itself; the CPU is taken, but not in silence."""
    version = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Mon Sep 1\nGCC version:  gcc 11.4.0\n"
    if driver is not None:
        (tmp_path / "version").write_text(version)
    monkeypatch.setattr(hardware, "DRIVER_FILE", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if said is None:
        assert choose_device("auto") == "cpu" and hardware.explain_missing_gpu() == "PyTorch finds no GPU here"
        return
    with pytest.warns(UserWarning, match=said):
        assert choose_device("auto") == "cpu"
    assert choose_device("cpu") == "cpu"
    with pytest.raises(QwenError, match=said):
        choose_device("cuda")


def test_calls_of_published_snippets(small: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(small), AutoTokenizer.from_pretrained(small)
    long = model.generate(golden.ids(4), max_length=9, eos_token_id=999)
    assert long.shape == (1, 9)  # and not the four new tokens of its settings
    assert model.generate(golden.ids(4), max_length=9, max_new_tokens=2, eos_token_id=999).shape == (1, 6)
    assert type(AutoModel.from_pretrained(small)) is QWenModel
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = [row[0]["generated_text"] for row in write(["Hi", "Who are you?"], batch_size=2, do_sample=False)]
    assert texts == [write(text, do_sample=False)[0]["generated_text"] for text in ("Hi", "Who are you?")]
    chat = [{"role": "user", "content": "Hi"}]
    reply = write(chat, do_sample=False)[0]["generated_text"][-1]
    said = model.chat(tokenizer, "Hi", None, do_sample=False)[0]  # stripped, and without half a character
    assert reply["role"] == "assistant" and reply["content"].strip("\ufffd \n\t") == said
