"""The profiling tool: its arithmetic against sums over real tensors, its runs on the demo model, its refusals."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import profile_inference
from export_gguf import write_gguf
from profiling import ceilings, random_weights
from profiling.costs import ROWS, Row, bytes_per_token, prefill_flops, weight_bytes_per_token
from profiling.measure import measure_model, random_ids, time_generation
from profiling.peers import as_qwen2, check_llama_cpp, run_llama_cpp
from profiling.random_weights import REGULAR_TOKENS, checkpoint_bytes, ensure_random_checkpoint
from profiling.report import is_7b, medians, pair_ratios, published_figure, render, summarize
from qwen import QWenConfig, QwenError, QWenLMHeadModel
from qwen.checkpoint import check_weight_files
from utils import load_model_and_tokenizer

SMALL = {"hidden_size": 256, "num_attention_heads": 4, "kv_channels": 64, "intermediate_size": 1024}
PLAN = {
    "prompt_tokens": 12, "after_prompt": 3, "context": 2, "encode_tokens": 9, "lengths": [4, 6], "groups": {},
    "vocabulary": 151_936, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_random_checkpoint(tmp_path_factory.mktemp("random"), 2, vocab_size=151_936, **SMALL)


@pytest.fixture(scope="module")
def model(random_checkpoint: Path) -> QWenLMHeadModel:
    return load_model_and_tokenizer(random_checkpoint, device="cpu", dtype="fp32")[0]


# ---- costs ----


def test_weight_bytes_are_the_sum_over_the_models_tensors(model: QWenLMHeadModel) -> None:
    total = sum(p.numel() * 4 for name, p in model.named_parameters() if name != "transformer.wte.weight")
    assert weight_bytes_per_token(model.config, ROWS["fp32"]) == total + 4 * model.config.hidden_size


def test_a_7b_token_costs_what_the_published_file_sizes_say() -> None:
    config = QWenConfig()
    table = 151_936 * 4096 * 2
    # 15,442,649,088 bytes of tensors, less the embedding, of which one row is read.
    assert weight_bytes_per_token(config, ROWS["bf16"]) == 15_442_649_088 - table + 4096 * 2
    # Of the Int4 file's 5,860,564,992 bytes a step needs no zeros, no group indices and no biases but c_attn's.
    linears = [(12_288, 4096), (4096, 4096), (11_008, 4096), (11_008, 4096), (4096, 11_008)]
    unread = 32 * sum(o * i // 128 // 2 + 4 * i for o, i in linears) + 32 * 2 * (4096 + 11_008 * 2 + 4096)
    assert weight_bytes_per_token(config, ROWS["int4"]) == 5_860_564_992 - table + 4096 * 2 - unread


def test_a_step_reads_the_mean_cache() -> None:
    config = QWenConfig()
    steps = [2 + t for t in range(1, 6)]  # context 2, six new tokens: the first comes from the prefill
    mean = sum(steps) / len(steps) * 2 * 32 * 32 * 128 * 2
    found = bytes_per_token(config, ROWS["bf16"], 2, 6) - weight_bytes_per_token(config, ROWS["bf16"])
    assert found == pytest.approx(mean)
    half = bytes_per_token(config, ROWS["bf16-kv8"], 2, 6) - weight_bytes_per_token(config, ROWS["bf16-kv8"])
    assert half == pytest.approx(mean / 2)


def test_prefill_operations_equal_those_that_torch_counts(model: QWenLMHeadModel) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    tokens = 32
    counter = FlopCounterMode(display=False)
    decoder, model.transformer.cpu_decoder = getattr(model.transformer, "cpu_decoder", None), None
    try:
        with counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            model(torch.ones(1, tokens, dtype=torch.long), logits_to_keep=1)
    finally:
        model.transformer.cpu_decoder = decoder
    pairs = tokens * (tokens - 1) // 2  # torch counts the half of the square that causality leaves out
    ours = prefill_flops(model.config, tokens)
    assert counter.get_total_flops() == ours + 2 * 2 * pairs * 256 * model.config.num_hidden_layers


# ---- figures ----


def result_of(prefill_s: float, rest_s: float, memory: int = 2**30) -> dict:
    lengths = {str(n): {"first_s": 1.0, "rest_s": rest_s} for n in PLAN["lengths"]}
    return {"prefill_s": prefill_s, "after_s": 1.0, "tokens": [1, 2, 3], "lengths": lengths,
            "memory": {"encode": memory, "4": memory, "6": memory}}  # fmt: skip


RUNS = [
    {"row": "bf16", "engine": engine, "round": number, "result": result_of(1.0, rest)}
    for number, pair in enumerate([(1.0, 2.0), (2.0, 1.0), (3.0, 12.0)])
    for engine, rest in zip(("ours", "llama.cpp"), pair, strict=True)
]


def test_medians_of_given_seconds() -> None:
    found = medians(RUNS, PLAN)
    assert found["bf16", "ours"]["decode_4"] == pytest.approx(3 / 2.0)  # three steps in 1, 2 and 3 s
    assert found["bf16", "llama.cpp"]["decode_4"] == pytest.approx(3 / 2.0)
    assert found["bf16", "ours"]["whole_6"] == pytest.approx(6 / 3.0)
    assert found["bf16", "ours"]["prefill"] == 12


def test_pair_ratios_compare_within_a_round() -> None:
    # Speeds of 2x, 0.5x and 4x: the median of pairs is 2, though the medians of both engines are equal.
    assert pair_ratios(RUNS, PLAN)["bf16", "llama.cpp"]["decode_4"] == pytest.approx(2.0)


def test_an_interrupted_round_has_no_ratio() -> None:
    assert pair_ratios(RUNS[:1], PLAN) == {}
    assert pair_ratios(RUNS[1:2], PLAN) == {}


def test_summary_relates_speed_to_the_ceilings() -> None:
    config = QWenConfig()
    limits = {"read_bytes_s": 1e12, "flops_bf16": 1e15}
    [ours, _] = summarize(RUNS, PLAN, limits, config)
    part = ours["lengths"][4]
    assert part["ms_per_token"] == pytest.approx(2000 / 3)
    assert part["read_share"] == pytest.approx(bytes_per_token(config, Row("bf16"), 2, 4) * 1.5 / 1e12)
    assert ours["prefill_share"] == pytest.approx(prefill_flops(config, 12) / 1e15)
    assert part["peak_gib"] == 1.0


def test_llama_cpps_q4_0_is_counted_with_its_own_scales() -> None:
    gguf = pytest.importorskip("gguf")
    runs = [{**run, "row": "int4"} for run in RUNS]
    lines = summarize(runs, PLAN, {"read_bytes_s": 1e12, "flops_bf16": 1e15}, QWenConfig())
    ours, peer = (line["lengths"][4]["bytes_per_token"] for line in lines)
    weights = 32 * (12_288 * 4096 + 4096 * 4096 + 3 * 11_008 * 4096)
    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q4_0]
    assert peer - ours == weights * size / numbers - weights * (0.5 + 2 / 128)


def test_published_figures_stand_beside_the_7b_only() -> None:
    plan = {**PLAN, "lengths": [2048], "encode_tokens": 2048}
    lengths = {"2048": {"first_s": 0.0, "rest_s": 100.0}}
    run = {"row": "bf16", "engine": "ours", "round": 0, "result": {**result_of(1, 1), "lengths": lengths}}
    run["result"]["memory"] = {"encode": 17 * 2**30, "2048": 17 * 2**30}
    limits = {"read_bytes_s": 1e12, "flops_bf16": 1e15}
    [line] = summarize([run], plan, limits, QWenConfig())
    assert line["lengths"][2048]["published_tokens_s"] == 40.93
    assert line["published_encode_gib"] == 16.99
    assert "| 40.93 | 0.50 |" in render([line], plan, {})
    [line] = summarize([run], plan, limits, QWenConfig(num_hidden_layers=31))
    assert line["lengths"][2048]["published_tokens_s"] is None
    assert not is_7b(QWenConfig(num_hidden_layers=31))


def test_the_newest_published_table_wins_and_gaps_are_filled_from_older_ones() -> None:
    assert published_figure("speed", "int4", 8192) == 38.61
    assert published_figure("generate_memory", "bf16-kv8", 8192) == 17.6
    assert published_figure("speed", "fp32", 2048) is None


# ---- ceilings ----


def test_ceilings_are_rates_of_the_machine() -> None:
    cpu = torch.device("cpu")
    assert ceilings.read_bandwidth(cpu, buffer_bytes=2**24, budget_s=0.01) > 1e6
    assert ceilings.matmul_flops(cpu, torch.float32, budget_s=0.01) > 1e6


# ---- random weights ----


def test_random_checkpoint_is_a_whole_official_directory(random_checkpoint: Path) -> None:
    check_weight_files(random_checkpoint)
    files = sorted(random_checkpoint.glob("*.safetensors"))
    assert len(files) == 4  # embedding, two blocks, head
    tokenizer = AutoTokenizer.from_pretrained(random_checkpoint)
    assert len(tokenizer) == REGULAR_TOKENS + 208
    assert tokenizer.im_end_id == 151_645
    assert tokenizer.decode(tokenizer.encode("Hello, wörld")) == "Hello, wörld"


def test_random_logits_are_finite(model: QWenLMHeadModel) -> None:
    with torch.no_grad():
        logits = model(torch.tensor([random_ids(20, 151_936)])).logits
    assert torch.isfinite(logits).all() and logits.std() > 0


@pytest.mark.parametrize(("bits", "size"), [(0, 15_442_649_088), (4, 5_860_564_992)])
def test_random_checkpoints_have_the_published_sizes(bits: int, size: int) -> None:
    assert checkpoint_bytes(QWenConfig(), bits) == size


def test_random_int4_is_loaded_and_has_the_spread_of_the_unquantised(tmp_path: Path) -> None:
    directory = ensure_random_checkpoint(tmp_path, 1, bits=4, **SMALL)
    loaded, _ = load_model_and_tokenizer(directory, device="cpu", dtype="bf16")
    linear = loaded.transformer.h[0].mlp.w1
    weight = linear(torch.eye(256, dtype=torch.bfloat16)).float()
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_no_disk_space_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(random_weights.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(QwenError, match=r"takes 15\.4 GB and .* has 1\.0 GB free: .*--work-dir"):
        ensure_random_checkpoint(tmp_path, 32)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(random_weights, "make_tensor", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ensure_random_checkpoint(tmp_path, 1, **SMALL)
    assert list(tmp_path.iterdir()) == []


# ---- measuring ----


def test_generation_counts_its_tokens(model: QWenLMHeadModel) -> None:
    prompt = random_ids(5, 151_936)
    run = time_generation(model, prompt, 6)
    # The oracle is a loop without cache over the logits.
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert run["tokens"] == ids[5:]
    assert run["first_s"] > 0 and run["rest_s"] > 0


def test_a_row_is_measured_in_all_parts(model: QWenLMHeadModel) -> None:
    result = measure_model(model, PLAN, {})
    assert len(result["tokens"]) == 3
    assert set(result["lengths"]) == {"4", "6"}
    resident = sum(p.numel() * 4 for p in model.parameters())
    assert set(result["memory"]) == {"encode", "4", "6"}
    assert all(size > resident for size in result["memory"].values())


def test_qwen2_peer_gives_the_same_logits(model: QWenLMHeadModel) -> None:
    peer = as_qwen2(model)
    ids = torch.tensor([random_ids(24, 151_936)])
    with torch.no_grad():
        torch.testing.assert_close(peer(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    ours = {p.data_ptr() for p in model.parameters()}
    assert peer.lm_head.weight.data_ptr() in ours  # shared, not copied


def test_gguf_file_holds_the_checkpoints_weights(
    random_checkpoint: Path, model: QWenLMHeadModel, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(write_gguf(random_checkpoint, tmp_path / "model.gguf", "bf16"))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 3 + 2 * 8
    for name, ours in (("blk.1.ffn_gate.weight", model.transformer.h[1].mlp.w2.weight),
                       ("blk.0.attn_qkv.bias", model.transformer.h[0].attn.c_attn.bias)):  # fmt: skip
        stored = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        assert torch.equal(torch.tensor(stored).view(ours.shape), ours)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.slow
def test_llama_cpp_writes_the_same_tokens(demo_checkpoint: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    demo, tokenizer = load_model_and_tokenizer(demo_checkpoint, device="cpu", dtype="fp32")
    prompt = tokenizer.encode("The history of the lighthouse begins in the year")
    file = write_gguf(demo_checkpoint, tmp_path / "demo.gguf", "f32")
    job = {"model": str(file), "prompt": prompt, "after_prompt": 32, "context": 1, "lengths": [2],
           "threads": 1, "kv": "fp32", "on_gpu": False}  # fmt: skip
    assert run_llama_cpp(job, sys.executable)["tokens"] == time_generation(demo, prompt, 32)["tokens"]


# ---- the tool ----


def test_the_tool_measures_the_demo(demo_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "figures.json"
    flags = ["-c", "demo", "--cpu-only", "--rows", "fp32", "--lengths", "3", "--encode-tokens", "8",
             "--prompt-tokens", "8", "--runs", "1", "--output", str(output)]  # fmt: skip
    assert profile_inference.main(flags) == 0
    found = json.loads(output.read_text())
    [run] = found["runs"]
    assert run["row"] == "fp32" and len(run["result"]["tokens"]) == 3
    [line] = found["summary"]
    part = line["lengths"]["3"]
    weights = 30 * (576 * 3 * 576 + 576 * 576 + 3 * 576 * 1536 + 3 * 576 + 2 * 576) + 49_408 * 576 + 2 * 576
    cache = 2 * 30 * 576 * 2.5  # steps see 2 and 3 tokens
    assert part["bytes_per_token"] == pytest.approx(4 * (weights + cache))
    assert part["read_share"] == pytest.approx(part["read_bytes_s"] / found["ceilings"]["read_bytes_s"])
    assert part["published_tokens_s"] is None
    shown = capfd.readouterr().out
    assert shown.count("| fp32 | ours |") == 4  # decoding, prefill, two of memory


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-c", "demo", "--dtype", "bf16"], "use --rows bf16"),
        (["-c", "demo", "--random-weights", "2"], "leave -c out"),
        (["--random-weights", "33"], "32 layers"),
        (["-c", "demo", "--lengths", "1"], "--lengths 1: give at least 2"),
        (["-c", "demo", "--runs", "0"], "--runs 0"),
        (["-c", "demo", "--lengths", "4", "--encode-tokens", "90000"], "90,001 tokens are asked for"),
        (["-c", "demo", "--output", "/nowhere/at/all.json"], "there is no folder"),
        (["-c", "demo", "--rows", "int4"], "give it with --int4-checkpoint"),
        (["-c", "demo", "--peer", "llama.cpp", "--peer-python", "/no/python"], "can't be run"),
    ],
)
def test_wrong_flags_are_one_sentence(flags: list[str], message: str, demo_checkpoint: Path) -> None:
    with pytest.raises(QwenError, match=message):
        profile_inference.main(flags)


def test_an_interpreter_without_llama_cpp_is_one_sentence(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(QwenError, match="pip install llama-cpp-python"):
        check_llama_cpp(str(python))


def test_ctrl_c_keeps_what_was_measured(
    demo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([{"read_bytes_s": 1e10, "flops_fp32": 1e11}, {**result_of(1.0, 2.0), "lengths": {
        "4": {"first_s": 1.0, "rest_s": 2.0}}, "memory": {"encode": 2**30, "4": 2**30}}])  # fmt: skip

    def worker(job: dict) -> dict:
        if (answer := next(answers, None)) is None:
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(profile_inference, "run_worker", worker)
    output = tmp_path / "figures.json"
    flags = ["-c", "demo", "--cpu-only", "--rows", "fp32", "--lengths", "4", "--prompt-tokens", "12"]
    assert profile_inference.main([*flags, "--output", str(output)]) == 130
    assert "interrupted" in capsys.readouterr().out
    assert len(json.loads(output.read_text())["runs"]) == 1
