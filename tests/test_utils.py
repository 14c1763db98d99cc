"""The loader: which device and precision, which layers on which GPU, how much memory, and what it refuses."""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import golden
import utils
from qwen import QWenConfig, QwenError, QWenLMHeadModel
from qwen.cpu import load_kernels
from utils import (
    choose_device,
    choose_dtype,
    gpu_device_map,
    load_from_args,
    load_model_and_tokenizer,
    load_model_for_training,
)


def save_tiny(directory: Path) -> Path:
    """The golden model with a vocabulary that it can read."""
    golden.checkpoint(directory)
    return directory


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    utils.add_model_arguments(parser)
    return parser.parse_args(argv)


# ---- layers on GPUs ----


@pytest.mark.parametrize("num_gpus", range(1, 33))
def test_every_gpu_gets_layers_in_order(num_gpus: int) -> None:
    device_map = gpu_device_map(num_gpus, QWenConfig())
    owners = [device_map[f"transformer.h.{i}"] for i in range(32)]
    assert owners == sorted(owners) and set(owners) == set(range(num_gpus))
    assert device_map["transformer.wte"] == 0
    assert device_map["transformer.ln_f"] == device_map["lm_head"] == num_gpus - 1
    assert set(device_map.values()) == set(range(num_gpus))
    layer, table = 404.8, 1244.7  # MB in bf16: 12,582,912 x 16 + 2 norms, and 151,936 x 4,096
    load = [layer * owners.count(gpu) + table * ((gpu == 0) + (gpu == num_gpus - 1)) for gpu in range(num_gpus)]
    middle = [owners.count(gpu) for gpu in range(1, num_gpus - 1)]
    assert not middle or max(middle) - min(middle) <= 1
    # No map of whole layers does better: the fullest GPU is within one layer of the mean, or has one layer only.
    assert max(load) <= sum(load) / num_gpus + layer or max(load) <= layer + table


def test_impossible_numbers_of_gpus() -> None:
    for number in (0, -1, 33):
        with pytest.raises(QwenError, match=f"--num-gpus {number}: a model of 32 layers runs on 1 to 32 GPUs"):
            gpu_device_map(number, QWenConfig())
    with pytest.raises(QwenError, match="--num-gpus 4: PyTorch finds 2 here"):
        gpu_device_map(4, QWenConfig(), available=2)


def test_map_covers_the_model_and_dispatches(tmp_path: Path) -> None:
    """A real dispatch by the map, with memory and disk standing in for the GPUs: the logits stay the same."""
    save_tiny(tmp_path)
    stages = gpu_device_map(3, golden.model().config)
    parameters = [name for name, _ in golden.model().named_parameters()]
    assert parameters == [name for name in parameters if any(name.startswith(f"{key}.") for key in stages)]
    places = {name: ("cpu", "disk", "cpu")[stage] for name, stage in stages.items()}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    assert model.hf_device_map == places
    on_disk = {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}
    assert on_disk == {name for name in parameters if name.startswith("transformer.h.1.")}
    torch.testing.assert_close(model(golden.ids(100)).logits, golden.model()(golden.ids(100)).logits)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA GPU")
