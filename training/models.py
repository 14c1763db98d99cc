"""Models to train: loaded in the right precision and place, with adapters, and with settings that make them stop."""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import get_model_param_count  # counts parameters that ZeRO-3 has split, too

from qwen import QWenLMHeadModel, QWenTokenizer
from qwen.chatml import DEFAULT_WINDOW
from qwen.checkpoint import check_architecture
from qwen.classification import QWenForSequenceClassification
from qwen.errors import QwenError
from qwen.modeling_qwen import QWenPreTrainedModel
from qwen.tokenization_qwen import VOCAB_FILE
from utils import DTYPES, check_adapter_base, find_checkpoint, load_model_for_training

from .arguments import Settings, TrainingArguments, is_pattern, is_sharded, stage

SHAPE = {  # of an adapter: flags after the names that peft writes
    "r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "bias": "lora_bias",
    "target_modules": "lora_target_modules", "modules_to_save": "modules_to_save", "use_dora": "use_dora",
    "use_rslora": "use_rslora",
}  # fmt: skip


@dataclass(frozen=True)
class Start:
    """What a training begins with."""

    base: Path
    adapter: Path | None  # to train on (LoRA), or to merge first (all weights)
    name: str  # of the base, as a new adapter records it: a directory in full, `demo` or a hub name as given
    revision: str | None

    @property
    def tokenizer(self) -> Path:
        return self.adapter if self.adapter and (self.adapter / VOCAB_FILE).is_file() else self.base


def find_start(settings: Settings) -> Start:
    """The checkpoint of the command line, or the base model of the adapter that it names; QwenError if neither can be
    trained in the way asked for."""
    model, lora = settings.model, settings.lora
    directory, name, revision = find_checkpoint(model.model_name_or_path, model.hub, model.revision), None, None
    adapter = directory if (directory / "adapter_config.json").is_file() else None
    if adapter:
        from qwen.lora import check_adapter_config

        config = check_adapter_config(adapter)
        name, revision = config.get("base_model_name_or_path"), config.get("revision")
        if not name:
            raise QwenError(f"{adapter / 'adapter_config.json'} names no base model: set base_model_name_or_path there")
        directory = find_checkpoint(name, model.hub, revision)
        check_adapter_base(adapter, str(directory))
        if lora.use_lora:
            take_shape(settings, config)
    else:
        name, revision = model.model_name_or_path, model.revision
    if is_gptq(directory) and not lora.q_lora:
        raise QwenError(
            f"{directory} is quantised: train an adapter on it with --q_lora True, or give the unquantised one"
        )
    return Start(directory, adapter, str(Path(name).resolve()) if Path(name).is_dir() else name, revision)


def take_shape(settings: Settings, config: dict[str, Any]) -> None:
    """Set the flags of an adapter to those of the one that is trained on; QwenError for a flag that says otherwise."""
    if config["peft_type"] != "LORA":
        raise QwenError(f"an adapter of the kind {config['peft_type']} is not trained on here, only LoRA's")
    if "trainable_layers" in settings.given:
        raise QwenError("--trainable_layers: the adapter to train on has its layers; leave the flag out")
    for key, flag in SHAPE.items():
        value = config.get(key)
        if flag in ("lora_target_modules", "modules_to_save"):
            value = [value] if isinstance(value, str) else sorted(value or [])
        asked = getattr(settings.lora, flag)
        if flag in settings.given and (sorted(asked) if isinstance(asked, list) else asked) != value:
            raise QwenError(
                f"--{flag} {asked}: the adapter to train on has {value}; leave the flag out, or merge the adapter "
                "(merge_lora.py) and train another one on the result"
            )
        setattr(settings.lora, flag, value)


def load_model(settings: Settings, start: Start, tokenizer: QWenTokenizer) -> nn.Module:
    """The model of `settings`, with an adapter where asked for, ready to be trained."""
    lora, training = settings.lora, settings.training
    quantization = nf4_config(training.precision) if lora.q_lora and not is_gptq(start.base) else None
    reward = settings.data.stage == "rm"
    model = load_model_for_training(
        start.base,
        kind=QWenForSequenceClassification if reward else QWenLMHeadModel,
        dtype=weight_dtype(settings),
        placement=None if is_sharded(training) else {"": training.device},
        attn=settings.model.attn,
        quantization_config=quantization,
    )
    if start.adapter:
        model = load_trained_adapter(model, start, tokenizer, lora.use_lora)
    if settings.data.stage not in ("pt", "rm"):
        set_stop_ids(model, tokenizer)
    if not reward:
        keep_settings_saveable(model)
    if lora.use_lora and not start.adapter and settings.data.stage not in ("dpo", "kto"):  # TRL adds it there
        model = add_adapter(model, settings)
    if lora.trainable_layers and not lora.use_lora:
        freeze_layers(model, lora.trainable_layers)
    return train_in_float32(model, training)


def last_layers(model: PreTrainedModel, count: int) -> range:
    """The numbers of the last `count` layers; QwenError if there are fewer."""
    layers = model.config.num_hidden_layers
    if count > layers:
        raise QwenError(f"--trainable_layers {count}: this model has {layers}")
    return range(layers - count, layers)


def freeze_layers(model: PreTrainedModel, count: int) -> None:
    """Leave only the last `count` layers, and what follows them, to be trained."""
    kept = [f"transformer.h.{number}." for number in last_layers(model, count)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith((*kept, "transformer.ln_f.", "lm_head.", "score."))


def train_in_float32(model: nn.Module, training: TrainingArguments) -> nn.Module:
    """The model with what is trained in float32, in place: small steps vanish in the rounding of half precision."""
    if stage(training) == 0:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


def weight_dtype(settings: Settings) -> torch.dtype:
    """Frozen weights are in the precision of the computation, and so are all where DeepSpeed keeps its own copies; all
    weights to be trained are in float32, and computed with in half precision."""
    half = settings.lora.use_lora or stage(settings.training) > 0
    return DTYPES[settings.training.precision if half else "fp32"]


def is_gptq(directory: Path) -> bool:
    return bool(check_architecture(directory).get("quantization_config"))


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


def load_trained_adapter(model: QWenLMHeadModel, start: Start, tokenizer: QWenTokenizer, on: bool) -> nn.Module:
    """The model with the adapter of an earlier training, to be trained on, or merged into it."""
    from qwen.lora import load_adapter

    adapted, _ = load_adapter(start.adapter, model, tokenizer, start.name, trainable=on)
    return adapted if on else adapted.merge_and_unload(safe_merge=True).train().requires_grad_(True)


def lora_config(settings: Settings, model: PreTrainedModel) -> Any:
    """peft's LoraConfig of these flags for this model."""
    try:
        from peft import LoraConfig

        from qwen.lora import support_int4
    except ImportError:
        raise QwenError("--use_lora needs the package peft: pip install -r requirements_finetune.txt") from None
    lora, reward = settings.lora, settings.data.stage == "rm"
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
        modules_to_save=sorted({*whole, *(["score"] if reward else [])}) or None,
        task_type="SEQ_CLS" if reward else "CAUSAL_LM",
        layers_to_transform=list(last_layers(model, lora.trainable_layers)) if lora.trainable_layers else None,
        layers_pattern="h" if lora.trainable_layers else None,
    )
    return support_int4(config)


def add_adapter(model: QWenPreTrainedModel, settings: Settings) -> nn.Module:
    """The model with a LoRA adapter, alone to be trained."""
    config, lora = lora_config(settings, model), settings.lora
    from peft import get_peft_model

    try:
        return get_peft_model(model, config)
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
