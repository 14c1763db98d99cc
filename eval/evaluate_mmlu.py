"""MMLU of base models: five solved questions of the subject, then the likeliest letter.

    python eval/evaluate_mmlu.py -c Qwen/Qwen-7B -d data/mmlu/data

The directory holds dev/ and test/ of https://people.eecs.berkeley.edu/~hendrycks/data.tar.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.multiple_choice import FewShot, Mmlu
from eval.runner import make_parser, run
from utils import run_script


class EvaluateMmlu(FewShot, Mmlu):
    name = "mmlu"
    title = "MMLU, 5-shot"
    crop = 2047

    def introduction(self, subject: str) -> str:
        return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser(EvaluateMmlu, __doc__).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    run(EvaluateMmlu, parse_args(argv))


if __name__ == "__main__":
    run_script(main)
