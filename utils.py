"""Load a checkpoint: the only place of the project that does. Everything else calls `load_model_and_tokenizer`.

model, tokenizer = load_model_and_tokenizer("Qwen/Qwen-7B-Chat")
"""

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import enable_progress_bars
from transformers import PreTrainedModel
from transformers.utils import logging

from demo_checkpoint import ensure_demo_checkpoint
from hub import HUBS, fetch_checkpoint
from qwen import QWenConfig, QwenError, QWenLMHeadModel, QWenTokenizer
from qwen.checkpoint import check_architecture, find_snapshot, read_json
from qwen.configuration_qwen import DTYPES, torch_reads
from qwen.cpu import load_kernels
from qwen.errors import first_line
from qwen.hardware import computes_bf16, describe_gpu_trouble, free_memory, hardware
from qwen.int4 import check_quantization, describe_kernel, replace_linears
from tensor_parallel import ParallelQWen, join_processes, leader_first, load_parallel

DEFAULT_CHECKPOINT = "Qwen/Qwen-7B-Chat"
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# ---- from the command line ----


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which checkpoint to load and how; `load_from_args` reads all of them."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-c", "--checkpoint-path", default=DEFAULT_CHECKPOINT, metavar="PATH",
        help="directory, hub name, LoRA adapter directory, or `demo` (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--cpu-only", action="store_true", help="run on the CPU even if there is a GPU")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (default: %(default)s)")
    group.add_argument("--num-gpus", type=int, metavar="N", help="spread the layers over N GPUs")
    group.add_argument(
        "--tp", type=int, metavar="N", help="cut every layer into N, a GPU for each: torchrun --nproc_per_node N ..."
    )
    group.add_argument(
        "--dtype", default="auto", choices=["auto", *DTYPES],
        help="precision (default: bf16 where the GPU, the processor or the compiled CPU kernels compute it, else fp16 "
        "on a GPU and fp32 on a CPU)",
    )  # fmt: skip
    group.add_argument(
        "--attn", default="sdpa", choices=["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"],
        help="attention implementation (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--no-graphs", action="store_true", help="NVIDIA GPUs: don't record the steps of replies as CUDA graphs"
    )
    group.add_argument("--hub", default=HUBS[0], choices=HUBS, help="where hub names are looked up")
    group.add_argument("--revision", help="branch, tag or commit of a hub checkpoint")


