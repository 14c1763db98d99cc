"""benchmarks/bench_cpu.py: a whole run on tiny weights, its arithmetic, its refusals, and the files it makes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import bench_cpu
from benchmarks.serving import Target, start
from export_gguf import write_gguf
from profiling.random_weights import ensure_random_checkpoint
from profiling.rounded import ensure_rounded_checkpoint, round_weight
from qwen import QwenError
from utils import load_model_and_tokenizer

SCRIPT = Path(bench_cpu.__file__)
SMALL = {"hidden_size": 128, "num_attention_heads": 2, "kv_channels": 64, "intermediate_size": 512}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = ensure_random_checkpoint(tmp_path_factory.mktemp("random"), 2, vocab_size=151_936, **SMALL)
    settings = made / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_format": "chatml"}))
    return made


def test_without_a_peer_one_command_prints_the_whole_table(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--quick", "-c", str(tiny), "--clients", "1", "3", "-o", str(output)]
    done = subprocess.run([*command, "--work-dir", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    for name in ("decode bf16 (tok/s)", "prefill int4 (tok/s)", "serving 1 client (tok/s)"):
        ours, peer, ratio, aim, reached, *_ = cells[name]
        assert float(ours.split()[0].replace(",", "")) > 0 and [peer, ratio, reached] == ["–"] * 3 and aim[0] == "≥"
    assert cells["sampling bf16 (ms a token)"][4] in ("yes", "no")
    assert cells["total by clients (tok/s)"][3] == "never falls"
    found = json.loads(output.read_text())
    serving = [run for run in found["runs"] if run["row"] == "serving"]
    assert [(run["clients"], len(run["first"])) for run in serving] == [(1, 4), (3, 4)]
    assert found["machine"]["processor"] in done.stdout and found["commit"] in done.stdout


def runs(ours: list[float], peer: list[float]) -> list[dict]:
    """Runs of single replies with these seconds for the tokens after the first."""
    return [
        {"row": "bf16", "engine": engine, "choice": "greedy", "round": number, "first_s": 1.0, "rest_s": seconds}
        for engine, all_seconds in (("ours", ours), ("llama-server", peer))
        for number, seconds in enumerate(all_seconds)
    ]


def test_ratios_are_those_within_a_round() -> None:
    record = {"runs": runs([1.0, 2.0, 3.0], [2.0, 1.0, 12.0])}
    ours, peer = (
        bench_cpu.figures(record, lambda run: 60 / run["rest_s"], engine=e) for e in (bench_cpu.OURS, bench_cpu.PEER)
    )
    assert bench_cpu.spread(ours) == "30.0 (20.0–60.0)"
    assert bench_cpu.compared(ours, peer, 1.1) == ["2.00x (0.50x–4.00x)", "≥ 1.1x", "yes"]
    assert bench_cpu.compared(ours, peer, 1.05, at_most=True)[2] == "no"
    assert bench_cpu.compared(ours, {}, 1.1) == ["–", "≥ 1.1x", "–"]


def test_a_fall_is_told_and_noise_is_none() -> None:
    assert bench_cpu.fallen({1: 50.0, 8: 100.0, 9: 98.0, 16: 120.0}) == []
    assert bench_cpu.fallen({1: 50.0, 8: 100.0, 9: 60.0, 16: 90.0, 32: 130.0}) == [9, 16]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--llama-server", "/no/such/llama-server"], "/no/such/llama-server does not exist: give the path"),
        (["--llama-server", "/"], "is a directory"),
        (["--llama-server", __file__], "can't be run"),
        (["--llama-server", "true"], "doesn't tell a version"),
        (["--clients", "0"], "--clients 0: give numbers from 1 on"),
        (["-o", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
    ],
)
def test_wrong_flags_are_one_sentence_before_anything_is_loaded(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_cpu, "prepare", lambda args: pytest.fail("work began"))
    with pytest.raises(QwenError, match=message):
        bench_cpu.main(flags)


def test_a_wrong_path_leaves_no_traceback() -> None:
    command = [sys.executable, str(SCRIPT), "--llama-server", "/no/such"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("bench_cpu.py: error: --llama-server /no/such") and done.stderr.count("\n") == 1


def test_ctrl_c_twice_ends_the_servers_and_shows_what_there_is(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--quick", "-c", str(tiny), "-o", str(output), "--clients", "1", "32"]
    with subprocess.Popen(
        [*command, "--work-dir", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.stderr.read(8):
            if output.is_file() and any(run["row"] == "serving" for run in json.loads(output.read_text())["runs"]):
                break
        servers = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        shown, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "interrupted." in shown and "| serving 1 client (tok/s) |" in shown
    assert servers and not any(server.is_running() for server in servers)


def test_a_server_that_ends_is_told_with_its_status(tmp_path: Path) -> None:
    target = Target("llama-server", [sys.executable, "-c", "raise SystemExit(7)"], 1)
    with pytest.raises(QwenError, match="llama-server ended with status 7 before it served port 1"):
        start(target)
    assert target.process is None


# ---- the files it makes ----


def test_rounding_is_the_nearest_of_sixteen_numbers() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 64)
    numbers, scales = round_weight(weight, 32)
    restored = (numbers.float() - 8) * scales.float().repeat_interleave(32, 0)
    assert numbers.max() <= 15 and scales.shape == (2, 6)
    inside = (weight.T / scales.float().repeat_interleave(32, 0)).clamp(-8, 7) * scales.float().repeat_interleave(32, 0)
    assert ((restored - inside).abs() <= scales.float().repeat_interleave(32, 0) * 0.501).all()


def test_the_rounded_checkpoint_loads_and_is_near_the_original(tiny: Path, tmp_path: Path) -> None:
    rounded = ensure_rounded_checkpoint(tiny, tmp_path)
    assert ensure_rounded_checkpoint(tiny, tmp_path) == rounded
    plain, _ = load_model_and_tokenizer(tiny, device="cpu", dtype="fp32")
    loaded, _ = load_model_and_tokenizer(rounded, device="cpu", dtype="fp32")
    for part in ("attn.c_attn", "mlp.c_proj"):
        before, after = (model.transformer.h[1].get_submodule(part) for model in (plain, loaded))
        x = torch.eye(before.in_features)
        with torch.no_grad():
            error = (after(x) - before(x)).norm() / before(x).norm()
        assert 0.01 < error < 0.2


def test_a_q4_0_file_dequantises_to_the_weights_within_a_step(tiny: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    plain, tokenizer = load_model_and_tokenizer(tiny, device="cpu", dtype="fp32")
    reader = gguf.GGUFReader(write_gguf(tiny, tmp_path / "model.gguf", "q4_0", tokenizer, outer="bf16"))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    weight = plain.transformer.h[0].mlp.w2.weight.detach()
    found = torch.tensor(gguf.dequantize(stored["blk.0.ffn_gate.weight"].data, gguf.GGMLQuantizationType.Q4_0))
    step = weight.view(-1, 32).abs().amax(1, keepdim=True) / 8
    assert ((found.view(-1, 32) - weight.view(-1, 32)).abs() <= step * 1.01).all()
    assert stored["output.weight"].tensor_type == gguf.GGMLQuantizationType.BF16


def test_a_gguf_file_carries_the_vocabulary(demo_checkpoint: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint)
    reader = gguf.GGUFReader(write_gguf(demo_checkpoint, tmp_path / "model.gguf", "bf16", tokenizer))
    tokens, kinds = (reader.fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    assert len(tokens.data) == len(kinds.data) == 49_408
    names = [bytes(tokens.parts[i]).decode() for i in tokens.data]
    assert names[tokenizer.im_end_id] == "<|im_end|>" and int(kinds.parts[kinds.data[tokenizer.im_end_id]][0]) == 3
    [word] = tokenizer.encode_text(" the")
    assert names[word] == "Ġthe" and int(kinds.parts[kinds.data[word]][0]) == 1
    assert int(kinds.parts[kinds.data[-1]][0]) == 5
