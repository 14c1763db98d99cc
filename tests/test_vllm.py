"""vLLM with the plugin in vllm_plugin/, on the demo checkpoint as it is (slow). VLLM_PYTHON names the interpreter of an
environment with vLLM in which `pip install ./vllm_plugin` was run."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from test_chat_template import ASK, CONVERSATIONS, EVIL, WEATHER, render, result

from qwen import QWenLMHeadModel, QWenTokenizer
from qwen.chatml import build_prompt
from utils import load_model_and_tokenizer

PYTHON = os.environ.get("VLLM_PYTHON")
QUERIES = ["What is the capital of France?", "List three colours.", "What is 2 + 2?", EVIL]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no interpreter with vLLM")]


@pytest.fixture(scope="module")
def demo(demo_checkpoint: Path) -> tuple[QWenLMHeadModel, QWenTokenizer]:
    return load_model_and_tokenizer(demo_checkpoint, device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def client(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(demo_checkpoint), "--port", str(port)]
    command += ["--served-model-name", "demo", "--dtype", "float32", "--max-model-len", "4096", "--enforce-eager"]
    command += ["--enable-auto-tool-choice", "--tool-call-parser", "qwen_react"]
    folder = tmp_path_factory.mktemp("vllm")
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("wb") as log, subprocess.Popen(
        command, cwd=folder, env=environment, stdout=log, stderr=log
    ) as process:  # fmt: skip
        try:
            for _ in range(280):
                assert process.poll() is None, (folder / "log").read_text()[-3000:]
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health", timeout=1).status_code == 200:
                        break
                except httpx.HTTPError:
                    time.sleep(1)
            with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120) as client:
                yield client
        finally:
            process.terminate()


def chat(client: OpenAI, messages: list[dict], **settings: Any) -> Any:
    # The checkpoint's own penalty would hold at temperature 0 too.
    neutral = {"temperature": 0, "extra_body": {"repetition_penalty": 1.0}, "max_tokens": 40}
    return client.chat.completions.create(model="demo", messages=messages, **neutral | settings)


@pytest.mark.parametrize("query", QUERIES)
def test_greedy_replies_are_ours(client: OpenAI, demo: tuple, query: str) -> None:
    model, tokenizer = demo
    shown = query.replace("<|", "< |")
    reply, _ = model.chat(tokenizer, shown, temperature=0, repetition_penalty=1.0, max_new_tokens=40)
    found = chat(client, [{"role": "user", "content": query}])
    assert found.choices[0].message.content.strip() == reply
    assert found.usage.prompt_tokens == len(build_prompt(tokenizer, shown).ids)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts_are_ours(client: OpenAI, demo: tuple, name: str) -> None:
    messages, tools = CONVERSATIONS[name]
    if any("type" not in tool for tool in tools):
        pytest.skip("vLLM takes no tools of other forms")
    body = {"model": "demo", "messages": messages, "add_generation_prompt": True, "tools": tools or None}
    found = httpx.post(f"{client.base_url}".replace("/v1/", "/tokenize"), json=body).raise_for_status().json()
    assert found["tokens"] == demo[1].encode(
        render(messages, tools, system=demo[1].default_system, add_generation_prompt=True)
    )


def test_a_required_call_comes_whole_and_streamed(client: OpenAI) -> None:
    whole = chat(client, [ASK], tools=[WEATHER], tool_choice="required").choices[0]
    assert whole.finish_reason == "tool_calls"
    [made] = whole.message.tool_calls
    assert made.function.name == "get_weather" and whole.message.content == "I need to use a tool."
    arguments = ""
    for chunk in chat(client, [ASK], tools=[WEATHER], tool_choice="required", stream=True):
        for part in chunk.choices[0].delta.tool_calls or []:
            arguments += part.function.arguments or ""
    assert arguments == made.function.arguments
    told = [ASK, whole.message.model_dump(exclude_none=True), result("30 °C", made.id)]
    assert chat(client, told, tools=[WEATHER]).choices[0].finish_reason in ("stop", "tool_calls", "length")
