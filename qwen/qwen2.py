"""Qwen-7B in the layout of Qwen2 and back: names, tensors and settings. Within `seq_length` both are the same model.

    Qwen (transformer.h.N.)        Qwen2 (model.layers.N.)
    ln_1, ln_2                     input_layernorm, post_attention_layernorm
    attn.c_attn                    self_attn.q_proj, k_proj, v_proj (a third of the outputs each)
    attn.c_proj                    self_attn.o_proj
    mlp.w2, mlp.w1, mlp.c_proj     mlp.gate_proj, up_proj, down_proj

GPTQ tensors (int4.py) are cut alike: outputs are their last dimension, and `g_idx`, which has none, goes to all three.
Only dynamic NTK, logn and window attention, which begin beyond `seq_length`, have no place in Qwen2.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .configuration_qwen import QWenConfig
from .errors import QwenError
from .modeling_qwen import dynamic_ntk_alpha

Named = list[tuple[str, Tensor]]

OUTER_NAMES = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.up_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}
FUSED, PARTS = "attn.c_attn", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OLD_BUFFERS = (
    "rotary_emb.inv_freq",
    "attn.rotary_emb.inv_freq",
    "attn.bias",
    "attn.masked_bias",
)  # of early releases; computed, not learnt
OUTPUTS_LAST = ("qweight", "qzeros", "scales")


# ---- to Qwen2 ----


def to_qwen2(name: str, tensor: Tensor) -> Named:
    """The tensors under Qwen2's names of one of Qwen's: three views for c_attn, none for what Qwen2 goes without.

    Raises:
        QwenError: the tensor has no place in Qwen2.
    """
    if name in OUTER_NAMES:
        return [(OUTER_NAMES[name], tensor)]
    layer, _, rest = name.removeprefix("transformer.h.").partition(".")
    module, _, kind = rest.rpartition(".")
    if rest in OLD_BUFFERS:
        return []
    prefix = f"model.layers.{layer}."
    if module == FUSED:
        return [(f"{prefix}{part}.{kind}", piece) for part, piece in zip(PARTS, thirds(kind, tensor), strict=True)]
    if module not in BLOCK_NAMES:
        raise QwenError(f"{name} is no tensor of Qwen-7B, and has no place in Qwen2: convert the original checkpoint")
    if kind == "bias":
        if tensor.any():
            raise QwenError(f"{name} is not zero, and Qwen2 has no such bias: this checkpoint can't be converted")
        return []  # Int4 checkpoints store zeros where a layer has no bias
    return [(f"{prefix}{BLOCK_NAMES[module]}.{kind}", tensor)]


def thirds(kind: str, tensor: Tensor) -> tuple[Tensor, ...]:
    """c_attn's outputs as those of q, k and v."""
    if kind == "g_idx":
        return tensor, tensor, tensor
    dim = tensor.dim() - 1 if kind in OUTPUTS_LAST else 0
    if tensor.shape[dim] % 3:
        raise QwenError(f"c_attn.{kind} is {tuple(tensor.shape)} and can't be cut in three: convert it unquantised")
    return tensor.chunk(3, dim)


def qwen2_state(state: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """A whole state dict, or `named_parameters`, under Qwen2's names; nothing is copied."""
    return dict(pair for name, tensor in state for pair in to_qwen2(name, tensor))


def fixed_rotary_base(config: QWenConfig, context: int) -> float:
    """RoPE's base with the factor that dynamic NTK has for prompts of `context` tokens, for engines without it.

    Raises:
        QwenError: the model was trained without dynamic NTK, or on more tokens.
    """
    if context < config.seq_length:
        raise QwenError(f"--context {context}: the model reads {config.seq_length} tokens as it is (seq_length)")
    if context > config.seq_length and not config.use_dynamic_ntk:
        raise QwenError(f"--context {context}: this checkpoint has no dynamic NTK, it reads {config.seq_length} tokens")
    alpha = dynamic_ntk_alpha(torch.tensor([context]), config.seq_length).item()
    return float(config.rotary_emb_base * alpha ** (config.kv_channels / (config.kv_channels - 2)))


def qwen2_settings(config: QWenConfig, context: int | None = None) -> dict[str, Any]:
    """The config.json of the same model in Qwen2's layout, RoPE stretched to `context` tokens where given.

    Raises:
        QwenError: the model has parts that Qwen2 lacks.
    """
    base = float(config.rotary_emb_base) if context is None else fixed_rotary_base(config, context)
    if not config.no_bias:
        raise QwenError("this checkpoint has biases that Qwen2 does not know (no_bias is false)")
    if not config.scale_attn_weights:
        raise QwenError("this checkpoint's attention is unscaled (scale_attn_weights is false), which Qwen2 can't be")
    settings = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": config.attn_dropout_prob,
        "dtype": str(config.dtype or torch.float32).removeprefix("torch."),
        "head_dim": config.kv_channels,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size // 2,
        "max_position_embeddings": context or config.seq_length,  # engines shall stop where the two begin to differ
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_attention_heads,
        "rms_norm_eps": config.layer_norm_epsilon,
        "rope_parameters": {"rope_theta": base, "rope_type": "default"},
        "rope_theta": base,  # where engines older than transformers 5 look
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }
    if quantization := config.to_dict().get("quantization_config"):
        settings["quantization_config"] = quantization
    return settings


