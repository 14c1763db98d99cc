"""C-Eval of chat models: the question as a message, the letter read from the reply.

    python eval/evaluate_chat_ceval.py -c Qwen/Qwen-7B-Chat -d data/ceval

The directory holds val/ and test/ of ceval-exam.zip (https://huggingface.co/datasets/ceval/ceval-exam). The test set's
answers are secret: `--split test` writes submission.json for https://cevalbenchmark.com instead of a score.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.multiple_choice import Ceval, ChatChoice
from eval.runner import make_parser, run
from utils import run_script


class EvaluateChatCeval(ChatChoice, Ceval):
    name = "chat_ceval"
    title = "C-Eval, chat, 0-shot"
    after_question = "\n\n"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser(EvaluateChatCeval, __doc__).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    run(EvaluateChatCeval, parse_args(argv))


if __name__ == "__main__":
    run_script(main)
