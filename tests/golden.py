"""Rebuild the model and inputs of the golden outputs: every weight is a pure function of its name.

`data/model.npz` was written by the publisher's own model code for exactly these weights.
"""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from safetensors.torch import load_file, save_file

from qwen import QWenConfig, QWenLMHeadModel, QWenTokenizer

DATA = Path(__file__).parent / "data"
MODEL = json.loads((DATA / "model.json").read_text())
TOLERANCE = 1e-4


def outputs() -> NpzFile:
    return np.load(DATA / "model.npz")


def weight(name: str, shape: list[int]) -> torch.Tensor:
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("bias"):
        values = 0.1 * values
    elif "ln_" in name:
        values = 1 + 0.2 * np.tanh(values)
    else:
        values = 0.2 * values
    return torch.tensor(values, dtype=torch.float32)


def state_dict() -> dict[str, torch.Tensor]:
    return {name: weight(name, shape) for name, shape in MODEL["state_dict"].items()}


def model(attn: str = "sdpa", **changes: object) -> QWenLMHeadModel:
    config = QWenConfig(**{**MODEL["config"], **changes}, attn_implementation=attn)
    model = QWenLMHeadModel(config).eval()
    model.load_state_dict(state_dict())
    return model


def checkpoint(directory: Path, **changes: object) -> Path:
    """The model in a directory, with a vocabulary whose tokens it can all read."""
    model(**changes).save_pretrained(directory)
    QWenTokenizer(DATA / "qwen.tiktoken").save_pretrained(directory)
    ranks = (DATA / "qwen.tiktoken").read_bytes().splitlines(keepends=True)[:700]
    (directory / "qwen.tiktoken").write_bytes(b"".join(ranks))
    return directory


def int4_checkpoint(directory: Path) -> Path:
    """The quantised model in a directory, with a vocabulary, and with rows for all of its ids."""
    shutil.copytree(DATA / "gptq", directory, ignore=shutil.ignore_patterns("outputs.npz"))
    QWenTokenizer(DATA / "qwen.tiktoken").save_pretrained(directory)
    ranks = (DATA / "qwen.tiktoken").read_bytes().splitlines(keepends=True)[:256]
    (directory / "qwen.tiktoken").write_bytes(b"".join(ranks))
    tensors = load_file(directory / "model.safetensors")
    for name in ("transformer.wte.weight", "lm_head.weight"):
        tensors[name] = torch.nn.functional.pad(tensors[name], (0, 0, 0, 512 - len(tensors[name])))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 512}))
    return directory


def random_checkpoint(directory: Path, tokenizer: QWenTokenizer, seq_length: int) -> Path:
    """Random weights in a directory, with the real vocabulary."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 151936, "hidden_size": 32, "num_attention_heads": 2, "seq_length": seq_length}
    model = QWenLMHeadModel(QWenConfig(**{**MODEL["config"], **sizes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def ids(n: int, k: int = 0) -> torch.Tensor:
    return torch.tensor(np.random.RandomState(9000 + n + 31 * k).randint(0, 1000, (1, n)))


def difference(actual: torch.Tensor, name: str) -> float:
    """The largest absolute difference to an output of the publisher's code."""
    return (actual - torch.tensor(outputs()[name])).abs().max().item()


def left_pad(rows: list[torch.Tensor], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of (1, n) ids to a batch (B, T) and its attention mask."""
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=pad) for row in rows])
    mask = torch.cat([torch.arange(width)[None] >= width - row.shape[1] for row in rows]).long()
    return ids, mask


def hidden_by_steps(model: QWenLMHeadModel, prompt: int, steps: int) -> torch.Tensor:
    """The decoder's outputs (prompt + steps, C): a prefill of `prompt` tokens, then single tokens with its cache."""
    sequence = ids(prompt + steps, 1)
    out = model.transformer(sequence[:, :prompt], use_cache=True)
    hidden = [out.last_hidden_state]
    for i in range(prompt, prompt + steps):
        out = model.transformer(sequence[:, i : i + 1], past_key_values=out.past_key_values)
        hidden.append(out.last_hidden_state)
    return torch.cat(hidden, dim=1)[0]
