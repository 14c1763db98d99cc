"""Conversations to token ids and labels: which tokens carry loss.

The ids are those that `qwen.chatml.encode_messages` makes for inference; role, newline and content are encoded apart,
and no text becomes a control token.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from qwen import QWenTokenizer
from qwen.chatml import encode_block
from qwen.loss import IGNORED

from .samples import Conversation, Message, Text

LOSS_ON = ("assistant", "qwen2023", "last")


@dataclass
class Sample:
    """A tokenised conversation; without ids where it was dropped."""

    # whole; split: a piece of a text; cut: later turns did not fit; too long: not even the first reply did; no reply
    fate: str
    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)  # the ids, or -100 where a token carries no loss


@dataclass
class _Tokens:
    ids: list[int] = field(default_factory=list)
    carries: list[bool] = field(default_factory=list)

    def add(self, ids: Sequence[int], carries: bool | Sequence[bool]) -> None:
        self.ids += ids
        self.carries += [carries] * len(ids) if isinstance(carries, bool) else carries


def encode_conversation(
    tokenizer: QWenTokenizer, conversation: Conversation, max_length: int, loss_on: str = "assistant"
) -> Sample:
    """Ids and labels of a conversation up to the end of the last reply that carries loss and fits `max_length` tokens.

    Args:
        loss_on: "assistant": what replies say and the <|im_end|> that ends them. "last": of the last reply only.
            "qwen2023", the published recipe: also every other <|im_start|> and <|im_end|>, and the newline after it.
    """
    messages = conversation.messages
    if messages[0].role != "system":
        messages = (Message("system", tokenizer.default_system), *messages)
    if not any(message.role == "assistant" and message.train for message in messages):
        return Sample("no reply")
    tokens, fate, start, end = _Tokens(), "whole", 0, 0
    for message in messages:
        block_start = len(tokens.ids)
        _add_block(tokens, tokenizer, message, everywhere=loss_on == "qwen2023")
        if len(tokens.ids) > max_length:
            fate = "cut"
            break
        if message.role == "assistant" and message.train:
            start, end = block_start, len(tokens.ids)
    if not end:
        return Sample("too long")
    if loss_on == "last":
        tokens.carries[:start] = [False] * start
    tokens.carries[0] = False  # nothing stands before it to predict it from; in a pack another sample would
    labels = [i if carries else IGNORED for i, carries in zip(tokens.ids[:end], tokens.carries, strict=False)]
    return Sample(fate, tokens.ids[:end], labels)


def encode_text(tokenizer: QWenTokenizer, text: Text, max_length: int) -> list[Sample]:
    """A document in pieces of up to `max_length` tokens; all of it carries loss, and the <|endoftext|> that ends it.

    An <|endoftext|> goes before it, as in pre-training, to predict its first token from; a later piece begins with the
    last token of the one before, which carries none.
    """
    ids = [tokenizer.eod_id, *tokenizer.encode_text(text.text), tokenizer.eod_id]
    pieces = [ids[start : start + max_length] for start in range(0, len(ids) - 1, max_length - 1)]
    fate = "whole" if len(pieces) == 1 else "split"
    return [Sample(fate, piece, [IGNORED, *piece[1:]]) for piece in pieces]


def _add_block(tokens: _Tokens, tokenizer: QWenTokenizer, message: Message, everywhere: bool) -> None:
    """Append `<|im_start|>role\\ncontent<|im_end|>\\n`."""
    newline = tokenizer.encode_text("\n")
    header = encode_block(tokenizer, message.role, "", closed=False)
    tokens.add(header[:1], everywhere)
    tokens.add(header[1:], False)
    content = tokenizer.encode_text(message.content)
    reply = message.role == "assistant" and message.train
    if reply and message.spans is not None:
        tokens.add(content, _within_spans(tokenizer, content, message))
    else:
        tokens.add(content, reply)
    tokens.add([tokenizer.im_end_id], everywhere or reply)
    tokens.add(newline, everywhere)


def _within_spans(tokenizer: QWenTokenizer, ids: list[int], message: Message) -> list[bool]:
    """Which tokens begin within a span of the message's characters."""
    ends = list(accumulate(len(character.encode()) for character in message.content))  # bytes up to each character
    starts = [0, *accumulate(len(tokenizer.decoder[i]) for i in ids)][:-1]
    characters = [bisect_right(ends, start) for start in starts]
    return [any(first <= character < last for first, last in message.spans or ()) for character in characters]
