"""The Triton kernels for GPTQ's words, run by Triton's interpreter: numbers, masks, indices; no speed, no compiler."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

import qwen.int4
from qwen.int4 import Int4Linear, group_index, pack_words

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETS:
    from qwen import int4_triton
interpreted = pytest.mark.skipif(not INTERPRETS, reason="runs in a process of its own, see below")


@pytest.mark.skipif(INTERPRETS, reason="this is that process")
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed, so its kernels are not tested")
def test_in_the_interpreter() -> None:
    """In a process of its own: Triton must be told before anything imports it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
                         cwd=Path(__file__).parents[1])  # fmt: skip
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:]


def layer_and_weight(K: int, N: int, bits: int, group: int, bias: bool = True) -> tuple[Int4Linear, Tensor]:
    """A layer, and its dense weight (K, N) in float32 by the format's definition."""
    generator = torch.Generator().manual_seed(K + N + bits + group)
    numbers = torch.randint(0, 2**bits, (K, N), dtype=torch.uint8, generator=generator)
    layer = Int4Linear(K, N, bits, group, bias)
    layer.qweight = pack_words(numbers, bits)
    layer.scales = (torch.rand(K // group, N, generator=generator) * 0.02 + 0.001).half()
    layer.g_idx = group_index(K, group)
    if bias:
        layer.bias = torch.randn(N, generator=generator)
    return layer, (numbers.float() - 2 ** (bits - 1)) * layer.scales.float().repeat_interleave(group, 0)


@interpreted
@pytest.mark.parametrize("rows", [1, 3, 17, 70])
@pytest.mark.parametrize(("K", "N", "bits", "group"), [(256, 96, 4, 128), (192, 40, 4, 32), (128, 72, 8, 64)])
def test_products(rows: int, K: int, N: int, bits: int, group: int) -> None:
    layer, weight = layer_and_weight(K, N, bits, group)
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows))
    for dtype, rounding in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        rounded = x.to(dtype)
        y = torch.ops.qwen.gptq_product(rounded, layer.qweight, layer.scales, layer.bias, bits, group)
        expected = rounded.float() @ weight + layer.bias
        assert y.dtype == dtype  # the sums are float32's, only the result is rounded
        assert (y.float() - expected).abs().max() <= 2 * rounding * expected.abs().max()


@interpreted
def test_split_sums_are_whole() -> None:
    """Long and narrow, so that the inputs are cut into parts; the last part is shorter."""
    layer, weight = layer_and_weight(128 * 29, 32, 4, 128, bias=False)
    x = torch.randn(5, 128 * 29, generator=torch.Generator().manual_seed(0))
    y = torch.ops.qwen.gptq_product(x, layer.qweight, layer.scales, None, 4, 128)
    torch.testing.assert_close(y, x @ weight, rtol=1e-5, atol=1e-5)


@interpreted
def test_many_rows_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_triton, "MANY", 64)
    layer, weight = layer_and_weight(128, 64, 4, 64)
    for rows in (0, 64):
        x = torch.randn(rows, 128)
        y = torch.ops.qwen.gptq_product(x, layer.qweight, layer.scales, layer.bias, 4, 64)
        torch.testing.assert_close(y, x @ weight + layer.bias, rtol=1e-5, atol=1e-5)


@interpreted
def test_dense_weight() -> None:
    layer, weight = layer_and_weight(256, 136, 4, 32)
    torch.testing.assert_close(
        int4_triton.dense(layer.qweight, layer.scales, 4, 32, torch.float32), weight, rtol=0, atol=0
    )


@interpreted
def test_layer_uses_them_in_pieces_of_any_size_and_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen.int4, "triton_works", lambda device, bits, group: True)
    layer, weight = layer_and_weight(256, 64, 4, 128)
    traced = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in ((1, 256), (2, 3, 256), (40, 256)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
            for call in (layer, traced):
                torch.testing.assert_close(call(x), x @ weight + layer.bias, rtol=1e-5, atol=1e-5)
    assert layer.in_triton and layer.packed is None  # the checkpoint's words are all that is held
    x = torch.randn(2, 256).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(1).expand(2, -1), rtol=1e-4, atol=1e-5)


@interpreted
def test_what_does_not_work_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_triton, "gptq_product", lambda x, words, *_: x.new_zeros(len(x), words.shape[1]))
    int4_triton.works_on.cache_clear()
    with pytest.warns(UserWarning, match=r"Int4 kernels of Triton don't work on cpu \(1 rows are wrong\)"):
        assert not int4_triton.works_on("cpu", 4, 32)
    monkeypatch.undo()
    int4_triton.works_on.cache_clear()
    assert int4_triton.works_on("cpu", 4, 32)
