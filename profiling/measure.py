"""Measure one row in this process: prefill, decoding and peak memory, through `model.generate` as users call it."""

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from profiling.ceilings import synchronize
from qwen.hardware import num_threads, processor_name

GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "temperature": None, "top_p": None, "top_k": None}


class Stopwatch(BaseStreamer):
    """Notes when `generate` hands over each token; the first thing it hands over is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []
        self.seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if not self.seen_prompt:
            self.seen_prompt = True
            return
        self.tokens += value.flatten().tolist()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def random_ids(count: int, vocabulary: int) -> list[int]:
    """Prompt ids, the same at each call; none is a control token of a Qwen vocabulary."""
    generator = torch.Generator().manual_seed(1234)
    return torch.randint(256, min(vocabulary, 40_000), (count,), generator=generator).tolist()


@torch.inference_mode()
def time_generation(
    model: Any, prompt: list[int], new_tokens: int, sample: bool = False, **settings: Any
) -> dict[str, Any]:
    """Generation of exactly `new_tokens`: seconds to the first token, seconds of all others, and the tokens.

    Args:
        sample: draw tokens with the checkpoint's own settings; otherwise each is the likeliest.
    """
    input_ids = torch.tensor([prompt], device=model.device)
    watch = Stopwatch()
    synchronize(input_ids.device)
    start = time.perf_counter()
    model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        streamer=watch,
        **({"do_sample": True} if sample else GREEDY),
        eos_token_id=model.config.vocab_size,  # no token: the length is fixed
        max_new_tokens=new_tokens,
        **settings,
    )
    return {"tokens": watch.tokens, "first_s": watch.times[0] - start, "rest_s": watch.times[-1] - watch.times[0]}


def measure_model(model: Any, plan: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """All figures of one row: see `plan` in profile_inference.py; memory in bytes."""
    vocabulary = model.config.vocab_size
    prompt = random_ids(plan["prompt_tokens"], vocabulary)
    time_generation(model, prompt[:16], 4, **settings)  # builds what is built at the first call
    time_generation(model, prompt, 1, **settings)
    after = time_generation(model, prompt, plan["after_prompt"], **settings)
    result = {
        "prefill_s": after["first_s"],
        "after_s": after["rest_s"],
        "tokens": after["tokens"],
        "lengths": {},
        "memory": {},
    }
    reset_peak(model.device)
    time_generation(model, random_ids(plan["encode_tokens"], vocabulary), 1, **settings)
    result["memory"]["encode"] = peak_bytes(model.device)
    for length in plan["lengths"]:
        reset_peak(model.device)
        run = time_generation(model, random_ids(plan["context"], vocabulary), length, **settings)
        assert len(run["tokens"]) == length, f"asked for {length} tokens, got {len(run['tokens'])}"
        result["lengths"][str(length)] = {"first_s": run["first_s"], "rest_s": run["rest_s"]}
        result["memory"][str(length)] = peak_bytes(model.device)
    return result


def describe_device(device: str) -> str:
    """A GPU by its name; a processor by its name and the threads at work."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {num_threads()} threads"


def reset_peak(device: torch.device) -> None:
    """Start the peak of all GPUs anew, or on Linux that of the process; elsewhere it stays the peak so far."""
    if device.type == "cuda":
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(gpu)
    elif sys.platform == "linux":
        with suppress(OSError):  # forbidden in some containers
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The most memory in use since `reset_peak`: what PyTorch took of all GPUs, else resident memory."""
    if device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
