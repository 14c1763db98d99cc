"""All that a machine with an NVIDIA GPU can tell in ten minutes, with random weights of Qwen-7B's sizes.

    make gpu
    python benchmarks/bench_gpu.py --output gpu-results --parts bf16 int4

The parts run one after another, each in a process of its own: the tests that need a GPU; decode and prefill in bf16 and
Int4, at once and as a recorded graph; the server under load; LoRA. What has no time left is left out, and told. One
folder holds it all: table.md, results.json, and a log for each part.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import StaticCache  # noqa: E402

from profiling.ceilings import matmul_flops, read_bandwidth, synchronize  # noqa: E402
from profiling.costs import ROWS, kv_bytes_per_position, prefill_flops, weight_bytes_per_token  # noqa: E402
from profiling.measure import describe_device, peak_bytes, reset_peak  # noqa: E402
from profiling.random_weights import GPTQ_SETTINGS, ensure_random_checkpoint, write_json  # noqa: E402
from profiling.report import markdown  # noqa: E402
from qwen import QWenConfig, QwenError, QWenLMHeadModel  # noqa: E402
from qwen.int4 import Int4Linear, replace_linears  # noqa: E402
from qwen.modeling_qwen import attention_masks  # noqa: E402
from utils import run_script  # noqa: E402

PARTS = ("tests", "bf16", "int4", "serving", "lora")
TINY = {"hidden_size": 256, "num_attention_heads": 2, "intermediate_size": 512}  # kv_channels is 128
LIMITS = {"tests": 150, "bf16": 120, "int4": 120, "serving": 200, "lora": 120}  # seconds
TABLE_LINE = re.compile(r"\|[- |]{5,}$|\| \w[^%]*\|$")  # behind what is left of a progress bar
TITLES = ["weights", "rows", "", "decode tok/s", "ms a step", "of memory's limit", "prefill tok/s", "of arithmetic's",
          "peak GiB"]  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), help="folder (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="what to run (default: all)")
    parser.add_argument("--seconds", type=int, default=600, help="for everything (default: %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32], help="at once (default: 1 8 32)")
    parser.add_argument("--tiny", action="store_true", help="small layers: does everything run?")
    parser.add_argument("--one", choices=("bf16", "int4"), help=argparse.SUPPRESS)  # in the process of one part
    return parser.parse_args(argv)


# ---- decode and prefill ----


def random_model(tiny: bool, int4: bool, device: torch.device) -> QWenLMHeadModel:
    """A model made on its device: no file is read, and nothing but the numbers in it is random."""
    layers = {"num_hidden_layers": 1, "vocab_size": 4096} | TINY if tiny else {}
    with torch.device("meta"):
        model = QWenLMHeadModel(QWenConfig(**layers, seq_length=8192)).to(torch.bfloat16)
        if int4:
            replace_linears(model, GPTQ_SETTINGS | {"bits": 4})
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
        for layer in model.modules():
            if isinstance(layer, Int4Linear):
                layer.qweight.random_(-(2**31), 2**31 - 1)
                layer.scales.fill_(0.004)
                if layer.bias is not None:
                    layer.bias.zero_()
    return model.eval()


@torch.inference_mode()
def measure_rows(model: QWenLMHeadModel, rows: int, prompt: int = 512, steps: int = 32) -> dict[str, float]:
    """Seconds of a prefill of `prompt` tokens in each row, and of a decoding step, at once and recorded."""
    device, config = model.device, model.config
    reset_peak(device)
    cache = StaticCache(config=config, max_cache_len=prompt + 4 * steps)
    alpha, ids = torch.ones(rows, device=device), torch.randint(256, 4096, (rows, prompt), device=device)

    def prefill() -> torch.Tensor:
        cache.reset()
        return model(ids, past_key_values=cache, use_cache=True, ntk_alpha=alpha, logits_to_keep=1).logits[:, -1:]

    token = prefill().argmax(-1)
    figures = {"prefill": min(timed(prefill, device) for _ in range(2))}
    position = torch.full((rows, 1), prompt, device=device)
    shown = (torch.arange(prompt + 4 * steps, device=device) <= prompt)[None].expand(rows, -1)
    embedded = torch.zeros(rows, 1, config.hidden_size, dtype=model.dtype, device=device)
    masks = attention_masks(config, embedded, shown.long(), cache, position)

    def step() -> None:
        logits = model(token, attention_mask=masks, position_ids=position, past_key_values=cache, use_cache=True,
                       ntk_alpha=alpha).logits  # fmt: skip
        token.copy_(logits[:, -1:].argmax(-1))

    step()
    figures["eager"] = timed(lambda: [step() for _ in range(steps)], device) / steps
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graph.replay()
        figures["graph"] = timed(lambda: [graph.replay() for _ in range(steps)], device) / steps
    return figures | {"peak": peak_bytes(device)}


def timed(work: Any, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def measure_steps(kind: str, rows: list[int], tiny: bool) -> dict[str, Any]:
    """The figures of one kind of weights, by rows, and the limits of the same GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, budget = (2**20, 0.02) if tiny else (None, 1.0)
    limits = {"bytes": read_bandwidth(device, size, budget), "flops": matmul_flops(device, torch.bfloat16, budget)}
    model = random_model(tiny, kind == "int4", device)
    measured = {}
    for count in rows:
        prompt, steps = (16, 1) if tiny else (512, 32)
        found = measure_rows(model, count, prompt, steps)
        read = weight_bytes_per_token(model.config, ROWS[kind])
        read += kv_bytes_per_position(model.config, ROWS[kind]) * count * (prompt + steps)
        for way in ("eager", "graph"):
            if way in found:
                found[f"{way}_share"] = read / found[way] / limits["bytes"]
        found["prefill_share"] = count * prefill_flops(model.config, prompt) / found["prefill"] / limits["flops"]
        measured[count] = found | {"prompt": prompt}
    return {"device": describe_device(str(device)), "limits": limits, "rows": measured}


