"""Directories damaged at random: what loads is the right model, and all else is one sentence."""

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import golden
from qwen import QwenError
from utils import load_model_and_tokenizer

JUNK = [None, True, 0, -1, 2, 1.5, float("nan"), 1e30, "", "x", "true", [], [1], ["x"], {}, {"a": 1}, [None]]
SETTINGS = {"chat_format": "chatml", "eos_token_id": 700, "pad_token_id": 700, "max_window_size": 500,
            "do_sample": True, "top_k": 1, "top_p": 0.8, "stop_words_ids": [[5, 6]]}  # fmt: skip
MORE = ["quantization_config", "rope_scaling", "torch_dtype", "output_attentions", "head_dim", "top_p", "local_attn",
        "pad_token", "extra_special_tokens", "added_tokens_decoder", "chat_template", "model_max_length", "errors",
        "eos_token_id", "stop_words_ids", "cache_implementation", "transformers_weights",
        "tie_word_embeddings"]  # fmt: skip
JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_channels", "intermediate_size")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = golden.checkpoint(tmp_path_factory.mktemp("damaged") / "whole", vocab_size=1000)
    (path / "generation_config.json").write_text(json.dumps(SETTINGS))
    return path


def logits(path: Path) -> torch.Tensor:
    """After a short chat, so that the settings are read as well."""
    model, tokenizer = load_model_and_tokenizer(path, device="cpu", dtype="fp32")
    assert isinstance(model.chat(tokenizer, "Hi", None, max_new_tokens=1, temperature=0)[0], str)
    return model(golden.ids(8)).logits


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ---- the kinds of damage: each says whether the same model is still in the directory ----


def other_number_type(path: Path, rng: random.Random) -> bool:
    """A number or switch of config.json under another JSON type that says the same."""
    settings = json.loads((path / "config.json").read_text())
    name = rng.choice(sorted(k for k, v in settings.items() if type(v) in (int, float, bool)))
    value = settings[name]
    same = [str(value).lower(), int(value) if value == int(value) else value, float(value)]
    edit(path / "config.json", lambda content: content.update({name: rng.choice(same[:2] if value is True else same)}))
    return True


def junk_value(path: Path, rng: random.Random) -> None:
    file = path / rng.choice(JSON_FILES)
    names = [*json.loads(file.read_text()), *MORE]
    names = [name for name in names if name not in ("rotary_emb_base", "layer_norm_epsilon")]  # other numbers are sound
    edit(file, lambda content: content.update({rng.choice(names): rng.choice(JUNK)}))


def lost_key(path: Path, rng: random.Random) -> None:
    edit(path / "config.json", lambda content: content.pop(rng.choice([n for n in SIZES if n in content])))


def cut_file(path: Path, rng: random.Random) -> None:
    file = rng.choice(sorted(path.glob("*.*")))
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def lost_file(path: Path, rng: random.Random) -> None:
    rng.choice(sorted(path.glob("*.*"))).unlink()


def damaged_header(path: Path, rng: random.Random) -> None:
    content = bytearray((path / "model.safetensors").read_bytes())
    content[rng.randrange(8 + int.from_bytes(content[:8], "little"))] ^= 1 << rng.randrange(8)
    (path / "model.safetensors").write_bytes(content)


def other_tensor(path: Path, rng: random.Random) -> None:
    tensors = load_file(path / "model.safetensors")
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    renamed = rng.choice([f"{name}x", f"module.{name}", f"model.{name}", name.replace(".h.", ".layers.")])
    others = [None, tensor[:-1], tensor[None], torch.cat([tensor, tensor]), torch.tensor(1.0), tensor.int()]
    other = rng.choice([*others, (renamed, tensor)])
    if isinstance(other, tuple):
        tensors[other[0]] = other[1]
    elif other is not None:
        tensors[name] = other.clone()
    if renamed == name or (isinstance(other, tuple) and other[0] == name):
        tensors.pop(name, None)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def damaged_index(path: Path, rng: random.Random) -> None:
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    weight_map: Any = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    weight_map[rng.choice(sorted(weight_map))] = rng.choice([*JUNK, "gone.safetensors"])
    index = {"metadata": {}, "weight_map": rng.choice([weight_map, *JUNK])}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def damaged_vocabulary(path: Path, rng: random.Random) -> None:
    lines = (path / "qwen.tiktoken").read_bytes().splitlines(keepends=True)
    number = rng.randrange(len(lines))
    lines[number] = rng.choice(
        [b"", lines[number - 1], b"\n", b"!! 3\n", b"QQ== -5\n", lines[number].replace(b" ", b"")]
    )
    (path / "qwen.tiktoken").write_bytes(b"".join(lines))


KINDS = (other_number_type, junk_value, junk_value, lost_key, cut_file, lost_file, damaged_header, other_tensor,
         damaged_index, damaged_vocabulary)  # fmt: skip


@pytest.mark.parametrize("kind", dict.fromkeys(KINDS), ids=lambda kind: kind.__name__)
def test_right_model_or_one_sentence(kind: Callable, whole: Path, tmp_path: Path) -> None:
    expected = logits(whole)
    for seed in range(8 * KINDS.count(kind)):
        copy = shutil.copytree(whole, tmp_path / str(seed))
        same = kind(copy, random.Random(seed))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = logits(copy)
        except QwenError as error:
            assert not same and "\n" not in str(error) and len(str(error)) < 700, (seed, error)
        else:
            assert torch.equal(found, expected), seed
        shutil.rmtree(copy)
