"""A streaming parser of ReAct replies: text and tool calls out of Thought, Action, Action Input and Final Answer.

Rules, in the order in which they apply:

1. Labels stand at the beginning of a line. A call is an Action that names a known tool, then an Action Input. Where
   Actions follow each other before an input, the last one counts.
2. The text of a reply with calls is what stands before the first of them, and of another reply what follows
   `Final Answer:`; a `Thought:` before it is dropped. What fits neither form is text as it came, without a leading
   `Thought:`.
3. Arguments are the first JSON object after `Action Input:`; what follows it is dropped, and triple backticks around
   it too. An object may break off where the reply does.
4. Arguments that don't begin as an object are the value of the tool's one parameter, if it has but one and it takes
   text; a JSON string there is that text, and of code in triple backticks it is the code. Other tools get them as they
   came, up to the next label.
5. No arguments at all are an empty object.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tools import Tool

THOUGHT, ACTION, INPUT, OBSERVATION, ANSWER = "Thought:", "Action:", "Action Input:", "Observation:", "Final Answer:"
LABEL = re.compile(r"^(?:Thought|Action|Action Input|Observation|Final Answer):", re.MULTILINE)
LEADING_THOUGHTS = re.compile(r"(?:Thought:\s*)+")
CALL = re.compile(r"^Action:[ \t]*([^\n]*?)[ \t]*\n\s*Action Input:", re.MULTILINE)
BEGUN_CALL = re.compile(r"Action:[ \t]*([^\n]*)(?:\n\s*(\S[^\n]*)?)?")
FENCED = re.compile(r"```[^\n]*\n(.*?)(?:\n?```.*|$)", re.DOTALL)
FENCE_OF_OBJECT = re.compile(r"```\w*\s*(?=\{)")


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool; `arguments` is a JSON object as text, if the model wrote one."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Delta:
    """What a piece of a reply adds: text, the beginning of call number `call`, or more of its arguments."""

    text: str = ""
    call: int | None = None
    name: str | None = None
    arguments: str = ""


def join_deltas(deltas: Iterable[Delta]) -> tuple[str, list[ToolCall]]:
    """The text and the calls that deltas add up to."""
    text, calls = "", []
    for delta in deltas:
        text += delta.text
        if delta.name is not None:
            calls.append(ToolCall(delta.name, ""))
        if delta.call is not None:
            calls[delta.call] = ToolCall(calls[delta.call].name, calls[delta.call].arguments + delta.arguments)
    return text, calls


class ArgumentsReader:
    """Reads what follows `Action Input:`; see the rules above. `push` and `close` return the arguments' next piece."""

    def __init__(self, only_text_parameter: str | None) -> None:
        self.parameter = only_text_parameter
        self.done = False
        self.rest = ""  # after `done`: what does not belong to the arguments
        self._text = ""  # not yet returned
        self._depth = 0
        self._in_string = self._escaped = False

    def push(self, text: str) -> str:
        self._text += text
        if self._depth:
            return self._read_object()
        start = self._text.lstrip()
        if fence := FENCE_OF_OBJECT.match(start):
            start = start[fence.end() :]
        if start.startswith("{"):
            self._text = start
            return self._read_object()
        return ""

    def _read_object(self) -> str:
        """Everything up to the brace that closes the object."""
        text, self._text = self._text, ""
        for place, char in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._in_string = True
            else:
                self._depth += (char == "{") - (char == "}")
                if not self._depth:
                    self.done, self.rest = True, text[place + 1 :]
                    return text[: place + 1]
        return text

    def close(self) -> str:
        if self.done or self._depth:
            return ""
        self.done = True
        text = self._text.strip()
        if fenced := FENCED.match(text):
            text = fenced[1]
        elif label := LABEL.search(text):
            text = text[: label.start()].rstrip()
        if not text:
            return "{}"
        if self.parameter is None:
            return text
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        return json.dumps({self.parameter: value if isinstance(value, str) else text}, ensure_ascii=False)


