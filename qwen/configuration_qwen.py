"""QWenConfig: the fields of an official Qwen-7B `config.json`, and nothing that no code reads.

Field names are the checkpoint's own, so the file rules: there is no `rope_scaling` and no second place for a setting.
"""

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .checkpoint import check_model_type, other_weights_name, with_quantization
from .errors import QwenError

# The `quant_method`, in memory, of GPTQ checkpoints that PyTorch alone can run (int4.py). In config.json it is "gptq",
# and when transformers reads that it asks for other packages.
TORCH_GPTQ = "gptq_torch"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GROUP_SIZES = (32, 64, 128, 256)
CODE_FIELDS = (
    "custom_pipelines",
)  # of config.json: classes in the files of the checkpoint, which pipeline() would run


GENERATION_FIELDS = (  # settings of generate() that older releases of transformers kept in config.json
    "max_length", "min_length", "max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p",
    "min_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "num_beams",
    "num_beam_groups", "early_stopping", "diversity_penalty", "num_return_sequences", "bad_words_ids",
    "suppress_tokens", "begin_suppress_tokens", "stop_strings", "forced_bos_token_id", "forced_eos_token_id",
    "cache_implementation", "output_scores", "output_attentions", "remove_invalid_values",
    "exponential_decay_length_penalty", "encoder_no_repeat_ngram_size", "renormalize_logits",
)  # fmt: skip


def read_dtype(dtype: Any) -> Any:
    """A precision under any of its names ("bf16", "torch.bfloat16"); what is no text, or "auto", as it is."""
    if dtype is None or isinstance(dtype, torch.dtype | dict) or dtype == "auto":  # a dict says it by part of the model
        return dtype
    name = str(dtype).removeprefix("torch.")
    found = DTYPES.get(name, getattr(torch, name, None))
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise QwenError(f"dtype is {dtype!r}: write auto, bfloat16, float16 or float32")
    return found


LARGEST = {  # far beyond any model of this kind: what is more would hang or exhaust memory
    "vocab_size": 10**7, "hidden_size": 10**6, "num_hidden_layers": 1000, "num_attention_heads": 10**4,
    "kv_channels": 10**5, "intermediate_size": 10**7, "max_position_embeddings": 10**9, "seq_length": 10**9,
}  # fmt: skip


def as_meant(value: Any, kind: Any) -> Any:
    """A value of config.json in the type of its field, if another JSON type says the same: 1 for 1.0, 1e-6 as text."""
    if isinstance(value, str) and kind in (int, int | None, float, bool, int | float):
        try:
            value = json.loads(value.lower())
        except ValueError:
            return value
    if kind is float and type(value) is int:
        return float(value)
    if kind in (int, int | None) and type(value) is float and value.is_integer():
        return int(value)
    return bool(value) if kind is bool and value in (0, 1) else value


def torch_reads(quantization: dict[str, Any]) -> bool:
    """Whether PyTorch alone can run a checkpoint with this `quantization_config`."""
    return (
        quantization.get("quant_method", "gptq") in ("gptq", TORCH_GPTQ)
        and quantization.get("bits") in (4, 8)
        and quantization.get("group_size") in GROUP_SIZES
        and quantization.get("sym", True) is True
        and not quantization.get("desc_act")
        and quantization.get("checkpoint_format", "gptq") in ("gptq", "gptq_v2", None, "")
    )


