"""Write a Qwen-7B checkpoint as a GGUF file, llama.cpp's format, to measure llama.cpp on the same weights.

Matrices are bf16 or float32, or rounded to blocks of 32 as llama.cpp's own quantiser does it (Q4_0, Q8_0); embedding
and head stay bf16 then, as in a GPTQ checkpoint.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qwen import QWenConfig
from qwen.checkpoint import list_weight_files
from qwen.errors import QwenError
from qwen.fast_tokenizer import fast_tokenizer
from qwen.paths import replacing
from qwen.tokenization_qwen import QWenTokenizer
from utils import load_config

# llama.cpp's names for the tensors of a block; w2 is what Llama calls the gate.
BLOCK_NAMES = {
    "ln_1.weight": "attn_norm.weight",
    "attn.c_attn.weight": "attn_qkv.weight",
    "attn.c_attn.bias": "attn_qkv.bias",
    "attn.c_proj.weight": "attn_output.weight",
    "ln_2.weight": "ffn_norm.weight",
    "mlp.w2.weight": "ffn_gate.weight",
    "mlp.w1.weight": "ffn_up.weight",
    "mlp.c_proj.weight": "ffn_down.weight",
}
OTHER_NAMES = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
BLOCK_KINDS = {"q4_0": "Q4_0", "q8_0": "Q8_0"}
NORMAL, CONTROL, UNUSED = 1, 3, 5  # llama.cpp's kinds of tokens


def import_gguf() -> ModuleType:
    """The package gguf; QwenError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise QwenError("the peer llama.cpp needs the package gguf: pip install gguf") from error
    return gguf


def gguf_name(name: str) -> str | None:
    """llama.cpp's name of a checkpoint's tensor; None for a buffer of old releases that it does not have."""
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    layer, _, rest = name.removeprefix("transformer.h.").partition(".")
    return f"blk.{layer}.{BLOCK_NAMES[rest]}" if rest in BLOCK_NAMES else None


def write_gguf(directory: Path, path: Path, precision: str, tokenizer: QWenTokenizer | None = None) -> Path:
    """Write the checkpoint directory's weights to `path`, norms and biases always in float32.

    One tensor is in memory at a time. The file appears whole or not at all.

    Args:
        precision: "fp32", "bf16", "q8_0" or "q4_0".
        tokenizer: its vocabulary and chat template go into the file, which a server needs; without it ids are fed.

    Raises:
        QwenError: the package gguf is missing, the checkpoint is no safetensors file, or blocks don't fit its sizes.
    """
    gguf = import_gguf()
    with replacing(path) as draft:
        writer = gguf.GGUFWriter(draft, "qwen")
        config = load_config(directory)
        add_sizes(writer, config)
        if tokenizer is None:
            writer.add_tokenizer_model("none")
        else:
            add_vocabulary(writer, tokenizer, config.vocab_size)
        # The header comes first in the file, so that every tensor's shape is told before any tensor is written.
        for name, tensor in read_tensors(directory):
            kind = tensor_kind(gguf, name, tensor, precision)
            numbers, size = gguf.GGML_QUANT_SIZES[kind]  # of a block
            if tensor.shape[-1] % numbers:
                raise QwenError(f"{name} has {tensor.shape[-1]} inputs: {precision} takes multiples of {numbers}")
            writer.add_tensor_info(name, tensor.shape, None, tensor.numel() // numbers * size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in read_tensors(directory):
            kind = tensor_kind(gguf, name, tensor, precision)
            if kind == gguf.GGMLQuantizationType.BF16:
                writer.write_tensor_data(tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy())
            else:
                writer.write_tensor_data(gguf.quants.quantize(tensor.float().contiguous().numpy(), kind))
        writer.close()
    return path


def tensor_kind(gguf: ModuleType, name: str, tensor: Tensor, precision: str) -> Any:
    """The GGMLQuantizationType of a tensor, by its llama.cpp name, in a file of that precision."""
    kinds = gguf.GGMLQuantizationType
    if tensor.dim() == 1:
        return kinds.F32
    if precision in BLOCK_KINDS and name in OTHER_NAMES.values():
        return kinds.BF16
    return kinds[{"fp32": "F32", "bf16": "BF16", **BLOCK_KINDS}[precision]]


def add_sizes(writer, config: QWenConfig) -> None:  # noqa: ANN001
    """The sizes that llama.cpp's architecture "qwen" asks for; its feed-forward length counts both halves, as ours."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_rope_dimension_count(config.kv_channels)
    writer.add_rope_freq_base(float(config.rotary_emb_base))
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)


def add_vocabulary(writer, tokenizer: QWenTokenizer, size: int) -> None:  # noqa: ANN001
    """Tokens, merges and chat template; Qwen2 splits text by the same pattern. Rows without a token get a name."""
    fast = json.loads(fast_tokenizer(tokenizer).to_str())
    names = {rank: name for name, rank in fast["model"]["vocab"].items()}
    specials = {token["id"]: token["content"] for token in fast["added_tokens"]}
    kinds = [CONTROL if i in specials else NORMAL if i in names else UNUSED for i in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([specials.get(i) or names.get(i) or f"[unused {i}]" for i in range(size)])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in fast["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.im_end_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(str(tokenizer.chat_template))


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint of safetensors files under llama.cpp's names, one by one, in a fixed order."""
    for file in list_weight_files(directory):
        if file.suffix != ".safetensors":
            raise QwenError(f"{file} is no safetensors file: the peer llama.cpp is built from those only")
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                if (translated := gguf_name(name)) is not None:
                    yield translated, tensors.get_tensor(name)
