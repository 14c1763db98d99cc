"""Measure llama.cpp in a process of its own; needs the package llama-cpp-python and nothing of this project.

    python llama_cpp_worker.py '{"model": "demo.gguf", "prompt": [1, 2], "lengths": [128], ...}'

The last line of output is JSON: seconds of each part, the tokens it wrote, the file's bytes by tensor type.
"""

import ctypes
import json
import sys
import time

import llama_cpp
import numpy as np

TYPES = {"fp32": 0, "fp16": 1, "bf16": 30}  # ggml's numbers of tensor types
Q4_0_FILE, Q8_0_FILE = 2, 7  # llama.cpp's numbers of file types


def quiet_log(level: int, text: bytes, user_data: object) -> None:
    """Say errors only: llama.cpp tells its whole life on stderr."""
    if level == 4:
        sys.stderr.write(text.decode(errors="replace"))


def quantize(source: str, target: str, kind: str, keep: str) -> None:
    """llama.cpp's own quantiser: all matrices to `kind` ("q4_0", "q8_0"), output and embedding to `keep`.

    keep "" leaves the choice of every type to llama.cpp.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {"q4_0": Q4_0_FILE, "q8_0": Q8_0_FILE}[kind]
    if keep:
        params.pure = True
        params.output_tensor_type = params.token_embedding_type = TYPES[keep]
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    if status:
        raise SystemExit(f"llama.cpp's quantiser failed on {source} with status {status}")


class Engine:
    """A loaded model with one sequence; `decode` appends ids and gives the logits after the last."""

    def __init__(self, path: str, context: int, threads: int, kv: str, on_gpu: bool) -> None:
        params = llama_cpp.llama_model_default_params()
        if on_gpu and not llama_cpp.llama_supports_gpu_offload():
            raise SystemExit("this llama-cpp-python is built without GPU support: build it with it, or use --cpu-only")
        params.n_gpu_layers = 999 if on_gpu else 0
        params.use_mmap = True
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {path}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = context, 512, 512
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = TYPES[kv]
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context of {context} tokens for {path}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def decode(self, ids: list[int]) -> int:
        """The most likely id after `ids`, which may be any number."""
        for start in range(0, len(ids), 512):
            part = ids[start : start + 512]
            buffer = (ctypes.c_int32 * len(part))(*part)
            status = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(buffer, len(part)))
            if status:
                raise SystemExit(f"llama.cpp's decode failed with status {status}")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def generate(self, prompt: list[int], count: int) -> tuple[list[int], float, float]:
        """`count` greedy ids after `prompt`, the seconds to the first, and the seconds of all others."""
        self.clear()
        start = time.perf_counter()
        tokens = [self.decode(prompt)]
        first = time.perf_counter()
        while len(tokens) < count:
            tokens.append(self.decode(tokens[-1:]))
        return tokens, first - start, time.perf_counter() - first


def peak_bytes() -> int:
    """The most memory this process has had resident, the mapped file included."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(job: dict) -> dict:
    """Prefill, decoding after it and from a short context, each with its seconds."""
    context = max([len(job["prompt"]) + job["after_prompt"], *(job["context"] + n for n in job["lengths"])]) + 8
    engine = Engine(job["model"], context, job["threads"], job["kv"], job["on_gpu"])
    engine.generate(job["prompt"][:16], 4)  # touches every page of the file and starts the threads
    engine.generate(job["prompt"], 1)
    tokens, prefill_s, after_s = engine.generate(job["prompt"], job["after_prompt"])
    result = {"tokens": tokens, "prefill_s": prefill_s, "after_s": after_s, "lengths": {}}
    for length in job["lengths"]:
        _, first_s, rest_s = engine.generate(job["prompt"][: job["context"]], length)
        result["lengths"][str(length)] = {"first_s": first_s, "rest_s": rest_s}
    result["peak_bytes"] = peak_bytes()
    result["weight_bytes"] = llama_cpp.llama_model_size(engine.model)
    result["version"] = llama_cpp.__version__
    return result


if __name__ == "__main__":
    log = llama_cpp.llama_log_callback(quiet_log)
    llama_cpp.llama_log_set(log, None)
    task = json.loads(sys.argv[1])
    try:
        if task.get("quantize"):
            quantize(task["source"], task["model"], task["quantize"], task["keep"])
        else:
            print(json.dumps(measure(task)))
    except KeyboardInterrupt:
        sys.exit(130)