@strict  # values of a wrong type are refused when they are set
class QWenConfig(PreTrainedConfig):
    """Sizes and switches of a Qwen-7B model; the defaults are Qwen-7B's own.

    Fields whose name does not say it all:
        intermediate_size: twice the width of the MLP, as in the official files (22016 means 11008).
        kv_channels: size of one attention head.
        seq_length: context length of training in tokens. Dynamic NTK and logn start beyond it. It has no default
            in the publisher's class, so `None` means: as long as `max_position_embeddings`.
        use_dynamic_ntk: stretch the RoPE base for prompts longer than `seq_length` (inference only).
        use_logn_attn: scale queries beyond `seq_length` by log(position) / log(seq_length) (inference only).
        local_attn: window attention (inference only). `False` is off, `True` is the ramp of `attention_windows`, a
            list gives each layer's window in tokens. The publisher reported results with it but no sizes.
        no_bias: whether c_proj, w1 and w2 go without bias; c_attn always has one.

    Other fields of official files (`bf16`, `use_flash_attn`, `onnx_safe`, ...) are kept and saved back.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    # The names of the first release (August 2023). transformers maps them in the constructor and as attributes.
    attribute_map: ClassVar[dict[str, str]] = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "ffn_hidden_size": "intermediate_size",
        "embd_pdrop": "emb_dropout_prob",
        "attn_pdrop": "attn_dropout_prob",
        "padded_vocab_size": "vocab_size",
        # transformers' caches ask for the head size under this name.
        "head_dim": "kv_channels",
    }

    # c_attn is q, k and v in one matrix: a plain column split would give one rank all of q. So its output is gathered,
    # every rank attends with all heads, and c_proj takes its own slice of them again.
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "h.*.attn.c_attn": "colwise_gather_output",
        "h.*.attn.c_proj": "rowwise_split_input",
        "h.*.mlp.w1": "colwise",
        "h.*.mlp.w2": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    }
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {
        "wte": "free_full_weight",
        "h.*": "free_full_weight",
        "ln_f": "keep_full_weight",
    }

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int = 128
    intermediate_size: int = 22016
    layer_norm_epsilon: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 8192
    seq_length: int | None = None
    rotary_emb_base: int | float = 10000
    rotary_pct: float = 1.0
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    local_attn: bool | list[int] = False
    no_bias: bool = True
    scale_attn_weights: bool = True
    attn_dropout_prob: float = 0.0
    emb_dropout_prob: float = 0.0
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.seq_length is None:
            self.seq_length = self.max_position_embeddings
        for name, most in LARGEST.items():
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}: it should be a number from 1 to {most:,}")
        if not 0 < self.rotary_emb_base < math.inf or not 0 <= self.layer_norm_epsilon < 1:
            raise ValueError(
                f"rotary_emb_base is {self.rotary_emb_base} and layer_norm_epsilon is {self.layer_norm_epsilon}: they "
                "should be like 10000 and 1e-6"
            )
        if self.rotary_pct != 1.0:
            raise ValueError(f"rotary_pct is {self.rotary_pct}: every released Qwen-7B rotates whole heads (1.0)")
        if isinstance(self.local_attn, list) and len(self.local_attn) != self.num_hidden_layers:
            raise ValueError(
                f"local_attn lists {len(self.local_attn)} windows for {self.num_hidden_layers} layers: give one a layer"
            )
        quantization = getattr(self, "quantization_config", None)
        if isinstance(quantization, dict) and torch_reads(quantization):
            self.quantization_config = {**quantization, "quant_method": TORCH_GPTQ}

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers, with AutoGPTQ's quantize_config.json, and the weights' name where it is unusual."""
        directory = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        settings, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        settings = {**settings, "transformers_weights": other_weights_name(directory)}
        return with_quantization(settings, directory), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, from numbers of either JSON type, and without what names code of the checkpoint's.

        Raises:
            QwenError: the settings are of another model that shares this one's model_type (Qwen-VL, Qwen-Audio).
        """
        check_model_type({"model_type": cls.model_type, **config_dict}, str(kwargs.get("name_or_path", "config.json")))
        config_dict = {name: value for name, value in config_dict.items() if name not in CODE_FIELDS}
        misplaced = [name for name in GENERATION_FIELDS if config_dict.pop(name, None) not in (None, False)]
        if misplaced:  # transformers would neither generate nor save with them
            warnings.warn(
                f"config.json: {', '.join(misplaced)} belong in generation_config.json, left out", stacklevel=2
            )
        for values in (config_dict, kwargs):
            values.update({name: read_dtype(values[name]) for name in ("dtype", "torch_dtype") if name in values})
        for name, kind in cls.__annotations__.items():
            if name in config_dict:
                config_dict[name] = as_meant(config_dict[name], kind)
        return super().from_dict(config_dict, **kwargs)

    def complete(self, directory: str | os.PathLike) -> None:
        """Add what `get_config_dict` finds in a directory beside config.json, which is all that AutoConfig reads."""
        self.transformers_weights = other_weights_name(Path(directory))
        if not getattr(self, "quantization_config", None) and (found := with_quantization({}, Path(directory))):
            self.quantization_config = QWenConfig(**found).quantization_config

    def to_dict(self) -> dict[str, Any]:
        return _with_published_method(super().to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        return _with_published_method(super().to_diff_dict())

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write config.json without the `auto_map` it was read with: the code that this names is not saved with it."""
        if self._auto_class is None:  # else transformers itself saves the code, having loaded it from the directory
            vars(self).pop("auto_map", None)
        vars(self).pop("transformers_weights", None)  # likewise
        super().save_pretrained(save_directory, **kwargs)

    @property
    def max_context_length(self) -> int:
        """Tokens that the model reads with sense: dynamic NTK carries Qwen-7B to four times its training length."""
        stretched = 4 * self.seq_length if self.use_dynamic_ntk else self.seq_length
        return max(stretched, self.max_position_embeddings)

    @property
    def attention_windows(self) -> list[int | None]:
        """Tokens that each layer looks back on, itself included; None is all of them.

        The ramp of `local_attn=True` has four steps, from half of `seq_length` in the lowest layers to all of it in
        the highest: low layers read near context (Qwen technical report, "Context Length Extension"), and four masks
        serve all layers.
        """
        if not self.local_attn:
            return [None] * self.num_hidden_layers
        if isinstance(self.local_attn, list):
            return list(self.local_attn)
        quarter = [4 * layer // self.num_hidden_layers for layer in range(self.num_hidden_layers)]
        return [self.seq_length // 2 + q * self.seq_length // 6 for q in quarter]


def _with_published_method(settings: dict[str, Any]) -> dict[str, Any]:
    quantization = settings.get("quantization_config")
    if quantization and quantization.get("quant_method") == TORCH_GPTQ:
        settings["quantization_config"] = {**quantization, "quant_method": "gptq"}
    return settings
