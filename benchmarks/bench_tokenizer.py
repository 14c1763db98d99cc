"""Compare the tokenizer's speed with bare tiktoken's, on the same text in turns.

python benchmarks/bench_tokenizer.py --vocab tests/data/qwen.tiktoken
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qwen import QWenTokenizer  # noqa: E402
from utils import run_script  # noqa: E402


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=Path, default=ROOT / "tests/data/qwen.tiktoken", help="a qwen.tiktoken file")
    parser.add_argument("--text", type=Path, help="a UTF-8 file; by default English, code and Chinese are mixed")
    parser.add_argument("--bytes", type=int, default=2_000_000, help="how much of it (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=11, help="pairs of runs (default: %(default)s)")
    return parser.parse_args(argv)


def mixed_text(tokenizer: QWenTokenizer, size: int) -> str:
    """`size` bytes of English and code (modules of this Python's library) and of Chinese words of the vocabulary."""
    rng = random.Random(0)
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, random, statistics)]
    words = [tokenizer.decode([i]) for i in range(256, tokenizer.eod_id)]
    chinese = [word for word in words if all("\u4e00" <= char <= "\u9fff" for char in word)]
    parts, total = [], 0
    while total < size:
        source = rng.choice(sources)
        start = rng.randrange(len(source) - 2000)
        parts += [source[start : start + 2000], "".join(rng.choices(chinese, k=200)) + "。"]
        total += sum(len(part.encode()) for part in parts[-2:])
    return "\n".join(parts)


def seconds(function: Callable[[str], list[int]], text: str) -> float:
    start = time.perf_counter()
    function(text)
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    tokenizer = QWenTokenizer(str(args.vocab))
    text = args.text.read_text(encoding="utf-8")[: args.bytes] if args.text else mixed_text(tokenizer, args.bytes)
    bare = tokenizer.tokenizer
    tokens = len(tokenizer.encode(text))
    pairs = [
        (seconds(tokenizer.encode, text), seconds(lambda t: bare.encode(t, allowed_special="all"), text))
        for _ in range(args.runs)
    ]
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"{len(text.encode()):,} bytes, {tokens:,} tokens; medians of {args.runs} runs in turns")
    print(f"QWenTokenizer {tokens / ours / 1e6:.2f} M tokens/s, bare tiktoken {tokens / theirs / 1e6:.2f} M tokens/s")
    print(f"speed ratio, by pairs: {ratio:.3f}")


if __name__ == "__main__":
    run_script(main)
