"""The generation settings that `:conf` may change: their types and ranges, and how a typed value is read.

Fields of GenerationConfig that a chat can't use (beams, several replies, caches) are left out on purpose.
"""

import difflib
import json
import math
import re
from dataclasses import dataclass
from typing import Any

from qwen import QwenError

from .texts import Texts

WORDS = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}
NAME = re.compile(r"(?:^|[\s,]+)([^\s=,\[\]]+)\s*=\s*")


@dataclass(frozen=True)
class Setting:
    """What a value may be; None is allowed where `optional`, and means transformers' default."""

    kind: str  # bool, int, float, ids, id_lists or choice
    low: float = 0
    high: float = math.inf
    open_low: bool = False  # `low` itself is not allowed
    optional: bool = True
    sampling: bool = False  # read only while do_sample is true
    choices: tuple[str, ...] = ()


SETTINGS = {
    "do_sample": Setting("bool", optional=False),
    "temperature": Setting("float", sampling=True),
    "top_k": Setting("int", sampling=True),
    "top_p": Setting("float", high=1, sampling=True),
    "min_p": Setting("float", high=1, sampling=True),
    "typical_p": Setting("float", high=1, open_low=True, sampling=True),
    "epsilon_cutoff": Setting("float", high=1, sampling=True),
    "eta_cutoff": Setting("float", high=1, sampling=True),
    "repetition_penalty": Setting("float", open_low=True),
    "no_repeat_ngram_size": Setting("int"),
    "max_new_tokens": Setting("int", low=1, optional=False),
    "max_time": Setting("float", open_low=True),
    "bad_words_ids": Setting("id_lists"),
    "suppress_tokens": Setting("ids"),
    "begin_suppress_tokens": Setting("ids"),
    "eos_token_id": Setting("ids", optional=False),
    "prompt_lookup_num_tokens": Setting("int", low=1),
    "max_window_size": Setting("int", low=1, optional=False),
    "chat_format": Setting("choice", optional=False, choices=("chatml", "raw")),
}
COMMON = (
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens", "max_window_size",
    "chat_format",
)  # fmt: skip


def show_value(value: Any) -> str:
    """A value as one would type it."""
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)


def nearest(name: str, names: list[str], texts: Texts, before: str = "") -> str:
    """A remark that names what was probably meant (each with `before` in front), or nothing."""
    found = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    return texts("nearest", names=", ".join(before + name for name in found)) if found else ""


def find_setting(name: str, texts: Texts) -> Setting:
    """The setting of that name; QwenError with the near ones if there is none."""
    if name not in SETTINGS:
        close = nearest(name, list(SETTINGS), texts)
        raise QwenError(texts("unknown_setting", name=name, nearest=close, names=", ".join(SETTINGS)))
    return SETTINGS[name]


def describe_setting(setting: Setting, texts: Texts) -> str:
    """Type and range in words, to follow "must be"."""
    words = texts(f"kind_{setting.kind}", choices=" / ".join(setting.choices))
    if setting.kind in ("int", "float"):
        if setting.high < math.inf:
            key = "range_above_to" if setting.open_low else "range_between"
        else:
            key = "range_above" if setting.open_low else "range_from"
        words += texts(key, low=setting.low, high=setting.high)
    return words + (texts("or_none") if setting.optional else "")


def parse_settings(text: str, texts: Texts) -> dict[str, Any]:
    """Values by name from `key=value key=value ...`; all are read before any may be set.

    Raises:
        QwenError: what is no pair, an unknown name, or a value of the wrong type or range.
    """
    before, *parts = NAME.split(text.strip())  # what comes before the first name, then names and values in turn
    if before or not parts:
        raise QwenError(texts("bad_pair", text=text.strip()))
    values = {}
    for name, typed in zip(parts[::2], map(str.strip, parts[1::2]), strict=True):
        setting = find_setting(name, texts)
        try:
            values[name] = parse_value(typed, setting)
        except (ValueError, RecursionError):  # the second from thousands of brackets
            expected = describe_setting(setting, texts)
            raise QwenError(texts("bad_value", name=name, expected=expected, value=typed[:40])) from None
    return values


def parse_value(typed: str, setting: Setting) -> Any:
    """The value that was typed; ValueError if it is not of the setting's type or range."""
    word = typed.lower()
    if word in ("none", "null"):
        if not setting.optional:
            raise ValueError("a value is needed")
        return None
    if setting.kind == "choice":
        if word not in setting.choices:
            raise ValueError("not one of the choices")
        return word
    if setting.kind == "bool":
        if word not in WORDS:
            raise ValueError("neither true nor false")
        return WORDS[word]
    if setting.kind in ("int", "float"):
        return check_range(int(typed) if setting.kind == "int" else float(typed), setting)
    value = json.loads(typed)
    if setting.kind == "ids" and type(value) is int:
        value = [value]
    for ids in value if setting.kind == "id_lists" else [value]:
        if not isinstance(ids, list) or not ids or any(type(i) is not int for i in ids):
            raise ValueError("not a list of ids")
        for i in ids:
            check_range(i, setting)
    return value


def check_range(value: float, setting: Setting) -> float:
    """The value itself; ValueError if it is out of the setting's range or not finite."""
    below = value <= setting.low if setting.open_low else value < setting.low
    if not math.isfinite(value) or below or value > setting.high:
        raise ValueError("out of range")
    return value
