"""GPTQ checkpoints on PyTorch alone, against GPTQModel's own dequantised weights and outputs."""

import copy
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import golden
import qwen.int4
import utils
from qwen import QWenConfig, QwenError, QWenLMHeadModel
from qwen.int4 import Int4Linear, group_index, pack_words, unpack_words

CHECKPOINT = golden.DATA / "gptq"  # quantised by GPTQModel, see data/README.md
LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")


def load(directory: Path = CHECKPOINT, **kwargs: object) -> QWenLMHeadModel:
    return QWenLMHeadModel.from_pretrained(directory, **{"dtype": torch.float32, **kwargs}).eval()


def random_layer(inputs: int, outputs: int, bits: int = 4, group_size: int = 64, bias: bool = False) -> Int4Linear:
    generator = torch.Generator().manual_seed(inputs + outputs)
    layer = Int4Linear(inputs, outputs, bits, group_size, bias)
    numbers = torch.randint(0, 2**bits, (inputs, outputs), dtype=torch.uint8, generator=generator)
    zeros = torch.full((outputs, inputs // group_size), 2 ** (bits - 1) - 1, dtype=torch.uint8)
    layer.qweight = pack_words(numbers, bits)
    layer.qzeros = pack_words(zeros, bits).T.contiguous()
    layer.scales = (torch.rand(inputs // group_size, outputs, generator=generator) * 0.01 + 0.001).half()
    layer.g_idx = group_index(inputs, group_size)
    return layer


def dequantize_one_by_one(layer: Int4Linear) -> np.ndarray:
    """The format's definition, in plain integers."""
    words = layer.qweight.numpy().view(np.uint32)
    scales = layer.scales.float().numpy()
    weight = np.zeros((layer.out_features, layer.in_features), dtype=np.float32)
    each = 32 // layer.bits
    for i in range(layer.in_features):
        number = words[i // each] >> np.uint32(layer.bits * (i % each)) & np.uint32(2**layer.bits - 1)
        weight[:, i] = (number.astype(np.int64) - 2 ** (layer.bits - 1)) * scales[layer.g_idx[i]]
    return weight


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def damaged(directory: Path, **changes: Tensor | None) -> Path:
    """A copy of the checkpoint, with tensors of its first c_attn replaced or left out."""
    shutil.copytree(CHECKPOINT, directory)
    state = load_file(CHECKPOINT / "model.safetensors")
    for name, tensor in changes.items():
        key = f"transformer.h.0.attn.c_attn.{name}"
        state.pop(key)
        if tensor is not None:
            state[key] = tensor
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def with_quantization(directory: Path, **changes: object) -> Path:
    shutil.copytree(CHECKPOINT, directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= changes
    (directory / "config.json").write_text(json.dumps(config))
    return directory


# ---- against GPTQModel ----


def test_weights_are_those_of_gptqmodel() -> None:
    block, expected = load().transformer.h[0], np.load(CHECKPOINT / "outputs.npz")
    for name in LAYERS:
        weight = block.get_submodule(name).dequantize(torch.float32)
        assert relative_error(weight[::16], torch.tensor(expected[f"h.0.{name}"])) < 0.003


@pytest.mark.parametrize("rows", [22, 1])
def test_logits_are_those_of_gptqmodel(rows: int) -> None:
    """All tokens at once, and one by one through the kernel with a cache."""
    model, expected = load(), np.load(CHECKPOINT / "outputs.npz")
    cache, logits = None, []
    with torch.no_grad():
        for ids in torch.tensor(expected["ids"]).split(rows, dim=1):
            output = model(ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    cosine = torch.cosine_similarity(torch.cat(logits, dim=1), torch.tensor(expected["logits"]), dim=-1)
    assert cosine.min() > 0.999


@pytest.mark.parametrize("auto", [False, True])
def test_loads_in_both_ways_and_saves_the_official_tensors(tmp_path: Path, auto: bool) -> None:
    model = (AutoModelForCausalLM if auto else QWenLMHeadModel).from_pretrained(CHECKPOINT, dtype=torch.float16)
    assert model.is_quantized and isinstance(model.transformer.h[0].mlp.w1, Int4Linear)
    with torch.no_grad():
        model(torch.arange(3)[None])  # few rows: from here on the layers hold the kernel's layout
    model.save_pretrained(tmp_path)
    saved, original = load_file(tmp_path / "model.safetensors"), load_file(CHECKPOINT / "model.safetensors")
    assert saved.keys() == original.keys()
    for name, tensor in original.items():
        assert saved[name].shape == tensor.shape and torch.equal(saved[name].float(), tensor.float()), name
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "gptq" and quantization["group_size"] == 128
    ids = torch.arange(30)[None]
    torch.testing.assert_close(load(tmp_path)(ids).logits, load()(ids).logits)
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == quantization


def test_through_the_loader(tmp_path: Path) -> None:
    directory = golden.int4_checkpoint(tmp_path / "int4")
    model, _ = utils.load_model_and_tokenizer(directory, device="cpu", dtype="fp32")
    assert "Int4 (" in utils.describe_placement(model)
    ids = torch.tensor(np.load(CHECKPOINT / "outputs.npz")["ids"])
    logits = model(ids).logits[..., :64]
    assert torch.cosine_similarity(logits, load()(ids).logits, dim=-1).min() > 0.999


def test_size_that_is_asked_of_a_gpu() -> None:
    stored = sum(t.numel() * t.itemsize for t in load_file(CHECKPOINT / "model.safetensors").values())
    asked = utils.weight_bytes(AutoConfig.from_pretrained(CHECKPOINT), torch.bfloat16)
    assert stored <= asked < 1.02 * stored
    official = QWenConfig(
        quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    )
    assert abs(utils.weight_bytes(official, torch.float16) - 5_860_564_992) < 8_000_000  # the published files


# ---- one layer ----


@pytest.mark.parametrize("bits", [4, 8])
def test_format_by_its_definition(bits: int) -> None:
    layer = random_layer(128, 32, bits, group_size=32)
    np.testing.assert_allclose(layer.dequantize(torch.float32), dequantize_one_by_one(layer), rtol=1e-6)
    torch.testing.assert_close(pack_words(unpack_words(layer.qweight, bits), bits), layer.qweight, rtol=0, atol=0)


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_computes_the_dequantised_product(group_size: int, dtype: torch.dtype) -> None:
    layer = random_layer(512, 192, group_size=group_size, bias=True)
    layer.bias = torch.linspace(-1, 1, 192)
    if layer.choose_kernel() is None:
        pytest.skip("this PyTorch has no int4 kernel here")
    weight = layer.dequantize(torch.float32)
    x = torch.randn(2, 3, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        y = layer(x)
    assert y.dtype == dtype and y.shape == (2, 3, 192)
    assert layer.packed is not None and "qweight" not in layer._buffers  # not held twice
    assert relative_error(y, x.float() @ weight.T + layer.bias) < 0.01
    torch.testing.assert_close(layer.dequantize(torch.float32), weight, rtol=0, atol=0)


@pytest.mark.parametrize(("inputs", "outputs", "bits"), [(96, 64, 4), (128, 40, 4), (128, 64, 8)])
def test_without_a_kernel_that_fits(inputs: int, outputs: int, bits: int) -> None:
    layer = random_layer(inputs, outputs, bits, group_size=32)
    if outputs == 40 or bits == 8:
        assert layer.choose_kernel() is None
    x = torch.randn(1, inputs, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative_error(layer(x), x @ torch.tensor(dequantize_one_by_one(layer)).T) < 0.01


def test_packed_layer_is_copied_moved_and_loaded_as_before() -> None:
    layer, x = random_layer(128, 64), torch.ones(1, 128)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with torch.no_grad():
        expected = layer(x)
    assert layer.packed is not None
    for name, tensor in layer.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)
    copied = copy.deepcopy(layer)
    moved = layer.to("cpu", torch.bfloat16)
    assert moved.scales.dtype == torch.float16 and moved.packed is None
    moved.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(copied(x), expected)
        torch.testing.assert_close(moved(x), expected)
        other = random_layer(128, 64, group_size=64)
        other.scales *= 0
        other(x)
        other.load_state_dict(state)  # into a packed layer
        torch.testing.assert_close(other(x), expected)


def test_gradients_flow_to_the_inputs() -> None:
    layer = random_layer(128, 64)
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad[0], torch.tensor(dequantize_one_by_one(layer)).sum(0))


def test_layer_traces_whole() -> None:
    """Few rows, many, and few again: what was chosen when the layer first ran is no part of what is traced."""
    layer = random_layer(128, 64, bias=True)
    traced = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        layer(torch.ones(1, 128))
        for rows in (1, 15, 40, 1):
            x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows))
            torch.testing.assert_close(traced(x), layer(x), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA GPU")
@pytest.mark.parametrize("rows", [1, 16, 40, 200, 1100])
def test_triton_kernel_of_the_gpu(rows: int) -> None:
    layer = random_layer(512, 192, group_size=128)
    weight, x = layer.dequantize(torch.float32), torch.randn(rows, 512, generator=torch.Generator().manual_seed(0))
    layer.to("cuda")
    with torch.no_grad():
        assert relative_error(layer(x.cuda()).cpu(), x @ weight.T) < 0.01
    assert layer.in_triton
    torch.testing.assert_close(layer.dequantize(torch.float32).cpu(), weight, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA GPU")
def test_kernel_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen.int4, "triton_works", lambda *_: False)
    layer = random_layer(512, 192, group_size=128)
    weight, x = layer.dequantize(torch.float32), torch.randn(3, 512)
    layer.to("cuda")
    assert layer.choose_kernel() is not None
    with torch.no_grad():
        assert relative_error(layer(x.cuda()).cpu(), x @ weight.T) < 0.01
    assert layer.packed is not None
    torch.testing.assert_close(layer.dequantize(torch.float32).cpu(), weight, rtol=0, atol=0)
    torch.testing.assert_close(layer.to("cpu").dequantize(torch.float32), weight, rtol=0, atol=0)


# ---- what is refused ----


def test_zero_points_of_both_versions(tmp_path: Path) -> None:
    eights = torch.full((2, 96), int("88888888", 16) - 2**32, dtype=torch.int32)
    model = load(damaged(tmp_path / "v2", qzeros=eights))
    ids = torch.arange(30)[None]
    torch.testing.assert_close(model(ids).logits, load()(ids).logits)
    with pytest.raises(QwenError, match=r"c_attn\.qzeros is not symmetric"):
        load(damaged(tmp_path / "odd", qzeros=eights - 1))


def test_hidden_act_order(tmp_path: Path) -> None:
    with pytest.raises(QwenError, match=r"c_attn\.g_idx is in act order"):
        load(damaged(tmp_path / "x", g_idx=group_index(256, 128).flip(0)))


def test_missing_and_misshapen_tensors(tmp_path: Path) -> None:
    with pytest.raises(QwenError, match=r"lacks 1 of the model's tensors .*c_attn\.scales"):
        load(damaged(tmp_path / "missing", scales=None))
    with pytest.raises(QwenError, match=r"c_attn\.scales is \(4, 768\), and by config.json it should be \(2, 768\)"):
        load(damaged(tmp_path / "shape", scales=torch.ones(4, 768, dtype=torch.float16)))


@pytest.mark.skipif(find_spec("gptqmodel") is not None, reason="with GPTQModel these load")
@pytest.mark.parametrize("changes", [{"desc_act": True}, {"bits": 3}, {"group_size": 48}, {"sym": False}])
def test_other_kinds_of_gptq_name_the_package(tmp_path: Path, changes: dict[str, object]) -> None:
    directory = with_quantization(tmp_path / "x", **changes)
    with pytest.raises(QwenError, match="PyTorch alone runs 4 or 8 bits.*pip install gptqmodel"):
        utils.load_model_and_tokenizer(directory, device="cpu")


def test_groups_that_do_not_divide_the_layer(tmp_path: Path) -> None:
    directory = with_quantization(tmp_path / "x", group_size=256)
    config = json.loads((directory / "config.json").read_text()) | {"intermediate_size": 768}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(QwenError, match=r"transformer\.h\.0\.mlp\.c_proj: .* can't be cut into groups of 256"):
        load(directory)


def test_other_methods(tmp_path: Path) -> None:
    directory = with_quantization(tmp_path / "x", quant_method="awq")
    with pytest.raises(QwenError, match=r"is quantised by awq \(4 bits\), which nothing here loads"):
        utils.load_model_and_tokenizer(directory, device="cpu")


def test_slow_path_says_so(tmp_path: Path) -> None:
    """An Int8 checkpoint with the weights of the Int4 one: one warning for the model, not one for each layer."""
    directory = with_quantization(tmp_path / "x", bits=8)
    state = load_file(CHECKPOINT / "model.safetensors")
    for name in [name for name in state if name.endswith("qweight")]:
        numbers = unpack_words(state[name], 4) + 120  # -8..7 around the middle of eight bits
        state[name] = pack_words(numbers, 8)
        zeros = state[name.replace("qweight", "qzeros")]
        state[name.replace("qweight", "qzeros")] = torch.full(
            (zeros.shape[0], zeros.shape[1] * 2), 0x7F7F7F7F, dtype=torch.int32
        )
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="no Int8 kernel here for 5 layers") as warned:
        model = load(directory)
    assert len(warned) == 1
    ids = torch.arange(30)[None]
    torch.testing.assert_close(model(ids).logits, load()(ids).logits, rtol=1e-4, atol=1e-4)
