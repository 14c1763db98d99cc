"""Measure long prompts: perplexity with and without the long-context switches, and time and memory of the prefill.

    python benchmarks/bench_long_context.py perplexity -c demo --text FILE --plot assets/long_context_perplexity.png
    python benchmarks/bench_long_context.py prefill -c demo --plot assets/long_context_prefill.png

FILE is any long UTF-8 text. The tables are Markdown. With `--output FILE.json` each figure is kept as soon as it is
measured, and a later run measures only what is missing. The plots need the package matplotlib.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import DynamicCache  # noqa: E402
from transformers.utils import logging  # noqa: E402

from profiling.measure import peak_bytes  # noqa: E402
from qwen import QWenConfig, QwenError, QWenLMHeadModel, QWenTokenizer  # noqa: E402
from qwen.modeling_qwen import dynamic_ntk_alpha  # noqa: E402
from utils import DTYPES, find_checkpoint, load_config, load_model_and_tokenizer, run_script  # noqa: E402

LOSS_ROWS = 256  # positions whose logits exist at once: all of a long text would be gigabytes


@dataclass(frozen=True)
class Switches:
    """The long-context switches of QWenConfig."""

    use_dynamic_ntk: bool = False
    use_logn_attn: bool = False
    local_attn: bool = False

    def effective(self, length: int, config: QWenConfig) -> "Switches":
        """What has an effect on a text of `length` tokens: up to the training length NTK and logn have none."""
        beyond = length > config.seq_length
        windowed = length > config.seq_length // 2  # the smallest window
        return Switches(self.use_dynamic_ntk and beyond, self.use_logn_attn and beyond, self.local_attn and windowed)


# The rows of the table in the publisher's README: each adds a switch.
ROWS = {
    "plain": Switches(),
    "+ dynamic_ntk": Switches(use_dynamic_ntk=True),
    "+ dynamic_ntk + logn": Switches(use_dynamic_ntk=True, use_logn_attn=True),
    "+ dynamic_ntk + logn + local_attn": Switches(use_dynamic_ntk=True, use_logn_attn=True, local_attn=True),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["perplexity", "prefill"], help="what to measure")
    parser.add_argument("-c", "--checkpoint-path", default="demo", help="as in cli_demo.py (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="precision (default: %(default)s)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384], metavar="N",
        help="lengths in tokens (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--chunk", type=int, default=1024, help="tokens in a prefill's chunk (default: %(default)s)")
    parser.add_argument("--text", type=Path, help="perplexity: a UTF-8 file of at least the longest length")
    parser.add_argument("--windows", type=int, default=1, help="perplexity: places in the text (default: %(default)s)")
    parser.add_argument(
        "--seq-length", type=int, metavar="N", help="perplexity: begin NTK, logn and windows here, not at the config's"
    )
    parser.add_argument("--output", type=Path, help="JSON file of the figures, also read: measured figures are kept")
    parser.add_argument("--plot", type=Path, help="PNG file to draw the figures into")
    parser.add_argument("--worker", nargs=2, type=int, metavar=("LENGTH", "CHUNK"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if min([*args.lengths, args.chunk, args.windows]) < 1:
        parser.error("--lengths, --chunk and --windows must be 1 or more")
    if args.what == "perplexity" and args.text is None:
        parser.error("perplexity needs --text")
    return args


# ---- figures that outlive a run ----


class Figures(dict[str, dict[str, float]]):
    """Figures by row and length, written to a file after each one where there is a file."""

    def __init__(self, path: Path | None, conditions: dict[str, Any]) -> None:
        super().__init__()
        self.path, self.conditions = path, conditions
        if path is None or not path.exists():
            return
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            same = saved["conditions"] == conditions
            self.update(saved["figures"])
        except (ValueError, KeyError, TypeError) as error:
            raise QwenError(f"{path} holds no figures of this tool: name another file with --output") from error
        if not same:
            raise QwenError(f"{path} holds figures of other settings: name another file with --output, or remove it")

    def put(self, row: str, length: int, value: float) -> None:
        self.setdefault(row, {})[str(length)] = value
        if self.path:
            text = json.dumps({"conditions": self.conditions, "figures": self}, indent=2)
            self.path.write_text(text + "\n", encoding="utf-8")

    def table(self, title: str, lengths: list[int]) -> str:
        """Markdown, rows as measured; a dash for what is not measured yet."""
        lines = [f"| {title} | " + " | ".join(map(str, lengths)) + " |", "|---" * (len(lengths) + 1) + "|"]
        for row, values in self.items():
            cells = [f"{values[str(n)]:#.4g}" if str(n) in values else "–" for n in lengths]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


# ---- perplexity ----


def cut_windows(tokenizer: QWenTokenizer, path: Path, length: int, count: int) -> list[Tensor]:
    """`count` stretches (1, length) of a text's ids, evenly spread; QwenError if it is too short."""
    try:
        ids = torch.tensor(tokenizer.encode(path.read_text(encoding="utf-8"), allowed_special=set()))
    except (OSError, UnicodeDecodeError) as error:
        raise QwenError(f"cannot read {path}: {error}") from error
    if len(ids) < length * count:
        raise QwenError(
            f"{path} has {len(ids):,} tokens and {length * count:,} are wanted: "
            "take a longer text, or lower --lengths or --windows"
        )
    return [ids[None, k * len(ids) // count :][:, :length] for k in range(count)]


@torch.no_grad()
def mean_loss(model: QWenLMHeadModel, ids: Tensor, chunk: int) -> float:
    """Mean loss of the tokens of `ids` (1, T) after the first: the log of the perplexity.

    The text goes through the cache in chunks, and the head sees few positions at once, so memory grows by the cache
    alone. NTK's alpha is that of the whole text.
    """
    ids = ids.to(model.device)
    length = ids.shape[1]
    alpha = dynamic_ntk_alpha(torch.tensor([length]), model.config.seq_length)
    cache, total = DynamicCache(), 0.0
    for start in tqdm(range(0, length, chunk), desc=f"{length} tokens", unit="chunk", leave=False):
        piece = ids[:, start : start + chunk]
        hidden = model.transformer(piece, past_key_values=cache, use_cache=True, ntk_alpha=alpha).last_hidden_state[0]
        following = ids[0, start + 1 : start + chunk + 1]
        for rows, labels in zip(hidden[: len(following)].split(LOSS_ROWS), following.split(LOSS_ROWS), strict=True):
            logits = model.lm_head(rows).float()  # (LOSS_ROWS, V)
            total += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    return total / (length - 1)


def measure_perplexity(args: argparse.Namespace, figures: Figures) -> None:
    """Fill `figures`, length by length; cells that are the same computation are computed once."""
    model, tokenizer = load_model_and_tokenizer(args.checkpoint_path, device=args.device, dtype=args.dtype)
    config = model.config
    config.seq_length = args.seq_length
    windows = cut_windows(tokenizer, args.text, max(args.lengths), args.windows)
    for length in args.lengths:
        known: dict[Switches, float] = {}
        for row, wanted in ROWS.items():
            switches = wanted.effective(length, config)
            if str(length) in figures.get(row, {}):
                known[switches] = figures[row][str(length)]
            if switches not in known:
                for name, value in asdict(switches).items():
                    setattr(config, name, value)
                losses = [mean_loss(model, window[:, :length], args.chunk) for window in windows]
                known[switches] = math.exp(sum(losses) / len(losses))
                tqdm.write(f"{row}, {length} tokens: {known[switches]:.2f}", file=sys.stderr)
            figures.put(row, length, known[switches])


def plot_perplexity(figures: Figures, path: Path) -> None:
    """Perplexity over length, both logarithmic, with the training length marked."""
    plt = import_pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (row, values), (marker, style) in zip(figures.items(), MARKS, strict=False):
        axes.plot([int(n) for n in values], list(values.values()), marker=marker, linestyle=style, label=row)
    axes.axvline(figures.conditions["seq_length"], color="grey", linestyle=":", label="seq_length")
    axes.set(xscale="log", yscale="log", xlabel="length (tokens)", ylabel="perplexity")
    finish_plot(figure, [axes], figures, path)


# ---- prefill ----


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
            command = [sys.executable, __file__, "prefill", *flags, "--worker", str(length), str(chunk)]
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


# ---- plots ----

MARKS = (("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"))  # lines that differ without colour too


def import_pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise QwenError("--plot needs the package matplotlib: pip install matplotlib, or leave --plot out") from None
    matplotlib.use("Agg")  # files only: needs no display
    from matplotlib import pyplot

    return pyplot


def finish_plot(figure: Any, axes: list[Any], figures: Figures, path: Path) -> None:
    lengths = sorted({int(n) for values in figures.values() for n in values})
    for side in axes:
        side.set_xticks(lengths, [str(n) for n in lengths])
        side.xaxis.minorticks_off()
        side.yaxis.set_major_formatter("{x:g}")
        side.yaxis.set_minor_formatter("{x:g}")  # a logarithmic axis of less than a decade has no other labels
        side.grid(alpha=0.3)
        side.legend()
    figure.suptitle(str(figures.conditions["checkpoint"]))
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.disable_progress_bar()
    if args.worker:
        print(json.dumps(measure_one_prefill(args, *args.worker)))
        return
    if args.plot:
        import_pyplot()  # before the measuring, which would be for nothing
    conditions = {"what": args.what, "checkpoint": args.checkpoint_path, "dtype": args.dtype, "chunk": args.chunk}
    if args.what == "perplexity":
        args.seq_length = args.seq_length or load_config(find_checkpoint(args.checkpoint_path)).seq_length
        conditions |= {"text": args.text.name, "windows": args.windows, "seq_length": args.seq_length}
    measure = measure_perplexity if args.what == "perplexity" else measure_prefill
    figures = Figures(args.output, conditions)
    try:
        measure(args, figures)
    finally:  # Ctrl-C too: show what there is
        print(figures.table(args.what, args.lengths))
    if args.plot:
        (plot_perplexity if args.what == "perplexity" else plot_prefill)(figures, args.plot)


if __name__ == "__main__":
    run_script(main)
