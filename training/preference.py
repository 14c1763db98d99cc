"""Learning from preferences (DPO), from verdicts (KTO), and reward models: TRL's trainers on this model.

Losses and metrics are TRL's. Prompts and masks are those of all other training here: a reply is its text and the
<|im_end|> that ends it, after the prompt that inference would make.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from qwen import QWenTokenizer
from qwen.chatml import encode_messages
from qwen.errors import QwenError

from .arguments import Settings
from .models import Start, lora_config
from .samples import Message, Preference, Verdict
from .trainer import CheckpointedTrainer

STAGES = ("dpo", "kto", "rm")


class PreferenceDataset:
    """Tokenised pairs or verdicts as TRL's trainers read them, and what became of the others."""

    def __init__(self, rows: list[dict[str, Any]], fates: Counter[str]) -> None:
        import datasets

        self.rows = datasets.Dataset.from_list(rows)
        self.fates = fates

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample: a pair's prompt is read twice."""
        return [sum(map(len, sequences(row))) for row in self.rows]

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.rows.to_list()).encode()).hexdigest()[:16]


def sequences(row: dict[str, Any]) -> list[list[int]]:
    """The sequences that a row is read as."""
    prompt = row.get("prompt_ids", [])
    return [prompt + row[name] for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in row]


def encode_preferences(
    samples: Sequence[Preference | Verdict], tokenizer: QWenTokenizer, max_length: int, stage: str
) -> PreferenceDataset:
    """All samples whose replies fit whole: the rest of a reply that is cut may be what it was judged for."""
    rows, fates = [], Counter()
    for sample in samples:
        prompt = encode_prompt(tokenizer, sample.prompt)
        if isinstance(sample, Verdict):
            row = {"prompt_ids": prompt, "completion_ids": encode_reply(tokenizer, sample.reply), "label": sample.good}
        else:
            row = {"prompt_ids": prompt, "chosen_ids": encode_reply(tokenizer, sample.chosen),
                   "rejected_ids": encode_reply(tokenizer, sample.rejected)}  # fmt: skip
            if stage == "rm":
                row = {name: prompt + row[name] for name in ("chosen_ids", "rejected_ids")}
        fits = max(map(len, sequences(row))) <= max_length
        fates["whole" if fits else "too long to judge"] += 1
        if fits:
            rows.append(row)
    if not rows:
        raise QwenError(f"no sample fits --model_max_length {max_length}: raise it")
    if stage == "kto" and len({row["label"] for row in rows}) == 1:
        raise QwenError(f"all replies are labelled {str(rows[0]['label']).lower()}: KTO learns from good and bad ones")
    return PreferenceDataset(rows, fates)


def encode_prompt(tokenizer: QWenTokenizer, messages: Sequence[Message]) -> list[int]:
    if messages[0].role != "system":
        messages = (Message("system", tokenizer.default_system), *messages)
    blocks = [{"role": message.role, "content": message.content} for message in messages]
    return encode_messages(tokenizer, blocks, add_generation_prompt=True)


def encode_reply(tokenizer: QWenTokenizer, reply: str) -> list[int]:
    return [*tokenizer.encode_text(reply), tokenizer.im_end_id]


def mismatch(dataset: PreferenceDataset, batch_size: int, seed: int) -> Any:
    """Verdicts in a random order, each with the reply of its neighbour in the batch, by which KTO measures how far the
    model has moved; TRL reads them in this order in every epoch."""
    rows = list(dataset.rows)
    random.Random(seed).shuffle(rows)
    if len(rows) % batch_size == 1:  # alone in its batch a reply would be its own neighbour
        rows.append(rows[0])
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        replies = [row["completion_ids"] for row in batch]
        rows[start : start + batch_size] = [
            row | {"KL_completion_ids": reply} for row, reply in zip(batch, replies[-1:] + replies[:-1], strict=True)
        ]
    import datasets

    return datasets.Dataset.from_list(rows)


class PreferenceTrainer(CheckpointedTrainer):
    """What a trainer of TRL's leaves out here: preparing data, which are tokenised, model cards and telemetry."""

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _send_telemetry(self) -> None:
        pass


def make_trainer(
    model: nn.Module, settings: Settings, start: Start, train: PreferenceDataset, evaluated: PreferenceDataset | None,
    tokenizer: QWenTokenizer, facts: dict[str, Any],
) -> CheckpointedTrainer:  # fmt: skip
    """The trainer of a stage. Its reference is the model itself without the adapter, or the adapter as it was when it
    is trained on; with all weights, what the model said at the beginning."""
    import trl

    stage, training, adapter = settings.data.stage, settings.training, settings.lora.use_lora
    names = {"dpo": "DPO", "kto": "KTO", "rm": "Reward"}
    config = getattr(trl, f"{names[stage]}Config")(
        output_dir=training.output_dir, use_cpu=training.use_cpu, bf16=training.bf16, fp16=training.fp16,
        report_to="none", gradient_checkpointing=False,
    )  # fmt: skip
    own = {"max_length": None}
    if stage != "rm":
        own |= {"precompute_ref_log_probs": not adapter, "beta": settings.preference.beta}
        if settings.preference.loss_type:
            own["loss_type"] = [settings.preference.loss_type] if stage == "dpo" else settings.preference.loss_type
    batches = [None if each is None else each.rows for each in (train, evaluated)]
    if stage == "kto":
        weights = ("desirable_weight", "undesirable_weight")
        own |= {"train_sampling_strategy": "sequential"}
        own |= {name: getattr(settings.preference, name) for name in weights}
        sizes = (training.per_device_train_batch_size, training.per_device_eval_batch_size)
        batches = [each and mismatch(each, size, training.seed)
                   for each, size in zip((train, evaluated), sizes, strict=True)]  # fmt: skip
    vars(config).update(vars(training) | own)
    kind = type(f"{names[stage]}Trainer", (PreferenceTrainer, getattr(trl, f"{names[stage]}Trainer")), {})
    return kind(
        model=model, args=config, train_dataset=batches[0], eval_dataset=batches[1], processing_class=tokenizer,
        peft_config=lora_config(settings, model) if adapter and not start.adapter and stage != "rm" else None,
        facts=facts, base=(start.name, start.revision),
    )  # fmt: skip
