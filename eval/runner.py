"""Run a benchmark: load, prompt, answer in batches, keep every answer, score, report. All scripts call `run`.

`accelerate launch` or torchrun starts several processes; each takes its share of the batches, and the result is the
same file as of one process.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers.utils import logging

from eval.engine import MOST_ROWS, Engine, plan_batches
from eval.remote import Remote, add_api_arguments, load_tokenizer
from eval.report import counts, published, table, versions
from eval.run_folder import (
    RunFolder,
    as_lines,
    check_writable,
    fingerprint,
    prompt_hash,
    text_hash,
    write_json,
    write_whole,
)
from eval.task import Prompt, Record, Sample, Task
from qwen import QwenError
from utils import DTYPE_NAMES, add_model_arguments, find_checkpoint, load_from_args

RESULTS = Path(__file__).resolve().parent.parent / "output_eval"


# ---- the command line ----


def make_parser(task: type[Task], description: str | None) -> argparse.ArgumentParser:
    """The flags of all benchmarks and those of this one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.set_defaults(checkpoint_path=task.checkpoint)
    add_api_arguments(parser.add_argument_group("a model that a server runs"))
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "-d", "--data", "--eval_data_path", "-f", "--sample-input-file", type=Path, metavar="DIR",
        help="directory of the benchmark's files (default: through the datasets library)",
    )  # fmt: skip
    group.add_argument(
        "--protocol", choices=["standard", "qwen2023"], default="standard",
        help="standard: correct scoring; qwen2023: as the published scripts, defects included (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--subjects", nargs="+", metavar="NAME", help="only these (default: all)")
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N samples of each subject")
    group.add_argument(
        "--max-new-tokens", type=positive, metavar="N", help=f"longest reply (default: {task.max_new_tokens})"
    )
    group.add_argument(
        "--batch-size", type=batch_size, default="auto", metavar="N", help="most prompts at once (default: by memory)"
    )
    group.add_argument("-s", "--seed", type=int, default=1234, help="of whatever is random (default: %(default)s)")
    group.add_argument(
        "-o", "--output", type=Path, default=RESULTS, metavar="DIR",
        help="results go into a folder of their own in here (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--resume", action="store_true", help="go on with the answers that are there already")
    group.add_argument("--overwrite", action="store_true", help="forget the answers that are there already")
    group.add_argument("--rescore", type=Path, metavar="RUN", help="score a run's folder again, without the model")
    group.add_argument("--log-samples", action="store_true", help="also write log.jsonl: every question and answer")
    task.add_arguments(group)
    return parser


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return number


def batch_size(text: str) -> int | str:
    return text if text == "auto" else positive(text)


# ---- a run ----


def run(task_class: type[Task], args: argparse.Namespace) -> dict[str, Any]:
    """Answer what is not answered yet, score, and print the result, which is also returned."""
    if args.resume and args.overwrite:
        raise QwenError("--resume keeps the answers and --overwrite forgets them: leave one of them out")
    if args.tp:
        raise QwenError("--tp is not for evaluation: start several processes, each has the whole model and its share")
    if args.rescore:
        return rescore(task_class, args)
    if args.api_base:
        return run_remotely(task_class, args)
    torch.manual_seed(args.seed)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    state = join_processes(args)
    task = task_class(args)
    samples = load_samples(task)  # before the model: a missing file should not cost minutes
    check_writable(args.output, "--output")
    folder = None
    try:
        with state.main_process_first():
            directory = find_checkpoint(args.checkpoint_path, args.hub, args.revision)
        model, tokenizer = load_from_args(args)
        settings = describe_run(task, args, directory, model)
        folder = RunFolder.of_settings(
            args.output, task.name, str(args.checkpoint_path), settings, state.process_index, state.num_processes
        )
        with state.main_process_first():
            if state.is_main_process:
                folder.begin(args.resume, args.overwrite)
                write_json(folder.path / "settings.json", {"checkpoint": str(args.checkpoint_path), **settings})
        records = answer_all(task, samples, args, model, tokenizer, folder, state)
    except KeyboardInterrupt:
        if folder is not None and state.is_main_process:
            print(f"\nstopped: {len(folder.answers())} answers are kept in {folder.path}; "
                  "the same command with --resume goes on", file=sys.stderr)  # fmt: skip
        raise
    state.destroy_process_group()
    if state.process_index > 0:
        return {}
    folder.merge(records)
    return conclude(task, args, samples, records, settings, folder)


