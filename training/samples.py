"""What data become, whatever form they came in: samples, and notes on what was read and what was not."""

from collections import Counter
from dataclasses import dataclass, field

Span = tuple[int, int]  # of characters
SHOWN_FAULTS = 10  # of each kind


@dataclass(frozen=True)
class Message:
    """A block of the prompt; text is NFC, as the tokenizer wants it."""

    role: str  # system, user or assistant
    content: str
    train: bool = True  # False where the sample says that this reply carries no loss
    spans: tuple[Span, ...] | None = None  # the parts of a reply that the model writes; None is all of it


@dataclass(frozen=True)
class Conversation:
    """Messages in order: an optional system message, then user and assistant in turns."""

    messages: tuple[Message, ...]
    where: str  # file and line or index, for people


@dataclass(frozen=True)
class Text:
    """A document to continue pre-training on: every token carries loss."""

    text: str
    where: str


@dataclass(frozen=True)
class Preference:
    """Two replies to one prompt, of which the first is preferred."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    where: str


@dataclass(frozen=True)
class Verdict:
    """A reply that people liked, or did not."""

    prompt: tuple[Message, ...]
    reply: str
    good: bool
    where: str


Sample = Conversation | Text | Preference | Verdict


class BadSample(ValueError):
    """What is wrong with a sample, without saying in which file; `kind` is what it has in common with others."""

    def __init__(self, reason: str, kind: str = "other faults") -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass
class Notes:
    """What is worth telling about data that can be used, and all that can't."""

    samples: int = 0  # rows looked at, good or bad
    remarks: Counter[str] = field(default_factory=Counter)
    faults: dict[str, list[str]] = field(default_factory=dict)  # by kind: place and reason
    rows: set[str] = field(default_factory=set)  # places of bad rows

    def add(self, remark: str) -> None:
        self.remarks[remark] += 1

    def add_fault(self, where: str, fault: BadSample) -> None:
        self.faults.setdefault(fault.kind, []).append(f"{where}: {fault}")

    @property
    def bad(self) -> int:
        return sum(map(len, self.faults.values()))

    def list_faults(self) -> str:
        """All kinds of faults with their counts, the first ten of each with place and reason."""
        lines = []
        for kind, faults in sorted(self.faults.items(), key=lambda item: -len(item[1])):
            lines.append(f"{len(faults):,} × {kind}:")
            lines += [f"  {fault}" for fault in faults[:SHOWN_FAULTS]]
            if len(faults) > SHOWN_FAULTS:
                lines.append(f"  ... and {len(faults) - SHOWN_FAULTS:,} more")
        return "\n".join(lines)

    def list_remarks(self) -> str:
        return "\n".join(f"{count:,} × {remark}" for remark, count in self.remarks.most_common())
