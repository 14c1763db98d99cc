"""transformers' Trainer for this model: loss without logits, exact evaluation, whole checkpoints."""

import shutil
import sys
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from qwen.loss import IGNORED
from qwen.settings import saveable

from .checkpoints import mark_complete, record_base, remove_old
from .data import EvenDataset
from .replies import write_replies
from .speed import Work

SHOWN_REPLIES = 3
REFERENCE = "ref"  # the adapter before it was trained on, which TRL keeps beside it; a copy of what is on the disk


def exact_policy(policy: Any) -> Any:
    """The FSDP policy that accelerate has made for half precision, without what rounds more than the weights.

    It would cast what blocks are given, the rotary angles among them, and what the model returns, the loss. Hidden
    states need no cast: the embedding gives them in the weights' type.
    """
    exact = {"cast_forward_inputs": False, "cast_root_forward_inputs": False, "output_dtype": None}
    known = {field.name for field in fields(policy)}
    return replace(policy, **{name: value for name, value in exact.items() if name in known})


class CheckpointedTrainer(Trainer):
    """What every trainer here has: whole checkpoints, adapters that know their base model, counts of the work done.

    Args:
        facts: what a run that goes on from a checkpoint of this one must have in common with it.
        base: the checkpoint's name and revision, recorded with adapters.
    """

    def __init__(self, *args: Any, facts: dict[str, Any], base: tuple[str, str | None], **kwargs: Any) -> None:
        self.facts = facts
        self.base = base
        self.work = Work()
        super().__init__(*args, **kwargs)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = exact_policy(plugin.mixed_precision_policy)
        self.accelerator.unwrap_model(self.model).config.use_cache = True  # as it is to be saved; batches say False

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            self.work.add(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    # ---- learning rate ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.args.loraplus_lr_ratio is not None:
            from peft.optimizers import create_loraplus_optimizer

            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = create_loraplus_optimizer(
                self.model, kind, loraplus_lr_ratio=self.args.loraplus_lr_ratio,
                loraplus_weight_decay=self.args.weight_decay, **settings,
            )  # fmt: skip
        return super().create_optimizer(model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.args.new_learning_rate:
            return super()._load_optimizer_and_scheduler(checkpoint)
        rates = [group["initial_lr"] for group in self.optimizer.param_groups]  # of the command line
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler = self.lr_scheduler
        shares = [share(scheduler.last_epoch) for share in getattr(scheduler, "lr_lambdas", [])] or [1.0] * len(rates)
        scheduler.base_lrs = rates
        scheduler._last_lr = [rate * share for rate, share in zip(rates, shares, strict=True)]
        for group, rate, current in zip(self.optimizer.param_groups, rates, scheduler._last_lr, strict=True):
            group["initial_lr"], group["lr"] = rate, current

    # ---- saving ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # older ones go when this one is whole
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            output = Path(self.args.output_dir)
            mark_complete(output / f"checkpoint-{self.state.global_step}", self.facts)
            remove_old(output, limit, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")  # said where wte is adapted
            super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model)
        directory = Path(output_dir or self.args.output_dir)
        if self.args.should_save and not isinstance(model, PreTrainedModel):  # an adapter
            shutil.rmtree(directory / REFERENCE, ignore_errors=True)
            if (settings := getattr(model, "generation_config", None)) is not None:  # a classifier has none
                saveable(settings).save_pretrained(directory)
            record_base(directory, *self.base)


class QwenTrainer(CheckpointedTrainer):
    """A trainer for batches of `training.data`: loss without logits, exact evaluation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        # An adapter on the head adds to logits: then there must be some.
        self.skip_logits = not hasattr(model.get_output_embeddings(), "lora_A")

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        return super().compute_loss(model, {**inputs, "skip_logits": self.skip_logits}, return_outputs, **kwargs)

    def answer(self) -> float:
        """Answers the first evaluation samples, shared among the processes, and shows some; the share of exact ones."""
        process, model = self.args.process_index, self.accelerator.unwrap_model(self.model)
        replies = write_replies(model, self.processing_class, self.eval_dataset, self.args.eval_replies,
                                (process, self.args.world_size))  # fmt: skip
        for reply in replies[:SHOWN_REPLIES] if self.is_world_process_zero() else []:
            question = reply.prompt.removesuffix("assistant\n").strip().rpartition("user\n")[2]
            print(f"\n{question[-200:]}\n  → {reply.text}" + ("" if reply.exact else f"\n  ≠ {reply.expected}"),
                  file=sys.stderr)  # fmt: skip
        counts = [float(sum(reply.exact for reply in replies)), float(len(replies))]
        exact, total = self.accelerator.reduce(torch.tensor(counts, device=self.args.device)).tolist()
        return exact / max(total, 1)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.args.world_size > 1:
            dataset = EvenDataset(dataset, self.args.eval_batch_size * self.args.world_size)
        return super().get_eval_dataloader(dataset)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        items = (inputs["labels"][:, 1:] != IGNORED).sum()
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**inputs, skip_logits=self.skip_logits).loss.float()
        self.evaluated += torch.stack([loss * items, items])
        return loss, None, None

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """The mean loss of all tokens; the Trainer's own is a mean of batches, however much loss each carries."""
        self.evaluated = torch.zeros(2, device=self.args.device)
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, items = self.accelerator.reduce(self.evaluated).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / max(items, 1)
        if self.args.eval_replies:
            output.metrics[f"{metric_key_prefix}_exact_match"] = self.answer()
        return output
