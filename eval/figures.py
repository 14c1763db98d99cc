"""Figures by row and length that outlive a run: a JSON file after each one, a Markdown table, a plot."""

import json
from pathlib import Path
from typing import Any

from qwen import QwenError


class Figures(dict[str, dict[str, float]]):
    """Figures by row and length, written to a file after each one where there is a file."""

    def __init__(self, path: Path | None, conditions: dict[str, Any]) -> None:
        super().__init__()
        self.path, self.conditions = path, conditions
        if path is None or not path.exists():
            return
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            same = saved["conditions"] == conditions
            self.update(saved["figures"])
        except (ValueError, KeyError, TypeError) as error:
            raise QwenError(f"{path} holds no figures of this tool: name another file with --output") from error
        if not same:
            raise QwenError(f"{path} holds figures of other settings: name another file with --output, or remove it")

    def put(self, row: str, length: int, value: float) -> None:
        self.setdefault(row, {})[str(length)] = value
        if self.path:
            text = json.dumps({"conditions": self.conditions, "figures": self}, indent=2)
            self.path.write_text(text + "\n", encoding="utf-8")

    def table(self, title: str, lengths: list[int]) -> str:
        """Markdown, rows as measured; a dash for what is not measured yet."""
        lines = [f"| {title} | " + " | ".join(map(str, lengths)) + " |", "|---" * (len(lengths) + 1) + "|"]
        for row, values in self.items():
            cells = [f"{values[str(n)]:#.4g}" if str(n) in values else "–" for n in lengths]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


MARKS = (("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"))  # lines that differ without colour too


def import_pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise QwenError("--plot needs the package matplotlib: pip install matplotlib, or leave --plot out") from None
    matplotlib.use("Agg")  # files only: needs no display
    from matplotlib import pyplot

    return pyplot


def finish_plot(figure: Any, axes: list[Any], figures: Figures, path: Path) -> None:
    lengths = sorted({int(n) for values in figures.values() for n in values})
    for side in axes:
        side.set_xticks(lengths, [str(n) for n in lengths])
        side.xaxis.minorticks_off()
        side.yaxis.set_major_formatter("{x:g}")
        side.yaxis.set_minor_formatter("{x:g}")  # a logarithmic axis of less than a decade has no other labels
        side.grid(alpha=0.3)
        side.legend()
    figure.suptitle(str(figures.conditions["checkpoint"]))
    figure.savefig(path, dpi=120, metadata={"Software": None})
