"""Run code that a model wrote, as well isolated as the system allows without a container.

Every program gets a Python process of its own (see sandbox_child.py for the layers). This holds against mistakes and
common mischief; whoever fears an attacker runs the evaluation in a virtual machine.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen import QwenError
from qwen.hardware import num_processors

CHILD = Path(__file__).with_name("sandbox_child.py")
START_S = 30  # to start Python and put the layers on, which does not count as the program's time
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Outcome:
    passed: bool
    reason: str = ""


class Sandbox:
    """Runs programs, each for `seconds` of wall clock and with `memory` bytes at most."""

    def __init__(self, seconds: float = 3.0, memory: int = 1024 * MEGABYTE) -> None:
        if os.name != "posix":
            raise QwenError("running generated code needs Linux or macOS: score it there with --rescore")
        self.seconds = seconds
        self.limits = {
            "RLIMIT_CPU": int(seconds) + 2,
            "RLIMIT_AS": memory,
            "RLIMIT_FSIZE": MEGABYTE,
            "RLIMIT_NOFILE": 32,
            "RLIMIT_CORE": 0,
            "RLIMIT_NPROC": 0,
        }

    @cached_property
    def layers(self) -> list[str]:
        """The layers that are active on this system."""
        found: list[str] = []
        outcome = self.run("pass", found)
        if not outcome.passed:
            raise QwenError(f"not even an empty program runs in the sandbox here: {outcome.reason}")
        return found

    def run(self, program: str, layers: list[str] | None = None) -> Outcome:
        """Run a program; it has passed if it reaches its end within the limits."""
        ours, theirs = socket.socketpair()
        with tempfile.TemporaryDirectory(prefix="qwen-eval-", ignore_cleanup_errors=True) as folder, ours:
            os.chmod(folder, 0o777)  # the program runs as another user where root starts it
            process = subprocess.Popen(
                [sys.executable, "-I", str(CHILD), str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
            theirs.close()
            try:
                return self._watch(process, ours, program, layers if layers is not None else [])
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _watch(self, process: subprocess.Popen, channel: socket.socket, program: str, layers: list[str]) -> Outcome:
        word = secrets.token_hex(16)
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(json.dumps({"program": program, "limits": self.limits}).encode())
        started = read_message(channel, START_S)
        if started is None:
            return Outcome(False, "the sandbox did not start")
        layers += started["layers"]
        with contextlib.suppress(OSError):
            channel.sendall(word.encode())
        begun = time.monotonic()
        verdict = read_message(channel, self.seconds)
        if verdict is None:
            late = time.monotonic() - begun >= self.seconds
            return Outcome(False, f"still running after {self.seconds:g} s" if late else "ended without a verdict")
        if verdict.get("passed") == word:
            return Outcome(True)
        return Outcome(False, str(verdict.get("failed", "a forged verdict")))

    def run_all(self, programs: Sequence[str], title: str = "running code") -> list[Outcome]:
        """Outcomes in order; as many programs at a time as there are processors."""
        with ThreadPoolExecutor(num_processors()) as pool:
            return list(tqdm(pool.map(self.run, programs), total=len(programs), desc=title, unit="program"))


def read_message(channel: socket.socket, seconds: float) -> dict[str, Any] | None:
    """One line of JSON from the child; None if it ended, wrote something else, or took longer."""
    deadline = time.monotonic() + seconds
    data = b""
    while not data.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or len(data) > 4096:
            return None
        channel.settimeout(left)
        try:
            piece = channel.recv(1)  # not more: the next message may follow at once
        except OSError:  # the time is up, or the child was killed
            return None
        if not piece:
            return None
        data += piece
    try:
        message = json.loads(data)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None
