"""llama.cpp's own server as a peer: its GGUF files, its command line, and its own clock for single replies."""

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from export_gguf import import_gguf, write_gguf
from qwen.errors import QwenError
from qwen.tokenization_qwen import QWenTokenizer

BUILD = "bench_cpu.py --help says how to build one"


def check_llama_server(path: Path) -> str:
    """Its version; QwenError if the path is no llama-server that runs."""
    import_gguf()
    if shutil.which(path) is None:
        what = "is a directory" if path.is_dir() else "can't be run" if path.exists() else "does not exist"
        raise QwenError(f"--llama-server {path} {what}: give the path of the program llama-server ({BUILD})")
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise QwenError(f"--llama-server {path} doesn't run ({error}): {BUILD}") from None
    said = (done.stdout + done.stderr).splitlines()
    version = next((line.partition(":")[2].strip() for line in said if line.startswith("version:")), None)
    if done.returncode or version is None:
        raise QwenError(f"--llama-server {path} doesn't tell a version as llama-server does: {BUILD}")
    return version


def ensure_gguf(source: Path, folder: Path, precision: str, tokenizer: QWenTokenizer) -> Path:
    """The GGUF file of the checkpoint with its vocabulary in `folder`, written if it is not there or older."""
    path = folder / ("-".join(source.absolute().parts[-2:]) + f"-chat-{precision}.gguf")
    if not path.is_file() or path.stat().st_mtime < (source / "config.json").stat().st_mtime:
        folder.mkdir(parents=True, exist_ok=True)
        print(f"Writing {path} ...", file=sys.stderr)
        write_gguf(source, path, precision, tokenizer, outer="bf16")
    return path


def server_command(program: Path, model: Path, port: int, slots: int, threads: int, context: int) -> list[str]:
    """llama-server for so many replies at once of `context` tokens each; it batches continuously by default."""
    found = os.path.abspath(shutil.which(program) or program)
    command = [found, "--model", str(model), "--port", str(port), "--parallel", str(slots)]
    command += ["--ctx-size", str(slots * context), "--threads", str(threads), "--threads-batch", str(threads)]
    return [*command, "--cache-ram", "0"]  # no copies of old prompts: none comes again


def complete(port: int, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """Greedy generation of exactly `new_tokens`, timed by the server itself: no HTTP counts against it.

    Returns:
        The tokens, the seconds to the first token and those of all others, as measure.time_generation gives them.
    """
    body = {
        "prompt": prompt, "n_predict": new_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False,
        "return_tokens": True, "samplers": ["top_k"], "top_k": 1, "repeat_penalty": 1.0,
    }  # fmt: skip
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            found = json.load(answer)
    except (OSError, urllib.error.URLError) as error:
        raise QwenError(f"llama-server gives no completion: {error}") from None
    times = found["timings"]
    if times["prompt_n"] != len(prompt) or times["predicted_n"] != new_tokens:
        raise QwenError(f"llama-server read {times['prompt_n']} of {len(prompt)} tokens and wrote "
                        f"{times['predicted_n']} of {new_tokens}: a speed of that means nothing")  # fmt: skip
    return {"tokens": found["tokens"], "first_s": times["prompt_ms"] / 1000, "rest_s": times["predicted_ms"] / 1000}
