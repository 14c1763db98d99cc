"""Streamed Markdown on a terminal emulator: all of the reply is shown, once, whatever it holds and however it comes."""

import io
import re

import pyte
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from cli.display import THEME, Display, MarkdownStream, PlainStream, letters, make_console, visible

PIECES = [
    "a", "bb ", "c d e ", "f1", "\n", "\n\n", "- ", "* ", "3. ", "12) ", "# ", "```", "```py\n", "~~~\n", "    ", "\t",
    "> ", "|", "| a | b |\n|---|---|\n", "| x | y | z |\n", "*", "**", "_", "`", "~~", "<b>", "</div>\n", "<!-- n -->",
    "[l](m)", "![i](j)", "[r]: s\n", "[/b]", r"\(", "\\", "&amp;", "---\n", "===\n", "  \n", "\u4f60\u597d",
    "\U0001f389", "\u00e9",
]  # fmt: skip


def terminal_console(width: int, height: int, colors: str | None = "standard") -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=colors, markup=False,
        emoji=False, highlight=False, theme=THEME, legacy_windows=False,
    )  # fmt: skip


def draw(output: str, width: int, height: int) -> list[str]:
    """What a terminal shows, scrollback first."""
    screen = pyte.HistoryScreen(width, height, history=10_000)
    pyte.Stream(screen).feed(output.replace("\n", "\r\n"))
    above = ["".join(line[x].data for x in range(width)) for line in screen.history.top]
    return [line.rstrip() for line in [*above, *screen.display]]


def stream(reply: str, step: int = 3, width: int = 60, height: int = 12) -> list[str]:
    """The terminal after a reply that came in pieces of `step` characters."""
    console = terminal_console(width, height)
    with MarkdownStream(console, interval=0) as shown:
        for end in range(0, len(reply) + step, step):
            shown.update(reply[:end])
    return draw(console.file.getvalue(), width, height)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(PIECES), max_size=40), st.sampled_from([1, 4, 50]), st.sampled_from([3, 6, 12]))
def test_every_letter_is_shown_once(pieces: list[str], step: int, height: int) -> None:
    reply = "".join(pieces)
    assert letters("".join(stream(reply, step, width=40, height=height))) == letters(reply)


def test_blocks_look_like_what_they_are() -> None:
    reply = "# Title\n\nSome **bold** text\nin lines\n\n- one\n  - two\n\n"
    reply += "3. three\n\n```py\nif x:\n\n    y()\n```\n> end"
    shown = "\n".join(stream(reply)).rstrip()
    assert shown == (
        "Title\n\nSome bold text\nin lines\n\n • one\n    • two\n\n 3. three\n\n```py\nif x:\n\n    y()\n```\n▌ end"
    )


@pytest.mark.parametrize("reply", ["4.", "-", "#", "2 < 3 > 1", "<b>x</b>", "[/b] [bold]", ":smile:", r"\(x\)", "&lt;"])
def test_text_that_markdown_would_swallow(reply: str) -> None:
    assert "".join(stream(reply)).strip() == reply


def test_scrolled_lines_are_never_drawn_again() -> None:
    reply = "\n\n".join(f"paragraph {i}" for i in range(30)) + "\n\n```\n" + "\n".join(f"code {i}" for i in range(30))
    console = terminal_console(40, 8)
    screen = pyte.HistoryScreen(40, 8, history=10_000)
    terminal = pyte.Stream(screen)
    scrolled: list[str] = []
    with MarkdownStream(console, interval=0) as shown:
        for end in range(0, len(reply) + 5, 5):
            shown.update(reply[:end])
            terminal.feed(console.file.getvalue().replace("\n", "\r\n"))
            console.file.seek(0)
            console.file.truncate()
            above = ["".join(line[x].data for x in range(40)) for line in screen.history.top]
            assert above[: len(scrolled)] == scrolled
            scrolled = above
    for i in range(30):
        assert sum(line.strip() == f"paragraph {i}" for line in scrolled) <= 1
    assert any("code 20" in line for line in scrolled), "code is printed before its end is known"


def test_a_long_line_of_code_can_be_copied_as_one_line() -> None:
    line = "x = [" + ", ".join(str(i) for i in range(40)) + "]"
    console = terminal_console(40, 8, colors=None)
    with MarkdownStream(console, interval=0) as shown:
        shown.update(f"```\n{line}\n```\n")
    assert line in console.file.getvalue().split("\n")
    assert line in "".join(stream(f"```\n{line}\n```\n", width=40))


def test_one_write_for_each_step() -> None:
    """A terminal that draws between two writes would flicker."""

    class Writes(io.StringIO):
        count = 0

        def write(self, text: str) -> int:
            self.count += bool(text)
            return super().write(text)

    console = terminal_console(40, 8)
    console.file = Writes()
    with MarkdownStream(console, interval=0) as shown:
        for reply in ("one", "one\n\ntwo", "one\n\ntwo\n\nthree", "one\n\ntwo\n\nthree\n- x\n- y"):
            before = console.file.count
            shown.update(reply)
            assert console.file.count == before + 1


def test_a_long_table_shows_its_end_and_then_all() -> None:
    rows = [f"| r{i} | x |" for i in range(30)]
    console = terminal_console(40, 10)
    with MarkdownStream(console, interval=0) as shown:
        shown.update("| a | b |\n|---|---|\n" + "\n".join(rows))
        lines = draw(console.file.getvalue(), 40, 10)
        assert any("r29" in line for line in lines) and not any("r1 " in line for line in lines)
    lines = draw(console.file.getvalue(), 40, 10)
    assert [line.split()[0] for line in lines if re.match(r" *r\d", line)] == [f"r{i}" for i in range(30)]


@pytest.mark.parametrize("attack", ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\x08\x08", "\rover", "\x7f", "\x0e"])
def test_text_cannot_drive_the_terminal(attack: str) -> None:
    file = io.StringIO()
    with PlainStream(file) as shown:
        shown.update(f"before{attack}after")
    console = make_console(io.StringIO(), plain=True)
    Display(console, console, rich_replies=False).say(f"before{attack}after")
    for output in (file.getvalue(), console.file.getvalue()):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", output)
        assert output.startswith("before") and "after" in output
    assert draw("", 60, 12) != stream(f"before{attack}after") == draw(visible(f"before{attack}after"), 60, 12)


def test_plain_stream_is_the_reply_and_a_newline() -> None:
    file = io.StringIO()
    with PlainStream(file) as shown:
        for reply in ("", "**one", "**one** <b>\ntwo"):
            shown.update(reply)
    assert file.getvalue() == "**one** <b>\ntwo\n"
