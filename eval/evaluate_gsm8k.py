"""GSM8K of base models: eight worked examples, then the problem; the answer is the last number of the solution.

    python eval/evaluate_gsm8k.py -c Qwen/Qwen-7B -d data/gsm8k

The directory holds test.jsonl of https://github.com/openai/grade-school-math.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.math_answers import last_number, published_last_number
from eval.runner import make_parser, run
from eval.task import Record, Sample, Verdict
from eval.word_problems import CUE, Gsm8k, solved_problems
from utils import run_script


class EvaluateGsm8k(Gsm8k):
    name = "gsm8k"
    title = "GSM8K, 8-shot"
    stop_words = ("\n\n", "Question:")

    def question(self, sample: Sample) -> str:
        return "\n".join([*solved_problems("base"), f"Question: {sample.row['question']}{CUE}\n"])

    def judge(self, sample: Sample, record: Record) -> Verdict:
        if not self.as_published:
            return super().judge(sample, record)
        answer, gold = published_last_number(record["text"]), float(last_number(sample.row["answer"]))
        return Verdict(float(answer == gold), answer, gold)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser(EvaluateGsm8k, __doc__).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    run(EvaluateGsm8k, parse_args(argv))


if __name__ == "__main__":
    run_script(main)
