"""Give a checkpoint more tokens: write an extra vocabulary, enlarge the model, save both, and read them back.

    python examples/add_tokens.py -c demo -o demo-more-tokens photosynthesis tokenizer

A word that is now several tokens becomes one, and the tokens on the way to it become tokens too, as byte-pair encoding
needs them. A new row of the embeddings starts as the mean of the rows of the pieces it stands for, so that the model's
replies hardly change; what the new tokens are worth, fine-tuning teaches.
"""

import argparse
import base64
import json
import shutil
import sys
from pathlib import Path

import regex
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwen import QwenError, QWenLMHeadModel, QWenTokenizer  # noqa: E402
from qwen.paths import new_directory  # noqa: E402
from qwen.tokenization_qwen import PATTERN, VOCAB_FILE  # noqa: E402
from utils import add_model_arguments, load_from_args, run_script  # noqa: E402

EXTRA_FILE = "extra.tiktoken"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="directory to write")
    parser.add_argument("words", nargs="+", help="new tokens; each is added with and without a blank before it")
    return parser.parse_args(argv)


def new_tokens(tokenizer: QWenTokenizer, words: list[str]) -> dict[bytes, list[int]]:
    """New tokens in the order in which they must get their ids, each with the old ids it stands for."""
    made: dict[bytes, list[int]] = {}
    for word in (form for bare in words for form in (bare, f" {bare}")):
        if not regex.fullmatch(PATTERN, word):
            raise QwenError(f"{word!r} is more than one word for the tokenizer's pattern, so it can't be one token")
        ids = tokenizer.encode_text(word)
        for end in range(2, len(ids) + 1):  # from the left, piece by piece
            token = b"".join(tokenizer.decoder[i] for i in ids[:end])
            if token not in tokenizer.mergeable_ranks:
                made.setdefault(token, ids[:end])
    if not made:
        raise QwenError("all these words are tokens already: give others")
    return made


def enlarge(model: QWenLMHeadModel, tokens: dict[bytes, list[int]], first_id: int) -> None:
    """Rows for the new ids, `first_id` and on, in both tables: the mean of the rows of what each stands for."""
    needed = first_id + len(tokens)
    if needed > model.config.vocab_size:
        model.resize_token_embeddings(needed, pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():
        for new_id, old_ids in enumerate(tokens.values(), start=first_id):
            for table in (model.transformer.wte.weight, model.lm_head.weight):
                table[new_id] = table[old_ids].float().mean(0).to(table.dtype)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with new_directory(args.output) as draft:
        model, tokenizer = load_from_args(args)
        tokens = new_tokens(tokenizer, args.words)
        first_id = len(tokenizer)
        enlarge(model, tokens, first_id)
        ranks = zip(tokens, range(first_id, first_id + len(tokens)), strict=True)
        (draft / EXTRA_FILE).write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(t), i) for t, i in ranks))
        tokenizer.save_pretrained(draft)
        extended = QWenTokenizer(str(draft / VOCAB_FILE), extra_vocab_file=str(draft / EXTRA_FILE))
        extended.save_vocabulary(str(draft))  # one file with all: it loads like any other checkpoint
        model.save_pretrained(draft)
        for path in draft.iterdir():
            shutil.copymode(draft / EXTRA_FILE, path)  # safetensors lets only their owner read what it writes
    again = QWenTokenizer.from_pretrained(args.output)
    for word in args.words:
        before, after = (each.encode_text(f" {word}") for each in (tokenizer, again))
        print(json.dumps(word, ensure_ascii=False), f"was {before}, is {after}")
    print(f"Saved in {args.output}: {len(tokens)} new tokens, {model.config.vocab_size} rows.", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
