"""A GPU that is not there: "cuda" or "mps" on a build of PyTorch for CPUs, with real numbers.

    @pytest.fixture(scope="module")
    def on_cuda() -> Iterator[Callable]:
        with pretended_gpu.process("cuda") as call:
            yield call

    def test_it(on_cuda: Callable) -> None:
        assert on_cuda(function_of_this_file, argument) == ...  # runs in a process that has the GPU

A tensor on the GPU is a `GpuTensor`, which holds one of the CPU; each operation on it is checked, noted, and done on
what is held. Shown are: tensors of two devices in one operation, float64 on Apple's, every moment in which the host
waits (with its line), waits while a graph is recorded, graphs that replay on their own memory, memory by device. Not
shown: speed, rounding, streams, what kernels refuse, backward passes, torch.compile.
"""

import ctypes
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo  # lists torch's functions when it is imported: before any is replaced
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

HERE = Path(__file__).parent
READS_BACK = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "bincount",
              "unique_consecutive", "is_nonzero"}  # fmt: skip
INDEXES = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}
NO_FLOAT64 = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."

gpu: "PretendedGpu | None" = None  # of this process


class Wait(NamedTuple):
    """The host waits for the GPU."""

    why: str
    line: str  # the innermost outside of torch


class GpuTensor(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device | None = None, requires_grad: bool = False) -> Tensor:
        if device is None:  # accelerate makes parameters anew by their class
            return torch.nn.Parameter(held, requires_grad)
        if device.type == "mps" and held.dtype == torch.float64:
            raise TypeError(NO_FLOAT64)
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device(device.type, device.index or 0),
        )  # fmt: skip
        self.held = held.detach()
        gpu.memory.hold(self)
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return gpu.run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"GpuTensor({self.held}, device={self.device})"

    def __deepcopy__(self, memo: dict) -> Tensor:
        copied = GpuTensor(self.held.clone(), self.device)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def tolist(self) -> Any:
        gpu.wait("tolist")
        return self.held.tolist()

    # With these two, Module.to puts new tensors in the place of the old ones, where it would else set their data.

    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        return ["held"], self.device

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], device: torch.device, *_: Any) -> "GpuTensor":
        return GpuTensor(parts["held"], device)


class Share:
    """Lives as long as a tensor that holds a storage."""


class Memory:
    """Bytes in use by device: each storage counts while any tensor holds it."""

    def __init__(self) -> None:
        self.users: Counter = Counter()
        self.used: Counter = Counter()
        self.peak: Counter = Counter()
        self.lock = threading.RLock()  # a tensor may be freed within these lines

    def hold(self, tensor: GpuTensor) -> None:
        storage = tensor.held.untyped_storage()
        key, size = (tensor.device.index, storage._cdata), storage.nbytes()
        with self.lock:
            self.users[key] += 1
            if self.users[key] == 1:
                self.used[key[0]] += size
                self.peak[key[0]] = max(self.peak[key[0]], self.used[key[0]])
        tensor.share = Share()  # and not the tensor itself: Module.to swaps no tensor that has a weak reference
        weakref.finalize(tensor.share, self.release, key, size)

    def release(self, key: tuple[int, int], size: int) -> None:
        with self.lock:
            self.users[key] -= 1
            if not self.users[key]:
                self.used[key[0]] -= size
                del self.users[key]


