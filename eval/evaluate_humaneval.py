"""HumanEval of base models: the problem as it is; the completion ends where the function does.

    python eval/evaluate_humaneval.py -c Qwen/Qwen-7B -d data --allow-code-execution

The directory holds HumanEval.jsonl or HumanEval.jsonl.gz of https://github.com/openai/human-eval.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.coding import STOPS, HumanEval, published_cut
from eval.runner import make_parser, run
from eval.task import Sample
from utils import run_script


class EvaluateHumanEval(HumanEval):
    name = "humaneval"
    title = "HumanEval, 0-shot"

    @property
    def stop_words(self) -> tuple[str, ...]:
        return ("\n\n", "def ") if self.as_published else STOPS

    def question(self, sample: Sample) -> str:
        return sample.row["prompt"]

    def program(self, sample: Sample, text: str) -> str:
        return sample.row["prompt"] + (published_cut(text) if self.as_published else text)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser(EvaluateHumanEval, __doc__).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    run(EvaluateHumanEval, parse_args(argv))


if __name__ == "__main__":
    run_script(main)
