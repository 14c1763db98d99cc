"""Conversations: OpenAI's `messages` (with `tools`), the published and ShareGPT's `conversations`."""

import json
from typing import Any

from ..samples import BadSample, Conversation, Notes
from .fields import keys, note_unknown, read_switch, refuse_fields
from .messages import add_system, finish_turns, read_turns

EXAMPLE = '{"messages": [...]} or {"conversations": [...]}'
LISTS = ("messages", "conversations", "conversation")
KNOWN = (*LISTS, "system", "tools", "functions")


def matches(row: dict[str, Any]) -> bool:
    return any(row.get(name) is not None for name in LISTS)


def is_turns(row: Any) -> bool:
    """Whether a row is a bare list of messages."""
    return isinstance(row, list) and bool(row) and all(
        isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in row
    )  # fmt: skip


def read(row: dict[str, Any], where: str, notes: Notes) -> list[Conversation]:
    given = [name for name in LISTS if row.get(name) is not None]
    if len(given) != 1:
        raise BadSample(f"a sample is {EXAMPLE}; this has {keys(row)}", "samples of an unknown form")
    refuse_fields(row)
    if read_switch(row, "the sample") is False:
        notes.add("sample left out, as it says itself")
        return []
    turns = row[given[0]]
    if isinstance(turns, str):  # in the cell of a table
        try:
            turns = json.loads(turns)
        except ValueError:
            raise BadSample(f'"{given[0]}" is text that is not JSON', "no list of messages") from None
    turns = add_system(read_turns(turns, given[0], notes), row.get("system"), notes)
    note_unknown(row, KNOWN, notes)
    tools = row.get("tools") or row.get("functions")
    return [Conversation(messages, where) for messages in finish_turns(turns, tools, notes)]
