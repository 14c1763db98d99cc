"""Replies that have to fit a JSON schema, a pattern or a grammar: llguidance says which tokens may come next."""

import codecs
import json
import re
import threading
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen import QwenError, QWenTokenizer
from qwen.react import ACTION, ANSWER, INPUT, OBSERVATION, THOUGHT, ReactParser
from qwen.tools import Tool

from .schemas import Schema, check_ends, find_fault, json_rule, largest, left_out

MOST_ITEMS = 8000  # alternatives at one place of a grammar; more would hold up all who are served
TRIAL_STEPS = 6  # tokens that are tried before a reply begins: grammars that are too large fail there
LONGEST_THOUGHT = 240  # characters, where an answer has to fit a schema: a small model might never come to it
MOST_CALLS = 8  # in one reply whose answer has to fit a schema


class Constraint:
    """Where one reply is in its grammar. `left_out` names what the grammar does not hold of its schema."""

    def __init__(self, matcher: Any, left_out: Sequence[str] = ()) -> None:
        self.matcher, self.left_out = matcher, left_out

    def copy(self) -> "Constraint":
        """The same, for another reply."""
        return Constraint(self.matcher.deep_copy(), self.left_out)

    def allowed(self, device: torch.device, vocab_size: int) -> Tensor | None:
        """Which tokens (V,) may come next; None is all."""
        flags = self._flags()[:vocab_size]
        mask = torch.zeros(vocab_size, dtype=torch.bool)
        mask[: len(flags)] = torch.from_numpy(flags)
        return mask.to(device)

    def _flags(self) -> np.ndarray:
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, bitorder="little").astype(bool)

    def push(self, token: int) -> None:
        if not self.matcher.is_stopped() and not self.matcher.consume_token(token):
            raise RuntimeError(f"the grammar does not take token {token}: {plain_reason(self.matcher.get_error())}")

    def attempt(self) -> str | None:
        """Why no reply gets beyond its first tokens; None if one does."""
        trial = self.copy()
        for _ in range(TRIAL_STEPS):
            if trial.matcher.is_stopped() and trial.matcher.is_accepting():
                return None
            ids = np.flatnonzero(trial._flags())
            if trial.matcher.is_error() or not len(ids):
                return plain_reason(trial.matcher.get_error()) or "nothing fits it"
            if not trial.matcher.consume_token(int(ids[0])):
                return plain_reason(trial.matcher.get_error())
        return None


