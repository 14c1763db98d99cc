"""GSM8K of chat models: the bare problem as a message, or with --use-fewshot four worked examples before it.

    python eval/evaluate_chat_gsm8k.py -c Qwen/Qwen-7B-Chat -d data/gsm8k

The directory holds test.jsonl of https://github.com/openai/grade-school-math.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.math_answers import last_number, published_chat_number, same_number
from eval.runner import make_parser, run
from eval.task import Record, Sample, Verdict
from eval.word_problems import CUE, Gsm8k, solved_problems
from utils import run_script


class EvaluateChatGsm8k(Gsm8k):
    name = "chat_gsm8k"
    title = "GSM8K, chat"
    checkpoint = "Qwen/Qwen-7B-Chat"
    chat = True

    @classmethod
    def add_arguments(cls, parser: argparse._ActionsContainer) -> None:
        parser.add_argument("--use-fewshot", action="store_true", help="four worked examples in the message")

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "use_fewshot": self.args.use_fewshot}

    def question(self, sample: Sample) -> str:
        if not self.args.use_fewshot:
            return sample.row["question"]
        return "\n".join([*solved_problems("chat"), f"Question: {sample.row['question']}{CUE}"])

    def judge(self, sample: Sample, record: Record) -> Verdict:
        if not self.as_published:
            return super().judge(sample, record)
        answer, gold = published_chat_number(record["text"]), float(last_number(sample.row["answer"]))
        return Verdict(float(same_number(answer, gold)), answer, gold)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser(EvaluateChatGsm8k, __doc__).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    run(EvaluateChatGsm8k, parse_args(argv))


if __name__ == "__main__":
    run_script(main)
