"""GPTQ checkpoints (Int4, and Int8 with the same layout) on nothing but PyTorch.

The tensors of an official Int4 directory, for a layer with `in` inputs and `out` outputs in groups of G inputs:

    qweight (in * bits / 32, out) int32   eight 4-bit numbers to a word, the first input lowest
    qzeros  (in / G, out * bits / 32) int32   all alike in a symmetric checkpoint: the middle, often less one
    scales  (in / G, out) float16   weight = scale * (number - middle)
    g_idx   (in,) int32   the group of each input; i // G unless inputs were reordered ("act order")
    bias    (out,)

On NVIDIA GPUs with Triton, kernels of our own read these very tensors, for any number of rows (int4_triton.py).
Elsewhere PyTorch's int4 kernels compute the same from a layout of their own. It replaces `qweight` in memory when a
layer is first used for few rows, so that nothing is held twice; `state_dict` gives the official tensors all the same.
"""

import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .configuration_qwen import GROUP_SIZES, TORCH_GPTQ, torch_reads
from .errors import QwenError

# From so many rows on, one dense product with the dequantised weight is faster than PyTorch's kernel. That of a GPU
# reads all weights once for every 16 rows, the dense product some ten times as many octets for any number of rows.
FEW_ROWS = {"cpu": 16, "cuda": 129}


