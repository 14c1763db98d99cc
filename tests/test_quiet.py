"""Nothing on the terminal but a command's own lines: `--help` and a first reply, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
FURTHER = sorted(
    str(path.relative_to(ROOT))
    for folder in ("eval", "benchmarks", "examples")
    for path in (ROOT / folder).glob("*.py")
    if "ArgumentParser" in (text := path.read_text(encoding="utf-8")) and "__main__" in text
)
USERS = {"finetune.py"}  # of bitsandbytes, or of the trainer that imports it
# Whether it prints its line depends on the processor; that it is imported does not.
RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, ".")
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("\\nimported:", *(name for name in ("bitsandbytes", "peft") if name in sys.modules))
"""


def run(*command: str, given: str = "", hardware: str = "bf16=off") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "QWEN_HARDWARE": hardware, "LC_ALL": "C.UTF-8"}
    return subprocess.run(
        [sys.executable, "-c", RUN, *command], input=given, env=environment, cwd=ROOT, capture_output=True,
        encoding="utf-8", timeout=200,
    )  # fmt: skip


def check_help(script: str) -> None:
    done = run(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage:" in done.stdout or script == "finetune.py"
    assert script in USERS or done.stdout.endswith("imported:\n"), done.stdout[-60:]


@pytest.mark.parametrize("script", [*SCRIPTS, "eval/evaluate_mmlu.py"])
def test_help(script: str) -> None:
    check_help(script)


@pytest.mark.slow
@pytest.mark.parametrize("script", FURTHER)
def test_help_of_all_others(script: str) -> None:
    check_help(script)


@pytest.mark.parametrize("bf16", ["on", "off"])
def test_a_first_reply(bf16: str, brief_demo: Path) -> None:
    given = "What is the capital of France?\n"
    done = run("cli_demo.py", "-c", str(brief_demo), "--lang", "en", given=given, hardware=f"bf16={bf16}")
    assert done.returncode == 0 and done.stdout.startswith("The capital of France is Paris")
    assert done.stdout.endswith("imported:\n")
    loading, greeting = done.stderr.splitlines()
    assert loading.startswith("Loading ") and str(brief_demo) in greeting
