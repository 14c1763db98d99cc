"""Read letters: those that a file gives as right, and the one that a chat model's reply names.

`standard_letter` finds no letter in a reply that names none; that counts as wrong. `published_letter` does what the
published scripts did: it writes letters in place of the choices' texts, tries a table of patterns, and at last takes
the choice whose text looks most like the reply, so it always answers.
"""

import re
from collections.abc import Mapping, Sequence

from qwen import QwenError

LETTERS = "ABCD"

# ---- right answers ----

_GOLD = re.compile(r"[\s(（\[【\"']*([A-Da-d])[\s)）\]】\"'.．。:：、]*")


def read_golds(rows: Sequence[Mapping[str, str]], place: str) -> list[str]:
    """The right letter of each row of a file (keys A to D and answer), "" of all where none is given.

    Lower case, blanks and brackets are understood, and numbers where it is clear whether they count from 0 or 1.

    Raises:
        QwenError: a right answer is missing or can't be read as a letter; with `place` and the row.
    """
    golds = [row["answer"].strip() for row in rows]
    if all(gold in ("", "nan") for gold in golds):
        return [""] * len(golds)
    if all(gold.isdecimal() for gold in golds):
        first = _first_number(golds, rows, place)
        golds = [LETTERS[int(gold) - first] for gold in golds]
    for number, gold in enumerate(golds, start=1):
        if not _GOLD.fullmatch(gold):
            said = f"is {gold!r}, not one of the letters A to D" if gold not in ("", "nan") else "is missing"
            raise QwenError(f"{place}, row {number}: the right answer {said}")
    return [_GOLD.fullmatch(gold)[1].upper() for gold in golds]


def _first_number(golds: Sequence[str], rows: Sequence[Mapping[str, str]], place: str) -> int:
    """0 or 1: the number that stands for A."""
    numbers = [int(gold) for gold in golds]
    quoted = all(gold in (row[letter].strip() for letter in LETTERS) for gold, row in zip(golds, rows, strict=True))
    for first in (0, 1):
        if first in numbers and all(first <= number < first + len(LETTERS) for number in numbers):
            if not quoted and (first == 0 or first + len(LETTERS) - 1 in numbers):
                return first
    raise QwenError(f"{place}: the right answers are numbers ({', '.join(sorted(set(golds))[:5])}), and which stands "
                    "for A can't be told: write the letters A to D")  # fmt: skip


# ---- the standard protocol ----

_LETTER = r"(A(?!\s+[a-z]+\s+[a-z])|[BCD])(?![A-Za-z'’+#])"  # not the article of "A bird in the hand"
_OPEN = r"[\s(（\[【\"'“*_$]*(?:\\boxed\{|\\text\{)*"
_STATED = [
    re.compile(r"\b[Aa]nswer(?: to \w+(?: \w+){0,3})?(?: is| would be| should be|:|：)+(?: *\n)*"
               rf"(?: (?:[Oo]ption|[Cc]hoice|most likely|therefore|thus))?{_OPEN}{_LETTER}"),
    re.compile(rf"\b(?:[Cc]orrect|[Bb]est|[Rr]ight|[Ss]uitable) (?:answer|choice|option|one)(?: here)? is:?"
               rf"(?: (?:[Oo]ption|[Cc]hoice))?{_OPEN}{_LETTER}"),
    re.compile(rf"\b(?:choose|select|pick|go with)(?: (?:[Oo]ption|[Cc]hoice|[Aa]nswer))?{_OPEN}{_LETTER}"),
    re.compile(rf"\b(?:[Oo]ption|[Cc]hoice)? ?{_OPEN}([ABCD])[)\]\"'”*]* is (?:the )?(?:correct|right|best)"),
    re.compile(rf"(?:答案|正确选项|选项)(?:应该|应当|应)?(?:是|为|：|:)(?:选项)?{_OPEN}([ABCD])(?![A-Za-z])"),
    re.compile(rf"(?:应该?选择?|故选|选择|选)(?:：|:|择)?(?:选项|答案)?{_OPEN}([ABCD])(?![A-Za-z])"),
    re.compile(r"([ABCD])(?:选?项)?(?:是)?(?:正确的?|对的|符合题意)(?!吗)"),
]  # fmt: skip
_NEGATED = re.compile(r"(?:n't|n’t|\bnot|\bnever|不|非|incorrect|wrong)[^.。!！\n]{0,12}$", re.IGNORECASE)
_AT_START = re.compile(rf"^{_OPEN}([ABCD])(?:[.)）\]】:：,，、。*\"'”}}]|\s*$|\s*\n)")
_ALONE = re.compile(rf"(?<![A-Za-z0-9'’]){_LETTER}")


