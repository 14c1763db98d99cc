"""Where in a text each token stands: the `offset_mapping` of transformers, for token classifiers and highlighting."""

import unicodedata
from collections.abc import Sequence

Span = tuple[int, int]  # first character, and the one after the last


def token_offsets(text: str, tokens: Sequence[bytes | str]) -> list[Span]:
    """Each token's characters in `text`, as it was before normalising; `tokens` are all of its tokens.

    A character cut into several tokens belongs to each of them, as in the package tokenizers.
    """
    spans = composed_spans(text)
    normal = unicodedata.normalize("NFC", text)
    place = [i for i, letter in enumerate(normal) for _ in letter.encode("utf-8", "surrogatepass")]  # of each byte
    offsets, start = [], 0
    for token in tokens:
        end = start + len(token if isinstance(token, bytes) else token.encode())
        offsets.append((spans[place[start]][0], spans[place[end - 1]][1]))
        start = end
    return offsets


def composed_spans(text: str) -> list[Span]:
    """For each character of the NFC form, the characters of `text` that it was made of."""
    if unicodedata.is_normalized("NFC", text):
        return [(i, i + 1) for i in range(len(text))]
    spans: list[Span] = []
    start = 0
    while start < len(text):
        end = start + 1
        while end < len(text) and joins(text[start:end], text[end]):
            end += 1
        spans += [(start, end)] * len(unicodedata.normalize("NFC", text[start:end]))
        start = end
    return spans


def joins(before: str, letter: str) -> bool:
    """Whether NFC may make one of `letter` and what stands before it."""
    apart = unicodedata.normalize("NFC", before) + unicodedata.normalize("NFC", letter)
    return bool(unicodedata.combining(letter)) or unicodedata.normalize("NFC", before + letter) != apart


def fit_row(values: Sequence, attended: Sequence[int], fill: object, cut_left: bool) -> list:
    """Values of all tokens, cut and padded as their row was: `fill` where `attended` is 0."""
    kept = sum(attended)
    remaining = iter(values[len(values) - kept :] if cut_left else values[:kept])
    return [next(remaining) if real else fill for real in attended]