# ---- all parts ----


def command(part: str, args: argparse.Namespace) -> list[str]:
    """What runs a part; it writes its figures to PART.json in the folder, or only to its log."""
    python, output = sys.executable, args.output / f"{part}.json"
    if part == "tests":
        return [python, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", str(ROOT / "tests")]
    if part in ("bf16", "int4"):
        flags = ["--one", part, "--output", str(output), "--rows", *map(str, args.rows)]
        return [python, __file__, *flags, *(["--tiny"] if args.tiny else [])]
    sizes = TINY if args.tiny else {}
    checkpoint = ensure_random_checkpoint(args.output / "weights", 2 if args.tiny else 32, **sizes)
    write_json(checkpoint / "generation_config.json", {"chat_format": "chatml"})  # the server refuses raw models' chats
    if part == "serving":
        clients, requests = map(str, args.rows), "2" if args.tiny else "64"
        flags = ["--no-sequential", "--requests", requests, "--output", str(output), "--clients", *clients]
        return [python, str(ROOT / "benchmarks" / "bench_serve.py"), "-c", str(checkpoint), *flags]
    steps = "1" if args.tiny else "8"
    flags = ["--ways", "ours", "--runs", "1", "--dtype", "bf16", "--steps", steps]
    return [python, str(ROOT / "benchmarks" / "bench_finetune.py"), "-c", str(checkpoint), *flags]


def run_part(part: str, args: argparse.Namespace, deadline: float) -> str:
    """Run a part to its end or its limit: how it ended."""
    seconds = min(LIMITS[part], deadline - time.monotonic())
    if seconds < 10:
        return "left out: no time"
    with (args.output / f"{part}.log").open("w", encoding="utf-8") as log:
        try:
            words = command(part, args)
            status = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, timeout=seconds, cwd=ROOT).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} seconds"
        except QwenError as error:
            return f"failed: {error}"
    return "done" if status == 0 else f"failed with status {status}, see {part}.log"


def render(folder: Path, endings: dict[str, str]) -> str:
    """table.md"""
    text = ["| part | how it ended |", "|---|---|", *(f"| {part} | {how} |" for part, how in endings.items()), ""]
    rows: list[list[str]] = []
    for kind in ("bf16", "int4"):
        if not (folder / f"{kind}.json").is_file():
            continue
        part = json.loads((folder / f"{kind}.json").read_text(encoding="utf-8"))
        text += [f"{part['device']} ({kind}): reads {part['limits']['bytes'] / 1e9:.0f} GB/s, computes "
                 f"{part['limits']['flops'] / 1e12:.0f} TFLOP/s in bf16.", ""]  # fmt: skip
        for count, f in part["rows"].items():
            for way in ("eager", "graph"):
                if way in f:
                    prefill = int(count) * f["prompt"] / f["prefill"]
                    rows.append([kind, count, way, f"{int(count) / f[way]:.0f}", f"{1000 * f[way]:.2f}",
                                 f"{f[way + '_share']:.0%}", f"{prefill:.0f}", f"{f['prefill_share']:.0%}",
                                 f"{f['peak'] / 2**30:.1f}"])  # fmt: skip
    text += [markdown(TITLES, rows), ""] if rows else []
    for part in ("serving", "lora", "tests"):
        if (log := folder / f"{part}.log").is_file():
            lines = log.read_text(encoding="utf-8").splitlines()
            table = [found[0] for line in lines if (found := TABLE_LINE.search(line))]
            text += [f"{part}:", "", *(table or lines[-1:]), ""]
    return "\n".join(text)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.one:
        args.output.write_text(json.dumps(measure_steps(args.one, args.rows, args.tiny)) + "\n", encoding="utf-8")
        return 0
    if not (torch.cuda.is_available() or args.tiny):
        raise QwenError("PyTorch finds no NVIDIA GPU here: with --tiny this only tries whether everything runs")
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    deadline, endings = time.monotonic() + args.seconds, {}
    for part in args.parts:
        print(f"{part} ...", file=sys.stderr, flush=True)
        endings[part] = run_part(part, args, deadline)
        (args.output / "results.json").write_text(json.dumps(endings, indent=2) + "\n", encoding="utf-8")
        (args.output / "table.md").write_text(render(args.output, endings), encoding="utf-8")
    print((args.output / "table.md").read_text(encoding="utf-8"))
    return 0 if set(endings.values()) == {"done"} else 1


if __name__ == "__main__":
    run_script(main)
