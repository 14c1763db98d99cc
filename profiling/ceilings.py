"""What this machine can do at best, measured: bytes read per second, and floating point operations per second."""

import time
from collections.abc import Callable

import torch

CPU_BUFFER = 2**30  # bytes: many times the caches of any processor
GPU_BUFFER = 2**32
COLUMNS = 4096


def best_seconds(work: Callable[[], object], device: torch.device, budget_s: float = 1.0) -> float:
    """The fastest of several calls, after one to warm up; at least three, then until the budget is spent."""
    work()
    synchronize(device)
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < budget_s:
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def synchronize(device: torch.device) -> None:
    """Wait for a device that works in the background."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def read_bandwidth(device: torch.device, buffer_bytes: int | None = None, budget_s: float = 1.0) -> float:
    """Bytes per second that all cores together read from memory: the faster of a sum and a matrix-vector product.

    On a two-core CPU the product reads as fast as a loop of plain AVX2 loads written in C.
    """
    size = buffer_bytes or (CPU_BUFFER if device.type == "cpu" else GPU_BUFFER)
    matrix = torch.ones(size // 4 // COLUMNS, COLUMNS, device=device)
    vector = torch.ones(COLUMNS, device=device)
    seconds = min(best_seconds(work, device, budget_s / 2) for work in (matrix.sum, lambda: matrix @ vector))
    return matrix.numel() * 4 / seconds


def matmul_flops(device: torch.device, dtype: torch.dtype, budget_s: float = 1.0) -> float:
    """Operations per second of a square matrix product; a multiplication and an addition count as two.

    Sizes double from 256 until a call takes a twentieth of the budget: a slow precision takes no minutes.
    """
    size, largest = 256, 2048 if device.type == "cpu" else 8192
    while True:
        a = torch.full((size, size), 0.01, device=device, dtype=dtype)
        seconds = best_seconds(lambda a=a: a @ a, device, budget_s / 20)
        if size >= largest or seconds > budget_s / 20:
            return 2 * size**3 / min(seconds, best_seconds(lambda a=a: a @ a, device, budget_s))
        size *= 2


def measure_ceilings(device: torch.device, dtypes: dict[str, torch.dtype], native_bf16: bool) -> dict[str, float]:
    """`read_bytes_s`, and `flops_<name>` for each precision.

    A CPU without bf16 arithmetic computes bf16 and fp16 by way of float32 at best, so float32's rate is their ceiling.
    """
    ceilings = {"read_bytes_s": read_bandwidth(device)}
    rates: dict[torch.dtype, float] = {}
    for name, dtype in dtypes.items():
        native = device.type != "cpu" or (dtype == torch.bfloat16 and native_bf16)
        computed = dtype if native else torch.float32
        if computed not in rates:
            rates[computed] = matmul_flops(device, computed)
        ceilings[f"flops_{name}"] = rates[computed]
    return ceilings
