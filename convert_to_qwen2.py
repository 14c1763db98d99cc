"""Rewrite a checkpoint in Qwen2's layout, in which vLLM, SGLang, TGI, lmdeploy and llama.cpp run it, or back.

    python convert_to_qwen2.py -c Qwen/Qwen-7B-Chat -o qwen-7b-chat-qwen2
    python convert_to_qwen2.py -c Qwen/Qwen-7B-Chat -o qwen-7b-chat-16k --context 16384
    python convert_to_qwen2.py --back -c qwen-7b-chat-qwen2 -o qwen-7b-chat

Nothing is computed, so nothing is lost: up to `seq_length` tokens both give the same logits. One file of weights is in
memory at a time. Int4 checkpoints are converted as they are. Engines of Qwen2 choose no factor of dynamic NTK for each
prompt: --context writes the one of that length into the settings, for prompts of every length.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from hub import HUBS
from qwen import QWenTokenizer
from qwen.chat_template import template_system
from qwen.chatml import complete_eos_ids
from qwen.checkpoint import check_weight_files, list_weight_files, read_json
from qwen.errors import QwenError
from qwen.fast_tokenizer import restore_vocabulary, save_fast_tokenizer
from qwen.paths import new_directory
from qwen.qwen2 import join_parts, qwen2_settings, qwen_settings, qwen_sources, to_qwen2
from utils import DEFAULT_CHECKPOINT, check_loadable, find_checkpoint, load_config, run_script

GB = 10**9
ZERO_BIASES = "stores_zero_biases"  # whether an Int4 checkpoint has them, as official ones do


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "-c", "--checkpoint-path", default=DEFAULT_CHECKPOINT, metavar="PATH",
        help="directory, hub name or `demo` (default: %(default)s); with --back a directory in Qwen2's layout",
    )  # fmt: skip
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="directory to write")
    parser.add_argument("--back", action="store_true", help="from Qwen2's layout to Qwen's")
    parser.add_argument(
        "--context", type=int, metavar="N",
        help="tokens to read: RoPE is stretched by one factor for all lengths (default: seq_length, nothing changed)",
    )  # fmt: skip
    parser.add_argument(
        "--max-shard-size", type=float, default=2.0, metavar="GB",
        help="size of a weight file, and of the memory needed (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--hub", default=HUBS[0], choices=HUBS, help="where hub names are looked up")
    parser.add_argument("--revision", help="branch, tag or commit of a hub checkpoint")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if not args.max_shard_size > 0:
        raise QwenError(f"--max-shard-size {args.max_shard_size}: give a size in GB, such as 2")
    if args.back and args.context is not None:
        raise QwenError("--context is for the way to Qwen2's layout: leave it out with --back")
    source = find_checkpoint(args.checkpoint_path, args.hub, args.revision)
    if (source / "adapter_config.json").is_file():
        raise QwenError(f"{source} is an adapter: merge it first, with merge_lora.py, then convert the result")
    try:
        needed = sum(path.stat().st_size for path in list_weight_files(source) if path.is_file())
        with new_directory(args.output, needed) as made:
            if args.back:
                convert_back(source, made, args.max_shard_size * GB)
            else:
                convert(source, made, args.max_shard_size * GB, args.context)
    except SafetensorError as error:
        raise QwenError(f"{args.output} can't be written ({error}): free some space, then start again") from error
    print(f"Saved in {args.output}.", file=sys.stderr)


# ---- the two ways ----


def convert(source: Path, target: Path, shard_bytes: float, context: int | None = None) -> None:
    """Write a Qwen-7B checkpoint directory in Qwen2's layout; `context` stretches RoPE to so many tokens."""
    check_loadable(source)
    check_weight_files(source)
    settings = qwen2_settings(load_config(source), context)
    tokenizer = QWenTokenizer.from_pretrained(source)
    generation = read_json(path) if (path := source / "generation_config.json").is_file() else {}
    is_chat = generation.get("chat_format") == "chatml"
    save_fast_tokenizer(tokenizer, target, chat=is_chat, max_length=settings["max_position_embeddings"])
    write_json(target / "config.json", settings)
    save_generation_config(source, target)
    for name in ("generation_config.json", "tokenizer_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / f"qwen_{name}")  # which no engine reads, for the way back
    files = WeightFiles(source)
    note = {ZERO_BIASES: any(name.endswith(".mlp.w1.bias") for name in files.names())}
    write_json(target / "qwen_config.json", {**read_json(source / "config.json"), **note})
    pairs = (pair for name in files.names() for pair in to_qwen2(name, files.read(name)))
    write_shards(pairs, target, shard_bytes, files.total_bytes)


def convert_back(source: Path, target: Path, shard_bytes: float) -> None:
    """Write a checkpoint directory in Qwen2's layout as Qwen-7B's, settings as they were before the conversion."""
    settings = read_json(source / "config.json")
    if settings.get("model_type") != "qwen2":
        raise QwenError(
            f"{source / 'config.json'} says model_type {settings.get('model_type')!r}: --back takes a checkpoint in "
            "Qwen2's layout"
        )
    try:
        made = qwen_settings(settings)
    except QwenError as error:
        raise QwenError(f"{source}: {error}") from None
    except KeyError as error:
        raise QwenError(f"{source / 'config.json'} lacks {error}: is it whole?") from None
    if (source / "qwen_config.json").is_file():
        # What training in other engines may have changed comes from the new settings.
        made = {**read_json(source / "qwen_config.json"), "dtype": made["dtype"], "vocab_size": made["vocab_size"]}
    zero_biases = made.pop(ZERO_BIASES, True)
    write_json(target / "config.json", made)
    restore_vocabulary(source / "tokenizer.json", target / "qwen.tiktoken")
    for name in ("generation_config.json", "tokenizer_config.json"):
        kept = source / f"qwen_{name}"
        if kept.is_file():
            shutil.copyfile(kept, target / name)
    if not (target / "tokenizer_config.json").is_file():
        write_json(target / "tokenizer_config.json", {"tokenizer_class": "QWenTokenizer", **told_system(source)})
    if not (target / "generation_config.json").is_file() and (source / "generation_config.json").is_file():
        generation = read_json(source / "generation_config.json")
        is_chat = (source / "chat_template.jinja").is_file() or "chat_template" in read_json(
            source / "tokenizer_config.json"
        )
        write_json(target / "generation_config.json", {"chat_format": "chatml" if is_chat else "raw", **generation})
    files = WeightFiles(source)
    sources = qwen_sources(files.names())
    pairs = ((name, join_parts(name, [files.read(part) for part in parts])) for name, parts in sources.items())
    if zero_biases:
        pairs = with_zero_biases(pairs)
    write_shards(pairs, target, shard_bytes, files.total_bytes)


def told_system(source: Path) -> dict[str, str]:
    """The default system message as a setting of the tokenizer, if the chat template is one of this package's."""
    path = source / "chat_template.jinja"
    template = path.read_text(encoding="utf-8") if path.is_file() else read_json(
        source / "tokenizer_config.json").get("chat_template")  # fmt: skip
    system = template_system(template) if isinstance(template, str) else None
    return {} if system is None else {"default_system": system}


def with_zero_biases(pairs: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, and those that official GPTQ checkpoints store for layers without a bias."""
    for name, tensor in pairs:
        yield name, tensor
        if name.endswith(".scales") and ".c_attn." not in name:
            yield name.removesuffix("scales") + "bias", tensor.new_zeros(tensor.shape[1])


def save_generation_config(source: Path, target: Path) -> None:
    """generation_config.json with all ids that end a reply, and without what only Qwen-7B's own code reads."""
    if not (source / "generation_config.json").is_file():
        return
    config = GenerationConfig.from_pretrained(source)
    complete_eos_ids(config)
    settings = config.to_diff_dict()
    for name in ("chat_format", "max_window_size", "stop_words_ids"):
        settings.pop(name, None)
    write_json(target / "generation_config.json", settings)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- weights ----


class WeightFiles:
    """All tensors of a checkpoint directory by name; each is read from the disk when it is asked for."""

    def __init__(self, directory: Path) -> None:
        paths = list_weight_files(directory)
        self.total_bytes = sum(path.stat().st_size for path in paths)
        self._files = {}
        for path in paths:
            if path.suffix == ".safetensors":
                file = safe_open(path, framework="pt")
                self._files |= dict.fromkeys(file.keys(), file)
            else:
                tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                self._files |= dict.fromkeys(tensors, tensors)

    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        file = self._files[name]
        return tuple(file[name].shape if isinstance(file, dict) else file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        file = self._files[name]
        return file[name] if isinstance(file, dict) else file.get_tensor(name)


def write_shards(pairs: Iterator[tuple[str, Tensor]], target: Path, shard_bytes: float, total_bytes: int) -> None:
    """Write tensors as they come, a new file where one is full, and the index if there are several."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = written = 0

    def flush() -> None:
        save_file(shard, target / f"shard-{len(shards)}", metadata={"format": "pt"})
        shutil.copymode(target / "config.json", target / f"shard-{len(shards)}")  # safetensors lets only us read it
        shards.append(list(shard))
        shard.clear()

    with tqdm(desc="Converting", total=total_bytes, unit="B", unit_scale=True, file=sys.stderr) as bar:
        for name, tensor in pairs:
            if shard and size + tensor.nbytes > shard_bytes:
                flush()
                size = 0
            # A copy: the three parts of c_attn are views of one tensor, and files hold no views.
            shard[name] = tensor.clone(memory_format=torch.contiguous_format)
            size += tensor.nbytes
            written += tensor.nbytes
            bar.update(min(tensor.nbytes, bar.total - bar.n))
        flush()
        bar.update(bar.total - bar.n)
    if len(shards) == 1:
        os.replace(target / "shard-0", target / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        os.replace(target / f"shard-{number}", target / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": written}, "weight_map": weight_map}
    write_json(target / "model.safetensors.index.json", index)


if __name__ == "__main__":
    run_script(main)
