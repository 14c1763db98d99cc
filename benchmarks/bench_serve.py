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
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

from benchmarks.serving import Cell, Target, measure, own_server, percentile, start, stop  # noqa: E402
from qwen import QwenError  # noqa: E402
from utils import run_script  # noqa: E402


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
    flags = ["-c", args.checkpoint_path, "--dtype", args.dtype]
    found = [own_server("openai_api.py", args.port, max(args.clients), flags, watched=True)]
    if not args.no_sequential:
        found.append(own_server("sequential", args.port + 1, 1, flags, watched=True))
    for peer in args.peer:
        name, _, command = peer.partition("=")
        words = shlex.split(command)
        if not words or not words[-1].isdigit():
            raise QwenError(f"--peer {peer}: write NAME=COMMAND, with the port at its end")
        found.append(Target(name, words, int(words[-1]), body={"repeat_penalty": 1.0}))  # unwatched: paths differ
    return found


# ---- the table ----


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
            asyncio.run(measure(target, 1, 1, who="at first "))  # to warm up
        tqdm.write(f"| {' | '.join(TITLES)} |\n|{'---|' * len(TITLES)}")
        for count, target in tqdm([(count, target) for count in args.clients for target in servers], unit="cell"):
            cell = cells[target.name, count] = asyncio.run(measure(target, count, max(args.requests, 2 * count)))
            tqdm.write(table_row(target.name, count, cell))
    finally:
        stop(*servers)
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
