"""Tools in ReAct form, in this process and without a key: a calculator, a clock, a search in files.

    python examples/react_demo.py -c Qwen/Qwen-7B-Chat "How many lines has the README, times 12?"
    python examples/react_demo.py -c demo --documents . "What does quantize.py do?"

Every thought, call and result is printed. The demo checkpoint was never trained on tools: with it you see the loop, and
no skill.
"""

import argparse
import ast
import math
import operator
import re
import sys
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qwen import QwenError  # noqa: E402
from qwen.tools import ToolStep, run_with_tools  # noqa: E402
from utils import add_model_arguments, load_from_args, run_script  # noqa: E402

OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
FUNCTIONS = {name: getattr(math, name) for name in ("sqrt", "sin", "cos", "tan", "log", "exp", "floor", "ceil")}
LONGEST_ANSWER = 600  # characters of a passage


# ---- the tools ----


def calculator(expression: str) -> str:
    """Computes an arithmetic expression, such as 12 * (3 + 4) or sqrt(2).

    Args:
        expression: The expression, with + - * / // % ** and parentheses.
    """
    result = evaluate(ast.parse(expression.strip(), mode="eval").body)
    return str(int(result) if isinstance(result, float) and result.is_integer() else result)


def evaluate(node: ast.AST) -> float:
    """The value of a parsed expression: numbers, operators and a few functions, and nothing else of Python."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.Name) and node.id in ("pi", "e"):
        return getattr(math, node.id)
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](evaluate(node.operand))
    if isinstance(node, ast.BinOp):
        left, right = evaluate(node.left), evaluate(node.right)
        if isinstance(node.op, ast.Pow):
            return float(left) ** float(right) if abs(right) > 64 else left**right  # no numbers that fill the memory
        if type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
        return FUNCTIONS[node.func.id](*map(evaluate, node.args))
    raise ValueError(f"{ast.unparse(node)} is no arithmetic")


def clock(timezone: str) -> str:
    """Tells the date and the time.

    Args:
        timezone: The place as in the tz database, such as Asia/Shanghai, or UTC.
    """
    return datetime.now(ZoneInfo(timezone)).strftime("%A, %d %B %Y, %H:%M (%Z)")


def make_search(folder: Path) -> Callable[[str], str]:
    """A tool that searches the Markdown and text files of a folder, paragraph by paragraph, ranked by BM25."""
    files = sorted(path for path in folder.glob("*") if path.suffix in (".md", ".txt"))
    passages = [
        (path.name, paragraph.strip())
        for path in files
        for paragraph in re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="replace"))
        if paragraph.strip()
    ]
    if not passages:
        raise QwenError(f"--documents {folder} has no .md or .txt files: give a folder that has")
    counts = [Counter(words(text)) for _, text in passages]
    average = sum(count.total() for count in counts) / len(counts)
    frequency = Counter(word for count in counts for word in count)

    def search(query: str) -> str:
        """Finds the passage that fits a question best, in a folder of documents.

        Args:
            query: Words to look for.
        """

        def score(count: Counter[str]) -> float:
            total = 0.0
            for word in words(query):
                rarity = math.log(1 + (len(counts) - frequency[word] + 0.5) / (frequency[word] + 0.5))
                total += rarity * count[word] * 2.5 / (count[word] + 1.5 * (0.25 + 0.75 * count.total() / average))
            return total

        best = max(range(len(counts)), key=lambda place: score(counts[place]))
        name, text = passages[best]
        return f"{name}: {text[:LONGEST_ANSWER]}" if score(counts[best]) > 0 else "Nothing was found."

    return search


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9_]+|[\u4e00-\u9fff]", text.lower())


# ---- the conversation ----


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("question", nargs="?", default="What is 1234 * 5678?", help="(default: %(default)s)")
    parser.add_argument(
        "--documents",
        type=Path,
        default=ROOT,
        metavar="DIR",
        help="folder of .md and .txt files (default: this project)",
    )
    parser.add_argument("--max-rounds", type=int, default=5, metavar="N", help="replies at most (default: %(default)s)")
    return parser.parse_args(argv)


def print_step(step: ToolStep) -> None:
    if step.thought:
        print(f"Thought: {step.thought}")
    print(f"Action: {step.call.name}\nAction Input: {step.call.arguments}\nObservation: {step.observation}", flush=True)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    tools = [calculator, clock, make_search(args.documents)]
    model, tokenizer = load_from_args(args)
    reply = run_with_tools(
        model, tokenizer, args.question, tools, max_rounds=args.max_rounds, on_step=print_step,
        temperature=0, max_new_tokens=256,
    )  # fmt: skip
    if reply.finish_reason == "rounds":
        raise QwenError(f"no answer after {args.max_rounds} rounds: ask otherwise, or raise --max-rounds")
    print(f"Final Answer: {reply.text}")


if __name__ == "__main__":
    run_script(main)
