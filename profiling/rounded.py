"""An Int4 checkpoint made in seconds by rounding alone: as fast as one from quantize.py, with worse replies."""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from profiling.random_weights import GPTQ_SETTINGS, SUFFIXES
from quantize import STAGES, official_tensors
from qwen.checkpoint import list_weight_files, read_json
from qwen.errors import QwenError
from qwen.gptq import find_scales
from qwen.paths import replacing
from utils import load_config

BITS = 4
LINEARS = tuple(f".{name}" for _, names in STAGES for name in names)
OTHER_FILES = ("generation_config.json", "qwen.tiktoken", "tokenizer_config.json")


def ensure_rounded_checkpoint(source: Path, folder: Path) -> Path:
    """The Int4 checkpoint of `source` in `folder`, in the official layout; written if it is not there or older.

    Raises:
        QwenError: the weights are no safetensors files, or no group of inputs divides the layers' sizes.
    """
    target = folder / ("-".join(source.absolute().parts[-2:]) + f"{SUFFIXES[BITS]}-rounded")
    made = target / "config.json"  # written last
    if made.is_file() and made.stat().st_mtime >= (source / "config.json").stat().st_mtime:
        return target
    print(f"Writing {target} ...", file=sys.stderr)
    config = load_config(source)
    inputs = (config.hidden_size, config.num_attention_heads * config.kv_channels, config.intermediate_size // 2)
    group = next((size for size in (128, 64, 32) if not any(n % size for n in inputs)), None)
    if group is None:
        raise QwenError(f"{source}: no group of 128, 64 or 32 divides the layers' input sizes {sorted(set(inputs))}")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    save_file(rounded_tensors(source, group), target / "model.safetensors", metadata={"format": "pt"})
    for name in OTHER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    quantization = {**GPTQ_SETTINGS, "bits": BITS, "group_size": group}
    settings = {**read_json(source / "config.json"), "dtype": "float16", "quantization_config": quantization}
    with replacing(made) as draft:
        draft.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return target


def rounded_tensors(source: Path, group: int) -> dict[str, Tensor]:
    """All tensors of the Int4 checkpoint; whatever is no linear layer of a block becomes float16."""
    tensors: dict[str, Tensor] = {}
    for file in list_weight_files(source):
        if file.suffix != ".safetensors":
            raise QwenError(f"{file} is no safetensors file: give an Int4 checkpoint with --int4-checkpoint")
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():
                tensors[key] = stored.get_tensor(key)
    for key in [key for key in tensors if key.removesuffix(".weight").endswith(LINEARS)]:
        name, weight = key.removesuffix(".weight"), tensors.pop(key)
        bias = tensors.pop(f"{name}.bias", None)
        found = round_weight(weight.float(), group)
        found = official_tensors(*found, bias, {"bits": BITS, "group_size": group})
        tensors |= {f"{name}.{part}": tensor for part, tensor in found.items()}
    return {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


def round_weight(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The numbers (in, out) uint8 and scales (in / group, out) float16 nearest to a weight (out, in) in float32."""
    rows, columns = weight.shape
    groups = weight.view(-1, group)  # (out * in / G, G)
    scale = find_scales(groups, BITS, torch.ones(group))
    middle = 2 ** (BITS - 1)
    numbers = (groups / scale[:, None]).round_().clamp_(-middle, middle - 1).add_(middle).to(torch.uint8)
    return numbers.view(rows, columns).T.contiguous(), scale.view(rows, -1).T.contiguous().half()
