"""What the processor and the GPU can do: the one place that asks them.

Everybody else takes it from here, so that the environment variable QWEN_HARDWARE can say otherwise:

    QWEN_HARDWARE=bf16=on,kernels=v3,threads=4 python cli_demo.py -c demo

bf16      on or off: whether the processor multiplies bfloat16 by instructions of its own
kernels   off, generic, v3, v4 or native: the instructions that the compiled CPU kernels may use (v3 is x86 with AVX2,
          v4 with AVX-512, generic is what every processor of the kind has, off leaves the work to PyTorch)
threads   how many threads compute
"""

import inspect
import os
import platform
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch

from .errors import QwenError

VARIABLE = "QWEN_HARDWARE"
LEVELS = ("off", "generic", "v3", "v4", "native")
X86_LEVELS = {  # instructions beyond the level below, by torch.cpu's names
    "v3": ("avx2", "fma3", "bmi", "bmi2", "f16c", "lzcnt"),
    "v4": ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl"),
}
OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}  # by CUDA's major version (NVIDIA, "CUDA Compatibility")
DRIVER_FILE, MEMORY_FILE = Path("/proc/driver/nvidia/version"), Path("/proc/meminfo")
CGROUP_FILES = tuple(  # limit and use, of version 2 and version 1
    (Path("/sys/fs/cgroup", limit), Path("/sys/fs/cgroup", used))
    for limit, used in (("memory.max", "memory.current"),
                        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
)  # fmt: skip
NATIVE_BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # the last is ARM's


@dataclass(frozen=True)
class Hardware:
    """What to compute with on the CPU."""

    bf16: bool  # native products in bfloat16
    kernels: str  # one of LEVELS


def hardware() -> Hardware:
    """This machine's, changed by what QWEN_HARDWARE says.

    Raises:
        QwenError: QWEN_HARDWARE names something unknown, or instructions that this processor does not have.
    """
    return _read(os.environ.get(VARIABLE, ""))


def num_threads() -> int:
    """Threads that compute on the CPU: PyTorch's number, which QWEN_HARDWARE sets."""
    hardware()
    return torch.get_num_threads()


def num_processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def processor_name() -> str:
    """The processor's name, and whether it has bfloat16 instructions."""
    name = _capabilities().get("cpu_name") or platform.processor() or platform.machine()
    return f"{name} ({'with' if hardware().bf16 else 'without'} native bf16)"


def kernel_levels() -> list[str]:
    """The instruction levels whose kernels run on this processor, the lowest first."""
    found = _capabilities()
    levels = ["generic"]
    if platform.machine() in ("x86_64", "AMD64"):
        for level, names in X86_LEVELS.items():
            if not all(found.get(name) for name in names):
                break
            levels.append(level)
    return [*levels, "native"]


def machine_key() -> str:
    """Tells processors apart whose code differs: a home directory may serve several machines."""
    return f"{platform.machine()} {sorted(name for name, there in _capabilities().items() if there is True)}"


def computes_bf16(device: str) -> bool:
    """Whether the device ("cpu", "cuda:1", "mps", ...) multiplies bfloat16 itself, not by way of float32."""
    kind = device.split(":")[0]
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return hardware().bf16 if kind == "cpu" else True


@cache
def has_paged_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's attention can read keys and values out of pages on this device: FlashAttention 2 for NVIDIA's
    GPUs from compute capability 8.0 on, in 16 bits, in a PyTorch that hands tables to it."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn_out
    except ImportError:
        return False
    return {"block_table", "num_splits"} <= inspect.signature(varlen_attn_out).parameters.keys()


def explain_missing_gpu() -> str:
    """Why PyTorch finds no GPU (or too few): there is none, or it and its driver don't fit."""
    if count := torch.cuda.device_count():
        return f"PyTorch finds {count} GPU(s) here"
    return describe_gpu_trouble() or "PyTorch finds no GPU here"


def describe_gpu_trouble() -> str | None:
    """What keeps PyTorch from using the NVIDIA GPU whose driver is installed; None where nothing does."""
    driver = nvidia_driver()
    if driver is None or torch.cuda.is_available():
        return None
    cuda = torch.version.cuda
    if cuda is None:
        return (
            f"an NVIDIA driver ({driver}) is installed, but this PyTorch is built for CPUs only: install the build for "
            "GPUs (pip install --force-reinstall -c constraints.txt torch)"
        )
    needed = OLDEST_DRIVERS.get(int(cuda.split(".")[0]))
    if needed is not None and int(driver.split(".")[0]) < needed:
        return (
            f"the NVIDIA driver {driver} is too old for this PyTorch, which is built for CUDA {cuda}: install driver "
            f"{needed} or newer, or a PyTorch for an older CUDA (pytorch.org)"
        )
    return f"PyTorch (CUDA {cuda}) can't use the GPU of the NVIDIA driver {driver}: see whether nvidia-smi finds it"


def nvidia_driver() -> str | None:
    """The version of the installed NVIDIA driver, such as 535.161.08; None without one (or not on Linux)."""
    try:
        found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", DRIVER_FILE.read_text())
    except OSError:
        return None
    return found[0] if found else None


def free_memory() -> int | None:
    """Bytes of memory that are to be had, swap included, under the container's limit; None if unknown."""
    try:
        words = MEMORY_FILE.read_text()
        available = int(re.search(r"MemAvailable:\s+(\d+) kB", words)[1]) * 1024
    except (OSError, TypeError):
        return None
    if swap := re.search(r"SwapFree:\s+(\d+) kB", words):
        available += int(swap[1]) * 1024
    for limit, used in CGROUP_FILES:
        try:
            kept = re.findall(r"^(?:total_)?(?:in)?active_file (\d+)$", used.with_name("memory.stat").read_text(), re.M)
            cached = sum(map(int, kept[-2:]))  # files that were read count as used, and give way when there is need
            available = min(available, max(0, int(limit.read_text()) - int(used.read_text()) + cached))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return available


def _capabilities() -> dict[str, object]:
    return torch.cpu.get_capabilities()


@lru_cache(maxsize=8)
def _read(overrides: str) -> Hardware:
    values = _parse(overrides)
    bf16 = {"on": True, "off": False, None: None}[values.get("bf16")]
    if bf16 is None:
        bf16 = any(_capabilities().get(name) for name in NATIVE_BF16)
    if "threads" in values:
        torch.set_num_threads(int(values["threads"]))
    return Hardware(bf16, values.get("kernels", "native"))


def _parse(overrides: str) -> dict[str, str]:
    """bf16=on,threads=4 as a dict, each value one that can be taken."""
    values = dict(part.strip().partition("=")[::2] for part in overrides.split(",") if part.strip())
    allowed = {"bf16": ("on", "off"), "kernels": ("off", *kernel_levels()), "threads": None}
    for name, value in values.items():
        if name not in allowed:
            raise QwenError(f"{VARIABLE} names {name}, which is unknown: it takes {', '.join(allowed)}")
        if name == "threads":
            if not (value.isascii() and value.isdigit() and 1 <= int(value) <= 4096):
                raise QwenError(f"{VARIABLE} sets threads={value}: give a number from 1 to 4096")
        elif value not in allowed[name]:
            here = " on this processor" if value in LEVELS else ""
            raise QwenError(f"{VARIABLE} sets {name}={value}, which can't be{here}: choose {', '.join(allowed[name])}")
    return values
