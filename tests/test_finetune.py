"""finetune.py and merge_lora.py on a tiny model: what is learned, saved, resumed and refused."""

import json
import os
import random
import re
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import finetune
import golden
import merge_lora
import quantize
from qwen import QwenError
from qwen.int4 import Int4Linear
from training import arguments
from training.checkpoints import COMPLETE
from training.progress import StopOnSignal, read_log
from training.samples import Text
from training.trainer import QwenTrainer
from utils import DTYPES, load_model_and_tokenizer

ROWS = [("Who are you?", "Lumen."), ("1+1?", "2"), ("A colour?", "Blue."), ("Say hi.", "Hi!"),
        ("What is up?", "The sky."), ("2+2?", "4"), ("A pet?", "A cat, and a dog."), ("Bye", "See you.")]  # fmt: skip


@pytest.fixture(autouse=True)
def without_native_bf16(set_hardware: Callable[[str], None]) -> None:
    """Training's own choice of precision is float32 on every processor; `native_bf16` runs a test with both."""
    set_hardware("bf16=off")


def precision_error(native_bf16: bool) -> float:
    """How far a sum of many numbers may be off, relative to the largest, that training computed in its own precision.

    In bfloat16 a rounding error of the type; in float32 more than one, but nothing beside what is learned.
    """
    return torch.finfo(torch.bfloat16).eps if native_bf16 else 1e-5


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model of three small layers."""
    directory = golden.checkpoint(tmp_path_factory.mktemp("base"), vocab_size=1000, seq_length=2048)
    settings = {
        "chat_format": "chatml",
        "eos_token_id": 700,
        "pad_token_id": 700,
        "max_new_tokens": 20,
        "max_window_size": 500,
    }
    (directory / "generation_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in ROWS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def work(base: Path, data: Path, tmp_path: Path) -> dict[str, str]:
    """The flags of a short run."""
    return {
        "model_name_or_path": str(base), "data_path": str(data), "output_dir": str(tmp_path / "out"), "max_steps": "4",
        "per_device_train_batch_size": "8", "gradient_accumulation_steps": "1", "learning_rate": "1e-2", "lora_r": "4",
        "report_to": "none", "lora_dropout": "0", "model_max_length": "512", "save_strategy": "no",
    }  # fmt: skip


def train(work: dict[str, str], **flags: Any) -> tuple[Path, list[dict[str, float]]]:
    """Run finetune.py: its output directory and its log of losses."""
    flags = work | {name: str(value) for name, value in flags.items()}
    assert finetune.main([word for name, value in flags.items() for word in (f"--{name}", *value.split())]) == 0
    output = Path(flags["output_dir"])
    return output, [record for record in read_log(output / "log.jsonl") if "loss" in record]


def logits(path: Path, text: str = "Who are you?") -> Tensor:
    model, tokenizer = load_model_and_tokenizer(path, device="cpu", dtype="fp32")
    with torch.no_grad():
        return model(torch.tensor([tokenizer.encode_text(text)])).logits


@pytest.fixture
def trained_logits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The logits of the model in memory at the end of each run."""
    found: list[Tensor] = []

    class Looking(QwenTrainer):
        def save_model(self, *args: Any, **kwargs: Any) -> None:
            super().save_model(*args, **kwargs)
            if not kwargs.get("_internal_call"):
                model = self.accelerator.unwrap_model(self.model).eval()
                with torch.no_grad():
                    found.append(
                        model(torch.tensor([self.processing_class.encode_text("Who are you?")])).logits.float()
                    )

    monkeypatch.setattr(finetune, "QwenTrainer", Looking)
    yield found


# ---- precision ----


def test_precision_is_the_processors_best_and_can_be_said(native_bf16: bool) -> None:
    best = "bf16" if native_bf16 else "fp32"
    for flags, expected in (([], best), (["--bf16", "True"], "bf16"), (["--fp16", "True"], "fp16"),
                            (["--fp32", "True"], "fp32"), (["--bf16", "False"], best)):  # fmt: skip
        assert finetune.parse_args(["-d", "a", "--use_cpu", "True", *flags]).training.precision == expected


