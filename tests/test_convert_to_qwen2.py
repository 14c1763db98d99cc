"""Qwen2's layout against transformers' own Qwen2, tiktoken and llama.cpp, and back against the files it came from."""

import base64
import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM
from transformers.tokenization_utils_tokenizers import TokenizersBackend

import convert_to_qwen2
import golden
from profiling.peers import LLAMA_WORKER
from qwen import QwenError, QWenLMHeadModel, QWenTokenizer
from qwen.checkpoint import list_weight_files
from qwen.fast_tokenizer import fast_tokenizer
from utils import load_model_and_tokenizer

ROOT = Path(__file__).parent.parent
PEER = os.environ.get("LLAMA_CPP_PYTHON", sys.executable)  # an interpreter with llama-cpp-python
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def run(*argv: object) -> None:
    convert_to_qwen2.main([str(arg) for arg in argv])


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in list_weight_files(directory) for name, tensor in load_file(file).items()}


def assert_same_tensors(one: Path, other: Path) -> None:
    expected, found = tensors(one), tensors(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype and torch.equal(tensor, found[name]), name


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model in a directory: float32, trained on 64 tokens."""
    return golden.checkpoint(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def converted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` in Qwen2's layout, in several files."""
    directory = tmp_path_factory.mktemp("converted") / "tiny-qwen2"
    run("-c", tiny, "-o", directory, "--max-shard-size", 0.0005)
    return directory


@pytest.fixture(scope="module")
def demo_qwen2(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "demo-qwen2"
    run("-c", demo_checkpoint, "-o", directory)
    return directory


# ---- the model ----


@torch.no_grad()
def test_logits_are_the_same_in_float32(converted: Path) -> None:
    twin = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).eval()
    assert isinstance(twin, Qwen2ForCausalLM)
    twin = copy.deepcopy(twin)  # weights mapped from a file are not aligned, and are then summed in another order
    model = golden.model()
    for length in (1, 10, 64):
        assert (twin(golden.ids(length)).logits - model(golden.ids(length)).logits).abs().max() == 0.0
    assert (twin(golden.ids(65)).logits - model(golden.ids(65)).logits).abs().max() > 1e-3  # NTK begins
    assert twin.config.max_position_embeddings == 64  # so engines go no further


def test_several_files_with_an_index(converted: Path) -> None:
    index = json.loads((converted / "model.safetensors.index.json").read_text())
    files = {path.name for path in converted.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files and len(files) > 2
    sizes = [sum(tensor.nbytes for tensor in load_file(converted / file).values()) for file in files]
    assert index["metadata"]["total_size"] == sum(sizes)
    largest = max(tensor.nbytes for tensor in tensors(converted).values())
    assert max(sizes) <= max(500_000, largest)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_there_and_back_is_the_same_checkpoint(tiny: Path, converted: Path, tmp_path: Path, suffix: str) -> None:
    if suffix == "bin":  # as early releases
        source = tmp_path / "old"
        shutil.copytree(tiny, source, ignore=shutil.ignore_patterns("*.safetensors"))
        torch.save(tensors(tiny), source / "pytorch_model.bin")
        run("-c", source, "-o", tmp_path / "converted")
        assert_same_tensors(converted, tmp_path / "converted")
        converted = tmp_path / "converted"
    run("--back", "-c", converted, "-o", tmp_path / "back")
    assert_same_tensors(tiny, tmp_path / "back")
    assert (tmp_path / "back" / "qwen.tiktoken").read_bytes() == (tiny / "qwen.tiktoken").read_bytes()
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((tiny / name).read_text())
    model, _ = load_model_and_tokenizer(tmp_path / "back", device="cpu", dtype="fp32")
    assert golden.difference(model.transformer(golden.ids(200)).last_hidden_state[0],
                             "full_ntk1_logn1_L200_hidden") < golden.TOLERANCE  # fmt: skip


def test_back_from_what_another_program_has_saved(converted: Path, tmp_path: Path) -> None:
    """Fine-tuned elsewhere: our own notes are lost, the vocabulary is in tokenizer.json only."""
    AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).save_pretrained(tmp_path / "elsewhere")
    AutoTokenizer.from_pretrained(converted).save_pretrained(tmp_path / "elsewhere")
    run("--back", "-c", tmp_path / "elsewhere", "-o", tmp_path / "back")
    model, tokenizer = load_model_and_tokenizer(tmp_path / "back", device="cpu", dtype="fp32")
    assert torch.equal(model(golden.ids(64)).logits, golden.model()(golden.ids(64)).logits)
    assert tokenizer.encode("hello <|im_end|>")[-1] == tokenizer.im_end_id


# ---- Int4 ----


def dequantize(state: dict[str, torch.Tensor], name: str, bits: int, group: int) -> np.ndarray:
    """(out, in) of a layer's GPTQ tensors, in plain numpy."""
    words = state[f"{name}.qweight"].numpy().astype(np.int64)  # (in * bits / 32, out)
    numbers = np.stack([words >> bits * i & 2**bits - 1 for i in range(32 // bits)], 1).reshape(-1, words.shape[1])
    scales = state[f"{name}.scales"].float().numpy().repeat(group, 0)
    return ((numbers - 2 ** (bits - 1)) * scales).T.astype(np.float32)


@pytest.mark.parametrize("zero_biases", [False, True])  # official checkpoints store them, newer GPTQModel doesn't
@torch.no_grad()
def test_int4_is_cut_exactly(tiny: Path, tmp_path: Path, zero_biases: bool) -> None:
    source = tmp_path / "int4"
    shutil.copytree(golden.DATA / "gptq", source)
    shutil.copy(tiny / "qwen.tiktoken", source)
    shutil.copy(tiny / "tokenizer_config.json", source)
    if zero_biases:
        state = load_file(source / "model.safetensors")
        for name, scales in list(state.items()):
            if name.endswith("scales") and "c_attn" not in name:
                state[name.replace("scales", "bias")] = torch.zeros(scales.shape[1], dtype=torch.float16)
        save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    made = tmp_path / "int4-qwen2"
    run("-c", source, "-o", made)
    config = json.loads((made / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert quantization["quant_method"] == "gptq"
    bits, group = quantization["bits"], quantization["group_size"]

    state, dense = tensors(made), {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        if kind == "qweight":
            dense[f"{layer}.weight"] = torch.tensor(dequantize(state, layer, bits, group))
        elif kind not in ("qzeros", "scales", "g_idx"):
            dense[name] = tensor.float()
    for part in "qkv":  # zero points are packed words: cut as the numbers are
        layer = f"model.layers.0.self_attn.{part}_proj"
        assert state[f"{layer}.qzeros"].shape[1] * 32 // bits == state[f"{layer}.qweight"].shape[1]
    twin = Qwen2ForCausalLM(Qwen2ForCausalLM.config_class(**config)).eval()
    twin.load_state_dict(dense, strict=True)
    model = QWenLMHeadModel.from_pretrained(source, dtype=torch.float32)  # so many rows run in float32
    ids = torch.arange(32)[None]
    assert (twin(ids).logits - model(ids).logits).abs().max() < 1e-4 * model(ids).logits.abs().max()

    run("--back", "-c", made, "-o", tmp_path / "back")
    assert_same_tensors(source, tmp_path / "back")


# ---- the tokenizer ----


@pytest.fixture(scope="module")
def fast(tokenizer: QWenTokenizer) -> TokenizersBackend:
    return TokenizersBackend(tokenizer_object=fast_tokenizer(tokenizer))


def test_fast_tokenizer_on_the_published_cases(fast: TokenizersBackend) -> None:
    for case in json.loads((golden.DATA / "tokenizer.json").read_text())["encode"]:
        assert fast.encode(case["text"]) == case["ids"]


def test_fast_tokenizer_on_the_texts_of_this_project(tokenizer: QWenTokenizer, fast: TokenizersBackend) -> None:
    for path in [*ROOT.glob("*.md"), *ROOT.glob("qwen/*"), *ROOT.glob("tests/data/*.json")]:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert fast.encode(text) == tokenizer.encode(text), path


@given(st.text(max_size=40) | st.text(alphabet=" \n\r\t'sre1２é中文。, .!?<|im_end|>\u3000", max_size=60))
@settings(max_examples=250, deadline=None)
def test_fast_tokenizer_on_any_text(tokenizer: QWenTokenizer, fast: TokenizersBackend, text: str) -> None:
    if "\u0338" in unicodedata.normalize("NFD", text):
        return  # tokenizers normalises what follows a control token apart from it
    assert fast.encode(text) == tokenizer.encode(text)
    assert fast.decode(fast.encode(text)) == unicodedata.normalize("NFC", text)


def test_every_token_is_itself(tokenizer: QWenTokenizer, fast: TokenizersBackend) -> None:
    """Each entry of the vocabulary that is text and one word of the pattern comes back as its own id."""
    checked = 0
    for token, rank in list(tokenizer.mergeable_ranks.items())[::7]:
        try:
            text = token.decode()
        except UnicodeDecodeError:
            continue
        if tokenizer.encode_text(text) == [rank]:
            checked += 1
            assert fast.encode(text) == [rank]
    assert checked > 15_000


def test_extra_vocabulary_keeps_its_ids(tiny: Path, tmp_path: Path) -> None:
    """Its ids lie beyond the control tokens, where tokenizers would put those."""
    first = len(QWenTokenizer(tiny / "qwen.tiktoken"))
    extra = tmp_path / "extra.tiktoken"
    lines = [(b"qz", first), (b"qzj", first + 1)]
    extra.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in lines))
    tokenizer = QWenTokenizer(tiny / "qwen.tiktoken", extra_vocab_file=str(extra))
    fast = TokenizersBackend(tokenizer_object=fast_tokenizer(tokenizer))
    assert tokenizer.encode("qzj") == [first + 1]
    for text in ("a qzb", "<|im_start|>user\nqzj<|im_end|>", "<|extra_204|>qzj"):
        assert fast.encode(text) == tokenizer.encode(text)


def test_chat_template_and_stop_ids(demo_checkpoint: Path, demo_qwen2: Path) -> None:
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (demo_checkpoint, demo_qwen2))
    assert not isinstance(theirs, QWenTokenizer) and theirs.is_fast
    ids = [tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"] for tokenizer in
           (ours, theirs)]  # fmt: skip
    assert ids[0] == ids[1]
    for path in (*ROOT.glob("*.md"), *ROOT.glob("qwen/*.py")):
        assert ours.encode(path.read_text()) == theirs.encode(path.read_text()), path  # ten tokens have no merges
    generation = json.loads((demo_qwen2 / "generation_config.json").read_text())
    stops = theirs.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
    assert generation["eos_token_id"] == stops
    assert "stop_words_ids" not in generation and "chat_format" not in generation
    assert (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_official_chat_checkpoint_gets_all_stop_ids(tiny: Path, tmp_path: Path) -> None:
    """Its own generation_config.json names <|endoftext|> alone, and its tokenizer has no template."""
    source = tmp_path / "chat"
    shutil.copytree(tiny, source)
    official = {"chat_format": "chatml", "eos_token_id": 151643, "pad_token_id": 151643, "max_window_size": 24000}
    (source / "generation_config.json").write_text(json.dumps(official))
    run("-c", source, "-o", tmp_path / "chat-qwen2")
    generation = json.loads((tmp_path / "chat-qwen2" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [151645, 151643, 151644]
    assert "chat_template" in json.loads((tmp_path / "chat-qwen2" / "tokenizer_config.json").read_text())


# ---- mistakes ----


def spoil(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-o", "{tmp}/out", "--max-shard-size", "0"], "--max-shard-size 0.0: give a size in GB"),
        (["-o", "{tiny}"], "exists and is not empty"),
        (["-o", "{tiny}/config.json/out"], "can't be written"),
        (["-o", "{tmp}/out", "--back"], "model_type 'qwen': --back takes a checkpoint in Qwen2's layout"),
    ],
)
def test_impossible_flags(tiny: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(QwenError, match=message):
        run("-c", tiny, *(flag.format(tmp=tmp_path, tiny=tiny) for flag in flags))
    assert not list(tmp_path.iterdir())


def test_models_that_are_not_the_same(tiny: Path, converted: Path, tmp_path: Path) -> None:
    def attempt(source: Path, message: str, *flags: str) -> None:
        with pytest.raises(QwenError, match=message):
            run("-c", source, "-o", tmp_path / "out", *flags)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*.partial"))

    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    shutil.copytree(tiny, ours)
    shutil.copytree(converted, theirs)
    attempt(theirs, "a later generation")
    spoil(ours, no_bias=False)
    attempt(ours, "biases that Qwen2 does not know")
    spoil(ours, no_bias=True, scale_attn_weights=False)
    attempt(ours, "unscaled")
    spoil(theirs, num_key_value_heads=1)
    attempt(theirs, "no grouped heads", "--back")
    spoil(ours, scale_attn_weights=True)
    [file] = list_weight_files(ours)
    state = load_file(file)
    save_file({**state, "transformer.h.0.mlp.w1.bias": torch.ones(8)}, file)
    attempt(ours, "mlp.w1.bias is not zero")
    save_file({**state, "transformer.h.0.visual": torch.ones(8)}, file)
    attempt(ours, "transformer.h.0.visual is no tensor of Qwen-7B")
    file.write_bytes(file.read_bytes()[:-100])
    attempt(ours, "is damaged")


def test_mistake_is_one_sentence_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, ROOT / "convert_to_qwen2.py", "-c", tmp_path, "-o", tmp_path / "out"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("convert_to_qwen2.py: error: ") and "merge_lora.py" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# ---- other engines ----


@torch.no_grad()
def test_demo_greedy_tokens_are_those_of_transformers(demo_checkpoint: Path, demo_qwen2: Path) -> None:
    model, tokenizer = load_model_and_tokenizer(demo_checkpoint, device="cpu", dtype="fp32")
    twin = AutoModelForCausalLM.from_pretrained(demo_qwen2, dtype=torch.float32).eval()
    encoded = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")
    options = {"max_new_tokens": 24, "do_sample": False, "repetition_penalty": 1.0}
    assert torch.equal(model.generate(**encoded, **options), twin.generate(**encoded, **options))


@contextmanager
def transformers_serve(directory: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", str(directory), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


@pytest.mark.slow
def test_transformers_serve_answers(demo_qwen2: Path) -> None:
    from openai import APIConnectionError, OpenAI

    with transformers_serve(demo_qwen2) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none", timeout=120, max_retries=0)
        for _ in range(240):
            try:
                if httpx.get(f"{address}/health", timeout=1).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        try:
            reply = client.chat.completions.create(
                model=str(demo_qwen2), messages=QUESTION, temperature=0, max_tokens=40
            )
        except APIConnectionError as error:
            pytest.fail(f"transformers serve is not there: {error}")
    assert "Paris" in reply.choices[0].message.content
    assert "<|im_end|>" not in reply.choices[0].message.content


def write_gguf(directory: Path, path: Path) -> None:
    """The converted checkpoint as GGUF, tensors named by llama.cpp's own table for Qwen2."""
    import gguf

    config = json.loads((directory / "config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, tensor in tensors(directory).items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_llama_cpp_says_the_same(demo_checkpoint: Path, demo_qwen2: Path, tmp_path: Path) -> None:
    if subprocess.run([PEER, "-c", "import llama_cpp"], capture_output=True, check=False).returncode:
        pytest.skip("LLAMA_CPP_PYTHON names no interpreter with llama-cpp-python")
    write_gguf(demo_qwen2, tmp_path / "demo.gguf")
    model, tokenizer = load_model_and_tokenizer(demo_checkpoint, device="cpu", dtype="fp32")
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    job = {
        "model": str(tmp_path / "demo.gguf"), "prompt": ids[0].tolist(), "after_prompt": 32, "context": 16,
        "lengths": [1], "threads": 1, "kv": "fp32", "on_gpu": False,
    }  # fmt: skip
    done = subprocess.run([PEER, LLAMA_WORKER, json.dumps(job)], capture_output=True, text=True, check=True)
    expected = model.generate(ids, max_new_tokens=32, do_sample=False, repetition_penalty=1.0, eos_token_id=-1)
    assert json.loads(done.stdout.splitlines()[-1])["tokens"] == expected[0, ids.shape[1] :].tolist()
