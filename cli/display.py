"""What the chat shows: replies as streamed Markdown on a terminal, as plain text everywhere else.

Nothing that is shown can drive the terminal: control characters are shown as pictures of themselves.
"""

import re
import sys
import time
from typing import TextIO

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich import markdown
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.segment import Segment
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

THEME = Theme({"markdown.code": "cyan", "markdown.code_block": "none"})  # rich's black boxes are ugly on light screens
CODE_THEME = "ansi_dark"
CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}  # U+2400 and on: their pictures
CONTROLS |= {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)} | {0x7F: "\u2421"}
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})([^\n]*)\n")
BLANK_LINES = re.compile(r"(?:[ \t]*\n)*")


def visible(text: str) -> str:
    """The text with every control character but newline and tab replaced by something to see."""
    return text.replace("\r\n", "\n").translate(CONTROLS)


# ---- Markdown that loses nothing ----


class Fenced(markdown.CodeBlock):
    """A code block with its fence lines, dim: the language stays visible, and copied lines are not indented."""

    @classmethod
    def create(cls, markdown: markdown.Markdown, token: Token) -> "Fenced":
        block = cls((token.info.split() or ["text"])[0], markdown.code_theme)
        block.opening, block.closing = token.markup + token.info.rstrip(), token.markup
        return block

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = highlight(self.text.plain.removesuffix("\n"), self.lexer_name)
        if not self.closing:
            yield Padding(code, (0, 0, 0, 4))  # marked by its indentation alone
        else:
            yield Group(Text(self.opening, style="dim"), code, Text(self.closing, style="dim"))


class Heading(markdown.Heading):
    LEVEL_ALIGN = {}  # all on the left


class ListItem(markdown.ListItem):
    """An item with the number that was written, shown even when it is empty, as the whole of the reply "4." is."""

    @classmethod
    def create(cls, markdown: markdown.Markdown, token: Token) -> "ListItem":
        item = cls()
        item.label = token.info + token.markup
        return item

    def on_leave(self, context: markdown.MarkdownContext) -> None:
        if not list(self.elements):
            self.elements.append(Text(""))
        super().on_leave(context)

    def render_number(self, console: Console, options: ConsoleOptions, *counted: int) -> RenderResult:
        return super().render_number(console, options, self.label, self.label)


class WholeTable(markdown.TableElement):
    """A table that folds long words instead of cutting them."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in super().__rich_console__(console, options):
            for column in table.columns:
                column.overflow = "fold"
            yield table


class ChatMarkdown(markdown.Markdown):
    """Markdown where only marks of emphasis and structure vanish: HTML, links, backslashes and line breaks stay."""

    elements = markdown.Markdown.elements | {
        "fence": Fenced,
        "code_block": Fenced,
        "heading_open": Heading,
        "list_item_open": ListItem,
        "table_open": WholeTable,
    }

    def __init__(self, tokens: list[Token]) -> None:
        super().__init__("", code_theme=CODE_THEME)
        self.parsed = tokens

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Without rich's blank lines at both ends: the distance between blocks is that of the source."""
        lines = list(Segment.split_lines(super().__rich_console__(console, options)))
        full = [i for i, line in enumerate(lines) if any(segment.text.strip() for segment in line)]
        for line in lines[min(full) : max(full) + 1] if full else []:
            yield from line
            yield Segment.line()


def parse_markdown(source: str) -> list[Token]:
    """Block tokens of the source; what Markdown would hide or resolve is left as text."""
    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    parser.disable(["reference", "link", "image", "autolink", "text_join"])
    tokens = parser.parse(source)
    for token in tokens:
        for child in token.children or []:
            if child.type == "text_special":  # `\(` and `&lt;`, as they were written
                child.type, child.content = "text", child.markup
            elif child.type == "softbreak":
                child.type = "hardbreak"
    return tokens


def letters(text: str) -> str:
    return "".join(filter(str.isalnum, text))


