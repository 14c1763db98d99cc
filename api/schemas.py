"""JSON schemas as clients send them: what a grammar can hold of one, what it leaves out, what makes it unusable."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from jsonschema import FormatChecker
from jsonschema.validators import validator_for

from qwen import QwenError

# On one line: a small model may write line breaks for ever. Words that the grammar lacks are left out and named.
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True,
          "coerce_one_of": True}  # fmt: skip
MOST_TRIALS = 100  # subschemas that are tried alone to find the one at fault
MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
SINGLE = ("items", "additionalProperties", "additionalItems", "contains", "propertyNames", "not", "if", "then", "else")

Schema = dict[str, Any] | bool


def json_rule(schema: Schema) -> str:
    """The schema as a rule of llguidance's grammars."""
    layout = {**schema, "x-guidance": LAYOUT} if isinstance(schema, dict) else schema
    return f"%json {json.dumps(layout)}"


def left_out(warnings: list[str]) -> list[str]:
    """The words that a grammar does not hold, of what llguidance says of it."""
    words: list[str] = []
    for warning in warnings:
        if found := re.search(r"Unimplemented keys: (\[.*?\])", warning):
            words += json.loads(found[1])
        elif found := re.search(r"Unknown format: (.*)", warning):
            words.append(f"format:{found[1].strip()}")
        else:
            words.append(re.split(r"[ ,:]", warning, maxsplit=1)[0])
    return sorted(set(words))


def checker(schema: Schema, words: list[str]) -> Callable[[str], str | None]:
    """Says of a reply what it breaks of a schema whose `words` no grammar held; None is nothing."""
    kind = validator_for(schema)
    validator = kind(schema, format_checker=FormatChecker())

    def check(reply: str) -> str | None:
        error = next(iter(validator.iter_errors(json.loads(reply))), None)
        if error is None:
            return None
        place = "".join(f"/{part}" for part in error.absolute_path)
        left = f"not held by the grammar: {', '.join(words)}"
        return f"the reply breaks {error.validator} at {place or 'its root'} ({left}): {error.message[:200]}"

    return check


def check_ends(schema: Schema) -> None:
    """QwenError for a schema that only an endless value fits: one that requires itself."""
    if isinstance(schema, dict) and (loop := endless(schema, schema, "", ())):
        raise QwenError(f"the schema can't be used: {loop} requires itself, so that no value ends")


def endless(schema: Any, root: dict[str, Any], pointer: str, within: tuple[str, ...]) -> str | None:
    """The pointer of a reference that every value of `schema` runs through for ever; None where a value can end."""
    if not isinstance(schema, dict) or "const" in schema or "enum" in schema:
        return None
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        if reference in within:
            return f"{pointer}/$ref"
        target = resolve(root, reference)
        if found := endless(target, root, reference[1:], (*within, reference)):
            return found
    parts = [(schema["allOf"], "allOf")] if isinstance(schema.get("allOf"), list) else []
    for subschemas, word in parts:
        for number, part in enumerate(subschemas):
            if found := endless(part, root, f"{pointer}/{word}/{number}", within):
                return found
    for word in ("anyOf", "oneOf"):
        options = schema.get(word)
        if isinstance(options, list) and options:
            found = [endless(part, root, f"{pointer}/{word}/{i}", within) for i, part in enumerate(options)]
            if all(found):
                return found[0]
    if schema.get("type") == "object" and isinstance(schema.get("required"), list):
        properties = schema.get("properties")
        for name in schema["required"]:
            part = properties.get(name) if isinstance(properties, dict) and isinstance(name, str) else None
            if found := endless(part, root, f"{pointer}/properties/{escape(name)}", within):
                return found
    if schema.get("type") == "array" and isinstance(schema.get("minItems"), (int, float)) and schema["minItems"] > 0:
        return endless(schema.get("items"), root, f"{pointer}/items", within)
    return None


def escape(name: Any) -> str:
    """A name as a part of a JSON pointer (RFC 6901)."""
    return str(name).replace("~", "~0").replace("/", "~1")


def resolve(root: Any, reference: str) -> Any:
    """What a reference within the schema points to; None where there is nothing."""
    found = root
    for part in reference.lstrip("#").split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and part in found:
            found = found[part]
        elif isinstance(found, list) and part.isdigit() and int(part) < len(found):
            found = found[int(part)]
        else:
            return None
    return found


def subschemas(schema: Any, pointer: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """All schemas in a schema with their JSON pointers, the innermost first."""
    if not isinstance(schema, dict):
        return
    for word, value in schema.items():
        if word in MAPS and isinstance(value, dict):
            parts = [(f"{pointer}/{word}/{escape(name)}", part) for name, part in value.items()]
        elif word in LISTS and isinstance(value, list):
            parts = [(f"{pointer}/{word}/{number}", part) for number, part in enumerate(value)]
        else:
            parts = [(f"{pointer}/{word}", value)] if word in SINGLE else []
        for place, part in parts:
            yield from subschemas(part, place)
    yield pointer, schema


def largest(schema: Schema) -> tuple[str, int]:
    """The JSON pointer of the word with the most entries, and how many it has."""
    sizes = [
        (f"{pointer}/{escape(word)}", len(value))
        for pointer, part in subschemas(schema)
        for word, value in part.items()
        if isinstance(value, (dict, list))
    ]
    return max(sizes, key=lambda found: found[1], default=("/", 0))


def find_fault(schema: Schema, fails: Callable[[Schema], bool]) -> tuple[str, Any]:
    """The JSON pointer of the innermost word that makes a schema unusable, and its value."""
    shared = {word: schema[word] for word in ("$defs", "definitions") if isinstance(schema, dict) and word in schema}
    for trial, (pointer, part) in enumerate(subschemas(schema)):
        if (trial < MOST_TRIALS or not pointer) and fails(part if "$defs" in part else {**shared, **part}):
            for word in sorted(part, key="type".__eq__):  # without a type, others may fit
                if word not in shared and not fails({**shared, **{w: v for w, v in part.items() if w != word}}):
                    return f"{pointer}/{escape(word)}", part[word]
            return pointer, part
    return "", schema
