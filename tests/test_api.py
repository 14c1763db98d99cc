"""The server as clients see it: the official openai client, LangChain, and raw sockets."""

import asyncio
import json
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

import live_server
from api.chat import stream_chat
from api.plan import plan_chat
from api.protocol import ChatRequest
from api.replies import Replies, UsageWanted
from api.server import Server, Settings
from openai_api import main, make_settings, parse_args, read_credentials
from qwen import QwenError, QWenTokenizer

KEY = "sk-secret"
CITY = '{"city": "Rome"}'
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def server(tokenizer: QWenTokenizer) -> Server:
    settings = Settings(
        credentials=[f"Bearer {KEY}"], max_messages=20, max_n=4, max_new_tokens=40, max_body=20_000,
        cors_origins=["https://page.example"], keep_alive=0.05,
    )  # fmt: skip
    return live_server.make_server(tokenizer, settings)


@pytest.fixture(scope="module")
def address(server: Server) -> Iterator[str]:
    with live_server.run_server(server) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http:
        yield http


def ask(client: OpenAI, text: str, **settings: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="Qwen-7B-Chat", messages=messages, **settings)


def idle(server: Server) -> bool:
    """Whether the engine comes to hold no request within some seconds."""
    deadline = time.monotonic() + 10
    while (server.engine.running or server.engine.waiting) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not server.engine.running and not server.engine.waiting


# ---- chat ----


def test_a_reply_has_all_that_clients_expect(client: OpenAI, tokenizer: QWenTokenizer) -> None:
    reply = ask(client, "say: 你好, world 😀\n\n", seed=1)
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-") and reply.model == "Qwen-7B-Chat"
    assert abs(reply.created - time.time()) < 60 and reply.system_fingerprint.startswith("fp_")
    [choice] = reply.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "你好, world 😀")
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)
    written = len(tokenizer.encode("你好, world 😀\n\n")) + 1
    assert reply.usage.completion_tokens == written
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + written
    assert reply.usage.prompt_tokens_details.cached_tokens <= reply.usage.prompt_tokens
    assert ask(client, "x", max_tokens=5).choices[0].finish_reason == "length"
    assert ask(client, "x", max_completion_tokens=5).usage.completion_tokens == 5


SETTINGS = [
    {},
    {"temperature": 0},
    {"temperature": 1.5, "top_p": 0.5, "presence_penalty": 1, "frequency_penalty": -0.5},
    {"extra_body": {"top_k": 50, "repetition_penalty": 1.3}},
    {"logit_bias": {"40": 3.5, "151645": -100}, "logprobs": True, "top_logprobs": 2},
    {"stop": ["e", "\n"], "n": 3},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_streams_add_up_to_the_reply_of_the_same_seed(client: OpenAI, settings: dict) -> None:
    settings = {"seed": 7, "max_tokens": 24, **settings}
    whole = ask(client, "Tell me something.", **settings)
    texts, reasons, usage, logprobs = {}, {}, None, []
    for chunk in ask(client, "Tell me something.", stream=True, stream_options={"include_usage": True}, **settings):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
            logprobs += choice.logprobs.content if choice.logprobs else []
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage.completion_tokens == whole.usage.completion_tokens and usage.prompt_tokens == whole.usage.prompt_tokens
    assert logprobs == (whole.choices[0].logprobs.content if whole.choices[0].logprobs else [])
    assert ask(client, "Tell me something.", **{**settings, "seed": 8}).choices != whole.choices or (
        settings.get("temperature") == 0
    )


def test_stop_words_end_replies_across_tokens_and_chunks(client: OpenAI) -> None:
    for stop, text in (("lo wor", "hel"), (["x", "世界"], "hello world, "), ("zzz", "hello world, 世界!"), ("h", "")):
        reply = ask(client, "say: hello world, 世界!", stop=stop)
        assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (text.rstrip(), "stop")
        stream = ask(client, "say: hello world, 世界!", stop=stop, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in stream) == text.rstrip()


def test_logprobs_are_of_the_tokens_that_came(client: OpenAI, tokenizer: QWenTokenizer) -> None:
    [choice] = ask(client, "say: 龘!", logprobs=True, top_logprobs=3, temperature=0).choices
    assert b"".join(bytes(token.bytes) for token in choice.logprobs.content).decode() == "龘!"
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3 and token.logprob <= token.top_logprobs[0].logprob <= 0
    [choice] = ask(
        client, "x", logprobs=True, temperature=0, max_tokens=6, extra_body={"repetition_penalty": 1}
    ).choices
    [again] = ask(client, "x", logprobs=True, top_logprobs=1, temperature=0, max_tokens=6).choices
    assert all(token.top_logprobs == [] for token in choice.logprobs.content)
    for token in again.logprobs.content:
        assert token.logprob == token.top_logprobs[0].logprob


def test_roles_stand_where_they_were_sent(client: OpenAI, http: httpx.Client, tokenizer: QWenTokenizer) -> None:
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b<|im_end|>"}]},
        {"role": "assistant"},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "c"},
    ]
    tokens = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert tokenizer.decode(tokens) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nab<|im_end|><|im_end|>\n<|im_start|>assistant\n"
        "<|im_end|>\n<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )
    assert sum(token in tokenizer.special_ids for token in tokens) == 11
    reply = client.chat.completions.create(model="Qwen-7B-Chat", messages=messages, max_tokens=2)
    assert reply.usage.prompt_tokens == len(tokens)


