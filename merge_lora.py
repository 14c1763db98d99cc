"""Merge a LoRA adapter into its base model: the result is a checkpoint like any other, which also quantises.

python merge_lora.py -c output -o my-qwen
"""

import argparse
import sys
from pathlib import Path

import torch

from qwen.checkpoint import check_architecture, read_json
from qwen.errors import QwenError
from utils import DTYPES, find_checkpoint, load_config, load_model_and_tokenizer, run_script


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
    settings = read_json(adapter / "adapter_config.json")
    if args.output.is_file() or (args.output.is_dir() and any(args.output.iterdir())):
        raise QwenError(f"{args.output} exists and is not empty: give another directory, or delete it")
    base = find_base(adapter, settings, args.base)
    dtype = load_config(base).dtype if args.dtype == "auto" else DTYPES[args.dtype]
    try:
        from qwen.lora import load_adapter
    except ImportError:
        raise QwenError("merging needs the package peft: pip install -r requirements_finetune.txt") from None
    # In float32, rounded once at the end: as close to base plus adapter as the saved precision can be.
    model, tokenizer = load_model_and_tokenizer(base, device="cpu", dtype="fp32")
    model, tokenizer = load_adapter(adapter, model, tokenizer, str(base))
    print(f"Merging {adapter} into {base} ...", file=sys.stderr)
    merged = model.merge_and_unload(safe_merge=True, progressbar=sys.stderr.isatty())
    merged.to(dtype or torch.float32).save_pretrained(args.output, max_shard_size=args.max_shard_size)
    tokenizer.save_pretrained(args.output)
    size = sum(path.stat().st_size for path in args.output.iterdir()) / 2**30
    print(f"Saved in {args.output} ({size:.2f} GiB).\npython cli_demo.py -c {args.output}")


def find_base(adapter: Path, settings: dict, given: str | None) -> Path:
    """The directory of the checkpoint to merge onto; QwenError if it is quantised or not to be had."""
    name = given or settings.get("base_model_name_or_path")
    if not name:
        raise QwenError(f"{adapter / 'adapter_config.json'} names no base model: give it with --base")
    base = find_checkpoint(name, revision=None if given else settings.get("revision"))
    if check_architecture(base).get("quantization_config"):
        raise QwenError(
            f"{name} is quantised, and nothing can be merged into rounded weights: give the unquantised one, such "
            "as --base Qwen/Qwen-7B-Chat, and quantise the result with quantize.py"
        )
    return base


if __name__ == "__main__":
    run_script(main)
