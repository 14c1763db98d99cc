"""What the Trainer would find out after minutes of loading: a missing package, a schedule without its settings."""

import os

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from qwen.errors import QwenError, first_line


def check_libraries(training: TrainingArguments) -> None:
    """QwenError for flags that the Trainer, or a package behind it, would refuse once the model is loaded."""
    check_reports(training)
    check_schedule(training)
    check_optimizer(training)
    metric = (training.metric_for_best_model or "loss").removeprefix("eval_")
    if metric != "loss" and not (metric == "exact_match" and training.eval_replies):
        raise QwenError(
            f"--metric_for_best_model {training.metric_for_best_model}: what is measured is the loss, and with "
            "--eval_replies exact_match"
        )
    if training.use_liger_kernel:
        raise QwenError("--use_liger_kernel: Liger has no kernels for this model, whose loss makes no logits anyway")
    if training.push_to_hub:
        check_hub()


def check_reports(training: TrainingArguments) -> None:
    try:
        for callback in get_reporting_integration_callbacks(training.report_to):
            callback()
    except (ImportError, RuntimeError, ValueError) as error:
        raise QwenError(f"--report_to {' '.join(training.report_to)}: {first_line(error)}") from None


def check_schedule(training: TrainingArguments) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    settings = dict(training.lr_scheduler_kwargs or {})
    try:
        get_scheduler(training.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=settings)
    except (TypeError, ValueError) as error:
        raise QwenError(
            f"--lr_scheduler_type {training.lr_scheduler_type.value} ({first_line(error)}): give its settings with "
            """--lr_scheduler_kwargs '{"name": value}'"""
        ) from None


def check_optimizer(training: TrainingArguments) -> None:
    """Layers that an optimiser is to work on are looked for later, in the model itself."""
    if training.deepspeed:
        return  # has its own
    try:
        Trainer.get_optimizer_cls_and_kwargs(training, nn.Linear(1, 1))
    except (ImportError, ValueError) as error:
        if isinstance(error, ImportError) or not training.optim_target_modules:
            raise QwenError(f"--optim {training.optim.value}: {first_line(error)}") from None


def check_hub() -> None:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE"):
        raise QwenError("--push_to_hub: HF_HUB_OFFLINE is set; unset it, or push when the training is done")
    if get_token() is None:
        raise QwenError("--push_to_hub: nobody is logged in; run `hf auth login`, or set HF_TOKEN")
