"""Look at a checkpoint directory before it is loaded, and say in one sentence what is wrong with it.

Only headers and sizes are read: a truncated 15 GB download is found in milliseconds, not after minutes of loading.
"""

import json
import os
import re
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import QwenError, first_line
from .settings import check_settings

LFS_POINTER = b"version https://git-lfs"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in order of preference; each may have an index instead
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "module.transformer.", "module.lm_head.", "pretrained_model.")
INDEX = ".index.json"
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "optimizer.bin")
PULL = "run `git lfs install && git lfs pull` in the clone"
FETCH_AGAIN = "download it again, for example with `hf download Qwen/Qwen-7B-Chat --local-dir DIR`"


CODE_KEYWORDS = ("trust_remote_code", "code_revision", "custom_generate")  # these let a checkpoint's code run
OTHER_MODELS = {  # what shares Qwen-7B's model_type, by a field of config.json that only it has
    "visual": "Qwen-VL, which also reads images; only its text part would load, so vLLM or the publisher's code",
    "audio": "Qwen-Audio, which also hears; only its text part would load, so vLLM or the publisher's code",
}
LATER_MODELS = ("qwen2", "qwen3", "qwen4")  # beginnings of the model types of the publisher's later generations


def without_code(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` without those that let a checkpoint's code run."""
    return {name: value for name, value in kwargs.items() if name not in CODE_KEYWORDS}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; QwenError where it is missing or broken."""
    if not path.is_file():
        raise QwenError(f"{path} is missing: is {path.parent} a checkpoint directory? If so, {FETCH_AGAIN}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise QwenError(f"{path} is not valid JSON ({error}): {FETCH_AGAIN}") from None
    if not isinstance(content, dict):
        raise QwenError(f"{path} holds no JSON object: {FETCH_AGAIN}")
    return content


def check_architecture(directory: str | os.PathLike) -> dict[str, Any]:
    """The config.json of a Qwen-7B directory; QwenError if it is of another architecture, or a settings file broken."""
    path = Path(directory) / "config.json"
    if not path.is_file() and path.parent.is_dir():
        say_where(path.parent)
    config = with_quantization(read_json(path), path.parent)
    for name in ("generation_config.json", "tokenizer_config.json"):
        if path.with_name(name).exists():
            settings = read_json(path.with_name(name))
            if name == "generation_config.json":
                check_settings(settings, str(path.with_name(name)))
    check_model_type(config, str(path))
    return config


def with_quantization(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The content of config.json, with AutoGPTQ's quantize_config.json and the method's name where it lacks them."""
    found = config.get("quantization_config")
    if not found and (directory / "quantize_config.json").is_file():
        found = read_json(directory / "quantize_config.json")
    if isinstance(found, dict) and "bits" in found and not found.get("quant_method"):
        found = {**found, "quant_method": "gptq"}
    return {**config, "quantization_config": found} if found else config


def find_snapshot(directory: Path) -> Path:
    """The checkpoint in a hub's cache folder (models--Qwen--Qwen-7B-Chat, or snapshots in it); else `directory`."""
    root = directory.parent if directory.name == "snapshots" else directory
    if (directory / "config.json").is_file() or not (root / "snapshots").is_dir():
        return directory
    snapshots = [path for path in (root / "snapshots").iterdir() if (path / "config.json").is_file()]
    for ref in sorted((root / "refs").glob("*"), key=lambda path: path.name != "main"):
        if ref.is_file() and (found := root / "snapshots" / ref.read_text().strip()) in snapshots:
            return found
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=directory)


def say_where(directory: Path) -> None:
    """QwenError if a directory without config.json has checkpoints in its folders: one of them is meant."""
    names = ("config.json", "adapter_config.json")
    found = [path for path in directory.iterdir() if any((path / name).is_file() for name in names)]
    if (snapshot := find_snapshot(directory)) != directory:
        found = [snapshot]
    if found:
        newest = max(found, key=lambda path: path.stat().st_mtime)
        raise QwenError(f"{directory} holds checkpoints but is none itself: give one of them, such as {newest}")


def check_model_type(config: dict[str, Any], path: str) -> None:
    """QwenError if the content of a config.json is of another model than Qwen-7B and its kin."""
    model_type = config.get("model_type", "nothing")
    if model_type == "qwen":
        for field, model in OTHER_MODELS.items():
            if config.get(field):
                raise QwenError(f"{path} is of {model} must run it: give a text-only checkpoint here")
        return
    if str(model_type).startswith(LATER_MODELS):
        raise QwenError(
            f"{path} says model_type {model_type!r}, a later generation of Qwen with another architecture: load it "
            "with transformers directly, or serve it with vLLM or SGLang"
        )
    if model_type != "qwen":
        raise QwenError(
            f'{path} says model_type {model_type!r}, and only "qwen" (Qwen-7B, Qwen-7B-Chat and their kin) runs here: '
            "give another path, or load this one with transformers directly"
        )


def check_vocabulary(path: str | os.PathLike) -> None:
    """QwenError if the vocabulary file is missing or a git-lfs pointer: the two ends of a clone without git-lfs."""
    if not os.path.isfile(path):
        raise QwenError(f"{path} is missing: copy it from the model's page, or {PULL}")
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise QwenError(f"{path} is only a git-lfs pointer, not the vocabulary: {PULL}")


def check_weight_files(
    directory: str | os.PathLike, load_kwargs: dict[str, Any] | None = None
) -> dict[str, tuple[int, ...]]:
    """Check that every weight file of a local directory is there and whole; the shapes of the tensors in safetensors.

    Anything but a directory (a hub id) passes: the hub's client has checked what it downloaded. So does loading that
    reads other files (`state_dict`, `gguf_file`, `variant`, `subfolder`).

    Raises:
        QwenError: names the file and the remedy.
    """
    directory = Path(directory)
    elsewhere = ("state_dict", "gguf_file", "variant", "subfolder")
    if not directory.is_dir() or any((load_kwargs or {}).get(name) for name in elsewhere):
        return {}
    config, entries = check_architecture(directory), {}
    for path in list_weight_files(directory):
        check_weight_file(path)
        if path.suffix == ".safetensors":
            entries |= read_header(path)
    check_tensors(directory, entries, config)
    return {name: tuple(entry["shape"]) for name, entry in entries.items()}


def compare_shapes(
    stored: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], may_lack: Collection[str]
) -> dict[str, Any]:
    """What `check_loaded_keys` reads, from shapes alone: before anything is loaded."""
    return {
        "missing_keys": expected.keys() - stored.keys() - set(may_lack),
        "unexpected_keys": stored.keys() - expected.keys(),
        "mismatched_keys": [
            (name, shape, expected[name]) for name, shape in stored.items() if expected.get(name, shape) != shape
        ],
    }


def list_weight_files(directory: Path) -> list[Path]:
    """The files that transformers will read: safetensors first, shards by their index."""
    for name in (other,) if (other := other_weights_name(directory)) else WEIGHT_FILES:
        if (directory / name).exists():
            return read_index(directory / name) if name.endswith(INDEX) else [directory / name]
        if (index := directory / f"{name}{INDEX}").exists():
            return read_index(index)
    raise QwenError(explain_no_weights(directory))


def other_weights_name(directory: Path) -> str | None:
    """The weight file, or its index, in a directory where it has a name of its own, as AutoGPTQ gives it; else None."""
    if any((directory / f"{name}{end}").exists() for name in WEIGHT_FILES for end in ("", INDEX)):
        return None
    for pattern in (f"*.safetensors{INDEX}", "*.safetensors"):
        found = [path.name for path in directory.glob(pattern) if not path.name.startswith(("adapter_", "."))]
        if found:
            return found[0] if len(found) == 1 and not SHARD.search(found[0]) else None
    return None


def read_index(index: Path) -> list[Path]:
    """The shards that an index file names."""
    content = read_json(index)
    shards = content.get("weight_map")
    if not isinstance(content.get("metadata"), dict):  # transformers asks for it
        raise QwenError(f'{index} lacks "metadata": add "metadata": {{}} to it, or {FETCH_AGAIN}')
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise QwenError(f"{index} names no weight files: {FETCH_AGAIN}")
    return [index.parent / shard for shard in sorted(set(shards.values()))]


def explain_no_weights(directory: Path) -> str:
    """What is in a directory in place of weights that can be read, in a sentence."""
    names = sorted(path.name for path in directory.iterdir())
    if shards := [name for name in names if SHARD.search(name)]:
        kind = WEIGHT_FILES["pytorch_model" in shards[0]]
        return f"{directory} has shards such as {shards[0]}, but no {kind}{INDEX} that lists them: {FETCH_AGAIN}"
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth")) and name not in NO_WEIGHTS]:
        old, new = directory / pickles[0], directory / WEIGHT_FILES[1]
        return f"{directory} has no weights under a known name: if they are in {old}, rename it, `mv {old} {new}`"
    if several := [name for name in names if name.endswith(".safetensors")]:
        return f"{directory} has {len(several)} weight files and no index ({', '.join(several[:3])}): leave one of them"
    if found := next((name for name in names if name.endswith(".gguf")), None):
        return f"{directory / found} is of llama.cpp, which runs it: give a checkpoint in safetensors here"
    if found := next((name for name in names if name.startswith(("global_step", "pytorch_model_fsdp"))), None):
        return (
            f"{directory / found} holds a training's sharded state, not weights: put it together first, with the "
            "zero_to_fp32.py beside it, or `accelerate merge-weights`"
        )
    return f"no weights in {directory} (neither {' nor '.join(WEIGHT_FILES)} nor an index): {FETCH_AGAIN}"


def check_weight_file(path: Path) -> None:
    """QwenError if one weight file is missing, a git-lfs pointer or truncated."""
    if not path.is_file():
        raise QwenError(f"{path} is missing, though the checkpoint's index names it: {FETCH_AGAIN}")
    with path.open("rb") as file:
        head = file.read(len(LFS_POINTER))
    if head == LFS_POINTER:
        raise QwenError(f"{path} is only a git-lfs pointer: {PULL}")
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        read_header(path)
    elif not zipfile.is_zipfile(path) and not head.startswith(b"\x80"):  # neither a zip's end nor an old pickle's head
        raise QwenError(f"{path} is damaged ({size:,} bytes, no complete PyTorch file): {FETCH_AGAIN}")


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a safetensors file: dtype, shape and data_offsets of each tensor.

    Raises:
        QwenError: there is no whole header, or one that contradicts itself.
    """
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if not 0 < header_size <= 100_000_000:  # the format's own limit
            raise QwenError(f"{path} has no safetensors header: {FETCH_AGAIN}")
        try:
            header = json.loads(file.read(header_size))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            whole = all(
                isinstance(entry["dtype"], str) and isinstance(entry["shape"], list) for entry in header.values()
            )
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise QwenError(f"{path} breaks off within its header, or it is damaged: {FETCH_AGAIN}") from None
    size, expected = path.stat().st_size, 8 + header_size + end
    if size != expected or not whole:
        raise QwenError(f"{path} is damaged: {size:,} bytes of {expected:,}; {FETCH_AGAIN}")
    try:
        with safe_open(path, framework="pt"):  # offsets that fit the shapes, and one another
            pass
    except SafetensorError as error:
        raise QwenError(f"{path} is damaged ({first_line(error)}): {FETCH_AGAIN}") from None
    return header


def check_tensors(directory: Path, entries: dict[str, dict[str, Any]], config: dict[str, Any]) -> None:
    """QwenError if tensors are of another model, of a wrapper, or quantised in another way than config.json says."""
    for name in entries:
        check_tensor_name(name, directory)
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    told = {
        "MLX": bool(config.get("quantization")),
        "EXL2": any(name.endswith(".q_weight") for name in entries),
        "GPTQ or AWQ": not quantization and any(name.endswith(".qweight") for name in entries),
        "bitsandbytes": not quantization and any(name.endswith((".SCB", ".absmax")) for name in entries),
    }
    if kind := next((kind for kind, found in told.items() if found), None):
        missing = "quantization_config in config.json, or quantize_config.json, is missing: copy it along"
        remedy = "take the unquantised one, or a GPTQ checkpoint such as Qwen/Qwen-7B-Chat-Int4"
        raise QwenError(
            f"{directory} is quantised by {kind}, "
            + (f"which nothing here loads: {remedy}" if kind in ("MLX", "EXL2") else f"and its {missing}")
        )
    if method == "gptq" and entries and not any(name.endswith(".qweight") for name in entries):
        raise QwenError(
            f"{directory}: config.json says that it is quantised by GPTQ, and the weights are not: "
            "config.json belongs to another checkpoint"
        )
    for name, entry in entries.items():
        if not quantization and name.endswith((".weight", ".bias")) and not entry["dtype"].startswith(("F", "BF")):
            raise QwenError(f"{directory}: {name} holds whole numbers ({entry['dtype']}), no weights: {FETCH_AGAIN}")


def check_tensor_name(name: str, source: str | os.PathLike) -> None:
    """QwenError if a tensor's name is of another model, or of a wrapper around this one."""
    for part, model in OTHER_MODELS.items():
        if name.startswith((f"transformer.{part}.", f"{part}.")):
            raise QwenError(f"{source} has the tensor {name}: it is of {model} must run it")
    if name.startswith("base_model.model.") or ".lora_A." in name:
        raise QwenError(
            f"{source} has the tensor {name}: it was saved with an adapter's wrapper around the model; save the "
            "adapter alone, or what merge_and_unload() returns"
        )
    if wrapper := next((prefix for prefix in WRAPPERS if prefix in name), None):
        raise QwenError(
            f"{source} has the tensor {name}: it was saved with a wrapper around the model ({wrapper}); save the "
            "model within it"
        )


def check_loaded_keys(
    source: str | os.PathLike, info: dict[str, Any], accept_other_sizes: bool = False, new: tuple[str, ...] = ()
) -> None:
    """QwenError if tensors were missing (but for `new` ones), of other sizes or left over: transformers would fill in
    random numbers, or do without, and go on."""
    left_over = sorted(info["unexpected_keys"])
    for name in left_over:  # of .bin files, whose names are not known before
        check_tensor_name(name, source)
    missing = sorted(set(info["missing_keys"]) - set(new))
    if missing:
        raise QwenError(
            f"{source} lacks {len(missing)} of the model's tensors (the first: {missing[0]}): the checkpoint is "
            f"incomplete or its config.json belongs to another one; {FETCH_AGAIN}"
        )
    mismatched = sorted(info["mismatched_keys"])
    if mismatched and not accept_other_sizes:
        name, stored, expected = mismatched[0]
        raise QwenError(
            f"{source}: {name} is {tuple(stored)}, and by config.json it should be {tuple(expected)}: "
            f"config.json belongs to another checkpoint; {FETCH_AGAIN}"
        )
    if ours := [name for name in left_over if name.startswith(("transformer.", "lm_head.", "h.", "wte.", "ln_f."))]:
        raise QwenError(
            f"{source} has {len(ours)} tensors for which the model of config.json has no place (the first: {ours[0]}): "
            f"config.json belongs to another checkpoint; {FETCH_AGAIN}"
        )
