"""GGUF files: read back by the package gguf, and run by a real llama-server (slow; LLAMA_SERVER names the program)."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import httpx
import numpy as np
import pytest
import torch
from test_chat_template import CONVERSATIONS, EVIL, WEATHER, render

import convert_to_qwen2
import export_gguf
import golden
from export_gguf import open_checkpoint, write_gguf
from qwen import QWenConfig, QwenError, QWenLMHeadModel, QWenTokenizer
from qwen.chat_template import chat_template
from qwen.chatml import build_prompt, encode_messages
from qwen.int4 import Int4Linear
from qwen.tools import read_tool, render_messages
from utils import load_model_and_tokenizer

PROGRAM = os.environ.get("LLAMA_SERVER")


def export(*argv: object) -> None:
    export_gguf.main([str(arg) for arg in argv])


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def weights(path: Path) -> dict[str, np.ndarray]:
    return {
        t.name: gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in gguf.GGUFReader(path).tensors
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model as a chat model whose context is 64 tokens."""
    directory = golden.checkpoint(tmp_path_factory.mktemp("gguf") / "tiny")
    generation = {"chat_format": "chatml", "eos_token_id": 151643, "pad_token_id": 151643, "top_p": 0.5, "top_k": 0,
                  "do_sample": True, "repetition_penalty": 1.1}  # fmt: skip
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def test_settings_that_a_server_reads(tiny: Path, tmp_path: Path) -> None:
    export("-c", tiny, "-o", tmp_path / "tiny.gguf", "--type", "f32")
    found, tokenizer = fields(tmp_path / "tiny.gguf"), QWenTokenizer.from_pretrained(tiny)
    assert found["tokenizer.ggml.eos_token_id"] == found["tokenizer.ggml.eot_token_id"] == tokenizer.im_end_id
    assert found["tokenizer.ggml.eom_token_id"] == tokenizer.im_start_id
    assert found["tokenizer.chat_template"] == chat_template(tokenizer.default_system)
    assert found["qwen.context_length"] == 64 and found["qwen.rope.freq_base"] == 10000.0
    sampling = {name.split(".")[-1]: value for name, value in found.items() if name.startswith("general.sampling.")}
    assert sampling == {"temp": 1.0, "top_k": 0, "top_p": 0.5, "min_p": 0.0, "penalty_last_n": -1,
                        "penalty_repeat": pytest.approx(1.1)}  # fmt: skip
    description = (tmp_path / "tiny.Modelfile").read_text()
    assert description.startswith("FROM ./tiny.gguf\n") and tokenizer.default_system in description
    assert 'PARAMETER stop "<|im_end|>"\n' in description and "PARAMETER repeat_penalty 1.1\n" in description
    assert "PARAMETER num_ctx 64\n" in description


