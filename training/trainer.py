"""transformers' Trainer for this model: loss without logits, exact evaluation, whole checkpoints."""

import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from qwen.loss import IGNORED
from qwen.settings import saveable

from .checkpoints import mark_complete, record_base, remove_old
from .speed import Work


def exact_policy(policy: Any) -> Any:
    """The FSDP policy that accelerate has made for half precision, without what rounds more than the weights.

    It would cast what blocks are given, the rotary angles among them, and what the model returns, the loss. Hidden
    states need no cast: the embedding gives them in the weights' type.
    """
    exact = {"cast_forward_inputs": False, "cast_root_forward_inputs": False, "output_dtype": None}
    known = {field.name for field in fields(policy)}
    return replace(policy, **{name: value for name, value in exact.items() if name in known})


class QwenTrainer(Trainer):
    """A Trainer for batches of `training.data`.

    Args:
        facts: what a run that goes on from a checkpoint of this one must have in common with it.
        base: the checkpoint's name and revision, recorded with adapters.
    """

    def __init__(self, *args: Any, facts: dict[str, Any], base: tuple[str, str | None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = exact_policy(plugin.mixed_precision_policy)
        self.facts = facts
        self.base = base
        self.work = Work()
        model = self.accelerator.unwrap_model(self.model)
        model.config.use_cache = True  # as it is to be saved; batches say False
        # An adapter on the head adds to logits: then there must be some.
        self.skip_logits = not hasattr(model.get_output_embeddings(), "lora_A")

    # ---- loss ----

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        self.work.add(inputs)
        inputs = {**inputs, "skip_logits": self.skip_logits}
        return super().compute_loss(model, inputs, return_outputs, **kwargs)

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
        return output

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
            saveable(model.generation_config).save_pretrained(directory)
            record_base(directory, *self.base)
