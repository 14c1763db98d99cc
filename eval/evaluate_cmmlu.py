"""CMMLU of base models: five solved questions of the subject, then the likeliest letter.

    python eval/evaluate_cmmlu.py -c Qwen/Qwen-7B -d data/cmmlu

The directory holds dev/ and test/ of cmmlu_v1_0_1.zip (https://huggingface.co/datasets/haonan-li/cmmlu).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.multiple_choice import ChineseFewShot, Cmmlu
from eval.runner import make_parser, run
from utils import run_script


class EvaluateCmmlu(ChineseFewShot, Cmmlu):
    name = "cmmlu"
    title = "CMMLU, 5-shot"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser(EvaluateCmmlu, __doc__).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    run(EvaluateCmmlu, parse_args(argv))


if __name__ == "__main__":
    run_script(main)
