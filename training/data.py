"""Files of conversations to datasets and batches: tokenised once, packed without contamination, never padded.

The samples of a batch lie one behind the other in a single row. Position ids and sequence lengths keep them apart: each
attends only to itself (see attention.py), so nothing is spent on padding and a pack is as exact as its samples alone.
"""

import hashlib
import sys
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from qwen import QWenTokenizer
from qwen.chatml import DEFAULT_SYSTEM
from qwen.errors import QwenError
from qwen.loss import IGNORED

from .masks import encode_conversation, encode_text
from .samples import Conversation, Text

BLOCK_TOKENS = 16  # more than <|im_start|>, a role, <|im_end|> and two newlines take
DEFAULT_TOKENS = BLOCK_TOKENS + len(DEFAULT_SYSTEM.encode())  # of the system message where there is none


class TokenDataset(Dataset):
    """Tokenised samples, side by side in flat arrays: 5 bytes a token."""

    def __init__(self) -> None:
        self.ids = array("i")
        self.carries = array("b")
        self.ends = array("q", [0])
        self.fates: Counter[str] = Counter()

    def append(self, input_ids: Sequence[int], labels: Sequence[int]) -> None:
        self.ids.extend(input_ids)
        self.carries.extend(label != IGNORED for label in labels)
        self.ends.append(len(self.ids))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = slice(self.ends[index], self.ends[index + 1])
        ids = torch.tensor(self.ids[part], dtype=torch.long)
        carries = torch.tensor(self.carries[part], dtype=torch.bool)
        return {"input_ids": ids, "labels": ids.where(carries, IGNORED), "lengths": [len(ids)]}

    @property
    def lengths(self) -> list[int]:
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]

    @property
    def supervised(self) -> int:
        """Tokens that carry loss."""
        return sum(self.carries)

    def fingerprint(self) -> str:
        """The same for the same tokens and labels in the same order."""
        return hashlib.sha256(bytes(self.ids) + bytes(self.carries) + bytes(self.ends)).hexdigest()[:16]


class LazyDataset(Dataset):
    """Conversations that are tokenised when they are asked for, for files that take long.

    Those with nothing to learn from are left out from the start. A token has at least one byte, so only conversations
    of more bytes than `max_length` must be tokenised to know.
    """

    def __init__(
        self, conversations: list[Conversation], tokenizer: QWenTokenizer, max_length: int, loss_on: str
    ) -> None:
        self.settings = (max_length, loss_on)
        self.encode = lambda conversation: encode_conversation(tokenizer, conversation, max_length, loss_on)
        self.conversations = [each for each in conversations if self.fits(each, max_length)]
        self.dropped = len(conversations) - len(self.conversations)
        if not self.conversations:
            raise QwenError("no sample has a reply that fits: raise --model_max_length")

    def fits(self, conversation: Conversation, max_length: int) -> bool:
        """Whether there is something to learn from."""
        replies = any(message.role == "assistant" and message.train for message in conversation.messages)
        size = sum(len(message.content.encode()) + BLOCK_TOKENS for message in conversation.messages)
        return replies and (size + DEFAULT_TOKENS <= max_length or bool(self.encode(conversation).input_ids))

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.encode(self.conversations[index])
        ids, labels = torch.tensor(sample.input_ids), torch.tensor(sample.labels)
        return {"input_ids": ids, "labels": labels, "lengths": [len(ids)]}

    def fingerprint(self) -> str:
        texts = "".join(f"{message}" for each in self.conversations for message in each.messages)
        return hashlib.sha256(f"{self.settings}{texts}".encode()).hexdigest()[:16]


class PackedDataset(Dataset):
    """Packs of samples, each as full as the lengths allow."""

    def __init__(self, samples: TokenDataset, packs: list[list[int]]) -> None:
        self.samples = samples
        self.packs = packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return join([self.samples[i] for i in self.packs[index]])

    @property
    def lengths(self) -> list[int]:
        lengths = self.samples.lengths
        return [sum(lengths[i] for i in pack) for pack in self.packs]

    def fingerprint(self) -> str:
        return f"{self.samples.fingerprint()}-{len(self.packs)}"