def standard_letter(reply: str, choices: Mapping[str, str]) -> str | None:
    """The letter that the reply states, else the one it begins with, else that of the only choice it quotes, else the
    only letter in it; None if it names none, or several without saying which."""
    reply = reply.strip()
    for pattern in _STATED:
        for match in pattern.finditer(reply):
            if not _NEGATED.search(reply[: match.start()]):
                return match.group(1)
    if match := _AT_START.match(reply):
        return match.group(1)
    if quoted := _only_quoted(reply, choices):
        return quoted
    alone = {match.group(1) for match in _ALONE.finditer(reply)}
    return alone.pop() if len(alone) == 1 else None


def _only_quoted(reply: str, choices: Mapping[str, str]) -> str | None:
    """The one choice whose text is in the reply; a text within a longer quoted one does not count."""
    reply = reply.casefold()
    texts = {letter: text.strip(" .。").casefold() for letter, text in choices.items()}
    found = {}
    for letter, text in sorted(texts.items(), key=lambda item: -len(item[1])):
        whole = re.compile(rf"(?<!\w){re.escape(text)}(?!\w)" if text.isascii() else re.escape(text))
        if text and whole.search(reply):
            found[letter] = text
            reply = whole.sub("\0", reply)
    return next(iter(found)) if len(found) == 1 else None


# ---- as published ----


def _gap(most: int) -> str:
    return f"[^ABCD]{{0,{most}}}?"


_ENGLISH = [
    rf"(?:[Cc]hoose|(?:[Aa]nswer|[Cc]hoice)(?!{_gap(20)}(?:n't|not)){_gap(10)}\b(?:|is|:|be)\b){_gap(20)}\b([ABCD])\b",
    rf"\b([ABCD])\b(?!{_gap(8)}(?:n't|not){_gap(5)}(?:correct|right)){_gap(10)}\b(?:correct|right)\b",
    r"^([ABCD])(?:[.,:]|$)",
    r"(?<![a-zA-Z])([ABCD])(?![a-zA-Z=])",
]
_IS = "(?:[是选为：:】])"
_CHINESE = [
    rf"(?:(?:选择?|选定)[：:]?\s*|(?:答案|选项)(?!{_gap(10)}[不非]{_gap(10)}{_IS}){_gap(10)}{_IS}{_gap(10)})"
    r"([ABCD])(?:选项)?(?:[)。.，,．、ABCD：:）]|$)",
    rf"([ABCD])选?项?(?!{_gap(4)}[不非]{_gap(4)}(?:正确|对[的，。：]|符合)){_gap(4)}(?:正确|对[的，。：]|符合)",
    r"^[(（]?([ABCD])(?:[。)）.，,．：:]|$)",
    r"(?<![a-zA-Z])([ABCD])(?![a-zA-Z=])",
]


def published_letter(reply: str, choices: Mapping[str, str], question: str = "", chinese: bool = False) -> str:
    """The letter that the published scripts read; they always read one."""
    from rapidfuzz import fuzz, process, utils

    stop = "。" if chinese else "."
    if chinese:
        reply = _without_question(reply, question)
    for letter, text in sorted(choices.items(), key=lambda item: len(item[1]), reverse=True):
        text = text.rstrip(stop)
        if chinese:
            reply = reply.replace(text, letter)
        else:
            reply = re.sub(re.escape(text), letter, reply, flags=re.IGNORECASE)
    for pattern in _CHINESE if chinese else _ENGLISH:
        if match := re.search(pattern, reply):
            return match.group(1)
    best = process.extractOne(reply, list(choices.values()), scorer=fuzz.WRatio, processor=utils.default_process)
    return list(choices)[best[2]]


def _without_question(reply: str, question: str) -> str:
    """A sentence with a blank, repeated and filled in: what stands before the blank becomes "the answer is"."""
    parts = question.rstrip("。").split("。")[-1].split("_")
    if len(parts[0].strip()) > 4:
        reply = reply.replace(parts[0], "答案是")
    if len(parts[-1].strip()) > 4:
        reply = reply.replace(parts[-1], "")
    return reply