@pytest.mark.parametrize("said", ["", "bf16", "fp16"])
def test_what_is_trained_is_in_float32_and_saved_as_it_was_computed(
    work: dict[str, str], said: str, native_bf16: bool
) -> None:
    flags = {said: True} if said else {}
    adapter, log = train(work, use_lora=True, **flags)
    assert log[-1]["loss"] < log[0]["loss"]
    assert {tensor.dtype for tensor in load_file(adapter / "adapter_model.safetensors").values()} == {torch.float32}
    whole, log = train(work, output_dir=adapter.parent / "full", learning_rate="1e-3", **flags)
    assert log[-1]["loss"] < log[0]["loss"]
    computed = DTYPES[said or ("bf16" if native_bf16 else "fp32")]
    assert {tensor.dtype for tensor in load_file(whole / "model.safetensors").values()} == {computed}


# ---- what is saved ----


@pytest.mark.parametrize(
    "flags",
    [
        {"use_lora": True},
        {"use_lora": True, "lora_bias": "lora_only", "use_rslora": True},
        {"use_lora": True, "use_dora": True, "lora_target_modules": "c_attn w1"},
        {"use_lora": True, "lora_target_modules": "c_attn lm_head"},
        {"use_lora": True, "train_embeddings": True},
        {"lr_scheduler_type": "constant"},
    ],
    ids=["lora", "bias", "dora", "head", "embeddings", "full"],
)
def test_saved_output_has_the_logits_of_the_trained_model(
    work: dict[str, str], base: Path, trained_logits: list[Tensor], flags: dict[str, Any], native_bf16: bool
) -> None:
    output, log = train(work, **flags)
    assert log[-1]["loss"] < log[0]["loss"]
    loaded = logits(output)
    # Rounded in every layer when it was trained, and not when it is loaded.
    tolerance = 8 * precision_error(native_bf16) * loaded.abs().max().item()
    torch.testing.assert_close(loaded, trained_logits[0], atol=tolerance, rtol=0)
    assert (loaded - logits(base)).abs().max() > 0.01  # something was learned
    names = {path.name for path in output.iterdir()}
    assert {"qwen.tiktoken", "tokenizer_config.json", "generation_config.json", "log.jsonl", "loss.png"} <= names
    model, tokenizer = load_model_and_tokenizer(output, device="cpu", dtype="fp32")
    assert model.generation_config.chat_format == "chatml"
    assert model.generation_config.eos_token_id == [702, 700, 701]  # <|im_end|> first: engines stop there
    assert isinstance(model.chat(tokenizer, "Hi", None, max_new_tokens=3)[0], str)
    assert model.config.use_cache
    if "use_lora" in flags:
        assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
        weights = load_file(output / "adapter_model.safetensors")
        assert any("wte" in name for name in weights) == ("train_embeddings" in flags)
    if flags.get("use_dora") or flags.get("lora_bias"):
        return
    merged = output.parent / "merged"
    if "use_lora" in flags:
        merge_lora.main(["-c", str(output), "-o", str(merged)])
        torch.testing.assert_close(logits(merged), loaded, atol=1e-4, rtol=0)


def test_base_model_becomes_one_that_stops(work: dict[str, str], base: Path, tmp_path: Path, capsys: Any) -> None:
    raw = shutil.copytree(base, tmp_path / "raw")
    (raw / "generation_config.json").write_text(
        '{"chat_format": "raw", "eos_token_id": 700, "stop_words_ids": [[700]]}'
    )
    output, _ = train(work, model_name_or_path=raw, use_lora=True)
    assert "This is a base model" in capsys.readouterr().err
    for directory in (output, merged(output, tmp_path / "merged")):
        model, _ = load_model_and_tokenizer(directory, device="cpu")
        config = model.generation_config
        assert (config.chat_format, config.eos_token_id) == ("chatml", [702, 700, 701])
        assert not config.stop_words_ids


def merged(adapter: Path, output: Path) -> Path:
    merge_lora.main(["-c", str(adapter), "-o", str(output)])
    return output


def test_full_finetuning_overfits(work: dict[str, str], native_bf16: bool) -> None:
    _, log = train(work, max_steps=60, per_device_train_batch_size=8, learning_rate="5e-3", weight_decay=0)
    assert log[-1]["loss"] < 0.1


# ---- four bits ----


