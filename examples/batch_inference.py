"""Answer a file of questions, one a line, several at a time; what is answered already is not asked again.

    python examples/batch_inference.py -c demo questions.txt answers.jsonl --batch-size 8
    torchrun --nproc_per_node 2 examples/batch_inference.py -c Qwen/Qwen-7B-Chat questions.txt answers.jsonl
    python examples/batch_inference.py -c Qwen/Qwen-7B-Chat questions.txt answers.jsonl --api-base http://host:8000/v1

Processes of torchrun share the questions, a GPU each; with --api-base an OpenAI-compatible server answers them.
Questions of about the same length share a batch, so that little is spent on padding. Every reply is what the question
alone would have got (greedily). The answers' file has one JSON object a line: question, answer, finish_reason.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.remote import Remote, add_api_arguments, load_tokenizer  # noqa: E402
from qwen import QwenError  # noqa: E402
from qwen.chatml import build_prompt  # noqa: E402
from utils import add_model_arguments, load_from_args, run_script  # noqa: E402


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_api_arguments(parser)
    parser.add_argument("questions", type=Path, help="UTF-8 text file, a question a line")
    parser.add_argument("answers", type=Path, help="JSON Lines file to write, or to go on with")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="(default: %(default)s)")
    return parser.parse_args(argv)


def read_questions(path: Path) -> list[str]:
    """The lines that are not blank, each once."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise QwenError(f"{path} is not UTF-8 text ({error}): convert it") from None
    except OSError as error:
        raise QwenError(f"{path} can't be read: {error.strerror}") from None
    questions = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not questions:
        raise QwenError(f"{path} has no questions: write one on each line")
    return questions


def read_answered(path: Path) -> set[str]:
    """The questions that an earlier run has answered; a last line that was cut off is removed from the file."""
    if not path.exists():
        return set()
    answered, whole, text = set(), [], path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        try:
            answered.add(json.loads(line)["question"])
            whole.append(line)
        except (ValueError, KeyError, TypeError):
            if line.endswith("\n"):
                raise QwenError(f"{path}, line {number} is no answer of this script: give another file") from None
    if sum(map(len, whole)) < len(text):
        path.write_text("".join(whole), encoding="utf-8")
    return answered


Answer = tuple[str, str]  # a text, and how it ended


def open_model(args: argparse.Namespace, rank: int, processes: int) -> Callable[[list[str]], list[Answer]]:
    """A function that answers a batch of questions with a model of this process."""
    if processes > 1 and args.device == "auto" and not args.cpu_only:
        import torch

        if torch.cuda.is_available():
            args.device = f"cuda:{os.environ.get('LOCAL_RANK', rank)}"
    model, tokenizer = load_from_args(args)

    def answer(batch: list[str]) -> list[Answer]:
        replies = model.chat_batch(tokenizer, batch, temperature=0, max_new_tokens=args.max_new_tokens)
        return [(str(reply), reply.finish_reason) for reply in replies]

    return answer


def open_server(args: argparse.Namespace, stack: ExitStack) -> Callable[[list[str]], list[Answer]]:
    """The same with a model that a server runs."""
    tokenizer, _ = load_tokenizer(args)
    remote = stack.enter_context(Remote(args, tokenizer, max_new_tokens=args.max_new_tokens))
    args.batch_size = max(args.batch_size, 4 * args.api_requests)  # so that no request waits for the longest of few

    def answer(batch: list[str]) -> list[Answer]:
        records = remote.answer([build_prompt(tokenizer, question).ids for question in batch])
        return [(record["text"].strip(), record["finish_reason"]) for record in records]

    return answer


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if min(args.batch_size, args.max_new_tokens, args.api_requests) < 1:
        raise QwenError("--batch-size, --max-new-tokens and --api-requests must be at least 1")
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # Dealt out before those that are answered are left out: every process must make the same shares.
    share = sorted(read_questions(args.questions), key=len)[rank::processes]
    answered = read_answered(args.answers)
    questions = [question for question in share if question not in answered]
    if not questions:
        print("All questions are answered already.", file=sys.stderr)
        return
    with ExitStack() as stack:
        answer = open_server(args, stack) if args.api_base else open_model(args, rank, processes)
        file = stack.enter_context(args.answers.open("ab", buffering=0))  # each write is whole lines, at the end
        bar = stack.enter_context(
            tqdm(desc="Answering", total=len(questions), unit="question", file=sys.stderr, disable=rank > 0)
        )
        for start in range(0, len(questions), args.batch_size):
            batch = questions[start : start + args.batch_size]
            rows = [
                {"question": question, "answer": text, "finish_reason": reason}
                for question, (text, reason) in zip(batch, answer(batch), strict=True)
            ]
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            bar.update(len(batch))


if __name__ == "__main__":
    run_script(main)