def load_from_args(args: argparse.Namespace) -> tuple[QWenLMHeadModel, QWenTokenizer]:
    """`load_model_and_tokenizer` with what `add_model_arguments` parsed."""
    if args.cpu_only and (args.num_gpus or args.device not in ("auto", "cpu")):
        raise QwenError("--cpu-only contradicts --device and --num-gpus: leave one of them out")
    if args.tp and (args.num_gpus or args.device != "auto"):
        raise QwenError("--tp chooses the devices itself: leave --num-gpus and --device out")
    model, tokenizer = load_model_and_tokenizer(
        args.checkpoint_path,
        device="cpu" if args.cpu_only else args.device,
        dtype=args.dtype,
        attn=args.attn,
        hub=args.hub,
        revision=args.revision,
        num_gpus=args.num_gpus,
        tp=args.tp,
    )
    model.graphs = not args.no_graphs
    return model, tokenizer


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point and exit: a user's mistake ends in one sentence and status 1, Ctrl-C in status 130."""
    program = Path(sys.argv[0]).name
    if sys.stderr is None or not sys.stderr.isatty():
        logging.disable_progress_bar()  # of reading weights, which in a pipe is litter
        enable_progress_bars()  # of downloads, which the line before switched off as well
    try:
        hardware()  # QWEN_HARDWARE holds for all that follows, and a mistake in it is told before anything else
        status = main()
        sys.stdout.flush()  # here, where a closed pipe can still be caught
    except QwenError as error:
        sys.exit(f"{program}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more on exit
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(f"{program}: error: the disk is full ({error.filename or 'no file named'}): free some space")
    sys.exit(status or 0)


# ---- loading ----


def load_model_and_tokenizer(
    path: str | os.PathLike = DEFAULT_CHECKPOINT,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attn: str = "sdpa",
    hub: str = HUBS[0],
    revision: str | None = None,
    num_gpus: int | None = None,
    tp: int | None = None,
) -> tuple[QWenLMHeadModel, QWenTokenizer]:
    """Load a checkpoint for inference.

    Args:
        path: a directory, a hub name, a PEFT adapter directory, or `demo`.
        device: "auto" takes one GPU if the weights fit, else all of them, else the CPU.
        dtype: "auto" is the best of the device, see `choose_dtype`.
        attn: one of transformers' attention implementations.
        num_gpus: spread the layers over that many GPUs, see `gpu_device_map`.
        tp: cut every layer into so many slices, one for each process that torchrun has started. Returns in the first
            of them only: the others follow it (see tensor_parallel.py).

    Raises:
        QwenError: the checkpoint, the hub, the device or an option is at fault; the message says what to do.
    """
    tp = None if tp == 1 else tp
    if tp is not None:
        join_processes(tp, str(device))
        with leader_first():
            check_splittable(find_checkpoint(path, hub, revision))
        device = "auto"
    directory = find_checkpoint(path, hub, revision)
    if (directory / "adapter_config.json").is_file():
        return _load_adapter(directory, device, dtype, attn, hub, num_gpus)
    check_loadable(directory)
    config = load_config(directory)
    # Before the weights: a missing vocabulary should not cost minutes.
    tokenizer = QWenTokenizer.from_pretrained(directory)
    if (last := max(tokenizer.decoder)) >= config.vocab_size:
        raise QwenError(
            f"{directory / 'qwen.tiktoken'} has ids up to {last}, and the model has only {config.vocab_size} rows "
            "(vocab_size in config.json): the two are of different checkpoints"
        )
    if num_gpus is not None:
        placement: Any = gpu_device_map(num_gpus, config, available=torch.cuda.device_count())
        dtype = choose_dtype("cuda", dtype)
    else:
        device = choose_device(device)
        dtype = choose_dtype(device, dtype, plain=tp is None)
        placement = place_on_gpus(config, dtype) if device == "cuda" and tp is None else {"": device}
    if placement == {"": "cpu"}:
        check_memory(directory, config, dtype)
    try:
        if tp is not None:
            return load_parallel(directory, config, tp, dtype, attn), tokenizer
        model = QWenLMHeadModel.from_pretrained(
            directory, dtype=dtype, device_map=placement, attn_implementation=attn,
            offload_buffers=True,  # of layers that stay on the CPU: the numbers of Int4 are buffers
        )  # fmt: skip
        if placement == {"": "cpu"}:
            model.use_cpu_kernels()
    except ImportError as error:  # names the package that the attention implementation needs
        raise QwenError(
            f"--attn {attn} is not available here ({first_line(error)}): install the package, or use sdpa"
        ) from error
    except torch.OutOfMemoryError as error:
        size = weight_bytes(config, dtype) / 2**30
        raise QwenError(
            f"{directory} takes {size:.1f} GiB in {DTYPE_NAMES[dtype]}, more than the GPU has free: "
            "spread it with --num-gpus, or run on the CPU with --cpu-only"
        ) from error
    return model.eval(), tokenizer


def load_model_on_gpus(path: str | os.PathLike, num_gpus: int = 2, **kwargs: Any) -> QWenLMHeadModel:
    """The model of `load_model_and_tokenizer`, its layers spread over `num_gpus` GPUs; 1 is one GPU."""
    return load_model_and_tokenizer(path, num_gpus=num_gpus, **kwargs)[0]


def load_model_for_training(
    directory: Path,
    dtype: torch.dtype,
    placement: dict[str, Any] | None,
    attn: str = "sdpa",
    quantization_config: Any = None,
    kind: type[PreTrainedModel] = QWenLMHeadModel,
) -> PreTrainedModel:
    """The model of a checkpoint directory in train mode, by default a language model; a reward model has one label.
    `placement` None leaves its place to ZeRO-3 or FSDP."""
    check_loadable(directory)
    config = load_config(directory)
    if placement is not None and str(placement.get("")) == "cpu" and quantization_config is None:
        check_memory(directory, config, dtype)
    more = {} if quantization_config is None else {"quantization_config": quantization_config}
    more |= {} if kind is QWenLMHeadModel else {"num_labels": 1}
    try:
        model = kind.from_pretrained(directory, dtype=dtype, device_map=placement, attn_implementation=attn, **more)
    except ImportError as error:
        raise QwenError(f"--attn {attn} or the quantisation is not available here: {first_line(error)}") from error
    except torch.OutOfMemoryError as error:
        raise QwenError(
            f"{directory} in {DTYPE_NAMES[dtype]} doesn't fit into the GPU's free memory: train an adapter "
            "(--use_lora, --q_lora), or share it between GPUs with ZeRO-3 or FSDP"
        ) from error
    return model.train()


def load_config(directory: Path) -> QWenConfig:
    """The config of a checkpoint directory; QwenError if a value in it is impossible."""
    try:
        return QWenConfig.from_pretrained(directory)
    except (ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:  # transformers' checks
        reason = " ".join(str(error).split())[:300]
        raise QwenError(f"{directory / 'config.json'} has a value that can't be used: {reason}") from error


def find_checkpoint(path: str | os.PathLike, hub: str = HUBS[0], revision: str | None = None) -> Path:
    """The local directory of a checkpoint: `demo` is built, a directory is itself, anything else comes from the hub."""
    if str(path) == "demo":
        return ensure_demo_checkpoint()
    if Path(path).is_file():
        raise QwenError(f"{path} is a file: give the checkpoint's directory")
    if Path(path).is_dir():
        return find_snapshot(Path(path))
    return fetch_checkpoint(str(path), hub, revision)


def check_loadable(directory: Path) -> None:
    """QwenError for a checkpoint of another architecture, or quantised in a way that can't be loaded here."""
    quantization = check_architecture(directory).get("quantization_config")
    if quantization:
        check_quantization(directory, quantization)


def check_splittable(directory: Path) -> None:
    """QwenError for a checkpoint that can't be cut into slices for tensor parallelism."""
    if (directory / "adapter_config.json").is_file():
        raise QwenError(f"{directory} is a LoRA adapter, which --tp can't split: merge it into its base model first")
    if check_architecture(directory).get("quantization_config"):
        raise QwenError(f"{directory} is quantised, which --tp can't split: use the unquantised checkpoint, or one GPU")
    load_config(directory)


def _load_adapter(
    directory: Path, device: str | torch.device, dtype: str | torch.dtype, attn: str, hub: str, num_gpus: int | None
) -> tuple[QWenLMHeadModel, QWenTokenizer]:
    """A PEFT adapter on the base model that it names."""
    try:
        from qwen.lora import load_adapter
    except ImportError:
        raise QwenError(f"{directory} is a PEFT adapter: pip install peft to load it") from None
    settings = read_json(directory / "adapter_config.json")
    base = settings.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise QwenError(f"{directory / 'adapter_config.json'} names no base model: set base_model_name_or_path in it")
    check_adapter_base(directory, base)
    dtype = choose_dtype("cuda" if num_gpus else choose_device(device), dtype, plain=False)
    try:
        model, tokenizer = load_model_and_tokenizer(
            base, device, dtype, attn, hub, revision=settings.get("revision"), num_gpus=num_gpus
        )
    except QwenError as error:
        raise QwenError(
            f"the base model of adapter {directory} does not load: {error}; where it is now can be set as "
            "base_model_name_or_path in adapter_config.json"
        ) from error
    return load_adapter(directory, model, tokenizer, base)


def check_adapter_base(directory: Path, base: str) -> None:
    """QwenError if an adapter's base is an adapter too, whose part would be lost, or is the adapter itself."""
    if Path(base).is_dir() and Path(base).resolve() == directory.resolve():
        raise QwenError(
            f"the adapter {directory} names itself as its base model: set base_model_name_or_path in its "
            "adapter_config.json to the checkpoint that it was trained on"
        )
    if (Path(base) / "adapter_config.json").is_file():
        raise QwenError(
            f"the base {base} of adapter {directory} is an adapter too: merge that one first (merge_lora.py), and name "
            "the result as base_model_name_or_path in adapter_config.json"
        )


# ---- precision and place ----


def choose_device(device: str | torch.device = "auto") -> str:
    """A device that is there: the given one, or the best; QwenError if the given one is not there."""
    best = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    if str(device) == "auto":
        if best == "cpu" and (trouble := describe_gpu_trouble()):
            warnings.warn(f"{trouble}; running on the CPU until then", stacklevel=3)
        return best
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise QwenError(f"--device {device} is no device: write auto, cpu, cuda, cuda:1 or mps") from None
    if wanted.type not in ("cpu", "meta"):
        count = torch.accelerator.device_count() if wanted.type == best else 0
        if (wanted.index or 0) >= count:
            found = (
                f"PyTorch finds {count} {wanted.type} device(s) here"
                if count
                else f"PyTorch finds no {wanted.type} device here"
            )
            if wanted.type == "cuda" and not count:
                found = describe_gpu_trouble() or found
            raise QwenError(f"--device {device}: {found}; use --device auto or --cpu-only")
    return str(device)


def choose_dtype(device: str, dtype: str | torch.dtype = "auto", plain: bool = True) -> torch.dtype:
    """The given precision, or the best of the device.

    That is bf16 where it is native; else fp16 on a GPU. On a CPU the compiled kernels (qwen/cpu.py) read bf16 faster
    than fp32; what they don't know, a model that is not `plain` (adapters, slices), is far faster in fp32.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise QwenError(f"--dtype {dtype} is unknown: choose auto, {', '.join(DTYPES)}")
    on_cpu = device.split(":")[0] == "cpu"
    if computes_bf16(device) or (on_cpu and plain and load_kernels()):
        return torch.bfloat16
    return torch.float32 if on_cpu else torch.float16


def weight_bytes(config: QWenConfig, dtype: torch.dtype) -> int:
    """Size of the model's weights in bytes."""
    with torch.device("meta"):
        model = QWenLMHeadModel(config).to(dtype)
    if isinstance(quantization := getattr(config, "quantization_config", None), dict) and torch_reads(quantization):
        replace_linears(model, quantization)
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in (*model.parameters(), *model.buffers()))


def check_memory(directory: Path, config: QWenConfig, dtype: torch.dtype) -> None:
    """QwenError if a model's weights are more than the main memory that is free: the system would end the process."""
    needed, free = weight_bytes(config, dtype), free_memory()
    if free is not None and needed > free:
        smaller = "" if dtype.itemsize == 2 else "bf16, or "
        raise QwenError(
            f"{directory} takes {needed / 2**30:.1f} GiB in {DTYPE_NAMES.get(dtype, dtype)}, and only "
            f"{free / 2**30:.1f} GiB of main memory are free: close other programs, or take {smaller}a quantised "
            "checkpoint such as Qwen/Qwen-7B-Chat-Int4"
        )


def place_on_gpus(config: QWenConfig, dtype: torch.dtype) -> dict[str, int] | str:
    """One GPU if the weights and a tenth more fit into its free memory; else all; else accelerate's "auto", which
    puts on the CPU what fits nowhere else."""
    needed = 1.1 * weight_bytes(config, dtype)
    free = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
    roomiest = max(range(len(free)), key=free.__getitem__)
    if free[roomiest] > needed:
        return {"": roomiest}
    if len(free) > 1 and min(free) * len(free) > needed:
        return gpu_device_map(len(free), config)
    return "auto"


def gpu_device_map(num_gpus: int, config: QWenConfig, available: int | None = None) -> dict[str, int]:
    """Which GPU holds which module: consecutive layers on each, evened out by size.

    The first GPU also holds the embedding and the last the head, each as large as some three layers of Qwen-7B, so
    these two get fewer layers; every GPU gets at least one.

    Raises:
        QwenError: `num_gpus` is below 1, above the number of layers, or above `available`.
    """
    layers = config.num_hidden_layers
    if not 1 <= num_gpus <= layers:
        raise QwenError(f"--num-gpus {num_gpus}: a model of {layers} layers runs on 1 to {layers} GPUs")
    if available is not None and num_gpus > available:
        raise QwenError(f"--num-gpus {num_gpus}: PyTorch finds {available} here; lower it, or use --cpu-only")
    width = config.num_attention_heads * config.kv_channels
    layer_size = 4 * config.hidden_size * width + 3 * config.hidden_size * config.intermediate_size // 2
    table_in_layers = config.vocab_size * config.hidden_size / layer_size
    load = [1.0] * num_gpus
    load[0] += table_in_layers
    load[-1] += table_in_layers
    counts = [1] * num_gpus
    for _ in range(layers - num_gpus):
        lightest = min(range(num_gpus), key=load.__getitem__)
        load[lightest] += 1
        counts[lightest] += 1

    owners = [gpu for gpu, count in enumerate(counts) for _ in range(count)]
    device_map = {"transformer.wte": 0, "transformer.drop": 0}
    device_map |= {f"transformer.h.{layer}": gpu for layer, gpu in enumerate(owners)}
    return device_map | {"transformer.ln_f": num_gpus - 1, "lm_head": num_gpus - 1}


def describe_placement(model: QWenLMHeadModel) -> str:
    """A line for people: precision, device and attention of a loaded model."""
    devices = sorted({str(device) for device in getattr(model, "hf_device_map", {"": model.device}).values()})
    places = ", ".join(f"cuda:{device}" if device.isdigit() else device for device in devices)
    if isinstance(model, ParallelQWen):
        places = f"{dist.get_world_size()} processes ({model.device.type})"
    parts = [f"{DTYPE_NAMES.get(model.dtype, model.dtype)} on {places}",
             f"{model.config._attn_implementation} attention", describe_kernel(model)]  # fmt: skip
    return ", ".join(part for part in parts if part)
