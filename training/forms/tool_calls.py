"""Conversations with tools as the model reads and writes them: ReAct, rendered by qwen/tools.py.

At inference the tools stand before the last question only. So a conversation becomes one sample for each of its
questions, in which the replies to that question carry loss: what the model writes itself, not the tools' results.
"""

import json
import re
import unicodedata
from typing import Any

from qwen.errors import QwenError
from qwen.tools import STOP_WORD, is_result, read_tool, render_messages, trim

from ..samples import BadSample, Message, Notes, Span
from .fields import clean_text

BAD_TOOLS = "a malformed list of tools"
RESULT = re.compile("\ue000(\\d+)\ue001")  # private characters stand for results while their places are looked for


def render_questions(turns: list[dict[str, Any]], tools: Any, notes: Notes) -> list[tuple[Message, ...]]:
    """One conversation for each question of these turns (OpenAI's form), with `tools` before it.

    Raises:
        BadSample: a tool, a call or a result is malformed or out of place.
    """
    try:
        read = [read_tool(tool) for tool in _clean(_tool_list(tools), notes)]
    except (QwenError, AttributeError, TypeError) as error:
        raise BadSample(f"tools: {error}", BAD_TOOLS) from error
    questions = [number for number, turn in enumerate(turns) if turn["role"] == "user"]
    conversations = []
    for question, end in zip(questions, [*questions[1:], len(turns)], strict=True):
        own = turns[question + 1 : end]
        hidden, results = _hide_results(turns[:end])
        try:
            rendered = render_messages([_as_openai(turn) for turn in hidden], read)
        except QwenError as error:
            reason = re.sub(r"messages\[(\d+)\]", lambda m: f"turn {int(m[1]) + 1}", str(error))
            raise BadSample(reason, "a malformed call of a tool") from error
        *before, last = [{**turn, "content": _show_results(turn["content"], results)} for turn in rendered]
        messages = [Message(turn["role"], _nfc(turn["content"]), train=False) for turn in before]
        if last["role"] == "assistant":
            spans = written_spans(rendered[-1]["content"], results, _trained(own))
            messages.append(Message("assistant", _nfc(last["content"]), train=bool(spans), spans=tuple(spans)))
        conversations.append(tuple(messages))
    return conversations


def _tool_list(tools: Any) -> list[Any]:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise BadSample('"tools" is text that is not JSON', BAD_TOOLS) from None
    if tools is not None and not isinstance(tools, list):
        raise BadSample('"tools" is not a list of tools', BAD_TOOLS)
    return tools or []


def _clean(value: Any, notes: Notes) -> Any:
    """The same JSON value with all its texts checked."""
    if isinstance(value, dict):
        return {clean_text(key, "tools"): _clean(item, notes) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item, notes) for item in value]
    return clean_text(value, "tools", notes) if isinstance(value, str) else value


def _as_openai(turn: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in turn.items() if name != "train" and value is not None}


def _hide_results(turns: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The turns with a mark in place of each tool's result, and the results."""
    results = [trim(turn["content"]) for turn in turns if is_result(turn)]
    numbers = iter(range(len(results)))
    return [{**turn, "content": f"\ue000{next(numbers)}\ue001"} if is_result(turn) else turn for turn in turns], results


def _show_results(content: str, results: list[str]) -> str:
    return RESULT.sub(lambda match: results[int(match[1])], content)


def _trained(own: list[dict[str, Any]]) -> list[bool]:
    """For each piece between two results of a turn, whether its reply carries loss."""
    trained, current = [], True
    for turn in own:
        if is_result(turn):
            trained.append(current)
        else:
            current = turn.get("train") is not False
    return [*trained, current]


def written_spans(content: str, results: list[str], trained: list[bool]) -> list[Span]:
    """What the model writes of a turn: all but the results, and the `Thought:` with which it is asked to go on."""
    spans: list[Span] = []
    shown, position = "", 0
    marks = [*RESULT.finditer(content), None]
    for number, mark in enumerate(marks):
        piece = content[position : mark.start() if mark else len(content)]
        start = len("\nThought:") if number and piece.startswith("\nThought:") else 0
        end = len(piece.removesuffix(" ")) if piece.endswith(f"{STOP_WORD} ") else len(piece)
        if trained[min(number, len(trained) - 1)] and end > start:
            spans.append((len(_nfc(shown + piece[:start])), len(_nfc(shown + piece[:end]))))
        shown += piece
        if mark:
            shown, position = shown + results[int(mark[1])], mark.end()
    return spans


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
