"""Text as Markdown that is safe to show: HTML in it is seen instead of run, pictures become links.

The page's own sanitiser and its content security policy stand behind this; here it is about seeing what was written.
"""

import re
from collections.abc import Callable

from markdown_it import MarkdownIt

FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[^\n]*$.*?(?:^ {0,3}\1[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)(`+)(?!`)(?:(?!\n[ \t]*\n).)+?(?<!`)\1(?!`)", re.DOTALL)
TAG = re.compile(r"<(?=[A-Za-z/!?])")
ENTITY = re.compile(r"&(?=#?\w+;)")
IMAGE = re.compile(r"!(?=\[)")


def show_html(text: str) -> str:
    """Markdown in which tags, entities and pictures outside of code are text. Code shows them as they are anyway."""
    shown = apply_outside(FENCE, text, lambda prose: apply_outside(SPAN, prose, escape))
    if (TAG.search(shown) or IMAGE.search(shown)) and is_active(shown):
        return escape(text)  # what looked like code is none
    return shown


def is_active(text: str) -> bool:
    """Whether a Markdown parser finds HTML or pictures in it."""
    tokens = MarkdownIt("commonmark").parse(text)
    return any(
        part.type in ("html_block", "html_inline", "image")
        for token in tokens
        for part in (token, *(token.children or []))
    )


def escape(prose: str) -> str:
    prose = ENTITY.sub("&amp;", prose)
    prose = TAG.sub("&lt;", prose)
    return IMAGE.sub("&#33;", prose)  # an image would be fetched from wherever a reply says


def apply_outside(pattern: re.Pattern[str], text: str, change: Callable[[str], str]) -> str:
    """`text` with `change` applied to what lies between the matches."""
    parts, start = [], 0
    for match in pattern.finditer(text):
        parts += [change(text[start : match.start()]), match[0]]
        start = match.end()
    return "".join([*parts, change(text[start:])])
