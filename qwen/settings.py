"""A checkpoint's settings of generation and tokenizer: their types, ids that end a reply, what of them can be saved."""

import copy
import warnings
from collections.abc import Collection
from typing import Any

from transformers import GenerationConfig

from .chatml import complete_eos_ids
from .errors import QwenError

WHOLE = ("max_new_tokens", "max_length", "min_length", "min_new_tokens", "top_k", "num_beams", "max_window_size")
FRACTIONS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty")
IDS = ("eos_token_id", "pad_token_id", "bos_token_id")
SWITCHES = ("do_sample", "use_cache")
SAMPLING = ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty")
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "typical_p": 1.0}  # what transformers does not complain of


def check_settings(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """The content of a generation_config.json with numbers of the type that is meant: 50.0 is 50 where ids are counted.

    Raises:
        QwenError: a value is no number, or `stop_words_ids` is no list of id lists; `where` is named.
    """
    checked = dict(settings)
    for name in (*WHOLE, *FRACTIONS):
        value = settings.get(name)
        if value is None:
            continue
        whole = name in WHOLE
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15
        if not number or (whole and value != int(value)):
            kind = "a whole number" if whole else "a number"
            raise QwenError(f"{where}: {name} is {value!r} and should be {kind}: correct it there")
        checked[name] = int(value) if whole else float(value)
    for name in IDS:
        if settings.get(name) is not None:
            checked[name] = check_ids(settings[name], f"{where}: {name}")
    for name in SWITCHES:
        if name in settings and settings[name] not in (True, False, None):  # 0 and 1 are equal to these
            raise QwenError(f"{where}: {name} is {settings[name]!r} and should be true or false: correct it there")
    if settings.get("stop_words_ids"):
        check_stop_words_ids(settings["stop_words_ids"], where)
    try:
        GenerationConfig.from_dict(dict(checked)).validate()
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise QwenError(f"{where} has a value that can't be used: {' '.join(str(error).split())[:300]}") from None
    return checked


def check_ids(value: Any, name: str) -> int | list[int]:
    """One token id or a list of them, 50.0 taken as 50; QwenError for anything else."""
    ids = value if isinstance(value, list) else [value]
    if not ids or any(type(i) not in (int, float) or not 0 <= i < 2**31 or i != int(i) for i in ids):
        raise QwenError(f"{name} is {value!r} and should be a token id, or a list of some: correct it there")
    return [int(i) for i in ids] if isinstance(value, list) else int(value)


def check_stop_words_ids(stop_words_ids: Any, where: str) -> None:
    """QwenError unless these are lists of token ids, as `generate` takes them."""
    lists = isinstance(stop_words_ids, (list, tuple)) and all(
        isinstance(word, (list, tuple)) and word and all(type(i) is int for i in word) for word in stop_words_ids
    )
    if not lists:
        raise QwenError(
            f"{where}: stop_words_ids is {str(stop_words_ids)[:80]} and should be a list of lists of token ids, such "
            "as [[151645], [151644]]; stop words as text are for chat()"
        )


def repair(config: GenerationConfig) -> list[str]:
    """Take out, in place, what contradicts greedy search or a single beam and stops transformers from saving it; the
    names of what was taken out."""
    names = [] if config.do_sample else list(SAMPLING)
    names += [] if (config.num_beams or 1) > 1 else list(BEAMS)
    removed = []
    for name in names:
        value = getattr(config, name, None)
        if value is not None and value is not False and value != NEUTRAL.get(name):
            setattr(config, name, None)
            removed.append(name)
    return removed


def prepare(config: GenerationConfig, where: str) -> None:
    """Make settings that were just read usable and saveable, in place, with a word where something had to go."""
    for name, value in check_settings(config.to_dict(), where).items():
        if getattr(config, name, None) is not None and name in (*WHOLE, *FRACTIONS, *IDS):
            setattr(config, name, value)
    if removed := repair(config):
        warnings.warn(
            f"{where}: without do_sample {', '.join(removed)} had no effect, left out of the settings", stacklevel=3
        )
    complete_eos_ids(config)


def saveable(config: GenerationConfig) -> GenerationConfig:
    """A copy that transformers agrees to save: settings must never stop weights from being written."""
    config = copy.deepcopy(config)
    repair(config)
    complete_eos_ids(config)
    try:
        config.validate(strict=True)
    except ValueError as error:
        warnings.warn(f"generation settings are saved without what is wrong in them: {error}", stacklevel=3)
        kept = {name: getattr(config, name, None) for name in ("chat_format", "eos_token_id", "pad_token_id")}
        config = GenerationConfig(**kept)
    return config


# ---- the tokenizer's ----

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MORE_TOKENS = ("additional_special_tokens", "extra_special_tokens")
CHOICES = {
    "padding_side": ("left", "right"),
    "truncation_side": ("left", "right"),
    "errors": ("strict", "replace", "ignore", "backslashreplace", "surrogateescape"),
}


def check_tokenizer_settings(settings: dict[str, Any], where: str, control: Collection[str]) -> dict[str, Any]:
    """What of a tokenizer_config.json (or special_tokens_map.json) this tokenizer takes, in the types that are meant.

    Raises:
        QwenError: a value is of no use, or names a token that is none of the `control` tokens: its text would be read
            as other ids than those that the checkpoint was trained with. `where` is named.
    """
    checked: dict[str, Any] = {"added_tokens_decoder": {}}
    if settings.get("init_inputs"):
        raise QwenError(f"{where}: init_inputs is of another tokenizer: take it out")
    for name in ROLES:
        if settings.get(name) is not None:
            checked[name] = check_token(settings[name], f"{where}: {name}", control)
    for name in MORE_TOKENS:
        if tokens := settings.get(name):
            tokens = list(tokens.values()) if isinstance(tokens, dict) else tokens
            if not isinstance(tokens, list):
                raise QwenError(f"{where}: {name} is {tokens!r} and should be a list: correct it there")
            checked[name] = [check_token(token, f"{where}: {name}", control) for token in tokens]
    added = settings.get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise QwenError(f"{where}: added_tokens_decoder is {added!r}: take it out, its tokens are known here")
    for token in added.values():
        check_token(token, f"{where}: a token of added_tokens_decoder", control)
    for name, choices in CHOICES.items():
        if settings.get(name) is not None and settings[name] not in choices:
            raise QwenError(f"{where}: {name} is {settings[name]!r} and should be one of {', '.join(choices)}")
    length = settings.get("model_max_length")
    if length is not None and (type(length) not in (int, float) or not length > 0):
        raise QwenError(f"{where}: model_max_length is {length!r} and should be a number of tokens: correct it there")
    template = settings.get("chat_template")
    named = isinstance(template, list) and all(
        isinstance(t, dict) and {"name", "template"} <= t.keys() for t in template
    )
    if template is not None and not isinstance(template, (str, dict)) and not named:
        raise QwenError(
            f"{where}: chat_template is {str(template)[:60]!r} and should be a text: take it out, or mend it"
        )
    return checked


def check_token(token: Any, name: str, control: Collection[str]) -> str:
    """The text of a control token, however it is written."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or text not in control:
        raise QwenError(
            f"{name} is {text!r}, which is none of this tokenizer's control tokens: name one of them, such as "
            "<|endoftext|> or <|extra_0|>, or take the setting out"
        )
    return text
