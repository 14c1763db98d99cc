"""Draw a table of scores, a CSV file of models by benchmarks, as groups of bars.

python benchmarks/plot_performance.py assets/published_scores.csv assets/performance.png

The last row is the model that stands out. A blank cell has no bar. Needs the package matplotlib.
"""

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwen import QwenError  # noqa: E402
from utils import run_script  # noqa: E402

Scores = dict[str, list[float | None]]  # by model, in the order of the benchmarks


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="CSV file: a head `model,BENCHMARK,...`, then a row for each model")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    parser.add_argument("--title", default="Published scores, base models", help="(default: %(default)s)")
    return parser.parse_args(argv)


def read_scores(path: Path) -> tuple[list[str], Scores]:
    """The benchmarks' names and the rows of a table; QwenError names the line that is wrong."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            (_, *benchmarks), *rows = list(csv.reader(file))
    except OSError as error:
        raise QwenError(f"{path} can't be read: {error.strerror}") from None
    except ValueError:
        raise QwenError(f"{path} is empty: the first line names the benchmarks") from None
    scores: Scores = {}
    for number, (model, *cells) in enumerate(rows, start=2):
        try:
            scores[model] = [float(cell) if cell else None for cell in cells]
        except ValueError as error:
            raise QwenError(f"{path}, line {number}: {error}") from None
        if len(cells) != len(benchmarks):
            raise QwenError(f"{path}, line {number} has {len(cells)} scores for {len(benchmarks)} benchmarks")
    if not scores:
        raise QwenError(f"{path} has no rows of scores")
    return benchmarks, scores


def plot(benchmarks: list[str], scores: Scores, path: Path, title: str) -> None:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise QwenError("the picture needs the package matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / len(scores)
    greys = matplotlib.colormaps["Greys"]
    for place, (model, values) in enumerate(scores.items()):
        last = place == len(scores) - 1
        color = "#6c4be0" if last else greys(0.25 + 0.5 * place / len(scores))
        drawn = [(column, value) for column, value in enumerate(values) if value is not None]
        lefts = [column + (place - (len(scores) - 1) / 2) * width for column, _ in drawn]
        bars = axes.bar(lefts, [value for _, value in drawn], width, label=model, color=color)
        if last:
            axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks(range(len(benchmarks)), benchmarks)
    axes.set(ylabel="score", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=len(scores), fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    benchmarks, scores = read_scores(args.table)
    plot(benchmarks, scores, args.picture, args.title)


if __name__ == "__main__":
    run_script(main)
