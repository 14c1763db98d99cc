"""qwen/hardware.py: what it finds, what QWEN_HARDWARE overrides, and that nobody else asks the processor."""

import ast
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qwen import QwenError, hardware

ROOT = Path(__file__).parent.parent
# Facts of one processor each, by torch.cpu's names.
AVX2 = dict.fromkeys(("sse4_2", "avx", "avx2", "fma3", "bmi", "bmi2", "f16c", "lzcnt"), True)
AVX512 = AVX2 | dict.fromkeys(("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl"), True)
MACHINES = {
    "x86 of 2010": ("x86_64", {"sse4_2": True, "avx2": False}, False, ["generic", "native"]),
    "x86 with AVX2": ("x86_64", AVX2, False, ["generic", "v3", "native"]),
    "Windows' name of it": ("AMD64", AVX2, False, ["generic", "v3", "native"]),
    "x86 with AVX-512": ("x86_64", AVX512, False, ["generic", "v3", "v4", "native"]),
    "x86 with AVX-512 and bf16": ("x86_64", AVX512 | {"avx512_bf16": True}, True, ["generic", "v3", "v4", "native"]),
    "AVX-512 without AVX2's company": ("x86_64", AVX512 | {"fma3": False}, False, ["generic", "native"]),
    "x86 with AMX": ("x86_64", AVX512 | {"amx_bf16": True}, True, ["generic", "v3", "v4", "native"]),
    "64-bit ARM": ("aarch64", {"neon": True, "bf16": False}, False, ["generic", "native"]),
    "64-bit ARM with bf16": ("aarch64", {"neon": True, "bf16": True}, True, ["generic", "native"]),
}


