"""A checkpoint's generation settings: their types, ids that end a reply, and what of them can be saved."""

import copy
import warnings
from typing import Any

from transformers import GenerationConfig

from .chatml import complete_eos_ids
from .errors import QwenError

WHOLE = ("max_new_tokens", "max_length", "min_length", "min_new_tokens", "top_k", "num_beams", "max_window_size")
FRACTIONS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty")
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
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (whole and value != int(value)):
            kind = "a whole number" if whole else "a number"
            raise QwenError(f"{where}: {name} is {value!r} and should be {kind}: correct it there")
        checked[name] = int(value) if whole else float(value)
    if settings.get("stop_words_ids"):
        check_stop_words_ids(settings["stop_words_ids"], where)
    return checked


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
        if getattr(config, name, None) is not None and name in (*WHOLE, *FRACTIONS):
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
