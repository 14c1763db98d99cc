"""quantize.py: its GPTQ against plain rounding and brute force, its checkpoints in use, its refusals and restarts."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import golden
import quantize
from qwen import QwenError, QWenLMHeadModel, QWenTokenizer
from qwen.chatml import encode_messages
from qwen.gptq import find_scales, importance_order, inverse_factor, quantize_weight
from utils import load_model_and_tokenizer


def correlated_inputs(count: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) / math.sqrt(size)
    return torch.randn(count, size, generator=generator) @ (mixing @ mixing + 0.1 * torch.eye(size))


def dense(numbers: Tensor, scales: Tensor, bits: int) -> Tensor:
    group_size = numbers.shape[0] // scales.shape[0]
    return ((numbers.float() - 2 ** (bits - 1)) * scales.float().repeat_interleave(group_size, 0)).T


def round_to_nearest(weight: Tensor, bits: int, group_size: int) -> Tensor:
    top = 2 ** (bits - 1) - 0.5
    groups = weight.view(weight.shape[0], -1, group_size)
    scale = groups.abs().amax(-1, keepdim=True) / top
    return ((groups / scale).round().clamp(-top - 0.5, top - 0.5) * scale).view_as(weight)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The golden model in a directory, with a vocabulary whose tokens it can all read."""
    return golden.checkpoint(tmp_path / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"The {i}th sentence says that {i * i} is the square of {i}." for i in range(60)))
    return path


def run(*argv: object) -> None:
    quantize.main([*(str(arg) for arg in argv), "--cpu-only"])


# ---- the algorithm ----


@pytest.mark.parametrize("bits", [4, 8])
def test_error_on_the_inputs_is_less_than_that_of_rounding(bits: int) -> None:
    x = correlated_inputs(500, 128)
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(1))
    numbers, scales = quantize_weight(weight, x.T @ x, bits, group_size=32, damp=0.01)
    assert numbers.shape == (128, 48) and int(numbers.max()) < 2**bits and scales.shape == (4, 48)
    ours = (x @ (dense(numbers, scales, bits) - weight).T).norm()
    rounded = (x @ (round_to_nearest(weight, bits, 32) - weight).T).norm()
    assert ours < 0.7 * rounded


def test_unrelated_inputs_are_rounded_to_the_nearest() -> None:
    """Where no input can make good for another, nothing beats rounding each by itself."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    numbers, scales = quantize_weight(weight, 3 * torch.eye(64), 4, group_size=32, damp=0.01)
    scale = scales.float().repeat_interleave(32, 0).T
    expected = (weight / scale).round().clamp(-8, 7) * scale
    torch.testing.assert_close(dense(numbers, scales, 4), expected)


def test_order_stays_within_groups() -> None:
    importance = torch.rand(96, generator=torch.Generator().manual_seed(0))
    order = importance_order(importance, 32)
    assert sorted(order.tolist()) == list(range(96))
    for group in order.view(3, 32):
        assert len(set((group // 32).tolist())) == 1
        assert (importance[group].diff() <= 0).all()


def test_factor_belongs_to_the_inverse() -> None:
    x = correlated_inputs(200, 24)
    hessian = x.T @ x
    factor = inverse_factor(hessian, damp=0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(24), atol=1e-3, rtol=0)
    assert torch.equal(factor, factor.triu())


def test_scales_win_over_the_whole_range() -> None:
    group = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    group[:, 0] *= 4  # an outlier that is worth clipping

    def error(scale: Tensor) -> Tensor:
        return ((group / scale[:, None]).round().clamp(-8, 7) * scale[:, None] - group).square().sum(1)

    assert (error(find_scales(group, 4, torch.ones(64))) <= error((group.abs().amax(1) / 7.5).half().float())).all()


def test_inputs_never_seen_and_inputs_that_are_nan() -> None:
    x = correlated_inputs(300, 64)
    x[:, 5] = 0
    numbers, scales = quantize_weight(torch.randn(16, 64), x.T @ x, 4, 32)
    assert (dense(numbers, scales, 4)[:, 5] == 0).all()
    with pytest.raises(QwenError, match="the inputs hold NaN or infinity"):
        quantize_weight(torch.randn(16, 64), torch.full((64, 64), torch.nan), 4, 32)


# ---- the script ----


@pytest.mark.parametrize("bits", [4, 8])
def test_checkpoint_in_the_official_layout(
    tiny: Path, text: Path, tmp_path: Path, bits: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((tiny / "config.json").read_text()) | {"auto_map": {"AutoConfig": "remote.Code"}}
    (tiny / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    run("-c", tiny, "-o", out, "--bits", bits, "--calibration", text, "--max-length", 48)
    settings = json.loads((out / "config.json").read_text())
    assert "auto_map" not in settings
    wanted = {"quant_method": "gptq", "bits": bits, "group_size": 64, "sym": True, "desc_act": False}
    assert wanted.items() <= settings["quantization_config"].items()
    assert (out / "qwen.tiktoken").read_bytes() == (tiny / "qwen.tiktoken").read_bytes()
    assert (out / "generation_config.json").is_file() and (out / "tokenizer_config.json").is_file()
    assert not list(tmp_path.glob(".out*"))

    state = load_file(out / "model.safetensors")
    name = "transformer.h.1.mlp.c_proj."
    expected = {
        "qweight": ((128 * bits // 32, 64), torch.int32), "qzeros": ((2, 64 * bits // 32), torch.int32),
        "scales": ((2, 64), torch.float16), "g_idx": ((128,), torch.int32), "bias": ((64,), torch.float16),
    }  # fmt: skip
    assert {k: (tuple(t.shape), t.dtype) for k, t in state.items() if k.startswith(name)} == {
        name + key: value for key, value in expected.items()
    }
    assert set(state[name + "qzeros"].flatten().tolist()) == {0x77777777 if bits == 4 else 0x7F7F7F7F}
    for kept in ("transformer.wte.weight", "lm_head.weight", "transformer.h.0.ln_1.weight"):
        torch.testing.assert_close(state[kept], golden.state_dict()[kept])

    table = capsys.readouterr().out.splitlines()
    before, after = (float(cell) for cell in table[-2].split("|")[2:4])
    assert before * 0.9 < after < before * 1.1
    sizes = [float(cell.split()[0]) for cell in table[-1].split("|")[2:4]]
    assert sizes[1] < sizes[0]


def test_table_is_what_the_checkpoints_give(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The perplexities come from layers one by one; a whole model that reads the held-out text gives the same."""
    run("-c", tiny, "-o", tmp_path / "out", "--calibration", text, "--max-length", 48)
    cells = capsys.readouterr().out.splitlines()[-2].split("|")[2:4]
    for directory, cell in zip((tiny, tmp_path / "out"), cells, strict=True):
        model, tokenizer = load_model_and_tokenizer(directory, device="cpu", dtype="fp32")
        _, held_out = quantize.split_samples(tokenizer.encode_text(text.read_text()), 48, 128)
        with torch.no_grad():
            loss = sum(float(model(ids[None], labels=ids[None]).loss) for ids in held_out) / len(held_out)
        assert math.exp(loss) == pytest.approx(float(cell), rel=1e-3)


