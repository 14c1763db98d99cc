"""Find a needle in a haystack: a sentence hidden at several depths of long texts, asked for at the end.

    python examples/long_context.py -c Qwen/Qwen-7B-Chat --lengths 2048 4096 8192 16384 --plot needle.png
    python examples/long_context.py -c demo --lengths 256 512 --depths 0 50 100

A table shows for each length and depth whether the reply contains the number of the needle. The plot needs matplotlib.
"""

import argparse
import random
import sys
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qwen import QwenError, QWenLMHeadModel, QWenTokenizer  # noqa: E402
from utils import add_model_arguments, load_from_args, run_script  # noqa: E402

NEEDLE = " The secret number of the lighthouse is {number}. "
QUESTION = "What is the secret number of the lighthouse? Answer with the number only."
NOUNS = "river baker garden engine letter school market bridge forest doctor window ship teacher road kitchen".split()
VERBS = "crosses finds paints remembers repairs leaves reaches watches follows measures".split()
TIMES = "in spring,at noon,every Sunday,before the rain,after the war,without a word,for a long time".split(",")

Found = dict[tuple[int, int], bool]  # by length and depth


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], metavar="N",
        help="lengths of the prompts in tokens (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--depths", type=int, nargs="+", default=[0, 25, 50, 75, 100], metavar="PERCENT",
        help="where the needle lies: 0 is the beginning (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--text", type=Path, metavar="FILE", help="a long text to hide it in (default: made-up prose)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG file to draw the table into")
    parser.add_argument("-s", "--seed", type=int, default=1234, help="of needles and prose (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if min(args.lengths) < 128 or not all(0 <= depth <= 100 for depth in args.depths):
        raise QwenError("--lengths must be at least 128 tokens, and --depths between 0 and 100")
    if args.plot and args.plot.suffix != ".png":
        raise QwenError(f"--plot {args.plot}: give a file name that ends in .png")
    text = read_text(args.text) if args.text else None
    model, tokenizer = load_from_args(args)
    if max(args.lengths) > model.config.max_context_length:
        raise QwenError(f"--lengths {max(args.lengths)}: this model reads {model.config.max_context_length} tokens")
    chance = random.Random(args.seed)
    hay = tokenizer.encode_text(text or prose(max(args.lengths), chance))
    found: Found = {}
    cells = [(length, depth) for length in sorted(args.lengths) for depth in args.depths]
    for length, depth in tqdm(cells, desc="Searching", unit="prompt", file=sys.stderr):
        found[length, depth] = finds(model, tokenizer, hay, length, depth, chance.randint(10_000, 99_999))
    print(table(found))
    print(f"Found {sum(found.values())} of {len(found)}.")
    if args.plot:
        plot(found, args.plot, str(args.checkpoint_path))


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QwenError(f"--text {path} can't be read as UTF-8 ({error}): give another file") from None


def prose(sentences: int, chance: random.Random) -> str:
    """Sentences that say nothing about a lighthouse."""
    return " ".join(
        f"The {chance.choice(NOUNS)} {chance.choice(VERBS)} the {chance.choice(NOUNS)} {chance.choice(TIMES)}."
        for _ in range(sentences)
    )


def finds(
    model: QWenLMHeadModel, tokenizer: QWenTokenizer, hay: list[int], length: int, depth: int, number: int
) -> bool:
    """Whether the reply to a prompt of about `length` tokens has the number that lies at `depth` percent of it."""
    needle = tokenizer.encode_text(NEEDLE.format(number=number))
    size = length - len(needle) - len(tokenizer.encode_text(QUESTION)) - 40  # the frame of ChatML
    if size > len(hay):
        raise QwenError(f"the text has {len(hay)} tokens, and {size} are needed: give a longer one, or lower --lengths")
    place = size * depth // 100
    while 0 < place < size and not tokenizer.decode([hay[place - 1]]).endswith((".", "\n")):
        place -= 1  # between two sentences
    text = tokenizer.decode([*hay[:place], *needle, *hay[place:size]])
    reply, _ = model.chat(tokenizer, f"{text}\n\n{QUESTION}", None, temperature=0, max_new_tokens=24)
    return str(number) in reply.replace(",", "")


def table(found: Found) -> str:
    """Markdown: a row for each depth, a column for each length."""
    lengths = sorted({length for length, _ in found})
    rows = ["| depth | " + " | ".join(map(str, lengths)) + " |", "|---" * (len(lengths) + 1) + "|"]
    for depth in sorted({depth for _, depth in found}):
        rows.append(f"| {depth}% | " + " | ".join("yes" if found[n, depth] else "no" for n in lengths) + " |")
    return "\n".join(rows)


def plot(found: Found, path: Path, title: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise QwenError("--plot needs the package matplotlib: pip install matplotlib") from None
    lengths, depths = sorted({length for length, _ in found}), sorted({depth for _, depth in found})
    figure = Figure(figsize=(1.6 + 0.9 * len(lengths), 1.4 + 0.5 * len(depths)), layout="constrained")
    axes = figure.subplots()
    grid = [[float(found[length, depth]) for length in lengths] for depth in depths]
    axes.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(lengths)), map(str, lengths))
    axes.set_yticks(range(len(depths)), [f"{depth}%" for depth in depths])
    axes.set(xlabel="tokens in the prompt", ylabel="depth of the needle", title=title)
    figure.savefig(path, dpi=150)
    print(f"Drawn into {path}.", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