@pytest.fixture(autouse=True)
def unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is said from outside, nothing is remembered, and the threads are those of before."""
    threads = torch.get_num_threads()
    monkeypatch.delenv(hardware.VARIABLE, raising=False)
    hardware._read.cache_clear()
    yield
    hardware._read.cache_clear()
    torch.set_num_threads(threads)


def pretend(monkeypatch: pytest.MonkeyPatch, machine: str, found: dict[str, bool]) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)


# ---- what is found ----


@pytest.mark.parametrize(("machine", "found", "bf16", "levels"), MACHINES.values(), ids=MACHINES)
def test_kinds_of_processors(
    machine: str, found: dict[str, bool], bf16: bool, levels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, machine, found)
    assert hardware.hardware() == hardware.Hardware(bf16, "native")
    assert hardware.computes_bf16("cpu") == bf16
    assert hardware.kernel_levels() == levels
    assert hardware.processor_name().endswith(f"({'with' if bf16 else 'without'} native bf16)")


def test_processors_of_one_kind_share_compiled_code_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for machine, found, _, _ in MACHINES.values():
        pretend(monkeypatch, machine, found)
        keys.add(hardware.machine_key())
        pretend(monkeypatch, machine, dict(reversed(found.items())) | {"cpu_name": "x", "num_physical_cores": 64})
        assert hardware.machine_key() in keys
    assert len(keys) == len(MACHINES)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux lists the processor's features there")
def test_this_processor_is_as_the_system_says() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert hardware.hardware().bf16 == bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    assert ("v3" in hardware.kernel_levels()) == (flags >= {"avx2", "fma", "bmi1", "bmi2", "f16c"})
    assert ("v4" in hardware.kernel_levels()) == (
        flags >= {"avx2", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
    )
    assert hardware.num_processors() == len(os.sched_getaffinity(0))


def test_gpus_are_asked_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hardware.VARIABLE, "bf16=on")  # speaks of the CPU alone
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, there=there: there)
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor, there=there: there)
        assert hardware.computes_bf16("cuda:1") == hardware.computes_bf16("mps") == there
    assert hardware.computes_bf16("cpu")


# ---- what is said ----


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("bf16=on", (True, "native")),
        ("bf16=off", (False, "native")),
        ("kernels=off", (False, "off")),
        ("kernels=generic, bf16=on", (True, "generic")),
        (" kernels=v3 ,bf16=off,", (False, "v3")),
        ("bf16=on,bf16=off", (False, "native")),  # the last holds
        ("", (False, "native")),
    ],
)
def test_overrides(overrides: str, expected: tuple[bool, str], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "x86_64", AVX2)
    monkeypatch.setenv(hardware.VARIABLE, overrides)
    assert hardware.hardware() == hardware.Hardware(*expected)


def test_a_change_of_the_variable_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("on", "off", "on"):
        monkeypatch.setenv(hardware.VARIABLE, f"bf16={value}")
        assert hardware.computes_bf16("cpu") == (value == "on")


def test_threads_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hardware.VARIABLE, "threads=3")
    assert hardware.num_threads() == torch.get_num_threads() == 3
    torch.set_num_threads(2)  # a program that sets them afterwards has the last word
    assert hardware.num_threads() == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("bf17=on", "QWEN_HARDWARE names bf17, which is unknown: it takes bf16, kernels, threads"),
        ("on", "QWEN_HARDWARE names on, which is unknown: it takes bf16, kernels, threads"),
        ("bf16=yes", "QWEN_HARDWARE sets bf16=yes, which can't be: choose on, off"),
        ("bf16", "QWEN_HARDWARE sets bf16=, which can't be: choose on, off"),
        ("bf16=off,kernels=fast", "sets kernels=fast, which can't be: choose off, generic, v3, native"),
        ("kernels=v4", "sets kernels=v4, which can't be on this processor: choose off, generic, v3, native"),
        ("threads=0", "QWEN_HARDWARE sets threads=0: give a number from 1 to 4096"),
        ("threads=4097", "QWEN_HARDWARE sets threads=4097: give a number from 1 to 4096"),
        ("threads=two", "QWEN_HARDWARE sets threads=two: give a number from 1 to 4096"),
        ("threads=-1", "QWEN_HARDWARE sets threads=-1: give a number from 1 to 4096"),
    ],
)
def test_mistakes_are_one_sentence(overrides: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "x86_64", AVX2)
    before = torch.get_num_threads()
    monkeypatch.setenv(hardware.VARIABLE, f"threads={before + 1},{overrides}")
    with pytest.raises(QwenError) as caught:
        hardware.hardware()
    assert str(caught.value).endswith(message) and "\n" not in str(caught.value)
    assert torch.get_num_threads() == before, "refused as a whole"


@pytest.mark.parametrize("script", ["cli_demo.py", "finetune.py"])
def test_scripts_tell_a_mistake_before_anything_else(script: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "-c", "nowhere", "-d", "nowhere"],
        cwd=tmp_path, env=os.environ | {"QWEN_HARDWARE": "bf16=perhaps"}, capture_output=True, text=True,
    )  # fmt: skip
    name = Path(script).name
    sentence = f"{name}: error: QWEN_HARDWARE sets bf16=perhaps, which can't be: choose on, off"
    assert (done.returncode, done.stdout, done.stderr.splitlines()[-1]) == (1, "", sentence)


# ---- nobody else asks ----

ASKING = ("torch.cpu", "platform.processor", "platform.machine", "platform.uname", "os.uname", "os.cpu_count",
          "os.process_cpu_count", "os.sched_getaffinity", "multiprocessing.cpu_count", "psutil.cpu_count",
          "torch.get_num_threads", "torch.cuda.is_bf16_supported", "torch.backends.cpu")  # fmt: skip


def questions(source: str) -> list[str]:
    """What of ASKING Python source names, through whatever import, and the files that tell of the processor."""
    tree, names, found = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, dot, rest = ast.unparse(node).partition(".")
            found.append(names.get(first, first) + dot + rest)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [file for file in ("/proc/cpuinfo", "lscpu") if file in node.value]
    asked = [name for name in found if any(f"{name}.".startswith(f"{question}.") for question in ASKING)]
    return asked + [name for name in found if name in ("/proc/cpuinfo", "lscpu")]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.cpu.get_capabilities()",
        "from torch import cpu\ncpu.get_capabilities()",
        "from torch.cpu import get_capabilities",
        "import torch as t\nn = t.get_num_threads()",
        "import os\nn = os.cpu_count() or 1",
        "from os import sched_getaffinity as allowed",
        "import platform as p\nprint(p.processor())",
        "open('/proc/cpuinfo')",
        "import subprocess\nsubprocess.run(['lscpu'])",
    ],
)
def test_a_question_is_seen(source: str) -> None:
    assert questions(source)
    assert not questions("import os, torch\ntorch.set_num_threads(2)\nos.environ['QWEN_HARDWARE']\ntorch.device('cpu')")


def test_only_hardware_py_asks_the_processor() -> None:
    """Tests ask too, to compare or to put back what they changed."""
    files = [path for path in ROOT.rglob("*.py") if not {".venv", "tests"} & set(path.relative_to(ROOT).parts)]
    assert ROOT / "utils.py" in files and ROOT / "qwen" / "hardware.py" in files
    asking = {str(path.relative_to(ROOT)) for path in files if questions(path.read_text(encoding="utf-8"))}
    assert asking == {"qwen/hardware.py"}
    others = [path for suffix in ("*.sh", "*.cpp", "*.h") for path in ROOT.rglob(suffix) if ".venv" not in path.parts]
    asking = {path.name for path in others for word in ("/proc/cpuinfo", "lscpu", "cpuid") if word in path.read_text()}
    assert others and not asking


@pytest.mark.parametrize(
    ("limit", "used", "cached", "free"),
    [("max", "7", (0, 0), 3 << 20), (str(1 << 20), str(3 << 18), (0, 0), 1 << 18),
     (str(1 << 20), str(1 << 20), (1 << 17, 1 << 18), 3 << 17), (str(1 << 30), "0", (0, 0), 3 << 20)],
)  # fmt: skip
@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_under_a_limit(
    limit: str, used: str, cached: tuple[int, int], free: int, version: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What files take in the cache can be had; the limit of a container counts it as used."""
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\nSwapFree:  1024 kB\n")
    (tmp_path / "limit").write_text(limit)
    (tmp_path / "used").write_text(used)
    own = f"inactive_file {cached[0]}\nactive_file {cached[1]}\n"
    below = "".join(f"total_{line}\n" for line in own.splitlines()) if version == 1 else ""
    (tmp_path / "memory.stat").write_text(("inactive_file 1\nactive_file 1\n" if below else own) + below)
    monkeypatch.setattr(hardware, "MEMORY_FILE", tmp_path / "meminfo")
    monkeypatch.setattr(hardware, "CGROUP_FILES", ((tmp_path / "limit", tmp_path / "used"),))
    assert hardware.free_memory() == free
    monkeypatch.setattr(hardware, "MEMORY_FILE", tmp_path / "gone")
    assert hardware.free_memory() is None
