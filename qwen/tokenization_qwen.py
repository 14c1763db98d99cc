"""QWenTokenizer: tiktoken's byte-pair encoding behind the interface of transformers' tokenizers.

Regular tokens are `bytes` and control tokens `str`, so neither can be taken for the other.
"""

import base64
import binascii
import os
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import tiktoken
from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer
from transformers.tokenization_utils_base import PaddingStrategy, TruncationStrategy
from transformers.utils import logging

from .chat_template import chat_template, template_system
from .chatml import DEFAULT_SYSTEM, encode_with_mask
from .checkpoint import check_vocabulary, read_json
from .errors import QwenError
from .history import check_text, plain_messages
from .keywords import translate_hub_keywords
from .offsets import fit_row, token_offsets
from .push_code import push_code_to
from .settings import check_token, check_tokenizer_settings

logger = logging.get_logger(__name__)

VOCAB_FILE = "qwen.tiktoken"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))

READING_OPTIONS = ("allowed_special", "disallowed_special", "split_special_tokens")

Specials = Literal["all"] | Collection[str]  # which control tokens text may spell, with tiktoken's meaning


def load_ranks(path: str) -> dict[bytes, int]:
    """Read a vocabulary of lines `base64 rank`.

    Raises:
        QwenError: the file is missing, a git-lfs pointer, or has a broken line.
    """
    check_vocabulary(path)
    with open(path, "rb") as file:
        lines = file.read().splitlines()
    ranks = {}
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise QwenError(
                f"{path}, line {number}: expected `base64 rank`, found {line[:40]!r}; download the file again"
            ) from None
    if not ranks:
        raise QwenError(f"{path} is empty: download it again")
    if (
        len({*ranks.values()}) < len(lines)
        or not 0 <= min(ranks.values()) <= max(ranks.values()) < 2**31
        or b"" in ranks
    ):
        raise QwenError(f"{path} is damaged (a token or an id is there twice, or impossible): download it again")
    return ranks


def read_settings(directory: Path) -> dict[str, Any]:
    """A directory's settings of the tokenizer as far as they need a look first: transformers takes them as they are.

    Raises:
        QwenError: one of the files is broken, or names tokens that this tokenizer does not have.
    """
    found = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second rules
        if (path := directory / name).is_file():
            found |= check_tokenizer_settings(read_json(path), str(path), SPECIAL_TOKENS)
    if (path := directory / "added_tokens.json").is_file():
        for token in read_json(path):
            check_token(token, f"{path}: a token", SPECIAL_TOKENS)
    return found


def first_free_id(ranks: dict[bytes, int]) -> int:
    """Where the control tokens begin: the first id that no regular token has (extra vocabularies lie beyond them)."""
    taken = set(ranks.values())
    return next(i for i in range(len(ranks) + 1) if i not in taken)


