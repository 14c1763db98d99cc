"""The chat page: what is on it, and what its buttons do."""

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from cli.texts import Texts
from qwen import QwenError

from .conversation import Exchange, from_saved, to_history, to_json, to_markdown, to_messages, to_saved
from .replies import Progress, Replier, Settings

FOLDER = Path(__file__).parent
REDRAW = 0.1  # seconds between two looks of a reply: browsers need no more
FONTS = ["system-ui", "sans-serif", "Noto Color Emoji"]  # the machine's own: none is fetched
MATH = [
    {"left": left, "right": right, "display": display}
    for left, right, display in (("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False), ("$", "$", False))
]
TOGGLE_DARK = "() => { document.body.classList.toggle('dark') }"
SAVE = """(text, name, kind) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: kind}));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""
COPY = """(saved) => {
    const exchanges = saved || [];
    if (exchanges.length && navigator.clipboard) navigator.clipboard.writeText(exchanges[exchanges.length - 1][1]);
}"""


def load_look() -> dict[str, Any]:
    """How the page looks, as `launch` takes it."""
    theme = gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"])
    return {"theme": theme, "css": (FOLDER / "page.css").read_text(encoding="utf-8")}


class Parts(NamedTuple):
    """What the events change."""

    chat: gr.Chatbot
    message: gr.Textbox
    exchanges: gr.State
    saved: gr.BrowserState


class ChatPage:
    """Builds the page; every browser that opens it has its own chat."""

    def __init__(self, replier: Replier, texts: Texts, name: str) -> None:
        self.replier, self.texts, self.name = replier, texts, name
        self.defaults = replier.defaults

    def build(self) -> gr.Blocks:
        texts = self.texts
        with gr.Blocks(title=texts("title", name=self.name), analytics_enabled=False, fill_height=True) as page:
            with gr.Row(elem_id="head"):
                gr.Markdown(f"# {texts('title', name=self.name)}")
                dark = gr.Button(texts("dark"), size="sm", elem_id="dark", scale=0)
            if self.name == "demo":
                gr.Markdown(texts("demo"))
            if self.replier.config.chat_format == "raw":
                gr.Markdown(texts("raw"))
            parts = self._add_chat()
            buttons = self._add_buttons()
            settings = self._add_settings()
            self._connect(page, parts, buttons, settings)
            dark.click(None, js=TOGGLE_DARK, api_visibility="private")
        return page.queue(default_concurrency_limit=None)

    # ---- what is on it ----

    def _add_chat(self) -> Parts:
        texts = self.texts
        chat = gr.Chatbot(
            label=texts("chat"), elem_id="chat", height="60vh", buttons=[], latex_delimiters=MATH, sanitize_html=True,
            placeholder=texts("empty"), examples=[{"text": text} for text in texts("examples").split("|")],
            allow_file_downloads=False, feedback_options=None, scale=1,
        )  # fmt: skip
        message = gr.Textbox(
            label=texts("message"), placeholder=texts("placeholder"), elem_id="message", lines=1, max_lines=8,
            autofocus=True, submit_btn=texts("send"),
        )  # fmt: skip
        return Parts(chat, message, gr.State([]), gr.BrowserState([], storage_key="qwen-7b-chat"))

    def _add_buttons(self) -> dict[str, gr.Button]:
        names = ("regenerate", "edit", "undo", "clear", "copy", "save_json", "save_markdown")
        with gr.Row(elem_id="actions"):
            return {name: gr.Button(self.texts(name), size="sm", elem_id=name, min_width=90) for name in names}

    def _add_settings(self) -> list[Any]:
        """The inputs, in the order of `read_settings`, the system prompt last."""
        texts, defaults = self.texts, self.defaults
        longest = self.replier.engine.context - 1
        ranges = {"temperature": (0, 2, 0.05), "top_p": (0.05, 1, 0.05), "top_k": (0, 200, 1),
                  "repetition_penalty": (1, 2, 0.05), "max_new_tokens": (1, longest, 1)}  # fmt: skip
        inputs: list[Any] = []
        with gr.Accordion(texts("settings"), open=False, elem_id="settings"):
            system = gr.Textbox(
                defaults.system, label=texts("system"), info=texts("system_info"), lines=2, elem_id="system"
            )
            with gr.Row():
                for name, (low, high, step) in ranges.items():
                    info = texts(f"{name}_info") if name != "max_new_tokens" else None
                    value = getattr(defaults, name)
                    inputs.append(
                        gr.Slider(
                            low, high, value, step=step, label=texts(name), info=info, elem_id=name, min_width=200
                        )
                    )
                inputs.append(
                    gr.Textbox("", label=texts("seed"), info=texts("seed_info"), elem_id="seed", min_width=200)
                )
            reset = gr.Button(texts("reset"), size="sm", elem_id="reset")
        inputs.append(system)
        values = [*(getattr(defaults, name) for name in ranges), "", defaults.system]
        reset.click(lambda: values, None, inputs, api_visibility="private", show_progress="hidden")
        return inputs

    # ---- what happens ----

    def _connect(self, page: gr.Blocks, parts: Parts, buttons: dict[str, gr.Button], settings: list[Any]) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        outputs = [parts.chat, parts.message, parts.exchanges]
        # A click that comes while a reply is being written does nothing: `_answer` sees to that, not the browser.
        several: dict[str, Any] = {**quiet, "trigger_mode": "multiple"}
        ask = gr.on([parts.message.submit], self.ask, [parts.message, parts.exchanges, *settings], outputs, **several)
        example = parts.chat.example_select(self.ask_example, [parts.exchanges, *settings], outputs, **several)
        again = buttons["regenerate"].click(self.regenerate, [parts.exchanges, *settings], outputs, **several)
        edit = buttons["edit"].click(self.edit, [parts.exchanges], outputs, **quiet)
        undo = buttons["undo"].click(self.undo, [parts.exchanges], outputs, **quiet)
        clear = gr.on([buttons["clear"].click, parts.chat.clear], self.clear, None, outputs, **quiet)
        parts.message.stop(self.stop, None, None, **quiet)
        for event in (ask, example, again, edit, undo, clear):
            event.then(to_saved, parts.exchanges, parts.saved, **quiet)
        buttons["copy"].click(None, parts.saved, None, js=COPY, **quiet)
        for kind, name in (("application/json", "save_json"), ("text/markdown", "save_markdown")):
            file = gr.Textbox(visible="hidden")
            file_name = gr.Textbox(f"chat.{'json' if name == 'save_json' else 'md'}", visible="hidden")
            file_kind = gr.Textbox(kind, visible="hidden")
            made = buttons[name].click(getattr(self, name), [parts.exchanges, settings[-1]], file, **quiet)
            made.then(None, [file, file_name, file_kind], None, js=SAVE, **quiet)
        page.load(self.restore, parts.saved, [parts.chat, parts.exchanges], **quiet)
        page.unload(self.leave)

    async def ask(
        self, request: gr.Request, message: str, exchanges: list[Exchange], *settings: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Answer what is in the box; nothing happens if it is blank or a reply is being written."""
        if not message.strip():
            yield gr.skip(), gr.skip(), gr.skip()
            return
        async for step in self._answer(message, exchanges, settings, request.session_hash, ""):
            yield step

    async def ask_example(
        self, request: gr.Request, event: gr.SelectData, exchanges: list[Exchange], *settings: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        async for step in self._answer(event.value["text"], exchanges, settings, request.session_hash):
            yield step

    async def regenerate(
        self, request: gr.Request, exchanges: list[Exchange], *settings: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        if not exchanges:
            yield gr.skip(), gr.skip(), gr.skip()
            return
        async for step in self._answer(exchanges[-1].query, exchanges[:-1], settings, request.session_hash):
            yield step

    async def _answer(
        self, query: str, exchanges: list[Exchange], values: tuple[Any, ...], session: str, left: str | None = None
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Chat, box and state while a reply grows; `left` is what stays in the box, None what is in it."""
        if session in self.replier.running:
            yield gr.skip(), gr.skip(), gr.skip()
            return
        shown = Exchange(query)
        box = {} if left is None else {"value": left}
        yield self._show([*exchanges, shown], busy=True, **box)
        try:
            settings = read_settings(values, self.texts)
            drawn = 0.0
            async for progress in self.replier.reply(session, query, to_history(exchanges), settings):
                shown = Exchange(query, progress.text, self._note(progress))
                if progress.finish_reason is None and time.monotonic() - drawn > REDRAW:
                    drawn = time.monotonic()
                    yield self._show([*exchanges, shown], busy=True)
        except QwenError as error:
            shown = replace(shown, note=self.texts("error", message=error), failed=True)
        yield self._show([*exchanges, shown])

    def _show(self, exchanges: list[Exchange], busy: bool = False, **box: Any) -> tuple[Any, ...]:
        """What the page's chat, box and state become."""
        send, stop = (False, self.texts("stop")) if busy else (self.texts("send"), False)
        return to_messages(exchanges), gr.update(submit_btn=send, stop_btn=stop, **box), exchanges

    def _note(self, progress: Progress) -> str:
        """What is to be said about a reply, under it."""
        texts = self.texts
        if progress.finish_reason is None:
            if progress.place is not None:
                return texts("waiting", place=progress.place)
            if not progress.text:
                return texts("thinking")
        notes = []
        if progress.tokens:
            notes.append(texts("stats", tokens=progress.tokens, rate=progress.rate, prompt=progress.prompt_tokens))
        if progress.finish_reason in ("cancelled", "length"):
            notes.append(texts(progress.finish_reason))
        elif progress.finish_reason and not progress.text:
            notes.append(texts("no_reply"))
        if progress.dropped_turns:
            notes.append(texts("dropped", count=progress.dropped_turns))
        return " · ".join(notes)

    async def stop(self, request: gr.Request) -> None:
        self.replier.stop(request.session_hash)

    async def leave(self, request: gr.Request) -> None:
        """A closed tab's reply ends."""
        self.replier.stop(request.session_hash)

    def edit(self, request: gr.Request, exchanges: list[Exchange]) -> tuple[Any, ...]:
        """The last question goes back into the box, and its reply goes away."""
        if not exchanges or request.session_hash in self.replier.running:
            return gr.skip(), gr.skip(), gr.skip()
        return self._show(exchanges[:-1], value=exchanges[-1].query)

    def undo(self, request: gr.Request, exchanges: list[Exchange]) -> tuple[Any, ...]:
        if request.session_hash in self.replier.running:
            return gr.skip(), gr.skip(), gr.skip()
        return self._show(exchanges[:-1])

    async def clear(self, request: gr.Request) -> tuple[Any, ...]:
        self.replier.stop(request.session_hash)
        return self._show([])

    def save_json(self, exchanges: list[Exchange], system: str) -> str:
        return to_json(exchanges, system)

    def save_markdown(self, exchanges: list[Exchange], system: str) -> str:
        names = tuple(self.texts(f"name_{role}") for role in ("system", "user", "assistant"))
        return to_markdown(exchanges, system, names)

    def restore(self, saved: Any) -> tuple[Any, ...]:
        exchanges = from_saved(saved)
        return to_messages(exchanges), exchanges


def read_settings(values: tuple[Any, ...], texts: Texts) -> Settings:
    """What the inputs hold."""
    temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed, system = values
    try:
        number = int(seed) if seed.strip() else None
    except ValueError:
        raise QwenError(f"{texts('seed')}: {seed[:40]!r}") from None
    return Settings(
        float(temperature), float(top_p), int(top_k), float(repetition_penalty), int(max_new_tokens), number, system
    )
