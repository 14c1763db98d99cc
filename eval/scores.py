"""Averages in percent with their standard errors."""

import math
from collections.abc import Iterable, Mapping, Sequence

from eval.task import Sample, Score, Verdict


def mean(name: str, values: Sequence[float], scale: float = 100.0) -> Score:
    """The average of values and its standard error; of zeros and ones that is the binomial one."""
    n = len(values)
    average = sum(values) / n
    variance = sum((value - average) ** 2 for value in values) / n
    return Score(name, scale * average, scale * math.sqrt(variance / n), n)


def macro(name: str, parts: Sequence[Score]) -> Score:
    """The average of averages: every part counts the same, whatever its size."""
    stderr = math.sqrt(sum((part.stderr or 0.0) ** 2 for part in parts)) / len(parts)
    return Score(name, sum(part.value for part in parts) / len(parts), stderr, sum(part.count for part in parts))


def by_group(samples: Sequence[Sample], verdicts: Sequence[Verdict]) -> dict[str, list[float]]:
    """The values of each group, in the order in which groups first appear."""
    values: dict[str, list[float]] = {}
    for sample, verdict in zip(samples, verdicts, strict=True):
        values.setdefault(sample.group, []).append(verdict.value)
    return values


def by_category(
    values: Mapping[str, list[float]], categories: Mapping[str, Iterable[str]], average: str
) -> list[Score]:
    """The total, the categories, and the subjects; `average` is "micro" (over questions) or "macro" (over subjects)."""
    subjects = {name: mean(name, part) for name, part in values.items()}

    def over(name: str, members: Iterable[str]) -> Score:
        members = [member for member in members if member in values]
        if average == "macro":
            return macro(name, [subjects[member] for member in members])
        return mean(name, [value for member in members for value in values[member]])

    other = "macro" if average == "micro" else "micro"
    result = [over(f"average ({average})", values)]
    parts = {name: set(members) & set(values) for name, members in categories.items()}
    result += [over(name, [subject for subject in values if subject in parts[name]]) for name in parts if parts[name]]
    everything = [value for part in values.values() for value in part]
    result.append(
        macro(f"average ({other})", list(subjects.values()))
        if other == "macro"
        else mean(f"average ({other})", everything)
    )
    return result + list(subjects.values())
