"""HumanEval of chat models: the problem as a message, the function read from the reply.

    python eval/evaluate_chat_humaneval.py -c Qwen/Qwen-7B-Chat -d data --allow-code-execution

The directory holds HumanEval.jsonl or HumanEval.jsonl.gz of https://github.com/openai/human-eval.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.coding import HumanEval, chat_program, published_body
from eval.runner import make_parser, run
from eval.task import Sample
from utils import run_script


class EvaluateChatHumanEval(HumanEval):
    name = "chat_humaneval"
    title = "HumanEval, chat, 0-shot"
    checkpoint = "Qwen/Qwen-7B-Chat"
    chat = True

    def question(self, sample: Sample) -> str:
        return "Help me fill the following code.\n" + sample.row["prompt"]

    def program(self, sample: Sample, text: str) -> str:
        prompt, entry_point = sample.row["prompt"], sample.row["entry_point"]
        if self.as_published:
            return prompt + published_body(text.strip(), entry_point)
        return chat_program(prompt, entry_point, text)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser(EvaluateChatHumanEval, __doc__).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    run(EvaluateChatHumanEval, parse_args(argv))


if __name__ == "__main__":
    run_script(main)
