"""What keeps transformers from running a checkpoint's own Python files, however it is asked to load one.

transformers prefers a directory's code over a registered class in some places: a tokenizer whose `tokenizer_class` it
does not know, processors, `custom_generate/generate.py`, pipelines named in config.json. Registration alone closes
only the others. So the Auto classes that look for such code ask here first whether the checkpoint is Qwen-7B's.
"""

import os
from functools import wraps
from typing import Any

import transformers
from transformers import AutoTokenizer, PreTrainedConfig

from .checkpoint import CODE_KEYWORDS
from .configuration_qwen import QWenConfig
from .keywords import HUB_KEYWORDS
from .tokenization_qwen import VOCAB_FILE, QWenTokenizer

ONLY_AUTO = (*CODE_KEYWORDS, "config", "use_fast", "tokenizer_type", "mistral_format")
GUARDED = ("AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor", "AutoVideoProcessor")


def is_qwen(source: str | os.PathLike, kwargs: dict[str, Any]) -> bool:
    """Whether a directory or hub name holds a Qwen-7B checkpoint, or at least its vocabulary."""
    if isinstance(kwargs.get("config"), QWenConfig):
        return True
    if os.path.isfile(os.path.join(source, kwargs.get("subfolder") or "", VOCAB_FILE)):
        return True
    try:
        hub = {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}
        settings, _ = PreTrainedConfig.get_config_dict(source, **hub)
    except (OSError, ValueError):  # no config.json, or a broken one: not for this package to say
        return False
    return settings.get("model_type") == QWenConfig.model_type


def guard_auto_classes() -> None:
    """Make the Auto classes of transformers load Qwen-7B's tokenizer from here, and never code from a checkpoint."""
    for name in GUARDED:
        auto = getattr(transformers, name)
        if getattr(auto, "is_dummy", False):  # for want of a package like torchvision: it loads nothing at all
            continue
        if not hasattr(auto.from_pretrained, "qwen_guard"):
            auto.from_pretrained = classmethod(_guarded(auto.from_pretrained.__func__, auto is AutoTokenizer))


def _guarded(load: Any, is_tokenizer: bool) -> Any:
    @wraps(load)
    def from_pretrained(cls: type, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        source = pretrained_model_name_or_path
        if is_qwen(source, kwargs):
            if is_tokenizer:
                own = {name: value for name, value in kwargs.items() if name not in ONLY_AUTO}
                return QWenTokenizer.from_pretrained(source, *args, **own)
            kwargs = {**kwargs, "trust_remote_code": False}
        return load(cls, source, *args, **kwargs)

    from_pretrained.qwen_guard = True
    return from_pretrained