class ReactParser:
    """Takes a reply piece by piece; the deltas it returns add up to the same whatever the pieces.

    Args:
        tools: whose names an Action may have.
        any_name: take other names too.
        most_calls: how many calls a reply may have; more are dropped.
    """

    def __init__(self, tools: Iterable["Tool"], any_name: bool = False, most_calls: int | None = None) -> None:
        self.tools = {tool.name: tool for tool in tools}
        self.any_name = any_name
        self.most_calls = most_calls
        self.calls = 0
        self._held = ""  # not yet returned
        self._arguments: ArgumentsReader | None = None
        self._read = self._read_beginning  # how what is held is to be understood

    def push(self, text: str) -> list[Delta]:
        """What may be shown now that `text` has come."""
        self._held += text
        deltas: list[Delta] = []
        before = None
        while before != (self._held, self._read):
            before = (self._held, self._read)
            deltas += self._read()
        return deltas

    def close(self) -> list[Delta]:
        """What was held back until the end of the reply."""
        if self._arguments is not None:
            return self._argue(self._arguments.close())
        text, self._held = self._held.strip() if self._read == self._read_thought else self._held.rstrip(), ""
        return [Delta(text=without_thought(text))] if text and self._read != self._read_on else []

    # Each returns deltas for what of `_held` can be understood, and sets how to go on.

    def _read_beginning(self) -> list[Delta]:
        self._held = self._held.lstrip()
        if self._held.startswith((THOUGHT, ACTION)):
            self._read = self._read_thought
        elif self._held.startswith(ANSWER):
            self._held, self._read = self._held[len(ANSWER) :], self._read_answer
        elif not any(label.startswith(self._held) for label in (THOUGHT, ACTION, ANSWER)):
            self._read = self._read_text
        return []

    def _read_thought(self) -> list[Delta]:
        """Nothing is shown before it is clear what the thought leads to."""
        call = self._find_call(from_start=True)
        answer = re.search(rf"^{ANSWER}", self._held, re.MULTILINE)
        if answer and not (call and call.start() < answer.start()):
            self._held, self._read = self._held[answer.end() :], self._read_answer
        elif call:
            text = without_thought(self._held[: call.start()].strip())
            return [*([Delta(text=text)] if text else []), *self._begin_call(call)]
        return []

    def _read_answer(self) -> list[Delta]:
        self._held = self._held.lstrip()
        if self._held:
            self._read = self._read_all
        return []

    def _read_all(self) -> list[Delta]:
        return self._show(len(self._held))

    def _read_text(self) -> list[Delta]:
        """Everything is shown but the beginnings of calls."""
        if call := self._find_call():
            return [*self._show(call.start()), *self._begin_call(call)]
        starts = (match.start() for match in re.finditer(r"\n", self._held))
        return self._show(next((at for at in starts if self._may_be_call(self._held[at + 1 :])), len(self._held)))

    def _read_arguments(self) -> list[Delta]:
        text, self._held = self._held, ""
        deltas = self._argue(self._arguments.push(text))
        if self._arguments.done:
            self._held, self._arguments, self._read = self._arguments.rest, None, self._read_on
        return deltas

    def _read_on(self) -> list[Delta]:
        """After a call nothing counts but another."""
        call = self._find_call() if self.calls != self.most_calls else None
        return self._begin_call(call) if call else []

    def _find_call(self, from_start: bool = False) -> re.Match[str] | None:
        """The first call in what is held, whose own start is a line's only where the caller says so."""
        calls = (call for call in CALL.finditer(self._held) if self.any_name or call[1] in self.tools)
        return next((call for call in calls if from_start or call.start()), None)

    def _may_be_call(self, line: str) -> bool:
        """Whether a line, and what follows it, can still become a call."""
        if len(line) <= len(ACTION):
            return ACTION.startswith(line)
        begun = BEGUN_CALL.fullmatch(line)
        if not begun:
            return False
        name = begun[1].rstrip()
        known = self.any_name or any(tool.startswith(name) for tool in self.tools)
        return known and INPUT.startswith(begun[2] or "")

    def _begin_call(self, call: re.Match[str]) -> list[Delta]:
        self._held, self._read = call.string[call.end() :], self._read_arguments
        tool = self.tools.get(call[1])
        self._arguments = ArgumentsReader(tool.only_text_parameter if tool else None)
        self.calls += 1
        return [Delta(call=self.calls - 1, name=call[1])]

    def _argue(self, text: str) -> list[Delta]:
        return [Delta(call=self.calls - 1, arguments=text)] if text else []

    def _show(self, size: int) -> list[Delta]:
        """Text up to `size`, without the blanks that may turn out to be its end."""
        text = self._held[:size].rstrip()
        self._held = self._held[len(text) :]
        return [Delta(text=text)] if text else []


def without_thought(text: str) -> str:
    """Text without the label at its beginning, which models like to double."""
    return LEADING_THOUGHTS.sub("", text, count=1) if text.startswith(THOUGHT) else text
