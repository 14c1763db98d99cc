"""Messages of one sample: read in any of the usual forms, checked, and put into the roles of ChatML."""

import json
from collections.abc import Sequence
from typing import Any

from ..samples import BadSample, Message, Notes
from .fields import clean_text, keys, kind, note_unknown, read_switch
from .tool_calls import render_questions

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "function_call": "assistant", "tool": "tool",
    "function": "tool", "observation": "tool",
}  # fmt: skip
KNOWN = ("role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id")
ORDER = {"system": ("user",), "user": ("assistant",), "tool": ("tool", "assistant"), "assistant": ("user",)}
Turn = dict[str, Any]  # role, content, train, and what there is of calls


def read_turns(turns: Any, name: str, notes: Notes) -> list[Turn]:
    """The turns of a list of messages that is called `name`; BadSample for a bad one."""
    if not isinstance(turns, list) or not turns:
        raise BadSample(f'"{name}" is a list of messages, not {kind(turns)}', "no list of messages")
    return [read_turn(turn, f"turn {number}", notes) for number, turn in enumerate(turns, start=1)]


def add_system(turns: list[Turn], system: Any, notes: Notes) -> list[Turn]:
    """The turns after the system message that stands beside them; an empty one means none."""
    text = "" if system is None else clean_text(system, '"system"', notes)
    if not text.strip():
        return turns
    if turns and turns[0]["role"] == "system":
        if turns[0]["content"] != text:
            raise BadSample('"system" beside the messages and their own system message differ: leave one out',
                            "two system messages")  # fmt: skip
        return turns
    return [{"role": "system", "content": text, "train": None}, *turns]


def finish_turns(turns: list[Turn], tools: Any, notes: Notes) -> list[tuple[Message, ...]]:
    """Checked turns as messages: one conversation, or with tools one for each question."""
    check_order(turns)
    calling = any(turn["role"] == "tool" or "tool_calls" in turn or "function_call" in turn for turn in turns)
    if tools or calling:
        return render_questions(turns, tools, notes)
    if turns[0]["role"] == "system" and not turns[0]["content"].strip():
        notes.add("empty system message, trained on as such")
    return [tuple(Message(turn["role"], turn["content"], turn["train"] is not False) for turn in turns)]


def read_turn(turn: Any, place: str, notes: Notes) -> Turn:
    """One message, checked."""
    if not isinstance(turn, dict):
        raise BadSample(f'{place}: a message has "role" and "content", or "from" and "value", and is not {kind(turn)}',
                        "no message")  # fmt: skip
    name = turn.get("role") if turn.get("role") is not None else turn.get("from")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    calls = _read_calls(turn, place)
    if name is None or (not calls and "content" not in turn and "value" not in turn):
        raise BadSample(f'{place}: a message has "role" and "content", or "from" and "value"; this has {keys(turn)}',
                        "no message")  # fmt: skip
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise BadSample(f"{place}: the role {name!r} is unknown; a message has one of {', '.join(ROLES)}",
                        "an unknown role")  # fmt: skip
    if name == "function_call":  # ShareGPT's: the call is the value
        calls, content = {"function_call": _read_call(content, place)}, ""
    if calls and role != "assistant":
        raise BadSample(f"{place}: only the assistant calls tools, not the {role}", "misplaced call of a tool")
    train = read_switch(turn, place)
    if train and role != "assistant":
        said = next(field for field in turn if read_switch({field: turn[field]}, place))
        raise BadSample(f'{place}: "{said}" is {str(turn[said]).lower()} for a message of the {role}: only replies can '
                        "carry loss", "loss on what is no reply")  # fmt: skip
    note_unknown(turn, KNOWN, notes, " of messages")
    text = read_content("" if content is None and calls else content, place, notes)
    if role == "assistant" and not text.strip() and not calls and train is not False:
        raise BadSample(f'{place}: the reply is empty; fill it, leave it out, or give it "train": false',
                        "an empty reply")  # fmt: skip
    identity = {"tool_call_id": turn["tool_call_id"]} if role == "tool" and turn.get("tool_call_id") else {}
    return {"role": role, "content": text, "train": train, **calls, **identity}


def read_content(content: Any, place: str, notes: Notes) -> str:
    """The text of a message, which may come in OpenAI's parts."""
    if isinstance(content, list):
        other = [part.get("type") if isinstance(part, dict) else kind(part) for part in content
                 if not isinstance(part, dict) or part.get("type", "text") != "text" or "text" not in part]  # fmt: skip
        if other or not content:
            raise BadSample(f"{place}: the content has a part of type {str(other[0]) if other else 'none'!r}: only "
                            "text is read, no pictures, sound or video", "pictures, sound or video")  # fmt: skip
        content = "".join(clean_text(part["text"], place, notes) for part in content)
    return clean_text(content, place, notes)


def _read_calls(turn: dict[str, Any], place: str) -> dict[str, Any]:
    """`tool_calls` or `function_call` of a message, checked, with arguments as text."""
    if turn.get("function_call"):
        return {"function_call": _read_call(turn["function_call"], place)}
    calls = turn.get("tool_calls")
    if not calls:
        return {}
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadSample(f'{place}: "tool_calls" is not a list of calls', "a malformed call of a tool")
    return {"tool_calls": [{"id": call.get("id"), "function": _read_call(call.get("function", call), place)}
                           for call in calls]}  # fmt: skip


def _read_call(call: Any, place: str) -> dict[str, str]:
    if isinstance(call, str):
        try:
            call = json.loads(call)
        except ValueError:
            raise BadSample(
                f"{place}: a call is text that is not JSON: {call[:40]!r}", "a malformed call of a tool"
            ) from None
    name = call.get("name") if isinstance(call, dict) else None
    if not isinstance(name, str) or not name:
        raise BadSample(f'{place}: a call has no "name" of a tool', "a malformed call of a tool")
    arguments = call.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"name": name, "arguments": clean_text(text, place)}


def check_order(turns: Sequence[Turn]) -> None:
    """BadSample unless user and assistant take turns after an optional system message; results follow calls."""
    expected: tuple[str, ...] = ("system", "user")
    for number, turn in enumerate(turns, start=1):
        role = turn["role"]
        if role not in expected:
            reason = "a conversation begins with the user (after an optional system message)"
            if number > 1:
                reason = f"after {turns[number - 2]['role']} comes {' or '.join(expected)}"
            raise BadSample(f"turn {number}: {role} is out of place: {reason}", "turns out of order")
        calls = "tool_calls" in turn or "function_call" in turn
        expected = ("tool",) if calls else ORDER[role]
