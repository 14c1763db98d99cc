"""Replies with a verdict, true or false, for KTO: prompt, completion and label, or messages and label."""

from typing import Any

from ..samples import BadSample, Notes, Verdict
from .fields import LABELS, VALUES, note_unknown, refuse_fields
from .messages import add_system, read_turns
from .pairs import find_names, read_prompt, read_reply
from .preference import as_messages

EXAMPLE = '{"prompt": ..., "completion": ..., "label": true}'
KNOWN = (*LABELS, "messages", "conversations", "system", "history")


def matches(row: dict[str, Any]) -> bool:
    has_text = find_names(row) or row.get("messages") is not None or row.get("conversations") is not None
    return bool(has_text) and any(row.get(name) is not None for name in LABELS)


def read(row: dict[str, Any], where: str, notes: Notes) -> list[Verdict]:
    refuse_fields(row, LABELS)
    name = next(name for name in LABELS if row.get(name) is not None)
    good = VALUES.get(str(row[name]).strip().lower())
    if good is None:
        raise BadSample(f'"{name}" is {row[name]!r}: write true for a good reply, false for a bad one', "a bad label")
    names = find_names(row)
    if names and "messages" not in row and "conversations" not in row:
        prompt = read_prompt(row[names[0]], names[0], notes, row.get("history"))
        reply = read_reply(row[names[1]], names[1], notes)
    else:
        listed = "messages" if row.get("messages") is not None else "conversations"
        *prompt, last = read_turns(row[listed], listed, notes)
        reply = [last]
    note_unknown(row, (*KNOWN, *(names or ())), notes)
    messages = as_messages(add_system(prompt, row.get("system"), notes), reply, notes)
    return [Verdict(messages, reply[0]["content"], good, where)]