# ---- and back ----


def qwen_sources(names: Iterable[str]) -> dict[str, list[str]]:
    """Which of Qwen2's tensors make up each of Qwen's: three for c_attn's, one for all others.

    Raises:
        QwenError: a name is not Qwen2's.
    """
    outer = {theirs: ours for ours, theirs in OUTER_NAMES.items()}
    inner = {theirs: ours for ours, theirs in BLOCK_NAMES.items()}
    sources: dict[str, list[str]] = {}
    for name in sorted(names):  # k, q, v: put in order below
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        module, _, kind = rest.rpartition(".")
        if name in outer:
            sources[outer[name]] = [name]
        elif module in PARTS:
            parts = [f"model.layers.{layer}.{part}.{kind}" for part in PARTS]
            sources[f"transformer.h.{layer}.{FUSED}.{kind}"] = parts
        elif module in inner:
            sources[f"transformer.h.{layer}.{inner[module]}.{kind}"] = [name]
        else:
            raise QwenError(f"{name} is no tensor of Qwen2, so the checkpoint is not one of that layout")
    if "lm_head.weight" not in sources and "transformer.wte.weight" in sources:  # tied
        sources["lm_head.weight"] = sources["transformer.wte.weight"]
    return sources


def join_parts(name: str, parts: list[Tensor]) -> Tensor:
    """One of Qwen's tensors out of what `qwen_sources` names."""
    kind = name.rpartition(".")[2]
    if len(parts) == 1 or kind == "g_idx":
        return parts[0]
    return torch.cat(parts, dim=parts[0].dim() - 1 if kind in OUTPUTS_LAST else 0)


def qwen_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The config.json in Qwen's layout of a Qwen2 model's.

    Raises:
        QwenError: the model has parts that Qwen-7B lacks.
    """
    heads = settings["num_attention_heads"]
    if settings.get("num_key_value_heads", heads) != heads:
        raise QwenError(
            f"it has {settings['num_key_value_heads']} key-value heads for {heads} heads, and Qwen-7B's layout has no "
            "grouped heads: only checkpoints that were converted from Qwen's layout go back"
        )
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise QwenError(f"its RoPE is of the type {rope['rope_type']!r}, which Qwen-7B's layout can't say")
    if settings.get("use_sliding_window"):
        raise QwenError("it uses a sliding window (use_sliding_window), which Qwen-7B's layout can't say")
    made = {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "dtype": settings.get("dtype") or settings.get("torch_dtype") or "float32",
        "hidden_size": settings["hidden_size"],
        "initializer_range": settings.get("initializer_range", 0.02),
        "intermediate_size": 2 * settings["intermediate_size"],
        "kv_channels": settings.get("head_dim") or settings["hidden_size"] // heads,
        "layer_norm_epsilon": settings["rms_norm_eps"],
        "max_position_embeddings": settings["max_position_embeddings"],
        "no_bias": True,
        "num_attention_heads": heads,
        "num_hidden_layers": settings["num_hidden_layers"],
        "rotary_emb_base": rope.get("rope_theta") or settings.get("rope_theta", 10000.0),
        "seq_length": settings["max_position_embeddings"],
        "tie_word_embeddings": False,
        "vocab_size": settings["vocab_size"],
    }
    if quantization := settings.get("quantization_config"):
        made["quantization_config"] = quantization
    return made
