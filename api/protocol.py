"""What clients may send: OpenAI's requests, and what is added to them. Anything else is refused by name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .errors import drop_neutral

Stop = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Strict(BaseModel):
    """Knows all its fields, and does not take a string for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SamplingRequest(Strict):
    """What chat and completions have in common."""

    model: str | None = Field(None, description="the model's name as /v1/models gives it; it may be left out")
    temperature: float | None = Field(None, ge=0, le=2, description="0 always takes the likeliest token")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, description="0 is off")
    n: int | None = Field(None, ge=1, description="how many replies")
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = Field(
        None, description="the reply ends before any of these"
    )
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="as in transformers; 1 is off")
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1024)] | None = Field(None, description="by token id")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def forget_neutral(cls, request: Any) -> Any:
        return drop_neutral(request)

    @model_validator(mode="after")
    def check_together(self) -> "SamplingRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        for token in self.logit_bias or {}:
            if not (token.isascii() and token.isdigit()):
                raise ValueError(f"logit_bias takes token ids, not {token!r}")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


# ---- chat ----


class TextPart(Strict):
    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    name: str
    arguments: str


class ToolCallPart(Strict):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCallPart] | None = None
    function_call: FunctionCall | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None

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
        """As qwen.tools takes it: the content as one text."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        message = self.model_dump(include={"role", "tool_calls", "function_call", "tool_call_id"}, exclude_none=True)
        return {**message, "content": content or self.refusal or ""}


class Function(Strict):
    """OpenAI's form, or the published plugin form with `name_for_model` and `description_for_model`."""

    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | list[dict[str, Any]] | None = None
    strict: bool | None = Field(None, description="true: the arguments are held to the schema")
    name_for_model: str | None = None
    name_for_human: str | None = None
    description_for_model: str | None = None


class ToolSpec(Strict):
    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


class JsonSchema(Strict):
    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def check_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema")
        return self


class ChatRequest(SamplingRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="the older name of max_completion_tokens")
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolSpec], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Function], Field(max_length=128)] | None = Field(None, description="the older form")
    function_call: Literal["none", "auto"] | FunctionName | None = None

    @model_validator(mode="after")
    def check_chat(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        if self.tools and self.functions:
            raise ValueError("functions is the older form of tools: send one of them")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens say different things: send one of them")
        chosen = self.tool_choice or self.function_call
        if chosen not in (None, "none", "auto") and not (self.tools or self.functions):
            raise ValueError("tool_choice and function_call need tools")
        if (self.tools or self.functions) and self.response_format and self.response_format.type != "text":
            raise ValueError("response_format and tools exclude each other: arguments are JSON, the answer is text")
        return self


# ---- the others ----


class CompletionRequest(SamplingRequest):
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: int | None = Field(None, ge=0, description="default 16, as OpenAI's; 0 only with echo")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def check_completion(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of must equal n: replies are not ranked")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 goes with echo: true")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if self.prompt and isinstance(self.prompt[0], int) else self.prompt


class TokenizeRequest(Strict):
    """A text, or messages as a chat would read them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def check_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send either prompt or messages")
        return self


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: list[TokenId]
