"""The interface's texts, in English and Chinese, from a texts.json."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

LANGUAGES = ("en", "zh")
FILE = Path(__file__).with_name("texts.json")


def default_language(environ: Mapping[str, str] = os.environ) -> str:
    """Chinese where the locale's messages are; else English."""
    names = (environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return "zh" if next(filter(None, names), "").startswith("zh") else "en"


class Texts:
    """One language of the table: `texts("key", name=value)` is the text with its values filled in."""

    def __init__(self, language: str, file: Path = FILE) -> None:
        table = json.loads(file.read_text(encoding="utf-8"))
        self._texts = {key: entry[language] for key, entry in table.items()}

    def __call__(self, key: str, **values: object) -> str:
        return self._texts[key].format(**values)
