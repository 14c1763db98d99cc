"""The flags of finetune.py: those of the published script, those of transformers' Trainer, and what lies between them.

Whatever can't work is refused here, before a file is downloaded or a model loaded.
"""

import difflib
import json
import os
import sys
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from transformers import HfArgumentParser

from hub import HUBS
from qwen.errors import QwenError
from qwen.hardware import computes_bf16
from utils import DEFAULT_CHECKPOINT

from .attention import PACKED
from .early import check_libraries
from .masks import LOSS_ON

LORA_RATE, FULL_RATE = 3e-4, 1e-5  # what the publisher trained with
STAGES = {
    "sft": "learn the replies of conversations", "pt": "go on with pre-training, on plain text in full rows",
    "dpo": "learn to prefer chosen replies to rejected ones", "kto": "learn from replies labelled good or bad",
    "rm": "a reward model, which scores replies",
}  # fmt: skip
PREFERENCES = ("dpo", "kto", "rm")  # trained with TRL
RATES = {"dpo": (1e-5, 1e-6), "kto": (1e-5, 1e-6), "rm": (1e-4, 1e-5)}  # of adapters and all weights, as TRL advises
LAYERS = ("c_attn", "c_proj", "w1", "w2")
OTHER_LAYERS = ("wte", "lm_head", "ln_1", "ln_2", "ln_f")
# Names of older transformers, which scripts from that time pass.
RENAMED = {
    "--evaluation_strategy": "--eval_strategy", "--warmup_ratio": "--warmup_steps", "--no_cuda": "--use_cpu",
    "--gradient_checkpointing": "--activation_checkpointing",
    "--gradient_checkpointing_kwargs": "--activation_checkpointing_kwargs",
}  # fmt: skip
# Flags of the published scripts and of older transformers that have no effect any more.
GONE = {
    "--cache_dir": "downloads go where HF_HOME says",
    "--lora_weight_path": "it never had an effect; --resume_from_checkpoint goes on with an adapter",
    "--overwrite_output_dir": "what an earlier run left is never deleted",
}


def option(default: Any, text: str, *aliases: str, **more: Any) -> Any:
    """A dataclass field with the help that its flag shows."""
    metadata = {"help": text, "aliases": list(aliases)} | more
    if isinstance(default, list | tuple):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    model_name_or_path: str = option(
        DEFAULT_CHECKPOINT, "Directory, hub name, or `demo`.", "-c", "--checkpoint-path", "--checkpoint_path"
    )
    hub: str = option(HUBS[0], "Where hub names are looked up.", choices=HUBS)
    revision: str | None = option(None, "Branch, tag or commit of a hub checkpoint.")
    attn: str = option(
        PACKED, "Attention: packed keeps the samples of a row apart by itself; so do flash_attention_2 and sdpa.",
        choices=[PACKED, "sdpa", "flash_attention_2", "flash_attention_3", "eager"],
    )  # fmt: skip


@dataclass
class DataArguments:
    data_path: list[str] = option([], "Training data: files, folders, patterns, names of the hub.", "-d")
    data_weights: list[float] = option(
        [], "How often the samples of each --data_path are taken: 2 takes all twice, 0.1 a tenth of them, by the seed."
    )
    stage: str = option(
        "sft", "What to learn from the data. " + "; ".join(f"{name}: {text}" for name, text in STAGES.items()) + ".",
        choices=list(STAGES),
    )  # fmt: skip
    eval_data_path: list[str] = option([], "Data to measure the loss on, as --data_path; with --eval_strategy.")
    val_size: float = option(0.0, "Samples to take out of the training data for that: a share below 1, or a number.")
    check_data: str | None = option(None, "Only look at these data: faults, counts, lengths, what carries loss.")
    skip_bad_samples: bool = option(False, "Leave samples out that can't be used, and go on with the others.")
    data_encoding: str | None = option(None, "Encoding of text files; by default UTF-8, or what they look like.")
    data_split: str = option("train", "Split of saved and hub data sets.")
    columns: list[str] = option([], "Columns by the names known here: instruction=Frage output=Antwort.")
    ignore_fields: list[str] = option([], "Fields of samples to pass over.")
    model_max_length: int = option(8192, "Longest sample in tokens; longer ones are cut after a whole reply.")
    loss_on: str = option(
        "assistant", "What carries loss: all replies, the last one, or the published recipe's mask.", choices=LOSS_ON
    )
    packing: bool = option(False, "Fill every row with samples up to --model_max_length tokens.")
    padding: bool = option(False, "Pad a batch to its longest sample in place of one row without padding.")
    lazy_preprocess: bool = option(False, "Tokenise while training; no packing, no counts before it starts.")


