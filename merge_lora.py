"""Merge a LoRA adapter into its base model: the result is a checkpoint like any other, which also quantises.

python merge_lora.py -c output -o my-qwen
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError

from qwen import QWenForSequenceClassification, QWenTokenizer
from qwen.checkpoint import check_architecture
from qwen.errors import QwenError
from qwen.paths import new_directory
from utils import (
    DTYPES,
    check_adapter_base,
    find_checkpoint,
    load_config,
    load_model_and_tokenizer,
    load_model_for_training,
    run_script,
    weight_bytes,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--checkpoint-path", required=True, type=Path, metavar="DIR", help="the adapter")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--base", metavar="PATH", help="unquantised checkpoint to merge onto (default: the one the adapter names)"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", *DTYPES], help="precision to save (default: the base's)"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="size of a weight file (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    adapter = args.checkpoint_path
    settings = read_settings(adapter)
    check_mergeable(adapter, settings)
    check_shard_size(args.max_shard_size)
    base = find_base(adapter, settings, args.base)
    config = load_config(base)
    dtype = (config.dtype if args.dtype == "auto" else DTYPES[args.dtype]) or torch.float32
    try:
        from qwen.lora import load_adapter
    except ImportError:
        raise QwenError("merging needs the package peft: pip install -r requirements_finetune.txt") from None
    # In float32, rounded once at the end: as close to base plus adapter as the saved precision can be.
    try:
        with new_directory(
            args.output, weight_bytes(config, dtype)
        ) as made:  # before the weights are loaded: it may not be writable
            if settings.get("task_type") == "SEQ_CLS":  # of a reward model
                model = load_model_for_training(base, torch.float32, {"": "cpu"}, kind=QWenForSequenceClassification)
                tokenizer = QWenTokenizer.from_pretrained(base)
            else:
                model, tokenizer = load_model_and_tokenizer(base, device="cpu", dtype="fp32")
            model, tokenizer = load_adapter(adapter, model, tokenizer, str(base))
            print(f"Merging {adapter} into {base} ...", file=sys.stderr)
            merged = model.merge_and_unload(safe_merge=True, progressbar=sys.stderr.isatty())
            merged.to(dtype).save_pretrained(made, max_shard_size=args.max_shard_size)
            tokenizer.save_pretrained(made)
    except SafetensorError as error:
        raise QwenError(f"{args.output} can't be written ({error}): free some space, then merge again") from error
    size = sum(path.stat().st_size for path in args.output.iterdir()) / 2**30
    print(f"Saved in {args.output} ({size:.2f} GiB).\npython cli_demo.py -c {args.output}")


def read_settings(adapter: Path) -> dict:
    """adapter_config.json; QwenError if the directory is no adapter, or a damaged one."""
    path = adapter / "adapter_config.json"
    if not path.is_file():
        if (adapter / "config.json").is_file():
            raise QwenError(f"{adapter} is a whole model, not an adapter: there is nothing to merge")
        raise QwenError(
            f"{path} is missing: give the --output_dir of a training with --use_lora, or one of its checkpoints"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QwenError(f"{path} is damaged ({error}): copy it from one of the training's checkpoints") from None


def check_mergeable(adapter: Path, settings: dict) -> None:
    """QwenError for an adapter that changes no weights: prompts that were learned stay beside the model."""
    kind = settings.get("peft_type")
    if kind in ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "CPT", "ADAPTION_PROMPT"):
        raise QwenError(f"{adapter} is of the kind {kind}, which can't be merged into weights: load it as an adapter")


def check_shard_size(size: str) -> None:
    """QwenError unless transformers understands the size."""
    if not re.fullmatch(r"[1-9]\d*([KMGT]i?B)?", size, re.IGNORECASE):
        raise QwenError(f"--max-shard-size {size}: give a size such as 5GB or 500MB")


def find_base(adapter: Path, settings: dict, given: str | None) -> Path:
    """The directory of the checkpoint to merge onto; QwenError if it is quantised or not to be had."""
    name = given or settings.get("base_model_name_or_path")
    if not name:
        raise QwenError(f"{adapter / 'adapter_config.json'} names no base model: give it with --base")
    base = find_checkpoint(name, revision=None if given else settings.get("revision"))
    check_adapter_base(adapter, str(base))
    if check_architecture(base).get("quantization_config"):
        raise QwenError(
            f"{name} is quantised, and nothing can be merged into rounded weights: give the unquantised one, such "
            "as --base Qwen/Qwen-7B-Chat, and quantise the result with quantize.py"
        )
    return base


if __name__ == "__main__":
    run_script(main)
