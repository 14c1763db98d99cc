"""The compiled decoder against the publisher's outputs and against PyTorch's operations; and when it steps aside."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from paged import Steps
from peft import LoraConfig, get_peft_model
from transformers.cache_utils import DynamicCache

import golden
import qwen.cpu
from golden import TOLERANCE, difference, left_pad
from qwen import QWenLMHeadModel
from qwen.cache import GrowingLayer, let_grow
from qwen.hardware import VARIABLE, kernel_levels
from qwen.int4 import Int4Linear, pack_words


@pytest.fixture(autouse=True)
def kernels_on(set_hardware: Callable[[str], None]) -> None:
    """Also where the whole run of tests is without them."""
    set_hardware("kernels=native")


def with_kernels(dtype: torch.dtype = torch.float32, **changes: object) -> QWenLMHeadModel:
    model = golden.model(**changes).to(dtype)
    assert model.use_cpu_kernels(), "no C++ compiler here"
    return model


def spy(model: QWenLMHeadModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the tokens of each call that the kernels really compute."""
    counts: list[int] = []
    call = qwen.cpu.CpuDecoder.__call__

    def counted(self: qwen.cpu.CpuDecoder, hidden: torch.Tensor, *args: object) -> torch.Tensor:
        counts.append(hidden.shape[0] * hidden.shape[1])
        return call(self, hidden, *args)

    monkeypatch.setattr(qwen.cpu.CpuDecoder, "__call__", counted)
    return counts


@pytest.fixture
def four_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


# ---- against the publisher's outputs ----