def run_remotely(task_class: type[Task], args: argparse.Namespace) -> dict[str, Any]:
    """The same with a model that a server runs; answers are kept one by one."""
    if args.api_requests < 1:
        raise QwenError("--api-requests must be 1 or more")
    task = task_class(args)
    samples = load_samples(task)
    check_writable(args.output, "--output")
    tokenizer, config = load_tokenizer(args)
    with Remote(args, tokenizer, task.choices, task.stop_words, task.max_new_tokens) as remote:
        settings = {"task": task.name, **task.settings(), "served": remote.model, "seed": args.seed}
        folder = RunFolder.of_settings(args.output, task.name, remote.model, settings)
        folder.begin(args.resume, args.overwrite)
        write_json(folder.path / "settings.json", {"checkpoint": str(args.checkpoint_path), **settings})
        prompts = [task.prompt(sample, tokenizer, config.seq_length) for sample in samples]
        try:
            records = ask_remote(task, samples, prompts, remote, folder)
        except KeyboardInterrupt:
            print(f"\nstopped: {len(folder.answers())} answers are kept in {folder.path}; "
                  "the same command with --resume goes on", file=sys.stderr)  # fmt: skip
            raise
    folder.merge(records)
    return conclude(task, args, samples, records, settings, folder)


def ask_remote(
    task: Task, samples: Sequence[Sample], prompts: Sequence[Prompt], remote: Remote, folder: RunFolder
) -> list[Record]:
    """The records of all samples, in their order, asked of the server where they are not there already."""
    hashes, known = [prompt_hash(prompt.ids) for prompt in prompts], folder.answers()
    missing = [i for i, sample in enumerate(samples) if known.get(sample.id, {}).get("prompt") != hashes[i]]
    with tqdm(total=len(missing), desc=task.title, unit="sample", disable=not missing) as bar:
        known |= ask(remote, task, [(samples[i], prompts[i], hashes[i]) for i in missing], folder, bar)
    return [known[sample.id] for sample in samples]


def ask(
    answerer: Engine | Remote, task: Task, asked: Sequence[tuple[Sample, Prompt, str]], folder: RunFolder, bar: tqdm
) -> dict[str, Record]:
    """The records of samples, each with its prompt and that one's hash; every one is on the disk as soon as it is
    there."""
    records: dict[str, Record] = {}

    def keep(number: int, answer: Record) -> None:
        sample, _, hashed = asked[number]
        line = {"id": sample.id, "prompt": hashed, "question": text_hash(task.question(sample))}
        records[sample.id] = line | answer
        folder.append([records[sample.id]])
        bar.update()

    answerer.answer([prompt.ids for _, prompt, _ in asked], keep)
    return records


def load_samples(task: Task) -> list[Sample]:
    """The benchmark's samples; QwenError if there are none, or two under one name: answers are kept by it."""
    samples = task.load()
    if not samples:
        raise QwenError(f"{task.title}: the data hold no samples")
    repeated = [id for id, count in Counter(sample.id for sample in samples).items() if count > 1]
    if repeated:
        raise QwenError(f"{task.args.data} has {repeated[0]} more than once: leave one of them out")
    return samples


def join_processes(args: argparse.Namespace) -> PartialState:
    """Meet the other processes where a launcher has started several, and take a GPU each."""
    on_cpu = args.cpu_only or args.device == "cpu"
    state = PartialState(cpu=on_cpu)
    if state.num_processes > 1 and state.device.type == "cuda":
        if args.num_gpus:
            raise QwenError("--num-gpus spreads one process; with several processes each takes one GPU")
        args.device = f"cuda:{state.local_process_index}"
    return state


def describe_run(task: Task, args: argparse.Namespace, directory: Path, model: Any) -> dict[str, Any]:
    """Everything that the answers depend on, as settings.json keeps it."""
    quantization = getattr(model.config, "quantization_config", None)
    return {
        "task": task.name,
        **task.settings(),
        "weights": fingerprint(directory),
        "revision": directory.name if directory.parent.name == "snapshots" else None,
        "dtype": DTYPE_NAMES.get(model.dtype, str(model.dtype)),
        "quantization": None if quantization is None else dict_of(quantization).get("quant_method", "unknown"),
        "bits": None if quantization is None else dict_of(quantization).get("bits"),
        "attention": model.config._attn_implementation,
        "seed": args.seed,
    }


def dict_of(config: Any) -> dict[str, Any]:
    return config if isinstance(config, dict) else config.to_dict()


