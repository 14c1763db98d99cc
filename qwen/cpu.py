"""Run the decoder on a CPU at the speed of its memory: binds kernels/decoder.cpp and decides when it can stand in.

The source is compiled once, for this very processor, with the system's C++ compiler (some seconds). Without a compiler,
or where a model has been changed in ways the kernels don't know (adapters, hooks, other precisions), PyTorch's own
operations do the work.
"""

import ctypes
import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .cache import is_growing
from .errors import QwenError
from .hardware import hardware, machine_key, num_threads
from .int4 import Int4Linear
from .loss import LMHead
from .paged_attention import PagedStep
from .pages import CPU_PAGE
from .paths import user_cache_dir

SOURCE = Path(__file__).with_name("kernels") / "decoder.cpp"
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC"]
TARGETS = {"generic": None, "v3": "x86-64-v3", "v4": "x86-64-v4", "native": "native"}  # by level of hardware.py: -march
KINDS = {torch.float32: 0, torch.bfloat16: 1}
INT4, NATIVE_BF16 = 2, 3
INT4_ROWS = 16  # rows that lie side by side for the int4 kernel
BLOCK = 32  # columns that share an activation scale in it, and a multiple of all vectors
MAX_HEAD_DIM = 1024


class _Matrix(Structure):
    _fields_ = [("weight", c_void_p), ("scales", c_void_p), ("bias", c_void_p)]
    _fields_ += [(name, c_int32) for name in ("kind", "rows", "cols", "group")]


class _Layer(Structure):
    _fields_ = [("ln_1", c_void_p), ("ln_2", c_void_p)]
    _fields_ += [(name, _Matrix) for name in ("c_attn", "attn_c_proj", "w1", "w2", "mlp_c_proj")]
    _fields_ += [("window", c_int32)]


class _Rotary(Structure):
    _fields_ = [(name, c_void_p) for name in ("query_cos", "query_sin", "key_cos", "key_sin")]


class _Decoder(Structure):
    _fields_ = [("layers", POINTER(_Layer)), ("ln_f", c_void_p)]
    _fields_ += [(name, c_int32) for name in ("num_layers", "hidden", "heads", "head_dim", "mlp_width", "cache_kind")]
    _fields_ += [("eps", c_float), ("scaling", c_float)]


class _Step(Structure):
    _fields_ = [("cache", c_void_p), ("sequences", c_void_p), ("rotary", _Rotary)]
    _fields_ += [(name, c_int32) for name in ("num_sequences", "N", "threads")]


# ---- building ----


def load_kernels() -> ctypes.CDLL | None:
    """The compiled kernels of the hardware's level; None, with one warning that says why, where they can't be had."""
    level = hardware().kernels
    return None if level == "off" else _load(level)