@pytest.mark.parametrize(("ntk", "logn"), [(False, False), (False, True), (True, False), (True, True)])
@torch.no_grad()
def test_whole_prompts(ntk: bool, logn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_kernels(use_dynamic_ntk=ntk, use_logn_attn=logn)
    counts = spy(model, monkeypatch)
    for length in (10, 64, 65, 129, 300):
        name = f"full_ntk{ntk:d}_logn{logn:d}_L{length}"
        assert difference(model.transformer(golden.ids(length)).last_hidden_state[0], f"{name}_hidden") < TOLERANCE
        logits = model(golden.ids(length), logits_to_keep=1).logits
        assert difference(logits[0, 0], f"{name}_last_logits") < TOLERANCE
    assert counts == [10, 10, 64, 64, 65, 65, 129, 129, 300, 300]


@pytest.mark.parametrize(("prompt", "steps"), [(50, 40), (70, 70), (65, 5)])
@torch.no_grad()
def test_prompt_and_single_steps(prompt: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_kernels()
    counts = spy(model, monkeypatch)
    assert difference(golden.hidden_by_steps(model, prompt, steps), f"step_P{prompt}_S{steps}_hidden") < TOLERANCE
    assert counts == [prompt, *[1] * steps]


def test_greedy(monkeypatch: pytest.MonkeyPatch, four_threads: None) -> None:
    model = with_kernels()
    counts = spy(model, monkeypatch)
    ids = model.generate(golden.ids(60), max_new_tokens=30, do_sample=False)
    np.testing.assert_array_equal(ids[0, 60:].numpy(), golden.outputs()["greedy_60_30"])
    assert counts == [60, *[1] * 29]


# ---- against PyTorch's operations ----


@pytest.mark.parametrize("local_attn", [False, [20, 40, 1000]])
@torch.no_grad()
def test_padded_batches_chunks_and_windows(local_attn: object, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = golden.model(local_attn=local_attn), with_kernels(local_attn=local_attn)
    counts = spy(model, monkeypatch)
    ids, mask = left_pad([golden.ids(n, 2) for n in (30, 70, 130)])
    a, b = DynamicCache(), DynamicCache()
    for begin, end in ((0, 100), (100, 125), (125, 129), (129, 130)):
        chunk = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end]}
        expected = plain(**chunk, past_key_values=a, use_cache=True).logits
        actual = model(**chunk, past_key_values=b, use_cache=True).logits
        real = mask[:, begin:end, None]
        assert torch.isfinite(actual).all()
        assert ((actual - expected) * real).abs().max() < 2e-4
    assert counts == [300, 75, 12, 3]


@torch.no_grad()
def test_bf16_is_as_near_to_float32_as_pytorch_is(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, plain, model = golden.model().bfloat16().float(), golden.model().bfloat16(), with_kernels(torch.bfloat16)
    counts = spy(model, monkeypatch)
    ids, caches = golden.ids(90), [DynamicCache() for _ in range(3)]
    for begin, end in ((0, 80), (80, 85), (85, 86), (86, 87)):
        expected, theirs, ours = (
            m(ids[:, begin:end], past_key_values=c, use_cache=True).logits.float()
            for m, c in zip((exact, plain, model), caches, strict=True)
        )
        assert (ours - expected).norm() < 1.2 * (theirs - expected).norm()
    assert counts == [80, 5, 1, 1]


def int4_copy(model: QWenLMHeadModel, group_size: int) -> QWenLMHeadModel:
    """The model with random 4-bit weights in all layers."""
    generator = torch.Generator().manual_seed(0)
    for name, linear in list(model.transformer.h.named_modules()):
        if type(linear) is torch.nn.Linear:
            new = Int4Linear(linear.in_features, linear.out_features, 4, group_size, bias=True)
            numbers = torch.randint(0, 16, (linear.in_features, linear.out_features), generator=generator)
            new.qweight.copy_(pack_words(numbers.to(torch.uint8), 4))
            new.scales.copy_(0.01 + 0.05 * torch.rand(new.scales.shape, generator=generator))
            new.bias.copy_(0.1 * torch.randn(new.bias.shape, generator=generator))
            model.transformer.h.set_submodule(name, new)
    return model


@pytest.mark.parametrize("group_size", [32, 64])
@torch.no_grad()
def test_int4_against_its_dequantised_weights(group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = int4_copy(with_kernels(), group_size)
    dense = copy.deepcopy(model)
    for name, linear in list(dense.transformer.h.named_modules()):
        if isinstance(linear, Int4Linear):
            new = torch.nn.Linear(linear.in_features, linear.out_features)
            new.weight.copy_(linear.dequantize())
            new.bias.copy_(linear.bias)
            dense.transformer.h.set_submodule(name, new)
    dense.transformer.cpu_decoder = None
    counts = spy(model, monkeypatch)
    ids, a, b = golden.ids(150), DynamicCache(), DynamicCache()
    for begin, end in ((0, 140), (140, 145), (145, 146)):
        expected = dense(ids[:, begin:end], past_key_values=a, use_cache=True).logits
        actual = model(ids[:, begin:end], past_key_values=b, use_cache=True).logits
        # Activations of 8 bits in blocks of 32; these random weights multiply every error from layer to layer.
        assert torch.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > 0.998
    assert counts == [140, 5, 1]


# ---- every row as if it were alone ----

PROCESSORS = [f"kernels={level},bf16={bf16}" for level in kernel_levels() for bf16 in ("on", "off")]


@pytest.fixture(params=PROCESSORS)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


@pytest.fixture(params=["fp32", "bf16", "int4", "int4 in bf16", "windows"])
def any_model(request: pytest.FixtureRequest, processor: str) -> QWenLMHeadModel:
    changes = {"local_attn": [20, 40, 1000]} if request.param == "windows" else {}
    dtype = torch.bfloat16 if "bf16" in request.param else torch.float32
    model = with_kernels(dtype, use_dynamic_ntk=False, **changes)
    return int4_copy(model, 32) if "int4" in request.param else model


@torch.inference_mode()
def by_chunks(model: QWenLMHeadModel, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits (T, V) of one row, read in chunks of these sizes."""
    cache = DynamicCache()
    chunks = ids.split(sizes, dim=1)
    return torch.cat([model(chunk, past_key_values=cache, use_cache=True).logits[0] for chunk in chunks])


@torch.inference_mode()
def test_a_row_gives_the_same_bits_in_any_company(
    any_model: QWenLMHeadModel, monkeypatch: pytest.MonkeyPatch, four_threads: None
) -> None:
    model, counts = any_model, spy(any_model, monkeypatch)
    rows = [golden.ids(length, length) for length in (150, 66, 7, 131, 65)]
    torch.set_num_threads(1)
    alone = [by_chunks(model, row, [row.shape[1]]) for row in rows]
    assert all(logits.dtype == torch.float32 for logits in alone)
    torch.set_num_threads(4)

    for sizes in ([64, 64, 22], [1, 63, 85, 1], [50] * 3, [1] * 3 + [9] * 16 + [3]):
        assert torch.equal(by_chunks(model, rows[0], sizes), alone[0])

    ids, mask = left_pad(rows)
    for expected, logits in zip(alone, model(ids, attention_mask=mask).logits, strict=True):
        assert torch.equal(logits[-len(expected) :], expected)

    steps = Steps(model, [row[0].tolist() for row in rows])
    for portions in ([130, 40, 3, 1, 30], [1] * 5, [19, 25, 3, 129, 34]):  # chunks and single tokens in company
        steps.run(portions)
    for expected, logits in zip(alone, steps.logits, strict=True):
        assert torch.equal(torch.cat(logits), expected)
    assert len(counts) == 5 + 3 + 4 + 3 + 20 + 1 + 3, "all of it in the kernels"


@torch.inference_mode()
def test_every_level_and_type_is_near_float32(processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = golden.ids(90)
    model = with_kernels()
    counts = spy(model, monkeypatch)
    assert (model(ids).logits - golden.model()(ids).logits).abs().max() < TOLERANCE
    rounded = golden.model().bfloat16()
    exact, theirs = copy.deepcopy(rounded).float()(ids).logits, rounded(ids).logits
    ours = with_kernels(torch.bfloat16)(ids).logits
    assert (ours - exact).norm() < (theirs - exact).norm()
    assert counts == [90, 90]


# ---- when it steps aside ----


def test_a_changed_model_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_kernels()
    counts = spy(model, monkeypatch)
    ids = golden.ids(20)
    with torch.no_grad():
        first = model(ids).logits
        model.transformer.h[1].mlp.w1.weight.data = model.transformer.h[1].mlp.w1.weight.data * 2
        doubled = model(ids).logits
        model.transformer.cpu_decoder.layers[1].mlp.w1.weight.data /= 2  # in place: the same memory
        assert torch.equal(model(ids).logits, first)
        assert (doubled - first).abs().max() > 1e-3
    assert counts == [20, 20, 20]
    adapted = get_peft_model(model, LoraConfig(target_modules=["c_attn"], init_lora_weights=False)).eval()
    with torch.no_grad():
        assert (adapted(ids).logits - first).abs().max() > 1e-3
    assert counts == [20, 20, 20], "an adapter is nothing that the kernels know"


def test_hooks_gradients_and_hidden_states_run_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_kernels()
    counts = spy(model, monkeypatch)
    loss = model(golden.ids(100), labels=golden.ids(100)).loss
    loss.backward()
    assert abs(loss.item() - golden.outputs()["loss_L100"]) < 1e-5
    assert model.transformer.h[0].attn.c_attn.weight.grad.abs().max() > 0
    with torch.no_grad():
        assert len(model(golden.ids(10), output_hidden_states=True).hidden_states) == 4
        seen = []
        model.transformer.h[2].register_forward_hook(lambda *args: seen.append(1))
        model(golden.ids(10))
    assert seen and not counts


def test_a_copy_has_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_kernels()
    twin = copy.deepcopy(model)
    counts = spy(twin, monkeypatch)
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.weight.zero_()
        assert difference(twin(golden.ids(10), logits_to_keep=1).logits[0, 0], "full_ntk1_logn1_L10_last_logits") < 1e-4
    assert counts == [10]


def test_without_a_compiler_one_warning_and_pytorch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'no such target' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    qwen.cpu._load.cache_clear()
    try:
        model = golden.model()
        with pytest.warns(UserWarning, match="don't compile here .no such target.*PyTorch's"):
            assert not model.use_cpu_kernels()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not model.use_cpu_kernels()
        with torch.no_grad():
            assert (
                difference(model.transformer(golden.ids(10)).last_hidden_state[0], "full_ntk1_logn1_L10_hidden") < 1e-4
            )
        assert not list(tmp_path.rglob("*.so"))
    finally:
        qwen.cpu._load.cache_clear()


# ---- the cache ----


def test_growing_cache_equals_transformers_dynamic_cache() -> None:
    """The same calls on both, with appending, cropping, reordering, repeating, selecting and resetting."""
    ours, theirs = DynamicCache(), DynamicCache()
    let_grow(ours, 2)
    assert all(isinstance(layer, GrowingLayer) for layer in ours.layers)

    def append(rows: int, tokens: int) -> None:
        new = torch.randn(2, rows, 3, tokens, 4)
        for layer in range(2):
            for a, b in zip(ours.update(*new, layer), theirs.update(*new, layer), strict=True):
                assert torch.equal(a, b)

    def both(method: str, *args: object) -> None:
        for cache in (ours, theirs):
            getattr(cache, method)(*args)
        assert ours.get_seq_length() == theirs.get_seq_length()
        for a, b in zip(ours.layers, theirs.layers, strict=True):
            assert (a.keys is None and b.keys is None) or torch.equal(a.keys, b.keys)
            assert (a.values is None and b.values is None) or torch.equal(a.values, b.values)

    append(2, 70)
    for _ in range(80):
        append(2, 1)
    both("crop", -17)
    append(2, 3)
    both("reorder_cache", torch.tensor([1, 0]))
    append(2, 2)
    both("batch_repeat_interleave", 2)
    append(4, 1)
    both("batch_select_indices", torch.tensor([0, 3]))
    append(2, 1)
    kept = copy.deepcopy(ours)
    append(2, 1)
    assert kept.get_seq_length() == ours.get_seq_length() - 1
    both("reset")
    append(2, 5)
