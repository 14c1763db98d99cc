"""Messages of one sample: read in any of the usual forms, checked, and put into the roles of ChatML."""

import json
import unicodedata
from dataclasses import dataclass
from typing import Any

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "function_call": "assistant", "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
Span = tuple[int, int]  # of characters


@dataclass(frozen=True)
class Message:
    """A block of the prompt; text is NFC, as the tokenizer wants it."""

    role: str  # system, user or assistant
    content: str
    train: bool = True  # False where the sample says that this reply carries no loss
    spans: tuple[Span, ...] | None = None  # the parts of a reply that the model writes; None is all of it


class BadSample(ValueError):
    """What is wrong with a sample, without saying where it stands."""


def read_turns(sample: Any) -> list[dict[str, Any]]:
    """The turns of a sample with `role`, `content`, `train` and what there is of calls; BadSample for a bad one."""
    if not isinstance(sample, dict):
        raise BadSample(f'a sample is {{"messages": [...]}} or {{"conversations": [...]}}, not {kind(sample)}')
    given = [name for name in ("messages", "conversations") if name in sample]
    if len(given) != 1:
        raise BadSample(f'a sample is {{"messages": [...]}} or {{"conversations": [...]}}; this has {_keys(sample)}')
    turns = sample[given[0]]
    if not isinstance(turns, list) or not turns:
        raise BadSample(f'"{given[0]}" is a list of messages, not {kind(turns)}')
    read = [_read_turn(turn, f"turn {number}") for number, turn in enumerate(turns, start=1)]
    if sample.get("system") is not None and read[0]["role"] != "system":
        read.insert(0, {"role": "system", "content": _text(sample["system"], '"system"'), "train": None})
    return read


def _read_turn(turn: Any, place: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise BadSample(f'{place}: a message has "role" and "content", or "from" and "value", and is not {kind(turn)}')
    name = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    calls = _read_calls(turn, place)
    if name is None or (not calls and "content" not in turn and "value" not in turn):
        raise BadSample(f'{place}: a message has "role" and "content", or "from" and "value"; this has {_keys(turn)}')
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise BadSample(f"{place}: the role {name!r} is unknown; a message has one of {', '.join(ROLES)}")
    if name == "function_call":  # ShareGPT's: the call is the value
        calls, content = {"function_call": _read_call(content, place)}, ""
    if calls and role != "assistant":
        raise BadSample(f"{place}: only the assistant calls tools, not the {role}")
    train = turn.get("train")
    if train is not None and not isinstance(train, bool):
        raise BadSample(f'{place}: "train" is {train!r}: write true or false')
    if train and role != "assistant":
        raise BadSample(f'{place}: "train" is true for a message of the {role}: only replies can carry loss')
    text = _text("" if content is None and calls else content, place)
    if role == "assistant" and not text.strip() and not calls and train is not False:
        raise BadSample(f'{place}: the reply is empty; fill it, leave it out, or give it "train": false')
    identity = {"tool_call_id": turn["tool_call_id"]} if role == "tool" and turn.get("tool_call_id") else {}
    return {"role": role, "content": text, "train": train, **calls, **identity}


def _read_calls(turn: dict[str, Any], place: str) -> dict[str, Any]:
    """`tool_calls` or `function_call` of a message, checked, with arguments as text."""
    if turn.get("function_call"):
        return {"function_call": _read_call(turn["function_call"], place)}
    calls = turn.get("tool_calls")
    if not calls:
        return {}
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadSample(f'{place}: "tool_calls" is not a list of calls')
    return {"tool_calls": [{"id": call.get("id"), "function": _read_call(call.get("function", call), place)}
                           for call in calls]}  # fmt: skip


def _read_call(call: Any, place: str) -> dict[str, str]:
    if isinstance(call, str):
        try:
            call = json.loads(call)
        except ValueError:
            raise BadSample(f"{place}: a call is text that is not JSON: {call[:40]!r}") from None
    name = call.get("name") if isinstance(call, dict) else None
    if not isinstance(name, str) or not name:
        raise BadSample(f'{place}: a call has no "name" of a tool')
    arguments = call.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"name": name, "arguments": _text(text, place)}


def _text(content: Any, place: str) -> str:
    """The text of a message, which may come in OpenAI's parts."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
                 for part in content]  # fmt: skip
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else content
    if not isinstance(content, str):
        raise BadSample(f"{place}: the content is {kind(content)}, not text")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise BadSample(f"{place}: character {error.start} is half of a surrogate pair: the text is damaged") from None
    return unicodedata.normalize("NFC", content)


def check_order(turns: list[dict[str, Any]]) -> None:
    """BadSample unless user and assistant take turns after an optional system message; results follow calls."""
    expected = ("system", "user")
    for number, turn in enumerate(turns, start=1):
        role = turn["role"]
        if role not in expected:
            reason = "a conversation begins with the user (after an optional system message)"
            if number > 1:
                reason = f"after {turns[number - 2]['role']} comes {' or '.join(expected)}"
            raise BadSample(f"turn {number}: {role} is out of place: {reason}")
        calls = "tool_calls" in turn or "function_call" in turn
        following = {"system": ("user",), "user": ("assistant",), "tool": ("tool", "assistant"), "assistant": ("user",)}
        expected = ("tool",) if calls else following[role]


def kind(value: Any) -> str:
    """What a JSON value is, for people."""
    names = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "true or false"}
    name = names.get(type(value), "a number")
    return f"an empty {name.split()[-1]}" if value in ({}, [], "") else name


def _keys(fields: dict[str, Any]) -> str:
    return ", ".join(f'"{key}"' for key in list(fields)[:6]) or "nothing"