@cache
def _load(level: str) -> ctypes.CDLL | None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if sys.platform == "win32" or compiler is None:
        warnings.warn("no C++ compiler found (g++): CPU replies use PyTorch's operations, 2 to 4 times slower",
                      stacklevel=4)  # fmt: skip
        return None
    if not SOURCE.exists():  # this code came with a checkpoint
        warnings.warn(f"{SOURCE} is not there: CPU replies use PyTorch's operations, 2 to 4 times slower", stacklevel=4)
        return None
    try:
        kernels = ctypes.CDLL(str(_compiled(compiler, level)))
    except (OSError, subprocess.SubprocessError, QwenError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        warnings.warn(f"the CPU kernels don't compile here ({reason.strip().splitlines()[0]}): CPU replies use "
                      "PyTorch's operations, 2 to 4 times slower", stacklevel=4)  # fmt: skip
        return None
    kernels.qwen_decode.argtypes = [POINTER(_Decoder), POINTER(_Step), c_void_p]
    kernels.qwen_linear.argtypes = [POINTER(_Matrix), c_void_p, c_int32, c_void_p, c_int32]
    return kernels


def _compiled(compiler: str, level: str) -> Path:
    """The shared library of the source for this processor, compiled if it is not there yet."""
    target = TARGETS[level]
    flags = FLAGS if target is None else [*FLAGS, f"-march={target}"]
    source = "".join(file.read_text() for file in sorted(SOURCE.parent.iterdir()))
    key = hashlib.sha256(f"{source} {compiler} {flags} {machine_key()}".encode()).hexdigest()[:16]
    library = user_cache_dir() / "kernels" / f"cpu-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            command = [compiler, *flags, str(SOURCE), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            built.replace(library)  # at once: another process may be building it too
    return library


# ---- running ----


class CpuDecoder:
    """Stands in for the layers of a QWenModel, and for `lm_head`, where `fits` says so.

    It reads the model's own weights in place. They are looked at again at every call: a converted, adapted or
    quantised model is noticed.
    """

    def __init__(self, kernels: ctypes.CDLL, model: nn.Module) -> None:
        self.kernels = kernels
        self.config = model.config
        self.layers = model.h
        self.ln_f = model.ln_f
        self.watch: Watch | None = None
        self.described_for: tuple | None = None
        self.known = False
        self.alive: list[Tensor] = []  # what the pointers in the structures point to

    def __getstate__(self) -> dict[str, Any]:
        """For copies of the model: its modules alone. Addresses are found anew."""
        return {"config": self.config, "layers": self.layers, "ln_f": self.ln_f}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, kernels=load_kernels(), watch=None, described_for=None, known=False, alive=[])

    def fits(
        self,
        hidden: Tensor,
        attention_mask: Any,
        cache: Cache | PagedStep | None,
        training: bool,
        kwargs: dict[str, Any],
    ) -> bool:
        """Whether these inputs, and the model as it is now, are what the kernels compute."""
        return (
            not training
            and not torch.is_grad_enabled()
            and hidden.device.type == "cpu"
            and hidden.dtype in KINDS
            and (isinstance(cache, PagedStep) or is_growing(cache))
            and not kwargs.get("output_attentions")
            and not kwargs.get("output_hidden_states")
            and not torch.compiler.is_compiling()
            and _padded_left(attention_mask)
            and self._weights_are_known(hidden.dtype)
        )

    def __call__(
        self,
        hidden: Tensor,
        query_rotary: tuple[Tensor, Tensor],
        key_rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Cache | PagedStep,
    ) -> Tensor:
        """The normed output (B, T, C) of all layers for embeddings (B, T, C), appending to the cache."""
        B, T, _ = hidden.shape
        x = hidden.to(torch.float32, copy=True).contiguous()
        angles = [
            part.reshape(part.shape[0], T, -1).expand(B, T, -1).contiguous() for part in (*query_rotary, *key_rotary)
        ]
        if isinstance(cache, PagedStep):
            places, sequences = self._places_of_pages(cache), _sequences(cache.counts, cache.pasts)
        else:
            first = [0] * B if attention_mask is None else attention_mask.long().argmax(-1).tolist()
            places = self._places_of_rows(cache, first, T, hidden.dtype)
            sequences = _sequences([T] * B, [cache.get_seq_length() - padding for padding in first])
        step = _Step(
            places.data_ptr(), sequences.data_ptr(), _Rotary(*(part.data_ptr() for part in angles)), len(sequences),
            B * T, num_threads(),
        )  # fmt: skip
        self.kernels.qwen_decode(byref(self.decoder), byref(step), x.data_ptr())
        if not isinstance(cache, PagedStep):
            for layer in cache.layers[: self.decoder.num_layers]:
                layer.length += T
        return x.to(hidden.dtype)

    def linear(self, hidden: Tensor, linear: nn.Linear) -> Tensor:
        """`linear(hidden)`; by the kernels if they know its weights, and then in float32."""
        rows = hidden.numel() // hidden.shape[-1]
        known = type(linear) in (nn.Linear, LMHead) and linear.weight.dtype == hidden.dtype and hidden.dtype in KINDS
        known = known and linear.weight.is_contiguous() and hidden.shape[-1] % BLOCK == 0
        if torch.is_grad_enabled() or not known or hidden.device.type != "cpu" or not rows or _hooked(linear):
            return linear(hidden)
        alive: list[Tensor] = []
        matrix = _describe(linear, alive)
        x = hidden.float().contiguous()
        y = torch.empty(*hidden.shape[:-1], matrix.rows)
        self.kernels.qwen_linear(byref(matrix), x.data_ptr(), rows, y.data_ptr(), num_threads())
        return y

    def _places_of_rows(self, cache: Cache, first: Sequence[int], T: int, dtype: torch.dtype) -> Tensor:
        """Where the kernels find keys and values: struct KeyValues of each layer and row, as (layers, B, 5) int64.

        `first` counts each row's padding. Each layer gets room for T more tokens.
        """
        config, places = self.config, []
        D, page = config.kv_channels, CPU_PAGE * config.kv_channels
        for layer in cache.layers:
            if not layer.is_initialized:
                empty = torch.empty(len(first), config.num_attention_heads, 0, D, dtype=dtype)
                layer.lazy_initialization(empty, empty)
            keys, values = layer.reserve(T)
            capacity = keys.shape[2]
            for row, padding in enumerate(first):
                offset = (row * config.num_attention_heads * capacity + padding) * D * dtype.itemsize
                places.append((keys.data_ptr() + offset, values.data_ptr() + offset, 0, page, capacity * D))
        return torch.tensor(places)

    def _places_of_pages(self, step: PagedStep) -> Tensor:
        """The same of a step over pages."""
        tables = step.tables.data_ptr() + step.tables.stride(0) * step.tables.itemsize * torch.arange(len(step.counts))
        head = CPU_PAGE * self.config.kv_channels
        places = torch.empty(len(step.pool.layers), len(step.counts), 5, dtype=torch.int64)
        places[:, :, :2] = step.pool.addresses[:, None]
        places[:, :, 2] = tables
        places[:, :, 3], places[:, :, 4] = self.config.num_attention_heads * head, head
        return places

    def _weights_are_known(self, dtype: torch.dtype) -> bool:
        """Whether all modules are of the kinds that the kernels compute; describes them anew where they changed."""
        num_layers = self.config.num_hidden_layers  # early-exit assistants lower it
        described_for = (num_layers, dtype, self.config.attention_windows, hardware())
        if self.watch is None or self.described_for != described_for or self.watch.sees_change():
            self.watch, self.described_for = Watch([*self.layers, self.ln_f]), described_for
            self.known = not self.watch.hooked and all(_is_known(block, dtype) for block in self.layers)
            if self.known:
                self._describe(num_layers, dtype)
        return self.known

    def _describe(self, num_layers: int, dtype: torch.dtype) -> None:
        config, alive = self.config, []
        described = (_Layer * len(self.layers))()
        for place, block, window in zip(described, self.layers, config.attention_windows, strict=False):
            place.ln_1, place.ln_2 = (_float32(norm.weight, alive) for norm in (block.ln_1, block.ln_2))
            place.c_attn = _describe(block.attn.c_attn, alive)
            place.attn_c_proj = _describe(block.attn.c_proj, alive)
            place.w1, place.w2 = _describe(block.mlp.w1, alive), _describe(block.mlp.w2, alive)
            place.mlp_c_proj = _describe(block.mlp.c_proj, alive)
            place.window = window or 0
        self.decoder = _Decoder(
            described, _float32(self.ln_f.weight, alive), num_layers, config.hidden_size, config.num_attention_heads,
            config.kv_channels, config.intermediate_size // 2, KINDS[dtype], config.layer_norm_epsilon,
            self.layers[0].attn.scaling,
        )  # fmt: skip
        self.alive = alive