def render_markdown(source: str) -> RenderableType:
    """The source as Markdown, or as it is where Markdown would lose a letter of it (a table row with a cell too many)
    or all of it (a lone dash)."""
    tokens = parse_markdown(source)
    kept = letters("".join(map(shown_text, tokens)))
    if not kept or kept != letters(source):
        return Text(source.rstrip("\n"))
    return ChatMarkdown(tokens)


def shown_text(token: Token) -> str:
    """What is shown of a block token: texts, the language of a code block, the number of a list item."""
    return token.info + "".join(child.content for child in token.children or [token])


def highlight(code: str, language: str) -> Syntax:
    """Code that is wrapped to the space there is."""
    return Syntax(code, language, theme=CODE_THEME, background_color="default", word_wrap=True)


def last_line(lines: list[str], language: str) -> Text:
    """The last of some lines of code, highlighted in the light of those before.

    The terminal wraps it, so that a long line is copied as one.
    """
    text = highlight("", language).highlight("\n".join(lines)).split("\n", allow_blank=True)[len(lines) - 1]
    text.no_wrap, text.overflow = True, "ignore"
    return text


def first_block(text: str) -> int:
    """Length of the first block or list item, 0 while more text could still change it.

    It is final once a line that does not belong to it is complete.
    """
    complete = text[: text.rfind("\n") + 1]
    starts = [token.map[0] for token in parse_markdown(complete) if begins_block(token)]
    later = [line for line in starts if line > min(starts)]
    if not later:
        return 0
    block = "\n".join(complete.split("\n")[: min(later)])
    return complete.index("\n", len(block.rstrip())) + 1  # blank lines after it belong to the next


def begins_block(token: Token) -> bool:
    """Whether a block that may be printed apart begins here: one at the top level, or an item of a list there."""
    if token.map is None or token.nesting < 0:
        return False
    return token.level == 0 or token.type == "list_item_open" and token.level == 1


class LastLines:
    """As much of the end of a renderable as fits on the screen."""

    def __init__(self, *parts: RenderableType) -> None:
        self.group = Group(*parts)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = max(1, console.height - 2)
        for line in console.render_lines(self.group, options, pad=False)[-room:]:
            yield from line
            yield Segment.line()


# ---- the two ways to show a reply ----


