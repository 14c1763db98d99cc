"""Replies that a model writes while it is trained: how many are just what the data say."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from qwen import QWenTokenizer
from qwen.loss import IGNORED

ROOM = 16  # tokens that a reply may be longer than the expected one


@dataclass(frozen=True)
class Reply:
    """What a model answered to the last question of a sample."""

    prompt: str
    expected: str
    text: str

    @property
    def exact(self) -> bool:
        return self.text.strip() == self.expected.strip()


def write_replies(
    model: nn.Module, tokenizer: QWenTokenizer, dataset: Dataset, count: int, part: tuple[int, int] = (0, 1)
) -> list[Reply]:
    """Greedy replies to the last questions of the first `count` samples, or of this process's `part` (number, of)."""
    was_training = model.training
    model.eval()
    replies = []
    for ids, labels in islice(last_replies(dataset), part[0], count, part[1]):
        start = len(ids) - len(labels)
        with torch.no_grad():
            written = model.generate(
                input_ids=ids[None, :start].to(model.device), attention_mask=torch.ones(1, start, device=model.device),
                do_sample=False, max_new_tokens=len(labels) + ROOM, pad_token_id=tokenizer.eod_id,
                eos_token_id=[tokenizer.im_end_id, tokenizer.eod_id],
            )[0, start:]  # fmt: skip
        texts = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:start], labels, written))
        replies.append(Reply(*texts))
    model.train(was_training)
    return replies


def last_replies(dataset: Dataset) -> Iterator[tuple[Tensor, Tensor]]:
    """The ids of each sample up to the end of the last reply that carries loss, and of that reply."""
    for index in range(len(dataset)):
        item: dict[str, Any] = dataset[index]
        for ids, labels in zip(*(item[name].split(item["lengths"]) for name in ("input_ids", "labels")), strict=True):
            silent = (labels == IGNORED).nonzero().flatten()
            end = int((labels != IGNORED).nonzero().max()) + 1
            before = silent[silent < end]
            start = int(before.max()) + 1 if len(before) else 0
            if start:
                yield ids[:end], labels[start:end]
