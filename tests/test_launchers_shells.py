"""The launchers under every shell that people type: what they start, and one sentence for what is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHELLS = [shell for shell in ("sh", "dash", "bash") if shutil.which(shell)]
LAUNCHERS = sorted(path.name for path in (ROOT / "finetune").glob("finetune_*.sh"))


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A python that says what it is asked to run, and has the packages that HAS names and as many GPUs as GPUS says."""
    path = tmp_path / "py thon"
    path.write_text(
        '#!/bin/sh\ncase "$*" in\n*find_spec*) for name in $HAS; do case "$*" in *"(\'$name\')"*) exit 0;; esac; done; '
        'exit 1 ;;\n*device_count*) echo "$GPUS" ;;\n*) for word; do echo "$word"; done ;;\nesac\n'
    )
    path.chmod(0o755)
    return path


def run(shell: str, name: str, python: Path | str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), "HAS": "torch deepspeed", "GPUS": "4"} | more
    command = [shell, str(ROOT / "finetune" / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


GIVEN = ("-d", "my data.jsonl", "-o", "out")


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", LAUNCHERS)
def test_it_starts_with_all_flags_in_place(shell: str, name: str, python: Path) -> None:
    done = run(shell, name, python, *GIVEN, "--", "--num_train_epochs", "3", "--columns", "a b=c")
    assert (done.returncode, done.stderr) == (0, "")
    words = done.stdout.splitlines()
    assert words[words.index("--data_path") + 1] == "my data.jsonl"
    assert words[-4:] == ["--num_train_epochs", "3", "--columns", "a b=c"]
    assert words[words.index("--model_name_or_path") + 1].startswith("Qwen/Qwen-7B-Chat")
    if "single" in name:
        assert words[0] == str(ROOT / "finetune.py")
    else:
        assert words[:4] == [str(ROOT / "training" / "launch.py"), "--nproc_per_node", "4", "--standalone"]
    if "_ds" in name:
        assert Path(words[words.index("--deepspeed") + 1]).is_file()


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("more", [
    {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"},
    {"PET_NNODES": "2", "PET_NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"},
    {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "MASTER_ADDR": "10.0.0.1"},
])  # fmt: skip
def test_several_machines(shell: str, more: dict[str, str], python: Path) -> None:
    words = run(shell, "finetune_ds.sh", python, *GIVEN, "-m", "demo", GPUS_PER_NODE="2", **more).stdout.splitlines()
    expected = ["--nproc_per_node", "2", "--nnodes", "2", "--node_rank", "1", "--master_addr", "10.0.0.1",
                "--master_port", "29500"]  # fmt: skip
    assert words[1 : 1 + len(expected)] == expected


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(("arguments", "more", "message"), [
    (("-d", "a"), {}, "-d DATA and -o OUTPUT must be given; usage: finetune_ds.sh"),
    ((*GIVEN, "--num_train_epochs", "3"), {}, "usage: finetune_ds.sh"),
    ((*GIVEN, "b.jsonl", "c.jsonl"), {}, "such as b.jsonl go after --, several files into one quoted pattern"),
    (GIVEN, {"PYTHON": "no-python"}, "no-python is not found: activate an environment"),
    (GIVEN, {"HAS": ""}, "has no torch: pip install"),
    (GIVEN, {"HAS": "torch"}, "has no deepspeed: pip install deepspeed ninja, or use finetune_fsdp.sh"),
    (GIVEN, {"GPUS_PER_NODE": "8"}, "GPUS_PER_NODE is 8, and this machine has 4"),
    (GIVEN, {"NNODES": "2"}, "NNODES is 2: give each machine its number in NODE_RANK, 0 to 1"),
    (GIVEN, {"NNODES": "2", "NODE_RANK": "0"}, "give all machines the address of the first in MASTER_ADDR"),
])  # fmt: skip
def test_what_is_missing_is_one_sentence(
    shell: str, arguments: tuple[str, ...], more: dict[str, str], message: str, python: Path
) -> None:
    more = dict(more)
    done = run(shell, "finetune_ds.sh", more.pop("PYTHON", python), *arguments, **more)
    assert done.returncode == 2 and message in done.stderr and not done.stdout
    assert len(done.stderr.splitlines()) <= 2


@pytest.mark.slow
def test_what_a_process_said_is_all_that_is_said(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, signal, sys, time\nif os.environ['RANK'] == '0':\n"
        "    sys.argv[1:] or os.kill(os.getpid(), signal.SIGKILL)\n    sys.exit('bad data')\ntime.sleep(60)\n"
    )
    command = [
        sys.executable,
        str(ROOT / "training" / "launch.py"),
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
    ]
    for arguments, status, said in ((["say"], 1, "bad data"), ([], 137, "process 0 was ended by SIGKILL; most often")):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == status and said in done.stderr and "Traceback" not in done.stderr