def test_a_base_model_ends_at_the_end_of_text(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "base"
    shutil.copytree(tiny, source)
    (source / "generation_config.json").write_text('{"chat_format": "raw"}')
    export("-c", source, "-o", tmp_path / "base.gguf")
    found = fields(tmp_path / "base.gguf")
    assert found["tokenizer.ggml.eos_token_id"] == QWenTokenizer.from_pretrained(source).eod_id
    assert "tokenizer.chat_template" not in found and not (tmp_path / "base.Modelfile").exists()


def test_either_layout_gives_the_same_file(tiny: Path, tmp_path: Path) -> None:
    convert_to_qwen2.main(["-c", str(tiny), "-o", str(tmp_path / "qwen2")])
    for name, source in (("one", tiny), ("two", tmp_path / "qwen2")):
        (tmp_path / name).mkdir()
        export("-c", source, "-o", tmp_path / name / "model.gguf", "--type", "f16")
    for file in ("model.gguf", "model.Modelfile"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_context_is_the_fixed_factor_of_dynamic_ntk(tiny: Path, tmp_path: Path) -> None:
    """As `generate` has it for prompts of that length; both exports agree."""
    export("-c", tiny, "-o", tmp_path / "long.gguf", "--context", 200)
    convert_to_qwen2.main(["-c", str(tiny), "-o", str(tmp_path / "qwen2"), "--context", "200"])
    settings = json.loads((tmp_path / "qwen2" / "config.json").read_text())
    size = QWenConfig.from_pretrained(tiny).kv_channels
    expected = 10000 * 7 ** (size / (size - 2))  # 200 tokens are more than 2 * 64: 2 ** 3 - 1
    assert settings["rope_theta"] == settings["rope_parameters"]["rope_theta"] == pytest.approx(expected)
    assert settings["max_position_embeddings"] == fields(tmp_path / "long.gguf")["qwen.context_length"] == 200
    assert fields(tmp_path / "long.gguf")["qwen.rope.freq_base"] == pytest.approx(expected)
    export("-c", tmp_path / "qwen2", "-o", tmp_path / "again.gguf")
    assert fields(tmp_path / "again.gguf")["qwen.rope.freq_base"] == pytest.approx(expected)


@torch.no_grad()
def test_a_stretched_model_reads_long_prompts_as_dynamic_ntk_does(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    convert_to_qwen2.main(["-c", str(tiny), "-o", str(tmp_path / "qwen2"), "--context", "200"])
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen2", dtype=torch.float32).eval()
    ours = golden.model(use_logn_attn=False)
    assert (twin(golden.ids(200)).logits - ours(golden.ids(200)).logits).abs().max() < golden.TOLERANCE


def random_layer(bits: int) -> Int4Linear:
    layer = Int4Linear(256, 64, bits, group_size=128, bias=False)
    generator = torch.Generator().manual_seed(bits)
    layer.qweight = torch.randint(-(2**31), 2**31 - 1, layer.qweight.shape, generator=generator, dtype=torch.int32)
    layer.scales = torch.rand(layer.scales.shape, generator=generator).half() / 100
    return layer


@pytest.mark.parametrize(("bits", "kind"), [(4, gguf.GGMLQuantizationType.Q4_0), (8, gguf.GGMLQuantizationType.Q8_0)])
def test_gptq_numbers_are_kept_as_they_are(bits: int, kind: gguf.GGMLQuantizationType) -> None:
    layer = random_layer(bits)
    found = gguf.dequantize(export_gguf.same_blocks(layer), kind)
    assert np.array_equal(found, layer.dequantize().numpy())


def test_a_gptq_checkpoint_becomes_q4_0(tmp_path: Path) -> None:
    source = tmp_path / "int4"
    shutil.copytree(golden.DATA / "gptq", source)
    QWenTokenizer(golden.DATA / "qwen.tiktoken").save_pretrained(source)
    model = QWenLMHeadModel.from_pretrained(source, dtype=torch.float32)
    checkpoint = open_checkpoint(source)
    for kind, tolerance in (("q4_0", 0.0), ("f32", 0.0), ("f16", 1e-3), ("q8_0", 1e-2)):
        found = weights(write_gguf(checkpoint, tmp_path / "model.gguf", kind))
        for name, layer in (
            ("attn_qkv", model.transformer.h[0].attn.c_attn),
            ("ffn_gate", model.transformer.h[0].mlp.w2),
        ):
            expected = layer.dequantize().numpy()
            assert np.abs(found[f"blk.0.{name}.weight"] - expected).max() <= tolerance * np.abs(expected).max(), kind
        assert np.array_equal(found["blk.0.attn_qkv.bias"], model.transformer.h[0].attn.c_attn.bias.numpy())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-o", "{tmp}/model.bin"], "a name that ends in .gguf"),
        (["-o", "{tmp}/no/model.gguf"], "there is no folder"),
        (["-o", "{tmp}/model.gguf", "--context", "10"], "--context 10: the model reads 64 tokens as it is"),
    ],
)
def test_mistakes(tiny: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(QwenError, match=message):
        export("-c", tiny, *(flag.format(tmp=tmp_path) for flag in flags))
    assert not list(tmp_path.iterdir())


# ---- a real llama-server ----


@pytest.fixture(scope="module")
def demo(demo_checkpoint: Path) -> tuple[QWenLMHeadModel, QWenTokenizer]:
    return load_model_and_tokenizer(demo_checkpoint, device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def server(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """llama-server with the demo model in float32, cache included."""
    if not PROGRAM:
        pytest.skip("LLAMA_SERVER names no llama-server")
    file = tmp_path_factory.mktemp("llama") / "demo.gguf"
    export("-c", demo_checkpoint, "-o", file, "--type", "f32")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [
        PROGRAM,
        "-m",
        str(file),
        "--jinja",
        "--skip-chat-parsing",
        "-c",
        "4096",
        "-np",
        "1",
        "--port",
        str(port),
    ]
    command += ["--cache-type-k", "f32", "--cache-type-v", "f32"]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client,
    ):
        for _ in range(240):
            try:
                if client.get("/health").status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        try:
            yield client
        finally:
            process.terminate()


def ask(server: httpx.Client, messages: list[dict], **settings: Any) -> dict[str, Any]:
    body = {"messages": messages, "temperature": 0, "max_tokens": 40, "cache_prompt": False, **settings}
    return server.post("/v1/chat/completions", json=body).raise_for_status().json()


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_llama_server_renders_as_we_do(server: httpx.Client, demo: tuple, name: str) -> None:
    messages, tools = CONVERSATIONS[name]
    if name == "parts" or any("type" not in tool for tool in tools):
        pytest.skip("llama-server joins parts with a newline itself, and takes no tools of other forms")
    if messages[-1].get("tool_calls"):
        pytest.skip("llama-server refuses to go on with a call")
    found = server.post("/apply-template", json={"messages": messages, **({"tools": tools} if tools else {})})
    expected = render(messages, tools, system=demo[1].default_system, add_generation_prompt=True)
    assert found.json()["prompt"] == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "query", ["What is the capital of France?", "List three colours.", "Say hello in German.", EVIL, "What is 2 + 2?"]
)
def test_llama_server_replies_as_we_do(server: httpx.Client, demo: tuple, query: str) -> None:
    model, tokenizer = demo
    found = ask(server, [{"role": "user", "content": query}])
    shown = query.replace("<|", "< |")
    reply, _ = model.chat(tokenizer, shown, temperature=0, repetition_penalty=1.0, max_new_tokens=40)
    assert found["choices"][0]["message"]["content"].strip() == reply
    assert found["usage"]["prompt_tokens"] == len(build_prompt(tokenizer, shown).ids)


@pytest.mark.slow
def test_llama_server_is_told_of_tools(server: httpx.Client, demo: tuple) -> None:
    messages = [{"role": "user", "content": "How warm is Rome?"}]
    found = ask(server, messages, tools=[WEATHER], max_tokens=4)
    expected = encode_messages(demo[1], render_messages(messages, [read_tool(WEATHER)]))
    assert found["usage"]["prompt_tokens"] == len(expected)


@pytest.mark.slow
def test_llama_server_tokenises_as_we_do(server: httpx.Client, demo: tuple) -> None:
    root = Path(__file__).parent.parent
    for path in (root / "README.md", root / "README_CN.md", root / "qwen" / "react.py"):
        text = path.read_text(encoding="utf-8")
        found = server.post("/tokenize", json={"content": text, "parse_special": True}).json()["tokens"]
        assert found == demo[1].encode(text), path