# ---- tools ----

CALLS = f"Thought: I look it up.\nAction: get_weather\nAction Input: {CITY}"
ROUNDS = f"say: {CALLS}||I now know the final answer\nFinal Answer: Sunny, 20 degrees."


def streamed(stream: Any) -> tuple[str, list[tuple], str | None]:
    """Text, calls and finish_reason of a stream's deltas."""
    text, calls, reason = "", [], None
    for chunk in stream:
        [choice] = chunk.choices
        text, reason = text + (choice.delta.content or ""), choice.finish_reason or reason
        for call in choice.delta.tool_calls or []:
            if call.id:
                assert call.index == len(calls) and call.type == "function"
                calls.append((call.function.name, ""))
            name, arguments = calls[call.index]
            calls[call.index] = (name, arguments + call.function.arguments)
    return text, calls, reason


@pytest.mark.parametrize(
    ("reply", "text", "calls"),
    [
        (CALLS, "I look it up.", [("get_weather", CITY)]),
        (f"{CALLS}\nObservation: rain", "I look it up.", [("get_weather", CITY)]),
        (f"Let me see.\n{CALLS[CALLS.index('Action') :]} and so on", "Let me see.", [("get_weather", CITY)]),
        (
            f"{CALLS}\n\nAction: get_time\nAction Input: {{}}",
            "I look it up.",
            [("get_weather", CITY), ("get_time", "{}")],
        ),
        ("Thought: I now know the final answer.\nFinal Answer: 42", "42", []),
        ("Just text.\nAction: is needed", "Just text.\nAction: is needed", []),
        ("Thought: x\nAction: rm\nAction Input: {}", "x\nAction: rm\nAction Input: {}", []),
    ],
)
def test_tools_whole_and_streamed(client: OpenAI, reply: str, text: str, calls: list) -> None:
    settings = {"tools": [WEATHER, TIME], "max_tokens": 100}
    [choice] = ask(client, f"say: {reply}", **settings).choices
    found = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
    assert (choice.message.content, found) == (text, calls)
    assert choice.finish_reason == ("tool_calls" if calls else "stop")
    assert len({call.id for call in choice.message.tool_calls or []}) == len(calls)
    stream = ask(client, f"say: {reply}", stream=True, **settings)
    assert streamed(stream) == (text, calls, choice.finish_reason)
    if len(calls) == 2:
        [choice] = ask(client, f"say: {reply}", parallel_tool_calls=False, **settings).choices
        assert len(choice.message.tool_calls) == 1


