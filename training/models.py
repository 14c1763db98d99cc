"""Models to train: loaded in the right precision and place, with adapters, and with settings that make them stop."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_pt_utils import get_model_param_count  # counts parameters that ZeRO-3 has split, too

from qwen import QWenLMHeadModel, QWenTokenizer
from qwen.chatml import DEFAULT_WINDOW
from qwen.checkpoint import check_architecture
from qwen.errors import QwenError
from utils import DTYPES, load_model_for_training

from .arguments import LoraArguments, Settings, is_pattern, is_sharded, stage


def load_model(settings: Settings, directory: Path, tokenizer: QWenTokenizer) -> nn.Module:
    """The model of `settings`, with an adapter where asked for, ready to be trained."""
    lora, training = settings.lora, settings.training
    quantization = nf4_config(training.precision) if lora.q_lora and not is_gptq(directory) else None
    model = load_model_for_training(
        directory,
        dtype=weight_dtype(settings),
        placement=None if is_sharded(training) else {"": training.device},
        attn=settings.model.attn,
        quantization_config=quantization,
    )
    if settings.data.stage == "sft":
        set_stop_ids(model, tokenizer)
    keep_settings_saveable(model)
    if lora.use_lora:
        model = add_adapter(model, lora)
    if stage(training) == 0:
        for parameter in model.parameters():
            if parameter.requires_grad:  # small steps vanish in the rounding of half precision
                parameter.data = parameter.data.float()
    return model


def weight_dtype(settings: Settings) -> torch.dtype:
    """Frozen weights are in the precision of the computation, and so are all where DeepSpeed keeps its own copies; all
    weights to be trained are in float32, and computed with in half precision."""
    half = settings.lora.use_lora or stage(settings.training) > 0
    return DTYPES[settings.training.precision if half else "fp32"]


def is_gptq(directory: Path) -> bool:
    return bool(check_architecture(directory).get("quantization_config"))


def check_source(directory: Path, lora: LoraArguments) -> None:
    """QwenError for a checkpoint that can't be trained in the way asked for."""
    if (directory / "adapter_config.json").is_file():
        raise QwenError(
            f"{directory} is an adapter: merge it (merge_lora.py) and train on, or go on with --resume_from_checkpoint"
        )
    if is_gptq(directory) and not lora.q_lora:
        raise QwenError(
            f"{directory} is quantised: train an adapter on it with --q_lora True, or give the unquantised one"
        )


def nf4_config(precision: str) -> Any:
    """bitsandbytes' 4-bit weights (Dettmers et al., 2023)."""
    if find_spec("bitsandbytes") is None:
        raise QwenError(
            "--q_lora True on an unquantised checkpoint needs the package bitsandbytes: pip install bitsandbytes, or "
            "give a GPTQ checkpoint such as Qwen/Qwen-7B-Chat-Int4, which needs nothing"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[precision],
    )  # fmt: skip


def add_adapter(model: QWenLMHeadModel, lora: LoraArguments) -> nn.Module:
    """The model with a LoRA adapter, alone to be trained."""
    try:
        from peft import LoraConfig, get_peft_model

        from qwen.lora import support_int4
    except ImportError:
        raise QwenError("--use_lora needs the package peft: pip install -r requirements_finetune.txt") from None
    targets, pattern = lora.lora_target_modules, is_pattern(lora.lora_target_modules[0])
    whole = lora.modules_to_save + (["wte", "lm_head"] if lora.train_embeddings else [])
    config = LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets[0] if pattern else targets,
        bias=lora.lora_bias,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        modules_to_save=sorted(set(whole)) or None,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, support_int4(config))
    except ValueError as error:
        raise QwenError(f"--lora_target_modules {' '.join(lora.lora_target_modules)}: {error}") from error


def keep_settings_saveable(model: QWenLMHeadModel) -> None:
    """Settings of sampling beside greedy ones change nothing, but can't be saved."""
    config = model.generation_config
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None


def set_stop_ids(model: QWenLMHeadModel, tokenizer: QWenTokenizer) -> None:
    """Make a base model's saved settings those of a chat model: what is trained here ends its turns in ChatML."""
    config = model.generation_config
    if getattr(config, "chat_format", None) == "chatml":
        return
    config.chat_format = "chatml"
    config.max_window_size = min(DEFAULT_WINDOW, model.config.seq_length)
    config.stop_words_ids = None
    config.eos_token_id = [tokenizer.im_end_id, tokenizer.eod_id, tokenizer.im_start_id]
    config.pad_token_id = tokenizer.eod_id
    print(
        "This is a base model: what is saved will be prompted in ChatML. Its embeddings of <|im_start|> and <|im_end|> "
        "were never trained; if an adapter's replies don't end, add --train_embeddings True.", file=sys.stderr,
    )  # fmt: skip


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters to be trained, and all of them."""
    return get_model_param_count(model, trainable_only=True), get_model_param_count(model)
