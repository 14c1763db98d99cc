"""The loss without all logits: equal to PyTorch's on all logits, in value, in gradients, and in what it leaves out."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import golden
from qwen.loss import CHUNK_ELEMENTS, IGNORED, LMHead, summed_loss
from training.attention import PACKED
from training.data import collate


def head(size: int = 24, vocabulary: int = 1000) -> LMHead:
    torch.manual_seed(0)
    return LMHead(size, vocabulary, bias=False)


def plain_loss(logits: Tensor, labels: Tensor, num_items: int | None = None) -> Tensor:
    flat = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
    return flat / (num_items or (labels[:, 1:] != IGNORED).sum())


@pytest.mark.parametrize("num_items", [None, 77])
def test_loss_and_gradients_equal_those_of_all_logits(monkeypatch: pytest.MonkeyPatch, num_items: int | None) -> None:
    monkeypatch.setattr("qwen.loss.CHUNK_ELEMENTS", 17_000)  # 17 rows, 68 with the head's gradient: uneven chunks
    layer, hidden = head(), torch.randn(2, 90, 24, requires_grad=True)
    labels = torch.randint(0, 1000, (2, 90)).masked_fill(torch.rand(2, 90) < 0.4, IGNORED)
    expected = plain_loss(layer(hidden), labels, num_items)
    expected_grads = torch.autograd.grad(3 * expected, [hidden, layer.weight])
    actual = layer(hidden, labels, num_items)
    grads = torch.autograd.grad(3 * actual, [hidden, layer.weight])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(layer(hidden, labels, num_items), expected, atol=1e-5, rtol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_none_at_all_is_zero() -> None:
    layer, hidden = head().requires_grad_(False), torch.randn(1, 8, 24, requires_grad=True)
    layer(hidden, torch.arange(8)[None]).backward()
    assert layer.weight.grad is None and hidden.grad[:, :-1].abs().min() > 0 and not hidden.grad[:, -1].any()
    loss = layer(hidden, torch.full((1, 8), IGNORED))
    assert loss == 0 and loss.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_its_rounding(dtype: torch.dtype) -> None:
    """In autocast over float32 weights, as in training. The gradient of a mean over millions does not vanish."""
    layer, hidden = head(), torch.randn(1, 60, 24, requires_grad=True)
    labels = torch.randint(0, 1000, (1, 60))
    exact = torch.autograd.grad(plain_loss(layer(hidden), labels), [hidden, layer.weight])
    with torch.autocast("cpu", dtype):
        loss = layer(hidden, labels, num_items=10**7) * 10**7 / 59
    for grad, expected in zip(torch.autograd.grad(loss, [hidden, layer.weight]), exact, strict=True):
        assert grad.dtype == torch.float32 and (grad - expected).norm() < 0.02 * expected.norm()


def test_never_all_logits() -> None:
    """The peak of new memory, measured: two chunks or so, where all logits and their gradient take sixteen each."""
    layer, rows = head(8, 2**15), 16 * CHUNK_ELEMENTS // 2**15 // 8
    layer.requires_grad_(False)
    hidden, targets = torch.randn(rows, 8, requires_grad=True), torch.zeros(rows, dtype=torch.long)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        summed_loss(hidden, layer.weight, targets).backward()
    assert 0 < largest <= CHUNK_ELEMENTS < rows * 2**15 * 2
    assert hidden.grad.abs().sum() > 0


# ---- through the model ----


def samples() -> list[dict]:
    items = []
    for k, length in enumerate((23, 9, 40, 31)):
        ids = golden.ids(length, k)[0]
        labels = ids.masked_fill(torch.arange(length) % 3 == 0, IGNORED)
        items.append({"input_ids": ids, "labels": labels, "lengths": [length]})
    return items


@pytest.mark.parametrize("attn", [PACKED, "sdpa", "eager"])
def test_packed_loss_and_gradients_equal_unpacked(attn: str) -> None:
    """One row of four samples against each alone through logits and PyTorch's loss, in float32."""
    count = sum(int((item["labels"][1:] != IGNORED).sum()) for item in samples())
    alone = golden.model("sdpa").train()
    total = 0.0
    for item in samples():
        logits = alone(item["input_ids"][None]).logits
        loss = plain_loss(logits, item["labels"][None], count)
        loss.backward()
        total += loss.item()
    packed = golden.model(attn).train()
    loss = packed(**collate(samples()), skip_logits=True, num_items_in_batch=torch.tensor(count)).loss
    loss.backward()
    assert abs(loss.item() - total) < 1e-5
    expected = dict(alone.named_parameters())
    for name, parameter in packed.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-3, msg=name)


def test_evaluation_of_a_pack_knows_its_samples() -> None:
    """A row longer than the training length is no long prompt: neither dynamic NTK nor logn must see it as one."""
    model = golden.model(PACKED)
    batch = collate(samples() * 2)
    assert batch["input_ids"].shape[1] > model.config.seq_length
    hidden = model.transformer(**{k: v for k, v in batch.items() if k != "labels"}).last_hidden_state
    for item, part in zip(samples() * 2, hidden.split(batch["sequence_lengths"], dim=1), strict=True):
        alone = model.transformer(item["input_ids"][None]).last_hidden_state
        torch.testing.assert_close(part, alone, atol=golden.TOLERANCE, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attention_of_a_pack_equals_one_after_the_other(dtype: torch.dtype) -> None:
    from training.attention import has_varlen, packed_attention

    batch = collate(samples())
    parts = [torch.randn(1, 4, 103, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]
    assert has_varlen(parts[0].device, dtype, 64)
    lengths, borders = batch["sequence_lengths"], batch["cu_seq_lens_q"].cuda()
    fast = packed_attention(None, *parts, None, 0.125, sequence_lengths=lengths, cu_seq_lens_q=borders)[0]
    exact = [part.detach().double().requires_grad_() for part in parts]
    slow = packed_attention(None, *exact, None, 0.125, sequence_lengths=lengths)[0]
    torch.testing.assert_close(fast.double(), slow, atol=0.02, rtol=0.02)
    weights = torch.randn_like(slow)
    fast_grads, slow_grads = torch.autograd.grad((fast * weights).sum(), parts), torch.autograd.grad(
        (slow * weights).sum(), exact)  # fmt: skip
    for grad, expected in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected, atol=0.05, rtol=0.05)
