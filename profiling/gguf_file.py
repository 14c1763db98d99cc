"""Write a Qwen-7B checkpoint as a GGUF file, llama.cpp's format, to measure llama.cpp on the same weights.

The file holds weights and sizes and no vocabulary: the measurement feeds ids. llama.cpp calls that tokenizer "none".
"""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from safetensors import safe_open
from torch import Tensor

from qwen import QWenConfig
from qwen.checkpoint import list_weight_files
from qwen.errors import QwenError
from qwen.paths import replacing
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


def write_gguf(directory: Path, path: Path, precision: str) -> Path:
    """Write the checkpoint directory's weights to `path` in "fp32" or "bf16", norms and biases always in float32.

    One tensor is in memory at a time. The file appears whole or not at all.
    """
    gguf = import_gguf()
    with replacing(path) as draft:
        writer = gguf.GGUFWriter(draft, "qwen")
        add_sizes(writer, load_config(directory))
        matrix_type = {"fp32": gguf.GGMLQuantizationType.F32, "bf16": gguf.GGMLQuantizationType.BF16}[precision]

        # The header comes first in the file, so that every tensor's shape is told before any tensor is written.
        kinds = {}
        for name, tensor in read_tensors(directory):
            kinds[name] = matrix_type if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
            itemsize = 2 if kinds[name] == gguf.GGMLQuantizationType.BF16 else 4
            writer.add_tensor_info(name, tensor.shape, None, tensor.numel() * itemsize, raw_dtype=kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in read_tensors(directory):
            dtype = torch.bfloat16 if kinds[name] == gguf.GGMLQuantizationType.BF16 else torch.float32
            tensor = tensor.to(dtype).contiguous()
            writer.write_tensor_data(tensor.view(torch.uint8 if dtype == torch.bfloat16 else dtype).numpy())
        writer.close()
    return path


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
    writer.add_tokenizer_model("none")


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint of safetensors files under llama.cpp's names, one by one, in a fixed order."""
    for file in list_weight_files(directory):
        if file.suffix != ".safetensors":
            raise QwenError(f"{file} is no safetensors file: the peer llama.cpp is built from those only")
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                if (translated := gguf_name(name)) is not None:
                    yield translated, tensors.get_tensor(name)