def _sequences(counts: Sequence[int], pasts: Sequence[int]) -> Tensor:
    """struct Sequence of each: where its new tokens start, how many they are, and what was before."""
    starts = [0, *itertools.accumulate(counts)][:-1]
    return torch.tensor(list(zip(starts, counts, pasts, strict=True)), dtype=torch.int32)


def _padded_left(attention_mask: Any) -> bool:
    if attention_mask is None:
        return True
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return False
    return bool((attention_mask[:, 1:] >= attention_mask[:, :-1]).all())


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


class Watch:
    """Notices, in a tenth of a millisecond, what may have changed in modules: tensors, submodules, hooks, methods."""

    def __init__(self, roots: list[nn.Module]) -> None:
        modules = [module for root in roots for module in root.modules()]
        self.attributes = [vars(module) for module in modules]
        self.hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.children = [(module._modules, dict(module._modules)) for module in modules if module._modules]
        self.tensors = [
            (owner, name, tensor, tensor.data_ptr())
            for module in modules
            for owner in (module._parameters, module._buffers)
            for name, tensor in owner.items()
            if tensor is not None
        ]
        self.hooked = self._is_hooked()

    def _is_hooked(self) -> bool:
        """Whether anything but the class's own forward runs in a module."""
        return any(self.hooks) or any("forward" in attributes for attributes in self.attributes)

    def sees_change(self) -> bool:
        """Whether anything is not as it was."""
        return (
            self._is_hooked() != self.hooked
            or any(now != then for now, then in self.children)
            or any(owner.get(name) is not x or x.data_ptr() != place for owner, name, x, place in self.tensors)
        )


def _is_known(block: nn.Module, dtype: torch.dtype) -> bool:
    linears = [block.attn.c_attn, block.attn.c_proj, block.mlp.w1, block.mlp.w2, block.mlp.c_proj]
    if len({type(linear) for linear in linears}) > 1:
        return False
    if block.attn.head_dim % 16 or block.attn.head_dim > MAX_HEAD_DIM:  # whole vectors only
        return False
    if any(linear.in_features % BLOCK or linear.out_features % INT4_ROWS for linear in linears):
        return False
    if type(linears[0]) is nn.Linear:
        return all(linear.weight.dtype == dtype and linear.weight.is_contiguous() for linear in linears)
    return all(type(linear) is Int4Linear and linear.bits == 4 and linear.group_size % BLOCK == 0 for linear in linears)


def _float32(tensor: Tensor, alive: list[Tensor]) -> int:
    """The address of a float32 copy, kept alive by the list."""
    alive.append(tensor.detach().float().contiguous())
    return alive[-1].data_ptr()


def _describe(linear: nn.Module, alive: list[Tensor]) -> _Matrix:
    bias = None if linear.bias is None else _float32(linear.bias, alive)
    if isinstance(linear, Int4Linear):
        words, scales = _side_by_side(linear.qweight), _side_by_side(linear.scales.float())
        alive += [words, scales]
        return _Matrix(words.data_ptr(), scales.data_ptr(), bias, INT4, linear.out_features, linear.in_features,
                       linear.group_size)  # fmt: skip
    weight = linear.weight.detach()
    alive.append(weight)
    kind = NATIVE_BF16 if weight.dtype == torch.bfloat16 and hardware().bf16 else KINDS[weight.dtype]
    return _Matrix(weight.data_ptr(), None, bias, kind, linear.out_features, linear.in_features, 0)


def _side_by_side(columns: Tensor) -> Tensor:
    """(n, rows) to (rows / 16, n, 16): what 16 rows of a product read lies together."""
    n, rows = columns.shape
    return columns.view(n, rows // INT4_ROWS, INT4_ROWS).transpose(0, 1).contiguous()
