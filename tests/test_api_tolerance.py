"""What clients send beyond OpenAI's documents: what passes, what acts, what is refused and in which words."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import live_server
from api.protocol import ChatRequest, CompletionRequest
from api.server import Server, Settings
from api.tolerance import NEUTRAL, WITHOUT_EFFECT
from qwen import QWenTokenizer

SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"],
          "additionalProperties": False}  # fmt: skip
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
SAY = [{"role": "user", "content": "say: ok"}]
ENDS = [151643, 151644, 151645]


@pytest.fixture(scope="module")
def server(tokenizer: QWenTokenizer) -> Server:
    return live_server.make_server(tokenizer, Settings(max_new_tokens=40))


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with live_server.run_server(server) as address, httpx.Client(base_url=address, timeout=60) as http:
        yield http


def chat(http: httpx.Client, messages: list | None = None, **body: Any) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"messages": messages or SAY, "max_tokens": 8, **body})


def complete(http: httpx.Client, prompt: Any, **body: Any) -> dict:
    response = http.post("/v1/completions", json={"prompt": prompt, "temperature": 0, **body})
    assert response.status_code == 200, response.text
    return {**response.json()["choices"][0], "usage": response.json()["usage"]}


def refusal(response: httpx.Response) -> tuple[str, str]:
    assert response.status_code == 400, response.text
    return response.json()["error"]["param"], response.json()["error"]["message"]


def test_the_manual_names_every_parameter_and_path(http: httpx.Client) -> None:
    manual = (Path(__file__).parent.parent / "SERVER.md").read_text(encoding="utf-8")
    table = manual[manual.index("### Chat") : manual.index("### JSON schemas")]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == set(ChatRequest.model_fields) | set(CompletionRequest.model_fields)
    paths = re.sub(r"\{\w+\}", "{}", manual[manual.index("## Paths") : manual.index("## Parameters")])
    described = [re.sub(r"\{\w+\}", "{}", path) for path in http.get("/openapi.json").json()["paths"]]
    tails = ("/v1/responses/{}/input_items", "/v1/responses/{}/cancel")
    assert [path for path in described if path not in tails and f"{path}`" not in paths] == []


# ---- what passes ----


def test_what_asks_for_nothing_passes(http: httpx.Client) -> None:
    body: dict[str, Any] = dict.fromkeys(WITHOUT_EFFECT, "anything")
    body |= {name: values[0] for name, (values, _) in NEUTRAL.items() if values}
    body |= {"nobody_knows": None, "top_k": -1, "min_p": 0, "min_tokens": 0, "ignore_eos": False, "stop_token_ids": [],
             "bad_words": [], "include_stop_str_in_output": False, "add_generation_prompt": True, "logprobs": False,
             "top_logprobs": 0, "max_tokens": -1}  # fmt: skip
    response = chat(http, **body)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == "ok"


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_what_is_not_supported_is_refused_by_name(http: httpx.Client, name: str) -> None:
    assert refusal(chat(http, **{name: ["something else"]}))[0] == name


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "Hello.", "reasoning_content": "x", "parsed": {"a": 1}, "audio": None,
         "annotations": [], "refusal": None, "function_call": None, "tool_calls": None, "thinking_blocks": []},
        {"role": "assistant", "content": "Hello.", "tool_calls": []},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "system", "content": "Be brief.", "id": 1, "opts": {"visible": False}, "name": "x"},
        {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]},
        {"role": "user", "content": [{"text": "Hi"}]},
    ],
)  # fmt: skip
def test_what_clients_note_in_messages_passes(http: httpx.Client, message: dict) -> None:
    assert chat(http, [message, *SAY]).json()["choices"][0]["message"]["content"] == "ok"


@pytest.mark.parametrize("arguments", [None, {"city": "Rome"}, '{"city": "Rome"}', ""])
def test_arguments_in_every_form(http: httpx.Client, arguments: Any) -> None:
    call = {**CALL, "index": 0, "function": {"name": "get_weather", "arguments": arguments, "parsed_arguments": {}}}
    result = {"role": "tool", "tool_call_id": "c1", "content": "x", "status": "success", "is_error": False}
    history = [SAY[0], {"role": "assistant", "content": None, "tool_calls": [call]}, result]
    tool = {**WEATHER, "cache_control": {"type": "ephemeral"}, "function": {**WEATHER["function"], "extra": 1}}
    assert chat(http, history, tools=[tool]).status_code == 200


@pytest.mark.parametrize(("type_", "word"), [("image_url", "image"), ("input_audio", "sound"), ("file", "files")])
def test_parts_that_are_no_text_are_refused_in_words(http: httpx.Client, type_: str, word: str) -> None:
    param, message = refusal(chat(http, [{"role": "user", "content": [{"type": type_, type_: {"url": "x"}}]}]))
    assert param == "messages[0].content[0]" and word in message


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"stop": [str(i) for i in range(17)]}, "stop", "at most 16"),
        ({"max_tokens": 10**9}, "max_tokens", "more than the context of 1,024"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "takes token ids"),
        ({"n": 20}, "n", "at most 8"),
        ({"min_tokens": 9}, "min_tokens", "more than the 8"),
        ({"stop_token_ids": [151936]}, "stop_token_ids", "no token 151936"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex", "send one of them"),
        ({"tools": [{"type": "function", "function": {"name": "\ud83d"}}]}, "tools", "half a character"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": [{"schema": {}}]}}],
          "tool_choice": "required"}, "tools", "needs a name"),
        ({"temprature": 0.5}, "temprature", "unrecognized"),
        ({"tools": [{"type": "custom", "custom": {"name": "x", "format": {"type": "grammar"}}}]}, "tools", "not held"),
    ],
)  # fmt: skip
def test_refusals_have_the_value_and_the_limit(http: httpx.Client, body: dict, param: str, words: str) -> None:
    response = http.post("/v1/chat/completions", content=json.dumps({"messages": SAY, "max_tokens": 8, **body}),
                         headers={"Content-Type": "application/json"})  # fmt: skip
    named, message = refusal(response)
    assert named == param and words in message


def test_a_token_that_is_none(http: httpx.Client) -> None:
    param, message = refusal(http.post("/v1/completions", json={"prompt": [5, -1]}))
    assert param == "prompt[0]" and "'-1' is no token id" in message


def test_a_lenient_server_passes_over_what_nobody_knows(
    server: Server, http: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "settings", Settings(max_new_tokens=40, lenient=True))
    assert chat(http, temprature=0.5).status_code == 200
    assert "passed over: 'temprature'" in caplog.text


# ---- parameters of local models ----


def test_a_reply_of_min_tokens(http: httpx.Client, tokenizer: QWenTokenizer) -> None:
    settings = {"logit_bias": {"151645": 100}, "max_tokens": 30}
    assert complete(http, "x", **settings)["usage"]["completion_tokens"] == 1
    reply = complete(http, "x", min_tokens=20, **settings)
    assert reply["usage"]["completion_tokens"] == 21 and reply["finish_reason"] == "stop"
    [first, *_] = tokenizer.encode_text(reply["text"])
    assert complete(http, "x", min_tokens=20, stop_token_ids=[first], **settings)["usage"]["completion_tokens"] >= 21
    # A stop word counts from there on too; a grammar that has ended outweighs the wish.
    assert complete(http, "x", min_tokens=20, stop=reply["text"][:1], **settings)["usage"]["completion_tokens"] >= 20
    assert complete(http, "x", min_tokens=20, guided_choice=["yes", "no"], max_tokens=30)["text"] in ("yes", "no")


def test_ignore_eos(http: httpx.Client) -> None:
    reply = complete(http, "x", logit_bias={"151645": 100}, ignore_eos=True, max_tokens=12)
    assert reply["usage"]["completion_tokens"] == 12 and reply["finish_reason"] == "length"


def test_stops_are_named_and_may_stay(http: httpx.Client, tokenizer: QWenTokenizer) -> None:
    text = complete(http, "x", max_tokens=12)["text"]
    ids = tokenizer.encode_text(text)
    by_id = complete(http, "x", max_tokens=12, stop_token_ids=[ids[3]])
    assert by_id["finish_reason"] == "stop" and by_id["stop_reason"] == ids[3]
    assert text.startswith(by_id["text"]) and by_id["text"] == tokenizer.decode(ids[: ids.index(ids[3])])
    kept = complete(http, "x", max_tokens=12, stop_token_ids=[ids[3]], include_stop_str_in_output=True)
    assert kept["text"] == tokenizer.decode(ids[: ids.index(ids[3]) + 1])
    word = text[5:9]
    assert complete(http, "x", max_tokens=12, stop=word)["stop_reason"] == word
    assert complete(http, "x", max_tokens=12, stop=word, include_stop_str_in_output=True)["text"].endswith(word)


def test_bad_words_are_not_written(http: httpx.Client, tokenizer: QWenTokenizer) -> None:
    text = complete(http, "x", max_tokens=12)["text"]
    ids = tokenizer.encode_text(text)
    word = tokenizer.decode(ids[4:6])
    assert word not in complete(http, "x", max_tokens=12, bad_words=[word])["text"]
    with_one = complete(http, "x", max_tokens=12, bad_words=[tokenizer.decode(ids[:1])])["text"]
    assert tokenizer.encode_text(with_one)[0] != ids[0]


def test_min_p_of_one_is_greedy(http: httpx.Client) -> None:
    for settings in ({"min_p": 1.0}, {"top_p": 0}):
        reply = complete(http, "x", **settings, temperature=2, logprobs=1, max_tokens=8, seed=3)
        assert all(set(top) == {token} for token, top in zip(reply["logprobs"]["tokens"],
                   reply["logprobs"]["top_logprobs"], strict=True))  # fmt: skip


@pytest.mark.parametrize(
    ("body", "replies"),
    [
        ({"structured_outputs": {"choice": ["yes", "no"]}}, ["yes", "no"]),
        ({"guided_choice": ["a\n\"b", "c\\d"]}, ["a\n\"b", "c\\d"]),
        ({"structured_outputs": {"regex": "^(12|34)/x$"}}, ["12/x", "34/x"]),
        ({"guided_regex": "[ab]"}, ["a", "b"]),
        ({"structured_outputs": {"grammar": 'start: "yes" | "no"'}}, ["yes", "no"]),
        ({"guided_grammar": 'root ::= "yes" | [n] "o"'}, ["yes", "no"]),
        ({"structured_outputs": {"json": {"enum": [1, 2]}}}, ["1", "2"]),
        ({"guided_json": '{"enum": [1, 2]}'}, ["1", "2"]),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": 7}}}}, ["7"]),
    ],
)  # fmt: skip
def test_replies_in_every_shape(http: httpx.Client, body: dict, replies: list[str]) -> None:
    assert complete(http, "x", **body)["text"] in replies
    reply = chat(http, [{"role": "user", "content": "x"}], **body).json()
    assert reply["choices"][0]["message"]["content"] in replies


def test_a_prefill_goes_on(http: httpx.Client) -> None:
    history = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hel "}]

    def prompt_tokens(**body: Any) -> int:
        return chat(http, history, **body).json()["usage"]["prompt_tokens"]

    def count(**body: Any) -> int:
        return http.post("/tokenize", json={"messages": history, **body}).json()["count"]

    continued = count(continue_final_message=True, add_generation_prompt=False)
    assert prompt_tokens() == prompt_tokens(continue_final_message=True) == continued
    assert prompt_tokens(continue_final_message=False) == prompt_tokens(add_generation_prompt=True) == count()
    assert count() > count(add_generation_prompt=False) > continued
    settings = {"temperature": 0, "seed": 1}
    plain = chat(http, history, **settings).json()["choices"][0]["message"]["content"]
    assert chat(http, history, echo=True, **settings).json()["choices"][0]["message"]["content"] == "Hel " + plain


# ---- scores, usage ----


def test_scores_of_parts_of_characters(http: httpx.Client, tokenizer: QWenTokenizer) -> None:
    text = "a🙂龘 b"
    reply = complete(http, text, echo=True, logprobs=5, max_tokens=0)
    scores, ids = reply["logprobs"], tokenizer.encode_text(text)
    assert all(len(top) >= 5 for top in scores["top_logprobs"][1:]) and len(scores["tokens"]) == len(ids)
    assert all(token in top for token, top in list(zip(scores["tokens"], scores["top_logprobs"], strict=True))[1:])
    assert scores["text_offset"][-1] == text.index(" b") and any(
        token.startswith("bytes:\\x") for top in scores["top_logprobs"][1:] for token in top
    )
    for count in (0, 1):
        reply = complete(http, "x", logprobs=count, temperature=2, seed=3, max_tokens=4)["logprobs"]
        for token, top in zip(reply["tokens"], reply["top_logprobs"], strict=True):
            assert token in top and len(top) <= count + 1


def test_scores_of_the_prompt(http: httpx.Client) -> None:
    reply = complete(http, "The sky is", prompt_logprobs=2, max_tokens=2)
    scores = reply["prompt_logprobs"]
    assert scores[0] is None and len(scores) == reply["usage"]["prompt_tokens"]
    assert all(2 <= len(entry) <= 3 and all(value["logprob"] <= 0 for value in entry.values()) for entry in scores[1:])
    whole = chat(http, prompt_logprobs=0).json()
    assert len(whole["prompt_logprobs"]) == whole["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", {"messages": SAY}), ("/v1/completions", {"prompt": "x"})]
)
def test_usage_in_every_chunk(http: httpx.Client, path: str, body: dict) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    text = http.post(path, json={**body, "max_tokens": 4, "stream": True, "stream_options": options}).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert all(chunk["usage"]["prompt_tokens"] > 0 for chunk in chunks)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] > 0


def test_events_are_whole_for_clients_that_split_at_any_line_break(http: httpx.Client) -> None:
    text = "a\u2028b\u2029c\u0085d\x0b\x0c\x1ee\ud83d".encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    body = {"prompt": text, "max_tokens": 1, "echo": True, "stream": True}
    streamed = http.post("/v1/completions", json=body).text
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert events[0]["choices"][0]["text"].startswith(text)


def test_tokenizer_info(http: httpx.Client, tokenizer: QWenTokenizer) -> None:
    info = http.get("/tokenizer_info").json()
    assert info["tokenizer_class"] == "QWenTokenizer" and info["eos_token"] == "<|im_end|>"
    assert info["special_tokens"]["151645"] == "<|im_end|>" and "im_start" in info["chat_template"]
    tokens = http.post(
        "/tokenize", json={"prompt": "Hi 龘", "add_special_tokens": False, "return_token_strs": True}
    ).json()
    assert len(tokens["token_strs"]) == tokens["count"] and tokens["token_strs"][0] == "Hi"
    plain = http.post("/tokenize", json={"messages": SAY}).json()["count"]
    assert http.post("/tokenize", json={"messages": SAY, "tools": [WEATHER]}).json()["count"] > plain + 60
