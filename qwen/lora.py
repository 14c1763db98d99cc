"""LoRA adapters: loading them, and putting them on Int4 layers. Imported only where peft is needed."""

import pickle
import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners import lora
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from .checkpoint import read_json
from .errors import QwenError, first_line
from .int4 import Int4Linear
from .settings import prepare
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
    directory: Path, model: PreTrainedModel, tokenizer: QWenTokenizer, base: str, trainable: bool = False
) -> tuple[PeftModel, QWenTokenizer]:
    """A loaded model with an adapter on it, to be trained on where `trainable`; the adapter's own tokenizer and
    generation settings win.

    Raises:
        QwenError: the adapter is damaged, or of another model than `base`, as the message calls it.
    """
    check_adapter_config(directory)
    if (directory / VOCAB_FILE).is_file():
        tokenizer = QWenTokenizer.from_pretrained(directory)
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
        prepare(model.generation_config, f"generation settings of {directory}")
    try:
        config = PeftConfig.from_pretrained(directory)
        if isinstance(config, LoraConfig):
            support_int4(config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a name that it is leaving
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # said by check_adapter_keys
            adapted = PeftModel.from_pretrained(model, directory, config=config, is_trainable=trainable)
            check_adapter_keys(directory, adapted, base)
            return adapted.train(trainable), tokenizer
    except QwenError:
        raise
    except pickle.UnpicklingError as error:
        raise QwenError(
            f"the adapter {directory} holds more than tensors in its .bin file, which is not unpickled because that "
            "could run code: save it as safetensors"
        ) from error
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        RuntimeError,
        SafetensorError,
    ) as error:  # no weights, damaged, of another size
        reason = first_line(error)[:160]
        raise QwenError(f"the adapter {directory} does not fit onto {base} ({reason}): save it again") from error


def check_adapter_config(directory: Path) -> dict[str, Any]:
    """The adapter_config.json of a directory; QwenError where it is damaged, or would have peft import a module."""
    path = directory / "adapter_config.json"
    settings = read_json(path)
    if not isinstance(settings.get("peft_type"), str):
        raise QwenError(f"{path} has no peft_type: it is damaged, or no adapter of peft's; save the adapter again")
    if settings.get("megatron_config"):
        raise QwenError(f"{path} has a megatron_config, for which peft would import a module that the file names")
    return settings


def check_adapter_keys(directory: Path, adapted: PeftModel, base: str) -> None:
    """QwenError unless the adapter's tensors are just those that belong onto this model: peft skips all others."""
    stored = set(load_peft_weights(str(directory), device="cpu"))
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    # Tables are saved along if they were resized, or if an adapter lies on them.
    tables = {
        f"base_model.model.{name}{layer}.weight"
        for name in ("transformer.wte", "lm_head")
        for layer in ("", ".base_layer")
    }
    missing, foreign = sorted(expected - stored), sorted(stored - expected - tables)
    if missing or foreign:
        raise QwenError(
            f"the adapter {directory} does not fit onto {base}: {len(foreign)} of its {len(stored)} tensors belong to "
            f"nothing there (the first: {(foreign or ['none'])[0]}), and {len(missing)} that the model takes are "
            f"missing (the first: {(missing or ['none'])[0]}); give the adapter's own base model"
        )
