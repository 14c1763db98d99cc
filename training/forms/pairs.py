"""A prompt and its reply: TRL's and OpenAI's prompt/completion, ms-swift's query/response, and their kin."""

from typing import Any

from ..samples import BadSample, Conversation, Notes
from .fields import clean_text, kind, note_unknown, read_switch, refuse_fields
from .messages import Turn, add_system, finish_turns, read_turns

EXAMPLE = '{"prompt": ..., "completion": ...}'
NAMES = (
    ("prompt", "completion"), ("prompt", "response"), ("query", "response"), ("question", "answer"),
    ("question", "response"), ("input", "output"), ("user", "assistant"), ("human", "assistant"),
    ("instruction", "response"),
)  # fmt: skip
KNOWN = ("history", "system", "tools")


def find_names(row: dict[str, Any]) -> tuple[str, str] | None:
    """The names of this row's prompt and reply."""
    return next((pair for pair in NAMES if all(row.get(name) is not None for name in pair)), None)


def matches(row: dict[str, Any]) -> bool:
    return find_names(row) is not None


def read(row: dict[str, Any], where: str, notes: Notes) -> list[Conversation]:
    refuse_fields(row)
    if read_switch(row, "the sample") is False:
        notes.add("sample left out, as it says itself")
        return []
    question, answer = find_names(row)
    turns = read_prompt(row[question], question, notes, row.get("history"))
    turns += read_reply(row[answer], answer, notes)
    note_unknown(row, (question, answer, *KNOWN), notes)
    turns = add_system(turns, row.get("system"), notes)
    return [Conversation(messages, where) for messages in finish_turns(turns, row.get("tools"), notes)]


def read_prompt(prompt: Any, name: str, notes: Notes, history: Any = None) -> list[Turn]:
    """The turns up to the reply: earlier ones of `history`, learned too; those within a prompt are not."""
    turns = read_history(history, notes)
    if isinstance(prompt, list):
        return turns + [turn | {"train": False} for turn in read_turns(prompt, name, notes)]
    return [*turns, {"role": "user", "content": clean_text(prompt, f'"{name}"', notes), "train": None}]


def read_reply(reply: Any, name: str, notes: Notes) -> list[Turn]:
    if isinstance(reply, list):
        return read_turns(reply, name, notes)
    text = clean_text(reply, f'"{name}"', notes)
    if not text.strip():
        raise BadSample(f'"{name}" is empty: fill it, or leave the sample out', "an empty reply")
    return [{"role": "assistant", "content": text, "train": None}]


def read_history(history: Any, notes: Notes) -> list[Turn]:
    """Earlier questions and replies, as pairs."""
    if history in (None, "", []):
        return []
    turns: list[Turn] = []
    for number, pair in enumerate(history if isinstance(history, list) else [history], start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadSample(f'"history", pair {number}: a question and its reply, not {kind(pair)}',
                            "a malformed history")  # fmt: skip
        place = f'"history", pair {number}'
        turns += [{"role": "user", "content": clean_text(pair[0], place, notes), "train": None},
                  *read_reply(pair[1], f"history, pair {number}", notes)]  # fmt: skip
    return turns