class Int4Linear(nn.Module):
    """A linear layer on GPTQ tensors of 4 or 8 bits; buffer names are those of the checkpoint.

    `qweight` can always be read, but is made anew at each reading once the layer has taken its kernel's layout.
    """

    def __init__(
        self, in_features: int, out_features: int, bits: int = 4, group_size: int = 128, bias: bool = True
    ) -> None:
        super().__init__()
        numbers = 32 // bits  # in a word
        if in_features % group_size or in_features % numbers or out_features % numbers:
            raise QwenError(
                f"a layer of {in_features} inputs and {out_features} outputs can't be cut into groups of {group_size} "
                f"inputs and words of {numbers} numbers: quantise with another group size ({GROUP_SIZES})"
            )
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, group_size
        groups = in_features // group_size
        self.register_buffer("qweight", torch.zeros(in_features // numbers, out_features, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(groups, out_features // numbers, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16))
        self.register_buffer("g_idx", torch.zeros(in_features, dtype=torch.int32))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        # No buffers, for accelerate would offload them, and they come and go.
        self.in_triton = False
        self.packed: Tensor | None = None  # the numbers as the kernel reads them
        self.layout: KernelLayout | None = None  # of these
        self.packed_scales: Tensor | None = None  # (groups, out, 2): scales and offsets
        self.register_state_dict_post_hook(_add_qweight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the type of `x`."""
        rows = x.numel() // self.in_features
        differentiable = torch.is_grad_enabled() and x.requires_grad  # the kernel has no backward
        if differentiable:
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
            return _DequantisedProduct.apply(x, self)
        few = rows < FEW_ROWS.get(x.device.type, 0)
        if not torch.compiler.is_compiling():  # what is traced takes what was chosen when the model was loaded or ran
            self.get_ready(pack=few)
        if self.in_triton:
            y = torch.ops.qwen.gptq_product(x.reshape(-1, self.in_features), self.qweight, self.scales, self.bias,
                                            self.bits, self.group_size)  # fmt: skip
            return y.view(*x.shape[:-1], self.out_features)
        if self.packed is None or not few:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return nn.functional.linear(x, self.dequantize(x.dtype), bias)
        # bf16 within: the kernels are fast in no other type.
        y = multiply(x.reshape(-1, self.in_features).bfloat16(), self.packed, self.group_size, self.packed_scales)
        y = y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def get_ready(self, pack: bool = True) -> bool:
        """Choose a kernel and take its layout; whether there is one. Before `torch.compile`, which can't trace this."""
        self.in_triton = self.packed is None and triton_works(self.scales.device, self.bits, self.group_size)
        if self.in_triton:
            return True
        layout = self.choose_kernel()
        if layout is not None and self.packed is None and pack:
            self._pack(layout)
        return layout is not None

    def choose_kernel(self) -> "KernelLayout | None":
        """PyTorch's int4 kernel where it works for this layer and device; None means dequantise at each call."""
        device = self.scales.device
        offloaded = getattr(getattr(self, "_hf_hook", None), "offload", False)  # its tensors come anew at each call
        if self.bits != 4 or offloaded or device.type not in ("cpu", "cuda"):
            return None
        inner = next((tiles for tiles in (8, 4, 2) if self.in_features % (16 * tiles) == 0), None)
        layout = kernel_layout(str(device), inner) if inner else None
        fits = layout is not None and self.out_features % layout.rows == 0 and self.in_features % layout.columns == 0
        return layout if fits else None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight (out, in)."""
        if self.packed is None and triton_works(self.scales.device, self.bits, self.group_size):
            return torch.ops.qwen.gptq_dense(self.qweight, self.scales, self.bits, self.group_size, dtype).T
        if self.packed is not None:
            numbers = self.layout.unpack(self.packed, self.out_features, self.in_features)
        else:
            numbers = unpack_words(self.qweight, self.bits)
        # Below zero uint8 wraps around to the same octets as int8.
        numbers = numbers.sub_(2 ** (self.bits - 1)).view(torch.int8).view(-1, self.group_size, self.out_features)
        weight = numbers.to(dtype).mul_(self.scales[:, None].to(dtype))  # (groups, G, out)
        return weight.view(self.in_features, self.out_features).T

    def check(self, name: str) -> None:
        """QwenError if the tensors aren't symmetric, or are in act order, whatever config.json says."""
        if self.qzeros.is_meta:  # offloaded to disk
            return
        middle = 2 ** (self.bits - 1)
        zeros = unpack_words(self.qzeros.T.contiguous(), self.bits)
        if not ((zeros == middle - 1).all() or (zeros == middle).all()):  # older files store one less
            raise QwenError(f"{name}.qzeros is not symmetric, though config.json says sym: quantise the model again")
        if not torch.equal(self.g_idx, group_index(self.in_features, self.group_size).to(self.g_idx.device)):
            raise QwenError(f"{name}.g_idx is in act order, though config.json says desc_act false: quantise it again")

    # ---- the kernel's layout in place of qweight ----

    def _pack(self, layout: "KernelLayout") -> None:
        scales = self.scales.bfloat16()
        self.layout = layout
        self.packed_scales = torch.stack([scales, torch.zeros_like(scales)], dim=-1)
        # Piece by piece: the conversion wants eight times the room of what it makes.
        pieces = self.qweight.split(512, dim=1)
        self.packed = torch.cat([layout.pack(unpack_words(piece, self.bits).T.contiguous()) for piece in pieces])
        self._buffers.pop("qweight", None)  # last, and where another thread was first already gone

    def _unpack(self) -> None:
        if self.packed is not None:
            self._buffers["qweight"] = self.qweight
            self.packed = self.packed_scales = None

    def __getattr__(self, name: str) -> Any:
        if name == "qweight" and "qweight" not in self._buffers and self.packed is not None:
            return pack_words(self.layout.unpack(self.packed, self.out_features, self.in_features), self.bits)
        return super().__getattr__(name)

    def _apply(self, fn: Any, recurse: bool = True) -> "Int4Linear":
        """To another device in the official layout, for each has its own; the scales stay float16, as they are."""
        self._unpack()
        scales = self._buffers.pop("scales")
        super()._apply(fn, recurse)
        self.register_buffer("scales", fn(scales.view(torch.int16)).view(torch.float16))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"


class _DequantisedProduct(torch.autograd.Function):
    """The product for training what lies below: the dense weight is made again for the backward pass, not kept."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, layer: Int4Linear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return nn.functional.linear(x, layer.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantize(grad.dtype), None


def _add_qweight(module: Int4Linear, state: dict[str, Any], prefix: str, local_metadata: dict) -> None:
    if module.packed is not None:
        state[f"{prefix}qweight"] = module.qweight


def group_index(in_features: int, group_size: int) -> Tensor:
    """g_idx without act order: the group of each input, (in,)."""
    return torch.arange(in_features, dtype=torch.int32) // group_size


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """(R, n) int32 to the numbers (R * 32 / bits, n) uint8 that are in them, the lowest bits first."""
    numbers = torch.empty(words.shape[0], 32 // bits, words.shape[1], dtype=torch.uint8, device=words.device)
    for i in range(32 // bits):
        numbers[:, i] = words >> bits * i & 2**bits - 1
    return numbers.flatten(0, 1)


def pack_words(numbers: Tensor, bits: int) -> Tensor:
    """The reverse of `unpack_words`."""
    shifts = torch.arange(0, 32, bits, device=numbers.device)[:, None]
    words = (numbers.view(-1, 32 // bits, numbers.shape[1]).long() << shifts).sum(1)
    return torch.where(words < 2**31, words, words - 2**32).int()


def triton_works(device: torch.device, bits: int, group_size: int) -> bool:
    """Whether the kernels of int4_triton.py run on a device; tried once for each kind of layer."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    from .int4_triton import works_on

    return works_on(str(device), bits, group_size)


# ---- PyTorch's int4 kernels ----


class KernelLayout(NamedTuple):
    """How a device's int4 kernel stores numbers (out, in): tile after tile, `order` says how within a tile."""

    rows: int  # of a tile
    columns: int
    order: Tensor | None  # (rows * columns,): where each number of a tile is, see `halves`; None: as in the tile
    inner_tiles: int

    def pack(self, numbers: Tensor) -> Tensor:
        """(out, in) uint8 in the kernel's layout."""
        return convert(numbers, self.inner_tiles)

    def unpack(self, packed: Tensor, out_features: int, in_features: int) -> Tensor:
        """The numbers (in, out) uint8 again."""
        numbers = halves(packed, self.rows * self.columns // 2)
        if self.order is not None:
            numbers = numbers[:, self.order]
        tiles = numbers.view(out_features // self.rows, in_features // self.columns, self.rows, self.columns)
        return tiles.permute(1, 3, 0, 2).reshape(in_features, out_features)


def multiply(x: Tensor, packed: Tensor, group_size: int, scales: Tensor) -> Tensor:
    """x (rows, in) bf16 times a packed weight: (rows, out) bf16."""
    if x.device.type == "cuda":
        return torch.ops.aten._weight_int4pack_mm(x, packed, group_size, scales)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scales)


def halves(packed: Tensor, octets: int) -> Tensor:
    """The numbers (tiles, 2 * octets) uint8 in tiles of so many octets: all low halves, then all high ones."""
    tiles = packed.view(torch.uint8).view(-1, octets)
    return torch.cat([tiles & 15, tiles >> 4], dim=1)


def convert(numbers: Tensor, inner_tiles: int) -> Tensor:
    """The device's own conversion of numbers (out, in) uint8."""
    if numbers.device.type == "cuda":
        return torch.ops.aten._convert_weight_to_int4pack(numbers[:, 0::2] << 4 | numbers[:, 1::2], inner_tiles)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.int(), inner_tiles)


@cache
def kernel_layout(device: str, inner_tiles: int) -> KernelLayout | None:
    """The layout of a device's int4 kernel, found by converting known numbers; None if there is no kernel that works.

    It differs between processors and is documented nowhere, so nothing is assumed that isn't tried here.
    """
    shapes = [(8, 16 * inner_tiles)] if device.startswith("cuda") else [(64, 1), (32, 1), (16, 1)]
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 16, (128, 256), dtype=torch.uint8, generator=generator).to(device)
    try:
        for rows, columns in shapes:
            layout = KernelLayout(rows, columns, _order_in_tile(rows, columns, device, inner_tiles), inner_tiles)
            if torch.equal(layout.unpack(layout.pack(numbers), 128, 256), numbers.T):
                return layout if _multiplies_right(layout, numbers) else None
    except (AttributeError, NotImplementedError, RuntimeError, IndexError):
        pass  # an older PyTorch, or a GPU without bf16
    return None


def _order_in_tile(rows: int, columns: int, device: str, inner_tiles: int) -> Tensor | None:
    """Convert numbers that spell their own place, one hexadecimal digit at a time, and see where they went."""
    place = torch.arange(rows * columns, device=device).view(rows, columns)
    found = torch.zeros(rows * columns, dtype=torch.long, device=device)
    for digit in range(3):  # tiles have up to 1,024 numbers
        spelled = (place >> 4 * digit & 15).to(torch.uint8)
        packed = convert(spelled.repeat(128 // rows, 256 // columns), inner_tiles)
        found += halves(packed, rows * columns // 2)[0].long() << 4 * digit
    return None if torch.equal(found, place.flatten()) else found.argsort()


def _multiplies_right(layout: KernelLayout, numbers: Tensor) -> bool:
    scales = torch.full((2, 128, 2), 0.25, dtype=torch.bfloat16, device=numbers.device)
    scales[..., 1] = 0
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).to(numbers.device).bfloat16()
    expected = x.float() @ (numbers.float() - 8).T * 0.25
    error = multiply(x, layout.pack(numbers), 128, scales).float() - expected
    return bool(error.abs().max() < 0.02 * expected.abs().max())


# ---- loading through transformers ----


def check_quantization(directory: Path, quantization: dict[str, Any]) -> None:
    """QwenError if neither PyTorch nor an installed package can load a checkpoint with this `quantization_config`."""
    if torch_reads(quantization):
        return
    method, bits = quantization.get("quant_method", "unknown"), quantization.get("bits", "?")
    group, act_order = quantization.get("group_size", "?"), ", act order" if quantization.get("desc_act") else ""
    if method == "gptq":
        missing = [name for name in ("gptqmodel", "optimum") if find_spec(name) is None]
        if not missing:
            return
        raise QwenError(
            f"{directory} is GPTQ with {bits} bits, groups of {group}{act_order}: PyTorch alone runs 4 or 8 bits, "
            f"symmetric, groups of {GROUP_SIZES}, no act order; for this one, pip install {' '.join(missing)}"
        )
    if method == "bitsandbytes":
        if find_spec("bitsandbytes") is None:
            raise QwenError(f"{directory} is quantised by bitsandbytes: pip install bitsandbytes to load it")
        return
    raise QwenError(
        f"{directory} is quantised by {method} ({bits} bits), which nothing here loads: "
        "use a GPTQ checkpoint such as Qwen/Qwen-7B-Chat-Int4, or the unquantised one"
    )


def replace_linears(model: nn.Module, quantization: dict[str, Any], biases: set[str] | None = None) -> None:
    """Put empty Int4Linears in place of the Linears of all blocks.

    `biases` are the names of the stored ones, without which every layer gets one, as in official checkpoints.
    """
    for name, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or name == "lm_head":
            continue
        bias = biases is None or f"{name}.bias" in biases or linear.bias is not None
        try:
            with linear.weight.device:
                new = Int4Linear(linear.in_features, linear.out_features, quantization["bits"],
                                 quantization["group_size"], bias)  # fmt: skip
        except QwenError as error:
            raise QwenError(f"{name}: {error}") from None
        model.set_submodule(name, new)


def check_layers(model: nn.Module) -> None:
    """QwenError if a loaded layer's tensors contradict config.json."""
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            module.check(name)


def describe_kernel(model: nn.Module) -> str:
    """For people: how a model is quantised and what computes it; empty where it is not quantised."""
    layers = [module for module in model.modules() if isinstance(module, Int4Linear)]
    if not layers:
        return ""
    if not all([layer.get_ready(pack=False) for layer in layers]):
        kernel = "dequantised at each step"
    else:
        kernel = "Triton kernel" if all(layer.in_triton for layer in layers) else "torch kernel"
    return f"Int{layers[0].bits} ({kernel})"


class TorchGPTQConfig(QuantizationConfigMixin):
    """A `quantization_config` as it stands in config.json."""

    def __init__(self, **settings: Any) -> None:
        vars(self).update(settings)
        self.quant_method = TORCH_GPTQ

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "quant_method": "gptq"}


class TorchGPTQ(HfQuantizer):
    """Tells transformers' `from_pretrained` how to load a GPTQ checkpoint without any GPTQ package."""

    is_compileable = True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        files = [file for file in checkpoint_files or [] if str(file).endswith(".safetensors")]
        names: set[str] = set()
        for file in files:
            with safe_open(file, framework="pt") as opened:
                names.update(opened.keys())
        biases = {name for name in names if name.endswith(".bias")} if files else None
        replace_linears(model, vars(self.quantization_config), biases)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        slow = 0
        for module in model.modules():
            if isinstance(module, Int4Linear):
                slow += not module.get_ready(pack=False)
        if slow:
            bits = self.quantization_config.bits
            warnings.warn(
                f"there is no Int{bits} kernel here for {slow} layers: they are dequantised at every step, "
                "which is slow", stacklevel=2,
            )  # fmt: skip
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top of it: the backward pass dequantises


AUTO_QUANTIZATION_CONFIG_MAPPING[TORCH_GPTQ] = TorchGPTQConfig
AUTO_QUANTIZER_MAPPING[TORCH_GPTQ] = TorchGPTQ
