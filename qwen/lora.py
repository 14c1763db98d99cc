"""LoRA adapters: loading them, and putting them on Int4 layers. Imported only where peft is needed."""

import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners import lora
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from .chatml import complete_eos_ids
from .errors import QwenError, first_line
from .int4 import Int4Linear
from .tokenization_qwen import VOCAB_FILE, QWenTokenizer


class Int4LoraLinear(lora.Linear):
    """An adapter on a layer that stays as it is: 4 or 8 bits, and not to be merged into."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        if config.use_dora:
            raise QwenError(
                "DoRA needs weights that can be normed: on Int4 use plain LoRA, or the unquantised checkpoint"
            )
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, *args: Any, **kwargs: Any) -> None:
        raise QwenError("an adapter can't be merged into quantised weights: merge it onto the unquantised checkpoint")


def support_int4(config: LoraConfig) -> LoraConfig:
    """The same config, which now also knows Int4Linear; PEFT doesn't save this, so it is needed at loading too."""
    config._register_custom_module({Int4Linear: Int4LoraLinear})
    return config


def load_adapter(
    directory: Path, model: PreTrainedModel, tokenizer: QWenTokenizer, base: str
) -> tuple[PeftModel, QWenTokenizer]:
    """A loaded model with an adapter on it; the adapter's own tokenizer and generation settings win.

    Raises:
        QwenError: the adapter is damaged, or of another model than `base`, as the message calls it.
    """
    if (directory / VOCAB_FILE).is_file():
        tokenizer = AutoTokenizer.from_pretrained(directory)
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
        complete_eos_ids(model.generation_config)
    try:
        config = PeftConfig.from_pretrained(directory)
        if isinstance(config, LoraConfig):
            support_int4(config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a name that it is leaving
            return PeftModel.from_pretrained(model, directory, config=config).eval(), tokenizer
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # no weights, damaged, of another size
        reason = first_line(error)[:160]
        raise QwenError(f"the adapter {directory} does not fit onto {base} ({reason}): save it again") from error