def test_several_rounds(client: OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": ROUNDS}]
    settings = {"model": "Qwen-7B-Chat", "tools": [WEATHER], "max_tokens": 100}
    [choice] = client.chat.completions.create(messages=messages, **settings).choices
    [call] = choice.message.tool_calls
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny, 20"}]
    [choice] = client.chat.completions.create(messages=messages, **settings).choices
    assert (choice.message.content, choice.finish_reason) == ("Sunny, 20 degrees.", "stop")
    messages[-1]["tool_call_id"] = "call_other"
    with pytest.raises(openai.BadRequestError, match=r"messages\[2\] answers the call 'call_other'"):
        client.chat.completions.create(messages=messages, **settings)


def test_the_older_form_of_functions(client: OpenAI) -> None:
    function = {
        "name_for_human": "天气", "name_for_model": "get_weather", "description_for_model": "查天气",
        "parameters": [{"name": "city", "description": "城市", "required": True, "schema": {"type": "string"}}],
    }  # fmt: skip
    messages: list[Any] = [{"role": "user", "content": ROUNDS}]
    settings: Any = {"model": "Qwen-7B-Chat", "functions": [function], "max_tokens": 100}
    [choice] = client.chat.completions.create(messages=messages, **settings).choices
    assert choice.finish_reason == "function_call" and choice.message.tool_calls is None
    assert choice.message.function_call.model_dump() == {"name": "get_weather", "arguments": CITY}
    name, arguments = "", ""
    for chunk in client.chat.completions.create(messages=messages, stream=True, **settings):
        if call := chunk.choices[0].delta.function_call:
            name, arguments = name + (call.name or ""), arguments + call.arguments
    assert (name, arguments) == ("get_weather", CITY)
    messages += [choice.message, {"role": "function", "name": "get_weather", "content": "sunny"}]
    [choice] = client.chat.completions.create(messages=messages, **settings).choices
    assert choice.message.content == "Sunny, 20 degrees."


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_calls_can_be_forced(client: OpenAI, choice: Any) -> None:
    settings = {"tools": [WEATHER, TIME], "tool_choice": choice, "max_tokens": 120, "seed": 3}
    [whole] = ask(client, "Weather?", **settings).choices
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    [call] = whole.message.tool_calls
    assert call.function.name in ("get_weather", "get_time")[: 1 if isinstance(choice, dict) else 2]
    arguments = json.loads(call.function.arguments)
    assert len(arguments["city"]) <= 12 if call.function.name == "get_weather" else isinstance(arguments, dict)
    text, calls, reason = streamed(ask(client, "Weather?", stream=True, **settings))
    assert (text, calls, reason) == ("", [(call.function.name, call.function.arguments)], "tool_calls")


def test_functions_of_the_older_form_can_be_forced(client: OpenAI) -> None:
    parameters = [{"name": "ok", "required": True, "schema": {"type": "boolean"}}]
    functions: Any = [{"name_for_model": name, "parameters": parameters} for name in ("查天气", "查 时间")]
    for call in ({"name": "查天气"}, {"name": "查 时间"}):
        [choice] = ask(client, "?", functions=functions, function_call=call, max_tokens=60).choices
        assert choice.message.function_call.name == call["name"] and choice.finish_reason == "function_call"
        assert set(json.loads(choice.message.function_call.arguments)) == {"ok"}


def test_tool_choice_none_keeps_tools_out(client: OpenAI) -> None:
    [choice] = ask(client, f"say: {CALLS}", tools=[WEATHER], tool_choice="none", max_tokens=60).choices
    assert choice.message.content == CALLS and choice.finish_reason == "stop"


class Person(BaseModel):
    name: str
    age: int


class Weather(BaseModel):
    city: str


def test_the_clients_helpers(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "A person, please."}]
    bounded = {"type": "json_schema", "json_schema": {"name": "p", "strict": True, "schema": {
        "type": "object", "required": ["name", "ok"], "additionalProperties": False,
        "properties": {"name": {"type": "string", "maxLength": 8}, "ok": {"type": "boolean"}}}}}  # fmt: skip
    [choice] = ask(client, "A person, please.", response_format=bounded, max_tokens=100).choices
    assert set(json.loads(choice.message.content)) == {"name", "ok"} and choice.finish_reason == "stop"
    text = '{"name": "Ann", "age": 3}'
    said: Any = [{"role": "user", "content": f"say: {text}"}]
    parsed = client.chat.completions.parse(model="Qwen-7B-Chat", messages=said, response_format=Person)
    assert parsed.choices[0].message.parsed == Person(name="Ann", age=3)
    with client.chat.completions.stream(model="Qwen-7B-Chat", messages=said, response_format=Person) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == Person(name="Ann", age=3)
    tool = openai.pydantic_function_tool(Weather, name="get_weather")
    called: Any = [{"role": "user", "content": f"say: {CALLS}"}]
    parsed = client.chat.completions.parse(model="Qwen-7B-Chat", messages=called, tools=[tool], max_tokens=100)
    assert parsed.choices[0].message.tool_calls[0].function.parsed_arguments == Weather(city="Rome")
    [choice] = client.chat.completions.create(
        model="Qwen-7B-Chat", messages=messages, response_format={"type": "json_object"}, max_tokens=40,
        logit_bias={"90": 100},
    ).choices  # fmt: skip
    assert choice.message.content.startswith("{")


