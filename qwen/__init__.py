"""Qwen-7B for torch 2.13 and transformers 5: importing this package makes the Auto classes load Qwen natively.

    import qwen
    from transformers import AutoModelForCausalLM, AutoTokenizer

Code that a checkpoint directory brings along is never run, with `trust_remote_code` or without.
"""

import logging

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
)

from .classification import QWenForSequenceClassification, QWenForTokenClassification
from .configuration_qwen import QWenConfig
from .errors import QwenError
from .gate import guard_auto_classes
from .modeling_qwen import QWenLMHeadModel, QWenModel
from .tokenization_qwen import QWenTokenizer

# It warns at import of a package that only its 4-bit products on CPUs would use, and peft imports it wherever it is
# installed: so whoever imports peft, or transformers' trainer, imports this package first.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__all__ = [
    "QWenConfig",
    "QWenForSequenceClassification",
    "QWenForTokenClassification",
    "QWenLMHeadModel",
    "QWenModel",
    "QWenTokenizer",
    "QwenError",
]


class _TokenizerByNameOnly(PreTrainedConfig):
    """Stands in for QWenConfig when the tokenizer is registered.

    Registered under the real config, a checkpoint's own tokenizer code would win whenever `trust_remote_code=True`.
    Registered under another config, the class is found by the name in tokenizer_config.json, and then it always wins.
    """

    model_type = "qwen-tokenizer-by-name"


AutoConfig.register("qwen", QWenConfig, exist_ok=True)
AutoModel.register(QWenConfig, QWenModel, exist_ok=True)
AutoModelForCausalLM.register(QWenConfig, QWenLMHeadModel, exist_ok=True)
AutoModelForSequenceClassification.register(QWenConfig, QWenForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(QWenConfig, QWenForTokenClassification, exist_ok=True)
AutoTokenizer.register(_TokenizerByNameOnly, QWenTokenizer, exist_ok=True)
guard_auto_classes()
