"""A terminal to test programs in: a pseudo-terminal whose output pyte, a terminal emulator, draws."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pyte

CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
# So that Ctrl-C becomes a signal; preexec_fn would do it too, but warns where there are threads.
TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """Runs a program in a terminal of its own, types into it, and reads what a person would see."""

    def __init__(self, command: list[str], env: dict[str, str], cwd: Path, columns: int = 80, rows: int = 24) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=100_000)
        self.stream = pyte.ByteStream(self.screen)
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, *command],
            stdin=slave, stdout=slave, stderr=slave, env=env, cwd=cwd, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.screen.write_process_input = self.write  # answers to "where is the cursor?"

    def lines(self) -> list[str]:
        """The scrollback and the screen, without blanks at the ends of lines."""
        above = ["".join(line[x].data for x in range(self.screen.columns)) for line in self.screen.history.top]
        return [line.rstrip() for line in [*above, *self.screen.display]]

    def text(self) -> str:
        return "\n".join(self.lines()).rstrip()

    def write(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def read(self, timeout: float) -> bool:
        """Draw what the program has written; false when it has closed its end."""
        if select.select([self.master], [], [], timeout)[0]:
            try:
                output = os.read(self.master, 65536)
            except OSError:  # what Linux says then
                return False
            self.stream.feed(output)
        return True

    def read_until(self, done: str | Callable[[], bool], timeout: float = 90) -> None:
        """Read until a text is shown or a condition holds; fails with the screen if that does not happen."""
        condition = (lambda: done in self.text()) if isinstance(done, str) else done
        deadline = time.monotonic() + timeout
        while not condition():
            open_ = self.read(0.1)
            assert condition() or open_ and time.monotonic() < deadline, f"no {done!r} in:\n{self.text()}"

    def at_prompt(self) -> bool:
        """Whether the cursor is behind an empty prompt."""
        line = self.screen.display[self.screen.cursor.y]
        return line.rstrip() == ">" and self.screen.cursor.x == 2

    def wait(self, timeout: float = 30) -> int:
        """The program's exit status, once it has ended."""
        deadline = time.monotonic() + timeout
        while self.read(0.1) and time.monotonic() < deadline:
            pass
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self.master)
