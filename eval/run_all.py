"""Run a set of benchmarks for one or more checkpoints, and print them side by side with the published values.

    python eval/run_all.py -c Qwen/Qwen-7B --benchmarks mmlu ceval gsm8k humaneval cmmlu -d data
    python eval/run_all.py -c Qwen/Qwen-7B-Chat Qwen/Qwen-7B-Chat-Int4 --set chat -d data --allow-code-execution

The second line gives the published table of quantisation. Below the directory -d lie mmlu/, ceval/, cmmlu/, gsm8k/ and
human_eval/, each in its official layout (without -d: the datasets library). What a benchmark has finished is kept: the
same command after an interruption goes on. Flags behind -- go to every script: `-- --limit 20 --batch-size 8`.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.report import number, published
from eval.runner import RESULTS
from qwen import QwenError
from utils import run_script

SCRIPTS = Path(__file__).resolve().parent
FOLDERS = {
    "mmlu": "mmlu", "ceval": "ceval", "cmmlu": "cmmlu", "gsm8k": "gsm8k", "humaneval": "human_eval", "wmt22": "wmt22",
    "chat_mmlu": "mmlu", "chat_ceval": "ceval", "chat_gsm8k": "gsm8k", "chat_humaneval": "human_eval",
    "plugin": "plugin", "hf_agent": None,
}  # fmt: skip
SETS = {
    "base": ("mmlu", "ceval", "gsm8k", "humaneval", "wmt22", "cmmlu"),
    "chat": ("chat_mmlu", "chat_ceval", "chat_gsm8k", "chat_humaneval"),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--checkpoints", nargs="+", required=True, metavar="PATH", help="as in cli_demo.py")
    parser.add_argument("--benchmarks", nargs="+", choices=FOLDERS, metavar="NAME", help=f"of {', '.join(FOLDERS)}")
    parser.add_argument("--set", choices=SETS, default="base", help="without --benchmarks (default: %(default)s)")
    parser.add_argument("-d", "--data", type=Path, metavar="DIR", help="the benchmarks' directories lie in it")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="share each benchmark over N GPUs")
    parser.add_argument("--allow-code-execution", action="store_true", help="run HumanEval's code, in a sandbox")
    parser.add_argument("more", nargs="*", help="behind --: flags for every script")
    return parser.parse_args(argv)


def run_benchmark(checkpoint: str, benchmark: str, args: argparse.Namespace) -> dict[str, Any]:
    """The result of one script, in a process of its own: memory is given back before the next."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(args.processes)] if args.processes > 1 else []
    command = [sys.executable, *launcher, str(SCRIPTS / f"evaluate_{benchmark}.py"), "-c", checkpoint, "--resume"]
    command += ["-o", str(args.output), *args.more]
    if args.data is not None and (folder := FOLDERS[benchmark]) is not None:  # None: its data comes with the script
        command += ["-d", str(args.data / folder)]
    if "humaneval" in benchmark and args.allow_code_execution:
        command.append("--allow-code-execution")
    print(f"{checkpoint}: {benchmark}", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise QwenError(
            f"{benchmark} of {checkpoint} ended with status {done.returncode}, see above; run again to go on"
        )
    path = Path(done.stdout.splitlines()[-1])
    return json.loads(path.read_text(encoding="utf-8"))


def cell(result: dict[str, Any]) -> str:
    """The main score with its standard error; a dash where there is none."""
    if not result["scores"]:
        return "–"
    score = result["scores"][0]
    return f"{number(score['value'])} ± {number(score['stderr'])}"


def summary(results: dict[str, dict[str, dict[str, Any]]], benchmarks: Sequence[str]) -> str:
    """Markdown: a row for each checkpoint, then one for each of the published weights."""
    lines = ["| | " + " | ".join(benchmarks) + " |", "|---" * (len(benchmarks) + 1) + "|"]
    for checkpoint, found in results.items():
        cells = [cell(found[name]) if name in found else "–" for name in benchmarks]
        lines.append(f"| {checkpoint} | " + " | ".join(cells) + " |")
    known = {name: published(name) for name in benchmarks}
    for weights in dict.fromkeys(weights for values in known.values() for weights in values):
        cells = [
            str(next(iter(known[name][weights].values()))) if weights in known[name] else "–" for name in benchmarks
        ]
        lines.append(f"| published, {weights} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    benchmarks = args.benchmarks or SETS[args.set]
    results: dict[str, dict[str, dict[str, Any]]] = {checkpoint: {} for checkpoint in args.checkpoints}
    try:
        for checkpoint in args.checkpoints:
            for benchmark in benchmarks:
                results[checkpoint][benchmark] = run_benchmark(checkpoint, benchmark, args)
    finally:  # whatever ended it: show what there is
        print(summary(results, benchmarks))


if __name__ == "__main__":
    run_script(main)
