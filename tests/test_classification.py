"""Heads for classifiers, reward models and taggers."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

import golden
from examples import train_classifier
from qwen import QwenError, QWenForSequenceClassification, QWenLMHeadModel


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return golden.checkpoint(tmp_path / "small", vocab_size=1000)


@pytest.mark.parametrize("side", ["left", "right"])
def test_score_is_of_the_last_token_in_padded_batches(small: Path, side: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(small, num_labels=3)
    rows = [golden.ids(5), golden.ids(9, 1)]
    single = torch.cat([model(row).logits for row in rows])
    hidden = torch.cat([golden.model().transformer(row).last_hidden_state[:, -1] for row in rows])
    torch.testing.assert_close(single, hidden @ model.score.weight.T)
    ids, mask = golden.left_pad(rows)
    if side == "right":
        ids[0], mask[0] = ids[0].roll(-4), mask[0].roll(-4)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, single, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_head_is_saved_and_loaded(small: Path, tmp_path: Path, auto: type) -> None:
    model = auto.from_pretrained(small, num_labels=2, trust_remote_code=True)
    model.save_pretrained(tmp_path / "saved")
    again = auto.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(golden.ids(8)).logits, model(golden.ids(8)).logits)
    with pytest.raises(QwenError, match="lacks 1 of the model's tensors .the first: lm_head"):
        QWenLMHeadModel.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_lora_learns(small: Path, task: str) -> None:
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForTokenClassification
    model = auto.from_pretrained(small, num_labels=2)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn"], task_type=task))
    ids = torch.cat([golden.ids(6, k) for k in range(4)])
    labels = torch.tensor([0, 1, 0, 1]) if task == "SEQ_CLS" else ids % 2
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("labels", "num_labels"), [(torch.tensor([0.5]), 1), (torch.tensor([[1.0, 0.0]]), 2)])
def test_rewards_and_several_labels(small: Path, labels: torch.Tensor, num_labels: int) -> None:
    model = QWenForSequenceClassification.from_pretrained(small, num_labels=num_labels)
    out = model(golden.ids(5), labels=labels)
    expected = torch.nn.functional.mse_loss(out.logits.squeeze(), labels.squeeze())
    if num_labels > 1:
        expected = torch.nn.functional.binary_cross_entropy_with_logits(out.logits, labels)
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("num_labels", [1, 2])
def test_example_trains_and_its_adapter_loads(small: Path, tmp_path: Path, num_labels: int) -> None:
    options = ["-c", str(small), "-o", str(tmp_path / "adapter"), "--num-labels", str(num_labels)]
    assert train_classifier.main([*options, "--steps", "20"]) < 0.5 * train_classifier.main([*options, "--steps", "1"])
    model = AutoModelForSequenceClassification.from_pretrained(small, num_labels=num_labels)
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert adapted(input_ids=golden.ids(8)).logits.shape == (1, num_labels)
