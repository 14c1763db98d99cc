"""Read the number that the solution of a word problem ends with."""

import math
import re
from decimal import Decimal

# A minus is a sign only where no word, number or bracket stands before it: 3-2 has no -2. Commas separate groups of
# three digits only: "10,20" is two numbers.
NUMBER = re.compile(r"(?:(?<![\w)])-)?[$£€]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])-?[$£€]?\.\d+")
STATED = re.compile(r"(?:####|\\boxed\{|[Tt]he (?:final )?answer is:?|[Aa]nswer:)[\s*]*")


def last_number(text: str) -> Decimal | None:
    """The number right behind the last "The answer is", `####` or `\\boxed{`, else the last number of all."""
    stated = list(STATED.finditer(text))
    match = NUMBER.match(text, stated[-1].end()) if stated else None
    found = [match.group()] if match else NUMBER.findall(text)
    return Decimal(re.sub(r"[$£€,]", "", found[-1])) if found else None


def same_number(a: Decimal | float | None, b: Decimal | float | None) -> bool:
    return a is not None and b is not None and math.isclose(a, b, rel_tol=0, abs_tol=1e-4)


# ---- as published ----


def published_last_number(text: str) -> int | None:
    """What the published script for base models read: the last run of digits, so 1,000 is 0 and 3.5 is 5."""
    digits = re.findall(r"\d+", text)
    if not digits or re.fullmatch(r"0+[1-9]\d*", digits[-1]):  # 007 was a syntax error to it
        return None
    return int(digits[-1])


def published_chat_number(text: str) -> float | None:
    """What the published script for chat models read: the last match of its pattern, if that is a number."""
    pattern = r"[+-]?(?=\d|\.\d)(?:0|[1-9]\d{0,2}(?:,\d{3})*|\d*)?(?:\.\d*)?(?=\D|$)"
    found = [match.group().replace(",", "").replace("+", "") for match in re.finditer(pattern, text)]
    if not found or re.fullmatch(r"-?0+[1-9]\d*", found[-1]):
        return None
    return float(found[-1])
