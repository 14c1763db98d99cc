"""Other engines on the same weights: llama.cpp through llama-cpp-python, and transformers' own Qwen2 class."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from export_gguf import write_gguf
from profiling.costs import Row
from qwen import QWenLMHeadModel
from qwen.checkpoint import check_architecture
from qwen.errors import QwenError
from qwen.qwen2 import qwen2_settings, qwen2_state
from utils import find_checkpoint

PEERS = ("llama.cpp", "transformers")
LLAMA_WORKER = Path(__file__).with_name("llama_cpp_worker.py")
INSTALL = "install it there with pip install llama-cpp-python, or name another interpreter with --peer-python"


# ---- llama.cpp ----


def check_llama_cpp(python: str) -> None:
    """QwenError if that interpreter is missing or has no llama-cpp-python."""
    try:
        done = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise QwenError(f"--peer-python {python} can't be run ({error.strerror}): give a Python interpreter") from None
    if done.returncode:
        raise QwenError(f"--peer llama.cpp: {python} has no package llama-cpp-python: {INSTALL}")


def llama_cpp_plan(row: Row) -> tuple[str, str, str] | None:
    """(precision of the GGUF file, llama.cpp's quantisation or "", type of keys and values); None: no equal there."""
    if row.kv_bits or row.dtype not in ("bf16", "fp32"):
        return None
    return row.dtype, {0: "", 4: "q4_0", 8: "q8_0"}[row.bits], row.dtype


def prepare_gguf(checkpoint: str, args: argparse.Namespace, row: Row, folder: Path, python: str) -> Path:
    """The GGUF file for a row, written to `folder` if it is not there or older than the checkpoint.

    Quantised ones are made by llama.cpp's own quantiser; output and embedding stay bf16, as in a GPTQ checkpoint.
    """
    directory = find_checkpoint(checkpoint, args.hub, args.revision)
    if check_architecture(directory).get("quantization_config"):
        raise QwenError(
            f"--peer llama.cpp starts from unquantised weights, and {directory} is quantised: give the unquantised one "
            "with -c, and this one with --int4-checkpoint or --int8-checkpoint"
        )
    precision, quantization, _ = llama_cpp_plan(row)
    name = "-".join(directory.absolute().parts[-2:])
    plain, stamp = folder / f"{name}-{precision}.gguf", (directory / "config.json").stat().st_mtime
    folder.mkdir(parents=True, exist_ok=True)
    if not plain.is_file() or plain.stat().st_mtime < stamp:
        print(f"Writing {plain} for llama.cpp ...", file=sys.stderr)
        write_gguf(directory, plain, precision.replace("fp", "f"))
    if not quantization:
        return plain
    quantized = folder / f"{name}-{quantization}.gguf"
    if not quantized.is_file() or quantized.stat().st_mtime < stamp:
        partial_file = quantized.with_suffix(".partial")
        job = {"source": str(plain), "model": str(partial_file), "quantize": quantization, "keep": precision}
        run_llama_cpp(job, python)
        partial_file.replace(quantized)
    return quantized


def run_llama_cpp(job: dict, python: str) -> dict:
    """One job of llama_cpp_worker.py in a fresh process; its JSON, or {} from the quantiser."""
    done = subprocess.run([python, str(LLAMA_WORKER), json.dumps(job)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise QwenError(f"llama.cpp failed on {job['model']} (status {done.returncode}): its message is above")
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if lines else {}


# ---- transformers ----


def as_qwen2(model: QWenLMHeadModel) -> Qwen2ForCausalLM:
    """The same weights, shared and not copied, in transformers' Qwen2 class: equal up to `seq_length` tokens."""
    try:
        sizes = Qwen2Config(**qwen2_settings(model.config), attn_implementation=model.config._attn_implementation)
    except QwenError as error:
        raise QwenError(f"--peer transformers: {error}") from None
    with torch.device("meta"):
        peer = Qwen2ForCausalLM(sizes)
    peer.load_state_dict(qwen2_state(model.named_parameters()), strict=True, assign=True)
    # Its rotary buffers are no part of a state dict: a new module computes them on the device.
    peer.model.rotary_emb = type(peer.model.rotary_emb)(config=sizes).to(model.device)
    return peer.eval()


def has_transformers_peer(row: Row) -> bool:
    """Whether transformers runs this row's precision without further packages."""
    return not row.bits and not row.kv_bits
