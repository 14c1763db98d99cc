"""What a caller may pass as query and history, and how it is refused: a wrong shape must never become a prompt."""

from collections.abc import Sequence
from typing import Any

from .errors import QwenError

SHAPE = 'pass pairs of query and reply, such as [("Hi", "Hello! How can I help?")], or messages with roles'


def check_text(text: Any, name: str) -> str:
    """`text` itself; QwenError if it is no str."""
    if isinstance(text, str):
        return text
    if isinstance(text, (list, tuple)) and text and isinstance(text[0], dict):
        raise QwenError(f"{name} is a list of messages: pass the last one's text as {name} and the others as history")
    raise QwenError(f"{name} is {short(text)} and should be a text")


def plain_text(content: Any, name: str) -> str:
    """A message's content as text: a str, or OpenAI's list of parts, joined.

    Raises:
        QwenError: it is neither, or a part is no text; `name` says whose content it is.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise QwenError(f"{name} is {short(content)} and should be a text, or a list of text parts")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else None
            raise QwenError(f"{name} has a part {short(kind or part)}: this model reads only text parts")
        texts.append(text)
    return "".join(texts)


def plain_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages of any template with their content as text; QwenError if one is no message."""
    messages = getattr(messages, "messages", messages)
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise QwenError(f"the conversation is {short(messages)}: pass messages with role and content")
    plain = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise QwenError(f"message {i} is {short(message)}: pass messages with role and content")
        if message.get("content") is not None or "tool_calls" not in message:
            message = {**message, "content": plain_text(message.get("content"), f"content of message {i}")}
        plain.append(message)
    return plain


def check_history(history: Any) -> tuple[str | None, list[tuple[str, str]]]:
    """A leading system message if there is one, and the turns, of pairs or of messages with roles.

    Raises:
        QwenError: the history has another shape; the message shows the right one.
    """
    if history is None:
        return None, []
    if isinstance(history, (str, bytes, dict)) or not isinstance(history, Sequence):
        raise QwenError(f"history is {short(history)}: {SHAPE}")
    if history and all(isinstance(item, dict) and {"role", "content"} <= item.keys() for item in history):
        return turns_of_messages(history)
    return None, [check_turn(turn, i) for i, turn in enumerate(history)]


def check_turn(turn: Any, index: int) -> tuple[str, str]:
    """One pair of query and reply."""
    if not isinstance(turn, (tuple, list)) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
        raise QwenError(f"history[{index}] is {short(turn)}: {SHAPE}")
    return turn[0], turn[1]


def turns_of_messages(messages: Sequence[dict[str, Any]]) -> tuple[str | None, list[tuple[str, str]]]:
    """The system message and the turns of messages in which user and assistant take turns."""
    system = None
    if messages[0]["role"] == "system":
        system, messages = plain_text(messages[0]["content"], "the system message of history"), messages[1:]
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise QwenError(
            f"the messages of history have the roles {', '.join(map(str, roles))}: they should be user and assistant "
            "in turn, a reply last; the new question is the query"
        )
    texts = [plain_text(message["content"], f"content of message {i} of history") for i, message in enumerate(messages)]
    return system, list(zip(texts[::2], texts[1::2], strict=True))


def short(value: Any) -> str:
    """A value as it can stand in a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