@dataclass
class PreferenceArguments:
    beta: float = option(0.1, "DPO and KTO: how strongly the model is held to what it was.")
    loss_type: str | None = option(None, "DPO and KTO: another loss of TRL's, such as ipo, hinge, robust, apo_zero.")
    desirable_weight: float = option(1.0, "KTO: weight of good replies.")
    undesirable_weight: float = option(1.0, "KTO: weight of bad replies.")


@dataclass
class LoraArguments:
    use_lora: bool = option(False, "Train an adapter (LoRA) in place of all weights.")
    q_lora: bool = option(False, "LoRA over 4-bit weights: of a GPTQ checkpoint, or made with bitsandbytes (nf4).")
    lora_r: int = option(64, "Rank of the adapter.")
    lora_alpha: int = option(16, "Scale of the adapter: alpha / r.")
    lora_dropout: float = option(0.05, "Dropout before the adapter.")
    lora_target_modules: list[str] = option(
        LAYERS, "Layers that get an adapter: names, all-linear, or one regular expression for whole paths."
    )
    modules_to_save: list[str] = option([], "Layers to train whole along with the adapter, and to save with it.")
    lora_bias: str = option("none", "Biases to train: none, all, or those of adapted layers.",
                            choices=["none", "all", "lora_only"])  # fmt: skip
    use_dora: bool = option(False, "DoRA: adapt magnitude and direction apart.")
    use_rslora: bool = option(False, "Rank-stabilised LoRA: scale by alpha / sqrt(r).")
    trainable_layers: int | None = option(
        None, "Train only so many of the last layers (and without --use_lora norm and head behind them)."
    )
    train_embeddings: bool = option(
        False, "Also train embedding and head whole (1.24 B parameters of Qwen-7B): for a base model to learn ChatML."
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """The Trainer's flags with defaults for this model."""

    fp32: bool = option(
        False, "Train in float32; by default bf16 where the GPU or processor computes it, else fp16 (GPU), fp32 (CPU)."
    )
    learning_rate: float | None = option(None, f"Default: {LORA_RATE} for adapters, {FULL_RATE} for all weights.")
    per_device_train_batch_size: int = option(2, "Samples (or packs) a device and forward pass.")
    gradient_accumulation_steps: int = option(8, "Passes to add up before the weights change.")
    lr_scheduler_type: str = option("cosine", "How the learning rate falls.")
    warmup_steps: float = option(0.01, "Steps, or below 1 the share of all steps, until the full learning rate.")
    weight_decay: float = option(0.1, "Weight decay.")
    adam_beta2: float = option(0.95, "Adam's beta2.")
    report_to: str = option("auto", "Beside log.jsonl: tensorboard (by default if installed), wandb, none.")
    logging_steps: float = option(1, "Steps between two lines of the log.")
    early_stopping_patience: int | None = option(
        None, "Stop when the evaluation loss has not fallen so many times; with --load_best_model_at_end."
    )
    loraplus_lr_ratio: float | None = option(
        None, "LoRA+: how many times faster the B matrices of an adapter learn than A; the paper's advice is 16."
    )
    new_learning_rate: bool = option(
        False, "When resuming, go on with the given learning rate and schedule in place of the checkpoint's."
    )
    eval_replies: int = option(
        0, "At each evaluation, answer so many of its samples: shows some, and logs eval_exact_match, the share of "
        "replies that are just as expected; --metric_for_best_model exact_match keeps the best by it."
    )  # fmt: skip
    logging_nan_inf_filter: bool = option(False, "Leave NaN out of the logged loss; training stops at NaN otherwise.")
    remove_unused_columns: bool = option(False, "Not used: the batches hold what the model reads.")

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if not (self.bf16 or self.fp16 or self.fp32):
            device = "cpu" if self.use_cpu else torch.accelerator.current_accelerator().type
            self.bf16 = computes_bf16(device)
            self.fp16 = not self.bf16 and device != "cpu"
        if self.use_cpu:
            self.dataloader_pin_memory = False
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # each is used; looking for others costs time
        if self.report_to == "auto":
            self.report_to = "tensorboard" if find_spec("tensorboard") else "none"
        if self.deepspeed:
            self.deepspeed = prepare_deepspeed(self.deepspeed, self.use_cpu)
        try:
            super().__post_init__()
        except (ValueError, ImportError, OSError) as error:
            raise QwenError(" ".join(str(error).split())) from error
        if self.deepspeed and self.use_cpu:
            import deepspeed

            deepspeed.init_distributed("gloo")  # ZeRO-3 splits the weights while they load, before the Trainer does it
        if self.parallel_mode.value == "not_distributed" and self.n_gpu > 1:
            print(
                f"One of {self.n_gpu} GPUs is used: start with torchrun, or finetune/*.sh, to use all.", file=sys.stderr
            )
            self._n_gpu = 1

    @property
    def precision(self) -> str:
        return precision(self)


def precision(training: transformers.TrainingArguments) -> str:
    return "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32"


@dataclass
class Settings:
    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    preference: PreferenceArguments
    training: TrainingArguments
    given: set[str] = field(default_factory=set)  # names of the flags on the command line


class ArgumentParser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise QwenError(f"{message}; --help shows all flags")


def parse_settings(argv: list[str], description: str) -> Settings:
    """Parse and check the command line; QwenError for whatever can't work."""
    groups = (ModelArguments, DataArguments, LoraArguments, PreferenceArguments, TrainingArguments)
    parser = ArgumentParser(groups, description=description, allow_abbrev=False)
    argv = without_gone([renamed(argument) for argument in argv])
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        like = difflib.get_close_matches(unknown[0], known, n=1)
        raise QwenError(f"{unknown[0]} is no flag{f': did you mean {like[0]}?' if like else '; --help shows all'}")
    given = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    settings = Settings(*parsed, given)
    settings.lora.use_lora |= settings.lora.q_lora
    settings.data.packing |= settings.data.stage == "pt" and not settings.data.padding
    if settings.training.learning_rate is None:
        rates = RATES.get(settings.data.stage, (LORA_RATE, FULL_RATE))
        settings.training.learning_rate = rates[0 if settings.lora.use_lora else 1]
    if settings.data.check_data is None:
        check_settings(settings)
    return settings


def renamed(argument: str) -> str:
    """A flag by its name of today."""
    name, equals, value = argument.partition("=")
    new = RENAMED.get(name, name)
    known = {f"--{each.name}" for each in fields(transformers.TrainingArguments)}
    return (new if new in known else name) + equals + value


def without_gone(argv: list[str]) -> list[str]:
    """The command line without flags that have no effect any more; a note for each that says something."""
    kept, words = [], iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in GONE:
            kept.append(word)
            continue
        if not equals:
            value = next(words, "")
        if value not in ("", "None", "False"):
            print(f"{name} {value} has no effect: {GONE[name]}.", file=sys.stderr)
    return kept


def check_settings(settings: Settings) -> None:
    """QwenError for flags that contradict each other or can't work."""
    data, lora, training = settings.data, settings.lora, settings.training
    if not data.data_path:
        raise QwenError("--data_path is missing: give a file of conversations; finetune/sample.jsonl is one")
    if data.data_weights and len(data.data_weights) != len(data.data_path):
        raise QwenError(
            f"--data_weights has {len(data.data_weights)} numbers, and --data_path {len(data.data_path)} names: give "
            "one for each"
        )
    if any(weight <= 0 for weight in data.data_weights):
        raise QwenError("--data_weights must be above 0: leave data out of --data_path that are not to be used")
    if data.model_max_length < 16:
        raise QwenError(f"--model_max_length {data.model_max_length}: a sample of a question and a reply takes more")
    if data.packing and data.lazy_preprocess:
        raise QwenError("--packing needs all lengths before it starts: leave --lazy_preprocess out")
    if data.padding and data.packing:
        raise QwenError("--packing fills rows so that nothing is padded: leave --padding out")
    if data.padding and settings.model.attn == PACKED:
        settings.model.attn = "sdpa"
    check_evaluation(data, training)
    if data.stage in PREFERENCES:
        check_preference(settings)
    lora.lora_target_modules = check_targets(lora)
    if not lora.use_lora and (lora.use_dora or lora.use_rslora or lora.train_embeddings or lora.modules_to_save):
        raise QwenError(
            "--use_dora, --use_rslora, --train_embeddings and --modules_to_save belong to adapters: add --use_lora True"
        )
    check_methods(lora, training)
    if lora.use_lora and (lora.lora_r < 1 or lora.lora_alpha <= 0 or not lora.lora_target_modules):
        raise QwenError("--lora_r and --lora_alpha must be above 0, and --lora_target_modules not empty")
    if training.learning_rate <= 0:
        raise QwenError(
            f"--learning_rate {training.learning_rate}: nothing would be learned; try {LORA_RATE} or {FULL_RATE}"
        )
    if training.max_steps <= 0 and training.num_train_epochs <= 0:
        raise QwenError(f"--num_train_epochs {training.num_train_epochs}: no step would be made")
    if lora.q_lora and is_sharded(training):
        raise QwenError("4-bit weights can't be split over GPUs: Q-LoRA runs with ZeRO-2 or on one GPU")
    check_libraries(training)


def check_methods(lora: LoraArguments, training: TrainingArguments) -> None:
    """QwenError for ways to train that don't go together."""
    if training.loraplus_lr_ratio is not None:
        if not lora.use_lora or training.deepspeed:
            raise QwenError("--loraplus_lr_ratio belongs to adapters, without DeepSpeed: add --use_lora True")
        if training.loraplus_lr_ratio < 1:
            raise QwenError(f"--loraplus_lr_ratio {training.loraplus_lr_ratio}: must be 1 or more; 16 is usual")
    if lora.trainable_layers is not None and (lora.trainable_layers < 1 or is_pattern(lora.lora_target_modules[0])):
        raise QwenError(
            f"--trainable_layers {lora.trainable_layers}: give 1 or more, and layers by their names, not by a pattern"
        )


def check_evaluation(data: DataArguments, training: TrainingArguments) -> None:
    """QwenError for an evaluation without data, or early stopping without an evaluation."""
    if data.val_size and data.eval_data_path:
        raise QwenError(
            "--val_size takes samples out of the training data, --eval_data_path names others: leave one out"
        )
    if data.val_size < 0 or (data.val_size > 1 and data.val_size % 1):
        raise QwenError(f"--val_size {data.val_size}: give a share below 1, or a whole number of samples")
    if training.eval_strategy.value != "no" and not data.eval_data_path and not data.val_size:
        raise QwenError(f"--eval_strategy {training.eval_strategy.value} needs --eval_data_path or --val_size")
    if training.eval_replies and (data.stage != "sft" or not (data.eval_data_path or data.val_size)):
        raise QwenError("--eval_replies answers evaluation data of --stage sft: give --eval_data_path or --val_size")
    if training.eval_replies and is_sharded(training):
        raise QwenError("--eval_replies needs whole weights in each process: leave ZeRO-3 and FSDP out")
    if training.early_stopping_patience is not None:
        if training.early_stopping_patience < 1:
            raise QwenError(f"--early_stopping_patience {training.early_stopping_patience}: must be 1 or more")
        if not training.load_best_model_at_end or training.eval_strategy.value == "no":
            raise QwenError(
                "--early_stopping_patience needs --eval_strategy and --save_strategy of the same steps, and "
                "--load_best_model_at_end True: what is kept is the best model, not the last"
            )


def check_preference(settings: Settings) -> None:
    """QwenError for what TRL's trainers don't take."""
    data, lora, training = settings.data, settings.lora, settings.training
    if find_spec("trl") is None:
        raise QwenError(f"--stage {data.stage} needs the package trl: pip install -r requirements_finetune.txt")
    flags = {
        "packing": data.packing,
        "lazy_preprocess": data.lazy_preprocess,
        "train_embeddings": lora.train_embeddings,
    }
    if wrong := next((name for name, given in flags.items() if given), None):
        raise QwenError(f"--{wrong} is for --stage sft and pt: preferences are read in pairs; leave it out")
    if data.stage == "kto" and min(training.per_device_train_batch_size, training.per_device_eval_batch_size) < 2:
        raise QwenError("--stage kto compares the replies of a batch: give --per_device_train_batch_size 2 or more")
    if "lm_head" in lora.lora_target_modules or "lm_head" in lora.modules_to_save:
        raise QwenError(f"--stage {data.stage} can't train lm_head: leave it out of the layers")
    if settings.model.attn == PACKED:
        settings.model.attn = "sdpa"  # pairs are padded


def check_targets(lora: LoraArguments) -> list[str]:
    """The layers to adapt by name, or one regular expression; QwenError for a name that no layer has."""
    targets = [name for word in lora.lora_target_modules for name in word.split(",") if name]
    if targets == ["all-linear"]:
        return list(LAYERS)
    if len(lora.lora_target_modules) == 1 and is_pattern(lora.lora_target_modules[0]):
        return lora.lora_target_modules
    for flag, names in (("lora_target_modules", targets), ("modules_to_save", lora.modules_to_save)):
        known = (*LAYERS, *OTHER_LAYERS)
        unknown = [name for name in names if name.rpartition(".")[2] not in known]
        if unknown:
            raise QwenError(f"--{flag} {unknown[0]}: this model has no such layer; it has {', '.join(known)}")
    return targets


def is_pattern(target: str) -> bool:
    return bool(set(target) & set("*+?\\|()[]^$"))


# ---- DeepSpeed and FSDP ----


def is_sharded(training: TrainingArguments) -> bool:
    """Whether each process holds only a part of the weights."""
    return stage(training) == 3 or bool(training.fsdp)


def stage(training: TrainingArguments) -> int:
    """The ZeRO stage; 0 without DeepSpeed."""
    config = training.deepspeed if isinstance(training.deepspeed, dict) else {}
    return config.get("zero_optimization", {}).get("stage", 0)


def prepare_deepspeed(config: str | dict[str, Any], use_cpu: bool) -> dict[str, Any]:
    """The DeepSpeed config, read and checked, and the environment that DeepSpeed wants."""
    if find_spec("deepspeed") is None:
        raise QwenError("--deepspeed needs the package deepspeed: pip install deepspeed; one GPU does without it")
    if isinstance(config, str):
        try:
            config = json.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise QwenError(f"--deepspeed {config} is no JSON file that can be read ({error})") from None
    if config.pop("scheduler", None):
        print("DeepSpeed's `scheduler` section is left out: it would override --lr_scheduler_type.", file=sys.stderr)
    if "RANK" not in os.environ:  # without a launcher DeepSpeed would ask for MPI
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ.update(alone)
    bin_directory = str(Path(sys.executable).parent)  # where ninja is, which compiles DeepSpeed's optimisers
    if bin_directory not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = bin_directory + os.pathsep + os.environ["PATH"]
    if use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return config