class QWenTokenizer(PreTrainedTokenizer):
    """Encodes NFC-normalised text to ids and back.

    Args:
        vocab_file: the checkpoint's `qwen.tiktoken`.
        errors: what to do with broken UTF-8 when decoding, as in `bytes.decode`; each call may say otherwise.
        extra_vocab_file: more regular tokens in the same format, their ids above all control tokens. A token that
            exists or an id that is taken is skipped with a warning. Every merge on the way to a token must exist.
        default_system: the system message of chats that bring none; kept in tokenizer_config.json. None is Qwen's.
    """

    vocab_files_names = {"vocab_file": VOCAB_FILE}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str,
        errors: str = "replace",
        extra_vocab_file: str | None = None,
        default_system: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.errors = errors
        self.default_system = DEFAULT_SYSTEM if default_system is None else default_system
        check_text(self.default_system, "default_system (in tokenizer_config.json)")
        self.mergeable_ranks = load_ranks(vocab_file)
        if missing := next((i for i in range(256) if bytes([i]) not in self.mergeable_ranks), None):
            raise QwenError(f"{vocab_file} has no token for the byte {missing}: download it again")
        start = first_free_id(self.mergeable_ranks)
        self.special_tokens = {token: start + i for i, token in enumerate(SPECIAL_TOKENS)}
        if extra_vocab_file is not None:
            self._add_ranks(extra_vocab_file)
        self.tokenizer = tiktoken.Encoding(
            "Qwen", pat_str=PATTERN, mergeable_ranks=self.mergeable_ranks, special_tokens=self.special_tokens
        )
        self.decoder: dict[int, bytes | str] = {i: token for token, i in self.mergeable_ranks.items()}
        self.decoder |= {i: token for token, i in self.special_tokens.items()}
        self.eod_id = self.special_tokens["<|endoftext|>"]
        self.im_start_id = self.special_tokens["<|im_start|>"]
        self.im_end_id = self.special_tokens["<|im_end|>"]
        self.special_ids = frozenset(self.special_tokens.values())

        kwargs.pop("added_tokens_decoder", None)  # the control tokens are fixed; a saved list of them adds nothing
        own = chat_template(self.default_system)
        template = kwargs.setdefault("chat_template", own)
        if isinstance(template, str) and template_system(template) is not None:
            kwargs["chat_template"] = own  # where one was saved, and the default system message edited since
        for role in ("eos_token", "pad_token"):  # the publisher's has neither, and collators and pipelines want both
            if kwargs.get(role) is None:
                kwargs[role] = SPECIAL_TOKENS[0]
        self._added_tokens_decoder = {
            i: AddedToken(token, special=True, normalized=False) for token, i in self.special_tokens.items()
        }
        super().__init__(errors=errors, default_system=self.default_system, **kwargs)

    def _add_ranks(self, extra_vocab_file: str) -> None:
        taken = {*self.mergeable_ranks.values(), *self.special_tokens.values()}
        for token, rank in load_ranks(extra_vocab_file).items():
            if token in self.mergeable_ranks:
                logger.warning(f"{extra_vocab_file}: token {token!r} exists already, skipped")
            elif rank in taken:
                logger.warning(f"{extra_vocab_file}: id {rank} of token {token!r} is taken, skipped")
            else:
                self.mergeable_ranks[token] = rank
                taken.add(rank)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, but say of a local directory without vocabulary what is missing (QwenError)."""
        translate_hub_keywords(kwargs)
        directory = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if directory.is_dir():
            check_vocabulary(directory / VOCAB_FILE)
            kwargs = {**read_settings(directory), **kwargs}
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except UnicodeDecodeError as error:  # of chat_template.jinja
            raise QwenError(f"{directory} has a text file that is not UTF-8 ({error}): download it again") from None

    # ---- the vocabulary ----

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.n_vocab

    def __len__(self) -> int:
        return self.tokenizer.n_vocab

    def get_vocab(self) -> dict[bytes | str, int]:
        return {**self.mergeable_ranks, **self.special_tokens}

    def _add_tokens(self, new_tokens: Sequence[str | AddedToken], special_tokens: bool = False) -> int:
        """Accept names of the 208 control tokens as roles (pad, eos, ...); refuse all else."""
        for token in new_tokens or ():
            if str(token) not in self.special_tokens:
                kind = "control" if special_tokens else "regular"
                raise ValueError(
                    f"cannot add {str(token)!r} as a {kind} token: "
                    + (
                        "only <|endoftext|>, <|im_start|>, <|im_end|> and <|extra_0|> to <|extra_204|> can be named so"
                        if special_tokens
                        else "give new regular tokens in a file, QWenTokenizer(extra_vocab_file=...)"
                    )
                )
        return 0

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        path = os.path.join(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + VOCAB_FILE)
        with open(path, "wb") as file:
            file.writelines(b"%s %d\n" % (base64.b64encode(t), rank) for t, rank in self.mergeable_ranks.items())
        return (path,)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, push_code: bool = False, **kwargs: Any
    ) -> tuple[str, ...]:
        """Write vocabulary and settings; `push_code` adds the code, to load them in plain transformers."""
        self.init_kwargs.pop("auto_map", None)  # of the directory it was loaded from: that code is not saved with it
        files = super().save_pretrained(save_directory, *args, **kwargs)
        if push_code:
            push_code_to(save_directory)
        return files

    # ---- text to ids ----

    def encode_text(self, text: str) -> list[int]:
        """Ids of text in which nothing is a control token, whatever it spells. All user text goes through here."""
        return self.tokenizer.encode_ordinary(unicodedata.normalize("NFC", text))

    def _text_to_ids(
        self, text: str, allowed_special: Specials = "all", disallowed_special: Specials = (), **kwargs: Any
    ) -> list[int]:
        if kwargs.get("split_special_tokens", self.split_special_tokens):
            return self.encode_text(text)
        text = unicodedata.normalize("NFC", text)
        return self.tokenizer.encode(text, allowed_special=allowed_special, disallowed_special=disallowed_special)

    def tokenize(self, text: str, **kwargs: Any) -> list[bytes | str]:
        """Tokens of `text`; `allowed_special` and `disallowed_special` have tiktoken's meaning, by default all / none.

        Raises:
            ValueError: the text spells a control token that is disallowed and not allowed.
        """
        return [self.decoder[i] for i in self._text_to_ids(text, **kwargs)]

    def __call__(
        self, text: Any = None, text_pair: Any = None, *args: Any, return_offsets_mapping: bool = False, **kwargs: Any
    ) -> BatchEncoding:
        """As in transformers; `return_offsets_mapping` adds each token's characters, which slow tokenizers refuse."""
        if not return_offsets_mapping:
            return super().__call__(text, text_pair, *args, **kwargs)
        texts = [text] if isinstance(text, str) else text
        refused = [name for name in ("is_split_into_words", "return_overflowing_tokens") if kwargs.get(name)]
        if text_pair is not None or refused or not all(isinstance(each, str) for each in texts):
            raise QwenError("return_offsets_mapping takes a text or a list of texts: no pairs, words, ids or overflow")
        tensors = kwargs.pop("return_tensors", None)
        wants_mask = kwargs.pop("return_attention_mask", True)
        encoded = super().__call__(list(texts), *args, return_attention_mask=True, **kwargs)
        reading = {name: kwargs[name] for name in READING_OPTIONS if name in kwargs}
        offsets = [token_offsets(each, self.tokenize(each, **reading)) for each in texts]
        encoded["offset_mapping"] = self._fit_rows(offsets, encoded, (0, 0))
        if wants_mask is False:
            del encoded["attention_mask"]
        return _finish(encoded, isinstance(text, str), tensors)

    def _fit_rows(self, rows: list[list], encoded: BatchEncoding, fill: Any) -> list[list]:
        """A value for each token of a batch, cut and padded as the batch was."""
        cut_left = self.truncation_side == "left"
        masks = encoded["attention_mask"]
        return [fit_row(row, mask, fill, cut_left) for row, mask in zip(rows, masks, strict=True)]

    def encode(self, text: Any, *args: Any, **kwargs: Any) -> list[int]:
        """Ids of `text`; a bare string goes straight to tiktoken, which takes most of the time anyway."""
        if isinstance(text, str) and not args and kwargs.keys() <= {*READING_OPTIONS, "add_special_tokens"}:
            return self._text_to_ids(text, **kwargs)
        return super().encode(text, *args, **kwargs)

    def _item_to_ids(self, item: Any, is_split_into_words: bool = False, **kwargs: Any) -> list[int]:
        """Ids of a str, of a list of words or tokens, or of what is a list of ids already."""
        if isinstance(item, str):
            return self._text_to_ids(item, **kwargs)
        if is_split_into_words:
            return [i for word in item for i in self._text_to_ids(word, **kwargs)]
        return list(item) if all(isinstance(i, int) for i in item) else self.convert_tokens_to_ids(item)

    def _encode_plus(
        self,
        text: Any,
        text_pair: Any = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE,
        **kwargs: Any,
    ) -> BatchEncoding:
        """The base class's own, with ids straight from tiktoken: going through tokens would take most of the time."""
        # A batch comes back here item by item, a chat with marked control tokens piece by piece.
        if is_batch(text, kwargs.get("is_split_into_words", False)) or kwargs.get("sanitize_control_tokens"):
            strategies = {"padding_strategy": padding_strategy, "truncation_strategy": truncation_strategy}
            return super()._encode_plus(text, text_pair, **strategies, **kwargs)
        reading = {name: kwargs.pop(name) for name in (*READING_OPTIONS, "is_split_into_words") if name in kwargs}
        kwargs.pop("sanitize_control_tokens", None)
        return self.prepare_for_model(
            self._item_to_ids(text, **reading),
            None if text_pair is None else self._item_to_ids(text_pair, **reading),
            padding=padding_strategy.value,
            truncation=truncation_strategy.value,
            prepend_batch_axis=True,
            **kwargs,
        )

    def apply_chat_template(
        self,
        conversation: Any,
        *args: Any,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_dict: bool = True,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render messages; ids are made segment by segment, so text in messages never becomes a control token.

        Content may be a list of text parts. `return_assistant_tokens_mask` adds `assistant_masks`, 1 at the replies
        and the <|im_end|> that ends them. Tools, documents and templates other than ChatML go through transformers,
        control tokens in messages disarmed.
        """
        single = isinstance(conversation, Sequence) and bool(conversation) and isinstance(conversation[0], dict)
        chats = [plain_messages(each) for each in ([conversation] if single else conversation)]
        template = kwargs.get("chat_template") or self.chat_template
        other = template != chat_template(self.default_system)
        other = other or any(m.get("tool_calls") or m["role"] in ("tool", "function") for each in chats for m in each)
        if not tokenize or args or kwargs.get("tools") or kwargs.get("documents") or other:
            kwargs.setdefault("sanitize_control_tokens", tokenize)
            return super().apply_chat_template(
                chats[0] if single else chats,
                *args,
                tokenize=tokenize,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                return_dict=return_dict,
                tokenizer_kwargs=tokenizer_kwargs,
                **kwargs,
            )
        pairs = [encode_with_mask(self, each, add_generation_prompt, continue_final_message) for each in chats]
        layout = {name: kwargs[name] for name in ("padding", "truncation", "max_length") if name in kwargs}
        layout |= {**(tokenizer_kwargs or {}), "return_attention_mask": True}
        tensors = layout.pop("return_tensors", kwargs.get("return_tensors"))
        encoded = self([ids for ids, _ in pairs], add_special_tokens=False, **layout)
        if kwargs.get("return_assistant_tokens_mask"):
            encoded["assistant_masks"] = self._fit_rows([mask for _, mask in pairs], encoded, 0)
        encoded = _finish(encoded, single, tensors)
        return encoded if return_dict else encoded["input_ids"]

    # ---- ids and tokens ----

    def _convert_token_to_id(self, token: bytes | str) -> int | None:
        return self.special_tokens.get(token) if isinstance(token, str) else self.mergeable_ranks.get(token)

    def convert_tokens_to_ids(self, tokens: bytes | str | Sequence[bytes | str]) -> int | list[int] | None:
        if isinstance(tokens, (bytes, str)):
            return self._convert_token_to_id(tokens)
        return [self._convert_token_to_id(token) for token in tokens]

    def _convert_id_to_token(self, index: int) -> bytes | str:
        if index not in self.decoder:
            raise ValueError(f"id {index} is no token: the vocabulary has {len(self)}")
        return self.decoder[index]

    def convert_tokens_to_string(self, tokens: Sequence[bytes | str]) -> str:
        data = b"".join(token if isinstance(token, bytes) else token.encode() for token in tokens)
        return data.decode("utf-8", errors=self.errors)

    def _decode(
        self,
        token_ids: int | Sequence[int],
        skip_special_tokens: bool = False,
        errors: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Text of ids; rows of the embedding matrix that are no token (151851 and up) decode to nothing."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        tokens = (self.decoder.get(i, b"") for i in ids if not (skip_special_tokens and i in self.special_ids))
        data = b"".join(token if isinstance(token, bytes) else token.encode() for token in tokens)
        return data.decode("utf-8", errors=errors or self.errors)


def _finish(encoded: BatchEncoding, single: bool, tensors: Any) -> BatchEncoding:
    """A batch in the form asked for: tensors (one row is a batch of its own there), or lists."""
    if single and tensors is None:
        return BatchEncoding({name: rows[0] for name, rows in encoded.items()})
    return BatchEncoding(dict(encoded), tensor_type=tensors)


def is_batch(text: Any, is_split_into_words: bool) -> bool:
    """Whether `text` is several texts: a list of str, of id lists, or of word lists."""
    if not isinstance(text, (list, tuple)):
        return False
    item_types = (list, tuple) if is_split_into_words else (str, list, tuple)
    return not text or isinstance(text[0], item_types)
