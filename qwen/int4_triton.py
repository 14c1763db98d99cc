"""Products with GPTQ's own words on NVIDIA GPUs, in Triton: nothing is packed anew, and no dense copy is made.

Shapes: M rows, K inputs, N outputs; words (K * bits / 32, N) int32, scales (K / group, N) float16. A word holds the
numbers of 32 / bits inputs of one output, the first input lowest; weight = scale * (number - middle).

One row is a sum in registers. More rows go to the tensor cores; few of them are cut over the inputs too (split-K), so
that all of the GPU reads, and the parts are added up in a fixed order. From `MANY` rows on a dense copy is made, in one
pass: reading it again costs less than the tensor cores then lose to unpacking.
"""

import warnings
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

MANY = 1024  # rows
BUSY = 512  # programs that keep a large GPU reading


@triton.jit
def _one_row(x, words, scales, bias, out, N, K,
             BITS: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    NUMBERS: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = GROUP // NUMBERS  # of one group and output
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    w = tl.arange(0, WORDS)
    total = tl.zeros((WORDS, BLOCK_N), dtype=tl.float32)
    for group in range(0, K // GROUP):
        at = (group * WORDS + w)[:, None] * N + n[None, :]
        packed = tl.load(words + at, mask=inside[None, :], other=0)
        part = tl.zeros((WORDS, BLOCK_N), dtype=tl.float32)
        for i in tl.static_range(NUMBERS):
            number = ((packed >> BITS * i) & (2**BITS - 1)) - 2 ** (BITS - 1)
            value = tl.load(x + group * GROUP + w * NUMBERS + i).to(tl.float32)
            part += number.to(tl.float32) * value[:, None]
        scale = tl.load(scales + group * N + n, mask=inside, other=0.0).to(tl.float32)
        total += part * scale[None, :]
    y = tl.sum(total, axis=0)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _unpacked(words, k, n, N, inside, BITS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """The numbers less their middle (BLOCK_K, BLOCK_N) int32, from input k on."""
    NUMBERS: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = BLOCK_K // NUMBERS
    at = (k // NUMBERS + tl.arange(0, WORDS))[:, None] * N + n[None, :]
    packed = tl.load(words + at, mask=inside[None, :], other=0)
    shifts = tl.arange(0, NUMBERS) * BITS
    numbers = ((packed[:, None, :] >> shifts[None, :, None]) & (2**BITS - 1)) - 2 ** (BITS - 1)
    return tl.reshape(numbers, (BLOCK_K, BLOCK_N))


@triton.jit
def _some_rows(x, words, scales, bias, out, M, N, K, blocks,
               BITS: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    """Blocks of BLOCK_K inputs, `blocks` of them a program; with PARTS > 1 into out (PARTS, M, N) float32."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    inside = n < N
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in range(part * blocks, tl.minimum((part + 1) * blocks, K // BLOCK_K)):
        k = block * BLOCK_K
        rows = tl.load(x + m[:, None] * K + (k + tl.arange(0, BLOCK_K))[None, :], mask=(m < M)[:, None], other=0.0)
        if WIDEN:
            rows = rows.to(tl.float32)
        numbers = _unpacked(words, k, n, N, inside, BITS, BLOCK_K, BLOCK_N).to(rows.dtype)  # exact: at most 8 bits
        scale = tl.load(scales + (k // GROUP) * N + n, mask=inside, other=0.0).to(tl.float32)
        total += tl.dot(rows, numbers, input_precision="ieee") * scale[None, :]
    if HAS_BIAS and PARTS == 1:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    at = (part * M + m)[:, None] * N + n[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & inside[None, :])


@triton.jit
def _add_parts(parts, bias, out, size, N, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * size + at, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dense(words, scales, out, N, K,
           BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    k = tl.program_id(1) * BLOCK_K
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    numbers = _unpacked(words, k, n, N, inside, BITS, BLOCK_K, BLOCK_N).to(tl.float32)
    scale = tl.load(scales + (k // GROUP) * N + n, mask=inside, other=0.0).to(tl.float32)
    at = (k + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out + at, (numbers * scale[None, :]).to(out.dtype.element_ty), mask=inside[None, :])


@torch.library.custom_op("qwen::gptq_dense", mutates_args=())
def dense(words: Tensor, scales: Tensor, bits: int, group: int, dtype: torch.dtype) -> Tensor:
    """The weight (K, N)."""
    K, N = words.shape[0] * 32 // bits, words.shape[1]
    out = torch.empty(K, N, dtype=dtype, device=words.device)
    block = min(group, 64)
    _dense[triton.cdiv(N, 128), K // block](words, scales, out, N, K, bits, group, block, 128)
    return out


@dense.register_fake
def _(words: Tensor, scales: Tensor, bits: int, group: int, dtype: torch.dtype) -> Tensor:
    return words.new_empty(words.shape[0] * 32 // bits, words.shape[1], dtype=dtype)


@torch.library.custom_op("qwen::gptq_product", mutates_args=())
def gptq_product(x: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None, bits: int, group: int) -> Tensor:
    """x (M, K) in float16, bfloat16 or float32 times the weight, plus bias (N,): (M, N) in the type of x."""
    (M, K), N = x.shape, words.shape[1]
    x = x.contiguous()
    if M >= MANY:
        weight = dense(words, scales, bits, group, x.dtype)
        return x @ weight if bias is None else torch.addmm(bias.to(x.dtype), x, weight)
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if M == 0:
        return out
    given = bias if bias is not None else scales  # a pointer that is never read
    if M == 1:
        width = 16 if N < 32 * BUSY // 2 else 32
        _one_row[triton.cdiv(N, width),](x, words, scales, given, out, N, K, bits, group, bias is not None, width)
        return out
    block_m, block_n, block_k = (16, 32, min(group, 128)) if M <= 16 else (32, 64, 64) if M <= 32 else (64, 64, 64)
    block_k = min(block_k, group)
    programs = triton.cdiv(N, block_n) * triton.cdiv(M, block_m)
    blocks = K // block_k
    parts = max(1, min(8, BUSY // programs, blocks // 4))
    each = triton.cdiv(blocks, parts)
    target = out if parts == 1 else torch.empty(parts, M, N, dtype=torch.float32, device=x.device)
    _some_rows[triton.cdiv(N, block_n), triton.cdiv(M, block_m), parts](
        x, words, scales, given, target, M, N, K, each, bits, group, bias is not None, parts, block_m, block_n, block_k,
        triton.knobs.runtime.interpret,  # whose products of bfloat16 are those of its bits
    )  # fmt: skip
    if parts > 1:
        _add_parts[triton.cdiv(M * N, 512),](target, given, out, M * N, N, bias is not None, parts, 512)
    return out


@gptq_product.register_fake
def _(x: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None, bits: int, group: int) -> Tensor:
    return x.new_empty(x.shape[0], words.shape[1])


@cache
def works_on(device: str, bits: int, group: int) -> bool:
    """Whether these kernels compile on a device and compute there what the format says."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 2**bits, (2 * group, 48), generator=generator)
    shifts = torch.arange(0, 32, bits)[:, None]
    words = (numbers.view(-1, 32 // bits, 48) << shifts).sum(1)
    words = torch.where(words < 2**31, words, words - 2**32).int().to(device)
    scales = (torch.rand(2, 48, generator=generator) + 0.5).half()
    weight = (numbers - 2 ** (bits - 1)).float() * scales.float().repeat_interleave(group, 0)
    bias = torch.randn(48, generator=generator)
    try:
        for rows in (1, 3, 20, 40):
            x = torch.randn(rows, 2 * group, generator=generator).half()
            expected = x.float() @ weight + bias
            y = gptq_product(x.to(device), words, scales.to(device), bias.to(device), bits, group).float().cpu()
            if not (y - expected).abs().max() < 0.01 * expected.abs().max():
                raise ArithmeticError(f"{rows} rows are wrong")
        made = dense(words, scales.to(device), bits, group, torch.float32).cpu()
        if not torch.allclose(made, weight):
            raise ArithmeticError("the dense weight is wrong")
    except Exception as error:  # whatever a compiler or a driver raises: there is another way
        warnings.warn(f"Int{bits} kernels of Triton don't work on {device} ({error}): PyTorch's are used", stacklevel=2)
        return False
    return True
