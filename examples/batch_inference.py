"""Answer a file of questions, one a line, several at a time; what is answered already is not asked again.

    python examples/batch_inference.py -c demo questions.txt answers.jsonl --batch-size 8

Questions of about the same length share a batch, so that little is spent on padding. Every reply is what the question
alone would have got (greedily). The answers' file has one JSON object a line: question, answer, finish_reason.
"""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwen import QwenError  # noqa: E402
from utils import add_model_arguments, load_from_args, run_script  # noqa: E402


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
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
    answered, whole = set(), []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        try:
            answered.add(json.loads(line)["question"])
            whole.append(line)
        except (ValueError, KeyError, TypeError):
            if line.endswith("\n"):
                raise QwenError(f"{path}, line {number} is no answer of this script: give another file") from None
    path.write_text("".join(whole), encoding="utf-8")
    return answered


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.batch_size < 1 or args.max_new_tokens < 1:
        raise QwenError("--batch-size and --max-new-tokens must be at least 1")
    answered = read_answered(args.answers)
    questions = sorted((q for q in read_questions(args.questions) if q not in answered), key=len)
    if not questions:
        print("All questions are answered already.", file=sys.stderr)
        return
    model, tokenizer = load_from_args(args)
    with (
        args.answers.open("a", encoding="utf-8") as file,
        tqdm(desc="Answering", total=len(questions), unit="question", file=sys.stderr) as bar,
    ):
        for start in range(0, len(questions), args.batch_size):
            batch = questions[start : start + args.batch_size]
            replies = model.chat_batch(tokenizer, batch, temperature=0, max_new_tokens=args.max_new_tokens)
            for question, reply in zip(batch, replies, strict=True):
                row = {"question": question, "answer": str(reply), "finish_reason": reply.finish_reason}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(batch))


if __name__ == "__main__":
    run_script(main)
