"""The server against what nobody thought of: requests from its own description, replies cut anyhow, a long siege."""

import gc
import json
import logging
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks

import live_server
from api.chat import ChoiceReader
from api.plan import ChatPlan
from api.server import Server, Settings
from qwen import QWenTokenizer
from qwen.engine import Job, Limits, Request, Update
from qwen.reply import ReplyDecoder
from qwen.tools import STOP_WORD, read_tool

KEY = "sk-secret"
HEADERS = {"Authorization": f"Bearer {KEY}"}
TOOL = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


@pytest.fixture(scope="module")
def server(tokenizer: QWenTokenizer) -> Server:
    limits = Limits(max_batch=8, max_queue=100, kv_tokens=4096, chunk=32, timeout=60)
    return live_server.make_server(tokenizer, Settings(credentials=[f"Bearer {KEY}"], max_new_tokens=3), limits)


@pytest.fixture(scope="module")
def address(server: Server) -> Iterator[str]:
    with live_server.run_server(server) as address:
        yield address


# ---- requests made from the server's own description ----


OPERATIONS = [
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/tokenize"), ("POST", "/detokenize"),
    ("POST", "/v1/messages"), ("POST", "/v1/messages/count_tokens"), ("POST", "/v1/responses"),
    ("POST", "/v1/responses/{name}/cancel"), ("POST", "/api/chat"), ("POST", "/api/generate"), ("POST", "/api/show"),
    ("GET", "/v1/models"), ("GET", "/v1/models/{name}"), ("GET", "/health"), ("GET", "/metrics"),
    ("GET", "/v1/responses/{name}"), ("GET", "/v1/responses/{name}/input_items"), ("DELETE", "/v1/responses/{name}"),
    ("GET", "/api/tags"), ("GET", "/api/ps"), ("GET", "/api/version"), ("GET", "/tokenizer_info"),
]  # fmt: skip


@pytest.fixture(scope="module")
def description(address: str) -> schemathesis.BaseSchema:
    load_all_checks()
    return schemathesis.openapi.from_url(f"{address}/openapi.json")


def fuzz(description: schemathesis.BaseSchema, method: str, path: str, mode: GenerationMode, count: int) -> None:
    """Responses are as described, wrong requests are refused, and nothing fails. Not every request that its schema
    allows can be served (a tool's result without its call), so refusals with status 400 are right too."""
    excluded = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")]

    @settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck),
              phases=[Phase.generate])  # fmt: skip
    @given(case=description[path][method].as_strategy(generation_mode=mode))
    def test(case: schemathesis.Case) -> None:
        case.call_and_validate(headers=HEADERS, excluded_checks=excluded, timeout=60)

    test()


def test_every_operation_is_tried(description: schemathesis.BaseSchema) -> None:
    described = {(operation.ok().method.upper(), operation.ok().path) for operation in description.get_all_operations()}
    assert described == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_requests_from_the_description(description: schemathesis.BaseSchema, method: str, path: str) -> None:
    modes = [GenerationMode.POSITIVE] + ([GenerationMode.NEGATIVE] if method == "POST" else [])
    for mode in modes:
        fuzz(description, method, path, mode, 12 if method == "POST" else 3)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), OPERATIONS[:4])
def test_many_requests_from_the_description(description: schemathesis.BaseSchema, method: str, path: str) -> None:
    for mode in GenerationMode:
        fuzz(description, method, path, mode, 300)


# ---- replies cut anyhow ----

PIECES = ["Thought: ", "\nAction: get_weather", "\nAction Input: ", "\nFinal Answer: ", "\nObservation:", '{"city": "',
          "Rome", '"}', "龘😀", "e\u0301", " ", "\n", "```", "STOP", "ST", "<|im_end|>"]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(text=st.lists(st.sampled_from(PIECES), max_size=10).map("".join) | st.text(max_size=30), data=st.data())
def test_deltas_add_up_however_a_reply_is_cut(server: Server, text: str, data: st.DataObject) -> None:
    """Any bytes, cut into any tokens: whole characters, no stop word, and the sum is what one piece gives."""
    tokenizer = server.engine.tokenizer
    ids = tokenizer.encode_text(text)
    split = data.draw(st.booleans())
    if split:  # every byte a token of its own
        ids = [tokenizer.mergeable_ranks[bytes([byte])] for i in ids for byte in tokenizer.decoder[i]]
    tools = [read_tool(TOOL)] if data.draw(st.booleans()) else []
    plan = ChatPlan([Request([1], 100)], tools)

    def read(one_piece: bool) -> tuple[dict, list[str]]:
        reader = ChoiceReader(tokenizer, plan, 0)
        decoder = ReplyDecoder(tokenizer, server.stop_ids, ["STOP", *([STOP_WORD] if tools else [])])
        texts = [decoder.push(i) for i in ids] + [decoder.close("stop")]
        updates = [Update("".join(texts))] if one_piece else [Update(piece) for piece in texts]
        chunks = [chunk for update in updates for chunk in reader.read(update)]
        chunks += reader.read(Update(finish_reason=decoder.finish_reason))
        whole = reader.whole()
        for call in whole["message"].get("tool_calls", []):
            call.pop("id")
        return whole, [chunk["delta"].get("content") or "" for chunk in chunks]

    whole, _ = read(one_piece=True)
    streamed, contents = read(one_piece=False)
    assert streamed == whole and "".join(contents) == (whole["message"]["content"] or "")
    assert "STOP" not in "".join(contents)
    assert not any("\ufffd" in content for content in contents)


