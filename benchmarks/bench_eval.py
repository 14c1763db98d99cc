"""Measure the evaluation runner against one prompt at a time and against lm-evaluation-harness, on the same prompts.

    python benchmarks/bench_eval.py -c demo -d data/mmlu --subjects anatomy virology --limit 8
    python benchmarks/bench_eval.py -c demo -d data/mmlu --gsm8k data/gsm8k --limit 8

The three ways are measured in turns in one process, so that what else the machine does hits all of them. The harness
(pip install lm-eval==0.4.13) runs its own Hugging Face backend on the same loaded model. Printed are seconds, ratios,
and for how many questions the answers are the same.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers.utils import logging

from eval import evaluate_gsm8k, evaluate_mmlu
from eval.engine import Engine, plan_batches
from eval.task import Record, Sample, Task
from qwen import QwenError
from utils import DTYPES, load_model_and_tokenizer, run_script

Answers = list[Any]  # a letter or a text for each prompt


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--checkpoint-path", default="demo", help="as in cli_demo.py (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="precision (default: %(default)s)")
    parser.add_argument("-d", "--data", type=Path, required=True, help="MMLU's directory")
    parser.add_argument("--subjects", nargs="+", default=["anatomy", "virology"], help="of MMLU (default: %(default)s)")
    parser.add_argument("--gsm8k", type=Path, help="GSM8K's directory: compare generated texts too")
    parser.add_argument("--limit", type=int, default=8, help="questions of each subject (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="of lm-eval (default: 8)")
    parser.add_argument("--new-tokens", type=int, default=32, help="GSM8K: longest text (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="how often all ways are measured (default: %(default)s)")
    return parser.parse_args(argv)


# ---- the three ways ----


def run_engine(engine: Engine, task: Task, samples: Sequence[Sample]) -> Answers:
    """This project's runner, without its files."""
    prompts = [task.prompt(sample, engine.tokenizer, engine.model.config.seq_length) for sample in samples]
    records: dict[int, Record] = {}
    engine.engine.pool.forget()  # nothing of the round before
    for batch in plan_batches(prompts):
        records.update(zip(batch, engine.answer([prompts[i].ids for i in batch]), strict=True))
    return [read(task, records[number]) for number in range(len(samples))]


def read(task: Task, record: Record) -> Any:
    """The likeliest choice, or the text."""
    return max(task.choices, key=record["logprobs"].__getitem__) if task.choices else record["text"].strip()


@torch.inference_mode()
def run_one_by_one(engine: Engine, task: Task, samples: Sequence[Sample]) -> Answers:
    """The published way: every whole prompt by itself, all of its logits."""
    answers: Answers = []
    for sample in samples:
        ids = engine.tokenizer.encode_text(task.question(sample))
        if task.choices:
            logits = engine.model(torch.tensor([ids], device=engine.model.device)).logits[0, -1]
            answers.append(max(task.choices, key=lambda choice: logits[engine.choices[choice]].item()))
        else:
            answers.append(engine.answer([ids])[0]["text"].strip())
    return answers


def run_harness(engine: Engine, task: Task, samples: Sequence[Sample], batch_size: int) -> Answers:
    """lm-evaluation-harness with its hf backend, given the very same prompts."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = copy.copy(engine.tokenizer)
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"  # the harness wants them named
    harness = HFLM(pretrained=engine.model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
    prompts = [task.question(sample) for sample in samples]
    if not task.choices:
        settings = {"until": list(task.stop_words), "max_gen_toks": engine.max_new_tokens, "do_sample": False,
                    "repetition_penalty": 1.0}  # fmt: skip
        requests = [Instance("generate_until", {}, (prompt, settings), i) for i, prompt in enumerate(prompts)]
        config = engine.model.generation_config
        longest, config.max_new_tokens = config.max_new_tokens, None  # it would overrule the harness's limit
        try:
            return [text.strip() for text in harness.generate_until(requests, disable_tqdm=True)]
        finally:
            config.max_new_tokens = longest
    pairs = [(prompt, choice) for prompt in prompts for choice in task.choices]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    values = [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    width = len(task.choices)
    rows = [values[i : i + width] for i in range(0, len(values), width)]
    return [task.choices[row.index(max(row))] for row in rows]


# ---- measuring ----


def measure(ways: dict[str, Callable[[], Answers]], rounds: int) -> tuple[dict[str, float], dict[str, Answers]]:
    """The shortest time of each way, and its answers."""
    seconds: dict[str, float] = {}
    answers: dict[str, Answers] = {}
    for number in range(rounds):
        for name, way in ways.items():
            begun = time.perf_counter()
            answers[name] = way()
            seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - begun)
            print(f"round {number + 1}: {name}, {seconds[name]:.1f} s", file=sys.stderr, flush=True)
    return seconds, answers


def compare(title: str, engine: Engine, task: Task, args: argparse.Namespace) -> None:
    """Print the table of one benchmark."""
    samples = task.load()
    ways: dict[str, Callable[[], Answers]] = {
        "this runner": lambda: run_engine(engine, task, samples),
        "one prompt at a time": lambda: run_one_by_one(engine, task, samples),
        "lm-eval, hf backend": lambda: run_harness(engine, task, samples, args.batch_size or 8),
    }
    engine.answer([engine.tokenizer.encode_text(task.question(samples[0]))])  # to warm up
    seconds, answers = measure(ways, args.rounds)
    ours = "this runner"
    print(f"\n| {title}, {len(samples)} questions | seconds | times as long | same answers |\n|---|---|---|---|")
    for name in ways:
        same = sum(a == b for a, b in zip(answers[name], answers[ours], strict=True))
        ratio = seconds[name] / seconds[ours]
        print(f"| {name} | {seconds[name]:.1f} | {ratio:.2f} | {same} of {len(samples)} |")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise QwenError("the comparison needs lm-evaluation-harness: pip install lm-eval==0.4.13") from None
    model, tokenizer = load_model_and_tokenizer(args.checkpoint_path, device=args.device, dtype=args.dtype)
    flags = ["-d", str(args.data), "--limit", str(args.limit), "--subjects", *args.subjects]
    mmlu = evaluate_mmlu.EvaluateMmlu(evaluate_mmlu.parse_args(flags))
    compare("MMLU, 5-shot", Engine(model, tokenizer, mmlu.choices), mmlu, args)
    if args.gsm8k:
        flags = ["-d", str(args.gsm8k), "--limit", str(args.limit)]
        gsm8k = evaluate_gsm8k.EvaluateGsm8k(evaluate_gsm8k.parse_args(flags))
        engine = Engine(model, tokenizer, stops=gsm8k.stops(tokenizer), max_new_tokens=args.new_tokens)
        compare("GSM8K, 8-shot", engine, gsm8k, args)


if __name__ == "__main__":
    run_script(main)
