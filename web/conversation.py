"""What a browser has said and heard, as the page shows it, keeps it and exports it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cli.transcript import FORMAT, VERSION, is_text
from qwen.chatml import Turn

from .markdown import show_html


@dataclass(frozen=True)
class Exchange:
    """A question and what came of it; one that `failed` is shown, but the model never hears of it."""

    query: str
    reply: str = ""
    note: str = ""
    failed: bool = False


def to_history(exchanges: Sequence[Exchange]) -> list[Turn]:
    """The turns that the model is told of."""
    return [(exchange.query, exchange.reply) for exchange in exchanges if not exchange.failed]


def to_messages(exchanges: Sequence[Exchange]) -> list[dict[str, str]]:
    """As gradio's chatbot takes it; notes are messages of their own, so that no open code block swallows them."""
    messages = []
    for exchange in exchanges:
        messages.append({"role": "user", "content": show_html(exchange.query)})
        if exchange.reply:
            messages.append({"role": "assistant", "content": show_html(exchange.reply)})
        if exchange.note:
            kind = "error" if exchange.failed else "note"
            note = show_html(exchange.note).replace("\n", " ")
            messages.append({"role": "assistant", "content": f'<span class="{kind}">{note}</span>'})
    return messages


def to_json(exchanges: Sequence[Exchange], system: str) -> str:
    """The chat as a file that the terminal chat's `:load` reads."""
    turns = [{"user": query, "assistant": reply} for query, reply in to_history(exchanges)]
    content = {"format": FORMAT, "version": VERSION, "system": system, "turns": turns}
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def to_markdown(exchanges: Sequence[Exchange], system: str, names: tuple[str, str, str]) -> str:
    """The chat to read, under the names of system, user and assistant."""
    parts = [f"**{names[0]}**\n\n{system}"]
    for query, reply in to_history(exchanges):
        parts += [f"**{names[1]}**\n\n{query}", f"**{names[2]}**\n\n{reply}"]
    return "\n\n---\n\n".join(parts) + "\n"


def to_saved(exchanges: Sequence[Exchange]) -> list[list[Any]]:
    """As the browser keeps it for a reload."""
    return [[e.query, e.reply, e.note, e.failed] for e in exchanges]


def from_saved(saved: Any) -> list[Exchange]:
    """What a browser gives back; nothing if it is not what it was given."""
    if not isinstance(saved, list):
        return []
    if not all(isinstance(e, list) and len(e) == 4 and all(map(is_text, e[:3])) for e in saved):
        return []
    return [Exchange(query, reply, note, bool(failed)) for query, reply, note, failed in saved]
