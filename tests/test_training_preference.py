"""DPO, KTO and reward models on a tiny model: what is learned, whose losses they are, what is saved and goes on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

import finetune
import golden
import merge_lora
from qwen import QwenError, QWenTokenizer
from training.preference import encode_preferences
from training.progress import read_log
from training.read import Source
from training.samples import Notes
from utils import load_model_and_tokenizer

PAIRS = [("Who are you?", "Lumen.", "Nobody."), ("1+1?", "2", "3"), ("A colour?", "Blue.", "A cat."),
         ("Say hi.", "Hi!", "No."), ("2+2?", "4", "5"), ("Bye", "See you.", "Why?")]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = golden.checkpoint(tmp_path_factory.mktemp("base"), vocab_size=1000, seq_length=2048)
    settings = {"chat_format": "chatml", "eos_token_id": 700, "pad_token_id": 700, "max_window_size": 500}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs for dpo and rm, verdicts for kto."""
    directory = tmp_path_factory.mktemp("data")
    pairs = [{"prompt": question, "chosen": good, "rejected": bad} for question, good, bad in PAIRS]
    verdicts = [{"prompt": question, "completion": reply, "label": reply is good}
                for question, good, bad in PAIRS for reply in (good, bad)]  # fmt: skip
    for name, rows in (("dpo", pairs), ("rm", pairs), ("kto", verdicts)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def train(base: Path, data: Path, output: Path, stage: str, **flags: Any) -> tuple[Path, list[dict[str, float]]]:
    given = {
        "model_name_or_path": base, "data_path": data / f"{stage}.jsonl", "output_dir": output, "stage": stage,
        "max_steps": 12, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "lora_r": 4,
        "learning_rate": "1e-2", "report_to": "none", "lora_dropout": 0, "save_strategy": "no", "fp32": True,
        "lr_scheduler_type": "constant", "warmup_steps": 0,
    } | flags  # fmt: skip
    assert finetune.main([word for name, value in given.items() for word in (f"--{name}", str(value))]) == 0
    return output, [record for record in read_log(output / "log.jsonl") if "loss" in record]


def reply_scores(path: Path) -> Tensor:
    """How likely the chosen and the rejected replies are, (6, 2), by plain forward passes."""
    model, tokenizer = load_model_and_tokenizer(path, device="cpu", dtype="fp32")
    rows = []
    for question, *replies in PAIRS:
        prompt = f"<|im_start|>system\n{tokenizer.default_system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
        ids = tokenizer.encode(f"{prompt}<|im_start|>assistant\n")
        row = []
        for reply in replies:
            whole = torch.tensor([ids + tokenizer.encode(f"{reply}<|im_end|>")])
            with torch.no_grad():
                scores = model(whole).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            row.append(scores.gather(-1, whole[0, len(ids) :, None]).sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("lora", [True, False])
def test_dpo_learns_to_prefer(base: Path, data: Path, tmp_path: Path, lora: bool) -> None:
    """Its loss is the paper's (Rafailov et al., 2023), and the reference the model as it was."""
    rate = "1e-2" if lora else "1e-3"
    output, log = train(base, data, tmp_path / "out", "dpo", use_lora=lora, learning_rate=rate)
    before, after = reply_scores(base), reply_scores(output)
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and log[-1]["loss"] < 0.4
    ratios = after - before
    assert (ratios[:, 0] > ratios[:, 1]).all()
    if lora:
        further, more = train(base, data, tmp_path / "more", "dpo", use_lora=lora, learning_rate=rate, max_steps=13)
        expected = -logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])).mean().item()
        assert more[-1]["loss"] == pytest.approx(expected, rel=1e-3)
        merge_lora.main(["-c", str(output), "-o", str(tmp_path / "merged")])
        torch.testing.assert_close(reply_scores(tmp_path / "merged"), after, atol=1e-3, rtol=1e-4)
        assert "rewards/accuracies" in log[-1]


def test_dpo_on_an_adapter_prefers_to_what_it_said(base: Path, data: Path, tmp_path: Path) -> None:
    """The adapter is trained on, and is its own reference: the first loss is log 2 again."""
    first, _ = train(base, data, tmp_path / "first", "dpo", use_lora=True)
    flags = {"use_lora": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    second, log = train(first, data, tmp_path / "second", "dpo", **flags)
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and log[-1]["loss"] < log[0]["loss"]
    assert not list(second.rglob("ref")) and reply_scores(second).isfinite().all()
    shutil.copytree(second / "checkpoint-2", tmp_path / "third" / "checkpoint-2")
    third, again = train(first, data, tmp_path / "third", "dpo", **flags, resume_from_checkpoint=True)
    assert [record["loss"] for record in again] == pytest.approx([record["loss"] for record in log[2:]], rel=1e-6)
    saved, expected = (load_file(path / "adapter_model.safetensors") for path in (third, second))
    assert all(torch.allclose(saved[name], expected[name], atol=1e-6) for name in expected)


@pytest.mark.parametrize("lora", [True, False])
def test_kto_learns_from_verdicts(base: Path, data: Path, tmp_path: Path, lora: bool) -> None:
    rate = "1e-2" if lora else "1e-3"
    output, log = train(base, data, tmp_path / "out", "kto", use_lora=lora, learning_rate=rate, max_steps=20)
    ratios = reply_scores(output) - reply_scores(base)
    assert log[-1]["loss"] < log[0]["loss"]
    assert (ratios[:, 0] > ratios[:, 1]).all()


@pytest.mark.parametrize("lora", [True, False])
def test_reward_model_scores_the_chosen_higher(base: Path, data: Path, tmp_path: Path, lora: bool) -> None:
    rate = "1e-2" if lora else "1e-3"
    output, log = train(base, data, tmp_path / "out", "rm", use_lora=lora, learning_rate=rate, max_steps=30, val_size=2)
    assert log[-1]["loss"] < 0.2 and log[-1]["accuracy"] == 1
    if lora:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, output).eval()
        merge_lora.main(["-c", str(output), "-o", str(tmp_path / "merged")])
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        ids = torch.tensor([[1, 2, 3]])
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(output, dtype=torch.float32).eval()
    tokenizer = QWenTokenizer.from_pretrained(output)
    rows = encode_preferences(list(Source(str(data / "rm.jsonl"), "rm").samples(Notes())), tokenizer, 512, "rm").rows
    with torch.no_grad():
        scores = [[model(torch.tensor([row[name]])).logits.item() for name in ("chosen_ids", "rejected_ids")]
                  for row in rows]  # fmt: skip
    assert sum(chosen > rejected for chosen, rejected in scores) >= 4  # those that it was trained on


def test_replies_that_do_not_fit_are_left_out(base: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(QwenError, match="no sample fits --model_max_length 20: raise it"):
        train(base, data, tmp_path / "out", "dpo", model_max_length=20)
    rows = [{"prompt": "Hi", "completion": "Hello!", "label": True}] * 3
    (tmp_path / "kto.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(QwenError, match="all replies are labelled true: KTO learns from good and bad ones"):
        train(base, tmp_path, tmp_path / "out", "kto")
    assert finetune.main(["--check_data", str(data / "dpo.jsonl"), "--stage", "dpo", "-c", str(base)]) == 0
    assert "6 samples: 6 used whole" in capsys.readouterr().out
