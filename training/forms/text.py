"""Plain text, to continue pre-training on."""

from typing import Any

from ..samples import BadSample, Notes, Text
from .fields import clean_text, note_unknown, read_switch, refuse_fields

EXAMPLE = '{"text": ...}'


def matches(row: dict[str, Any]) -> bool:
    return row.get("text") is not None


def read(row: dict[str, Any], where: str, notes: Notes) -> list[Text]:
    refuse_fields(row)
    if read_switch(row, "the sample") is False:
        notes.add("sample left out, as it says itself")
        return []
    text = clean_text(row["text"], '"text"', notes)
    if not text.strip():
        raise BadSample('"text" is empty', "an empty text")
    note_unknown(row, ("text",), notes)
    if any(token in text for token in ("<|im_start|>", "[INST]", "### Response:")):
        notes.add("text that looks like a rendered conversation: all of it is learned, as plain text")
    return [Text(text, where)]
