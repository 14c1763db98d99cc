"""From the inner request to what the engine reads: prompt, sampling, stops, grammar."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from qwen import QwenError
from qwen.chatml import encode_messages
from qwen.engine import Request
from qwen.react import ACTION, INPUT, THOUGHT
from qwen.tools import STOP_WORD, Tool, is_result, read_tool, render_messages

from .errors import ApiError
from .grammar import Constraint, answer_rule, read_schema
from .parameters import SamplingRequest
from .protocol import CUSTOM_INPUT, AllowedChoice, ChatRequest, CustomTool, NamedTool, ToolName, ToolSpec
from .replies import logger
from .schemas import checker
from .server import Server

FORCED_THOUGHT = "I need to use a tool."
Check = Callable[[str], str | None]


@dataclass(frozen=True)
class ChatPlan:
    """What a request comes down to."""

    requests: Sequence[Request]
    tools: Sequence[Tool] = ()  # that may be called; none: the reply is text
    prefix: str = ""  # what the reply begins with already, for its parser
    older_form: bool = False  # calls are told as function_call
    most_calls: int | None = None
    custom: frozenset[str] = frozenset()  # tools that take free text
    stops: frozenset[str | int] = frozenset()  # that the client named
    echo: str = ""  # what the client wants to see before the reply
    shaped: bool = False  # an answer, where there is one, fits a schema or another form
    left_out: Sequence[str] = ()  # words of schemas that no grammar holds
    check: Check | None = None  # what an answer breaks of a strict schema, as far as the grammar did not see to it


@dataclass(frozen=True)
class Toolbox:
    """The tools of a request and what may be done with them."""

    tools: Sequence[Tool] = ()
    choice: str = "auto"  # auto, none, required, or a name
    strict: frozenset[str] = frozenset()  # tools whose arguments are held to their schema
    custom: Mapping[str, CustomTool] = field(default_factory=dict)
    param: str = "tools"

    @property
    def callable(self) -> Sequence[Tool]:
        return () if self.choice == "none" else self.tools

    @property
    def forced(self) -> Sequence[Tool]:
        """Those of which one must be called; none: the model decides."""
        if self.choice in ("auto", "none"):
            return ()
        return [tool for tool in self.tools if self.choice in ("required", tool.name)]


@contextlib.contextmanager
def naming(param: str) -> Iterator[None]:
    """Tell a mistake in this parameter as the client's."""
    try:
        yield
    except QwenError as error:
        raise ApiError(400, str(error), param, "invalid_value") from error
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start : error.end])
        raise ApiError(400, f"{param}: {half} is half a character, which can't be written", param) from error


def plan_chat(server: Server, body: ChatRequest) -> ChatPlan:
    """Check and translate a request. Takes up to a second where a grammar is made: call it in a thread.

    Raises:
        ApiError, QwenError: the request can't be served.
    """
    if getattr(server.ready.model.generation_config, "chat_format", "chatml") == "raw":
        raise ApiError(400, "this is a base model, which does not chat: use /v1/completions", "model")
    toolbox = read_tools(body)
    with naming(toolbox.param):
        for tool in toolbox.tools:
            tool.render().encode()
    prompt, prefix, is_open = build_chat_prompt(server, body, toolbox)
    param = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
    max_tokens = server.fit(prompt, body.max_completion_tokens or body.max_tokens, "messages", param)
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    constraint = make_constraint(server, body, toolbox, prefix)
    stops = [*(body.stop or []), *([STOP_WORD] if toolbox.callable else [])]
    requests = [
        server.request(
            prompt,
            max_tokens,
            body,
            number=number,
            stops=stops,
            strip=not body.continues,
            top_logprobs=top_logprobs,
            prompt_logprobs=body.prompt_logprobs,
            constraint=constraint and constraint.copy(),
        )
        for number in range(body.n or 1)
    ]
    if server.settings.log_prompts:
        logger.info("prompt: %s", json.dumps([message.plain() for message in body.messages], ensure_ascii=False))
    older_form = bool(body.functions)
    left_out = constraint.left_out if constraint else ()
    return ChatPlan(
        requests, toolbox.callable, prefix, older_form,
        1 if older_form or body.parallel_tool_calls is False else None,
        frozenset(toolbox.custom), frozenset([*(body.stop or []), *(body.stop_token_ids or [])]),
        body.messages[-1].plain()["content"] if body.echo and body.continues else "",
        bool(body.formats), left_out, make_check(body, left_out),
    )  # fmt: skip


