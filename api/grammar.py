"""Replies that have to fit a JSON schema: llguidance says which tokens may come next."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen import QwenError, QWenTokenizer
from qwen.errors import first_line
from qwen.react import ACTION, INPUT
from qwen.tools import Tool

ON_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Constraint:
    """Where one reply is in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher

    def allowed(self, device: torch.device, vocab_size: int) -> Tensor:
        """Which tokens (V,) may come next."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        flags = np.unpackbits(bits, bitorder="little")[:vocab_size].astype(bool)
        mask = torch.zeros(vocab_size, dtype=torch.bool)
        mask[: len(flags)] = torch.from_numpy(flags)
        return mask.to(device)

    def push(self, token: int) -> None:
        if not self.matcher.is_stopped() and not self.matcher.consume_token(token):
            raise RuntimeError(f"the grammar does not take token {token}: {self.matcher.get_error()}")


class Grammars:
    """Makes constraints for one tokenizer."""

    def __init__(self, tokenizer: QWenTokenizer, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._vocabulary: Any = None  # made at the first use: it takes a second

    def json(self, schema: dict[str, Any]) -> Constraint:
        """A JSON value that fits the schema.

        Raises:
            QwenError: the package is not installed, or the schema has what it doesn't know; the message says which.
        """
        return self._constrain(f"start: %json {json.dumps(with_layout(schema))}")

    def call(self, tools: Sequence[Tool], after: str) -> Constraint:
        """The call of one of the tools; `after` is what the reply begins with already: Action:, or all up to the input."""
        rules = [f"args_{i}: %json {json.dumps(with_layout(object_schema(tool)))}" for i, tool in enumerate(tools)]
        if after.endswith(INPUT):
            rules.append('start: " " args_0')
        else:
            assert after.endswith(ACTION), after
            ways = (f"{json.dumps(f' {tool.name}' + chr(10) + f'{INPUT} ')} args_{i}" for i, tool in enumerate(tools))
            rules.append("start: " + " | ".join(ways))
        return self._constrain("\n".join(rules))

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
        if self._vocabulary is None:
            from llguidance.tiktoken import lltokenizer_from_encoding

            self._vocabulary = lltokenizer_from_encoding(
                self.tokenizer.tokenizer, n_vocab=self.vocab_size, eos_token=self.tokenizer.im_end_id
            )
        return self._vocabulary


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
    }
