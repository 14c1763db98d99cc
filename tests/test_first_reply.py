"""The README's first question to the demo checkpoint: answered wherever it is asked, with and without native bf16."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from api.server import Server, Settings
from cli.commands import handle_line
from cli.display import make_display
from cli.session import ChatSession
from cli.texts import Texts
from live_server import run_server
from qwen.engine import Engine, Limits
from utils import load_model_and_tokenizer
from web.replies import Question, Replier

QUESTION = "What is the capital of France?"
SEEDS = range(10)


@pytest.fixture(scope="module", params=["on", "off"])
def demo(request: pytest.FixtureRequest, demo_checkpoint: Path) -> Iterator[tuple[Any, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_HARDWARE", f"bf16={request.param}")
        yield load_model_and_tokenizer("demo", device="cpu")


def test_in_the_terminal(demo: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    session = ChatSession(*demo, make_display(plain=True, interactive=False), Texts("en"))
    for seed in SEEDS:
        handle_line(session, f":seed {seed}")
        handle_line(session, QUESTION)
        handle_line(session, ":undo")
    replies = capsys.readouterr().out.splitlines()
    assert len(replies) == len(SEEDS) and all("Paris" in reply for reply in replies), replies


def test_from_python(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    replies = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        replies.append(model.chat(tokenizer, QUESTION, history=None, max_new_tokens=32)[0])
    assert all("Paris" in reply for reply in replies), replies


def test_on_the_page_and_through_the_api(demo: tuple[Any, Any]) -> None:
    server = Server(Settings())
    limits = Limits(max_batch=len(SEEDS), max_queue=2 * len(SEEDS), kv_tokens=8192, chunk=256, timeout=120)
    server.attach(Engine(*demo, limits, server.metrics))
    replier = Replier(server.engine)

    async def on_the_page(seed: int) -> str:
        settings = replace(replier.defaults, seed=seed, max_new_tokens=32)
        return "".join([progress.text async for progress in replier.reply(Question(QUESTION), settings)])

    async def on_all_pages() -> list[str]:
        return await asyncio.gather(*map(on_the_page, SEEDS))

    with run_server(server) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="-") as client:

        def through_the_api(seed: int) -> str:
            messages = [{"role": "user", "content": QUESTION}]
            answer = client.chat.completions.create(model="Qwen-7B-Chat", messages=messages, seed=seed, max_tokens=32)
            return answer.choices[0].message.content

        with ThreadPoolExecutor(len(SEEDS)) as pool:
            from_api = list(pool.map(through_the_api, SEEDS))
        from_pages = asyncio.run(on_all_pages())
    assert all("Paris" in reply for reply in from_api), from_api
    assert all("Paris" in reply for reply in from_pages), from_pages
