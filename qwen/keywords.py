"""Keyword arguments of `from_pretrained` as they were published over the years, put into today's, or refused."""

import os
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.utils import is_flash_attn_2_available

from .configuration_qwen import DTYPES, read_dtype, torch_reads
from .errors import QwenError
from .hardware import explain_missing_gpu

HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
WITHOUT_EFFECT = (  # downloads always go on; the others chose between kernels, and hid a progress bar or a symlink
    "resume_download", "local_dir_use_symlinks", "disable_exllama", "use_exllama", "use_cache_kernel", "use_triton",
)  # fmt: skip
ALREADY = "is quantised already (GPTQ): leave {name} out, or take the unquantised checkpoint"


def translate_keywords(kwargs: dict[str, Any], source: str | os.PathLike) -> None:
    """Put the keywords for loading the model `source` into today's, in place.

    Raises:
        QwenError: they ask for what is not there: a GPU, a package, or a quantisation that contradicts the files.
    """
    translate_hub_keywords(kwargs)
    translate_dtype(kwargs)
    translate_attention(kwargs)
    translate_quantization(kwargs, source)
    if kwargs.get("device_map") is not None:
        check_device_map(kwargs["device_map"])


def translate_hub_keywords(kwargs: dict[str, Any]) -> None:
    """The part that models, tokenizers and configs have in common."""
    for name in WITHOUT_EFFECT:
        kwargs.pop(name, None)
    token = kwargs.pop("use_auth_token", None)
    if token is not None:
        kwargs.setdefault("token", token)


def translate_dtype(kwargs: dict[str, Any]) -> None:
    """bf16=True and its kin, and texts, to `dtype`.

    AutoModel writes keywords that config.json knows into the config before the model sees them: look at both places.
    """
    config = kwargs.get("config")
    for name in ("torch_dtype", "dtype"):
        if name in kwargs:
            kwargs[name] = read_dtype(kwargs[name])
    for name, dtype in DTYPES.items():
        asked = kwargs.pop(name, False) or getattr(config, name, False)
        if asked and "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", dtype)
        if hasattr(config, name):
            setattr(config, name, False)  # done: a saved copy must not force its type on whoever loads it


def translate_attention(kwargs: dict[str, Any]) -> None:
    """use_flash_attn=True to `attn_implementation`, where the package is installed."""
    use_flash_attn = kwargs.pop("use_flash_attn", getattr(kwargs.get("config"), "use_flash_attn", "auto"))
    if use_flash_attn is True and "attn_implementation" not in kwargs:
        if is_flash_attn_2_available():
            kwargs["attn_implementation"] = "flash_attention_2"
        else:
            warnings.warn("use_flash_attn=True: flash_attn is not installed here, using PyTorch's SDPA", stacklevel=5)


def translate_quantization(kwargs: dict[str, Any], source: str | os.PathLike) -> None:
    """load_in_8bit=True and its kin to a `quantization_config`; beside a GPTQ checkpoint GPTQ's own is left out."""
    loads = {name: kwargs.pop(name, None) for name in ("load_in_8bit", "load_in_4bit")}
    name = next((name for name, asked in loads.items() if asked), "quantization_config")
    more = {key: kwargs.pop(key) for key in list(kwargs) if key.startswith(("bnb_4bit_", "llm_int8_"))}
    if any(loads.values()):
        kwargs["quantization_config"] = BitsAndBytesConfig(**{key: True for key in loads if loads[key]}, **more)
    asked = kwargs.get("quantization_config")
    if asked is None:
        return
    method = asked.get("quant_method") if isinstance(asked, dict) else getattr(asked, "quant_method", None)
    method = str(getattr(method, "value", method))
    stored = stored_quantization(kwargs, source)
    if stored is not None and torch_reads(stored):
        if "gptq" not in method:
            raise QwenError(f"{source} {ALREADY.format(name=name)}")
        del kwargs["quantization_config"]  # PyTorch's kernels have nothing to choose
    elif stored is None and "gptq" in method:
        raise QwenError(
            f"{source} is not quantised, and quantization_config asks for GPTQ: python quantize.py -c {source} -o DIR "
            "writes a quantised one"
        )
    elif method == "bitsandbytes" and find_spec("bitsandbytes") is None:
        raise QwenError(f"{name} needs the package bitsandbytes: pip install bitsandbytes")


def stored_quantization(kwargs: dict[str, Any], source: str | os.PathLike) -> dict[str, Any] | None:
    """How a checkpoint's files are quantised, as config.json says it; None if they are not."""
    if isinstance(config := kwargs.get("config"), PreTrainedConfig):
        found = getattr(config, "quantization_config", None)
    else:
        hub = {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}
        found = PreTrainedConfig.get_config_dict(source, **hub)[0].get("quantization_config")
    return found if found is None or isinstance(found, dict) else found.to_dict()


def check_device_map(device_map: Any) -> None:
    """QwenError if a device map names a kind of placing that there is none of, or a GPU that is not here."""
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return
    if isinstance(device_map, (str, int, torch.device)):
        device_map = {"": device_map}
    elif not isinstance(device_map, dict):
        raise QwenError(f'device_map is {device_map!r}: write a text such as "auto", or a dict')
    gpu = getattr(torch.accelerator.current_accelerator(), "type", "cuda")  # the kind that a bare number counts
    for place in set(device_map.values()) - {"disk"}:
        try:
            device = torch.device(gpu, place) if isinstance(place, int) else torch.device(place)
        except (RuntimeError, TypeError):
            raise QwenError(
                f'device_map names {place!r}: write "auto", "cpu", "cuda", "cuda:1", or a dict of modules and devices'
            ) from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise QwenError(f'device_map names {place!r}: {explain_missing_gpu()}; device_map="cpu" runs without')
