"""The same vocabulary as a `tokenizer.json`, the form of the package tokenizers that other engines read, and back.

tiktoken keeps tokens with ranks, and joins the neighbours that make the token of lowest rank. tokenizers wants the list
of merges: those are, for each token, the two pieces in which it stands just before it is joined.
"""

import base64
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .checkpoint import read_json
from .errors import QwenError
from .tokenization_qwen import PATTERN, QWenTokenizer


def fast_tokenizer(tokenizer: QWenTokenizer) -> Tokenizer:
    """A tokenizers.Tokenizer with the same ids for every text."""
    letters = bytes_to_unicode()
    ranks = tokenizer.mergeable_ranks
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges, all_reachable = [], True
    for token in sorted(ranks, key=ranks.__getitem__):
        pieces = pieces_before(token, ranks)
        if len(pieces) == 2:
            merges.append((names[pieces[0]], names[pieces[1]]))
        elif len(token) > 1:  # found only where it is a whole word of the pattern, which tiktoken looks up first
            all_reachable = False
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    if max(vocabulary.values()) > len(vocabulary):  # an extra vocabulary: added tokens would be numbered after it
        vocabulary |= tokenizer.special_tokens
    fast = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=not all_reachable))
    fast.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False,
                                                                                 use_regex=False)])  # fmt: skip
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokenizer.special_tokens])
    return fast


def pieces_before(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The pieces in which byte-pair encoding holds a token's bytes when only merges of lower rank are left to do."""
    pieces = [token[i : i + 1] for i in range(len(token))]
    own = ranks[token]
    while len(pieces) > 2:
        joined = [ranks.get(a + b, own) for a, b in zip(pieces, pieces[1:], strict=False)]
        place = min(range(len(joined)), key=joined.__getitem__)
        if joined[place] >= own:
            break
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    return pieces


def save_fast_tokenizer(tokenizer: QWenTokenizer, directory: Path, chat: bool, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template; a chat model's turns end in <|im_end|>."""
    fast_tokenizer(tokenizer).save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>" if chat else "<|endoftext|>",
        "model_max_length": max_length,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it stands
        "unk_token": None,
    }
    if chat:
        settings["chat_template"] = tokenizer.chat_template  # where older engines look
        (directory / "chat_template.jinja").write_text(str(tokenizer.chat_template), encoding="utf-8")
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def restore_vocabulary(tokenizer_file: Path, vocabulary_file: Path) -> None:
    """Write `qwen.tiktoken` out of a tokenizer.json."""
    content = read_json(tokenizer_file)
    model, added = content.get("model", {}), {token["content"] for token in content.get("added_tokens", [])}
    if model.get("type") != "BPE":
        raise QwenError(f"{tokenizer_file} holds no byte-pair encoding: is it of a checkpoint in Qwen2's layout?")
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    try:
        tokens = {rank: bytes(byte_of[letter] for letter in name) for name, rank in model["vocab"].items()
                  if name not in added}  # fmt: skip
    except KeyError as error:
        raise QwenError(f"{tokenizer_file} has a token with {error}, which stands for no byte") from None
    lines = (b"%s %d\n" % (base64.b64encode(tokens[rank]), rank) for rank in sorted(tokens))
    vocabulary_file.write_bytes(b"".join(lines))