class StrictArguments(Constraint):
    """Lets a reply go as it likes, until it calls a tool whose arguments are to fit their schema."""

    def __init__(self, tokenizer: QWenTokenizer, tools: Sequence[Tool], begins: str, arguments: dict[str, Constraint]):
        self.tokenizer, self.tools, self.begins, self.arguments = tokenizer, tools, begins, arguments
        self.left_out = sorted({word for constraint in arguments.values() for word in constraint.left_out})
        self.parser = ReactParser(tools)
        self.parser.push(begins)
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.active: Constraint | None = None

    def copy(self) -> "StrictArguments":
        arguments = {name: constraint.copy() for name, constraint in self.arguments.items()}
        return StrictArguments(self.tokenizer, self.tools, self.begins, arguments)

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
    """Makes constraints for one tokenizer.

    All methods raise QwenError where the package is not installed, or where what they are given can't be used: the
    message has the JSON pointer of the word at fault and the whole reason.
    """

    def __init__(self, tokenizer: QWenTokenizer, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._vocabulary: Any = None  # made at the first use: it takes a second
        self._lock = threading.Lock()

    def reply(self, kind: str, value: Any) -> Constraint:
        """A reply in one of the kinds: json (a schema), regex, choice (texts), grammar (Lark's form, or GBNF)."""
        if kind == "grammar":
            return self._constrain(to_lark(value), {})
        return self._constrain(f"start: answer\nanswer: {answer_rule(kind, value)}", schemas_of(kind, value))

    def call(self, tools: Sequence[Tool], after: str) -> Constraint:
        """A call of one of the tools; `after` is how the reply begins already: with Action:, or all up to the input."""
        rules, schemas = self._arguments(tools)
        if after.endswith(INPUT):
            rules.append('start: " " args_0')
        else:
            assert after.endswith(ACTION), after
            rules.append("start: " + " | ".join(f"{quote(begin)} args_{i}" for i, begin in enumerate(heads(tools))))
        return self._constrain("\n".join(rules), schemas)

    def call_or_answer(self, tools: Sequence[Tool], begins: str, kind: str, value: Any, several: bool) -> Constraint:
        """A reply in ReAct's form: calls of tools, or a final answer of one of the kinds that `reply` knows.

        `begins` is how the reply begins already: in the middle of a thought, or not at all.
        """
        if kind == "grammar":
            raise QwenError("a grammar of one's own does not go with tools: use a JSON schema, a regex or a choice")
        rules, schemas = self._arguments(tools)
        calls = [f"{quote(ACTION + head)} args_{i}" for i, head in enumerate(heads(tools))]
        thought = f"/[^\\n]{{0,{LONGEST_THOUGHT}}}/ {quote(chr(10))}"
        more = f'("\\n" ({quote(THOUGHT)} {thought})? call){{0,{MOST_CALLS - 1}}}' if several else ""
        rules += [
            f"start: {thought if begins else f'({quote(THOUGHT)} {thought})?'} (calls | {quote(ANSWER + ' ')} answer)",
            f"calls: call {more} ({quote(chr(10) + OBSERVATION)})?",
            f"call: {' | '.join(calls)}",
            f"answer: {answer_rule(kind, value)}",
        ]
        return self._constrain("\n".join(rules), {**schemas, **schemas_of(kind, value)})

    def strict(self, tools: Sequence[Tool], names: Collection[str], begins: str) -> Constraint:
        """A reply that begins with `begins` and may call tools; the arguments of those named fit their schemas."""
        arguments = {}
        for tool in tools:
            if tool.name in names:
                schema = object_schema(tool)
                rule = f"start: /[ \\n]?/ args\nargs: {json_rule(schema)}"
                arguments[tool.name] = self._constrain(rule, {tool.name: schema})
        return StrictArguments(self.tokenizer, tools, begins, arguments)

    def _arguments(self, tools: Sequence[Tool]) -> tuple[list[str], dict[str, Schema]]:
        schemas = {tool.name: object_schema(tool) for tool in tools}
        return [f"args_{i}: {json_rule(schema)}" for i, schema in enumerate(schemas.values())], schemas

    def _constrain(self, lark: str, schemas: dict[str, Schema]) -> Constraint:
        """The grammar's constraint; `schemas` are those in it, by the tool that they are of (or "")."""
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError:
            raise QwenError("this needs the package llguidance on the server: pip install llguidance") from None
        for schema in schemas.values():
            check_ends(schema)
        limits = LLParserLimits(max_items_in_row=MOST_ITEMS, verbose_errors=False)
        grammar, vocabulary = LLMatcher.grammar_from_lark(lark), self._make_vocabulary()
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, vocabulary, limits=limits)
        if failed:
            raise self._fault(plain_reason(messages[0]), schemas, limits)
        constraint = Constraint(LLMatcher(vocabulary, grammar, log_level=0, limits=limits), left_out(messages))
        if reason := constraint.attempt():
            raise self._fault(reason, schemas, limits)
        return constraint

    def _fault(self, reason: str, schemas: dict[str, Schema], limits: Any) -> QwenError:
        """Which word of which schema is at fault, and why."""
        from llguidance import LLMatcher

        def fails(schema: Schema) -> bool:
            grammar = LLMatcher.grammar_from_lark(f"start: {json_rule(schema)}")
            matcher = LLMatcher(self._make_vocabulary(), grammar, log_level=0, limits=limits)
            return matcher.is_error() or Constraint(matcher).attempt() is not None

        if "max is" in reason and schemas:
            pointer, size = max((largest(schema) for schema in schemas.values()), key=lambda found: found[1])
            return QwenError(f"the schema can't be used: {pointer} has too many alternatives ({size:,}): {reason}")
        for name, schema in schemas.items():
            if fails(schema):
                pointer, value = find_fault(schema, fails)
                of = f" of {name}" if name else ""
                shown = json.dumps(value, ensure_ascii=False)
                return QwenError(f"the schema{of} can't be used: {pointer or '/'} {shown[:300]}: {reason}")
        return QwenError(f"the grammar can't be used: {reason}")

    def _make_vocabulary(self) -> Any:
        from llguidance.tiktoken import lltokenizer_from_encoding

        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = lltokenizer_from_encoding(
                    self.tokenizer.tokenizer, n_vocab=self.vocab_size, eos_token=self.tokenizer.im_end_id
                )
        return self._vocabulary