def test_strict_arguments_fit_their_schema(server: Server, tokenizer: QWenTokenizer) -> None:
    """The grammar takes over where the input begins, also within a token."""
    from qwen.tools import read_tool

    tool = read_tool(WEATHER)
    for lead in ("Thought: x\nAction: get_weather\nAction Input:", 'Action: get_weather\nAction Input: {"'):
        constraint = server.grammars.strict([tool], ["get_weather"], "")
        for token in tokenizer.encode_text(lead):
            constraint.push(token)
        following = constraint.allowed(server.engine.model.device, 151936)
        allowed = {tokenizer.decoder[int(i)] for i in following.nonzero()[:, 0] if int(i) in tokenizer.decoder}
        assert all(token[:1] in b" {\nc" for token in allowed)
        assert b"x" not in allowed and allowed
    free = server.grammars.strict([tool], ["get_weather"], "")
    free.push(tokenizer.encode_text("Hello")[0])
    assert free.allowed(server.engine.model.device, 151936) is None


def test_asynchronous_clients_share_the_engine(address: str, server: Server) -> None:
    async def many() -> list[str]:
        async with AsyncOpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:

            async def one(number: int) -> str:
                text = ""
                stream = await client.chat.completions.create(
                    model="Qwen-7B-Chat", stream=True, messages=[{"role": "user", "content": f"say: number {number}!"}]
                )
                async for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
                return text

            return await asyncio.gather(*map(one, range(12)))

    assert asyncio.run(many()) == [f"number {i}!" for i in range(12)]
    assert idle(server)


# ---- completions ----


def test_completions(client: OpenAI, http: httpx.Client, tokenizer: QWenTokenizer) -> None:
    settings: Any = {"model": "Qwen-7B-Chat", "seed": 1, "max_tokens": 6}
    first = client.completions.create(prompt="The capital of France is", **settings)
    assert first.object == "text_completion" and first.usage.completion_tokens <= 6
    ids = tokenizer.encode("The capital of France is")
    several = client.completions.create(prompt=[ids, [1, 2, 3]], n=2, **settings)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == first.choices[0].text and several.usage.prompt_tokens == len(ids) + 3
    texts = [""] * 4
    for chunk in client.completions.create(prompt=[ids, [1, 2, 3]], n=2, stream=True, **settings):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in several.choices]

    echoed = client.completions.create(prompt="Hi you", echo=True, logprobs=2, temperature=0, **settings).choices[0]
    assert echoed.text.startswith("Hi you") and echoed.logprobs.token_logprobs[0] is None
    assert echoed.logprobs.tokens[:2] == ["Hi", " you"] and echoed.logprobs.text_offset[:2] == [0, 2]
    assert len(echoed.logprobs.tokens) == len(echoed.logprobs.top_logprobs) == len(echoed.logprobs.token_logprobs)
    scored = client.completions.create(prompt="Hi you", echo=True, logprobs=2, model="Qwen-7B-Chat", max_tokens=0)
    assert scored.choices[0].text == "Hi you" and scored.usage.completion_tokens == 0
    assert scored.choices[0].logprobs.token_logprobs == pytest.approx(echoed.logprobs.token_logprobs[:2], abs=1e-4)
    chunks = [json.loads(line[6:]) for line in http.post("/v1/completions", json={"prompt": "Hi you", "echo": True,
              "logprobs": 2, "temperature": 0, "seed": 1, "max_tokens": 6, "stream": True}).text.split("\n\n")
              if line.startswith("data: {")]  # fmt: skip
    assert [t for chunk in chunks for t in chunk["choices"][0]["logprobs"]["tokens"]] == echoed.logprobs.tokens


# ---- what is refused ----