def test_spread_over_the_gpus_that_are_here(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    for num_gpus in range(1, min(3, torch.cuda.device_count()) + 1):
        model = utils.load_model_on_gpus(tmp_path, num_gpus, dtype="fp32")
        assert len({p.device for p in model.parameters()}) == num_gpus
        logits = model(golden.ids(100).to(model.device)).logits.cpu()
        torch.testing.assert_close(logits, golden.model()(golden.ids(100)).logits, atol=1e-3, rtol=0)


# ---- precision and device ----


def test_precision_on_a_cpu(native_bf16: bool, set_hardware: Callable[[str], None]) -> None:
    """bf16 where the processor computes it, or where the kernels do the work; both can be switched off."""
    set_hardware("kernels=off")
    best = torch.bfloat16 if native_bf16 else torch.float32
    assert choose_dtype("cpu") == choose_dtype("cpu:0") == choose_dtype("cpu", plain=False) == best
    set_hardware("kernels=native")
    assert load_kernels() and choose_dtype("cpu") == torch.bfloat16
    assert choose_dtype("cpu", plain=False) == best  # the kernels know no adapters and no slices
    assert choose_dtype("cpu", "fp16") == torch.float16 and choose_dtype("cpu", torch.float32) == torch.float32


def test_precision_on_a_gpu_and_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    native = {"cuda": False, "mps": False}
    monkeypatch.setattr(utils, "computes_bf16", lambda device: native[device.split(":")[0]])
    assert choose_dtype("cuda:1") == choose_dtype("mps") == torch.float16
    native |= {"cuda": True, "mps": True}
    assert choose_dtype("cuda") == choose_dtype("mps") == torch.bfloat16
    with pytest.raises(QwenError, match="--dtype int3 is unknown: choose auto, bf16, fp16, fp32"):
        choose_dtype("cpu", "int3")


def test_models_are_loaded_in_the_precision_chosen(
    tmp_path: Path, native_bf16: bool, set_hardware: Callable[[str], None]
) -> None:
    save_tiny(tmp_path)
    for kernels, expected in (("native", "bf16"), ("off", "bf16" if native_bf16 else "fp32")):
        set_hardware(f"kernels={kernels}")
        model, _ = load_from_args(parse("-c", str(tmp_path), "--cpu-only"))
        assert utils.describe_placement(model).startswith(f"{expected} on cpu, sdpa attention")
        assert (model.transformer.cpu_decoder is not None) == (kernels == "native")


def test_absent_devices() -> None:
    assert choose_device("cpu") == "cpu"
    with pytest.raises(QwenError, match="--device tpu9000 is no device"):
        choose_device("tpu9000")
    if not torch.cuda.is_available():
        with pytest.raises(QwenError, match="PyTorch finds no cuda device here; use --device auto or --cpu-only"):
            choose_device("cuda:3")


# ---- loading ----


def test_flags_reach_the_loader(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    argv = ["-c", str(tmp_path), "--cpu-only", "--dtype", "bf16", "--attn", "eager"]
    model, tokenizer = load_from_args(parse(*argv))
    assert (model.dtype, model.device.type, model.config._attn_implementation) == (torch.bfloat16, "cpu", "eager")
    assert not model.training and len(tokenizer) == 908
    assert utils.describe_placement(model) == "bf16 on cpu, eager attention"
    defaults = vars(parse())
    assert defaults["checkpoint_path"] == "Qwen/Qwen-7B-Chat" and defaults["attn"] == "sdpa"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cpu-only", "--device", "cuda"], "--cpu-only contradicts"),
        (["--cpu-only", "--num-gpus", "2"], "--cpu-only contradicts"),
        (["--cpu-only", "--attn", "flash_attention_2"], "flash_attention_2 .*needs the package flash-attn"),
        (["--num-gpus", "3"], "--num-gpus 3: PyTorch finds 0 here"),
        (["--num-gpus", "7"], "--num-gpus 7: a model of 3 layers runs on 1 to 3 GPUs"),
    ],
)
def test_impossible_flags(argv: list[str], message: str, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("speaks of a machine without GPU")
    with pytest.raises(QwenError, match=message):
        load_from_args(parse("-c", str(save_tiny(tmp_path)), *argv))


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(QwenError, match="model.safetensors is a file: give the checkpoint's directory"):
        load_model_and_tokenizer(tmp_path / "model.safetensors")


def test_int4_directory_is_recognised(tmp_path: Path) -> None:
    """One that PyTorch runs goes on to its tensors, here dense ones; one that it doesn't is refused at once."""
    save_tiny(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for bits, message in ((4, "quantised by GPTQ, and the weights are not"), (2, "is GPTQ with 2 bits, groups of 64")):
        config["quantization_config"] = {"quant_method": "gptq", "bits": bits, "group_size": 64}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(QwenError, match=message):
            load_model_and_tokenizer(tmp_path, device="cpu")


def test_adapter_directory(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base, adapter = save_tiny(tmp_path / "base"), tmp_path / "adapter"
    model, _ = load_model_and_tokenizer(base, device="cpu", dtype="fp32")
    tuned = get_peft_model(model, LoraConfig(target_modules=["c_attn", "w1"], task_type="CAUSAL_LM"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(adapter)
    loaded, tokenizer = load_model_and_tokenizer(adapter, device="cpu", dtype="fp32")
    ids = golden.ids(20)
    torch.testing.assert_close(loaded(input_ids=ids).logits, tuned.eval()(input_ids=ids).logits)
    assert (loaded(input_ids=ids).logits - golden.model()(ids).logits).abs().max() > 0.01
    assert callable(loaded.chat) and len(tokenizer) == 908

    weights = (adapter / "adapter_model.safetensors").read_bytes()
    for damage in (lambda path: path.write_bytes(weights[:-500]), Path.unlink):
        damage(adapter / "adapter_model.safetensors")
        with pytest.raises(QwenError, match="the adapter .*adapter does not fit onto .*base"):
            load_model_and_tokenizer(adapter, device="cpu", dtype="fp32")

    shutil.rmtree(base)
    with pytest.raises(QwenError, match="the base model of adapter .*adapter does not load: "):
        load_model_and_tokenizer(adapter, device="cpu")


PEAK = """
import sys
from collections.abc import Callable
from pathlib import Path
from utils import DTYPES, load_model_and_tokenizer, load_model_for_training

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

import threading, time
peak, loading = 0, True
def watch():
    global peak
    while loading:
        peak = max(peak, memory("RssAnon"))
        time.sleep(0.002)
before = memory("RssAnon")
thread = threading.Thread(target=watch)
thread.start()
directory, dtype, way = sys.argv[1:]
if way == "chat":
    model, _ = load_model_and_tokenizer(directory, device="cpu", dtype=dtype)
else:
    model = load_model_for_training(Path(directory), DTYPES[dtype], {"": "cpu"})
loading = False
thread.join()
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print((peak - before) / weights)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(("dtype", "way"), [("bf16", "chat"), ("fp32", "chat"), ("fp32", "training")])
def test_loading_takes_little_more_than_the_weights(dtype: str, way: str, demo_checkpoint: Path) -> None:
    """Memory that cannot be dropped again (the files' own pages can), while loading as stored and while converting."""
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(demo_checkpoint), dtype, way],
        cwd=Path(utils.__file__).parent, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert float(run.stdout) < 1.3


def test_run_script_speaks_in_one_sentence(tmp_path: Path) -> None:
    script = tmp_path / "tool.py"
    script.write_text(
        "import sys\nfrom qwen import QwenError\nfrom utils import run_script\n"
        "def main():\n"
        "    if sys.argv[1] == 'mistake': raise QwenError('no such thing: do that')\n"
        "    if sys.argv[1] == 'interrupt': raise KeyboardInterrupt\n"
        "    if sys.argv[1] == 'full': raise OSError(28, 'No space left on device', 'out.json')\n"
        "    print('fine\\n' * 100000)\n"
        "run_script(main)\n"
    )
    root = Path(utils.__file__).parent

    def run(what: str, shell: str = "") -> tuple[int, str]:
        command = f"{sys.executable} {script} {what} {shell}"
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; PYTHONPATH={root} {command}"], capture_output=True, text=True
        )
        return done.returncode, done.stderr

    assert run("mistake") == (1, "tool.py: error: no such thing: do that\n")
    assert run("interrupt") == (130, "")
    assert run("full") == (1, "tool.py: error: the disk is full (out.json): free some space\n")
    assert run("fine", "| head -1") == (1, "")


@pytest.mark.parametrize(
    ("dtype", "free", "said"),
    [
        ("fp32", 0.5, "take bf16, or a quantised"),
        ("bf16", 0.5, "take a quantised"),
        ("fp32", 1.01, None),
        ("fp32", None, None),
    ],
)
def test_weights_that_memory_cannot_hold_are_told_before_loading(
    dtype: str, free: float | None, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the system's own file says it; nothing is read of the weights."""
    path = golden.checkpoint(tmp_path / "small", vocab_size=1000)
    weights = sum(t.numel() for t in golden.state_dict().values()) * (4 if dtype == "fp32" else 2)
    monkeypatch.setattr("qwen.hardware.CGROUP_FILES", ())
    monkeypatch.setattr("qwen.hardware.MEMORY_FILE", tmp_path / "meminfo")
    if free is not None:
        (tmp_path / "meminfo").write_text(f"MemAvailable:  {int(free * weights / 1024) + 1} kB\n")
    if said is None:
        assert load_model_and_tokenizer(path, device="cpu", dtype=dtype)
        return
    monkeypatch.setattr(QWenLMHeadModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(QwenError, match=f"takes .* GiB in {dtype}, and only .* of main memory are free: .*{said}"):
        load_model_and_tokenizer(path, device="cpu", dtype=dtype)
    with pytest.raises(QwenError, match="of main memory are free"):
        load_model_for_training(path, torch.float32, {"": torch.device("cpu")})
