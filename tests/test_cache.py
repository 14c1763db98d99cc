"""Conversations of different lengths decode together, each in its own cache, as they do alone."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

import golden
from qwen.cache import JointCache
from qwen.modeling_qwen import QWenLMHeadModel, dynamic_ntk_alpha

LENGTHS = (5, 130, 40)  # 64 is the training length of the golden model: alphas differ, logn is at work
STEPS = 3


@pytest.fixture(scope="module", params=["kernels", "kernels with windows", "sdpa", "sdpa with windows", "eager"])
def model(request: pytest.FixtureRequest) -> QWenLMHeadModel:
    what, _, windows = request.param.partition(" with ")
    model = golden.model("eager" if what == "eager" else "sdpa", local_attn=[20, 40, 1000] if windows else False)
    if what == "kernels" and not model.use_cpu_kernels():
        pytest.skip("no C++ compiler")
    return model


@torch.inference_mode()
def prefill(model: QWenLMHeadModel, length: int, k: int) -> tuple[DynamicCache, torch.Tensor]:
    cache = DynamicCache(config=model.config)
    sequence = golden.ids(length + STEPS, k)
    model(sequence[:, :length], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache, sequence[:, length:]


@torch.inference_mode()
def test_rows_of_any_length_decode_as_alone(model: QWenLMHeadModel) -> None:
    alone = []
    for k, length in enumerate(LENGTHS):
        cache, sequence = prefill(model, length, k)
        steps = [model(sequence[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(STEPS)]
        alone.append(torch.cat(steps, dim=1)[0])

    started = [prefill(model, length, k) for k, length in enumerate(LENGTHS)]
    members = [[0, 1], [0, 1, 2], [2, 0]]  # who decodes in which step: rows join and leave
    done = [0, 0, 0]
    for rows in members:
        caches = [started[row][0] for row in rows]
        tokens = torch.cat([started[row][1][:, done[row] : done[row] + 1] for row in rows])
        logits = model(
            tokens,
            past_key_values=JointCache(caches),
            position_ids=torch.tensor([[LENGTHS[row] + done[row]] for row in rows]),
            ntk_alpha=dynamic_ntk_alpha(torch.tensor([LENGTHS[row] for row in rows]), model.config.seq_length),
            use_cache=True,
        ).logits
        for row, new in zip(rows, logits, strict=True):
            torch.testing.assert_close(new[0], alone[row][done[row]], atol=1e-4, rtol=1e-4)
            done[row] += 1
    assert [cache.get_seq_length() for cache, _ in started] == [n + d for n, d in zip(LENGTHS, done, strict=True)]
