"""Compare fine-tuning here with the published recipe's way of batching and with TRL's SFTTrainer, in turns.

python benchmarks/bench_finetune.py -c demo --ways ours published trl

The same model, adapter, optimiser and samples; lengths are those of chats (log-normal, median 90 tokens). Each way runs
in a process of its own, in turns, so that all of them see the same machine; what is compared are supervised tokens per
second. TRL needs the packages trl and datasets.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from profiling.ceilings import synchronize  # noqa: E402
from profiling.measure import peak_bytes, reset_peak  # noqa: E402
from qwen.loss import IGNORED  # noqa: E402
from training.attention import PACKED  # noqa: E402
from training.data import PackedDataset, TokenDataset, collate, pack, tokenize  # noqa: E402
from training.forms import read_sample  # noqa: E402
from training.samples import Notes  # noqa: E402
from utils import DTYPES, find_checkpoint, load_model_for_training, run_script  # noqa: E402

WAYS = {
    "ours": "packs, loss in chunks",
    "ours-unpacked": "batches without padding, loss in chunks",
    "ours-all-logits": "packs, all logits",
    "published": "padded to the maximum, all logits",
    "trl": "SFTTrainer, its defaults",
    "trl-packed": "SFTTrainer with packing",
}
MEDIAN, SPREAD = 90, 0.8  # tokens of a chat sample: the log-normal that fits ShareGPT-like single turns


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--checkpoint-path", default="demo", help="as in cli_demo.py (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", default=["ours", "published"], choices=WAYS, help="what to compare")
    parser.add_argument("--max-length", type=int, default=512, help="--model_max_length (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="samples a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="measured steps a run (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each way, in turns (default: %(default)s)")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help="precision (default: %(default)s)")
    parser.add_argument("--full", action="store_true", help="train all weights, not an adapter")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)  # in the process of one run
    return parser.parse_args(argv)


def make_samples(count: int, max_length: int) -> list[dict[str, Any]]:
    """Conversations whose lengths are spread like those of chats; a third of the words are the question's."""
    generator = random.Random(0)
    words = "the a river tells what every small house on that hill had seen when rain came over from our sea".split()
    samples = []
    for _ in range(count):
        length = min(int(generator.lognormvariate(torch.tensor(MEDIAN).log().item(), SPREAD)), max_length) - 25
        text = generator.choices(words, k=max(length, 6))
        question, answer = text[: len(text) // 3 + 1], text[len(text) // 3 + 1 :]
        samples.append({"messages": [{"role": "user", "content": " ".join(question)},
                                     {"role": "assistant", "content": " ".join(answer)}]})  # fmt: skip
    return samples


# ---- one run ----


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Supervised and all tokens per second, and the peak of memory, of one way."""
    samples = make_samples(200 * args.steps, args.max_length)
    step, batches = (trl_steps if args.one.startswith("trl") else own_steps)(args, samples)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for batch in batches[:1]:  # to warm up
        step(batch)
    reset_peak(device)
    tokens = supervised = 0
    synchronize(device)
    start = time.perf_counter()
    for batch in batches[1 : 1 + args.steps]:
        step(batch)
        mask = batch.get("attention_mask")
        tokens += batch["input_ids"].numel() if mask is None else int(mask.sum())
        supervised += int((batch["labels"] != IGNORED).sum())
    synchronize(device)
    seconds = time.perf_counter() - start
    return {"supervised": supervised / seconds, "tokens": tokens / seconds, "peak": peak_bytes(device)}


def make_model(args: argparse.Namespace, attn: str) -> tuple[Any, Any]:
    from peft import LoraConfig, get_peft_model

    directory = find_checkpoint(args.checkpoint_path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model_for_training(directory, DTYPES[args.dtype], {"": device}, attn)
    if not args.full:
        config = LoraConfig(r=16, target_modules=["c_attn", "c_proj", "w1", "w2"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    from qwen import QWenTokenizer

    return model.train(), QWenTokenizer.from_pretrained(directory)


def make_step(model: Any, **kwargs: Any) -> Callable[[dict[str, Any]], None]:
    """Forward, backward, AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    device = trained[0].device

    def step(batch: dict[str, Any]) -> None:
        batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        model(**batch, **kwargs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def own_steps(args: argparse.Namespace, samples: list[dict[str, Any]]) -> tuple[Callable, list[dict[str, Any]]]:
    model, tokenizer = make_model(args, "sdpa" if args.one == "published" else PACKED)
    conversations = [read_sample(sample, "", "sft", Notes())[0] for sample in samples]
    dataset: TokenDataset | PackedDataset = tokenize(conversations, tokenizer, args.max_length, "assistant", quiet=True)
    if args.one == "published":
        rows = [pad_to_maximum(dataset[i], args.max_length, tokenizer.eod_id) for i in range(len(dataset))]
        batches = [{name: torch.stack([row[name] for row in rows[i : i + args.batch]]) for name in rows[0]}
                   for i in range(0, len(rows), args.batch)]  # fmt: skip
        return make_step(model, use_cache=False), batches
    if args.one != "ours-unpacked":
        packs = pack(dataset.lengths, args.max_length)
        random.Random(0).shuffle(packs)
        dataset = PackedDataset(dataset, packs)
    batches = [collate([dataset[i] for i in range(first, min(first + args.batch, len(dataset)))])
               for first in range(0, len(dataset), args.batch)]  # fmt: skip
    return make_step(model, skip_logits=args.one != "ours-all-logits"), batches


def pad_to_maximum(item: dict[str, Any], length: int, pad: int) -> dict[str, torch.Tensor]:
    """A sample as the published recipe feeds it."""
    missing = length - len(item["input_ids"])
    fill = torch.nn.functional.pad
    return {"input_ids": fill(item["input_ids"], (0, missing), value=pad),
            "labels": fill(item["labels"], (0, missing), value=IGNORED),
            "attention_mask": fill(torch.ones(len(item["input_ids"]), dtype=torch.long), (0, missing))}  # fmt: skip


def trl_steps(args: argparse.Namespace, samples: list[dict[str, Any]]) -> tuple[Callable, list[dict[str, Any]]]:
    """SFTTrainer's own dataset, collator and loss on the same tokens and labels, stepped like the others."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = make_model(args, "sdpa")
    conversations = [read_sample(sample, "", "sft", Notes())[0] for sample in samples]
    tokens = tokenize(conversations, tokenizer, args.max_length, "assistant", quiet=True)
    items = [tokens[i] for i in range(len(tokens))]
    rows = [{name: item[name].tolist() for name in ("input_ids", "labels")} for item in items]
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.eos_token = "<|im_end|>"
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, per_device_train_batch_size=args.batch, max_length=args.max_length, report_to="none",
            packing=args.one == "trl-packed", bf16=args.dtype == "bf16", use_cpu=not
            torch.cuda.is_available(), dataloader_pin_memory=False, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(batch: dict[str, Any]) -> None:
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(batch)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, [batch for batch, _ in zip(trainer.get_train_dataloader(), range(args.steps + 1), strict=False)]


# ---- all runs ----


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.one:
        print(json.dumps(measure(args)))
        return
    own = sys.argv[1:] if argv is None else argv
    results: dict[str, list[dict[str, float]]] = {way: [] for way in args.ways}
    for _ in tqdm(range(args.runs), desc="Measuring", unit="turn", file=sys.stderr):
        for way in args.ways:
            command = [sys.executable, __file__, *own, "--one", way]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[way].append(json.loads(output.splitlines()[-1]))
    print(f"{args.checkpoint_path}, {'all weights' if args.full else 'LoRA'}, {args.dtype}, samples of up to "
          f"{args.max_length} tokens, {args.batch} a step; medians of {args.runs} turns\n")  # fmt: skip
    print("| way | tokens/s with loss | tokens/s | peak memory (GiB) | times slower than the first (by turns) |")
    print("|---|---|---|---|---|")
    first = results[args.ways[0]]
    for way, runs in results.items():
        middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        ratio = statistics.median(a["supervised"] / b["supervised"] for a, b in zip(first, runs, strict=True))
        print(f"| {way}: {WAYS[way]} | {middle['supervised']:,.1f} | {middle['tokens']:,.1f} | "
              f"{middle['peak'] / 2**30:.2f} | {ratio:.2f} |")  # fmt: skip


if __name__ == "__main__":
    run_script(main)
