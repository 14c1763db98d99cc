"""The protocols beside chat completions, by their official clients: openai's responses, anthropic's, ollama's."""

import json
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

import live_server
from api.server import Server, Settings
from qwen import QWenTokenizer

KEY, MODEL = "sk-secret", "Qwen-7B-Chat"
CALL = 'Thought: I look it up.\nAction: get_weather\nAction Input: {"city": "Rome"}'
ROUNDS = f"say: {CALL}||I now know the final answer\nFinal Answer: Sunny, 20 degrees."
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"],
              "additionalProperties": False}  # fmt: skip
FLAT: Any = {"type": "function", "name": "get_weather", "description": "The weather.", "parameters": PARAMETERS}
ANTHROPIC: Any = {"name": "get_weather", "description": "The weather.", "input_schema": PARAMETERS}
OLLAMA: Any = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}


class City(BaseModel):
    city: str = Field(max_length=8)


@pytest.fixture(scope="module")
def server(tokenizer: QWenTokenizer) -> Server:
    settings = Settings(credentials=[f"Bearer {KEY}"], max_new_tokens=60, max_stored=3, keep_alive=0.05)
    return live_server.make_server(tokenizer, settings)


@pytest.fixture(scope="module")
def address(server: Server) -> Iterator[str]:
    with live_server.run_server(server) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(address: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=address, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def llama(address: str) -> Iterator[ollama.Client]:
    client = ollama.Client(host=address, headers={"Authorization": f"Bearer {KEY}"})
    yield client
    client._client.close()


# ---- responses ----


def test_a_response_and_its_events(client: OpenAI) -> None:
    whole = client.responses.create(model=MODEL, input="say: 你好 😀", instructions="Be brief.", metadata={"a": "b"})
    assert whole.output_text == "你好 😀" and whole.status == "completed" and whole.metadata == {"a": "b"}
    assert whole.usage.input_tokens + whole.usage.output_tokens == whole.usage.total_tokens
    with client.responses.stream(model=MODEL, input="say: 你好 😀", instructions="Be brief.") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    kinds = [event.type for event in events]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added",
                         "response.content_part.added"]  # fmt: skip
    assert kinds[-4:] == ["response.output_text.done", "response.content_part.done", "response.output_item.done",
                          "response.completed"]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    cut = client.responses.create(model=MODEL, input="x", max_output_tokens=3)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"


def test_tools_of_a_response(client: OpenAI) -> None:
    tools: Any = [{"type": "web_search"}, FLAT]
    first = client.responses.create(model=MODEL, input=ROUNDS, tools=tools)
    said, call = first.output
    assert (said.type, said.content[0].text) == ("message", "I look it up.")
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "get_weather", {"city": "Rome"})
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    by_id = client.responses.create(model=MODEL, input=[result], tools=tools, previous_response_id=first.id)
    items: Any = [{"role": "user", "content": [{"type": "input_text", "text": ROUNDS}]},
                  *(item.model_dump() for item in first.output), {"type": "reasoning", "summary": []},
                  result]  # fmt: skip
    whole = client.responses.create(model=MODEL, input=items, tools=tools, store=False)
    assert by_id.output_text == whole.output_text == "Sunny, 20 degrees."
    assert by_id.usage.input_tokens == whole.usage.input_tokens
    forced = client.responses.create(model=MODEL, input="x", tools=tools, tool_choice="required", max_output_tokens=60)
    assert set(json.loads(forced.output[-1].arguments)) == {"city"}
    with client.responses.stream(model=MODEL, input=ROUNDS, tools=[FLAT]) as stream:
        deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
    assert json.loads("".join(deltas)) == {"city": "Rome"}
    said = client.responses.create(
        model=MODEL,
        input='say: Action: run\nAction Input: {"input": "a\\nb"}',
        tools=[{"type": "custom", "name": "run"}],
    )
    assert (said.output[0].type, said.output[0].input) == ("custom_tool_call", "a\nb")


def test_a_response_in_a_schema(client: OpenAI) -> None:
    said = 'say: {"city": "Rome"}'
    assert client.responses.parse(model=MODEL, input=said, text_format=City).output_parsed == City(city="Rome")
    form: Any = {"format": {"type": "json_schema", "name": "c", "schema": {"enum": [1, 2]}, "strict": True}}
    assert client.responses.create(model=MODEL, input="x", text=form).output_text in ("1", "2")


