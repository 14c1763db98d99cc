"""Checkpoint directories of Qwen-7B's real sizes with random weights: speed and memory without a 15 GB download.

Values come from one random block that all tensors share at different offsets: speed does not depend on them. The
vocabulary is made up too (byte strings in counting order), so such a model measures and says nothing.
"""

import base64
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from qwen import QWenConfig
from qwen.errors import QwenError
from qwen.tokenization_qwen import VOCAB_FILE

REGULAR_TOKENS = 151_643  # of the published vocabulary
GROUP = 128
STD = 0.02  # of the weights, as at initialisation
SLACK = 200_000_000  # bytes for vocabulary, headers and the file system
SUFFIXES = {0: "", 4: "-Int4", 8: "-Int8"}  # as in the published names

GPTQ_SETTINGS = {
    "quant_method": "gptq", "group_size": GROUP, "sym": True, "desc_act": False, "static_groups": False,
    "true_sequential": True, "damp_percent": 0.01, "model_name_or_path": None, "model_file_base_name": "model",
}  # fmt: skip


def ensure_random_checkpoint(folder: Path, layers: int, bits: int = 0, **sizes: int) -> Path:
    """The directory in `folder` with `layers` blocks of Qwen-7B, written if it is not there.

    Args:
        bits: 4 or 8 for the official GPTQ layout, 0 for bf16.
        sizes: fields of QWenConfig that differ from Qwen-7B's.

    Raises:
        QwenError: the disk has no room for it.
    """
    config = QWenConfig(num_hidden_layers=layers, seq_length=8192, **sizes)
    special = "".join(f"-{name}{value}" for name, value in sorted(sizes.items()))
    directory = folder / f"random-7b-{layers}-layers{special}{SUFFIXES[bits]}"
    if directory.is_dir():
        return directory
    size = checkpoint_bytes(config, bits)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size + SLACK:
        raise QwenError(
            f"{directory} takes {size / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free: "
            "free some space, give another place with --work-dir, or ask for fewer layers"
        )
    print(f"Writing {size / 1e9:.1f} GB of random weights to {directory} ({free / 1e9:.0f} GB free).", file=sys.stderr)
    workshop = Path(tempfile.mkdtemp(prefix=".building-", dir=folder))
    try:
        write_checkpoint(workshop, config, bits)
        workshop.chmod(0o755)
        os.replace(workshop, directory)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    return directory


def checkpoint_bytes(config: QWenConfig, bits: int) -> int:
    """Bytes of all tensors."""
    shapes = (shape for shard in plan_shards(config, bits) for shape in shard.values())
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes)


Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def plan_shards(config: QWenConfig, bits: int) -> Iterator[Shapes]:
    """Names, shapes and types of the tensors, shard by shard: the embedding, each block, the head."""
    dtype = torch.float16 if bits else torch.bfloat16
    hidden, table = config.hidden_size, (config.vocab_size, config.hidden_size)
    yield {"transformer.wte.weight": (table, dtype)}
    width, heads = config.intermediate_size // 2, config.num_attention_heads * config.kv_channels
    linears = {
        "attn.c_attn": (3 * heads, hidden), "attn.c_proj": (hidden, heads), "mlp.w1": (width, hidden),
        "mlp.w2": (width, hidden), "mlp.c_proj": (hidden, width),
    }  # fmt: skip
    for layer in range(config.num_hidden_layers):
        prefix = f"transformer.h.{layer}."
        shard: Shapes = {f"{prefix}{norm}.weight": ((hidden,), dtype) for norm in ("ln_1", "ln_2")}
        for name, (rows, columns) in linears.items():
            shard |= linear_tensors(prefix + name, rows, columns, bits)
        yield shard
    yield {"transformer.ln_f.weight": ((hidden,), dtype), "lm_head.weight": (table, dtype)}


def linear_tensors(name: str, rows: int, columns: int, bits: int) -> Shapes:
    """One linear layer's tensors, as the published files have them."""
    if not bits:
        bias = {f"{name}.bias": ((rows,), torch.bfloat16)} if name.endswith("c_attn") else {}
        return {f"{name}.weight": ((rows, columns), torch.bfloat16), **bias}
    numbers = 32 // bits
    return {
        f"{name}.qweight": ((columns // numbers, rows), torch.int32),
        f"{name}.qzeros": ((columns // GROUP, rows // numbers), torch.int32),
        f"{name}.scales": ((columns // GROUP, rows), torch.float16),
        f"{name}.g_idx": ((columns,), torch.int32),
        f"{name}.bias": ((rows,), torch.float16),
    }


def write_checkpoint(directory: Path, config: QWenConfig, bits: int) -> None:
    """Write shards, index, settings and vocabulary into an empty directory."""
    generator = torch.Generator().manual_seed(0)
    normal = (torch.randn(2**22, generator=generator) * STD).to(torch.bfloat16)
    words = torch.randint(-(2**31), 2**31, (2**21,), generator=generator, dtype=torch.int64).to(torch.int32)
    shards = list(plan_shards(config, bits))
    index: dict[str, str] = {}
    for number, shard in enumerate(tqdm(shards, desc="Writing random weights", unit="shard"), start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: make_tensor(name, *form, bits, normal, words) for name, form in shard.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    write_json(directory / "model.safetensors.index.json", {
        "metadata": {"total_size": checkpoint_bytes(config, bits)}, "weight_map": index,
    })  # fmt: skip
    settings = {**config.to_diff_dict(), "architectures": ["QWenLMHeadModel"], "tokenizer_class": "QWenTokenizer"}
    settings |= {"model_type": "qwen", "dtype": "float16" if bits else "bfloat16", "seq_length": config.seq_length}
    if bits:
        settings["quantization_config"] = {**GPTQ_SETTINGS, "bits": bits}
    write_json(directory / "config.json", settings)
    write_json(directory / "generation_config.json", {"chat_format": "raw", "eos_token_id": REGULAR_TOKENS})
    write_json(directory / "tokenizer_config.json", {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer"})
    (directory / VOCAB_FILE).write_bytes(b"".join(vocabulary_lines()))


def make_tensor(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, bits: int, normal: Tensor, words: Tensor
) -> Tensor:
    """A tensor by the last part of its name; random ones take the block from an offset of their own."""
    if "ln_" in name:
        return torch.ones(shape, dtype=dtype)
    if name.endswith(".qzeros"):  # the middle less one in every field: 0x77777777 or 0x7f7f7f7f
        return torch.full(shape, 0x77777777 if bits == 4 else 0x7F7F7F7F, dtype=dtype)
    if name.endswith(".scales"):
        spread = 2**bits / 12**0.5  # standard deviation of numbers that are all equally likely
        return torch.full(shape, STD / spread, dtype=dtype)
    if name.endswith(".g_idx"):
        return torch.arange(shape[0], dtype=dtype) // GROUP
    if bits and name.endswith(".bias") and "c_attn" not in name:  # in the file, though the model has none
        return torch.zeros(shape, dtype=dtype)
    block = words if dtype == torch.int32 else normal.to(dtype)
    block = block.roll(sum(name.encode()) * 977)
    size = torch.Size(shape).numel()
    return block.repeat(-(-size // len(block)))[:size].view(shape).clone()


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def vocabulary_lines() -> Iterator[bytes]:
    """A tiktoken file of as many tokens as the published one: all bytes, then three-byte strings."""
    for rank in range(REGULAR_TOKENS):
        token = bytes([rank]) if rank < 256 else (rank - 256).to_bytes(3, "big")
        yield b"%s %d\n" % (base64.b64encode(token), rank)
