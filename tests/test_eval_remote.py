"""Evaluation through a server: its scores are those of the model itself, and no question is asked twice."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

import golden
from eval import evaluate_gsm8k, evaluate_mmlu
from qwen import QwenError, QWenTokenizer

ROOT = Path(__file__).parent.parent
MMLU = ["-d", str(golden.DATA / "eval" / "mmlu"), "--subjects", "abstract_algebra", "virology", "--limit", "1"]
GSM8K = ["-d", str(golden.DATA / "eval" / "gsm8k"), "--limit", "3", "--max-new-tokens", "8"]
LOCAL = ["--device", "cpu", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: QWenTokenizer) -> Path:
    """Random weights: the choices are not among the likeliest tokens."""
    return golden.random_checkpoint(tmp_path_factory.mktemp("tiny"), tokenizer, 4096)


@contextmanager
def serve(checkpoint: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "openai_api.py", "-c", str(checkpoint), "--server-port", str(port), *LOCAL]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(240):
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                assert process.poll() is None, "the server has ended"
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def api(tiny: Path) -> Iterator[str]:
    with serve(tiny) as address:
        yield address


def result(output: Path) -> tuple[dict, list[dict]]:
    [folder] = output.iterdir()
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((folder / "result.json").read_text(encoding="utf-8")), [json.loads(line) for line in lines]


@pytest.mark.parametrize(("script", "flags"), [(evaluate_mmlu, MMLU), (evaluate_gsm8k, GSM8K)], ids=["mmlu", "gsm8k"])
def test_scores_are_those_of_the_model(tiny: Path, api: str, tmp_path: Path, script: object, flags: list) -> None:
    script.main(["-c", str(tiny), *flags, *LOCAL, "-o", str(tmp_path / "local")])
    script.main(["-c", str(tiny), *flags, "--api-base", api, "-o", str(tmp_path / "remote")])
    local, local_records = result(tmp_path / "local")
    remote, records = result(tmp_path / "remote")
    assert remote.keys() == local.keys()
    assert remote["scores"] == local["scores"] and remote["counts"] == local["counts"]
    for record, expected in zip(records, local_records, strict=True):
        assert record.keys() == expected.keys() and record["prompt"] == expected["prompt"]
        if "text" in expected:
            assert (record["text"], record["completion_tokens"]) == (expected["text"], expected["completion_tokens"])
        else:
            assert record["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-3)


def test_what_is_answered_is_not_asked_again(tiny: Path, api: str, tmp_path: Path) -> None:
    flags = ["-c", str(tiny), *MMLU, "--api-base", api, "--api-requests", "2", "-o", str(tmp_path / "out")]
    evaluate_mmlu.main(flags)
    whole, records = result(tmp_path / "out")
    [folder] = (tmp_path / "out").iterdir()
    first = {**records[0], "logprobs": {letter: -9.0 for letter in "ABCD"}}  # would be another if it were asked again
    (folder / "samples.jsonl").write_text(json.dumps(first) + "\n", encoding="utf-8")
    with pytest.raises(QwenError, match="holds 1 answers"):
        evaluate_mmlu.main(flags)
    evaluate_mmlu.main([*flags, "--resume"])
    again, resumed = result(tmp_path / "out")
    assert resumed[0] == first and [r["id"] for r in resumed] == [r["id"] for r in records]
    assert again["counts"] == whole["counts"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--api-base", "http://127.0.0.1:9/v1"], "127.0.0.1:9/v1/models: ConnectError"),
        (["--api-base", "{api}", "--api-model", "other"], "other"),
        (["--api-base", "{api}", "--api-requests", "0"], "--api-requests must be 1 or more"),
    ],
)
def test_mistakes(tiny: Path, api: str, tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(QwenError, match=message):
        evaluate_mmlu.main(["-c", str(tiny), *MMLU, "-o", str(tmp_path), *(flag.format(api=api) for flag in flags)])