class PretendedGpu:
    """What the tests ask: `waits`, `kernels` (how many ran), `memory`."""

    def __init__(self, kind: str, count: int, capability: tuple[int, int], room: int) -> None:
        self.kind, self.count, self.capability, self.room = kind, count, capability, room
        self.waits: list[Wait] = []
        self.kernels = 0
        self.memory = Memory()
        self.recording: Graph | None = None

    def device(self, device: Any) -> torch.device | None:
        """The GPU that is meant, with its number; None for the CPU."""
        device = torch.device(device)
        return torch.device(self.kind, device.index or 0) if device.type == self.kind else None

    def wait(self, why: str) -> None:
        if self.recording is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {why}")
        frame = sys._getframe(1)
        while frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        self.waits.append(Wait(why, f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"))

    def run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One operation of PyTorch with tensors of the GPU."""
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            return func.decompose(*args, **kwargs)  # in inference mode these come whole
        name = func._schema.name.split("::")[1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        home = next(tensor.device for tensor in tensors if isinstance(tensor, GpuTensor))
        if kwargs.get("device") is not None:
            home = self.device(kwargs["device"])
            kwargs = {**kwargs, "device": torch.device("cpu")}
        self._check(name, args, kwargs, tensors, home)
        kwargs.pop("pin_memory", None)
        written = [tensor for tensor, changes in _arguments(func, args, kwargs) if changes]
        result = self._do(OPERATIONS.get(func.name(), func), args, kwargs, written)
        if any(returned.alias_info is not None and returned.alias_info.is_write for returned in func._schema.returns):
            grown = [x if x.shape == x.held.shape else GpuTensor(x.held, x.device) for x in written]  # from empty
            return grown[0] if len(func._schema.returns) == 1 else tuple(grown)  # in place, or out=
        inference = torch.is_inference_mode_enabled() and any(tensor.is_inference() for tensor in tensors)
        with torch.inference_mode(inference or (torch.is_inference_mode_enabled() and not func.is_view)):
            return tree_map(lambda x: x if home is None or not isinstance(x, Tensor) else GpuTensor(x, home), result)

    def run_whole(self, function: Callable, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A function of several operations that a GPU has one kernel for."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        home = next((tensor.device for tensor in tensors if isinstance(tensor, GpuTensor)), None)
        if home is None:
            return function(*args, **kwargs)
        self._check(name, args, kwargs, tensors, home)
        return GpuTensor(self._do(function, args, kwargs, []), home)

    def _do(self, function: Callable, args: tuple, kwargs: dict[str, Any], written: list[Tensor]) -> Any:
        args, kwargs = tree_map(_held, (args, kwargs))
        if self.recording is not None:
            self.recording.keep(written)
        result = function(*args, **kwargs)
        self.kernels += not getattr(function, "is_view", False)
        if self.recording is not None:
            self.recording.operations.append((function, args, kwargs, result))
        return result

    def _check(self, name: str, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor], home: Any) -> None:
        """What a GPU refuses, and where it makes the host wait."""
        if name in ("copy_", "_to_copy"):
            blocking = not (kwargs.get("non_blocking") or (args[2] if name == "copy_" and len(args) > 2 else False))
            source, target = (args[1].device, args[0].device) if name == "copy_" else (args[0].device, home)
            if source.type == self.kind and (target is None or target.type == "cpu") and blocking:
                self.wait("copy to the host")
            elif source.type == "cpu" and blocking:
                self.wait("copy from the host")
            return
        if name in INDEXES:
            self._check_indices(name, args)
            tensors = [args[0], *args[2:3]]
        devices = {tensor.device for tensor in tensors if isinstance(tensor, GpuTensor) or tensor.ndim}
        if len(devices) > 1:
            names = " and ".join(sorted(map(str, devices)))
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two: {names} ({name})"
            )
        if name in READS_BACK or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.wait(name)

    def _check_indices(self, name: str, args: tuple) -> None:
        indices = [index for index in args[1] if index is not None]
        if not isinstance(args[0], GpuTensor):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        fills = name.startswith("index_put") and args[2].numel() == 1
        if any(not isinstance(index, GpuTensor) for index in indices):
            self.wait("index from the host")
        elif any(index.dtype == torch.bool for index in indices) and not fills:
            self.wait("boolean index")


def _held(x: Any) -> Any:
    return x.held if isinstance(x, GpuTensor) else x


def _arguments(func: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
    """The tensors among the arguments, and whether the operation changes them."""
    for place, argument in enumerate(func._schema.arguments):
        value = kwargs.get(argument.name) if argument.name in kwargs else args[place] if place < len(args) else None
        if isinstance(value, Tensor):
            yield value, argument.alias_info is not None and argument.alias_info.is_write


# ---- what only GPUs compute ----


def _pack_int4(octets: Tensor, inner_tiles: int) -> Tensor:
    """A layout with the tiles of NVIDIA's, in an order of our own: whoever uses it has to find it out."""
    numbers = torch.stack([octets >> 4, octets & 15], dim=-1).flatten(1)  # (n, k)
    (n, k), width = numbers.shape, 16 * inner_tiles
    if n % 8 or k % width:
        raise RuntimeError(f"no int4 tiles of 8 x {width} in {n} x {k}")
    tiles = numbers.view(n // 8, 8, k // width, width).transpose(1, 2).flatten(2)[..., _tile_order(8 * width)]
    low, high = tiles.chunk(2, dim=-1)
    return (low | high << 4).contiguous().view(torch.int32).view(n // 8, k // width, 32, inner_tiles // 2)


def _tile_order(size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(size))


def _multiply_int4(x: Tensor, packed: Tensor, group: int, scales: Tensor) -> Tensor:
    if gpu.capability < (8, 0) or x.dtype != torch.bfloat16 or not x.is_contiguous():
        raise RuntimeError("_weight_int4pack_mm: needs compute capability 8.0 and contiguous bf16")
    width = 32 * packed.shape[3]
    octets = packed.contiguous().view(torch.uint8).view(*packed.shape[:2], -1)
    tiles = torch.cat([octets & 15, octets >> 4], dim=-1)[..., _tile_order(8 * width).argsort()]
    numbers = tiles.unflatten(-1, (8, width)).transpose(1, 2).flatten(2).flatten(0, 1).float()  # (n, k)
    scale, zero = scales.float().repeat_interleave(group, 0).permute(2, 1, 0)  # each (n, k)
    return (x.float() @ ((numbers - 8) * scale + zero).T).bfloat16()


def _attend_to_pages(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, used: Tensor, table: Tensor,
                     scale: float | None, window: list[int]) -> Tensor:  # fmt: skip
    """Row by row what `varlen_attn` computes with a block table: query (T, H, D), key and value (pages, size, H, D)."""
    out = torch.zeros_like(query)
    bounds, lengths = starts.tolist(), used.tolist()
    for row, (first, last, length) in enumerate(zip(bounds, bounds[1:], lengths, strict=False)):
        keys, values = (pool[table[row].long()].flatten(0, 1)[:length].transpose(0, 1) for pool in (key, value))
        position = torch.arange(length - (last - first), length)[:, None]
        seen = torch.arange(length)[None]
        shown = torch.ones(last - first, length, dtype=torch.bool)
        if window[1] >= 0:
            shown &= seen <= position + window[1]
        if window[0] >= 0:
            shown &= seen >= position - window[0]
        part = torch.nn.functional.scaled_dot_product_attention(
            query[first:last].transpose(0, 1), keys, values, shown, scale=scale
        )
        out[first:last] = part.transpose(0, 1)
    return out


def _attend_out(out: Tensor, query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Any, max_q: int,
                max_k: int, is_causal: bool = False, scale: float | None = None, window_size: Any = None, *,
                seqused_k: Tensor | None = None, block_table: Tensor | None = None, **kwargs: Any) -> Any:  # fmt: skip
    window = list(window_size or (-1, -1))
    return out.copy_(_attend_to_pages(query, key, value, cu_seq_q, seqused_k, block_table, scale, window))


def _product_in(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    return left.to(dtype) @ right.to(dtype)


OPERATIONS = {
    "aten::_convert_weight_to_int4pack": _pack_int4,
    "aten::_weight_int4pack_mm": _multiply_int4,
    "aten::mm.dtype": _product_in,
    "torch_attn::_varlen_attn_out": _attend_out,
}


# ---- graphs, streams, events ----


class Graph:
    """A CUDA graph. While it is recorded nothing is computed: what was there is put back, what is new is NaN."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.operations: list[tuple] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def keep(self, written: list[Tensor]) -> None:
        self.before += [(x.held, x.held.clone()) for x in written if isinstance(x, GpuTensor)]

    def capture_begin(self, *_: Any, **__: Any) -> None:
        self.operations, self.before, gpu.recording = [], [], self

    def capture_end(self) -> None:
        gpu.recording = None
        for tensor, value in reversed(self.before):
            if tensor.shape == value.shape:
                tensor.copy_(value)
        for _, args, kwargs, result in self.operations:
            for tensor in _own(result, args, kwargs):
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)

    def replay(self) -> None:
        for function, args, kwargs, result in self.operations:
            again = function(*args, **kwargs)
            for old, new in zip(_own(result, args, kwargs), _own(again, args, kwargs), strict=True):
                old.copy_(new)
        gpu.kernels += 1

    def pool(self) -> tuple[int, int]:
        return 0, 0

    def reset(self) -> None:
        self.operations = []


def _own(result: Any, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors of a result that share no memory with the arguments."""
    given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    return [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given]


@contextmanager
def record(graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
    """torch.cuda.graph"""
    graph.capture_begin()
    try:
        yield
    finally:
        gpu.recording = None
    graph.capture_end()


class Queue:
    """A stream or an event: all work is done at once, so that only waits are worth noting."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device(gpu.kind, 0)

    def __enter__(self) -> "Queue":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def pass_by(self, *_: Any, **__: Any) -> "Queue":
        return self

    record = wait = wait_event = wait_stream = record_event = pass_by

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        gpu.wait("synchronize")

    def elapsed_time(self, other: "Queue") -> float:
        return 1.0


# ---- what PyTorch says about the GPU ----


def install(kind: str = "cuda", count: int = 1, capability: tuple[int, int] = (9, 0), room: int = 80 * 2**30) -> None:
    """This process has GPUs from now on."""
    global gpu
    gpu = PretendedGpu(kind, count, capability, room)
    ctypes.CDLL(str(_compiled())).have_gpus(kind == "mps", count)
    library = gpu.library = torch.library.Library("aten", "IMPL")

    def empty(size: Any, *, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> Tensor:
        return GpuTensor(torch.empty(size, **kwargs), gpu.device(device))

    def empty_strided(size: Any, stride: Any, *, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> Tensor:
        return GpuTensor(torch.empty_strided(size, stride, **kwargs), gpu.device(device))

    key = "CUDA" if kind == "cuda" else "MPS"
    library.impl("empty.memory_format", empty, key)
    library.impl("empty_strided", empty_strided, key)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) is made on the CPU and copied

    def begin_thread(*_: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(True)
        sys.setprofile(None)

    threading.setprofile(begin_thread)
    _answer_for(kind)


def _answer_for(kind: str) -> None:
    patch, backend = pytest.MonkeyPatch(), torch.cuda if kind == "cuda" else torch.mps

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        return gpu.run_whole(attention, "scaled_dot_product_attention", args, kwargs)

    attention = torch.nn.functional.scaled_dot_product_attention
    patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)

    def say(owner: Any, **answers: Any) -> None:
        for name, answer in answers.items():
            function = answer if callable(answer) else lambda *_, _answer=answer, **__: _answer
            patch.setattr(owner, name, function, raising=False)

    common = {"is_available": True, "device_count": gpu.count, "empty_cache": None,
              "synchronize": lambda *_: gpu.wait("synchronize")}  # fmt: skip
    say(torch.accelerator, **common, current_accelerator=lambda *_, **__: torch.device(kind), current_device_index=0)
    say(backend, **common, Event=Queue, _lazy_init=None)
    if kind == "mps":
        say(torch.backends.mps, is_available=True, is_built=True)
        say(backend, recommended_max_memory=gpu.room, driver_allocated_memory=lambda: gpu.memory.used[0],
            current_allocated_memory=lambda: gpu.memory.used[0])  # fmt: skip
        return

    def number(device: Any = None) -> int:
        return device if isinstance(device, int) else torch.device(device or "cuda").index or 0

    def forget_peak(device: Any = None) -> None:
        gpu.memory.peak[number(device)] = gpu.memory.used[number(device)]

    used, peak = (lambda device=None, of=of: of[number(device)] for of in (gpu.memory.used, gpu.memory.peak))
    properties = types.SimpleNamespace(name="Pretended GPU", major=gpu.capability[0], minor=gpu.capability[1],
                                       total_memory=gpu.room, multi_processor_count=132, warp_size=32)  # fmt: skip
    say(backend, Stream=Queue, CUDAGraph=Graph, graph=record, current_device=0, memory_allocated=used,
        memory_reserved=used, max_memory_allocated=peak, max_memory_reserved=peak, reset_peak_memory_stats=forget_peak,
        mem_get_info=lambda device=None: (gpu.room - used(device), gpu.room), get_device_name="Pretended GPU",
        get_device_properties=properties, get_device_capability=gpu.capability, graph_pool_handle=(0, 0),
        is_bf16_supported=gpu.capability >= (8, 0), current_stream=lambda *_: Queue(), ipc_collect=None,
        default_stream=lambda *_: Queue(), stream=lambda stream: stream or Queue(), set_device=None,
        manual_seed_all=None, _exchange_device=0, _maybe_exchange_device=0, is_initialized=True,
        is_current_stream_capturing=lambda: gpu.recording is not None)  # fmt: skip


def _compiled() -> Path:
    source, torch_home = HERE / "pretended_gpu.cpp", Path(torch.__file__).parent
    library = Path(tempfile.gettempdir()) / f"qwen-pretended-gpu-{torch.__version__}-{os.getuid()}-{hash_of(source)}.so"
    if not library.exists():
        built = library.with_suffix(f".{os.getpid()}")
        command = [compiler(), "-std=c++20", "-shared", "-fPIC", f"-I{torch_home / 'include'}", str(source),
                   f"-L{torch_home / 'lib'}", "-lc10", "-ltorch_cpu", "-o", str(built)]  # fmt: skip
        subprocess.run(command, check=True)
        built.replace(library)
    return library


def hash_of(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@contextmanager
def process(kind: str, **settings: Any) -> Iterator[Callable]:
    """A process with such GPUs, and what calls a function there: `call(function, *args)`. Skips without a compiler."""
    if compiler() is None or sys.platform != "linux" or torch.cuda.is_available():
        pytest.skip("a pretended GPU needs Linux, a C++ compiler, and a build of PyTorch that finds no GPU")
    context = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # before Triton is imported there
        pool = ProcessPoolExecutor(1, context, initializer=_begin, initargs=(kind, settings))
        pool.submit(int).result()
    with pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def _begin(kind: str, settings: dict[str, Any]) -> None:
    install(kind, **settings)