USER = {"messages": [{"role": "user", "content": "x"}]}
REFUSED: list[tuple[dict, str | None, str | None]] = [
    ({"temperature": 2.1}, "temperature", None),
    ({"temperature": "1"}, "temperature", None),
    ({"temperature": True}, "temperature", None),
    ({"top_p": 5}, "top_p", None),
    ({"top_k": -2}, "top_k", None),
    ({"n": 0}, "n", None),
    ({"n": 5}, "n", None),
    ({"max_tokens": 0}, "max_tokens", None),
    ({"max_tokens": 100_000}, "max_tokens", "context_length_exceeded"),
    ({"max_tokens": 1020}, "messages", "context_length_exceeded"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", None),
    ({"stop": ""}, "stop", None),
    ({"stop": ["a"] * 17}, "stop", None),
    ({"presence_penalty": 3}, "presence_penalty", None),
    ({"frequency_penalty": -3}, "frequency_penalty", None),
    ({"repetition_penalty": 0}, "repetition_penalty", None),
    ({"logit_bias": {"x": 1}}, "logit_bias", None),
    ({"logit_bias": {"1": 101}}, "logit_bias", None),
    ({"logit_bias": {"151936": 1}}, "logit_bias", None),
    ({"top_logprobs": 2}, "top_logprobs", None),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", None),
    ({"stream_options": {"include_usage": True}}, "stream_options", None),
    ({"response_format": {"type": "xml"}}, "response_format.type", None),
    ({"response_format": {"type": "json_schema"}}, "response_format", None),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}},
     "response_format", None),
    ({"tools": [{"type": "function", "function": {}}]}, "tools", None),
    ({"tools": [WEATHER, WEATHER]}, "tools", None),
    ({"tool_choice": "required"}, "tool_choice", None),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", None),
    ({"tools": [WEATHER], "functions": [{"name": "x"}]}, "functions", None),
    ({"model": "gpt-4"}, "model", "model_not_found"),
    ({"foo": 1}, "foo", "unknown_parameter"),
    ({"stream_options": {"x": 1}, "stream": True}, "stream_options.x", "unknown_parameter"),
    ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
    ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
    ({"messages": []}, "messages", None),
    ({"messages": [{"role": "user", "content": "x"}] * 21}, "messages", None),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", None),
    ({"messages": [{"role": "user"}]}, "messages[0]", None),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", None),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages", None),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0]", None),
    ({"messages": [{"role": "user", "content": "word " * 1200}]}, "messages", "context_length_exceeded"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "param", "code"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_done_is_refused_by_name(http: httpx.Client, change: dict, param: str | None, code: str) -> None:
    response = http.post(
        "/v1/chat/completions", json={**USER, **change, "stream": True} if "x" in change else {**USER, **change}
    )
    error = response.json()["error"]
    assert response.status_code == (404 if code == "model_not_found" else 400)
    assert error["param"] == param and (code is None or error["code"] == code)
    assert error["type"] in ("invalid_request_error", "not_found_error")
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) > 10


def test_neutral_values_of_what_is_not_supported_pass(client: OpenAI) -> None:
    neutral = {"store": False, "modalities": ["text"], "service_tier": "auto", "metadata": None, "verbosity": None}
    assert ask(client, "say: ok", user="me", **neutral).choices[0].message.content == "ok"


def test_completions_refuse_too(http: httpx.Client) -> None:
    for change, param in (
        ({"suffix": "x"}, "suffix"), ({"best_of": 3}, "best_of"), ({"prompt": [151936]}, "prompt"),
        ({"prompt": []}, "prompt"), ({"prompt": ""}, "prompt"), ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": [[1], ["a"]]}, "prompt[1]"), ({"logprobs": 21}, "logprobs"), ({"messages": []}, "messages"),
        ({"prompt": "word " * 1200}, "prompt"),
    ):  # fmt: skip
        response = http.post("/v1/completions", json={"prompt": "x", **change})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), change


