"""Checkpoint directories: official ones load as they are, their code never runs, broken ones say what to do."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import golden
import qwen
from qwen import QWenConfig, QwenError, QWenLMHeadModel, QWenModel, QWenTokenizer
from utils import load_model_and_tokenizer

OFFICIAL_CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "model_type": "qwen", "tokenizer_class": "QWenTokenizer", "transformers_version": "4.32.0",
    "attn_dropout_prob": 0.0, "bf16": False, "emb_dropout_prob": 0.0, "fp16": False, "fp32": False,
    "hidden_size": 32, "intermediate_size": 128, "initializer_range": 0.02, "kv_channels": 16,
    "layer_norm_epsilon": 1e-06, "max_position_embeddings": 8192, "no_bias": True, "num_attention_heads": 2,
    "num_hidden_layers": 2, "onnx_safe": None, "rotary_emb_base": 10000, "rotary_pct": 1.0,
    "scale_attn_weights": True, "seq_length": 8192, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "use_dynamic_ntk": True, "use_flash_attn": "auto", "use_logn_attn": True, "vocab_size": 151936,
}  # fmt: skip
CONFIG_OF_AUGUST = {
    "activation": "swiglu", "apply_residual_connection_post_layernorm": False, "architectures": ["QWenLMHeadModel"],
    "attn_pdrop": 0.0, "auto_map": OFFICIAL_CONFIG["auto_map"], "bf16": False, "bias_dropout_fusion": True,
    "embd_pdrop": 0.0, "ffn_hidden_size": 128, "fp16": False, "fp32": False, "initializer_range": 0.02,
    "kv_channels": 16, "layer_norm_epsilon": 1e-06, "model_type": "qwen", "n_embd": 32, "n_head": 2, "n_layer": 2,
    "n_positions": 6144, "no_bias": True, "padded_vocab_size": 151936, "params_dtype": "torch.bfloat16",
    "pos_emb": "rotary", "rotary_emb_base": 10000, "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 2048,
    "tie_word_embeddings": False, "use_cache": True, "use_dynamic_ntk": True, "use_flash_attn": True,
    "use_logn_attn": True, "vocab_size": 151936,
}  # fmt: skip
GENERATION = {
    "chat_format": "chatml", "eos_token_id": 151643, "pad_token_id": 151643, "max_window_size": 24000,
    "max_new_tokens": 512, "do_sample": True, "top_k": 0, "top_p": 0.8, "repetition_penalty": 1.1,
}  # fmt: skip
REMOTE_FILES = ("configuration_qwen.py", "modeling_qwen.py", "tokenization_qwen.py", "qwen_generation_utils.py")


def small_model() -> QWenLMHeadModel:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_channels": 16}
    model = QWenLMHeadModel(QWenConfig(**small, intermediate_size=128)).eval().bfloat16()
    for name, parameter in model.named_parameters():  # livelier than the initial 0.02
        parameter.data.mul_(10 if "wte" in name or "attn" in name else 1)
    return model


def write_official(directory: Path, weights: str = "safetensors", config: dict = OFFICIAL_CONFIG) -> dict:
    """A directory as the publisher's: two shards, an index, old buffers, remote code. Returns the tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps(GENERATION))
    settings = {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer"}
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copy(golden.DATA / "qwen.tiktoken", directory)
    for name in REMOTE_FILES:
        (directory / name).write_text("raise SystemExit('remote code was run')\n")
    tensors = {name: tensor.clone() for name, tensor in small_model().state_dict().items()}
    with_buffers = tensors | {f"transformer.h.{i}.attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    names = sorted(with_buffers)
    shards = [names[: len(names) // 2], names[len(names) // 2 :]]
    stem, index = ("model", "model.safetensors") if weights == "safetensors" else ("pytorch_model", "pytorch_model.bin")
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"{stem}-{i:05}-of-00002.{'safetensors' if weights == 'safetensors' else 'bin'}"
        content = {name: with_buffers[name] for name in shard}
        if weights == "safetensors":
            save_file(content, directory / file, metadata={"format": "pt"})
        else:
            torch.save(content, directory / file)
        weight_map |= dict.fromkeys(shard, file)
    (directory / f"{index}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
@pytest.mark.parametrize("trust", [None, False, True])
def test_official_directory_loads_and_its_code_never_runs(weights: str, trust: bool | None, tmp_path: Path) -> None:
    tensors = write_official(tmp_path, weights)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=trust)
    assert (type(model), type(tokenizer)) == (QWenLMHeadModel, QWenTokenizer)
    assert type(AutoConfig.from_pretrained(tmp_path, trust_remote_code=trust)) is QWenConfig
    assert type(AutoModel.from_pretrained(tmp_path, trust_remote_code=trust)) is QWenModel
    assert model.dtype == torch.bfloat16
    state = model.state_dict()
    assert state.keys() == tensors.keys() and all(torch.equal(state[name], tensors[name]) for name in tensors)
    assert model.generation_config.eos_token_id == [151645, 151643, 151644]
    assert tokenizer.encode("<|im_end|>") == [151645]


def test_config_names_of_august_2023(tmp_path: Path) -> None:
    tensors = write_official(tmp_path, "bin", CONFIG_OF_AUGUST)
    with pytest.warns(UserWarning, match="flash_attn is not installed here, using PyTorch's SDPA"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model.state_dict()["lm_head.weight"], tensors["lm_head.weight"])
    assert (model.config.seq_length, model.config.max_position_embeddings) == (2048, 6144)


@pytest.mark.parametrize(
    ("keyword", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_published_keywords(keyword: str, dtype: torch.dtype, tmp_path: Path) -> None:
    write_official(tmp_path)
    arguments = {"device_map": "auto", "trust_remote_code": True, keyword: True, "use_flash_attn": False}
    for loader in (AutoModelForCausalLM, QWenLMHeadModel):
        model = loader.from_pretrained(tmp_path, **arguments).eval()
        assert model.dtype == dtype and model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path / "saved")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("library", ["transformers", "modelscope"])
def test_readme_snippets_of_the_original(library: str, tmp_path: Path) -> None:
    """Loading, three turns and a completion, as the publisher's README shows them, after `import qwen`."""
    write_official(tmp_path)
    assert qwen.__doc__
    auto = importlib.import_module(library)
    path, options = str(tmp_path), {"trust_remote_code": True}
    tokenizer = auto.AutoTokenizer.from_pretrained(path, **options)
    model = auto.AutoModelForCausalLM.from_pretrained(path, device_map="auto", fp32=True, **options).eval()
    model.generation_config = auto.GenerationConfig.from_pretrained(path, **options)
    assert (type(model), type(tokenizer)) == (QWenLMHeadModel, QWenTokenizer)
    model.generation_config.max_new_tokens = 4
    response, history = model.chat(tokenizer, "你好", history=None)
    response, history = model.chat(tokenizer, "给我讲一个故事。", history=history)
    response, history = model.chat(tokenizer, "给这个故事起一个标题", history=history)
    assert [turn[0] for turn in history] == ["你好", "给我讲一个故事。", "给这个故事起一个标题"]
    assert history[-1][1] == response

    inputs = tokenizer("蒙古国的首都是乌兰巴托", return_tensors="pt").to(model.device)
    pred = model.generate(**inputs)
    assert tokenizer.decode(pred.cpu()[0], skip_special_tokens=True).startswith("蒙古国的首都是乌兰巴托")


@pytest.mark.parametrize("in_config_file", [False, True])
def test_published_int8_cache_keyword(in_config_file: bool, tmp_path: Path) -> None:
    known = {"use_cache_quantization": False, "use_cache_kernel": False} if in_config_file else {}
    write_official(tmp_path, config=OFFICIAL_CONFIG | known)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, use_cache_quantization=True, use_cache_kernel=True, use_flash_attn=False, fp32=True
    )
    ids = torch.arange(100, 160)[None]
    out = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert type(out.past_key_values).__name__ == "QuantizedCache" and out.sequences.shape == (1, 63)


def test_saved_directory_reloads_and_serves_other_engines(tmp_path: Path) -> None:
    official, saved = tmp_path / "official", tmp_path / "saved"
    write_official(official)
    model = AutoModelForCausalLM.from_pretrained(official, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(official)
    model.generation_config = GenerationConfig.from_pretrained(official)
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    settings = [json.loads((saved / name).read_text()) for name in ("config.json", "tokenizer_config.json")]
    assert not any("auto_map" in setting for setting in settings)
    assert json.loads((saved / "generation_config.json").read_text())["eos_token_id"] == [151645, 151643, 151644]
    assert not list(saved.glob("*.py"))
    again, again_tokenizer = load_model_and_tokenizer(saved, device="cpu", dtype="fp32")
    ids = torch.arange(100)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    messages = [{"role": "user", "content": "hi"}]
    assert "<|im_start|>user\nhi<|im_end|>" in again_tokenizer.apply_chat_template(messages, tokenize=False)
    # Another engine knows nothing of QWenTokenizer, but it renders the template that lies in the directory.
    from jinja2 import Template

    template = Template((saved / "chat_template.jinja").read_text())
    rendered = template.render(messages=messages, add_generation_prompt=True)
    expected = again_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == expected and rendered.endswith("<|im_start|>assistant\n")


IN_PLAIN_TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
path = sys.argv[1]
scorer = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, trust_remote_code=True)
assert scorer.score.weight.shape[0] == 1
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
assert "qwen" not in sys.modules
assert type(model).__module__.startswith("transformers_modules.")
print(model.chat(tokenizer, "hi", None, max_new_tokens=8, temperature=0)[0].encode().hex())
"""


def test_pushed_code_runs_without_this_project(tokenizer: QWenTokenizer, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    model = small_model().float()
    model.generation_config.eos_token_id = [151645, 151643, 151644]
    model.save_pretrained(directory, push_code=True)
    tokenizer.save_pretrained(directory, push_code=True)
    assert json.loads((directory / "config.json").read_text())["eos_token_id"] == 151645  # for llama.cpp's converter
    (tmp_path / "run.py").write_text(IN_PLAIN_TRANSFORMERS)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "run.py", str(directory)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    expected = model.chat(tokenizer, "hi", None, max_new_tokens=8, temperature=0)[0]
    assert bytes.fromhex(run.stdout.strip()).decode() == expected
    for name in ("modeling_qwen.py", "tokenization_qwen.py"):  # and here, the copies are never run
        (directory / name).write_text("raise SystemExit('remote code was run')\n")
    assert type(AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)) is QWenLMHeadModel
    assert type(AutoTokenizer.from_pretrained(directory, trust_remote_code=True)) is QWenTokenizer


# ---- broken directories ----


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: -min(1000, path.stat().st_size // 2)])


def lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 2560000000\n")


def without_tensor(path: Path) -> None:
    tensors = load_file(path)
    name = next(name for name in tensors if "inv_freq" not in name)
    save_file({k: v for k, v in tensors.items() if k != name}, path, metadata={"format": "pt"})


def changed(**values: object) -> Callable[[Path], int]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


def html_page(path: Path) -> None:
    path.write_text("<!doctype html><title>404</title>")


SHARD = "model-00001-of-00002.safetensors"
BIN = "pytorch_model-00002-of-00002.bin"


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("config.json", Path.unlink, "config.json is missing: is .* a checkpoint directory"),
        ("config.json", truncate, "config.json is not valid JSON"),
        (
            "config.json",
            lambda p: p.write_text('{"model_type": "qwen2"}'),
            "says model_type 'qwen2', a later generation",
        ),
        ("config.json", lambda p: p.write_text("[]"), "config.json holds no JSON object"),
        ("config.json", changed(rotary_pct=0.25), "config.json has a value that can't be used: rotary_pct is 0.25"),
        ("config.json", changed(hidden_size="wide"), "config.json has a value that can't be used: .*hidden_size"),
        ("generation_config.json", truncate, "generation_config.json is not valid JSON"),
        ("tokenizer_config.json", truncate, "tokenizer_config.json is not valid JSON"),
        ("qwen.tiktoken", Path.unlink, "qwen.tiktoken is missing: .*`git lfs install && git lfs pull`"),
        ("qwen.tiktoken", lfs_pointer, "qwen.tiktoken is only a git-lfs pointer.*git lfs pull"),
        (
            "model.safetensors.index.json",
            Path.unlink,
            "no model.safetensors.index.json that lists them: download it again",
        ),
        ("model.safetensors.index.json", truncate, "index.json is not valid JSON"),
        (SHARD, Path.unlink, f"{SHARD} is missing, though the checkpoint's index names it"),
        (SHARD, truncate, f"{SHARD} is damaged: [0-9,]+ bytes of [0-9,]+"),
        (SHARD, lfs_pointer, f"{SHARD} is only a git-lfs pointer"),
        (SHARD, html_page, f"{SHARD} has no safetensors header"),
        (SHARD, lambda p: p.write_bytes(p.read_bytes()[:300]), f"{SHARD} breaks off within its header"),
        (SHARD, lambda p: p.write_bytes(b""), f"{SHARD} has no safetensors header"),
        (SHARD, without_tensor, "lacks 1 of the model's tensors"),
        (BIN, truncate, f"{BIN} is damaged"),
        (BIN, html_page, f"{BIN} is damaged"),
        (BIN, Path.unlink, f"{BIN} is missing"),
    ],
)
def test_broken_directory_is_one_sentence(file: str, damage: Callable, message: str, tmp_path: Path) -> None:
    write_official(tmp_path, "bin" if file == BIN else "safetensors")
    damage(tmp_path / file)
    with pytest.raises(QwenError, match=message) as caught:
        load_model_and_tokenizer(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


def test_shapes_of_another_size(tmp_path: Path) -> None:
    write_official(tmp_path, config=OFFICIAL_CONFIG | {"hidden_size": 64, "num_attention_heads": 4})
    with pytest.raises(QwenError, match=r"lm_head.weight is \(151936, 32\), and .* should be \(151936, 64\)"):
        load_model_and_tokenizer(tmp_path, device="cpu")


def test_the_classes_check_too(tmp_path: Path) -> None:
    write_official(tmp_path)
    truncate(tmp_path / SHARD)
    (tmp_path / "qwen.tiktoken").unlink()
    with pytest.raises(QwenError, match="is damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    for trust in (None, False, True):
        with pytest.raises(QwenError, match="qwen.tiktoken is missing: .*`git lfs install && git lfs pull`"):
            AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=trust)
