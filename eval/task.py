"""What a benchmark is to the runner: samples, the prompt of each, and what its answer is worth.

A script subclasses `Task`. The runner calls its methods in this order: `load`, `prompt` for each sample, `judge_all`
with what the model answered, `scores`. Everything but `prompt` works without a model, so that a finished run can be
scored again.
"""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from qwen import QWenTokenizer
from qwen.chatml import build_prompt, stop_sequences

Record = dict[str, Any]  # a line of samples.jsonl: "id", and "text" or "logprobs"


@dataclass(frozen=True)
class Sample:
    """A question of a benchmark; `group` is its subject, or whatever else scores are also given by."""

    id: str
    group: str
    row: dict[str, Any]


class Prompt(NamedTuple):
    ids: list[int]
    family: str  # prompts of a family begin alike: the beginning is computed once


@dataclass(frozen=True)
class Verdict:
    """What one answer is worth: `value` is 1 or 0, or a share; `parts` are further figures by name."""

    value: float
    answer: Any = None  # what was read from the reply; None if nothing could be
    gold: Any = None
    parts: dict[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Score:
    """A line of the result: a value with its standard error (None where there is no simple one)."""

    name: str
    value: float
    stderr: float | None
    count: int


class Task(ABC):
    """One benchmark. `choices` not empty: the likeliest of them is the answer. Else the model writes."""

    name = ""
    title = ""
    checkpoint = "Qwen/Qwen-7B"
    chat = False
    choices: tuple[str, ...] = ()  # each one token
    stop_words: tuple[str, ...] = ()
    max_new_tokens = 512

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.remarks: dict[str, Any] = {}  # what the result says besides scores
        self.max_new_tokens: int = getattr(args, "max_new_tokens", None) or self.max_new_tokens

    @property
    def as_published(self) -> bool:
        return self.args.protocol == "qwen2023"

    @classmethod
    def add_arguments(cls, parser: argparse._ActionsContainer) -> None:
        """Flags that only this benchmark has; those that change prompts belong into `settings`."""
        return

    def settings(self) -> dict[str, Any]:
        """What changes the answers besides the model: two runs that differ in it are kept apart."""
        return {"protocol": self.args.protocol, "max_new_tokens": None if self.choices else self.max_new_tokens}

    @abstractmethod
    def load(self) -> list[Sample]:
        """The samples, in the order of the benchmark, cut to --subjects and --limit."""

    @abstractmethod
    def question(self, sample: Sample) -> str:
        """The text that the model is given: all of it, or for a chat model the user's message."""

    def prompt(self, sample: Sample, tokenizer: QWenTokenizer, longest: int) -> Prompt:
        """The ids of the prompt; `longest` is how many tokens the model was trained to read."""
        if self.chat:
            return Prompt(build_prompt(tokenizer, self.question(sample)).ids, "")
        return Prompt(tokenizer.encode_text(self.question(sample)), "")

    def stops(self, tokenizer: QWenTokenizer) -> list[list[int] | str]:
        """What ends a reply: the control tokens, and this benchmark's words."""
        return [*stop_sequences(tokenizer, "chatml"), *self.stop_words]

    @abstractmethod
    def judge(self, sample: Sample, record: Record) -> Verdict:
        """What the answer is worth; needs no model."""

    def judge_all(self, samples: Sequence[Sample], records: Sequence[Record]) -> list[Verdict]:
        return [self.judge(sample, record) for sample, record in zip(samples, records, strict=True)]

    def exports(self, samples: Sequence[Sample], verdicts: Sequence[Verdict]) -> dict[str, str]:
        """Further files of the run, by name: what official scorers and leaderboards take."""
        return {}

    @abstractmethod
    def scores(self, samples: Sequence[Sample], verdicts: Sequence[Verdict]) -> list[Score]:
        """The figures of the result, the main one first."""