@pytest.fixture(scope="session")
def int4(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("int4") / "int4"
    text = directory.parent / "text.txt"
    text.write_text(data.read_text() * 3)
    quantize.main(["-c", str(base), "-o", str(directory), "--calibration", str(text), "--cpu-only"])
    return directory


def test_gradients_through_int4_equal_those_through_its_dense_weights() -> None:
    torch.manual_seed(0)
    layer = Int4Linear(64, 48, group_size=32)
    layer.qweight.copy_(torch.randint(-(2**31), 2**31 - 1, layer.qweight.shape))
    layer.scales.copy_(torch.rand(layer.scales.shape) * 0.1)
    for rows in (2, 40):  # fewer and more than the kernel takes
        x = torch.randn(rows, 64, requires_grad=True)
        weights = torch.randn(rows, 48)
        [grad] = torch.autograd.grad((layer(x) * weights).sum(), x)
        torch.testing.assert_close(grad, weights @ layer.dequantize(), atol=1e-4, rtol=1e-4)


def test_qlora_over_int4(
    work: dict[str, str], int4: Path, base: Path, trained_logits: list[Tensor], tmp_path: Path, native_bf16: bool
) -> None:
    output, log = train(work, model_name_or_path=int4, q_lora=True, gradient_checkpointing=True)
    assert log[-1]["loss"] < log[0]["loss"]
    loaded = logits(output)
    # The kernel computes in bfloat16 within; in training it steps aside.
    tolerance = max(0.02, 8 * precision_error(native_bf16)) * trained_logits[0].abs().max()
    assert (loaded - trained_logits[0]).abs().max() < tolerance
    with pytest.raises(QwenError, match="is quantised, and nothing can be merged .* --base Qwen/Qwen-7B-Chat"):
        merge_lora.main(["-c", str(output), "-o", str(tmp_path / "merged")])
    merge_lora.main(["-c", str(output), "-o", str(tmp_path / "merged"), "--base", str(base)])
    quantize.main(["-c", str(tmp_path / "merged"), "-o", str(tmp_path / "int4"), "--cpu-only",
                   "--calibration", str(int4.parent / "text.txt")])  # fmt: skip
    assert logits(tmp_path / "int4").isfinite().all()
    with pytest.raises(QwenError, match="is quantised: train an adapter on it with --q_lora True"):
        train(work, model_name_or_path=int4, use_lora=True)
    with pytest.raises(QwenError, match="DoRA needs weights that can be normed"):
        train(work, model_name_or_path=int4, q_lora=True, use_dora=True, output_dir=tmp_path / "dora")


def test_qlora_over_nf4_merges(work: dict[str, str], base: Path, tmp_path: Path, trained_logits: list[Tensor]) -> None:
    output, log = train(work, q_lora=True, max_steps=8)
    assert log[-1]["loss"] < log[0]["loss"]
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    before, adapter = load_file(base / "model.safetensors"), load_file(output / "adapter_model.safetensors")
    after = load_file(merged(output, tmp_path / "merged") / "model.safetensors")
    for name, weight in before.items():
        a, b = (adapter.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight") for side in "AB")
        expected = weight if a is None else weight + 16 / 4 * b @ a  # lora_alpha / lora_r
        torch.testing.assert_close(after[name], expected, atol=1e-6, rtol=1e-5)
    assert (trained_logits[0] - logits(tmp_path / "merged")).norm() < trained_logits[0].norm()  # nf4 rounds the base


# ---- resuming ----


def weights_of(output: Path) -> dict[str, Tensor]:
    return load_file(output / "adapter_model.safetensors")


def same_run(work: dict[str, str], broken: Path, tmp_path: Path, **flags: Any) -> None:
    """A run that goes on in `broken` has the losses and ends with the weights of one that was never broken."""
    resumed, log = train(work, output_dir=broken, resume_from_checkpoint=True, **flags)
    whole, expected = train(work, output_dir=tmp_path / "whole", **flags)
    assert [(r["step"], r["loss"]) for r in log] == [(r["step"], r["loss"]) for r in expected]
    for name, tensor in weights_of(whole).items():
        assert torch.equal(tensor, weights_of(resumed)[name]), name


RESUMABLE = {"use_lora": True, "lora_dropout": "0.1", "max_steps": 7, "save_strategy": "steps", "save_steps": 2,
             "save_total_limit": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}  # fmt: skip


def test_interrupted_run_goes_on_as_if_it_never_was(
    work: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    native_bf16: bool,
) -> None:
    step = random.randint(1, 6)
    print(f"interrupted at step {step}")

    class Interrupting(StopOnSignal):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGINT)
            super().on_step_end(args, state, control, **kwargs)

    flags = work | {name: str(value) for name, value in RESUMABLE.items()}
    with monkeypatch.context() as patched:
        patched.setattr(finetune, "StopOnSignal", Interrupting)
        status = finetune.main([word for name, value in flags.items() for word in (f"--{name}", value)])
    assert status == 130 and f"Stopped at step {step}: the same command with --resume" in capsys.readouterr().err
    output = Path(work["output_dir"])
    assert [path.name for path in output.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    with pytest.raises(QwenError, match=f"holds checkpoint-{step} of an earlier run: go on with"):
        train(work, **RESUMABLE)
    same_run(work, output, tmp_path, **RESUMABLE)


def test_kill_during_a_save_loses_that_save_alone(
    work: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    save = QwenTrainer._save_rng_state

    def die_at_four(self: QwenTrainer, output_dir: str) -> None:
        if self.state.global_step == 4:
            raise Killed
        save(self, output_dir)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(QwenTrainer, "_save_rng_state", die_at_four)
        train(work, **RESUMABLE)
    output = Path(work["output_dir"])
    found = {path.name: (path / COMPLETE).exists() for path in output.glob("checkpoint-*")}
    assert found == {"checkpoint-2": True, "checkpoint-4": False}
    with pytest.raises(QwenError, match="checkpoint-4 was interrupted while it was written"):
        train(work, **RESUMABLE | {"resume_from_checkpoint": output / "checkpoint-4"})
    with pytest.raises(QwenError, match="was written with another data"):
        train(work, **RESUMABLE | {"resume_from_checkpoint": True, "model_max_length": 40})
    same_run(work, output, tmp_path, **RESUMABLE)
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-7"]


def test_full_finetuning_resumes_in_float32(work: dict[str, str], tmp_path: Path) -> None:
    flags = {"bf16": True, "save_strategy": "steps", "save_steps": 2, "learning_rate": "1e-3", "max_steps": 4}
    whole, expected = train(work, **flags)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    resumed, log = train(work, **flags, output_dir=tmp_path / "again", resume_from_checkpoint=True)
    assert [r["loss"] for r in log] == [r["loss"] for r in expected][2:]
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(tensor, load_file(resumed / "model.safetensors")[name])


# ---- loss, batches, learning rate ----


def test_accumulation_packing_and_padding_give_the_same_steps(work: dict[str, str], tmp_path: Path) -> None:
    """All samples in each step, in four ways: the loss is divided by the tokens of the whole step in each of them."""
    ways = [
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "padding": True},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 99, "packing": True, "model_max_length": 100},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "attn": "sdpa", "lazy_preprocess": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "gradient_checkpointing": True,
         "train_sampling_strategy": "group_by_length"},
    ]  # fmt: skip
    losses = [
        [record["loss"] for record in train(work, optim="sgd", output_dir=tmp_path / str(number), fp32=True, **way)[1]]
        for number, way in enumerate(ways)
    ]
    for each in losses[1:]:
        assert each == pytest.approx(losses[0], abs=2e-5)


