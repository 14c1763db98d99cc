"""Measure openai_api.py under load: total speed, time to the first token and between tokens, by number of clients.

    python benchmarks/bench_serve.py -c demo --clients 1 4 8 16
    python benchmarks/bench_serve.py -c demo --peer "llama_cpp=python -m llama_cpp.server --model demo.gguf --port 8091"

All servers are started first and measured in turns, so that a machine that slows down slows all alike.
`sequential` is this server with one reply at a time, as the published script served. A peer is any other command that
serves OpenAI's chat completions on the port at its end. Prompts have mixed lengths, replies are greedy, and `/health`
is asked all the while.
"""

import argparse
import asyncio
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

from qwen import QwenError  # noqa: E402
from utils import run_script  # noqa: E402

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
    ours: bool
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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--checkpoint-path", default="demo", help="as in openai_api.py (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="as in openai_api.py (default: %(default)s)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16], help="at once (default: 1 4 8 16)")
    parser.add_argument("--requests", type=int, default=16, help="per number of clients, at least (default: 16)")
    parser.add_argument("--port", type=int, default=8090, help="first of the ports to use (default: %(default)s)")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=COMMAND", help="another server; repeatable"
    )
    parser.add_argument("--no-sequential", action="store_true", help="leave the one-at-a-time baseline out")
    parser.add_argument("--output", type=Path, help="also write all figures to this JSON file")
    return parser.parse_args(argv)


def targets(args: argparse.Namespace) -> list[Target]:
    own = [sys.executable, str(ROOT / "openai_api.py"), "-c", args.checkpoint_path, "--dtype", args.dtype]
    own += ["--max-batch", str(max(args.clients)), "--kv-cache-gib", "1", "--server-port"]
    found = [Target("openai_api.py", [*own, str(args.port)], args.port, ours=True)]
    if not args.no_sequential:
        port = args.port + 1
        found.append(Target("sequential", [*own, str(port), "--max-batch", "1"], port, ours=True))
    for peer in args.peer:
        name, _, command = peer.partition("=")
        words = shlex.split(command)
        if not words or not words[-1].isdigit():
            raise QwenError(f"--peer {peer}: write NAME=COMMAND, with the port at its end")
        found.append(Target(name, words, int(words[-1]), ours=False))
    return found


def start(target: Target) -> None:
    """Start a server and wait until it lists its models."""
    log = subprocess.DEVNULL
    try:
        target.process = subprocess.Popen(target.command, stdout=log, stderr=log, cwd=ROOT)
    except OSError as error:
        raise QwenError(f"{target.name} does not start: {error}") from error
    deadline = time.monotonic() + QUIET
    while time.monotonic() < deadline and target.process.poll() is None:
        try:
            status, _ = asyncio.run(get(target.port, "/v1/models"))
            if status == 200:
                return
        except OSError:
            pass
        time.sleep(0.3)
    raise QwenError(f"{target.name} does not serve port {target.port}: {shlex.join(target.command)}")


# ---- a client as light as can be: it shares the processor with the servers ----


async def get(port: int, path: str) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    return int(answer.split()[1]), answer


async def ask(target: Target, clients: int, number: int, cell: Cell) -> None:
    """One streamed chat; its times go into the cell. No prompt begins as another did, so none is known already."""
    question = PADDING * PADDINGS[number % 4] + QUESTIONS[number // 4 % 4]
    messages = [
        {"role": "system", "content": f"{clients} clients, you are number {number}."},
        {"role": "user", "content": question},
    ]
    body = {"messages": messages, "max_tokens": LENGTHS[number % 4], "temperature": 0, "stream": True}
    body |= {"repetition_penalty" if target.ours else "repeat_penalty": 1.0}
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port, limit=2**20)
    begin = last = time.perf_counter()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                 b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(data) + data)  # fmt: skip
    tokens = 0
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            if line.startswith(b"HTTP/1.1") and b" 200 " not in line:
                raise QwenError(f"{target.name} answers {line.decode().strip()}")
            continue
        if json.loads(line[6:])["choices"][0]["delta"].get("content"):
            now = time.perf_counter()
            (cell.between if tokens else cell.first).append(now - last)
            last, tokens = now, tokens + 1
    writer.close()
    if not tokens:
        raise QwenError(f"{target.name} gave an empty reply after {time.perf_counter() - begin:.1f} s")
    cell.tokens += tokens


async def measure(target: Target, clients: int, requests: int) -> Cell:
    """So many clients, each asking again as soon as it has its reply, and somebody who looks after the server."""
    cell, numbers = Cell(), iter(range(max(requests, 2 * clients)))

    async def client() -> None:
        for number in numbers:
            await ask(target, clients, number, cell)

    async def watch() -> None:
        while True:
            begin = time.perf_counter()
            await get(target.port, "/health")
            cell.health.append(time.perf_counter() - begin)
            await asyncio.sleep(0.2)

    watchers = [asyncio.create_task(watch())] if target.ours else []  # peers may have other paths for it
    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    cell.seconds = time.perf_counter() - begin
    for watcher in watchers:
        watcher.cancel()
    return cell


# ---- the table ----


def percentile(values: Sequence[float], share: float) -> float:
    """In milliseconds."""
    return 1000 * sorted(values)[min(int(share * len(values)), len(values) - 1)]


TITLES = ("server", "clients", "total tok/s", "first token p50 / p95 (ms)", "between tokens p50 / p95 (ms)",
          "/health max (ms)")  # fmt: skip


def table_row(name: str, clients: int, cell: Cell) -> str:
    first, between = (
        f"{percentile(times, 0.5):.0f} / {percentile(times, 0.95):.0f}" for times in (cell.first, cell.between)
    )
    health = f"{1000 * max(cell.health):.0f}" if cell.health else "–"
    return f"| {name} | {clients} | {cell.speed:.1f} | {first} | {between} | {health} |"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    servers = targets(args)
    cells: dict[tuple[str, int], Cell] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server is left behind
    try:
        for target in tqdm(servers, desc="starting", unit="server"):
            start(target)
            asyncio.run(measure(target, 1, 1))  # to warm up
        tqdm.write(f"| {' | '.join(TITLES)} |\n|{'---|' * len(TITLES)}")
        for count, target in tqdm([(count, target) for count in args.clients for target in servers], unit="cell"):
            cell = cells[target.name, count] = asyncio.run(measure(target, count, args.requests))
            tqdm.write(table_row(target.name, count, cell))
    finally:
        for target in servers:
            if target.process is not None:
                target.process.terminate()
    for count in args.clients:
        own = cells[servers[0].name, count].speed
        ratios = [f"{own / cells[other.name, count].speed:.2f}x {other.name}" for other in servers[1:]]
        print(f"{count} clients: {', '.join(ratios)}")
    if args.output:
        figures = [{"server": name, "clients": count, "tokens_per_second": cell.speed, **vars(cell)}
                   for (name, count), cell in cells.items()]  # fmt: skip
        args.output.write_text(json.dumps(figures) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
