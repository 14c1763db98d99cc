"""Fields beside the text: those that say what is not to be learned, those that can't be read, those that nobody knows.

A field is never dropped without a word: it is honoured, refused by name, or counted in the report.
"""

import re
import unicodedata
from collections.abc import Collection, Mapping
from typing import Any

from ..samples import BadSample, Notes

# Whether a reply carries loss, by the names that OpenAI and other trainers give it; False where a true value masks.
SWITCHES = {
    "train": True, "training": True, "trainable": True, "train_on_turn": True, "learn": True, "loss": True,
    "weight": True, "loss_weight": True, "sample_weight": True, "loss_mask": True, "loss_scale": True,
    "mask": False, "masked": False, "ignore_loss": False,
}  # fmt: skip
VALUES = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
MEDIA = ("image", "images", "video", "videos", "audio", "audios", "pixel_values")
AVOIDED = ("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_completion")
LABELS = ("label", "kto_tag")
NO_MEANING = frozenset(["id"])  # the published form has it
TAGS = re.compile(r"<(img|image|video|audio)>")
BOM = "\ufeff"


def read_switch(fields: Mapping[str, Any], place: str) -> bool | None:
    """Whether `fields` say that this carries loss; None if they say nothing."""
    said: dict[str, bool] = {}
    for name, means_loss in SWITCHES.items():
        value = fields.get(name)
        if value is None:
            continue
        known = VALUES.get(str(value).strip().lower()) if isinstance(value, bool | int | float | str) else None
        if known is None:
            raise BadSample(f'{place}: "{name}" is {value!r}: write true or false; a reply is learned whole or not at '
                            "all", "a weight other than 0 and 1")  # fmt: skip
        said[name] = known == means_loss
    if len(set(said.values())) > 1:
        raise BadSample(f"{place}: {' and '.join(map(repr, said))} contradict each other: leave one out",
                        "contradicting weights")  # fmt: skip
    return next(iter(said.values()), None)


def refuse_fields(sample: Mapping[str, Any], allowed: Collection[str] = ()) -> None:
    """BadSample for fields that would change what a sample means."""
    for name in MEDIA:
        if sample.get(name) not in (None, "", [], {}):
            raise BadSample(f'"{name}" is not read: this model knows no pictures, sound or video; leave such samples '
                            "out", "pictures, sound or video")  # fmt: skip
    for name in AVOIDED:
        if name not in allowed and sample.get(name) not in (None, "", [], {}):
            raise BadSample(f'"{name}" belongs to preferences: use --stage dpo, or give the chosen reply '
                            "as a conversation, or name the field in --ignore_fields", "preferences")  # fmt: skip
    for name in LABELS:
        value = sample.get(name)
        if name not in allowed and value is not None and VALUES.get(str(value).strip().lower()) is not None:
            raise BadSample(f'"{name}" says whether a reply is good, and bad ones are not imitated: train with --stage '
                            "kto, or leave those samples out, or name the field in --ignore_fields",
                            "labels of good and bad replies")  # fmt: skip


def note_unknown(fields: Mapping[str, Any], known: Collection[str], notes: Notes, of: str = "") -> None:
    """Count the fields that nobody reads."""
    for name, value in fields.items():
        if name not in known and name not in SWITCHES and name not in NO_MEANING and value not in (None, "", [], {}):
            notes.add(f'field "{name}"{of} not read')


def clean_text(text: Any, place: str, notes: Notes | None = None) -> str:
    """Text that is whole, in NFC, without byte order marks; BadSample if it is no text or damaged."""
    if not isinstance(text, str):
        raise BadSample(f"{place}: the content is {kind(text)}, not text", "content that is no text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadSample(f"{place}: character {error.start} is half of a surrogate pair: the text is damaged",
                        "damaged text") from None  # fmt: skip
    if BOM in text:
        text = text.replace(BOM, "")
        if notes is not None:
            notes.add("byte order mark within a text, taken out")
    if notes is not None:
        if TAGS.search(text):
            notes.add("text with tags like <img>: they are trained on as text, pictures are not read")
        if "\ufffd" in text:
            notes.add("text with the sign �: it was damaged when it was converted")
    return unicodedata.normalize("NFC", text)


def kind(value: Any) -> str:
    """What a JSON value is, for people."""
    names = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "true or false"}
    name = names.get(type(value), "a number")
    return f"an empty {name.split()[-1]}" if value in ({}, [], "") else name


def keys(fields: Mapping[str, Any]) -> str:
    return ", ".join(f'"{key}"' for key in list(fields)[:6]) or "nothing"
