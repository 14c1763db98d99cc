"""The chat page without a browser: what is shown of texts, what is kept, and how replies fail."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import live_server
import web_demo
from cli.transcript import Transcript, load_transcript
from qwen import QwenError, QWenTokenizer
from qwen.engine import Engine, Limits
from web.conversation import Exchange, from_saved, to_json, to_messages, to_saved
from web.markdown import show_html
from web.replies import Progress, Replier, Settings

PIECES = ["<b>", "</b>", "<img src=x onerror=a>", "![a](b)", "![", "[a]: b", "`", "``", "```", "~~~", "\n", "\n\n",
          "    ", "- ", "> ", "\\", "&lt;", "<!--", "a", " ", "]", "(b)", "<?", "$"]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_no_markdown_makes_html_or_pictures(text: str) -> None:
    tokens = MarkdownIt("commonmark").parse(show_html(text))
    kinds = {part.type for token in tokens for part in (token, *(token.children or []))}
    assert not kinds & {"html_block", "html_inline", "image"}


@pytest.mark.parametrize("text", ["a < b && c > d", "`<b>`", "```\n<b>\n```", "**bold** $x<1$", "你好 🎉"])
def test_what_is_no_html_stays(text: str) -> None:
    assert show_html(text) == text


@pytest.mark.parametrize("text", ["<b>x</b>", "&lt;", "x <!-- y -->", "<script>alert(1)</script>", "![a](b)"])
def test_html_is_read_back_as_it_was_typed(text: str) -> None:
    [paragraph] = [t for t in MarkdownIt("commonmark").parse(show_html(text)) if t.type == "inline"]
    assert "".join(child.content for child in paragraph.children) == text.replace("](b)", "") or "![" in text


def test_the_export_is_a_transcript_of_the_terminal_chat(tmp_path: Path) -> None:
    exchanges = [Exchange("<q>", "r"), Exchange("lost", failed=True, note="No reply"), Exchange("2", "🎉")]
    (tmp_path / "chat.json").write_text(to_json(exchanges, "S"), encoding="utf-8")
    assert load_transcript(tmp_path / "chat.json") == Transcript("S", [("<q>", "r"), ("2", "🎉")])
    assert from_saved(to_saved(exchanges)) == exchanges and len(to_messages(exchanges)) == 6


@pytest.mark.parametrize("saved", [None, 1, "x", [1], [["a"]], [["a", "b", "c"]], [["a", 1, "c", False]], [{}]])
def test_what_a_browser_makes_up_is_not_restored(saved: Any) -> None:
    assert from_saved(saved) == []


# ---- replies ----


@pytest.fixture
def replier(tokenizer: QWenTokenizer) -> Iterator[Replier]:
    engine = Engine(live_server.tiny_model(), tokenizer, Limits(max_batch=1, max_queue=2, kv_tokens=1024, chunk=16))
    yield Replier(engine)
    engine.close()
    engine.join()


def collect(
    replier: Replier, query: str = "Hi", settings: Settings | None = None, history: Sequence[Any] = ()
) -> list[Progress]:
    async def run() -> list[Progress]:
        steps = replier.reply("session", query, history, settings or replier.defaults)
        return [step async for step in steps]

    return asyncio.run(run())


def test_a_seed_makes_a_reply_repeatable(replier: Replier) -> None:
    settings = replace(replier.defaults, temperature=2.0, top_p=1.0, max_new_tokens=8, seed=3)
    first, again = collect(replier, settings=settings)[-1], collect(replier, settings=settings)[-1]
    other = collect(replier, settings=replace(settings, seed=4))[-1]
    assert first.text == again.text != other.text and first.tokens <= 8


def test_a_long_prompt_is_refused_and_a_long_history_cut(replier: Replier) -> None:
    with pytest.raises(QwenError, match=r"the prompt has [\d,]+ tokens and the model reads at most 1,023: shorten it"):
        collect(replier, "word " * 2000)
    replier.config.max_window_size = 60
    settings = replace(replier.defaults, max_new_tokens=4)
    assert collect(replier, settings=settings, history=[("one " * 20, "two " * 20)] * 3)[-1].dropped_turns == 3


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
    assert collect(replier, settings=settings)[-1].tokens and not replier.running


def test_places_in_the_queue_and_a_stop_that_frees_the_model(replier: Replier) -> None:
    async def run() -> None:
        settings = replace(replier.defaults, max_new_tokens=900, temperature=0.0)
        first = replier.reply("a", "Hi", [], settings)
        while not (await anext(first)).tokens:
            pass
        second, third = (replier.reply(name, "Hi", [], settings) for name in "bc")
        assert (await anext(second)).place == 1 and (await anext(third)).place == 2
        with pytest.raises(QwenError, match="the server is busy"):
            [await anext(replier.reply(name, "Hi", [], settings)) for name in "de"]
        for name in "abc":
            replier.stop(name)
        for reply in (first, second, third):
            steps = [step async for step in reply]
            assert steps[-1].finish_reason == "cancelled"
        assert (await anext(replier.reply("f", "Hi", [], settings))).place in (1, None)
        assert set(replier.running) <= {"f"}

    asyncio.run(run())


# ---- the command line ----


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