def test_half_precision_follows_float32(work: dict[str, str], tmp_path: Path, native_bf16: bool) -> None:
    """All weights, and an adapter: the losses differ by less than 1% of the first, on both kinds of processor."""
    for lora in (True, False):
        logs = []
        for way in ("fp32", "bf16"):
            flags = {"use_lora": lora, "max_steps": 20, "learning_rate": "1e-2" if lora else "1e-3", way: True}
            logs.append([record["loss"] for record in train(work, **flags, output_dir=tmp_path / f"{way}{lora}")[1]])
        expected, losses = logs
        assert expected[-1] < 0.5 * expected[0]
        assert losses == pytest.approx(expected, abs=0.01 * expected[0])


def test_evaluation_loss_is_that_of_all_tokens(work: dict[str, str], base: Path, data: Path, native_bf16: bool) -> None:
    output, _ = train(work, eval_data_path=data, use_lora=True, per_device_eval_batch_size=3)
    evaluated = read_log(output / "log.jsonl")[-1]["eval_loss"]
    model, tokenizer = load_model_and_tokenizer(output, device="cpu", dtype="fp32")
    total = count = 0.0
    for question, answer in ROWS:
        prompt = f"<|im_start|>system\n{tokenizer.default_system}<|im_end|>\n<|im_start|>user\n"
        prompt += f"{question}<|im_end|>\n<|im_start|>assistant\n"
        start, ids = len(tokenizer.encode(prompt)), torch.tensor([tokenizer.encode(f"{prompt}{answer}<|im_end|>")])
        with torch.no_grad():
            scores = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        total -= scores.gather(-1, ids[0, start:, None]).sum().item()
        count += ids.shape[1] - start
    assert evaluated == pytest.approx(total / count, rel=precision_error(native_bf16))


