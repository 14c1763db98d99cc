"""C-Eval of base models: five solved questions of the subject, then the likeliest letter.

    python eval/evaluate_ceval.py -c Qwen/Qwen-7B -d data/ceval

The directory holds dev/, val/ and test/ of ceval-exam.zip (https://huggingface.co/datasets/ceval/ceval-exam). The test
set's answers are secret: `--split test` writes submission.json for https://cevalbenchmark.com instead of a score.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.multiple_choice import Ceval, ChineseFewShot
from eval.runner import make_parser, run
from utils import run_script


class EvaluateCeval(ChineseFewShot, Ceval):
    name = "ceval"
    title = "C-Eval, 5-shot"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser(EvaluateCeval, __doc__).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    run(EvaluateCeval, parse_args(argv))


if __name__ == "__main__":
    run_script(main)
