"""The one inner request of all chat protocols, which is OpenAI's chat completion, and the bodies of plain ones.

Other protocols (responses, messages, Ollama) are translated into a ChatRequest and know nothing of the engine.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from .parameters import Body, Limit, Loose, SamplingRequest, TokenId

READABLE = ("text", "input_text", "output_text", "refusal")
PARTS = {"image": "images", "audio": "sound", "video": "video", "file": "files", "document": "documents"}


class Part(Loose):
    """A part of a message's content: text, or what the assistant refused with."""

    type: str = "text"
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def check_kind(self) -> "Part":
        if self.type not in READABLE:
            what = next((name for kind, name in PARTS.items() if kind in self.type), "such parts")
            raise ValueError(f"the part is of the type {self.type!r}: this model reads text alone, no {what}")
        if self.plain is None:
            raise ValueError(f"a part of the type {self.type} needs its text")
        return self

    @property
    def plain(self) -> str | None:
        return self.refusal if self.type == "refusal" else self.text


def as_text(arguments: Any) -> Any:
    """A call's arguments as JSON text, whether they came as text, as an object (Ollama's), or not at all."""
    if arguments is None:
        return "{}"
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


Arguments = Annotated[str, BeforeValidator(as_text, json_schema_input_type=str | dict[str, Any] | None)]


class FunctionCall(Loose):
    name: str
    arguments: Arguments = "{}"


class CustomCall(Loose):
    name: str
    input: str = ""


class ToolCallPart(Loose):
    id: str | None = None
    type: Literal["function", "custom"] = "function"
    function: FunctionCall | None = None
    custom: CustomCall | None = None

    @model_validator(mode="after")
    def check_kind(self) -> "ToolCallPart":
        if getattr(self, self.type) is None:
            raise ValueError(f"a call of the type {self.type} needs {self.type}")
        return self


class ChatMessage(Loose):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    tool_calls: list[ToolCallPart] | None = None
    function_call: FunctionCall | None = None
    tool_call_id: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def check_content(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of the role {self.role} needs content")
        if self.role != "assistant" and (self.tool_calls or self.function_call):
            raise ValueError(f"calls are the assistant's, not of the role {self.role}")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("a message of the role tool needs tool_call_id")
        return self

    def plain(self) -> dict[str, Any]:
        """As qwen.tools takes it: the content as one text, free text of a call as its one argument."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.plain or "" for part in content)
        message: dict[str, Any] = {"role": self.role, "content": content or self.refusal or ""}
        if self.tool_calls:
            message["tool_calls"] = [plain_call(call) for call in self.tool_calls]
        if self.function_call:
            message["function_call"] = self.function_call.model_dump()
        return message if self.tool_call_id is None else {**message, "tool_call_id": self.tool_call_id}


def plain_call(call: ToolCallPart) -> dict[str, Any]:
    if call.custom is not None and call.function is None:
        arguments = json.dumps({CUSTOM_INPUT: call.custom.input}, ensure_ascii=False)
        return {"id": call.id, "function": {"name": call.custom.name, "arguments": arguments}}
    assert call.function is not None, "checked by its model"
    return {"id": call.id, "function": call.function.model_dump()}


# ---- tools ----

CUSTOM_INPUT = "input"  # the one parameter of a tool that takes free text


class Function(Loose):
    """OpenAI's form, or the published plugin form with `name_for_model` and `description_for_model`."""

    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | list[dict[str, Any]] | None = None
    strict: bool | None = Field(None, description="true: the arguments are held to the schema")
    name_for_model: str | None = None
    name_for_human: str | None = None
    description_for_model: str | None = None


class CustomFormat(Loose):
    """What a custom tool's text is held to; OpenAI has it in `grammar`, or flat."""

    type: Literal["text", "grammar"] = "text"
    grammar: dict[str, str] | None = None
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None


class CustomTool(Loose):
    """A tool that takes free text."""

    name: str
    description: str | None = None
    format: CustomFormat | None = None


class ToolSpec(Loose):
    type: Literal["function", "custom"] = "function"
    function: Function | None = None
    custom: CustomTool | None = None

    @model_validator(mode="after")
    def check_kind(self) -> "ToolSpec":
        if getattr(self, self.type) is None:
            raise ValueError(f"a tool of the type {self.type} needs {self.type}")
        return self


class ToolName(Loose):
    name: str


class NamedTool(Loose):
    type: Literal["function", "custom"]
    function: ToolName | None = None
    custom: ToolName | None = None

    @model_validator(mode="after")
    def check_name(self) -> "NamedTool":
        if self.function is None and self.custom is None:
            raise ValueError(f"a choice of the type {self.type} needs {self.type}")
        return self

    @property
    def name(self) -> str:
        named = self.function or self.custom
        assert named is not None, "checked above"
        return named.name


class AllowedTools(Loose):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class AllowedChoice(Loose):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class ChatRequest(SamplingRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: Limit = Field(None, description="the older name of max_completion_tokens")
    max_completion_tokens: Limit = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[ToolSpec], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Function], Field(max_length=128)] | None = Field(None, description="the older form")
    function_call: Literal["none", "auto"] | ToolName | None = None
    add_generation_prompt: bool | None = Field(None, description="false: no new turn of the assistant is begun")
    continue_final_message: bool | None = Field(None, description="the last message goes on; an assistant's does so")
    echo: bool | None = Field(None, description="the reply begins with the message that it continues")

    @model_validator(mode="after")
    def check_chat(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        if self.tools and self.functions:
            raise ValueError("functions is the older form of tools: send one of them")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens say different things: send one of them")
        chosen = self.tool_choice or self.function_call
        if chosen not in (None, "none", "auto") and not (self.tools or self.functions):
            raise ValueError("tool_choice and function_call need tools")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other: send one of them")
        return self

    @property
    def continues(self) -> bool:
        """Whether the reply goes on where the last message ends."""
        if self.continue_final_message is not None:
            return self.continue_final_message
        last = self.messages[-1]
        prefills = last.role == "assistant" and not last.tool_calls and not last.function_call
        return prefills and bool(last.plain()["content"]) and self.add_generation_prompt is not True


# ---- completions ----


def read_prompts(prompt: Any) -> Any:
    """One prompt as a list of one, so that a mistake is told of the prompt it is in."""
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
        return [prompt]
    return prompt


def check_prompt(prompt: Any) -> Any:
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise ValueError("a prompt is a text or a list of token ids")
    for token in prompt:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ValueError(f"{str(token)[:40]!r} is no token id: they are numbers from 0 on")
    return prompt


Prompt = Annotated[
    Any, BeforeValidator(check_prompt, json_schema_input_type=str | Annotated[list[TokenId], Field(min_length=1)])
]
Prompts = Annotated[
    list[Prompt],
    BeforeValidator(read_prompts, json_schema_input_type=str | list[str] | list[TokenId] | list[list[TokenId]]),
]


class CompletionRequest(SamplingRequest):
    prompt: Prompts
    max_tokens: int | None = Field(
        None, ge=-1, description="default 16, as OpenAI's; 0 to score a prompt; -1: no limit"
    )
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def check_completion(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of must equal n: replies are not ranked")
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise ValueError("max_tokens 0 goes with echo: true")
        return self


# ---- the others ----


class TokenizeRequest(Body):
    """A text, or messages as a chat would read them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: Annotated[list[ToolSpec], Field(max_length=128)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def check_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send either prompt or messages")
        return self


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[TokenId]