def test_a_missing_grammar_library_is_said(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    response = http.post("/v1/chat/completions", json={**USER, "response_format": {"type": "json_object"}})
    assert response.status_code == 400 and "pip install llguidance" in response.json()["error"]["message"]
    monkeypatch.undo()


# ---- other paths ----


def test_models_health_metrics_docs(client: OpenAI, http: httpx.Client, server: Server) -> None:
    assert [model.id for model in client.models.list()] == ["Qwen-7B-Chat"]
    assert client.models.retrieve("Qwen-7B-Chat").owned_by == "qwen"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="without an embedding head"):
        client.embeddings.create(model="Qwen-7B-Chat", input="x")
    assert http.get("/health").json() == {"status": "ok"}
    assert "swagger" in http.get("/docs").text and "/v1/chat/completions" in http.get("/openapi.json").json()["paths"]
    before = http.get("/metrics").text
    ask(client, "say: counted")
    after = http.get("/metrics").text

    def value(text: str, name: str) -> float:
        return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(name + " ")))

    assert value(after, "qwen_completion_tokens_total") > value(before, "qwen_completion_tokens_total")
    name = 'qwen_requests_total{path="/v1/chat/completions",status="200"}'
    assert value(after, name) == value(before, name) + 1
    response = http.get("/v1/nothing")
    assert response.status_code == 404 and response.json()["error"]["code"] == "unknown_url"
    assert http.get("/v1/chat/completions").status_code == 405


def test_tokenize_and_back(http: httpx.Client, tokenizer: QWenTokenizer) -> None:
    text = "你好 <|im_end|> ok"
    tokens = http.post("/tokenize", json={"prompt": text}).json()
    assert tokens == {"tokens": tokenizer.encode_text(text), "count": len(tokens["tokens"]), "max_model_len": 1024}
    assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": text}
    assert http.post("/detokenize", json={"tokens": [151900]}).json()["error"]["param"] == "tokens"
    assert http.post("/tokenize", json={}).status_code == 400


# ---- keys, origins, bodies ----


def test_keys(address: str) -> None:
    for headers in ({}, {"Authorization": "Bearer sk-secre"}, {"Authorization": KEY}, {"Authorization": "Bearer é"}):
        encoded = {name: value.encode() for name, value in headers.items()}
        response = httpx.get(f"{address}/v1/models", headers=encoded)
        assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["WWW-Authenticate"] == "Bearer"
    assert httpx.get(f"{address}/health").status_code == 200 and httpx.get(f"{address}/metrics").status_code == 401
    with OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()