def test_stopped_run_goes_on(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("-c", tiny, "--calibration", text, "--max-length", 48)
    run(*arguments, "-o", tmp_path / "straight")
    done = 0
    quantize_block = quantize.quantize_block

    def stop_at_the_third(*args: object, **kwargs: object) -> None:
        nonlocal done
        if done == 2:
            raise KeyboardInterrupt
        done += 1
        quantize_block(*args, **kwargs)

    monkeypatch.setattr(quantize, "quantize_block", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments, "-o", tmp_path / "stopped")
    assert "the same command goes on from there" in capsys.readouterr().err
    assert not (tmp_path / "stopped").exists()
    done = 1  # the third layer alone is left to do
    run(*arguments, "-o", tmp_path / "stopped")
    assert "2 layers are done" in capsys.readouterr().err and done == 2
    straight, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "stopped"))
    for name, tensor in straight.items():
        torch.testing.assert_close(stopped[name], tensor, rtol=0, atol=0)


def test_other_settings_start_anew(tmp_path: Path) -> None:
    partial = quantize.open_partial(tmp_path / "out", {"bits": 4})
    (partial / "layer-000.safetensors").touch()
    assert (quantize.open_partial(tmp_path / "out", {"bits": 4}) / "layer-000.safetensors").exists()
    assert not (quantize.open_partial(tmp_path / "out", {"bits": 8}) / "layer-000.safetensors").exists()


@pytest.mark.slow
def test_demo_checkpoint_keeps_its_perplexity(demo_checkpoint: Path, tmp_path: Path) -> None:
    """Int4 against its own dequantised weights in a plain model: the kernel costs next to nothing."""
    run("-c", demo_checkpoint, "-o", tmp_path / "int4", "--samples", 8, "--max-length", 128)
    model, tokenizer = load_model_and_tokenizer(tmp_path / "int4", device="cpu", dtype="fp32")
    plain, _ = load_model_and_tokenizer(demo_checkpoint, device="cpu", dtype="fp32")
    for name, module in model.named_modules():
        if hasattr(module, "dequantize") and hasattr(module, "g_idx"):
            plain.get_submodule(name).weight.data = module.dequantize(torch.float32).contiguous()
    ids = torch.tensor(tokenizer.encode_text((golden.DATA / "README.md").read_text())[:240]).view(-1, 12)
    with torch.no_grad():  # rows of 12 tokens go through the kernel
        perplexities = [
            math.exp(sum(float(m(row[None], labels=row[None]).loss) for row in ids) / len(ids)) for m in (model, plain)
        ]
    assert abs(perplexities[0] / perplexities[1] - 1) < 0.005


