"""MMLU of chat models: the question as a message, the letter read from the reply.

    python eval/evaluate_chat_mmlu.py -c Qwen/Qwen-7B-Chat -d data/mmlu/data

The directory holds test/ of https://people.eecs.berkeley.edu/~hendrycks/data.tar.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.multiple_choice import ChatChoice, Mmlu
from eval.runner import make_parser, run
from utils import run_script


class EvaluateChatMmlu(ChatChoice, Mmlu):
    name = "chat_mmlu"
    title = "MMLU, chat, 0-shot"
    instruction = (
        "The following is a multiple-choice question. Please choose the most suitable one among A, B, C and D as the "
        "answer to this question.\n\n"
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser(EvaluateChatMmlu, __doc__).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    run(EvaluateChatMmlu, parse_args(argv))


if __name__ == "__main__":
    run_script(main)