def test_where_keys_come_from(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("one\ntwo\n")
    monkeypatch.setenv("QWEN_API_KEY", "three")
    args = parse_args(["--api-key", "zero", "--api-key-file", str(file), "--api-auth", "me:pass"])
    assert read_credentials(args) == ["Bearer zero", "Bearer three", "Bearer one", "Bearer two", "Basic bWU6cGFzcw=="]
    monkeypatch.delenv("QWEN_API_KEY")
    file.write_text("")
    for flags, message in (
        (["--api-key-file", str(file)], "is empty"), (["--api-key-file", str(tmp_path)], "can't be read"),
        (["--api-auth", "me"], "USER:PASSWORD"), (["--max-batch", "0"], "--max-batch 0 is too low"),
        (["--tp", "2"], "--tp works in chats"),
    ):  # fmt: skip
        with pytest.raises(QwenError, match=message):
            make_settings(parse_args(flags))


def test_mistakes_are_one_sentence(address: str, tmp_path: Path) -> None:
    port = address.rpartition(":")[2]
    for flags, message in (
        (["-c", str(tmp_path), "--server-port", "0"], "config.json"),
        (["-c", "demo", "--server-port", port], f"can't listen on 127.0.0.1:{port} .*choose another --server-port"),
        (["-c", "demo", "--server-name", "no.such.host.invalid"], "can't listen on no.such.host.invalid"),
        (["-c", "demo", "--server-port", "0", "--kv-cache-gib", "0.001"], "set --kv-cache-gib higher"),
    ):
        with pytest.raises(QwenError, match=message):
            main(flags)


def test_the_script_serves_and_ends_gracefully(demo_checkpoint: Path) -> None:
    """Told to stop in the middle of a stream, it ends the stream first."""
    script = Path(__file__).parent.parent / "openai_api.py"
    command = [
        sys.executable,
        str(script),
        "-c",
        "demo",
        "--dtype",
        "bf16",
        "--server-port",
        "0",
        "--kv-cache-gib",
        "1",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        address = next(line for line in process.stderr if line.startswith("serving")).split()[3].removesuffix("/v1")
        deadline = time.monotonic() + 60
        while httpx.get(f"{address}/health").status_code == 503 and time.monotonic() < deadline:
            time.sleep(0.1)
        body = {"messages": [{"role": "user", "content": "Count."}], "stream": True, "max_tokens": 25, "temperature": 0,
                "logit_bias": {"49148": -100}}  # fmt: skip
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            first = next(lines)
            process.terminate()
            rest = list(lines)
        told = process.stderr.read()
    assert first.startswith("data: {") and rest[-2] == "data: [DONE]" and '"finish_reason":"length"' in rest[-4]
    assert "finishing running replies" in told and "Traceback" not in told
    assert process.returncode == -signal.SIGTERM


def test_origins(http: httpx.Client) -> None:
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    assert http.options("/v1/models", headers=asked).headers["access-control-allow-origin"] == "https://page.example"
    response = http.options("/v1/models", headers={**asked, "Origin": "https://other.example"})
    assert "access-control-allow-origin" not in response.headers


def test_bodies(http: httpx.Client) -> None:
    for body in (b"", b"{", b"[]", b"\xff", b"null", b'"x"', b"[" * 10_000, b'{"messages": NaN}',
                 b'{"messages": [{"role": "user", "content": "\\ud800"}], "foo\\ud800": 1}'):  # fmt: skip
        response = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400 and response.json()["error"]["message"], body
    response = http.post("/v1/chat/completions", content=b" " * 20_001)
    assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"
    response = http.post("/v1/chat/completions", content=iter([b" " * 9_000] * 3))
    assert response.status_code == 413
    surrogate = b'{"messages": [{"role": "user", "content": "a\\ud800b"}], "max_tokens": 2}'
    response = http.post("/v1/chat/completions", content=surrogate, headers={"Content-Type": "application/json"})
    assert response.status_code == 200


# ---- raw sockets ----

REQUEST = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"  # noqa: E501
LONG = {**USER, "max_tokens": 200, "logit_bias": {"151643": -100, "151644": -100, "151645": -100}}


def connect(address: str, body: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(REQUEST.format(key=KEY, length=len(body), body=body).encode())
    return connection


@pytest.fixture
def slow(server: Server) -> Iterator[None]:
    """Steps of 20 ms, so that there is time to hang up."""
    step = server.engine.model.forward
    server.engine.model.forward = lambda *args, **kwargs: (time.sleep(0.02), step(*args, **kwargs))[1]
    yield
    del server.engine.model.forward


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_hang_up_free_their_slots(address: str, server: Server, slow: None, stream: bool) -> None:
    connections = [connect(address, json.dumps({**LONG, "stream": stream})) for _ in range(3)]
    while len(server.engine.running) < 3:
        time.sleep(0.01)
    if stream:
        assert b"text/event-stream" in connections[0].recv(4096)
    jobs = list(server.engine.running)
    for connection in connections:
        connection.close()
    assert idle(server)
    assert all(job.cancelled and job.decoder.tokens < 200 for job in jobs if job.decoder)


def test_bodies_that_never_end_hold_nothing(address: str, server: Server, http: httpx.Client) -> None:
    host, port = address.removeprefix("http://").split(":")
    for data in ("POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-secret\r\n"
                 "Content-Length: 1000\r\n\r\n{", "GET", "nonsense\r\n\r\n"):  # fmt: skip
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(data.encode())
    assert http.get("/health").status_code == 200 and idle(server)


def test_streams_are_server_sent_events(http: httpx.Client, slow: None) -> None:
    with http.stream("POST", "/v1/chat/completions", json={**USER, "stream": True, "max_tokens": 3}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        text = response.read().decode()
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2] if not event.startswith(":")]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_waiting_streams_are_kept_alive_and_others_answered(
    address: str, server: Server, slow: None, http: httpx.Client
) -> None:
    running = [connect(address, json.dumps({**LONG, "stream": True})) for _ in range(8)]
    while len(server.engine.running) < 8:
        time.sleep(0.01)
    waiting = connect(address, json.dumps({**LONG, "stream": True}))
    received = b""
    while b": waiting\n\n" not in received:
        received += waiting.recv(4096)
    assert http.get("/health").status_code == 200
    more = [connect(address, json.dumps({**LONG, "stream": True})) for _ in range(15)]
    while len(server.engine.waiting) < 16:
        time.sleep(0.01)
    response = http.post("/v1/chat/completions", json=USER)
    assert response.status_code == 429 and response.json()["error"]["code"] == "queue_full"
    assert response.headers["Retry-After"]
    for connection in (*running, waiting, *more):
        connection.close()
    assert idle(server)


def test_failures_are_told_in_the_stream(http: httpx.Client, server: Server) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("broken")

    server.engine.model.forward = fail
    try:
        response = http.post("/v1/chat/completions", json=USER)
        events = http.post("/v1/chat/completions", json={**USER, "stream": True}).text.split("\n\n")
    finally:
        del server.engine.model.forward
    assert response.status_code == 500 and response.json()["error"]["message"] == "the reply failed: broken"
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "reply_failed"
    assert http.post("/v1/chat/completions", json={**USER, "max_tokens": 1}).status_code == 200


# ---- beginning and end ----


def test_while_loading_and_while_closing(tokenizer: QWenTokenizer) -> None:
    server = Server()
    with live_server.run_server(server) as address:
        for path in ("/health", "/v1/models"):
            response = httpx.get(address + path)
            assert response.status_code == 503 and response.json()["error"]["code"] == "loading"
        ready = live_server.make_server(tokenizer)
        server.attach(ready.engine)
        assert httpx.get(address + "/health").status_code == 200
        step = ready.engine.model.forward
        ready.engine.model.forward = lambda *args, **kwargs: (time.sleep(0.02), step(*args, **kwargs))[1]
        texts: dict[str, str] = {}

        def read(name: str, body: dict) -> None:
            texts[name] = httpx.post(f"{address}/v1/chat/completions", json={**body, "stream": True}, timeout=120).text

        bodies = {"short": {"messages": [{"role": "user", "content": "say: good bye"}]}, "long": LONG}
        threads = {name: threading.Thread(target=read, args=(name, body)) for name, body in bodies.items()}
        for thread in threads.values():
            thread.start()
        while len(ready.engine.running) < 2:
            time.sleep(0.01)
        ready.engine.close(grace=100)
        assert httpx.get(address + "/health").status_code == 503
        threads["short"].join()
        ready.engine.close_now()
        threads["long"].join()
        finished, cut = texts["short"], texts["long"]
        assert finished.endswith("data: [DONE]\n\n") and "bye" in finished
        assert json.loads(cut.split("\n\n")[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"


def test_what_was_taken_is_answered_though_the_server_closes_before_its_first_word(tokenizer: QWenTokenizer) -> None:
    server = live_server.make_server(tokenizer)
    body = ChatRequest(messages=[{"role": "user", "content": "say: good bye"}])
    plan = plan_chat(server, body)

    async def read() -> list[dict]:
        replies = Replies(server.engine, plan.requests, keep_alive=15)
        server.engine.close(grace=30)
        return [chunk async for chunk in stream_chat(server, plan, replies, UsageWanted())]

    choices = [chunk["choices"][0] for chunk in asyncio.run(read())]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "good bye"


@pytest.mark.parametrize("name", ["plain", "stream", "tools", "json_schema"])
def test_examples_run(name: str, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{address}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    path = Path(__file__).parent.parent / "examples" / f"openai_{name}.py"
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    expected = {"plain": "tokens)", "stream": "tokens)", "tools": "-> get_weather({", "json_schema": "City(name="}
    assert expected[name] in printed


def test_langchain(address: str) -> None:
    from langchain_core.messages import HumanMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    @tool
    def get_weather(city: str) -> str:
        """The weather of a city."""
        return "sunny"

    model = ChatOpenAI(model="Qwen-7B-Chat", base_url=f"{address}/v1", api_key=KEY, max_retries=0, max_tokens=100)
    assert model.invoke([HumanMessage("say: fine")]).content == "fine"
    assert "".join(chunk.content for chunk in model.stream("say: fine too")) == "fine too"
    called = model.bind_tools([get_weather]).invoke(ROUNDS)
    assert called.tool_calls[0]["args"] == {"city": "Rome"} and called.content == "I look it up."
    result = get_weather.invoke(called.tool_calls[0])
    answer = model.bind_tools([get_weather]).invoke([HumanMessage(ROUNDS), called, result])
    assert answer.content == "Sunny, 20 degrees."
