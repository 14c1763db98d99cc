"""What is in a file of conversations: counts, lengths, what was cut, and the first sample with its loss in colour."""

import os
import sys
from collections.abc import Sequence
from itertools import groupby

from qwen import QWenTokenizer

from .arguments import DataArguments
from .data import TokenDataset, pack
from .preference import PreferenceDataset
from .samples import Conversation, Notes, Sample

FATES = {  # what becomes of samples, in the order of a report
    "whole": "used whole",
    "split": "pieces of longer texts",
    "cut": "cut after the last reply that fits",
    "too long": "dropped: the first reply does not fit",
    "too long to judge": "dropped: a reply does not fit",
    "no reply": "dropped: no reply to learn from",
}
GREEN, RED, DIM, RESET = "\033[32m", "\033[31m", "\033[2m", "\033[0m"
BAR = 40
SHOWN_TOKENS = 400


def describe_dataset(samples: TokenDataset | PreferenceDataset) -> str:
    """One line: how many samples are used, cut and dropped, and how much loss they carry."""
    parts = [f"{samples.fates[fate]:,} {text}" for fate, text in FATES.items() if samples.fates[fate]]
    share = ""
    if isinstance(samples, TokenDataset) and samples.ids:
        share = f"; {len(samples.ids):,} tokens, {samples.supervised / len(samples.ids):.0%} with loss"
    return f"{sum(samples.fates.values()):,} samples: {', '.join(parts)}{share}"


def print_report(
    path: str, conversations: Sequence[Sample], samples: TokenDataset | PreferenceDataset,
    tokenizer: QWenTokenizer, data: DataArguments, notes: Notes,
) -> None:  # fmt: skip
    """Print the whole report on one file."""
    print(f"{path}: {describe_dataset(samples)}")
    if notes.bad:
        print(f"{notes.bad:,} of {notes.samples:,} samples are bad:\n{notes.list_faults()}")
    if notes.remarks:
        print(notes.list_remarks())
    if isinstance(samples, PreferenceDataset):
        print_preferences(samples, tokenizer)
        return
    chats = [each for each in conversations if isinstance(each, Conversation)]
    if len(chats) < len(conversations):
        print(f"{len(conversations) - len(chats):,} plain texts: every token carries loss, without ChatML")
    replies = sum(message.role == "assistant" for each in chats for message in each.messages)
    print(f"{replies:,} replies, {replies / max(len(chats), 1):.1f} a sample")
    spelled = sum(
        any(token in message.content for token in tokenizer.special_tokens)
        for each in chats for message in each.messages
    )  # fmt: skip
    if spelled:
        print(f"{spelled:,} messages spell a control token such as <|im_end|>: it is trained on as plain text")
    if not len(samples):
        return
    lengths = samples.lengths
    packs = pack(lengths, data.model_max_length)
    print(f"--packing would make {len(packs):,} rows of up to {data.model_max_length:,} tokens, "
          f"{sum(lengths) / len(packs) / data.model_max_length:.0%} full\n")  # fmt: skip
    print(histogram(lengths))
    print(f"\nThe first sample, with --loss_on {data.loss_on} (what carries loss is "
          f"{'green' if use_colour() else 'in [[ ]]'}):\n")  # fmt: skip
    item = samples[0]
    print(show_labels(tokenizer, item["input_ids"].tolist(), item["labels"].tolist(), use_colour()))


def print_preferences(samples: PreferenceDataset, tokenizer: QWenTokenizer) -> None:
    """Lengths, and the replies of the first sample after its prompt: good in green or [[ ]], bad in red or (( ))."""
    colours = ("green", "red") if use_colour() else ("in [[ ]]", "in (( ))")
    print(f"\n{histogram(samples.lengths)}\n\nThe first sample, good replies {colours[0]}, bad ones {colours[1]}:\n")
    row = samples.rows[0]
    if prompt := row.get("prompt_ids"):
        print(tokenizer.decode(prompt))
    for name in ("chosen_ids", "completion_ids", "rejected_ids"):
        if name in row:
            good = name == "chosen_ids" or row.get("label", False)
            marks = ((GREEN if good else RED), RESET) if use_colour() else ("[[", "]]") if good else ("((", "))")
            print(f"{marks[0]}{tokenizer.decode(row[name])}{marks[1]}")


def histogram(lengths: Sequence[int], rows: int = 10) -> str:
    """Lengths in tokens, as bars."""
    width = max(-(-max(lengths) // rows), 1)
    counts = [0] * (max(lengths) // width + 1)
    for length in lengths:
        counts[length // width] += 1
    lines = [f"{i * width:>7,}–{(i + 1) * width - 1:<7,} {count:>8,} {'█' * round(BAR * count / max(counts))}"
             for i, count in enumerate(counts)]  # fmt: skip
    ordered = sorted(lengths)
    middle, high = ordered[len(ordered) // 2], ordered[int(0.95 * (len(ordered) - 1))]
    return "\n".join([f"tokens a sample: median {middle:,}, 95% up to {high:,}, longest {ordered[-1]:,}", *lines])


def show_labels(tokenizer: QWenTokenizer, ids: list[int], labels: list[int], colour: bool) -> str:
    """A sample as text, what carries loss in green or within [[ ]]."""
    marks = (GREEN, RESET + DIM) if colour else ("[[", "]]")
    pairs = list(zip(ids, labels, strict=True))[:SHOWN_TOKENS]
    text = ""
    for carries, run in groupby(pairs, key=lambda pair: pair[1] == pair[0]):
        part = tokenizer.decode([i for i, _ in run])
        text += f"{marks[0]}{part}{marks[1]}" if carries else part
    more = f"\n… {len(ids) - SHOWN_TOKENS:,} more tokens" if len(ids) > SHOWN_TOKENS else ""
    return (DIM + text + RESET if colour else text) + more


def use_colour() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ
