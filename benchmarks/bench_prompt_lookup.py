"""Compare greedy decoding with and without prompt lookup, in turns, where replies repeat the prompt and where not.

python benchmarks/bench_prompt_lookup.py -c demo --prompt-lookup 10
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

from qwen.chat import Reply  # noqa: E402
from utils import DTYPES, describe_placement, load_model_and_tokenizer, run_script  # noqa: E402

CODE = """def total_price(items):
    total = 0
    for item in items:
        price = item["price"]
        quantity = item["quantity"]
        total += price * quantity
    return total
"""
LIBRARY = (
    "The library opens at nine in the morning and closes at six in the evening. On Saturdays it closes at noon. "
    "Children may borrow five books for three weeks, and adults may borrow ten books for four weeks."
)
PROMPTS = {
    "edit code": f"Rename the variable total to result and write the whole function again:\n\n{CODE}",
    "quote a text": f"Repeat this text word for word:\n\n{LIBRARY}",
    "summarise a text": f"Summarise this text in two sentences:\n\n{LIBRARY}",
    "write freely": "Write a story about a lighthouse keeper who finds a message in a bottle.",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--checkpoint-path", default="demo", help="as in cli_demo.py (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="precision (default: %(default)s)")
    parser.add_argument("--prompt-lookup", type=int, default=10, metavar="N", help="guesses at once (default: 10)")
    parser.add_argument("--new-tokens", type=int, default=96, help="longest reply (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="pairs of replies per prompt (default: %(default)s)")
    args = parser.parse_args(argv)
    if min(args.prompt_lookup, args.runs) < 1 or args.new_tokens < 2:
        parser.error("--prompt-lookup and --runs must be 1 or more, --new-tokens 2 or more")
    return args


def timed_reply(model: Any, tokenizer: Any, prompt: str, **settings: Any) -> tuple[float, float, Reply]:
    """Tokens per second (the prompt's time included), tokens per call of the model, and the reply."""
    calls: list[None] = []
    hook = model.register_forward_pre_hook(lambda module, args: calls.append(None))
    start = time.perf_counter()
    reply, _ = model.chat(tokenizer, prompt, None, do_sample=False, repetition_penalty=1.0, **settings)
    seconds = time.perf_counter() - start
    hook.remove()
    return reply.completion_tokens / seconds, reply.completion_tokens / len(calls), reply


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    model, tokenizer = load_model_and_tokenizer(args.checkpoint_path, device=args.device, dtype=args.dtype)
    model.chat(tokenizer, "Hi", None, max_new_tokens=4)  # to warm up
    print(f"{args.checkpoint_path}, {describe_placement(model)}; {args.prompt_lookup} guesses at once, medians of "
          f"{args.runs} pairs\n")  # fmt: skip
    titles = ["prompt", "reply (tokens)", "tokens per step", "without (tok/s)", "with (tok/s)", "speed-up (by pairs)"]
    print("| " + " | ".join([*titles, "same reply"]) + " |")
    print("|---" * (len(titles) + 1) + "|", flush=True)
    for name, prompt in PROMPTS.items():
        pairs = []
        for _ in tqdm(range(args.runs), desc=name, unit="pair", leave=False):
            plain = timed_reply(model, tokenizer, prompt, max_new_tokens=args.new_tokens)
            guessed = timed_reply(
                model, tokenizer, prompt, max_new_tokens=args.new_tokens, prompt_lookup_num_tokens=args.prompt_lookup
            )
            pairs.append((plain, guessed))
        without = statistics.median(plain[0] for plain, _ in pairs)
        with_it = statistics.median(guessed[0] for _, guessed in pairs)
        ratio = statistics.median(guessed[0] / plain[0] for plain, guessed in pairs)
        same = "yes" if all(plain[2] == guessed[2] for plain, guessed in pairs) else "no"
        tokens, per_step = pairs[0][0][2].completion_tokens, pairs[0][1][1]
        print(
            f"| {name} | {tokens} | {per_step:.2f} | {without:.1f} | {with_it:.1f} | {ratio:.2f} | {same} |", flush=True
        )


if __name__ == "__main__":
    run_script(main)
