"""Read the letter of a multiple-choice answer out of a chat model's reply.

`standard_letter` finds no letter in a reply that names none; that counts as wrong. `published_letter` does what the
published scripts did: it writes letters in place of the choices' texts, tries a table of patterns, and at last takes
the choice whose text looks most like the reply, so it always answers.
"""

import re
from collections.abc import Mapping

LETTERS = "ABCD"

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