# ---- a long siege ----


def siege(address: str, server: Server, count: int, seed: int) -> dict[str, int]:
    """Mixed requests from 12 clients; how many ended how. Some hang up, some are wrong, some make steps fail."""
    forward, broken = server.engine.model.forward, random.Random(seed)
    lock = threading.Lock()

    def sometimes_fails(*args: object, **kwargs: object) -> object:
        with lock:
            if broken.random() < 0.01:
                raise RuntimeError("a fault")
        return forward(*args, **kwargs)

    def one(number: int) -> str:
        rng = random.Random(seed * 1_000_000 + number)
        body: dict = {"messages": [{"role": "user", "content": f"say: reply {number} " + "x" * rng.randrange(40)}]}
        body |= {"max_tokens": rng.randrange(1, 60), "stream": rng.random() < 0.5, "temperature": rng.choice([0, 1])}
        kind = rng.choice(["plain", "plain", "plain", "tools", "json", "n", "wrong", "hang up", "long"])
        if kind == "tools":
            body["tools"] = [{"type": "function", "function": TOOL}]
        elif kind == "json":
            body["response_format"] = {"type": "json_object"}
        elif kind == "n":
            body["n"] = 3
        elif kind == "wrong":
            body["temperature"] = 9
        elif kind == "long":
            body["messages"].insert(0, {"role": "system", "content": "word " * rng.randrange(400)})
        try:
            with client.stream("POST", "/v1/chat/completions", json=body) as response:
                if kind == "hang up":
                    for _ in response.iter_bytes(1):
                        return kind
                text = response.read().decode()
        except httpx.HTTPError as error:
            return type(error).__name__
        if kind == "wrong":
            assert response.status_code == 400
            return kind
        if '"reply_failed"' in text:
            return "fault"
        assert response.status_code == 200, text
        if body["stream"]:
            assert text.endswith("data: [DONE]\n\n")
            chunks = [json.loads(event[6:]) for event in text.split("\n\n") if event.startswith("data: {")]
            reasons = [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
            assert len(reasons) == body.get("n", 1)
            text = "".join(
                c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"][:1] if c["index"] == 0
            )
        else:
            text = json.loads(text)["choices"][0]["message"]["content"]
        expected = body["messages"][-1]["content"].removeprefix("say: ").strip()
        assert expected.startswith(text) or kind == "json"
        return "answered"

    server.engine.model.forward = sometimes_fails
    try:
        with httpx.Client(base_url=address, headers=HEADERS, timeout=60) as client, ThreadPoolExecutor(12) as pool:
            ends = list(pool.map(one, range(count)))
    finally:
        del server.engine.model.forward
    return {end: ends.count(end) for end in sorted(set(ends))}


def quiet(server: Server) -> bool:
    deadline = time.monotonic() + 20
    while (server.engine.running or server.engine.waiting) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not server.engine.running and not server.engine.waiting


def test_a_short_siege(address: str, server: Server) -> None:
    ends = siege(address, server, 40, seed=1)
    assert sum(ends.values()) == 40 and ends["answered"] > 15
    assert set(ends) <= {"answered", "fault", "wrong", "hang up"}
    assert quiet(server) and server.engine.pool.taken == 0


@pytest.mark.slow
def test_a_long_siege(address: str, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="qwen.api")  # kept tracebacks would keep what they speak of
    process, sizes = psutil.Process(), []
    for seed in range(2, 12):
        ends = siege(address, server, 150, seed)
        assert set(ends) <= {"answered", "fault", "wrong", "hang up"} and ends["answered"] > 60
        assert quiet(server) and server.engine.pool.taken == 0
        gc.collect()
        assert [o for o in gc.get_objects() if type(o) is Job] == []
        sizes.append(process.memory_info().rss)
    assert sizes[-1] < max(sizes[:5]) * 1.03, sizes  # of some 860 MB; the first rounds fill the allocator's pools
