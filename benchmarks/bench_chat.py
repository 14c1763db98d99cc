"""Measure a chat on this machine: load time, time to first token, decoding speed and peak memory, by precision.

    python benchmarks/bench_chat.py -c demo --dtypes fp32 bf16

Every row is a fresh process, several times over; the table shows medians and is ready to paste.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from profiling.measure import describe_device, peak_bytes  # noqa: E402
from qwen.chatml import make_context  # noqa: E402
from utils import DTYPES, choose_device, describe_placement, load_model_and_tokenizer, run_script  # noqa: E402

QUERY = "Write a long story about a lighthouse keeper who finds a message in a bottle."
PADDING = "The sea was calm that evening, and the light turned slowly over the water. "
COLUMNS = (
    ("load_s", "load (s)", "{:.1f}"),
    ("first_token_s", "first token (s)", "{:.2f}"),
    ("prefill_tps", "prompt (tok/s)", "{:.0f}"),
    ("decode_tps", "decode (tok/s)", "{:.1f}"),
    ("peak_gib", "peak memory (GiB)", "{:.2f}"),
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--checkpoint-path", default="demo", help="as in cli_demo.py (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"], help="a row for each")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="length of the prompt (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=128, help="length of the reply (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="processes per row (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="also write all figures to this JSON file")
    parser.add_argument("--worker", metavar="DTYPE", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> dict[str, float | str]:
    """One process's figures for one precision: a streamed reply, as a user sees it, after a short one to warm up."""
    start = time.perf_counter()
    model, tokenizer = load_model_and_tokenizer(args.checkpoint_path, device=args.device, dtype=args.worker)
    load_s = time.perf_counter() - start
    query = QUERY
    while len(make_context(tokenizer, query)[1]) < args.prompt_tokens:
        query = PADDING + query
    settings = {"do_sample": False, "repetition_penalty": 1.0}
    model.chat(tokenizer, "Hi", None, max_new_tokens=4, **settings)

    # An end token that does not exist: min_new_tokens would cost time of its own at every token.
    length = {"eos_token_id": model.config.vocab_size, "max_new_tokens": args.new_tokens}
    start = time.perf_counter()
    stream = model.chat_stream(tokenizer, query, None, **length, **settings)
    seen = [(time.perf_counter() - start, reply) for reply in stream]
    (first_token_s, first), (last_s, last) = seen[0], seen[-1]
    decoded = last.completion_tokens - first.completion_tokens
    return {
        "load_s": load_s,
        "first_token_s": first_token_s,
        "prefill_tps": last.prompt_tokens / first_token_s,
        "decode_tps": decoded / (last_s - first_token_s),
        "peak_gib": peak_bytes(model.device) / 2**30,
        "prompt_tokens": last.prompt_tokens,
        "placement": describe_placement(model),
    }


def run_worker(dtype: str, args: argparse.Namespace) -> dict[str, float | str]:
    """Measure in a fresh process, so that no row profits from another's warm caches or counts its memory."""
    flags = [f"--checkpoint-path={args.checkpoint_path}", f"--device={args.device}", f"--worker={dtype}"]
    flags += [f"--prompt-tokens={args.prompt_tokens}", f"--new-tokens={args.new_tokens}"]
    done = subprocess.run([sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)  # the worker has said why
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.worker:
        print(json.dumps(measure(args)))
        return
    runs: dict[str, list[dict]] = {dtype: [] for dtype in args.dtypes}
    # Precisions take turns, so that a machine that slows down slows all rows alike.
    for dtype in tqdm([dtype for _ in range(args.runs) for dtype in args.dtypes], unit="run"):
        runs[dtype].append(run_worker(dtype, args))

    device = describe_device(choose_device(args.device))
    print(f"{args.checkpoint_path} on {device}; prompt {runs[args.dtypes[0]][0]['prompt_tokens']} tokens, "
          f"reply {args.new_tokens}; torch {torch.__version__}, median of {args.runs} processes\n")  # fmt: skip
    print("| precision | " + " | ".join(title for _, title, _ in COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for dtype, results in runs.items():
        cells = [form.format(statistics.median(result[key] for result in results)) for key, _, form in COLUMNS]
        print(f"| {dtype} | " + " | ".join(cells) + " |")
    if args.output:
        args.output.write_text(json.dumps({"device": device, "runs": runs}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
