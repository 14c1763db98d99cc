"""Perplexity of long texts: lengths times {plain, + dynamic_ntk, + logn, + local_attn}, as a table and a plot.

    python eval/evaluate_ppl.py -c Qwen/Qwen-7B --text long.txt --output ppl.json --plot ppl.png

The text is any long UTF-8 file; the published table is of arXiv papers cut to 1024 to 16384 tokens. With --output every
figure is kept as soon as it is measured, and a later run measures only what is missing.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache
from transformers.utils import logging

from eval.figures import MARKS, Figures, finish_plot, import_pyplot
from eval.run_folder import check_writable
from eval.sources import load_data
from qwen import QWenConfig, QwenError, QWenLMHeadModel, QWenTokenizer
from qwen.modeling_qwen import dynamic_ntk_alpha
from utils import add_model_arguments, find_checkpoint, load_config, load_from_args, run_script

LOSS_ROWS = 256  # positions whose logits exist at once: all of a long text would be gigabytes
PUBLISHED_SEQ_LENGTH = 2048  # of the weights that the published table is of


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


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.set_defaults(checkpoint_path="Qwen/Qwen-7B")
    group = parser.add_argument_group("perplexity")
    group.add_argument("--text", type=Path, required=True, metavar="FILE", help="a UTF-8 file of the longest length")
    group.add_argument(
        "--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], metavar="N",
        help="lengths in tokens (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--windows", type=int, default=1, metavar="N", help="places in the text (default: %(default)s)")
    group.add_argument(
        "--chunk", type=int, default=1024, metavar="N", help="tokens read at once (default: %(default)s)"
    )
    group.add_argument(
        "--seq-length", type=int, metavar="N",
        help=f"begin NTK, logn and windows here, not at the config's; {PUBLISHED_SEQ_LENGTH} in the published table",
    )  # fmt: skip
    group.add_argument("-o", "--output", type=Path, metavar="FILE", help="JSON file of the figures, read and written")
    group.add_argument("--plot", type=Path, metavar="FILE", help="PNG file to draw the figures into")
    args = parser.parse_args(argv)
    if min(args.chunk, args.windows) < 1:
        parser.error("--chunk and --windows must be 1 or more")
    if min(args.lengths) < 2:
        parser.error("--lengths must be 2 or more: the first token is read, not guessed")
    if args.tp:
        parser.error("--tp is not for this measurement: one process reads the text")
    return args


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
    model, tokenizer = load_from_args(args)
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


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.plot:
        import_pyplot()  # before the measuring, which would be for nothing
    for flag, path in (("--output", args.output), ("--plot", args.plot)):
        if path:
            check_writable(path.parent, flag)
            if path.is_dir():
                raise QwenError(f"{flag} {path} is a directory: name a file")
    directory = find_checkpoint(args.checkpoint_path, args.hub, args.revision)
    args.seq_length = args.seq_length or load_config(directory).seq_length
    conditions = {"what": "perplexity", "checkpoint": args.checkpoint_path, "dtype": args.dtype, "chunk": args.chunk}
    conditions |= {"text": args.text.name, "windows": args.windows, "seq_length": args.seq_length}
    figures = Figures(args.output, conditions)
    try:
        measure_perplexity(args, figures)
    finally:  # Ctrl-C too: show what there is
        print(figures.table("perplexity", args.lengths))
        published = Figures(None, {})
        published.update(load_data("published.json")["ppl"])
        print("\n" + published.table("published, Qwen-7B, August 2023, arXiv", args.lengths))
    if args.plot:
        plot_perplexity(figures, args.plot)


if __name__ == "__main__":
    run_script(main)