class EvenDataset(Dataset):
    """A dataset of whole rounds of batches: blanks, which carry no loss, stand at its end.

    Without them accelerate would fill the last round with samples from the beginning, and the evaluation loss would
    count those twice, differently with every number of processes.
    """

    def __init__(self, dataset: Dataset, round_size: int) -> None:
        self.dataset = dataset
        self.length = -(-len(dataset) // round_size) * round_size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < len(self.dataset):
            return self.dataset[index]
        item = self.dataset[0]
        return item | {"labels": torch.full_like(item["labels"], IGNORED)}


def tokenize(
    conversations: list[Conversation | Text],
    tokenizer: QWenTokenizer,
    max_length: int,
    loss_on: str,
    quiet: bool = False,
) -> TokenDataset:
    """All conversations that have something to learn from; `fates` counts what became of them."""
    dataset = TokenDataset()
    hidden = quiet or len(conversations) < 2000
    for conversation in tqdm(conversations, "Tokenising", unit="sample", disable=hidden, file=sys.stderr):
        if isinstance(conversation, Text):
            samples = encode_text(tokenizer, conversation, max_length)
        else:
            samples = [encode_conversation(tokenizer, conversation, max_length, loss_on)]
        for sample in samples:
            dataset.fates[sample.fate] += 1
            if sample.input_ids:
                dataset.append(sample.input_ids, sample.labels)
    return dataset


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of samples in packs of up to `capacity` tokens: the longest first, each into the fullest pack it fits.

    Best-fit decreasing, which needs at most 11/9 of the fewest packs possible, and a few more (Johnson, 1974).
    """
    packs: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # packs by the tokens that still fit
    rooms = 0  # bit r is set where some pack has room for r more
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"sample {index} has {length} tokens, more than a pack's {capacity}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, number = capacity, len(packs)
            packs.append([])
        packs[number].append(index)
        by_room[room - length].append(number)
        rooms |= 1 << (room - length)
    return packs


def join(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several items as one."""
    return {
        "input_ids": torch.cat([item["input_ids"] for item in items]),
        "labels": torch.cat([item["labels"] for item in items]),
        "lengths": [length for item in items for length in item["lengths"]],
    }


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch in one row: ids, labels and positions (1, T), and where each sample begins and ends.

    Attention functions know sequences by their lengths and borders (attention.py, flash attention), and masks by the
    positions, where there is no cache. `ntk_alpha` says that no sample is longer than the model was trained for,
    however long the row.
    """
    whole = join(items)
    lengths = whole["lengths"]
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    return {
        "input_ids": whole["input_ids"][None],
        "labels": whole["labels"][None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "sequence_lengths": lengths,
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "ntk_alpha": torch.ones(1),
        "use_cache": False,
    }


@dataclass
class PaddingCollator:
    """A batch in rows, padded to its longest: for attention functions that know no sequences within a row."""

    pad_id: int

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rows = [part for item in items for part in _split(item)]
        width = max(len(ids) for ids, _ in rows)
        batch = {
            "input_ids": (len(rows), self.pad_id),
            "labels": (len(rows), IGNORED),
            "attention_mask": (len(rows), 0),
        }
        tensors = {name: torch.full((count, width), fill) for name, (count, fill) in batch.items()}
        for row, (ids, labels) in enumerate(rows):
            tensors["input_ids"][row, : len(ids)] = ids
            tensors["labels"][row, : len(ids)] = labels
            tensors["attention_mask"][row, : len(ids)] = 1
        return tensors | {"use_cache": False}


def _split(item: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(item["input_ids"].split(item["lengths"]), item["labels"].split(item["lengths"]), strict=True))
