"""Results for people: tables with standard errors and the published values, and the versions behind a number."""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from eval.sources import load_data
from eval.task import Score, Verdict

PACKAGES = ("torch", "transformers", "tiktoken", "datasets", "sacrebleu", "rouge-score")


def published(benchmark: str) -> dict[str, dict[str, float]]:
    """Published values by weights and name of the score; {} where there are none."""
    return load_data("published.json").get(benchmark, {})


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def table(title: str, scores: Sequence[Score], known: dict[str, dict[str, float]]) -> str:
    """Markdown: a line for each score, the published values of all weights beside it."""
    known = {weights: values for weights, values in known.items() if any(s.name in values for s in scores)}
    head = [title, "score", "± stderr", "n", *(f"published, {weights}" for weights in known)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for score in scores:
        digits = 3 if abs(score.value) < 1 else 2
        cells = [score.name, number(score.value, digits), number(score.stderr, digits), f"{score.count:,}"]
        cells += [str(values.get(score.name, "–")) for values in known.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def counts(verdicts: Sequence[Verdict], records: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What a score hides: replies from which no answer could be read, and replies cut at the longest length."""
    return {
        "samples": len(records),
        "no_answer_found": sum(verdict.answer is None for verdict in verdicts),
        "cut_at_max_new_tokens": sum(record.get("finish_reason") == "length" for record in records),
    }