def quote(text: str) -> str:
    """A text as a terminal of a grammar; QwenError for half a character in it."""
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise QwenError(f"{ascii(text)[:60]} has half a character in it, which can't be written")
    return json.dumps(text, ensure_ascii=False)


def heads(tools: Sequence[Tool]) -> list[str]:
    """How a call of each tool goes on after `Action:`."""
    return [f" {tool.name}\n{INPUT} " for tool in tools]


def answer_rule(kind: str, value: Any) -> str:
    """A rule for replies of a kind; QwenError where the value has another shape."""
    if kind == "json":
        return json_rule(read_schema(value))
    if kind == "choice":
        return " | ".join(map(quote, value))
    pattern = value.removeprefix("^")
    if pattern.endswith("$") and not pattern.endswith("\\$"):
        pattern = pattern[:-1]
    quote(pattern)
    pattern = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", pattern).replace("\n", "\\n")
    return f"/{pattern}/"


def schemas_of(kind: str, value: Any) -> dict[str, Schema]:
    return {"": read_schema(value)} if kind == "json" else {}


def read_schema(value: Any) -> Schema:
    """A JSON schema, which vLLM's clients also send as text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise QwenError(f"the schema is not JSON: {error}") from None
    if not isinstance(value, (dict, bool)):
        raise QwenError("a JSON schema is an object")
    return value


def to_lark(grammar: str) -> str:
    """A grammar in Lark's form as it is; one in llama.cpp's GBNF translated."""
    quote(grammar)
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(grammar)
    except Exception as error:  # of many kinds, GbnfToLarkError among them
        raise QwenError(f"the grammar can't be used: {str(error)[:300]}") from None


def plain_reason(message: str) -> str:
    """The reason in what llguidance says, without the grammar around it."""
    message = re.sub(r"^at \d+\(\d+\): ", "", message).split("\n<state>")[0]
    message = message.replace("<non-verbose/>", "").split("; consider making")[0]
    message = re.split(r"\n +\d+ \| |\nat \d+\(\d+\)", message)[0].removeprefix("failed to compile JSON schema: ")
    lines = [line.strip(" ^") for line in message.splitlines()]
    return " ".join(line for line in lines if line).strip()[:500]


def object_schema(tool: Tool) -> dict[str, Any]:
    """The JSON schema of a tool's arguments, whichever form its parameters are in.

    Raises:
        QwenError: a parameter of the published form has no name.
    """
    if not isinstance(tool.parameters, list):
        return {"type": "object", **tool.parameters}
    for number, entry in enumerate(tool.parameters):
        if not isinstance(entry.get("name"), str) or not isinstance(entry.get("schema", {}), (dict, bool)):
            raise QwenError(f"parameter {number} of {tool.name} needs a name (text) and a schema (an object)")
    return {
        "type": "object",
        "properties": {entry["name"]: entry.get("schema", {}) for entry in tool.parameters},
        "required": [entry["name"] for entry in tool.parameters if entry.get("required")],
        "additionalProperties": False,
    }
