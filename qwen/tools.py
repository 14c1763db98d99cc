"""Tools in the ReAct form that Qwen-7B-Chat was trained on: prompts out of tools and messages, calls out of replies.

    def population(city: str) -> int: ...      # with a docstring that describes it and its arguments
    run_with_tools(model, tokenizer, "How many people live in Rome?", [population]).text

The model writes Thought, Action and Action Input, and stops where the Observation, the tool's result, begins; or it
writes Thought and Final Answer. A reply in any other form is text.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

from .chat import generate_replies, reply_config, reply_stops
from .chat_template import DESCRIPTION, INSTRUCTION, JSON_HINT, KNOWN_ANSWER
from .chatml import Message, Turn, encode_messages, history_window
from .errors import QwenError, first_line
from .react import ReactParser, ToolCall, join_deltas

if TYPE_CHECKING:
    from .tokenization_qwen import QWenTokenizer

STOP_WORD = "Observation:"  # a reply goes no further: what follows is the tool's to say


# ---- tools ----


@dataclass(frozen=True)
class Tool:
    """What a model is told of a tool.

    Attributes:
        parameters: a JSON schema of an object, or the published list of {"name", "description", "required", "schema"}.
        human_name: what people call it; by default its name.
        function: what `run_with_tools` calls, with the arguments by name.
    """

    name: str
    description: str = ""
    parameters: Any = field(default_factory=dict)
    human_name: str = ""
    function: Callable[..., Any] | None = None

    def render(self) -> str:
        """Its paragraph in the prompt. It asks for a JSON object, unless the description states a format itself."""
        states_format = "Format the arguments" in self.description or "triple backticks" in self.description
        text = DESCRIPTION.format(
            name=self.name,
            human=self.human_name or self.name,
            description=self.description,
            parameters=json.dumps(self.parameters, ensure_ascii=False),
        )
        return text if states_format else f"{text} {JSON_HINT}"

    @property
    def only_text_parameter(self) -> str | None:
        """The parameter's name, where there is but one and it takes text: arguments that aren't JSON are its value."""
        if isinstance(self.parameters, list):
            schemas = {entry.get("name"): entry.get("schema", {}) for entry in self.parameters}
        else:
            schemas = (self.parameters or {}).get("properties", {})
        [(name, schema)] = schemas.items() if len(schemas) == 1 else [(None, {})]
        return name if isinstance(schema, dict) and schema.get("type") == "string" else None


ToolLike = Tool | dict[str, Any] | Callable[..., Any]


def read_tool(tool: ToolLike) -> Tool:
    """A Tool of a Python function with type hints and a docstring, of OpenAI's {"type": "function", ...} or what is
    in it, or of the published plugin form with `name_for_model` and `description_for_model`.

    Raises:
        QwenError: a name, a type hint or a part of the docstring is missing; the message names it.
    """
    if isinstance(tool, Tool):
        return tool
    function = None
    if not isinstance(tool, dict):
        function = tool
        try:
            tool = get_json_schema(tool)
        except (DocstringParsingException, TypeHintParsingException) as error:
            raise QwenError(f"the tool {getattr(function, '__name__', function)}: {first_line(error)}") from error
    spec = tool.get("function", tool)
    name = spec.get("name_for_model") or spec.get("name")
    if not isinstance(name, str) or not name.strip() or len(name.splitlines()) > 1:
        raise QwenError(f"a tool's name is {name!r}: give it one, on one line")
    description = spec.get("description_for_model") or spec.get("description") or ""
    human_name = spec.get("name_for_human") or ""
    return Tool(name.strip(), description, spec.get("parameters") or {}, human_name, function)


def render_instruction(tools: Sequence[Tool]) -> str:
    """The instruction that precedes the question."""
    descriptions = "\n\n".join(tool.render() for tool in tools)
    return INSTRUCTION.format(descriptions=descriptions, names=", ".join(tool.name for tool in tools))


# ---- messages to ChatML ----


def trim(text: str | None) -> str:
    """Text without line breaks before it and blanks after it: the model was trained so."""
    return (text or "").lstrip("\n").rstrip()


def message_calls(message: Message) -> list[tuple[str | None, ToolCall]]:
    """The calls of an assistant's message with their ids, in OpenAI's form or in the older one without ids."""
    calls = [(call.get("id"), call["function"]) for call in message.get("tool_calls") or []]
    calls += [(None, message["function_call"])] if message.get("function_call") else []
    return [(id_, ToolCall(call["name"], call.get("arguments") or "{}")) for id_, call in calls]


def is_result(message: Message) -> bool:
    return message["role"] in ("tool", "function")


def render_messages(messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[Message]:
    """Messages of OpenAI's roles as turns of ChatML, their calls and results in ReAct's form.

    The instruction stands before the last question, or where one would stand. Where the last message is a tool's
    result, the assistant's turn is to be continued (`continue_final_message`), and ends in `Thought:`.

    Raises:
        QwenError: a result that no call asked for; the message says which.
    """
    turns: list[Message] = []
    continued = False  # the assistant's turn goes on after results
    number = 0
    while number < len(messages):
        message, first_result = messages[number], number + 1
        role, content = message["role"], trim(message.get("content"))
        if is_result(message):
            raise QwenError(f"messages[{number}] is a tool's result, but no call of the assistant comes before it")
        number = first_result
        if role == "assistant":
            while number < len(messages) and is_result(messages[number]):
                number += 1
            calls = message_calls(message)
            if calls:
                text = render_calls(content, calls, messages[first_result:number], first_result)
            elif number > first_result:
                raise QwenError(
                    f"messages[{first_result}] is a tool's result, but messages[{first_result - 1}] calls none"
                )
            else:
                text = KNOWN_ANSWER.format(answer=content) if tools else content
            if continued:
                turns[-1]["content"] += f"\n{text}"
            else:
                turns.append({"role": role, "content": text})
        else:
            turns.append({"role": "system" if role == "developer" else role, "content": content})
        continued = number > first_result
    if continued:
        turns[-1]["content"] += "\nThought:"
    if tools:
        turn = next((turn for turn in reversed(turns) if turn["role"] == "user"), None)
        if turn is not None:
            turn["content"] = f"{render_instruction(tools)}\n\nQuestion: {turn['content']}"
        else:  # whoever is driven by instructions alone
            place = next((i for i, turn in enumerate(turns, 1) if turn["role"] == "system"), 0)
            turns.insert(place, {"role": "user", "content": render_instruction(tools)})
    return turns


def render_calls(thought: str, calls: list[tuple[str | None, ToolCall]], results: Sequence[Message], first: int) -> str:
    """A thought and its calls, each followed by its result: found by its id, or without ids by its place.

    `first` is the number of the first result among the messages.
    """
    by_id: dict[str | None, str] = {}
    ids = [id_ if id_ is not None else str(place) for place, (id_, _) in enumerate(calls)]
    for place, result in enumerate(results):
        id_ = result.get("tool_call_id") or (ids[place] if place < len(ids) else None)
        if id_ not in ids or id_ in by_id:
            raise QwenError(
                f"messages[{first + place}] answers the call {id_!r}, which the assistant did not make before it"
            )
        by_id[id_] = trim(result.get("content"))
    text = thought if thought.startswith("Thought:") else f"Thought: {thought}"
    for id_, (_, call) in zip(ids, calls, strict=True):
        text += f"\nAction: {call.name}\nAction Input: {call.arguments}"
        if id_ in by_id:
            text += f"\nObservation: {by_id[id_]}"
    return text


# ---- the loop ----


@dataclass(frozen=True)
class ToolStep:
    """One round: what the model thought, what it called, what it was told."""

    thought: str
    call: ToolCall
    observation: str


@dataclass(frozen=True)
class ToolReply:
    """The answer and the steps to it. finish_reason: stop, length, or rounds where they were used up without answer."""

    text: str
    steps: list[ToolStep]
    finish_reason: str
    history: list[Turn]


def run_with_tools(
    model: Any,
    tokenizer: "QWenTokenizer",
    query: str,
    tools: Sequence[ToolLike],
    max_rounds: int = 5,
    history: Sequence[Turn] | None = None,
    system: str | None = None,
    generation_config: GenerationConfig | None = None,
    on_step: Callable[[ToolStep], Any] = lambda step: None,
    **kwargs: Any,
) -> ToolReply:
    """Let the model answer `query` with Python functions (or Tools that carry one), called as often as it asks.

    What goes wrong in a call, a tool's own errors included, is told to the model as the result.

    Args:
        max_rounds: replies of the model, at most.
        system: the system message; None is the checkpoint's default.
        on_step: is told every call and its result.
        kwargs: settings of the generation, as for `model.chat`.
    """
    tools = [read_tool(tool) for tool in tools]
    if missing := [tool.name for tool in tools if tool.function is None]:
        raise QwenError(f"the tool {missing[0]} has no function to call: give a Python function, or Tool(function=...)")
    config = reply_config(model, generation_config, kwargs)
    stops = [*reply_stops(tokenizer, config, None), STOP_WORD]
    system = tokenizer.default_system if system is None else system
    kept = [turn for turn, _ in history_window(tokenizer, history or [], system, config.max_window_size)]
    messages: list[Message] = [{"role": "system", "content": system}]
    for question, answer in kept:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": query})
    steps: list[ToolStep] = []
    for _ in range(max_rounds):
        goes_on = is_result(messages[-1])
        ids = encode_messages(tokenizer, render_messages(messages, tools), not goes_on, goes_on)
        [decoder] = generate_replies(model, tokenizer, [ids], config, stops, **kwargs)
        text, calls = parse_reply(("Thought:\n" if goes_on else "") + decoder.text, tools, any_name=True, most_calls=1)
        if not calls:
            reason = "length" if decoder.finish_reason == "length" else "stop"
            return ToolReply(text, steps, reason, [*(history or []), (query, text)])
        steps.append(ToolStep(text, calls[0], call_tool(tools, calls[0])))
        on_step(steps[-1])
        call = {"name": calls[0].name, "arguments": calls[0].arguments}
        messages.append({"role": "assistant", "content": text, "function_call": call})
        messages.append({"role": "function", "content": steps[-1].observation})
    return ToolReply("", steps, "rounds", list(history or []))


def call_tool(tools: Sequence[Tool], call: ToolCall) -> str:
    """The result of a call as text, or what went wrong, in words that the model can act upon."""
    by_name = {tool.name: tool for tool in tools}
    if call.name not in by_name:
        return f"Error: there is no tool {call.name}; use one of [{', '.join(by_name)}]"
    try:
        arguments = json.loads(call.arguments, strict=False)
    except ValueError as error:
        return f"Error: the arguments are not JSON ({error})"
    if not isinstance(arguments, dict):
        return "Error: the arguments are not a JSON object"
    try:
        result = by_name[call.name].function(**arguments)
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
    except Exception as error:  # the function is the caller's: whatever it raises, the model shall hear of
        return f"Error: {type(error).__name__}: {first_line(error)}"


def parse_reply(
    reply: str, tools: Iterable[Tool], any_name: bool = False, most_calls: int | None = None
) -> tuple[str, list[ToolCall]]:
    """A whole reply's text and calls; see ReactParser."""
    parser = ReactParser(tools, any_name, most_calls)
    deltas = [*parser.push(reply), *parser.close()]
    return join_deltas(deltas)
