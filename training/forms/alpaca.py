"""Alpaca's form: an instruction, an optional input, the output; LLaMA-Factory adds system and history."""

from typing import Any

from ..samples import Conversation, Notes
from .fields import clean_text, note_unknown, read_switch, refuse_fields
from .messages import add_system, finish_turns
from .pairs import read_prompt, read_reply

EXAMPLE = '{"instruction": ..., "input": ..., "output": ...}'
KNOWN = ("instruction", "input", "output", "system", "history", "tools")


def matches(row: dict[str, Any]) -> bool:
    return row.get("instruction") is not None and row.get("output") is not None


def read(row: dict[str, Any], where: str, notes: Notes) -> list[Conversation]:
    refuse_fields(row)
    if read_switch(row, "the sample") is False:
        notes.add("sample left out, as it says itself")
        return []
    parts = [clean_text(row.get(name) or "", f'"{name}"', notes) for name in ("instruction", "input")]
    question = "\n".join(part for part in parts if part.strip())
    turns = read_prompt(question, "instruction", notes, row.get("history")) + read_reply(row["output"], "output", notes)
    note_unknown(row, KNOWN, notes)
    turns = add_system(turns, row.get("system"), notes)
    return [Conversation(messages, where) for messages in finish_turns(turns, row.get("tools"), notes)]
