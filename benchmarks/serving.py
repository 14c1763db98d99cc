"""Servers under load: start them, be their clients, note their times. For bench_serve.py and bench_cpu.py."""

import asyncio
import json
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen import QwenError

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = (
    "Write a long story about a lighthouse keeper who finds a message in a bottle.",
    "Explain in detail how a steam engine works, part by part, from the boiler to the wheel.",
    "Describe the history of Rome from its founding to the end of the empire, century by century.",
    "List twenty animals of the savanna, and write two sentences about each of them.",
)
PADDING = "The sea was calm that evening, and the light turned slowly over the water. "
PADDINGS = (0, 4, 16, 1)  # sentences before a question: prompts of some 35 to 300 tokens
LENGTHS = (96, 64, 128, 80)  # tokens of replies
QUIET = 300.0  # seconds for a server to start


@dataclass
class Target:
    """A server to measure."""

    name: str
    command: list[str]
    port: int
    body: dict[str, Any] = field(default_factory=dict)  # what its requests say beside the common
    watched: bool = False  # whether `/health` is asked all the while
    process: subprocess.Popen | None = None


@dataclass
class Cell:
    """What one server did for one number of clients."""

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)  # seconds to the first token, a request each
    between: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


def start(target: Target) -> None:
    """Start a server and wait until it lists its models; QwenError, and nothing left of it, if it never does."""
    log = subprocess.DEVNULL
    try:
        target.process = subprocess.Popen(target.command, stdout=log, stderr=log, cwd=ROOT)
    except OSError as error:
        raise QwenError(f"{target.name} does not start: {error}") from error
    try:
        wait_for(target)
    except BaseException:
        stop(target)
        raise


def wait_for(target: Target) -> None:
    deadline = time.monotonic() + QUIET
    while time.monotonic() < deadline and target.process.poll() is None:
        try:
            status, _ = asyncio.run(get(target.port, "/v1/models"))
            if status == 200:
                return
        except OSError:
            pass
        time.sleep(0.3)
    status = target.process.poll()
    what = "does not answer" if status is None else f"ended with status {status}"
    raise QwenError(f"{target.name} {what} before it served port {target.port}: {shlex.join(target.command)}")


def stop(*targets: Target) -> None:
    """End servers at once: nothing of theirs is kept, and a second Ctrl-C must find none still running."""
    for target in targets:
        if target.process is not None:
            target.process.kill()
    for target in targets:
        if target.process is not None:
            target.process.wait()
            target.process = None


def own_server(name: str, port: int, max_batch: int, flags: Sequence[str], watched: bool = False) -> Target:
    """openai_api.py, ready to be started; `flags` choose the model."""
    command = [sys.executable, str(ROOT / "openai_api.py"), *flags, "--max-batch", str(max_batch)]
    command += ["--kv-cache-gib", "2", "--server-port", str(port)]
    return Target(name, command, port, body={"repetition_penalty": 1.0}, watched=watched)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


# ---- a client as light as can be: it shares the processor with the servers ----


async def get(port: int, path: str) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    return int(answer.split()[1]), answer


async def ask(target: Target, who: str, number: int, cell: Cell, lengths: Sequence[int]) -> None:
    """One streamed chat; its times go into the cell. No prompt begins as another did, so none is known already."""
    question = PADDING * PADDINGS[number % 4] + QUESTIONS[number // 4 % 4]
    body = {
        "messages": [
            {"role": "system", "content": f"{who}, you are number {number}."},
            {"role": "user", "content": question},
        ],
        "max_tokens": lengths[number % 4],
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.body,
    }
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port, limit=2**20)
    begin = last = time.perf_counter()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                 b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(data) + data)  # fmt: skip
    seen = counted = 0
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            if line.startswith(b"HTTP/1.1") and b" 200 " not in line:
                raise QwenError(f"{target.name} answers {line.decode().strip()}")
            continue
        chunk = json.loads(line[6:])
        if any(choice["delta"].get("content") for choice in chunk["choices"]):
            now = time.perf_counter()
            (cell.between if seen else cell.first).append(now - last)
            last, seen = now, seen + 1
        if chunk.get("usage"):
            counted = chunk["usage"]["completion_tokens"]
    writer.close()
    if not seen:
        raise QwenError(f"{target.name} gave an empty reply after {time.perf_counter() - begin:.1f} s")
    cell.tokens += counted or seen  # a server that counts nothing sends a chunk for each token


async def measure(target: Target, clients: int, requests: int, lengths: Sequence[int] = LENGTHS, who: str = "") -> Cell:
    """So many clients, each asking again as soon as it has its reply, and somebody who looks after the server.

    Args:
        requests: of all clients together.
        lengths: the longest replies in tokens, four that take turns.
        who: how prompts begin; another for each call, or prompts are known from the last.
    """
    cell, numbers = Cell(), iter(range(requests))

    async def client() -> None:
        for number in numbers:
            await ask(target, f"{who}{clients} clients", number, cell, lengths)

    async def watch() -> None:
        while True:
            begin = time.perf_counter()
            await get(target.port, "/health")
            cell.health.append(time.perf_counter() - begin)
            await asyncio.sleep(0.2)

    watchers = [asyncio.create_task(watch())] if target.watched else []
    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    cell.seconds = time.perf_counter() - begin
    for watcher in watchers:
        watcher.cancel()
    return cell


def percentile(values: Sequence[float], share: float) -> float:
    """In milliseconds."""
    return 1000 * sorted(values)[min(int(share * len(values)), len(values) - 1)]