@pytest.mark.slow
def test_loads_in_gptqmodel(tiny: Path, text: Path, tmp_path: Path) -> None:
    gptqmodel = pytest.importorskip("gptqmodel")
    run("-c", tiny, "-o", tmp_path / "out", "--calibration", text, "--max-length", 48)
    theirs = gptqmodel.GPTQModel.load(str(tmp_path / "out"), backend="torch", device="cpu", dtype=torch.float16)
    ours = QWenLMHeadModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        logits = theirs.model(golden.ids(60)).logits.float()
    assert torch.cosine_similarity(logits, ours(golden.ids(60)).logits, dim=-1).min() > 0.999


# ---- calibration data ----


def test_both_formats_of_conversations(tokenizer: QWenTokenizer, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "你好"}]
    turns = [{"from": message["role"], "value": message["content"]} for message in messages]
    expected = encode_messages(tokenizer, messages, add_generation_prompt=False)
    for name, content in {
        "a.json": json.dumps([{"messages": messages}, {"conversations": turns}]),
        "b.jsonl": json.dumps({"messages": messages}) + "\n\n" + json.dumps({"conversations": turns}) + "\n",
    }.items():
        (tmp_path / name).write_text(content)
        assert quantize.calibration_ids(tmp_path / name, tokenizer) == 2 * expected


def test_samples_that_are_held_out() -> None:
    calibration, held_out = quantize.split_samples(list(range(1000)), length=20, count=100)
    assert calibration.shape == (45, 20) and held_out.shape == (5, 20)
    assert not set(calibration.flatten().tolist()) & set(held_out.flatten().tolist())
    short_calibration, short_held_out = quantize.split_samples(list(range(300)), length=512, count=100)
    assert short_calibration.shape == short_held_out.shape == (1, 150)
    with pytest.raises(QwenError, match="x.txt has 100 tokens: give at least 256"):
        quantize.split_samples(list(range(100)), 20, 5, Path("x.txt"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n{"messages": [', r"a\.jsonl:2: not valid JSON"),
        ("a.json", '[\n{"messages": 1},\n{]', r"a\.json:3: not valid JSON"),
        ("a.json", '[{"text": "a"}]', r"a\.json holds no conversations"),
        ("a.jsonl", '{"messages": [{"role": "tool", "content": "a"}]}', r"a\.jsonl:1: turn 1: tool is out of place"),
        ("a.jsonl", '{"messages": ["a"]}', r"a\.jsonl:1: turn 1: a message has"),
        ("a.txt", " \n", "is empty"),
    ],
)
def test_broken_calibration_files(
    tokenizer: QWenTokenizer, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(QwenError, match=message):
        quantize.calibration_ids(tmp_path / name, tokenizer)


def test_calibration_files_that_are_no_text(tokenizer: QWenTokenizer, tmp_path: Path) -> None:
    with pytest.raises(QwenError, match="can't be read: No such file"):
        quantize.calibration_ids(tmp_path / "missing.txt", tokenizer)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(QwenError, match="is not UTF-8 text"):
        quantize.calibration_ids(tmp_path / "latin.txt", tokenizer)


# ---- refusals ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-gpus", "2"], "leave --num-gpus, --tp out"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--damp", "0"], "between 0 and 1"),
        (["--group-size", "128"], r"--group-size 128 doesn't divide the layers' input sizes \[64, 128\]"),
        (["--max-length", "10000"], "more than the model's training length 64"),
    ],
)
def test_impossible_flags(tiny: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(QwenError, match=message):
        run("-c", tiny, "-o", tmp_path / "out", "--max-length", 48, *flags)


def test_checkpoints_that_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(QwenError, match="is quantised already"):
        run("-c", golden.DATA / "gptq", "-o", tmp_path / "out")
    (tiny / "adapter_config.json").write_text("{}")
    with pytest.raises(QwenError, match="is an adapter: merge it"):
        run("-c", tiny, "-o", tmp_path / "out")


def test_output_that_is_taken_or_cannot_be(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(QwenError, match="exists and is not empty"):
        run("-c", tiny, "-o", tiny, "--max-length", 48)
    with pytest.raises(QwenError, match="can't be written"):
        run("-c", tiny, "-o", tiny / "config.json" / "out", "--max-length", 48)


def test_weights_of_nan_name_the_layer(tiny: Path, text: Path, tmp_path: Path) -> None:
    state = load_file(tiny / "model.safetensors")
    state["transformer.h.1.ln_1.weight"][3] = torch.nan
    save_file(state, tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QwenError, match="layer 1, attn.c_attn: the inputs hold NaN"):
        run("-c", tiny, "-o", tmp_path / "out", "--calibration", text, "--max-length", 48)


def test_mistake_is_one_sentence_on_the_command_line(tmp_path: Path) -> None:
    shutil.copytree(golden.DATA / "gptq", tmp_path / "int4")
    script = Path(quantize.__file__)
    process = subprocess.run(
        [sys.executable, str(script), "-c", str(tmp_path / "int4"), "-o", str(tmp_path / "out")],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert process.stderr.strip().splitlines()[-1].startswith("quantize.py: error: ")
