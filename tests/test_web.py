"""The chat page's server: replies, how they fail, what is read of files, and what is refused."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import live_server
import web_demo
from qwen import QwenError, QWenTokenizer
from qwen.chatml import build_prompt
from qwen.engine import Engine, Limits
from web.page import SCRIPTS, ChatPage, load_texts
from web.replies import PageError, Progress, Question, Replier, Settings
from web.routes import describe, read_text, to_line

STATIC = Path(web_demo.__file__).parent / "web" / "static"


@pytest.fixture
def replier(tokenizer: QWenTokenizer) -> Iterator[Replier]:
    engine = Engine(live_server.tiny_model(), tokenizer, Limits(max_batch=1, max_queue=2, kv_tokens=1024, chunk=16))
    yield Replier(engine)
    engine.close()
    engine.join()


def collect(replier: Replier, question: Question | None = None, settings: Settings | None = None) -> list[Progress]:
    async def run() -> list[Progress]:
        steps = replier.reply(question or Question("Hi"), settings or replier.defaults)
        return [step async for step in steps]

    return asyncio.run(run())


def text_of(steps: list[Progress]) -> str:
    return "".join(step.text for step in steps)


def test_a_seed_makes_a_reply_repeatable(replier: Replier) -> None:
    settings = replace(replier.defaults, temperature=2.0, top_p=1.0, max_new_tokens=8, seed=3)
    first, again = (text_of(collect(replier, settings=settings)) for _ in range(2))
    other = text_of(collect(replier, settings=replace(settings, seed=4)))
    assert first == again != other


def test_a_reply_gone_on_with_is_the_reply_in_one_go(replier: Replier) -> None:
    """Its prompt ends with its beginning, token for token as if it had been written there."""
    prompt = build_prompt(replier.engine.tokenizer, "Hi").ids
    ids, _ = replier._encode(Question("Hi", prefix="Hello, world"))
    assert ids == [*prompt, *replier.engine.tokenizer.encode_text("Hello, world")]
    settings = replace(replier.defaults, temperature=0.0, max_new_tokens=6)
    assert collect(replier, Question("Hi", prefix="Hello"), settings)[-1].prompt_tokens == len(prompt) + 1


def test_a_long_prompt_is_refused_and_a_long_history_cut(replier: Replier) -> None:
    with pytest.raises(QwenError, match=r"the prompt has [\d,]+ tokens and the model reads at most 1,023: shorten it"):
        collect(replier, Question("word " * 2000))
    replier.config.max_window_size = 60
    settings = replace(replier.defaults, max_new_tokens=4)
    asked = Question("Hi", history=[("one " * 20, "two " * 20)] * 3)
    assert collect(replier, asked, settings)[-1].dropped_turns == 3


def test_running_out_of_memory_is_told_and_the_next_reply_works(replier: Replier) -> None:
    model = replier.engine.model
    forward = model.forward

    def fail(*args: Any, **kwargs: Any) -> Any:
        model.forward = forward
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.forward = fail
    settings = replace(replier.defaults, max_new_tokens=4)
    with pytest.raises(QwenError, match="the device ran out of memory: send less"):
        collect(replier, settings=settings)
    assert collect(replier, settings=settings)[-1].tokens


def test_places_in_the_queue_and_a_reader_who_leaves_frees_the_model(replier: Replier) -> None:
    async def run() -> None:
        settings = replace(replier.defaults, max_new_tokens=900, temperature=0.0)
        first = replier.reply(Question("Hi"), settings)
        while not (await anext(first)).tokens:
            pass
        second, third = (replier.reply(Question("Hi"), settings) for _ in range(2))
        assert (await anext(second)).place == 1 and (await anext(third)).place == 2
        with pytest.raises(PageError, match="the server is busy"):
            await anext(replier.reply(Question("Hi"), settings))
        for reply in (first, second, third):
            await reply.aclose()
        fourth = replier.reply(Question("Hi"), settings)
        assert (await anext(fourth)).place in (1, None)
        await fourth.aclose()

    asyncio.run(run())


def test_a_line_has_only_what_there_is() -> None:
    assert json.loads(to_line(Progress(text="a", tokens=1))) == {"text": "a", "tokens": 1}
    assert describe(PageError("m", "busy", most=3)) == {"message": "m", "key": "busy", "values": {"most": 3}}


# ---- files ----


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030", "big5"])
def test_texts_in_any_encoding_are_read(encoding: str) -> None:
    text = "今天天气很好，我们一起去公园散步。\n花园里开满了红色的花，孩子们在草地上跑来跑去。\n" * 4
    assert read_text(text.replace("\n", "\r\n").encode(encoding, "replace"), 4096) == text.encode(
        encoding, "replace"
    ).decode(encoding)


@pytest.mark.parametrize(
    ("data", "key"),
    [(b"\x89PNG\r\n\0\0\0", "file_binary"), (bytes(range(256)) * 9, "file_binary"), (b"word " * 9999, "file_too_long")],
)
def test_what_is_no_text_is_refused(data: bytes, key: str) -> None:
    with pytest.raises(PageError) as raised:
        read_text(data, 1024)
    assert raised.value.key == key and f"error_{key}" in load_texts()["en"]


# ---- the page ----


def test_every_language_has_every_text_and_every_script_is_announced() -> None:
    texts = load_texts()
    for language, table in texts.items():
        assert table.keys() == texts["en"].keys(), language
        assert all(isinstance(text, str) and text.strip() for text in table.values())
    assert {path.stem for path in STATIC.glob("*.js")} == {*SCRIPTS, "early"}


def test_what_a_checkpoint_is_called_can_t_leave_the_script(replier: Replier) -> None:
    _, tail = ChatPage(replier, "</script><script>evil")._document()
    assert tail.count("</script>") == 3 and "<script>evil" not in tail


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--auth", "me"], "--auth takes USER:PASSWORD"),
        (["--auth", "me:"], "--auth takes USER:PASSWORD"),
        (["--max-users", "0"], "--max-users 0 is too low"),
        (["--tp", "2"], "--tp works in chats"),
        (["--server-name", "192.0.2.1", "--server-port", "0"], "can't listen on 192.0.2.1:0"),
    ],
)
def test_wrong_flags_are_told_before_a_model_is_loaded(flags: list[str], message: str) -> None:
    with pytest.raises(QwenError, match=message):
        web_demo.main(["-c", "no-such-checkpoint", *flags])
