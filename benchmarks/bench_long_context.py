"""Measure long prompts: time and memory of the prefill, whole and in chunks. (Perplexity: eval/evaluate_ppl.py.)

    python benchmarks/bench_long_context.py -c demo --plot assets/long_context_prefill.png

The table is Markdown. With `--output FILE.json` each figure is kept as soon as it is measured, and a later run measures
only what is missing. The plot needs the package matplotlib.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers.utils import logging  # noqa: E402

from eval.figures import MARKS, Figures, finish_plot, import_pyplot  # noqa: E402
from profiling.measure import peak_bytes  # noqa: E402
from utils import DTYPES, load_model_and_tokenizer, run_script  # noqa: E402


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--checkpoint-path", default="demo", help="as in cli_demo.py (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="precision (default: %(default)s)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384], metavar="N",
        help="lengths in tokens (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--chunk", type=int, default=1024, help="tokens in a prefill's chunk (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file of the figures, also read: measured figures are kept")
    parser.add_argument("--plot", type=Path, help="PNG file to draw the figures into")
    parser.add_argument("--worker", nargs=2, type=int, metavar=("LENGTH", "CHUNK"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if min([*args.lengths, args.chunk]) < 1:
        parser.error("--lengths and --chunk must be 1 or more")
    return args


def measure_one_prefill(args: argparse.Namespace, length: int, chunk: int) -> dict[str, float]:
    """Seconds to the first token of a prompt of random ids, and the peak memory of this process; chunk 0 is whole."""
    model, _ = load_model_and_tokenizer(args.checkpoint_path, device=args.device, dtype=args.dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, (1, length), generator=generator).to(model.device)
    settings = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 1, "pad_token_id": 0}
    model.generate(ids[:, :32], attention_mask=torch.ones_like(ids[:, :32]), **settings)  # to warm up
    start = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), prefill_chunk_size=chunk or length, **settings)
    return {"seconds": time.perf_counter() - start, "gib": peak_bytes(model.device) / 2**30}


def measure_prefill(args: argparse.Namespace, figures: Figures) -> None:
    """Fill `figures`, each prompt in a fresh process, so that none counts the memory of another."""
    flags = [f"--checkpoint-path={args.checkpoint_path}", f"--device={args.device}", f"--dtype={args.dtype}"]
    for length in tqdm(args.lengths, unit="length"):
        for name, chunk in (("whole", 0), (f"in chunks of {args.chunk}", args.chunk)):
            if str(length) in figures.get(f"{name}, peak memory (GiB)", {}):
                continue
            command = [sys.executable, __file__, *flags, "--worker", str(length), str(chunk)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.returncode)  # the worker has said why
            result = json.loads(done.stdout.splitlines()[-1])
            figures.put(f"{name}, time (s)", length, result["seconds"])
            figures.put(f"{name}, peak memory (GiB)", length, result["gib"])


def plot_prefill(figures: Figures, path: Path) -> None:
    """Time and memory over length, side by side."""
    plt = import_pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    marks = [mark for mark in MARKS for _ in range(2)]  # a row's time and its memory look alike
    for (row, values), (marker, style) in zip(figures.items(), marks, strict=False):
        name, _, unit = row.partition(", ")
        side = axes[0] if unit.startswith("time") else axes[1]
        side.plot([int(n) for n in values], list(values.values()), marker=marker, linestyle=style, label=name)
        side.set(xlabel="prompt (tokens)", ylabel=unit)
    for side in axes:
        side.set_ylim(bottom=0)
    finish_plot(figure, list(axes), figures, path)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.disable_progress_bar()
    if args.worker:
        print(json.dumps(measure_one_prefill(args, *args.worker)))
        return
    if args.plot:
        import_pyplot()  # before the measuring, which would be for nothing
    conditions = {"what": "prefill", "checkpoint": args.checkpoint_path, "dtype": args.dtype, "chunk": args.chunk}
    figures = Figures(args.output, conditions)
    try:
        measure_prefill(args, figures)
    finally:  # Ctrl-C too: show what there is
        print(figures.table("prefill", args.lengths))
    if args.plot:
        plot_prefill(figures, args.plot)


if __name__ == "__main__":
    run_script(main)
