"""Quantise a Qwen checkpoint to Int4 with GPTQ, in the layout of the official Int4 checkpoints.

    python quantize.py -c Qwen/Qwen-7B-Chat -o qwen-7b-chat-int4 --calibration my_conversations.jsonl

One layer at a time is worked on, on the GPU if there is one; the checkpoint itself stays in main memory, as it is. A
run that was stopped goes on where it was when it is started again.
"""

import argparse
import copy
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from qwen import QwenError, QWenLMHeadModel, QWenTokenizer
from qwen.chatml import encode_messages
from qwen.checkpoint import check_architecture, list_weight_files
from qwen.gptq import quantize_weight
from qwen.int4 import Int4Linear, group_index, pack_words
from qwen.paths import check_space, replacing
from training.read import read_conversations
from utils import (
    DTYPE_NAMES,
    DTYPES,
    add_model_arguments,
    choose_device,
    find_checkpoint,
    load_config,
    load_model_and_tokenizer,
    run_script,
    weight_bytes,
)

HERE = Path(__file__).resolve().parent
STAGES = (  # layers with the same input are quantised together, each stage on the outputs of the one before
    ("attn", ("attn.c_attn",)), ("attn", ("attn.c_proj",)), ("mlp", ("mlp.w1", "mlp.w2")), ("mlp", ("mlp.c_proj",)),
)  # fmt: skip
ROWS = 4096  # tokens that run through a layer at a time
LEAST_TOKENS = 256
HELD_OUT = 10  # one sample of so many is kept for measuring perplexity
PERPLEXITY_SAMPLES = 32


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="directory to write")
    parser.add_argument("--bits", type=int, default=4, choices=[4, 8], help="bits a weight (default: %(default)s)")
    parser.add_argument(
        "--group-size", default="auto", choices=["auto", "128", "64", "32"],
        help="weights that share a scale (default: the largest that divides all layers)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help="conversations (.json, .jsonl, as for fine-tuning) or plain text (default: this project's own texts)",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=128, metavar="N", help="samples at most (default: %(default)s)")
    parser.add_argument(
        "--max-length", type=int, default=512, metavar="N", help="tokens of a sample (default: %(default)s)"
    )
    parser.add_argument(
        "--damp", type=float, default=0.05, help="damping, more where inputs are few or alike (default: %(default)s)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_args(args)
    source = find_checkpoint(args.checkpoint_path, args.hub, args.revision)
    group_size = check_source(source, args)
    prepare_output(args.output)
    dtype = source_dtype(source, args.dtype)
    if not any(partial_directory(args.output).glob("layer-*")):  # else a part of it is written
        check_space(args.output, output_bytes(source, DTYPES[dtype], args.bits, group_size))
    model, tokenizer = load_model_and_tokenizer(source, device="cpu", dtype=dtype, attn=args.attn)
    ids = calibration_ids(args.calibration, tokenizer)
    calibration, held_out = split_samples(ids, args.max_length, args.samples, args.calibration)
    device = "cpu" if args.cpu_only else choose_device(args.device)
    print(
        f"Quantising to {args.bits} bits in groups of {group_size} on {device}: {calibration.shape[0]} samples of "
        f"{calibration.shape[1]} tokens from {args.calibration or 'the texts of this project'}.",
        file=sys.stderr,
    )
    if args.calibration is None:
        print(
            "For the best result give --calibration a file of what the model will be used for: the built-in texts are "
            "technical prose and Python code.", file=sys.stderr,
        )  # fmt: skip
    settings = {
        "bits": args.bits, "group_size": group_size, "damp": args.damp, "source": str(source.resolve()),
        "weights": [(path.name, path.stat().st_size, path.stat().st_mtime) for path in list_weight_files(source)],
        "calibration": [list(calibration.shape), int(calibration.sum()), int(held_out.sum())],
    }  # fmt: skip
    with resumable(args.output):
        partial = open_partial(args.output, settings)
        before, after = quantize_model(model, calibration, held_out, settings, partial, device)
        write_checkpoint(model, tokenizer, settings, partial, args.output)
    report = [("perplexity", f"{before:.3f}", f"{after:.3f}"), ("size on disk", size(source), size(args.output))]
    print(f"\n| {args.output} | before | Int{args.bits} |\n|---|---|---|")
    for row in report:
        print("| " + " | ".join(row) + " |")


# ---- what may be wrong before any work is done ----


def check_args(args: argparse.Namespace) -> None:
    """QwenError for values that can't work."""
    if args.num_gpus or getattr(args, "tp", None):
        raise QwenError("quantising works on one layer at a time and needs one GPU at most: leave --num-gpus, --tp out")
    if args.samples < 1 or args.max_length < 8:
        raise QwenError("--samples must be at least 1 and --max-length at least 8")
    if not 0 < args.damp < 1:
        raise QwenError(f"--damp {args.damp}: give a number between 0 and 1, such as 0.05")


def check_source(directory: Path, args: argparse.Namespace) -> int:
    """The group size for a checkpoint directory; QwenError where it can't be quantised."""
    if (directory / "adapter_config.json").is_file():
        raise QwenError(f"{directory} is an adapter: merge it into its base model, then quantise the merged checkpoint")
    if check_architecture(directory).get("quantization_config"):
        raise QwenError(f"{directory} is quantised already: give the unquantised checkpoint")
    config = load_config(directory)
    if args.max_length > config.seq_length:
        raise QwenError(f"--max-length {args.max_length} is more than the model's training length {config.seq_length}")
    inputs = {config.hidden_size, config.num_attention_heads * config.kv_channels, config.intermediate_size // 2}
    fitting = [size for size in (128, 64, 32) if not any(n % size for n in inputs)]
    if args.group_size != "auto":
        fitting = [size for size in fitting if size == int(args.group_size)]
    if not fitting:
        raise QwenError(f"--group-size {args.group_size} doesn't divide the layers' input sizes {sorted(inputs)}")
    return fitting[0]


def source_dtype(directory: Path, dtype: str) -> str:
    """The precision to hold the checkpoint in: its own, unless told otherwise."""
    own = DTYPE_NAMES.get(load_config(directory).dtype, "bf16")
    return own if dtype == "auto" else dtype


def output_bytes(directory: Path, dtype: torch.dtype, bits: int, group_size: int) -> int:
    """Size of the quantised weights: of the layers, which are kept until all is done, and of the checkpoint."""
    config = load_config(directory)
    config.quantization_config = {"quant_method": "gptq", "bits": bits, "group_size": group_size}
    whole = weight_bytes(config, dtype)
    return whole + whole - 2 * config.vocab_size * config.hidden_size * dtype.itemsize


def prepare_output(output: Path) -> None:
    """QwenError unless the directory is new or empty, and can be made."""
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise QwenError(f"{output} exists and is not empty: give another directory, or delete it")
    try:
        partial_directory(output).mkdir(parents=True, exist_ok=True)
        (partial_directory(output) / "writable").touch()
    except OSError as error:
        raise QwenError(f"{output} can't be written ({error.strerror}): give another directory") from error


@contextmanager
def resumable(output: Path) -> Iterator[None]:
    """Say that an interrupted run can go on: what it has written stays."""
    try:
        yield
    except SafetensorError as error:
        raise QwenError(
            f"{output} can't be written ({error}): free some space, then start again; finished layers are kept"
        ) from error
    except KeyboardInterrupt:
        print("\nStopped: finished layers are kept, the same command goes on from there.", file=sys.stderr)
        raise


# ---- calibration ----


def calibration_ids(path: Path | None, tokenizer: QWenTokenizer) -> list[int]:
    """All tokens to calibrate with: conversations as the model is prompted with them, or plain text."""
    if path is None:
        files = [HERE / "README.md", HERE / "README_CN.md", *sorted((HERE / "qwen").glob("*.py"))]
        return [i for file in files for i in tokenizer.encode_text(file.read_text(encoding="utf-8"))]
    if path.suffix in (".json", ".jsonl"):
        conversations = ([vars(message) for message in each.messages] for each in read_conversations(path))
        return [i for each in conversations for i in encode_messages(tokenizer, each, add_generation_prompt=False)]
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise QwenError(f"{path} is not UTF-8 text ({error}): convert it") from None
    except OSError as error:
        raise QwenError(f"--calibration {path} can't be read: {error.strerror}") from None
    if not text.strip():
        raise QwenError(f"--calibration {path} is empty")
    return tokenizer.encode_text(text)


def split_samples(ids: list[int], length: int, count: int, path: Path | None = None) -> tuple[Tensor, Tensor]:
    """Cut tokens into samples of `length`: up to `count` to calibrate (N, length), and some held out (M, length)."""
    if len(ids) < LEAST_TOKENS:
        raise QwenError(f"--calibration {path} has {len(ids)} tokens: give at least {LEAST_TOKENS}, better 50,000")
    length = min(length, len(ids) // 2)
    samples = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    last = torch.arange(len(samples)) % HELD_OUT == min(HELD_OUT, len(samples)) - 1
    return samples[~last][:count], samples[last][:PERPLEXITY_SAMPLES]


# ---- quantising ----


class _Reached(Exception):
    """Raised by a hook when a forward pass has come as far as it is needed."""


@torch.no_grad()
def quantize_model(
    model: QWenLMHeadModel, calibration: Tensor, held_out: Tensor, settings: dict[str, Any], partial: Path, device: str
) -> tuple[float, float]:
    """Replace all layers' Linears, in place and one layer after the other; the perplexities before and after.

    Three streams of hidden states pass through the layers: the calibration samples and the held-out ones through the
    quantised layers, the held-out ones also through the layers as they were. Layers found in `partial` are not
    quantised again.
    """
    arguments = block_arguments(model, calibration[:1], device)
    embed = model.transformer.wte
    calibrating, quantised, dense = (embed(ids).float() for ids in (calibration, held_out, held_out))
    for i, block in enumerate(tqdm(model.transformer.h, desc="Quantising", unit="layer", file=sys.stderr)):
        dtype = block.ln_1.weight.dtype
        block.to(device, torch.float32)
        dense = run(block, dense, arguments)
        path = partial / f"layer-{i:03}.safetensors"
        if path.is_file():
            tensors = load_file(path, device=device)
            for _, names in STAGES:
                for name in names:
                    own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
                    replace(block, name, own, settings)
        else:
            quantize_block(block, calibrating, arguments, settings, name=f"layer {i}")
            tensors = {k: t.cpu().contiguous() for k, t in block.state_dict().items() if not k.startswith("ln_")}
            with replacing(path) as draft:
                save_file(tensors, draft)
        calibrating, quantised = run(block, calibrating, arguments), run(block, quantised, arguments)
        block.to("cpu", dtype)
    return perplexity(model, dense, held_out, device), perplexity(model, quantised, held_out, device)


def block_arguments(model: QWenLMHeadModel, ids: Tensor, device: str) -> dict[str, Any]:
    """What the model passes to each of its layers beside the hidden states, for samples as long as `ids` (1, T)."""
    arguments: dict[str, Any] = {}

    def catch(block: nn.Module, inputs: tuple, kwargs: dict[str, Any]) -> None:
        arguments.update(kwargs)
        raise _Reached

    with hooked(model.transformer.h[0], catch, with_kwargs=True):
        model.transformer(ids, use_cache=False)

    def move(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(move(item) for item in value)
        return value.to(device) if isinstance(value, Tensor) else value

    return {name: move(value) for name, value in arguments.items()}


@contextmanager
def hooked(module: nn.Module, hook: Any, **options: Any) -> Iterator[None]:
    """Run the body with a hook before the module's forward; the hook may end it with _Reached."""
    handle = module.register_forward_pre_hook(hook, **options)
    try:
        yield
    except _Reached:
        pass
    finally:
        handle.remove()


def quantize_block(
    block: nn.Module, hidden: Tensor, arguments: dict[str, Any], settings: dict[str, Any], name: str
) -> None:
    """Replace a block's four Linears by Int4Linears, calibrated on its inputs `hidden` (N, T, C)."""
    after_attention = None
    for part, names in STAGES:
        if part == "mlp" and after_attention is None:
            after_attention = run(block, hidden, arguments, half_of("attn"))
        inputs = after_attention if part == "mlp" else hidden
        hessian = second_moments(block, names[-1], inputs, arguments, half_of(part))
        for linear_name in names:
            linear = block.get_submodule(linear_name)
            try:
                numbers, scales = quantize_weight(
                    linear.weight.float(), hessian, settings["bits"], settings["group_size"], settings["damp"]
                )
            except QwenError as error:
                raise QwenError(f"{name}, {linear_name}: {error}") from None
            replace(block, linear_name, official_tensors(numbers, scales, linear.bias, settings), settings)


def half_of(part: str) -> Any:
    """The half of a block that adds `attn` or `mlp` to the residual stream."""
    if part == "attn":
        return lambda block, x, arguments: x + block.attn(block.ln_1(x), **arguments)[0]
    return lambda block, x, arguments: x + block.mlp(block.ln_2(x))


def whole(block: nn.Module, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    return block(x, **arguments)


def run(block: nn.Module, hidden: Tensor, arguments: dict[str, Any], forward: Any = whole) -> Tensor:
    """The outputs (N, T, C) of a block, or of a half of it, in main memory."""
    device = block.ln_1.weight.device
    return torch.cat([forward(block, x.to(device), arguments).cpu() for x in hidden.split(batch_size(hidden))])


def batch_size(hidden: Tensor) -> int:
    return max(1, ROWS // hidden.shape[1])


def second_moments(block: nn.Module, name: str, hidden: Tensor, arguments: dict[str, Any], forward: Any) -> Tensor:
    """The sum of x x^T (in, in) over all inputs x of one of a block's Linears."""
    linear, device = block.get_submodule(name), block.ln_1.weight.device
    total = torch.zeros(linear.in_features, linear.in_features, device=device)

    def collect(module: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].flatten(0, -2).float()
        total.addmm_(x.T, x)
        raise _Reached

    for x in hidden.split(batch_size(hidden)):
        with hooked(linear, collect):
            forward(block, x.to(device), arguments)
    return total


def official_tensors(
    numbers: Tensor, scales: Tensor, bias: Tensor | None, settings: dict[str, Any]
) -> dict[str, Tensor]:
    """A layer's tensors as official checkpoints have them: zero points less one, a bias even where there is none."""
    bits, (columns, rows) = settings["bits"], numbers.shape
    zeros = torch.full((rows, scales.shape[0]), 2 ** (bits - 1) - 1, dtype=torch.uint8, device=numbers.device)
    return {
        "qweight": pack_words(numbers, bits),
        "qzeros": pack_words(zeros, bits).T.contiguous(),
        "scales": scales,
        "g_idx": group_index(columns, settings["group_size"]).to(numbers.device),
        "bias": (torch.zeros(rows, device=numbers.device) if bias is None else bias).half(),
    }


def replace(block: nn.Module, name: str, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Put an Int4Linear with these tensors in a Linear's place."""
    old = block.get_submodule(name)
    new = Int4Linear(old.in_features, old.out_features, settings["bits"], settings["group_size"])
    for key, tensor in tensors.items():
        setattr(new, key, tensor)
    block.set_submodule(name, new)


@torch.no_grad()
def perplexity(model: QWenLMHeadModel, hidden: Tensor, ids: Tensor, device: str) -> float:
    """exp of the mean next-token loss, from the last block's outputs (N, T, C) for `ids` (N, T)."""
    # Copies in float32: many processors multiply bf16 slowly.
    norm, head = (copy.deepcopy(module).to(device, torch.float32) for module in (model.transformer.ln_f, model.lm_head))
    total = 0.0
    for x, targets in zip(hidden.to(device), ids.to(device), strict=True):
        total += nn.functional.cross_entropy(head(norm(x[:-1])), targets[1:]).item()
    return math.exp(total / len(ids))


# ---- output ----


def partial_directory(output: Path) -> Path:
    return output.absolute().with_name(f".{output.absolute().name}.partial")


def open_partial(output: Path, settings: dict[str, Any]) -> Path:
    """The directory of an unfinished run, emptied where that run had other settings."""
    partial, note = partial_directory(output), json.dumps(settings, indent=2)
    stored = partial / "settings.json"
    if stored.is_file() and stored.read_text(encoding="utf-8") == note:
        done = len(list(partial.glob("layer-*.safetensors")))
        print(f"Going on with an unfinished run: {done} layers are done.", file=sys.stderr)
    else:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        stored.write_text(note, encoding="utf-8")
    return partial


def write_checkpoint(
    model: QWenLMHeadModel, tokenizer: QWenTokenizer, settings: dict[str, Any], partial: Path, output: Path
) -> None:
    """Write the checkpoint beside the partial results, then move it to its place at once."""
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            module.bias = module.bias.half()
            module.check(name)
    model.config.quantization_config = {
        "quant_method": "gptq", "bits": settings["bits"], "group_size": settings["group_size"], "sym": True,
        "desc_act": False, "damp_percent": settings["damp"], "static_groups": False, "true_sequential": True,
        "checkpoint_format": "gptq",
    }  # fmt: skip
    made = partial / "checkpoint"
    shutil.rmtree(made, ignore_errors=True)
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    for path in made.iterdir():
        shutil.copymode(partial / "settings.json", path)  # safetensors lets only their owner read what it writes
    if output.exists():
        output.rmdir()  # empty: Windows won't replace it
    os.replace(made, output)
    shutil.rmtree(partial)


def size(directory: Path) -> str:
    """The size of a checkpoint's weights, for people."""
    total = sum(path.stat().st_size for path in list_weight_files(directory))
    return f"{total / 1e9:.2f} GB" if total > 1e9 else f"{total / 1e6:.1f} MB"


if __name__ == "__main__":
    run_script(main)
