"""The chat page: what gradio puts on it. What happens there happens in the browser, in the scripts of `static/`."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from qwen.tools import Tool, read_tool

from .replies import Replier
from .routes import ChatRoutes
from .security import ContentPolicy, PageHead

FOLDER = Path(__file__).parent
FONTS = ["system-ui", "sans-serif", "Noto Color Emoji"]  # the machine's own: none is fetched
# Marks that no text has: markdown.js puts them around what is mathematics, and around nothing in code.
MATH = [
    {"left": "\ue000", "right": "\ue001", "display": True},
    {"left": "\ue002", "right": "\ue003", "display": False},
]
SCRIPTS = ("main", "app", "conversation", "dom", "files", "formats", "keys", "markdown", "messages", "reply",
           "scroll", "settings", "sidebar", "store", "texts")  # fmt: skip
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}


def load_texts() -> dict[str, dict[str, str]]:
    """Every language's texts: a file in `texts/` is a language."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((FOLDER / "texts").glob("*"))}


class ChatPage:
    """Builds the page; every browser that opens it has its own conversations.

    Args:
        name: of the checkpoint.
        language: of the texts; None is the browser's own.
    """

    def __init__(self, replier: Replier, name: str, language: str | None = None) -> None:
        self.replier, self.name, self.language = replier, name, language
        self.tools = example_tools()
        self.texts = load_texts()
        self.translate = gr.I18n(**self.texts)

    def build(self) -> gr.Blocks:
        title = self.texts[self.language or "en"]["title"].format(name=self.name)
        with gr.Blocks(title=title, analytics_enabled=False, fill_height=True, fill_width=True) as page:
            with gr.Sidebar(elem_id="conversations", width=290, open=False):
                gr.HTML(elem_id="conversation_list", apply_default_css=False)
            with gr.Sidebar(elem_id="settings", width=340, open=False, position="right"):
                inputs = self._add_settings()
            with gr.Column(elem_id="desk"):
                gr.HTML(elem_id="head", apply_default_css=False)
                chat = gr.Chatbot(
                    elem_id="chat", show_label=False, buttons=[], latex_delimiters=MATH, sanitize_html=True,
                    allow_tags=False, allow_file_downloads=False, feedback_options=None, autoscroll=False, scale=1,
                    group_consecutive_messages=False, label=self.translate("chat"), layout="bubble", height="auto",
                )  # fmt: skip
                gr.HTML(elem_id="tray", apply_default_css=False)
                message = gr.MultimodalTextbox(
                    elem_id="message", show_label=False, label=self.translate("message"), lines=1, max_lines=10,
                    placeholder=self.translate("placeholder"), file_count="multiple", submit_btn=True, stop_btn=True,
                    max_plain_text_length=2**31,
                )  # fmt: skip
                gr.HTML(elem_id="foot", apply_default_css=False)
            self._connect(page, chat, message, inputs)
        return page

    def look(self) -> dict[str, Any]:
        """What `launch` takes, beside where to serve."""
        theme = gr.themes.Default(
            primary_hue=gr.themes.colors.indigo, neutral_hue=gr.themes.colors.gray, font=FONTS,
            font_mono=["ui-monospace", "monospace"],
        )  # fmt: skip
        head, tail = self._document()
        return {
            "theme": theme,
            "i18n": self.translate,
            "app_kwargs": {
                "middleware": [Middleware(ContentPolicy), Middleware(PageHead, head=head, tail=tail)],
                "routes": ChatRoutes(self.replier, self.tools).routes(),
                "docs_url": None,
                "redoc_url": None,
            },
        }

    def _document(self) -> tuple[str, str]:
        """What the document's head and body end with."""
        scripts = "".join(f'<link rel="modulepreload" href="chat/{name}.js">' for name in SCRIPTS)
        info = json.dumps(self._info(), ensure_ascii=False).replace("<", "\\u003c")
        return (
            f'<link rel="stylesheet" href="chat/page.css">{scripts}',
            f'<script>window.chatInfo = {info};</script><script src="chat/early.js"></script>'
            '<script type="module" src="chat/main.js"></script>',
        )

    def _info(self) -> dict[str, Any]:
        """What the scripts are told of model and server."""
        tokenizer = self.replier.engine.tokenizer
        specs = [
            {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
            for tool in self.tools.values()
        ]
        return {
            "name": self.name,
            "raw": self.replier.config.chat_format == "raw",
            "context": self.replier.engine.context,
            "system": tokenizer.default_system,
            "settings": asdict(self.replier.defaults),
            "tools": specs,
            "language": self.language,
            "languages": {language: texts["language_name"] for language, texts in self.texts.items()},
        }

    def _add_settings(self) -> list[Any]:
        """The inputs, in the order in which settings.js names them."""
        text, defaults = self.translate, self.replier.defaults
        longest = self.replier.engine.context - 1
        ranges = {"temperature": (0, 2, 0.05), "top_p": (0.05, 1, 0.05), "top_k": (0, 200, 1),
                  "repetition_penalty": (1, 2, 0.05), "max_new_tokens": (1, longest, 1)}  # fmt: skip
        gr.HTML(elem_id="presets", apply_default_css=False)
        system = gr.Textbox(
            label=text("system"), info=text("system_info"), lines=3, max_lines=10, elem_id="system",
            value=self.replier.engine.tokenizer.default_system,
        )  # fmt: skip
        sliders = [
            gr.Slider(
                low, high, getattr(defaults, name), step=step, label=text(name), elem_id=name,
                info=None if name == "max_new_tokens" else text(f"{name}_info"), buttons=[],
            )
            for name, (low, high, step) in ranges.items()
        ]  # fmt: skip
        seed = gr.Textbox("", label=text("seed"), info=text("seed_info"), elem_id="seed", max_lines=1)
        gr.HTML(elem_id="preferences", apply_default_css=False)
        return [system, *sliders, seed]

    def _connect(self, page: gr.Blocks, chat: gr.Chatbot, message: gr.MultimodalTextbox, inputs: list[Any]) -> None:
        """Events that end in the browser: the server hears of none of them."""
        show, fill, clear = (
            gr.Button(visible="hidden", elem_id=name) for name in ("show_messages", "fill_settings", "fill_message")
        )
        show.click(None, None, chat, js="() => window.chat.shownMessages()", **QUIET)
        fill.click(None, None, inputs, js="() => window.chat.filledSettings()", **QUIET)
        clear.click(None, None, message, js="() => window.chat.filledMessage()", **QUIET)
        changes = [each.change for each in inputs]
        gr.on(changes, None, inputs, None, js="(...values) => window.chat?.changeSettings(values)", **QUIET)
        message.submit(None, message, message, js="value => window.chat.submit(value)", **QUIET)
        message.change(None, message, message, js="value => window.chat?.takeFiles(value)", **QUIET)
        message.stop(None, None, None, js="() => window.chat.stop()", **QUIET)
        page.load(None, None, None, js="() => window.startChat()", **QUIET)


def example_tools() -> Mapping[str, Tool]:
    """The tools of examples/ that compute and look nothing up: safe on a server."""
    from examples.react_demo import calculator, clock

    return {tool.name: tool for tool in map(read_tool, (calculator, clock))}
