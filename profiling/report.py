"""From measured runs to figures and Markdown tables."""

import json
import statistics
from pathlib import Path
from typing import Any

from profiling.costs import ROWS, bytes_per_token, prefill_flops
from qwen import QWenConfig

PUBLISHED = Path(__file__).with_name("published.json")
OURS = "ours"
GIB = 2**30
LLAMA_GROUP = 32  # inputs that share a scale in llama.cpp's Q4_0 and Q8_0
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_channels", "intermediate_size")


def is_7b(config: QWenConfig) -> bool:
    """Whether the sizes are Qwen-7B's own, so that the published figures are of the same model."""
    return all(getattr(config, name) == getattr(QWenConfig(), name) for name in SIZES)


def published_figure(table: str, row: str, length: int) -> float | None:
    """The publisher's figure for a row: the newest table that has it; speeds in tokens/s, memory in GiB.

    Args:
        table: "speed", "encode_memory" or "generate_memory".
    """
    for source in json.loads(PUBLISHED.read_text(encoding="utf-8"))["tables"]:
        if (figure := source.get(table, {}).get(row, {}).get(str(length))) is not None:
            return figure
    return None


def run_figures(result: dict[str, Any], plan: dict[str, Any]) -> dict[str, float]:
    """One run's speeds in tokens per second and memory in bytes, by name."""
    figures = {
        "prefill": plan["prompt_tokens"] / result["prefill_s"],
        "after": (plan["after_prompt"] - 1) / result["after_s"],
    }
    for length, seconds in result["lengths"].items():
        figures[f"whole_{length}"] = int(length) / (seconds["first_s"] + seconds["rest_s"])
        figures[f"decode_{length}"] = (int(length) - 1) / seconds["rest_s"]
    return figures | {f"memory_{name}": size for name, size in result["memory"].items()}


def medians(runs: list[dict[str, Any]], plan: dict[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    """(row, engine) to the median of each figure over its runs."""
    figures: dict[tuple[str, str], list[dict[str, float]]] = {}
    for run in runs:
        figures.setdefault((run["row"], run["engine"]), []).append(run_figures(run["result"], plan))
    return {key: {name: statistics.median(f[name] for f in found) for name in found[0]}
            for key, found in figures.items()}  # fmt: skip


def pair_ratios(runs: list[dict[str, Any]], plan: dict[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    """(row, peer) to the median of ours / peer over the rounds in which both ran; above 1 ours is faster."""
    by_key = {(run["row"], run["engine"], run["round"]): run_figures(run["result"], plan) for run in runs}
    ratios: dict[tuple[str, str], dict[str, list[float]]] = {}
    for (row, engine, number), peer in by_key.items():
        ours = by_key.get((row, OURS, number))
        if engine == OURS or ours is None:
            continue
        for name in ours.keys() & peer.keys():
            if not name.startswith("memory_"):
                ratios.setdefault((row, engine), {}).setdefault(name, []).append(ours[name] / peer[name])
    return {key: {name: statistics.median(found) for name, found in sorted(by_name.items())}
            for key, by_name in ratios.items()}  # fmt: skip


def summarize(
    runs: list[dict[str, Any]], plan: dict[str, Any], ceilings: dict[str, float], config: QWenConfig
) -> list[dict[str, Any]]:
    """A list of lines, one for each row and engine, with everything that the tables show.

    plan["groups"] holds each row's group size of quantisation.
    """
    known = is_7b(config)
    lines = []
    for (row, engine), figures in medians(runs, plan).items():
        kind = ROWS[row]
        group = LLAMA_GROUP if engine == "llama.cpp" else plan["groups"].get(row, 128)
        flops = prefill_flops(config, plan["prompt_tokens"]) * figures["prefill"] / plan["prompt_tokens"]
        line = {
            "row": row,
            "engine": engine,
            "prefill_tokens_s": figures["prefill"],
            "prefill_flops_s": flops,
            "prefill_share": flops / ceilings[f"flops_{kind.dtype}"],
            "after_prompt_tokens_s": figures["after"],
            "encode_gib": figures["memory_encode"] / GIB if "memory_encode" in figures else None,
            "published_encode_gib": known and published_figure("encode_memory", row, plan["encode_tokens"]) or None,
            "lengths": {},
        }
        for length in plan["lengths"]:
            read = bytes_per_token(config, kind, plan["context"], length, group)
            speed = figures[f"decode_{length}"]
            line["lengths"][length] = {
                "tokens_s": figures[f"whole_{length}"],
                "ms_per_token": 1000 / speed,
                "bytes_per_token": read,
                "read_bytes_s": read * speed,
                "read_share": read * speed / ceilings["read_bytes_s"],
                "peak_gib": figures[f"memory_{length}"] / GIB,
                "published_tokens_s": known and published_figure("speed", row, length) or None,
                "published_gib": known and published_figure("generate_memory", row, length) or None,
            }
        lines.append(line)
    return lines


# ---- tables ----


def markdown(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, form: str = "{:.2f}") -> str:
    return "–" if value is None else form.format(value)


def giga(value: float) -> str:
    return f"{value / 1e9:.1f}"


def ratio(value: float | None, published: float | None) -> str:
    return "–" if value is None or published is None else f"{value / published:.2f}"


def render(lines: list[dict[str, Any]], plan: dict[str, Any], ratios: dict[tuple[str, str], dict[str, float]]) -> str:
    """The tables: decoding, prefill, memory and, where there are peers, ratios."""
    decode, prefill, memory = [], [], []
    for line in lines:
        who = [line["row"], line["engine"]]
        prefill.append([*who, number(line["prefill_tokens_s"], "{:.0f}"), giga(line["prefill_flops_s"]),
                        number(line["prefill_share"], "{:.0%}"), number(line["after_prompt_tokens_s"])])  # fmt: skip
        if line["encode_gib"] is not None:
            published = line["published_encode_gib"]
            memory.append([*who, f"encode {plan['encode_tokens']}", number(line["encode_gib"]), number(published),
                           ratio(line["encode_gib"], published)])  # fmt: skip
        for length, part in line["lengths"].items():
            decode.append([*who, str(length), number(part["tokens_s"]), number(part["ms_per_token"]),
                           number(part["bytes_per_token"] / 1e6, "{:.1f}"), giga(part["read_bytes_s"]),
                           number(part["read_share"], "{:.0%}"), number(part["published_tokens_s"]),
                           ratio(part["tokens_s"], part["published_tokens_s"])])  # fmt: skip
            memory.append([*who, f"generate {length}", number(part["peak_gib"]), number(part["published_gib"]),
                           ratio(part["peak_gib"], part["published_gib"])])  # fmt: skip
    speed_titles = ["row", "engine", "new tokens", "tokens/s", "ms/token", "MB read/token", "GB/s", "of ceiling",
                    "published tokens/s", "ratio"]  # fmt: skip
    after = f"then tokens/s over {plan['after_prompt']}"
    prefilled = f"prefill {plan['prompt_tokens']} (tokens/s)"
    tables = [
        markdown(speed_titles, decode),
        markdown(["row", "engine", prefilled, "GFLOP/s", "of ceiling", after], prefill),
        markdown(["row", "engine", "peak memory", "GiB", "published", "ratio"], memory),
    ]
    if ratios:
        names = sorted({name for found in ratios.values() for name in found})
        rows = [[row, peer, *(number(found.get(name)) for name in names)] for (row, peer), found in ratios.items()]
        titles = [name.replace("_", " ") for name in names]
        tables.append(markdown(["row", "ours / peer", *titles], rows))
    return "\n\n".join(tables)
