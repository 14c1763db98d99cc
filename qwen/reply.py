"""From generated ids to the text of a reply, token by token: whole characters, no control tokens, no stop words."""

import codecs
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .tokenization_qwen import QWenTokenizer

# stop: the model ended its turn; stop_word: a stop word came; length: max_new_tokens; cancelled: the reader left.
FinishReason = Literal["stop", "stop_word", "length", "cancelled"]
StopWord = str | int | Sequence[int]


class Reply(str):
    """A reply's text, or what there is of it so far, that also says how it went.

    Attributes:
        finish_reason: why it ended; None while it goes on.
        prompt_tokens, completion_tokens: tokens read and written, the stop token included.
        dropped_turns: turns of the history that did not fit into the window.
    """

    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    dropped_turns: int

    def __new__(
        cls,
        text: str,
        finish_reason: FinishReason | None = None,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
        dropped_turns: int = 0,
    ) -> "Reply":
        reply = super().__new__(cls, text)
        reply.finish_reason = finish_reason
        reply.prompt_tokens = prompt_tokens
        reply.completion_tokens = completion_tokens
        reply.dropped_turns = dropped_turns
        return reply


def held_back(sequence: Sequence, stops: Iterable[Sequence]) -> int:
    """Length of the longest end of `sequence` that could be the beginning of a stop."""
    return max(
        (n for stop in stops for n in range(1, min(len(stop) - 1, len(sequence)) + 1) if sequence[-n:] == stop[:n]),
        default=0,
    )


class ReplyDecoder:
    """Collects one reply. `push` takes a token and returns the text that may be shown now.

    Text that may still turn out to be the beginning of a stop word, and blanks that may turn out to be the end, are
    held back. So the pushed texts, joined, are always a prefix of the final text, whatever the tokens' borders.

    Args:
        stop_ids: tokens that end the reply.
        stop_words: words that end it, as text (found across token borders) or as ids. Ids of regular tokens mean
            their text; a sequence with a control token in it is compared by ids.
        strip: leave blanks at both ends of the reply out; code and other raw continuations need them.
        min_tokens: stop words in fewer tokens don't count.
        include_stop: the reply ends after its stop, not before it.

    Attributes:
        stopped_by: the stop that ended the reply: a word, or its ids.
    """

    def __init__(
        self,
        tokenizer: "QWenTokenizer",
        stop_ids: Collection[int] = (),
        stop_words: Iterable[StopWord] = (),
        strip: bool = True,
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        self.strip = strip
        self.min_tokens = min_tokens
        self.include_stop = include_stop
        self.stopped_by: str | list[int] | None = None
        self.tokens = 0
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self._decoder = tokenizer.decoder
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop_sequences = [[i] for i in stop_ids]
        self._stop_texts: list[str] = []
        for word in stop_words:
            ids = [word] if isinstance(word, int) else word
            if isinstance(ids, str):
                self._stop_texts.append(ids)
            elif any(isinstance(self._decoder.get(i), str) for i in ids):
                self._stop_sequences.append(list(ids))
            else:
                self._stop_texts.append(tokenizer.decode(list(ids)))
        if not all(self._stop_texts) or not all(self._stop_sequences):
            raise ValueError("a stop word is empty: it would end every reply before its first character")
        self._pending: list[int] = []  # tokens that may belong to a stop sequence
        self._held = ""  # text that may belong to a stop word, or be blanks at the end

    def push(self, token: int) -> str:
        """Take the next token; after the end of the reply, take no notice of it."""
        if self.finish_reason:
            return ""
        self.tokens += 1
        self._pending.append(token)
        for stop in self._stop_sequences:
            if self._pending[-len(stop) :] == stop:
                self.stopped_by = stop
                if not self.include_stop:
                    del self._pending[-len(stop) :]
                return self.close("stop")
        return self._release(len(self._pending) - held_back(self._pending, self._stop_sequences))

    def close(self, reason: FinishReason) -> str:
        """End the reply: what was held back is text after all, except blanks and half a character at the end."""
        if self.finish_reason:
            return ""
        shown = self._release(len(self._pending))
        if not self.finish_reason:
            self.finish_reason = reason
            shown += self._show(self._held)
        return shown

    def _release(self, count: int) -> str:
        """Decode the first `count` pending tokens, stop at a stop word, and show what is safe."""
        ids, self._pending = self._pending[:count], self._pending[count:]
        tokens = (self._decoder.get(i) for i in ids)
        self._held += self._utf8.decode(b"".join(token for token in tokens if isinstance(token, bytes)))
        if self.tokens < self.min_tokens:
            return self._show(self._held)
        # The word that is complete first ends the reply: the same one however the text was cut into tokens.
        found = [(at + len(word), at, word) for word in self._stop_texts if (at := self._held.find(word)) >= 0]
        if found:
            end, at, self.stopped_by = min(found)
            self.finish_reason = "stop_word"
            return self._show(self._held[: end if self.include_stop else at])
        return self._show(self._held[: len(self._held) - held_back(self._held, self._stop_texts)])

    def _show(self, text: str) -> str:
        """Show `text`, the beginning of what is held, without blanks at either end of the reply."""
        shown = text.rstrip() if self.strip else text
        self._held = self._held[len(shown) :]
        if self.strip and not self.text:
            shown = shown.lstrip()
        self.text += shown
        return shown