class PlainStream:
    """Writes a growing reply as it comes."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.written = 0

    def __enter__(self) -> "PlainStream":
        return self

    def update(self, reply: str) -> None:
        """Show the reply so far, which begins with all that was shown before."""
        text = visible(reply)
        self.file.write(text[self.written :])
        self.file.flush()
        self.written = len(text)

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None or self.written:
            self.file.write("\n")
            self.file.flush()


class MarkdownStream:
    """Prints a growing reply as Markdown: finished blocks for good, and only the unfinished end is drawn anew.

    So nothing that has scrolled away is touched, and the scrollback holds the reply once. Of an unfinished block that
    is taller than the screen (a long table) the end is shown until it is finished; code is printed line by line.
    """

    def __init__(self, console: Console, interval: float = 0.06) -> None:
        self.console = console
        self.interval = interval  # seconds between two drawings; faster looks no smoother and costs the model time
        self.drawn = 0.0
        self.text = ""
        self.printed = 0  # characters of the text that are printed for good
        self.fence = ""  # the mark that will close the code block we are in
        self.language = ""
        self.code: list[str] = []  # its complete lines
        self.live = Live(Text("...", style="dim"), console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> "MarkdownStream":
        self.live.start(refresh=True)
        return self

    def update(self, reply: str) -> None:
        """Show the reply so far, which begins with all that was shown before."""
        self.text = visible(reply)
        now = time.monotonic()
        if now - self.drawn >= self.interval:
            self.drawn = now
            self._draw(self._take_finished(), self._unfinished())

    def __exit__(self, *exception: object) -> None:
        self.text += "\n"  # the last line is complete, and what is unfinished stays as it is
        self._draw([*self._take_finished(), *self._unfinished()], rest=[])
        self.live.stop()

    def _draw(self, finished: list[RenderableType], rest: list[RenderableType]) -> None:
        """Print the finished parts and the rest below them, all in one write, so that nothing flickers."""
        self.live.update(LastLines(*rest))
        if finished:
            self.console.print(Group(*finished), crop=False)  # rich also replaces the live rest here
        else:
            self.live.refresh()

    def _blank_line(self, gap: int) -> list[RenderableType]:
        return [Text("")] if gap and self.printed else []

    def _take_finished(self) -> list[RenderableType]:
        """What has become final since the last time."""
        parts: list[RenderableType] = []
        while True:
            rest = self.text[self.printed :]
            gap = 0
            if self.fence:
                length = rest.find("\n") + 1
                if length:
                    parts.append(self._take_code(rest[: length - 1]))
            else:
                gap = BLANK_LINES.match(rest).end()
                opening = FENCE.match(rest, gap)
                if opening and not (opening[1][0] == "`" and "`" in opening[2]):
                    length = opening.end() - gap
                    parts += [*self._blank_line(gap), self._enter_fence(opening)]
                elif length := first_block(rest[gap:]):
                    parts += [*self._blank_line(gap), render_markdown(rest[gap : gap + length])]
            if not length:
                return parts
            self.printed += gap + length

    def _enter_fence(self, opening: re.Match) -> RenderableType:
        self.fence, self.code = opening[1], []
        self.language = (opening[2].split() or ["text"])[0]
        return Text(opening[0].strip(), style="dim")

    def _take_code(self, line: str) -> RenderableType:
        """One complete line inside a fence, the closing fence included."""
        mark = line.strip()
        if len(mark) >= len(self.fence) and set(mark) == {self.fence[0]} and len(line) - len(line.lstrip()) < 4:
            self.fence = ""
            return Text(mark, style="dim")
        self.code.append(line)
        return last_line(self.code, self.language)

    def _unfinished(self) -> list[RenderableType]:
        """What may still change."""
        rest = self.text[self.printed :]
        if self.fence:
            return [Text(rest)] if rest else []
        gap = BLANK_LINES.match(rest).end()
        if not rest.strip():
            return []
        half_a_fence = "\n" not in rest[gap:] and FENCE.match(rest + "\n", gap)
        return [*self._blank_line(gap), Text(rest[gap:]) if half_a_fence else render_markdown(rest[gap:])]


class Display:
    """The chat's two outputs: replies, and notes about them; on a terminal both are the same."""

    def __init__(self, replies: Console, notes: Console, rich_replies: bool) -> None:
        self.replies = replies
        self.notes = notes
        self.rich_replies = rich_replies

    def reply(self) -> PlainStream | MarkdownStream:
        """A context to show one reply in."""
        if self.rich_replies:
            return MarkdownStream(self.replies)
        return PlainStream(self.replies.file)

    def end_turn(self) -> None:
        """Leave a line free before the next prompt, where there is one."""
        if self.notes is self.replies:
            self.notes.print()

    def say(self, text: str, style: str = "") -> None:
        """A line about the chat."""
        self.notes.print(Text(visible(text), style=style), soft_wrap=not self.notes.is_terminal)

    def table(self, rows: list[tuple[str, str]]) -> None:
        """Names and what they mean, in two columns."""
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for name, meaning in rows:
            grid.add_row(Text(visible(name), style="bold"), Text(visible(meaning)))
        self.notes.print(grid)

    def clear(self) -> None:
        """Clear the screen, where there is one."""
        self.notes.clear()


def make_console(file: TextIO, plain: bool) -> Console:
    """A console that takes text as it is: no markup, no emoji codes, no guesses at what to highlight."""
    return Console(
        file=file,
        force_terminal=file.isatty(),  # whatever FORCE_COLOR says: a pipe gets plain text
        color_system=None if plain else "auto",
        markup=False,
        emoji=False,
        highlight=False,
        theme=THEME,
    )


def make_display(plain: bool, interactive: bool) -> Display:
    """Replies go to stdout; notes too where someone chats on it, otherwise to stderr."""
    replies = make_console(sys.stdout, plain)
    notes = replies if interactive and sys.stdout.isatty() else make_console(sys.stderr, plain)
    return Display(replies, notes, rich_replies=replies.is_terminal and not replies.is_dumb_terminal and not plain)
