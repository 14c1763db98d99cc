"""What every request that makes replies may say of them, whatever its protocol: OpenAI's parameters, and vLLM's."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from .tolerance import pass_over

MOST_STOPS = 16
TokenId = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Strict(BaseModel):
    """Knows all its fields, and does not take a string for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Loose(Strict):
    """Passes over fields that it does not know: clients annotate messages, parts, tools and calls."""

    model_config = ConfigDict(extra="ignore")


class Body(Strict):
    """A whole request: a parameter that nobody knows is refused, unless it asks for nothing."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": {"type": "null"}})

    @model_validator(mode="before")
    @classmethod
    def forget_neutral(cls, request: Any) -> Any:
        known = {name for field, info in cls.model_fields.items() for name in (field, info.alias) if name}
        return pass_over(request, known)


def unlimited(value: Any) -> Any:
    """-1, where it stands for no limit of the client's."""
    return None if value == -1 and not isinstance(value, bool) else value


def one_or_several(value: Any) -> Any:
    """A text as a list of one, so that a mistake is told of the list."""
    return [value] if isinstance(value, str) else value


def check_stops(stops: list[str] | None) -> list[str] | None:
    if stops is not None and len(stops) > MOST_STOPS:
        raise ValueError(f"{len(stops)} texts, and at most {MOST_STOPS} are looked for")
    for stop in stops or []:
        if not 1 <= len(stop) <= 1000:
            raise ValueError(f"a stop of {len(stop)} characters: from 1 to 1000 here")
    return stops


Stops = Annotated[
    list[str] | None,
    BeforeValidator(one_or_several, json_schema_input_type=str | list[str] | None),
    AfterValidator(check_stops),
]
Limit = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(unlimited, json_schema_input_type=int | None)]


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(None, description="usage so far in every chunk")
    include_obfuscation: bool | None = Field(None, description="without effect: chunks are not padded")


class JsonSchema(Loose):
    name: str = "reply"
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Loose):
    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="of a json_object, as llama.cpp has it")
    pattern: str | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def check_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema")
        for type_, name in (("regex", "pattern"), ("grammar", "grammar")):
            if self.type == type_ and getattr(self, name) is None:
                raise ValueError(f"the type {type_} goes with {name}")
        return self


class StructuredOutputs(Loose):
    """vLLM's: one of these."""

    json_: str | dict[str, Any] | None = Field(None, alias="json", description="a JSON schema")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = Field(None, description="in Lark's form or in GBNF")
    json_object: bool | None = None
    structural_tag: None = None


class SamplingRequest(Body):
    """What chat and completions have in common."""

    model: str | None = Field(None, description="the model's name as /v1/models gives it; it may be left out")
    temperature: float | None = Field(None, ge=0, le=2, description="0 always takes the likeliest token")
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1 are off")
    min_p: float | None = Field(None, ge=0, le=1, description="keeps tokens with this share of the likeliest one's")
    n: int | None = Field(None, ge=1, description="how many replies")
    seed: int | None = None
    stop: Stops = Field(None, description="the reply ends before any of these")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = Field(
        None, description="tokens that end it"
    )
    include_stop_str_in_output: bool | None = Field(None, description="the reply ends after the stop")
    ignore_eos: bool | None = Field(None, description="the reply goes on where the model would end it")
    min_tokens: int | None = Field(None, ge=0, description="the reply does not end sooner")
    bad_words: Annotated[list[str], Field(max_length=1024)] | None = Field(None, description="are not written")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="as in transformers; 1 is off")
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1024)] | None = Field(None, description="by token id")
    prompt_logprobs: int | None = Field(None, ge=0, le=20, description="scores of the prompt's tokens too")
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = Field(None, description="the older form of structured_outputs.json")
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    guided_grammar: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def check_together(self) -> "SamplingRequest":
        if self.stream_options is not None and self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        for token in self.logit_bias or {}:
            if not (token.isascii() and token.isdigit() and len(token) < 20):
                shown = token if len(token) <= 24 else f"{token[:21]}..."
                raise ValueError(f"logit_bias takes token ids, not {shown!r}")
        if len(self.formats) > 1:
            raise ValueError(f"{self.formats[0][0]} and {self.formats[1][0]} both shape the reply: send one of them")
        return self

    @property
    def formats(self) -> list[tuple[str, str, Any]]:
        """How the reply is shaped: the parameter that says so, the kind (json, regex, choice, grammar), and what."""
        found: list[tuple[str, str, Any]] = []
        wanted = self.response_format
        if wanted is not None and wanted.type != "text":
            kind, value = {
                "json_object": ("json", wanted.schema_ or {"type": "object"}),
                "json_schema": ("json", wanted.json_schema.schema_ if wanted.json_schema else None),
                "regex": ("regex", wanted.pattern),
                "grammar": ("grammar", wanted.grammar),
            }[wanted.type]
            found.append(("response_format", kind, {} if value is None else value))
        structured = self.structured_outputs
        if structured is not None:
            name = "structured_outputs"
            if structured.json_object:
                found.append((name, "json", {"type": "object"}))
            found += [
                (name, kind, value)
                for kind, value in (
                    ("json", structured.json_), ("regex", structured.regex), ("choice", structured.choice),
                    ("grammar", structured.grammar),
                ) if value is not None
            ]  # fmt: skip
        for kind in ("json", "regex", "choice", "grammar"):
            if (value := getattr(self, f"guided_{kind}")) is not None:
                found.append((f"guided_{kind}", kind, value))
        return found

    @property
    def strict_format(self) -> bool:
        wanted = self.response_format
        return bool(wanted and wanted.json_schema and wanted.json_schema.strict)
