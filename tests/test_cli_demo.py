"""The program itself, with the demo checkpoint: in a terminal (drawn by pyte), in a dumb terminal, and in pipes."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from terminal import CTRL_C, CTRL_D, UP, Terminal
from transformers.utils import logging

import cli_demo
import golden
from cli.display import Display, letters, make_console
from cli.session import ChatSession
from cli.terminal import LineInterrupt
from cli.texts import Texts
from qwen import QwenError, QWenTokenizer

SCRIPT = str(Path(cli_demo.__file__))
FRANCE = "What is the capital of France?"


def environment(tmp_path: Path, **changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    ours = {
        "LC_ALL": "C.UTF-8",
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "TERM": "xterm-256color",
        "OMP_NUM_THREADS": "1",  # several threads wait for each other when cores are shared
    }
    return kept | ours | changes


@contextmanager
def terminal(tmp_path: Path, *flags: str, rows: int = 6, **changes: str) -> Iterator[Terminal]:
    """The program in a terminal, at its prompt."""
    terminal = Terminal(
        [sys.executable, SCRIPT, *flags], environment(tmp_path, **changes), tmp_path, columns=60, rows=rows
    )
    try:
        terminal.read_until(terminal.at_prompt)
        yield terminal
    finally:
        terminal.close()


def enter(terminal: Terminal, line: str) -> None:
    """Type a line and wait for the next prompt."""
    before = terminal.text()
    terminal.write(f"{line}\r")
    terminal.read_until(lambda: terminal.at_prompt() and terminal.text() != before)


def saved_turns(terminal: Terminal, path: Path) -> list[dict[str, str]]:
    path.unlink(missing_ok=True)
    enter(terminal, f":save {path.name}")
    return json.loads(path.read_text(encoding="utf-8"))["turns"]


def test_in_a_terminal(demo_checkpoint: Path, tmp_path: Path) -> None:
    transcript = tmp_path / "t.json"
    with terminal(tmp_path, "-c", str(demo_checkpoint), "-s", "1", "--max-new-tokens", "12") as screen:
        enter(screen, ":conf do_sample=off")
        enter(screen, FRANCE)
        assert "Paris" in screen.text()

        enter(screen, ":conf max_new_tokens=80")
        screen.write("\x1b[200~Tell me a story about a fox.\nAnd a crow.\x1b[201~")
        screen.read_until("  And a crow.")
        enter(screen, "")
        turns = saved_turns(screen, transcript)
        assert [turn["user"] for turn in turns] == [FRANCE, "Tell me a story about a fox.\nAnd a crow."]
        assert "cut at max_new_tokens=80" in screen.text()
        shown = letters(screen.text())
        assert len(turns[1]["assistant"]) > 60 * 4, "more than fits on the screen"
        for turn in turns:
            assert shown.count(letters(turn["assistant"])) == 1, "all of the reply, once"

        enter(screen, ":conf max_new_tokens=5000")
        before = screen.text().count("\n")
        screen.write("Write a book of twenty long chapters.\r")
        screen.read_until(lambda: screen.text().count("\n") > before + 3)
        screen.write(f"typed ahead{CTRL_C}")
        screen.read_until("stopped")
        screen.read_until(lambda: screen.at_prompt() or "> typed ahead" in screen.text())
        assert screen.text().count("typed ahead") <= 1, "keys are not echoed into a reply"
        screen.write("\x15")  # Ctrl-U: take back what may have been typed ahead
        screen.read_until(screen.at_prompt)
        turns = saved_turns(screen, transcript)
        assert len(turns) == 3 and letters(screen.text()).count(letters(turns[2]["assistant"])) == 1
        assert len(turns[2]["assistant"]) > 60

        screen.write(f"abc{CTRL_C}")
        screen.read_until("Ctrl-C again leaves.")
        screen.read_until(screen.at_prompt)
        screen.write(UP)
        screen.read_until(lambda: screen.screen.display[screen.screen.cursor.y].startswith("> :save"))
        screen.write(CTRL_C)
        screen.read_until(screen.at_prompt)
        screen.write(CTRL_D)
        assert screen.wait() == 0


def test_in_a_dumb_terminal(demo_checkpoint: Path, tmp_path: Path) -> None:
    with terminal(tmp_path, "-c", str(demo_checkpoint), "--lang", "zh", rows=24, TERM="dumb", NO_COLOR="1") as screen:
        enter(screen, ":conf do_sample=off max_new_tokens=12")
        enter(screen, FRANCE)
        assert "Paris" in screen.text() and ":help" in screen.text()
        assert "\u8f93\u5165" in screen.text()  # the interface speaks Chinese
        screen.write(CTRL_C)
        screen.read_until("\u518d\u6309\u4e00\u6b21 Ctrl-C")
        screen.read_until(screen.at_prompt)
        screen.write(CTRL_C)
        assert screen.wait() == 0


def run(tmp_path: Path, lines: str, *flags: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *flags], input=lines, env=environment(tmp_path, **changes), cwd=tmp_path,
        capture_output=True, encoding="utf-8", timeout=200,
    )  # fmt: skip


def test_in_a_pipe(demo_checkpoint: Path, tmp_path: Path, native_bf16: bool) -> None:
    lines = f":conf do_sample=off max_new_tokens=12\n{FRANCE}\n:help\n:save t.json\n:q\nnever read\n"
    done = run(tmp_path, lines, "-c", "demo", FORCE_COLOR="1", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    [turn] = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))["turns"]
    assert "Paris" in done.stdout and done.stdout == turn["assistant"] + "\n"
    assert "Loading demo" in done.stderr and "not Qwen" in done.stderr and ":clear-his" in done.stderr
    assert "\x1b" not in done.stdout and "\x1b" not in done.stderr.replace("\x1b[A", "")  # tqdm's bars move up


# ---- without a process of its own ----


def test_a_base_model_and_an_error(
    demo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(demo_checkpoint, base, copy_function=os.symlink)
    settings = json.loads((demo_checkpoint / "generation_config.json").read_text())
    (base / "generation_config.json").unlink()
    (base / "generation_config.json").write_text(
        json.dumps(settings | {"chat_format": "raw", "do_sample": False, "max_new_tokens": 4})
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("The capital of France is\n:load missing.json"))
    verbosity = logging.get_verbosity()
    try:
        with pytest.warns(UserWarning, match="without do_sample temperature, top_p, top_k had no effect"):
            status = cli_demo.main(["-c", str(base), "--cpu-only"])
    finally:
        logging.set_verbosity(verbosity)
    shown = capsys.readouterr()
    assert "Paris" in shown.out and "continues your text" in shown.err
    assert status == 1 and "error: cannot read missing.json" in shown.err


def test_every_flag_has_help_and_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli_demo.parse_args(["--help"])
    shown = capsys.readouterr().out
    code = Path(SCRIPT).read_text()
    flags = ("seed", "system", "max-new-tokens", "lang", "plain", "checkpoint-path", "cpu-only")
    assert all(f"--{flag}" in shown for flag in flags)
    assert all(f"args.{flag.replace('-', '_')}" in code for flag in flags[:5])


@pytest.mark.parametrize("flags", [["-s", "-1"], ["-s", str(2**32)], ["--max-new-tokens", "0"], ["--lang", "fr"]])
def test_flags_out_of_range(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli_demo.parse_args(flags)
    assert caught.value.code == 2 and flags[0] in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(QwenError):
        cli_demo.main(["-c", str(tmp_path / "missing")])


@pytest.fixture
def session(tokenizer: QWenTokenizer) -> ChatSession:
    console = make_console(io.StringIO(), plain=True)
    return ChatSession(golden.model(), tokenizer, Display(console, console, rich_replies=False), Texts("en"), seed=0)


@pytest.mark.parametrize(
    ("events", "handled"),
    [
        ([EOFError()], 1),
        ([":q"], 1),
        ([KeyboardInterrupt(), KeyboardInterrupt()], 2),
        ([LineInterrupt(), KeyboardInterrupt()], 2),
        ([KeyboardInterrupt(), LineInterrupt(), KeyboardInterrupt()], 3),
        ([KeyboardInterrupt(), ":seed", KeyboardInterrupt(), "", KeyboardInterrupt(), KeyboardInterrupt()], 6),
    ],
)
def test_ways_to_leave(session: ChatSession, events: list[str | BaseException], handled: int) -> None:
    left = [*events, "more"]

    def read_line() -> str:
        event = left.pop(0)
        if isinstance(event, str):
            return event
        raise event

    cli_demo.chat(session, read_line)
    assert len(events) + 1 - len(left) == handled and left == ["more"]
