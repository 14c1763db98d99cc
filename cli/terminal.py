"""Where the chat's lines come from: a line editor on a terminal, plain lines elsewhere; and what Ctrl-C does."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from .commands import COMMANDS
from .session import ChatSession
from .settings import SETTINGS

try:
    import termios
except ImportError:  # Windows
    termios = None

PROMPT = "> "


class LineInterrupt(KeyboardInterrupt):
    """Ctrl-C that took back what had been typed."""


# ---- lines ----


def read_plain_line() -> str:
    """The next line of stdin; EOFError after the last."""
    line = sys.stdin.readline() if sys.stdin else ""
    if not line:
        raise EOFError
    return line.removesuffix("\n").removesuffix("\r")


def read_terminal_line(session: ChatSession) -> str:
    """A line from a terminal that is too simple for the line editor, such as an Emacs shell."""
    session.display.notes.file.write(PROMPT)
    session.display.notes.file.flush()
    try:
        return read_plain_line()
    except (EOFError, KeyboardInterrupt):
        session.display.say("")  # leave the line of the prompt
        raise


def make_line_editor(session: ChatSession, state_dir: Path | None) -> Callable[[], str]:
    """A function that lets the user edit a message of one or more lines; EOFError on Ctrl-D, KeyboardInterrupt
    on Ctrl-C, LineInterrupt where it took back some text."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    @keys.add("<sigint>")
    def _(event: KeyPressEvent) -> None:
        # With text in the line, Ctrl-C means the line; only on an empty line it means the chat.
        typed = bool(event.current_buffer.text)
        event.app.exit(exception=LineInterrupt() if typed else KeyboardInterrupt(), style="class:aborting")

    editor: PromptSession[str] = PromptSession(
        [("bold", PROMPT)],
        history=open_line_history(state_dir),
        completer=CommandCompleter(session),
        complete_while_typing=True,
        multiline=True,
        prompt_continuation=lambda width, line, wraps: " " * width,
        key_bindings=keys,
        output=create_output(sys.stdout if sys.stdout.isatty() else sys.stderr),
        reserve_space_for_menu=4,
    )
    # The terminal may send bytes that are no UTF-8, which arrive as lone surrogates.
    return lambda: editor.prompt().encode("utf-8", "replace").decode("utf-8")


class CommandCompleter(Completer):
    """Completes command names, the names of settings, and files."""

    def __init__(self, session: ChatSession) -> None:
        self.session = session
        self.paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """What could follow the text before the cursor."""
        typed = document.text_before_cursor
        command, space, argument = typed.partition(" ")
        if not space:
            for name in COMMANDS:
                if typed and f":{name}".startswith(typed):
                    yield Completion(f":{name}", -len(typed), display_meta=self.session.texts(f"help_{name}"))
        elif command == ":conf":
            word = argument.split(" ")[-1]
            yield from (Completion(f"{name}=", -len(word)) for name in SETTINGS if name.startswith(word))
        elif command in (":save", ":load"):
            yield from self.paths.get_completions(Document(argument), complete_event)


class LineHistory(FileHistory):
    """Lines kept in a file for the next chat; a full disk must not end this one."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string.encode("utf-8", "replace").decode("utf-8"))


def open_line_history(directory: Path | None) -> History:
    """The line history in a directory of the user's, readable to the user alone; in memory where that can't be had."""
    if directory is not None:
        path = directory / "cli_history"
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            return LineHistory(str(path))
    return InMemoryHistory()


def find_state_dir() -> Path | None:
    """The directory for what the chat keeps between runs; None if there is no home directory."""
    default = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_STATE_HOME")
    with contextlib.suppress(RuntimeError):
        return Path(default or "~/.local/state").expanduser() / "qwen-7b"
    return None


# ---- Ctrl-C during a reply ----


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, which stops the reply; the second is a KeyboardInterrupt."""
    stop = threading.Event()

    def on_interrupt(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        with no_echo():
            yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def no_echo() -> Iterator[None]:
    """Keys typed meanwhile wait for the next prompt, and don't appear in the middle of a reply."""
    if termios is None or not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