def test_responses_are_kept_for_a_while(client: OpenAI) -> None:
    ids = [client.responses.create(model=MODEL, input=f"say: {i}").id for i in range(4)]
    assert client.responses.retrieve(ids[-1]).output_text == "3"
    assert client.responses.input_items.list(ids[-1]).data
    with pytest.raises(openai.NotFoundError, match="the newest 3 are kept"):
        client.responses.retrieve(ids[0])
    client.responses.delete(ids[-1])
    with pytest.raises(openai.BadRequestError, match="there is no response"):
        client.responses.create(model=MODEL, input="x", previous_response_id=ids[-1])
    unkept = client.responses.create(model=MODEL, input="say: x", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_responses_in_the_background(client: OpenAI, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = client.responses.create(model=MODEL, input="say: done", background=True)
    deadline = time.monotonic() + 20
    while (now := client.responses.retrieve(begun.id)).status == "in_progress" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert begun.status == "in_progress" and (now.status, now.output_text) == ("completed", "done")
    step = server.engine.model.forward
    monkeypatch.setattr(server.engine.model, "forward", lambda *a, **k: (time.sleep(0.02), step(*a, **k))[1])
    endless = client.responses.create(model=MODEL, input="x", max_output_tokens=500, background=True)
    assert client.responses.cancel(endless.id).status == "cancelled"
    while server.engine.running and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not server.engine.running and client.responses.retrieve(endless.id).status == "cancelled"


@pytest.mark.parametrize(
    ("body", "param"),
    [({"input": []}, "input"), ({"input": [{"type": "who_knows"}]}, "input[0]"),
     ({"max_output_tokens": 0}, "max_output_tokens"), ({"max_output_tokens": 10**6}, "max_output_tokens"),
     ({"tools": [{"type": "function"}]}, "tools"),
     ({"text": {"format": {"type": "json_schema", "schema": {"type": "no"}}}}, "text.format"), ({"foo": 1}, "foo")],
)  # fmt: skip
def test_mistakes_have_the_protocols_names(address: str, body: dict, param: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    response = httpx.post(f"{address}/v1/responses", json={"input": "x", **body}, headers=headers)
    assert response.status_code == 400 and response.json()["error"]["param"].startswith(param), response.text


# ---- messages ----


def test_a_message_and_its_events(claude: anthropic.Anthropic) -> None:
    system: Any = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    body: Any = {"model": MODEL, "max_tokens": 40, "system": system, "thinking": {"type": "disabled"},
                 "messages": [{"role": "user", "content": "say: 你好 😀"}]}  # fmt: skip
    whole = claude.messages.create(**body)
    assert (whole.content[0].text, whole.stop_reason, whole.model) == ("你好 😀", "end_turn", MODEL)
    counted = claude.messages.count_tokens(model=MODEL, system=system, messages=body["messages"]).input_tokens
    assert counted == whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    with claude.messages.stream(**body) as stream:
        text, final = "".join(stream.text_stream), stream.get_final_message()
    assert text == whole.content[0].text and final.usage.output_tokens == whole.usage.output_tokens
    stopped = claude.messages.create(**body | {"stop_sequences": ["😀"]})
    assert (stopped.stop_reason, stopped.stop_sequence, stopped.content[0].text) == ("stop_sequence", "😀", "你好")
    assert claude.messages.create(**body | {"max_tokens": 1}).stop_reason == "max_tokens"


def test_tools_of_a_message(claude: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": ROUNDS}]
    settings: Any = {"model": MODEL, "max_tokens": 80, "tools": [ANTHROPIC]}
    first = claude.messages.create(messages=messages, **settings)
    text, call = first.content
    assert (text.text, call.name, call.input, first.stop_reason) == (
        "I look it up.", "get_weather", {"city": "Rome"}, "tool_use")  # fmt: skip
    with claude.messages.stream(messages=messages, **settings) as stream:
        assert stream.get_final_message().content[1].input == {"city": "Rome"}
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    assert claude.messages.create(messages=messages, **settings).content[0].text == "Sunny, 20 degrees."
    choice: Any = {"type": "tool", "name": "get_weather"}
    forced = claude.messages.create(messages=[{"role": "user", "content": "x"}], tool_choice=choice, **settings)
    assert set(forced.content[-1].input) == {"city"}


def test_mistakes_have_anthropics_form(claude: anthropic.Anthropic, address: str) -> None:
    user: Any = [{"role": "user", "content": "x"}]
    with pytest.raises(anthropic.NotFoundError, match="there is no model 'claude'"):
        claude.messages.create(model="claude", max_tokens=4, messages=user)
    image: Any = [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]
    with pytest.raises(anthropic.BadRequestError, match="text"):
        claude.messages.create(model=MODEL, max_tokens=4, messages=image)
    response = httpx.post(f"{address}/v1/messages", json={"model": MODEL, "messages": user}, headers={"x-api-key": KEY})
    error = response.json()
    assert response.status_code == 400 and error["type"] == "error" and "max_tokens" in error["error"]["message"]
    with anthropic.Anthropic(base_url=address, api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(anthropic.AuthenticationError):
            stranger.messages.create(model=MODEL, max_tokens=4, messages=user)


# ---- Ollama ----


def test_ollamas_chat_and_generate(llama: ollama.Client) -> None:
    asked = [{"role": "user", "content": "say: 你好 😀"}]
    whole = llama.chat(MODEL, asked, options={"num_ctx": 4096, "temperature": 0})
    assert whole.message.content == "你好 😀" and whole.done and whole.done_reason == "stop"
    lines = list(llama.chat(f"{MODEL}:latest", asked, stream=True))
    assert "".join(part.message.content for part in lines) == "你好 😀" and lines[-1].eval_count == whole.eval_count
    assert llama.generate(MODEL, "say: ok", system="Be brief.").response == "ok"
    assert "".join(part.response for part in llama.generate(MODEL, "say: ok", stream=True)) == "ok"
    assert llama.generate(MODEL, "x", raw=True, options={"num_predict": 3}).eval_count <= 3
    assert llama.chat(MODEL, [{"role": "user", "content": "x"}], format={"enum": [1, 2]}).message.content in ("1", "2")
    assert llama.chat(MODEL, []).done_reason == "load"


def test_ollamas_tools(llama: ollama.Client) -> None:
    messages: list[Any] = [{"role": "user", "content": ROUNDS}]
    said = llama.chat(MODEL, messages, tools=[OLLAMA])
    [call] = said.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", {"city": "Rome"})
    messages += [said.message, {"role": "tool", "tool_name": "get_weather", "content": "sunny"}]
    assert llama.chat(MODEL, messages, tools=[OLLAMA]).message.content == "Sunny, 20 degrees."


def test_ollamas_other_paths(llama: ollama.Client, address: str) -> None:
    assert llama.list().models[0].model == MODEL and llama.ps().models[0].size > 0
    shown = llama.show(MODEL)
    assert "tools" in shown.capabilities and shown.modelinfo["qwen.context_length"] == 1024
    with pytest.raises(ollama.ResponseError, match="there is no model 'llama3'"):
        llama.chat("llama3", [{"role": "user", "content": "x"}])
    with pytest.raises(ollama.ResponseError, match="images"):
        llama.chat(MODEL, [{"role": "user", "content": "x", "images": [b"x"]}])


# ---- tools together with a schema ----


def test_calls_or_an_answer_that_fits(client: OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "get_weather", "strict": True, "parameters": PARAMETERS}}
    for seed in range(2):
        messages: Any = [{"role": "user", "content": "x"}]
        reply = client.chat.completions.parse(model=MODEL, messages=messages, tools=[tool], response_format=City,
                                              seed=seed, max_tokens=400)  # fmt: skip
        message = reply.choices[0].message
        assert message.tool_calls or message.parsed
        assert "Final Answer" not in (message.content or "")


def test_only_allowed_tools_are_called(client: OpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("one", "two")]
    allowed: Any = {"type": "allowed_tools", "allowed_tools": {
        "mode": "required", "tools": [{"type": "function", "function": {"name": "two"}}]}}  # fmt: skip
    messages: Any = [{"role": "user", "content": "x"}]
    reply = client.chat.completions.create(
        model=MODEL, messages=messages, tools=tools, tool_choice=allowed, max_tokens=80
    )
    assert {call.function.name for call in reply.choices[0].message.tool_calls} == {"two"}


SCHEMAS: Any = [
    ({"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "maxItems": 2}, "uniqueItems"),
    ({"type": "string", "format": "path", "maxLength": 4}, "format:path"),
    ({"type": "array", "items": {"enum": [1]}, "contains": {"const": 1}, "maxItems": 2}, "contains"),
    ({"type": "integer", "minimum": 0, "maximum": 9, "not": {"const": 1}}, "not"),
]


@pytest.mark.parametrize(("schema", "word"), SCHEMAS)
def test_what_a_grammar_lacks_is_named(address: str, schema: dict, word: str) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 60, "response_format": {
        "type": "json_schema", "json_schema": {"schema": schema}}}  # fmt: skip
    response = httpx.post(f"{address}/v1/chat/completions", json=body, headers={"x-api-key": KEY}, timeout=60)
    assert response.status_code == 200 and response.headers["x-schema-not-held"] == word


def test_a_strict_schema_is_checked_afterwards(address: str) -> None:
    for items, status in (([1], 200), ([1, 1], 500)):
        schema = {"type": "array", "prefixItems": [{"const": i} for i in items], "minItems": len(items), "items": False,
                  "uniqueItems": True}  # fmt: skip
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "response_format": {
            "type": "json_schema", "json_schema": {"schema": schema, "strict": True}}}  # fmt: skip
        response = httpx.post(f"{address}/v1/chat/completions", json=body, headers={"x-api-key": KEY}, timeout=60)
        assert response.status_code == status, response.text
    assert response.json()["error"]["code"] == "schema_not_met" and "uniqueItems" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("schema", "words"),
    [({"$ref": "#"}, "/$ref requires itself"),
     ({"properties": {"a": {"pattern": "(?=x)"}}}, '/properties/a/pattern "(?=x)"'),
     ({"type": "object", "properties": {f"p{i}": {} for i in range(4000)}}, "/properties"),
     ({"type": "objekt"}, '/type "objekt"')],
)  # fmt: skip
def test_schemas_that_can_not_be_used_are_told_with_their_place(server: Server, schema: dict, words: str) -> None:
    from qwen import QwenError

    with pytest.raises(QwenError) as told:
        server.grammars.reply("json", schema)
    assert words in str(told.value)
