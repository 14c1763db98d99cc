"""Measure speed and memory by precision, as the publisher's two tables do, against what this machine can do at best.

    python profile_inference.py -c demo --lengths 128 --encode-tokens 512
    python profile_inference.py -c Qwen/Qwen-7B-Chat --rows bf16 int8 int4 bf16-kv8
    python profile_inference.py --random-weights 4 --rows bf16 int4 --lengths 64 --peer llama.cpp

Every row is a fresh process, several times over, and rows take turns; tables show medians. Ctrl-C shows what is there.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from profiling.ceilings import measure_ceilings
from profiling.costs import ROWS
from profiling.measure import describe_device, measure_model, random_ids
from profiling.peers import (
    PEERS,
    as_qwen2,
    check_llama_cpp,
    has_transformers_peer,
    llama_cpp_plan,
    prepare_gguf,
    run_llama_cpp,
)  # fmt: skip
from profiling.random_weights import SUFFIXES, ensure_random_checkpoint
from profiling.report import OURS, pair_ratios, render, summarize
from qwen import QWenConfig, QwenError
from qwen.hardware import computes_bf16, num_threads
from qwen.modeling_qwen import INT8_CACHE
from qwen.paths import replacing, user_cache_dir
from utils import (
    DEFAULT_CHECKPOINT,
    DTYPES,
    add_model_arguments,
    choose_device,
    describe_placement,
    find_checkpoint,
    load_config,
    load_from_args,
    run_script,
)  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    group = parser.add_argument_group("what is measured")
    group.add_argument("--rows", nargs="+", choices=list(ROWS), default=["bf16"], help="precisions (default: bf16)")
    group.add_argument("--int4-checkpoint", metavar="PATH", help="for rows int4 (default: the checkpoint's name-Int4)")
    group.add_argument("--int8-checkpoint", metavar="PATH", help="for rows int8 (default: the checkpoint's name-Int8)")
    group.add_argument("--random-weights", type=int, nargs="?", const=32, metavar="LAYERS",
                       help="no checkpoint: Qwen-7B's sizes, all 32 layers or fewer, random values")  # fmt: skip
    group.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192], metavar="N",
                       help="tokens to generate (default: 2048 8192)")  # fmt: skip
    group.add_argument("--context-tokens", type=int, default=1, help="prompt before them (default: %(default)s)")
    group.add_argument("--encode-tokens", type=int, default=2048, help="prompt whose peak memory is measured "
                       "(default: %(default)s)")  # fmt: skip
    group.add_argument("--prompt-tokens", type=int, default=512, help="prompt of the prefill (default: %(default)s)")
    group.add_argument("--runs", type=int, default=3, help="processes for each row (default: %(default)s)")
    group.add_argument("--peer", action="append", choices=PEERS, default=[], help="another engine, in turns with ours")
    group.add_argument("--peer-python", default=sys.executable, metavar="PATH",
                       help="interpreter that has llama-cpp-python (default: this one)")  # fmt: skip
    group.add_argument("--work-dir", type=Path, help="for random weights and llama.cpp's files (default: in the cache)")
    group.add_argument("--output", type=Path, metavar="FILE", help="also write everything to this JSON file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.work_dir = args.work_dir or user_cache_dir() / "profile"
    args.rows, args.peer = list(dict.fromkeys(args.rows)), list(dict.fromkeys(args.peer))
    args.lengths = sorted(set(args.lengths))
    return args


def check_args(args: argparse.Namespace) -> None:
    """QwenError for flags that contradict each other or ask for nothing."""
    if args.dtype != "auto":
        raise QwenError(f"--dtype {args.dtype}: here the rows name the precision: use --rows {args.dtype}")
    if getattr(args, "tp", None):
        raise QwenError("--tp: rows run in processes of their own, one GPU or --num-gpus each: leave --tp out")
    if args.random_weights is not None and args.checkpoint_path != DEFAULT_CHECKPOINT:
        raise QwenError("--random-weights stands in for a checkpoint: leave -c out")
    if args.random_weights is not None and not 1 <= args.random_weights <= 32:
        raise QwenError(f"--random-weights {args.random_weights}: Qwen-7B has 32 layers, give 1 to 32")
    least = {
        "--lengths": (args.lengths[0], 2),
        "--context-tokens": (args.context_tokens, 1),
        "--encode-tokens": (args.encode_tokens, 1),
        "--prompt-tokens": (args.prompt_tokens, 1),
        "--runs": (args.runs, 1),
    }
    for flag, (value, limit) in least.items():
        if value < limit:
            raise QwenError(f"{flag} {value}: give at least {limit}")
    if args.output and not args.output.absolute().parent.is_dir():
        raise QwenError(f"--output {args.output}: there is no folder {args.output.absolute().parent}")
    if "llama.cpp" in args.peer:
        check_llama_cpp(args.peer_python)


def checkpoint_of(row: str, args: argparse.Namespace) -> str:
    """The checkpoint of a row: given, random, or for a quantised row the one whose name ends so."""
    bits = ROWS[row].bits
    if args.random_weights is not None:
        return str(ensure_random_checkpoint(args.work_dir, args.random_weights, bits))
    given = {4: args.int4_checkpoint, 8: args.int8_checkpoint}.get(bits)
    if given or not bits:
        return given or args.checkpoint_path
    path = args.checkpoint_path.rstrip("/\\")
    if path.endswith(SUFFIXES[bits]):
        return path
    sibling = path + SUFFIXES[bits]
    local = path == "demo" or Path(path).is_dir()
    if local and not Path(sibling).is_dir():
        raise QwenError(f"row {row} needs an Int{bits} checkpoint and there is no {sibling}: "
                        f"give it with --int{bits}-checkpoint")  # fmt: skip
    return sibling


def group_size(config: QWenConfig) -> int:
    """Inputs that share a scale in a quantised checkpoint."""
    quantization = getattr(config, "quantization_config", None) or {}
    return quantization.get("group_size", 128) if isinstance(quantization, dict) else quantization.group_size


# ---- one job, in a process of its own ----


def work(job: dict[str, Any]) -> dict[str, Any]:
    """What a worker process does: measure the ceilings, or one row with one engine."""
    args = argparse.Namespace(**job["args"])
    transformers.utils.logging.disable_progress_bar()  # the outer process shows one
    if job["engine"] == "ceilings":
        device = torch.device(choose_device("cpu" if args.cpu_only else args.device))
        return measure_ceilings(device, {name: DTYPES[name] for name in job["dtypes"]}, computes_bf16(str(device)))
    row = ROWS[job["row"]]
    args.checkpoint_path, args.dtype = job["checkpoint"], row.dtype
    model, _ = load_from_args(args)
    placement = describe_placement(model)
    if job["engine"] == "transformers":
        model = as_qwen2(model)
    settings = {"cache_implementation": "quantized", "cache_config": dict(INT8_CACHE)} if row.kv_bits else {}
    return {**measure_model(model, job["plan"], settings), "placement": placement}


def run_worker(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job in a fresh process, so that none profits from another's warm caches or counts its memory."""
    command = [sys.executable, os.path.abspath(__file__), "--worker", json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        what = " ".join(job[name] for name in ("row", "engine") if name in job)
        raise QwenError(f"{what} failed (status {done.returncode}): its message is above")
    return json.loads(done.stdout.splitlines()[-1])


def run_llama_cpp_row(job: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The same measurement by llama.cpp: same ids, threads and type of keys and values."""
    plan, row = job["plan"], ROWS[job["row"]]
    result = run_llama_cpp({
        "model": job["model"], "prompt": random_ids(plan["prompt_tokens"], plan["vocabulary"]),
        "after_prompt": plan["after_prompt"], "context": plan["context"], "lengths": plan["lengths"],
        "threads": num_threads(), "kv": llama_cpp_plan(row)[2], "on_gpu": plan["device"] != "cpu",
    }, args.peer_python)  # fmt: skip
    # One process, one peak: it is that of the longest generation.
    result["memory"] = dict.fromkeys(result["lengths"], result.pop("peak_bytes"))
    return result


# ---- the whole ----


def make_plan(args: argparse.Namespace, configs: dict[str, QWenConfig]) -> dict[str, Any]:
    """What every row measures; QwenError if it is more than the model can read."""
    config = next(iter(configs.values()))
    longest = max(args.context_tokens + args.lengths[-1], args.encode_tokens + 1, args.prompt_tokens + 1)
    if longest > config.max_context_length:
        raise QwenError(f"{longest:,} tokens are asked for and the model reads at most {config.max_context_length:,}: "
                        "lower --lengths, --encode-tokens or --prompt-tokens")  # fmt: skip
    return {
        "prompt_tokens": args.prompt_tokens,
        "after_prompt": min(128, args.lengths[0]),
        "context": args.context_tokens,
        "encode_tokens": args.encode_tokens,
        "lengths": args.lengths,
        "groups": {row: group_size(found) for row, found in configs.items() if ROWS[row].bits},
        "vocabulary": config.vocab_size,
        "device": choose_device("cpu" if args.cpu_only else args.device),
    }


def list_jobs(args: argparse.Namespace, plan: dict[str, Any], checkpoints: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The jobs of one round: the ceilings, then each row with every engine that can run it."""
    shared = {"args": {name: value for name, value in vars(args).items() if not isinstance(value, Path)}, "plan": plan}
    yield {**shared, "engine": "ceilings", "dtypes": sorted({ROWS[row].dtype for row in args.rows})}
    for row in args.rows:
        yield {**shared, "engine": OURS, "row": row, "checkpoint": checkpoints[row]}
        if "llama.cpp" in args.peer and llama_cpp_plan(ROWS[row]):
            source = checkpoint_of(ROWS[row].dtype, args)
            model = prepare_gguf(source, args, ROWS[row], args.work_dir / "gguf", args.peer_python)
            yield {**shared, "engine": "llama.cpp", "row": row, "model": str(model)}
        if "transformers" in args.peer and has_transformers_peer(ROWS[row]):
            yield {**shared, "engine": "transformers", "row": row, "checkpoint": checkpoints[row]}


def run_jobs(jobs: list[dict[str, Any]], args: argparse.Namespace, record: dict[str, Any]) -> bool:
    """Do all jobs, several rounds over, into `record`; whether it got to the end. Ctrl-C ends it early."""
    rounds = [(number, job) for number in range(args.runs) for job in jobs]
    try:
        with tqdm(rounds, unit="run") as bar:
            for number, job in bar:
                bar.set_postfix_str(f"{job.get('row', '')} {job['engine']}".strip())
                result = run_llama_cpp_row(job, args) if job["engine"] == "llama.cpp" else run_worker(job)
                if job["engine"] == "ceilings":
                    record["ceilings"] = {k: max(v, record["ceilings"].get(k, 0)) for k, v in result.items()}
                else:
                    record["runs"].append(
                        {"row": job["row"], "engine": job["engine"], "round": number, "result": result}
                    )
                save(record, args.output)
    except KeyboardInterrupt:
        return False
    return True


def save(record: dict[str, Any], path: Path | None) -> None:
    """Write the JSON file whole or not at all."""
    if path is not None:
        with replacing(path) as draft:
            draft.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.worker:
        print(json.dumps(work(json.loads(args.worker))))
        return 0
    check_args(args)
    checkpoints = {row: checkpoint_of(row, args) for row in args.rows}
    configs = {row: load_config(find_checkpoint(path, args.hub, args.revision)) for row, path in checkpoints.items()}
    plan = make_plan(args, configs)
    record: dict[str, Any] = {
        "checkpoints": checkpoints, "machine": describe_device(plan["device"]), "plan": plan,
        "ceilings": {}, "runs": [],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    finished = run_jobs(list(list_jobs(args, plan, checkpoints)), args, record)
    if not record["runs"]:
        return 130
    config = configs[args.rows[0]]
    record["summary"] = summarize(record["runs"], plan, record["ceilings"], config)
    ratios = pair_ratios(record["runs"], plan)
    record["pair_ratios"] = [{"row": row, "peer": peer, **found} for (row, peer), found in ratios.items()]
    save(record, args.output)
    print(heading(args, record, plan, finished) + "\n")
    print(render(record["summary"], plan, ratios))
    return 0 if finished else 130


def heading(args: argparse.Namespace, record: dict[str, Any], plan: dict[str, Any], finished: bool) -> str:
    """What was measured and where, and the ceilings."""
    model = f"Qwen-7B's sizes, {args.random_weights} layers, random weights" if args.random_weights else ""
    flops = [f"{k.removeprefix('flops_')} {v / 1e9:.0f} GFLOP/s" for k, v in record["ceilings"].items() if k[0] == "f"]
    counts = [sum(r["row"] == row and r["engine"] == OURS for r in record["runs"]) for row in args.rows]
    return (
        f"{model or args.checkpoint_path} on {record['machine']}; batch 1, context {plan['context']}, "
        f"torch {torch.__version__}; medians of {max(counts)} processes{'' if finished else ' (interrupted)'}. "
        f"Ceilings measured: {record['ceilings']['read_bytes_s'] / 1e9:.1f} GB/s read, {', '.join(flops)}."
    )


if __name__ == "__main__":
    run_script(main)