def test_learning_rate_falls_to_zero_and_the_log_tells_the_speed(work: dict[str, str]) -> None:
    _, log = train(work, use_lora=True, max_steps=12, lr_scheduler_type="cosine", warmup_steps="0.1")
    rates = [record["learning_rate"] for record in log]
    assert max(rates) == pytest.approx(1e-2) and rates[-1] < 5e-4 and rates[2:] == sorted(rates[2:], reverse=True)
    assert all(record["tokens_per_s"] > record["supervised_tokens_per_s"] > 0 for record in log)
    assert all(record["peak_gib"] > 0.1 for record in log)


# ---- what stops a run ----


def test_loss_that_is_no_number_stops_the_run(work: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QwenError, match=r"the loss is nan at step \d+: most often .*--learning_rate 1e\+30"):
        train(work, learning_rate="1e30", max_steps=20)

    class Zero(QwenTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return 0 * super().compute_loss(*args, **kwargs)

    monkeypatch.setattr(finetune, "QwenTrainer", Zero)
    with pytest.raises(QwenError, match="the loss is exactly 0 at step 1"):
        train(work)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"data_path": "nowhere.jsonl"}, "nowhere.jsonl can't be read"),
        ({"model_name_or_path": "nowhere"}, "there is no directory nowhere"),
        ({"model_max_length": 20}, "no sample of .* can be trained on .*: give replies to learn, or raise --model_max"),
        ({"model_max_length": 4}, "--model_max_length 4"),
        ({"learning_rate": 0}, "--learning_rate 0.0: nothing would be learned"),
        ({"max_steps": 0, "num_train_epochs": 0}, "--num_train_epochs 0.0: no step would be made"),
        ({"packing": True, "lazy_preprocess": True}, "--packing needs all lengths"),
        ({"packing": True, "padding": True}, "leave --padding out"),
        ({"eval_strategy": "steps"}, "--eval_strategy steps needs --eval_data_path"),
        ({"eval_strategy": "steps", "val_size": 9}, "--val_size 9 takes 9 of 8 samples"),
        ({"val_size": -1}, "--val_size -1.0: give a share below 1"),
        ({"val_size": 0.5, "eval_data_path": __file__}, "leave one out"),
        ({"early_stopping_patience": 1}, "--early_stopping_patience needs --eval_strategy"),
        ({"metric_for_best_model": "accuracy"}, "what is measured is the loss, and with --eval_replies"),
        ({"report_to": "tensorbord"}, "--report_to tensorbord: tensorbord is not supported"),
        ({"use_liger_kernel": True}, "Liger has no kernels for this model"),
        ({"optim": "galore_adamw", "optim_target_modules": "c_attn"}, "--optim galore_adamw: .*galore_torch"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "--lr_scheduler_type .*num_decay_steps.*--lr_scheduler_kwargs"),
        ({"push_to_hub": True}, "--push_to_hub: "),
        ({"stage": "pt"}, "this is one for --stage sft"),
        ({"stage": "pt", "lazy_preprocess": True}, "--packing needs all lengths"),
        ({"stage": "dpo"}, "this is one for --stage sft"),
        ({"stage": "dpo", "packing": True}, "--packing is for --stage sft and pt"),
        ({"stage": "kto", "per_device_train_batch_size": 1}, "--per_device_train_batch_size 2 or more"),
        ({"stage": "rm", "use_lora": True, "modules_to_save": "lm_head"}, "can't train lm_head"),
        ({"modules_to_save": "lm_head"}, "add --use_lora True"),
        ({"use_lora": True, "modules_to_save": "embed"}, "--modules_to_save embed: this model has no such layer"),
        ({"use_lora": True, "lora_target_modules": "c_attn,q_proj"}, "--lora_target_modules q_proj: this model has no"),
        ({"use_dora": True}, "add --use_lora True"),
        ({"use_lora": True, "lora_r": 0}, "--lora_r and --lora_alpha"),
        ({"use_lora": True, "lora_target_modules": "q_proj"}, "--lora_target_modules q_proj: "),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 9}, "8 samples or packs don't fill a batch"),
        ({"loss_on": "user"}, "--loss_on.*: invalid choice: 'user'"),
        ({"lora_alfa": 8}, "--lora_alfa is no flag: did you mean --lora[_-]alpha"),
        ({"max_steps": "many"}, "--max_steps.*: invalid int value: 'many'"),
        ({"output_dir": __file__}, "--output_dir .* can't be written"),
        ({"resume_from_checkpoint": "nowhere"}, "--resume_from_checkpoint nowhere is no checkpoint"),
        ({"bf16": True, "fp16": True}, "At most one of fp16 and bf16"),
        ({"deepspeed": "nowhere.json"}, "package deepspeed|is no JSON file"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(work: dict[str, str], flags: dict[str, Any], message: str) -> None:
    with pytest.raises(QwenError, match=message) as caught:
        train(work, **flags)
    assert len(str(caught.value).splitlines()) == 1


# ---- stages, evaluation, layers ----


@pytest.mark.parametrize("lora", [True, False])
def test_texts_continue_pretraining(work: dict[str, str], base: Path, tmp_path: Path, lora: bool) -> None:
    """Packed plain text: the loss falls, and what is saved has the base's settings, not those of ChatML."""
    raw = tmp_path / "raw"
    shutil.copytree(base, raw)
    (raw / "generation_config.json").write_text(json.dumps({"chat_format": "raw", "eos_token_id": 700}))
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{question} {answer} " * 9}) + "\n" for question, answer in ROWS))
    flags = {"data_path": texts, "model_name_or_path": raw, "stage": "pt", "use_lora": lora, "max_steps": 12}
    output, records = train(work, **flags, model_max_length=64, per_device_train_batch_size=4)
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    assert json.loads((output / "generation_config.json").read_text())["chat_format"] == "raw"
    assert not torch.equal(logits(output), logits(raw))


def test_early_stopping_keeps_the_best(work: dict[str, str]) -> None:
    """Held-out samples that nothing of is learned: the run stops, and saves the adapter of the best step."""
    output, _ = train(
        work, use_lora=True, val_size=2, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, early_stopping_patience=2, max_steps=40, learning_rate=5e-2,
    )  # fmt: skip
    state = json.loads((output / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert state["global_step"] < 40
    losses = {record["step"]: record["eval_loss"] for record in read_log(output / "log.jsonl") if "eval_loss" in record}
    assert best.name == f"checkpoint-{min(losses, key=losses.__getitem__)}"
    saved, kept = (load_file(path / "adapter_model.safetensors") for path in (output, best))
    assert saved.keys() == kept.keys() and all(torch.equal(saved[name], kept[name]) for name in kept)


@pytest.mark.parametrize(("targets", "adapted"), [
    ("all-linear", {"c_attn", "c_proj", "w1", "w2"}), ("c_attn,w1", {"c_attn", "w1"}), ("c_attn w1", {"c_attn", "w1"}),
    (r".*\.(c_attn|w2)", {"c_attn", "w2"}),
])  # fmt: skip
def test_layers_by_name_list_and_pattern(work: dict[str, str], targets: str, adapted: set[str]) -> None:
    output, _ = train(work, use_lora=True, lora_target_modules=targets, modules_to_save="lm_head", max_steps=1)
    names = load_file(output / "adapter_model.safetensors")
    assert {name.split(".lora_")[0].split(".")[-1] for name in names if "lora_" in name} == adapted
    assert any("lm_head" in name for name in names)
    logits(output)


def test_weights_of_data_are_obeyed_and_said(
    work: dict[str, str], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(work, use_lora=True, data_path=f"{data} {data}", data_weights="2 0.5", val_size=5, max_steps=1)
    printed = capsys.readouterr().err
    assert "16 samples taken out of 8" in printed and "4 samples taken out of 8" in printed
    assert "5 samples: 5 used whole" in printed


def test_what_is_held_out_is_not_trained_on() -> None:
    """Neither another copy of it, nor another conversation out of the same row."""
    samples = [Text(f"{row} {part}", f"a:{row}") for _ in range(3) for row in range(10) for part in range(2)]
    trained, evaluated = finetune.hold_out(samples, 0.3, 0)
    assert len(evaluated) == len(set(evaluated)) == 6 and len(trained) == 42
    assert not {each.where for each in trained} & {each.where for each in evaluated}


@pytest.mark.parametrize("flags", [{"use_lora": True}, {"learning_rate": "5e-3"}])
def test_replies_are_counted_while_it_learns(
    work: dict[str, str], data: Path, flags: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """None is right at first, all in the end, as the saved model's own chat says; the best by them is kept."""
    output, _ = train(
        work, **{"max_steps": 60, "weight_decay": 0, "eval_data_path": data, "eval_replies": 8} | flags,
        eval_strategy="steps", eval_steps=20, save_strategy="steps", save_steps=20, load_best_model_at_end=True,
        metric_for_best_model="exact_match",
    )  # fmt: skip
    shares = [record["eval_exact_match"] for record in read_log(output / "log.jsonl") if "eval_loss" in record]
    model, tokenizer = load_model_and_tokenizer(output, device="cpu", dtype="fp32")
    right = sum(model.chat(tokenizer, q, None, do_sample=False, max_new_tokens=30)[0] == a for q, a in ROWS)
    assert max(shares) == shares[-1] == right / 8 > 0.5
    assert "Who are you?\n  → Lumen." in capsys.readouterr().err
    with pytest.raises(QwenError, match="--eval_replies answers evaluation data"):
        train(work, eval_replies=2)


def test_only_the_last_layers_are_trained(work: dict[str, str], base: Path, tmp_path: Path) -> None:
    before = load_file(base / "model.safetensors")
    output, log = train(work, trainable_layers=1, learning_rate="1e-3", fp32=True)
    after = load_file(output / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert log[-1]["loss"] < log[0]["loss"] and any(name.startswith("transformer.h.2.") for name in changed)
    assert all(name.startswith(("transformer.h.2.", "transformer.ln_f.", "lm_head.")) for name in changed)
    output, log = train(work, trainable_layers=2, use_lora=True, output_dir=tmp_path / "lora")
    assert log[-1]["loss"] < log[0]["loss"]
    assert {name.split(".h.")[1][0] for name in weights_of(output)} == {"1", "2"}
    logits(output)
    with pytest.raises(QwenError, match="--trainable_layers 9: this model has 3"):
        train(work, trainable_layers=9, output_dir=tmp_path / "none")


def test_lora_plus_moves_b_faster(work: dict[str, str], tmp_path: Path) -> None:
    """After one step of Adam, which is as long as the rate, B has gone 16 times as far as without."""
    flags = {"use_lora": True, "max_steps": 1, "warmup_steps": 0, "learning_rate": "1e-4", "fp32": True,
             "weight_decay": 0}  # fmt: skip
    plain, _ = train(work, **flags)
    faster, log = train(work, **flags, loraplus_lr_ratio=16, output_dir=tmp_path / "plus")
    for name, tensor in weights_of(faster).items():
        other = weights_of(plain)[name]
        torch.testing.assert_close(tensor, 16 * other if "lora_B" in name else other, atol=1e-6, rtol=1e-3)
    with pytest.raises(QwenError, match="--loraplus_lr_ratio belongs to adapters"):
        train(work, loraplus_lr_ratio=16, output_dir=tmp_path / "full")


def test_noise_on_embeddings_is_for_training_alone(work: dict[str, str], data: Path, tmp_path: Path) -> None:
    """NEFTune: other training losses, an evaluation loss of the saved model without noise, and no trace in it."""
    flags = {"use_lora": True, "max_steps": 3, "eval_data_path": data, "fp32": True}
    _, expected = train(work, **flags)
    output, log = train(work, **flags, neftune_noise_alpha=5, output_dir=tmp_path / "noisy")
    assert log[0]["loss"] != expected[0]["loss"]
    flags |= {"model_name_or_path": output, "learning_rate": "1e-9", "max_steps": 1, "output_dir": tmp_path / "again"}
    train(work, **flags)
    [first, again] = [[r for r in read_log(path / "log.jsonl") if "eval_loss" in r][-1] for path in
                      (output, tmp_path / "again")]  # fmt: skip
    assert again["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-4)


def test_an_adapter_is_trained_on_or_merged_first(work: dict[str, str], base: Path, tmp_path: Path) -> None:
    flags = {"max_steps": 6, "lr_scheduler_type": "constant", "warmup_steps": 0}
    first, log = train(work, use_lora=True, **flags)
    second = work | {"model_name_or_path": str(first), "output_dir": str(tmp_path / "second")}
    second.pop("lora_r")  # the adapter's own
    output, more = train(second, use_lora=True, **flags)
    assert more[0]["loss"] < log[-1]["loss"] and more[-1]["loss"] < more[0]["loss"]
    settings = json.loads((output / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["r"]) == (str(base), 4)
    assert not torch.equal(logits(output), logits(first))
    whole, full = train(second, output_dir=tmp_path / "whole", **flags | {"learning_rate": "1e-4"})
    assert full[0]["loss"] == pytest.approx(more[0]["loss"], rel=1e-4) and full[-1]["loss"] < full[0]["loss"]
    assert (whole / "model.safetensors").is_file() and not (whole / "adapter_config.json").exists()
    with pytest.raises(QwenError, match="--lora_r 8: the adapter to train on has 4; leave the flag out, or merge"):
        train(second, use_lora=True, lora_r=8, output_dir=tmp_path / "other")
    with pytest.raises(QwenError, match="is the model to be trained, which would be lost"):
        train(second, use_lora=True, output_dir=first)
    with pytest.raises(QwenError, match="is the model to be trained, which would be lost"):
        train(second, output_dir=base)


def test_resumed_with_another_rate_it_takes_effect(work: dict[str, str], tmp_path: Path) -> None:
    flags = {"use_lora": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "warmup_steps": 0}
    train(work, **flags, lr_scheduler_type="constant")
    shutil.rmtree(Path(work["output_dir"]) / "checkpoint-4")
    again = flags | {"resume_from_checkpoint": True, "learning_rate": "1e-3", "lr_scheduler_type": "linear"}
    with pytest.raises(QwenError, match="another learning_rate .*; --new_learning_rate True goes on with another rate"):
        train(work, **again)
    _, log = train(work, **again, new_learning_rate=True)
    assert [record["learning_rate"] for record in log] == pytest.approx([1e-2, 1e-2, 5e-4, 2.5e-4])


def test_what_is_no_adapter_is_not_merged(work: dict[str, str], tmp_path: Path) -> None:
    output, _ = train(work, use_lora=True, max_steps=1)
    with pytest.raises(QwenError, match="exists and is not empty"):
        merge_lora.main(["-c", str(output), "-o", str(tmp_path)])
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "adapter_config.json").write_text('{"peft_type": "LO')
    for name, message in (
        (work["model_name_or_path"], "is a whole model, not an adapter"),
        (tmp_path / "damaged", "config.json is damaged"),
        (tmp_path / "nowhere", "adapter_config.json is missing: give the --output_dir of a training"),
    ):  # fmt: skip
        with pytest.raises(QwenError, match=message):
            merge_lora.main(["-c", str(name), "-o", str(tmp_path / "new")])


def test_flags_of_older_scripts_are_understood(work: dict[str, str]) -> None:
    settings = finetune.parse_args([
        "--data_path", "a", "--output_dir", "b", "--evaluation_strategy", "no", "--warmup_ratio", "0.01", "--bf16",
        "False", "--gradient_checkpointing=True", "--lazy_preprocess", "True", "--adam_beta2", "0.95", "--q_lora",
    ])  # fmt: skip
    training = settings.training
    assert (training.warmup_steps, training.activation_checkpointing, training.learning_rate) == (0.01, True, 3e-4)
    assert settings.lora.use_lora and settings.data.lazy_preprocess
    assert finetune.parse_args(["--data_path", "a", "--output_dir", "b"]).training.learning_rate == 1e-5
    assert finetune.parse_args(["-d", "a", "--report_to", "none"]).training.report_to == []


def test_commands_of_the_manual_parse() -> None:
    text = (finetune.ROOT / "finetune" / "README.md").read_text(encoding="utf-8")
    flags = [shlex.split(line)[2:] for line in text.splitlines() if line.startswith("python finetune.py -")]
    assert len(flags) == 6 and all(finetune.parse_args(each) for each in flags)
    launched = re.findall(r"^finetune/(\S+) (.*?)(?: -- (.*))?$", text, re.MULTILINE)
    assert launched and all((finetune.ROOT / "finetune" / name).is_file() for name, _, _ in launched)
    assert all(finetune.parse_args(["-d", "a", *shlex.split(more)]) for _, _, more in launched)


def test_scheduler_of_a_deepspeed_config_does_not_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arguments, "find_spec", lambda name: name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "ds.json").write_text('{"scheduler": {"type": "WarmupLR"}, "zero_optimization": {"stage": 2}}')
    assert arguments.prepare_deepspeed(str(tmp_path / "ds.json"), True) == {"zero_optimization": {"stage": 2}}
    assert "`scheduler` section is left out" in capsys.readouterr().err
    assert os.environ["WORLD_SIZE"] == "1" and os.environ["DS_ACCELERATOR"] == "cpu"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
        os.environ.pop(name)
