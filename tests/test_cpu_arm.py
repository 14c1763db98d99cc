"""The CPU kernels on 64-bit ARM, cross-compiled and run by qemu, against what they give on this processor."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from qwen.cpu import FLAGS, SOURCE

PROGRAM = Path(__file__).with_name("kernels_alone.cpp")
CROSS, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
KINDS = {"float32": "0", "bfloat16": "1", "4 bits": "2", "bfloat16 as two": "3"}
TARGETS = {"any ARM": [], "with dot products": ["-march=armv8.2-a+dotprod"]}

pytestmark = pytest.mark.skipif(
    not (CROSS and EMULATOR and shutil.which("g++")),
    reason="needs g++-aarch64-linux-gnu and qemu-user (Debian's names)",
)


def build(compiler: str, folder: Path, *flags: str) -> Path:
    program = folder / "alone"
    own = [flag for flag in FLAGS if flag not in ("-shared", "-fPIC")]
    command = [compiler, *own, *flags, f"-I{SOURCE.parent}", str(PROGRAM), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    return program


def numbers(*command: str) -> np.ndarray:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    return np.array(done.stdout.split(), dtype=np.float64)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    program = build("g++", tmp_path_factory.mktemp("here"))
    return {kind: numbers(str(program), number) for kind, number in KINDS.items()}


@pytest.mark.parametrize("target", TARGETS)
def test_arm_computes_the_same(here: dict[str, np.ndarray], tmp_path: Path, target: str) -> None:
    program = build(CROSS, tmp_path, "-static", *TARGETS[target])
    for kind, number in KINDS.items():
        there = numbers(EMULATOR, "-cpu", "max", str(program), number)
        assert len(there) == len(here[kind]) == (64 + 48) * (70 - 3 + 3)
        # Of numbers around 1: float32's rounding, or where a sum lies at a border one step of 8 bits or of bfloat16.
        loose = 0.05 if kind == "4 bits" else 2e-2 if "bfloat16" in kind else 1e-4
        assert np.abs(there - here[kind]).max() < loose
        assert np.abs(there - here[kind]).mean() < loose / 50
        assert here[kind].std() > 0.5