def build_chat_prompt(server: Server, body: ChatRequest, toolbox: Toolbox) -> tuple[list[int], str, bool]:
    """Ids of the prompt, what the reply's parser is to read first, and whether the last turn goes on."""
    most = server.settings.max_messages
    if len(body.messages) > most:
        raise ApiError(
            400, f"messages: there are {len(body.messages)}, and at most {most} here", "messages", "invalid_value"
        )
    messages = [message.plain() for message in body.messages]
    with naming("messages"):
        turns = render_messages(messages, toolbox.callable)
    is_open, prefix = is_result(messages[-1]), f"{THOUGHT}\n" if is_result(messages[-1]) else ""
    if body.continues and not is_open:
        is_open = True
        turns[-1]["content"] = messages[-1]["content"]  # to the last blank
    if forced := toolbox.forced:
        prefix = ACTION if len(forced) > 1 else f"{ACTION} {forced[0].name}\n{INPUT}"
        if not is_open:
            turns.append({"role": "assistant", "content": THOUGHT})
        turns[-1]["content"] += f" {FORCED_THOUGHT}\n{prefix}"
        is_open = True
    begins = not is_open and body.add_generation_prompt is not False
    return encode_messages(server.ready.tokenizer, turns, begins, is_open), prefix, is_open


# ---- tools ----


def read_tools(body: ChatRequest) -> Toolbox:
    """The tools of a request; those that it does not allow to be called are left out."""
    param = "functions" if body.functions else "tools"
    specs = [ToolSpec(function=function) for function in body.functions or []] or body.tools or []
    with naming(param):
        tools = [read_spec(spec) for spec in specs]
    names = [tool.name for tool in tools]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ApiError(400, f"{param}: the name {twice.pop()!r} is there twice", param, "invalid_value")
    choice = body.tool_choice or body.function_call or "auto"
    strict = frozenset(
        tool.name for tool, spec in zip(tools, specs, strict=True) if spec.function and spec.function.strict
    )
    custom = {spec.custom.name: spec.custom for spec in specs if spec.custom is not None and spec.type == "custom"}
    asked = "tool_choice" if body.tool_choice else "function_call"
    if isinstance(choice, AllowedChoice):
        allowed = [tool.name for tool in choice.allowed_tools.tools]
        check_names(allowed, names, asked)
        tools = [tool for tool in tools if tool.name in allowed]
        choice = choice.allowed_tools.mode
    if isinstance(choice, NamedTool | ToolName):
        check_names([choice.name], names, asked)
        choice = choice.name
    return Toolbox(tools, choice if tools else "none", strict, custom, param)


def check_names(wanted: Sequence[str], names: Sequence[str], param: str) -> None:
    if unknown := [name for name in wanted if name not in names]:
        raise ApiError(400, f"{param}: there is no {unknown[0]!r} among {list(names)}", param, "invalid_value")


def read_spec(spec: ToolSpec) -> Tool:
    if spec.custom is not None and spec.type == "custom":
        if spec.custom.format is not None and spec.custom.format.type == "grammar":
            raise QwenError(
                f"the custom tool {spec.custom.name} has a grammar, which is not held here: leave format out"
            )
        schema = {"type": "object", "properties": {CUSTOM_INPUT: {"type": "string"}}, "required": [CUSTOM_INPUT],
                  "additionalProperties": False}  # fmt: skip
        return read_tool({"name": spec.custom.name, "description": spec.custom.description, "parameters": schema})
    assert spec.function is not None, "checked by its model"
    return read_tool(spec.function.model_dump(exclude_none=True))


# ---- grammars ----


def make_constraint(server: Server, body: ChatRequest, toolbox: Toolbox, prefix: str) -> Constraint | None:
    """The grammar that a reply is held to, if any."""
    tools, formats = toolbox.callable, body.formats
    strict = toolbox.strict & {tool.name for tool in tools}
    if toolbox.forced:
        with naming(toolbox.param):
            return server.grammars.call(toolbox.forced, prefix)
    if tools and formats:
        [(param, kind, value)] = formats
        with naming(param):
            answer_rule(kind, value)
        with naming(param if "grammar" in kind else f"{toolbox.param} or {param}"):
            return server.grammars.call_or_answer(tools, prefix, kind, value, body.parallel_tool_calls is not False)
    if strict:
        with naming(toolbox.param):
            return server.grammars.strict(tools, strict, prefix)
    return shape(server, body)


def shape(server: Server, body: SamplingRequest) -> Constraint | None:
    """The grammar of a reply that is no call."""
    if not body.formats:
        return None
    [(param, kind, value)] = body.formats
    with naming(param):
        return server.grammars.reply(kind, value)


def make_check(body: SamplingRequest, left_out: Sequence[str]) -> Check | None:
    """What is left to be checked of a strict schema when the reply is there."""
    if not left_out or not body.strict_format:
        return None
    return checker(read_schema(body.formats[0][2]), list(left_out))
