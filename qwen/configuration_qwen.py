"""QWenConfig: the fields of an official Qwen-7B `config.json`, and nothing that no code reads.

Field names are the checkpoint's own, so the file rules: there is no `rope_scaling` and no second place for a setting.
"""

import os
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


def read_dtype(dtype: Any) -> Any:
    """A precision under any of its names ("bf16", "torch.bfloat16"); what is no text, or "auto", as it is."""
    if not isinstance(dtype, str) or dtype == "auto":
        return dtype
    name = dtype.removeprefix("torch.")
    found = DTYPES.get(name, getattr(torch, name, None))
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise QwenError(f"dtype is {dtype!r}: write auto, bfloat16, float16 or float32")
    return found


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
        for values in (config_dict, kwargs):
            values.update({name: read_dtype(values[name]) for name in ("dtype", "torch_dtype") if name in values})
        for name, kind in cls.__annotations__.items():
            value = config_dict.get(name)
            if kind is float and type(value) is int:
                config_dict[name] = float(value)
            elif kind in (int, int | None) and type(value) is float and value.is_integer():
                config_dict[name] = int(value)
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
