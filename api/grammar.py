"""Replies that have to fit a JSON schema: llguidance says which tokens may come next."""

import codecs
import json
import threading
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen import QwenError, QWenTokenizer
from qwen.errors import first_line
from qwen.react import ACTION, INPUT, ReactParser
from qwen.tools import Tool

ON_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Constraint:
    """Where one reply is in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher

    def allowed(self, device: torch.device, vocab_size: int) -> Tensor | None:
        """Which tokens (V,) may come next; None is all."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        flags = np.unpackbits(bits, bitorder="little")[:vocab_size].astype(bool)
        mask = torch.zeros(vocab_size, dtype=torch.bool)
        mask[: len(flags)] = torch.from_numpy(flags)
        return mask.to(device)

    def push(self, token: int) -> None:
        if not self.matcher.is_stopped() and not self.matcher.consume_token(token):
            raise RuntimeError(f"the grammar does not take token {token}: {self.matcher.get_error()}")


class StrictArguments(Constraint):
    """Lets a reply go as it likes, until it calls a tool whose arguments are to fit their schema."""

    def __init__(self, tokenizer: QWenTokenizer, parser: ReactParser, arguments: dict[str, Constraint]) -> None:
        self.tokenizer, self.parser, self.arguments = tokenizer, parser, arguments
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.active: Constraint | None = None

    def allowed(self, device: torch.device, vocab_size: int) -> Tensor | None:
        return None if self.active is None else self.active.allowed(device, vocab_size)

    def push(self, token: int) -> None:
        if self.active is not None:
            self.active.push(token)
            return
        value = self.tokenizer.decoder.get(token)
        text = self.utf8.decode(value) if isinstance(value, bytes) else ""
        for delta in self.parser.push(text):
            if delta.name in self.arguments:
                self.active = self.arguments[delta.name]
                begun = text.rpartition(INPUT[-1])[2]  # what the token has brought beyond the label
                for part in self.tokenizer.encode_text(begun):
                    self.active.push(part)
                return


class Grammars:
    """Makes constraints for one tokenizer."""

    def __init__(self, tokenizer: QWenTokenizer, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._vocabulary: Any = None  # made at the first use: it takes a second
        self._lock = threading.Lock()

    def json(self, schema: dict[str, Any]) -> Constraint:
        """A JSON value that fits the schema.

        Raises:
            QwenError: the package is not installed, or the schema has what it doesn't know; the message says which.
        """
        return self._constrain(f"start: %json {json.dumps(with_layout(schema))}")

    def call(self, tools: Sequence[Tool], after: str) -> Constraint:
        """A call of one of the tools; `after` is how the reply begins already: with Action:, or all up to the input."""
        rules = [f"args_{i}: {json_rule(tool)}" for i, tool in enumerate(tools)]
        if after.endswith(INPUT):
            rules.append('start: " " args_0')
        else:
            assert after.endswith(ACTION), after
            begins = [json.dumps(f" {tool.name}\n{INPUT} ", ensure_ascii=False) for tool in tools]
            rules.append("start: " + " | ".join(f"{begin} args_{i}" for i, begin in enumerate(begins)))
        return self._constrain("\n".join(rules))

    def strict(self, tools: Sequence[Tool], names: Collection[str], begins: str) -> Constraint:
        """A reply that begins with `begins` and may call tools; the arguments of those named fit their schemas."""
        parser = ReactParser(tools)
        parser.push(begins)
        spaced = {tool.name: f"start: /[ \\n]?/ args\nargs: {json_rule(tool)}" for tool in tools if tool.name in names}
        arguments = {name: self._constrain(rule) for name, rule in spaced.items()}
        return StrictArguments(self.tokenizer, parser, arguments)

    def _constrain(self, lark: str) -> Constraint:
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise QwenError("this needs the package llguidance on the server: pip install llguidance") from None
        grammar = LLMatcher.grammar_from_lark(lark)
        if error := LLMatcher.validate_grammar(grammar, self._make_vocabulary()):
            raise QwenError(f"the schema can't be used: {first_line(ValueError(error))}")
        return Constraint(LLMatcher(self._make_vocabulary(), grammar))

    def _make_vocabulary(self) -> Any:
        from llguidance.tiktoken import lltokenizer_from_encoding

        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = lltokenizer_from_encoding(
                    self.tokenizer.tokenizer, n_vocab=self.vocab_size, eos_token=self.tokenizer.im_end_id
                )
        return self._vocabulary


def json_rule(tool: Tool) -> str:
    return f"%json {json.dumps(with_layout(object_schema(tool)))}"


def with_layout(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, its values to be written on one line: a small model may write line breaks for ever."""
    return {**schema, "x-guidance": ON_ONE_LINE}


def object_schema(tool: Tool) -> dict[str, Any]:
    """The JSON schema of a tool's arguments, whichever form its parameters are in."""
    if not isinstance(tool.parameters, list):
        return {"type": "object", **tool.parameters}
    return {
        "type": "object",
        "properties": {entry["name"]: entry.get("schema", {}) for entry in tool.parameters},
        "required": [entry["name"] for entry in tool.parameters if entry.get("required")],
        "additionalProperties": False,
    }