def answer_all(
    task: Task,
    samples: list[Sample],
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    folder: RunFolder,
    state: PartialState,
) -> list[Record]:
    """The records of all samples, in their order; this process computes its share of those that are missing."""
    prompts = [task.prompt(sample, tokenizer, model.config.seq_length) for sample in samples]
    hashes = [prompt_hash(prompt.ids) for prompt in prompts]
    rows = MOST_ROWS if args.batch_size == "auto" else args.batch_size
    engine = Engine(model, tokenizer, task.choices, task.stops(tokenizer), task.max_new_tokens, rows)
    batches = plan_batches(prompts)

    found = [folder.answers()]
    known = {id: record for part in gather_object(found) for id, record in part.items()}
    known = {s.id: known[s.id] for s, h in zip(samples, hashes, strict=True) if known.get(s.id, {}).get("prompt") == h}
    missing = [tuple(i for i in batch if samples[i].id not in known) for batch in batches]
    share = list(filter(None, missing))[state.process_index :: state.num_processes]
    new: dict[str, Record] = {}
    total = sum(map(len, share))
    with tqdm(total=total, desc=task.title, unit="sample", disable=not state.is_main_process or not total) as bar:
        for batch in share:
            new |= ask(engine, task, [(samples[i], prompts[i], hashes[i]) for i in batch], folder, bar)
    for part in gather_object([new]):
        known.update(part)
    return [known[sample.id] for sample in samples]


# ---- from answers to the result ----


def rescore(task_class: type[Task], args: argparse.Namespace) -> dict[str, Any]:
    """The result of a run's answers, by the scoring of today; no model is loaded."""
    folder = RunFolder(args.rescore)
    settings = folder.settings()
    args.checkpoint_path = settings.pop("checkpoint")
    if settings["task"] != task_class.name:
        raise QwenError(f"{args.rescore} is a run of {settings['task']}, not of {task_class.name}")
    for name in settings.keys() & vars(args).keys():
        setattr(args, name, settings[name])
    task, answers = task_class(args), folder.answers()
    check_writable(args.rescore, "--rescore")
    samples = [sample for sample in load_samples(task) if sample.id in answers]
    if not samples:
        raise QwenError(f"{args.rescore} holds no answers to these samples: run without --rescore first")
    check_questions(task, samples, answers)
    return conclude(task, args, samples, [answers[sample.id] for sample in samples], settings, folder)


def check_questions(task: Task, samples: Sequence[Sample], answers: Mapping[str, Record]) -> None:
    """QwenError if the data ask something else today than what the answers were given to."""
    known = [sample for sample in samples if "question" in answers[sample.id]]
    changed = [sample.id for sample in known if answers[sample.id]["question"] != text_hash(task.question(sample))]
    if changed:
        raise QwenError(
            f"{len(changed)} of {len(samples)} questions are others than those that were answered, {changed[0]} for "
            "one: name the data of that run with -d, or run without --rescore"
        )


def conclude(
    task: Task,
    args: argparse.Namespace,
    samples: Sequence[Sample],
    records: Sequence[Record],
    settings: dict[str, Any],
    folder: RunFolder,
) -> dict[str, Any]:
    """Score, write result.json, print the table."""
    verdicts = task.judge_all(samples, records)
    scores = task.scores(samples, verdicts)
    result = {
        "task": task.name,
        "checkpoint": str(args.checkpoint_path),
        "settings": settings,
        "selection": {"subjects": args.subjects, "limit": args.limit},
        "scores": [{**vars(score), "value": round(score.value, 4)} for score in scores],
        "counts": counts(verdicts, records) | task.remarks,
        "published": published(task.name),
        "versions": versions(),
    }
    write_json(folder.path / "result.json", result)
    exports = task.exports(samples, verdicts)
    for name, text in exports.items():
        write_whole(folder.path / name, text)
    if args.log_samples:
        log = (
            {**r, "id": s.id, "question": task.question(s), "read": v.answer, "right": v.gold, "value": v.value,
             **v.parts, **({"note": v.note} if v.note else {})}
            for s, r, v in zip(samples, records, verdicts, strict=True)
        )  # fmt: skip
        write_whole(folder.path / "log.jsonl", as_lines(log))
    if scores:
        print(table(f"{task.title}, {args.checkpoint_path}, {settings['protocol']}", scores, published(task.name)))
    figures = ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in result["counts"].items())
    print("\n".join(["", figures, *(f"{folder.path}/{name}" for name in (*exports, "result.json"))]))
    return result
