"""What the engine writes, as every protocol is told it: pieces of text and of calls."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from uuid import uuid4

from qwen.engine import Update
from qwen.react import Delta, ReactParser
from qwen.sampling import Choice

from .errors import ApiError
from .plan import ChatPlan
from .protocol import CUSTOM_INPUT


@dataclass(frozen=True)
class Piece:
    """What a step adds to a reply: text, the beginning of call number `call` (where it has a name), or more of it.

    finish_reason, of the last piece alone, is stop, length or tool_calls; `stop` is the stop that the client named.
    """

    text: str = ""
    call: int | None = None
    call_id: str = ""
    name: str | None = None
    arguments: str = ""  # of a custom tool: its free text
    custom: bool = False
    scored: Sequence[Choice] = ()
    finish_reason: str | None = None
    stop: str | int | None = None


class ReplyReader:
    """Reads one reply's updates; the pieces add up to the same whatever the steps."""

    def __init__(self, plan: ChatPlan) -> None:
        self.plan = plan
        self.parser = ReactParser(plan.tools, most_calls=plan.most_calls) if plan.tools else None
        self.pending = [] if self.parser is None else self.parser.push(plan.prefix)
        self.text = ""
        self.ids: list[str] = []  # of the calls so far
        self.free = ""  # the arguments of a custom tool's call that is being read
        self.custom: int | None = None  # which call that is

    def read(self, update: Update) -> list[Piece]:
        """The pieces that an update makes.

        Raises:
            ApiError: the reply is complete, and breaks its schema.
        """
        pieces = self._pieces(update)
        self.text += "".join(piece.text for piece in pieces)
        # The token that ends a reply is no part of it.
        scored = () if update.finish_reason == "stop" else [c for c in update.choices if c.logprob is not None]
        if scored:
            pieces[:1] = [replace(pieces[0] if pieces else Piece(), scored=scored)]
        if update.finish_reason is not None:
            pieces.append(self._end(update))
        return pieces

    def _pieces(self, update: Update) -> list[Piece]:
        if self.parser is None:
            return [Piece(update.text)] if update.text else []
        deltas, self.pending = [*self.pending, *self.parser.push(update.text)], []
        if update.finish_reason is not None:
            deltas += self.parser.close()
        if self.plan.shaped and any(delta.call is not None for delta in deltas):
            # Clients read whatever is content as the answer in its shape: a thought before a call is none.
            deltas = [replace(delta, text="") for delta in deltas]
        pieces = [piece for delta in deltas for piece in self._translate(delta)]
        return pieces + (self._close_custom() if update.finish_reason is not None else [])

    def _translate(self, delta: Delta) -> list[Piece]:
        pieces = [Piece(delta.text)] if delta.text else []
        if delta.call is None:
            return pieces
        if delta.name is not None:
            pieces += self._close_custom()
            self.ids.append(f"call_{uuid4().hex[:24]}")
            is_custom = delta.name in self.plan.custom
            self.custom, self.free = (delta.call, "") if is_custom else (None, "")
            pieces.append(Piece(call=delta.call, call_id=self.ids[-1], name=delta.name, custom=is_custom))
        if self.custom is not None:
            self.free += delta.arguments
        elif delta.arguments:
            pieces.append(Piece(call=delta.call, call_id=self.ids[-1], arguments=delta.arguments))
        return pieces

    def _close_custom(self) -> list[Piece]:
        """A custom tool's free text, which came as its one argument."""
        if self.custom is None:
            return []
        try:
            text = json.loads(self.free, strict=False)[CUSTOM_INPUT]
        except (ValueError, KeyError, TypeError):  # the model wrote something else, or broke off
            text = self.free
        call, self.custom = self.custom, None
        return [Piece(call=call, call_id=self.ids[call], arguments=str(text), custom=True)]

    def _end(self, update: Update) -> Piece:
        if update.finish_reason == "length":
            return Piece(finish_reason="length")
        if self.ids:
            return Piece(finish_reason="tool_calls")
        if self.plan.check and (fault := self.plan.check(self.text)):
            raise ApiError(500, fault, "response_format", "schema_not_met")
        stop = update.stop if isinstance(update.stop, str) else update.stop[-1] if update.stop else None
        # The tokens that end every turn are not the client's.
        own = stop in self.plan.stops
        return Piece(finish_reason="stop", stop=stop if own else None)
