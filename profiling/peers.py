"""Other engines on the same weights: llama.cpp through llama-cpp-python, and transformers' own Qwen2 class."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from profiling.costs import Row
from profiling.gguf_file import write_gguf
from qwen import QWenConfig, QWenLMHeadModel
from qwen.checkpoint import check_architecture
from qwen.errors import QwenError
from utils import find_checkpoint

PEERS = ("llama.cpp", "transformers")
LLAMA_WORKER = Path(__file__).with_name("llama_cpp_worker.py")
INSTALL = "install it there with pip install llama-cpp-python, or name another interpreter with --peer-python"

QWEN2_NAMES = {
    "attn.c_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.up_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
}


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
        write_gguf(directory, plain, precision)
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
    config: QWenConfig = model.config
    if not config.no_bias:
        raise QwenError("--peer transformers: this checkpoint has biases that Qwen2 does not know (no_bias is false)")
    sizes = Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size // 2,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        head_dim=config.kv_channels,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.layer_norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": float(config.rotary_emb_base)},
        tie_word_embeddings=False,
        attn_implementation=config._attn_implementation,
    )
    with torch.device("meta"):
        peer = Qwen2ForCausalLM(sizes)
    peer.load_state_dict(qwen2_weights(model), strict=True, assign=True)
    # Its rotary buffers are no part of a state dict: a new module computes them on the device.
    peer.model.rotary_emb = type(peer.model.rotary_emb)(config=sizes).to(model.device)
    return peer.eval()


def qwen2_weights(model: QWenLMHeadModel) -> dict[str, torch.Tensor]:
    """Qwen's state dict under Qwen2's names; c_attn is cut into views of q, k and v."""
    state = {
        "model.embed_tokens.weight": model.transformer.wte.weight,
        "model.norm.weight": model.transformer.ln_f.weight,
        "lm_head.weight": model.lm_head.weight,
    }
    for index, block in enumerate(model.transformer.h):
        prefix = f"model.layers.{index}."
        for name, parameter in block.named_parameters():
            module, _, kind = name.rpartition(".")
            if module == "attn.c_attn":
                for part, tensor in zip("qkv", parameter.chunk(3), strict=True):
                    state[f"{prefix}self_attn.{part}_proj.{kind}"] = tensor
            else:
                state[f"{prefix}{QWEN2_NAMES[module]}.{kind}"] = parameter
    return state


def has_transformers_peer(row: Row) -> bool:
    """Whether transformers runs this row's precision without further packages."""
    return not row.bits and not row.kv_bits
