"""README.md and README_CN.md: the same code and structure in both, and what they name exists, parses and runs."""

import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token

from cli.commands import COMMANDS
from cli.settings import parse_settings
from cli.texts import Texts
from qwen import QwenError
from utils import load_model_and_tokenizer

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README_CN.md")
PIP_FLAGS = {"--index-url"}  # named on their own in the text; all other flags named so are cli_demo.py's
PUBLISHED = r'"[Qq]wen/Qwen-7B-Chat"'

both = pytest.mark.parametrize("name", READMES)


@cache
def document(name: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse((ROOT / name).read_text(encoding="utf-8"))


def fences(name: str) -> list[tuple[str, str]]:
    """Language and content of each code block."""
    return [(token.info, token.content) for token in document(name) if token.type == "fence"]


def spans(tokens: list[Token]) -> list[str]:
    """The code within texts."""
    return [child.content for token in tokens for child in token.children or [] if child.type == "code_inline"]


def links(name: str) -> list[str]:
    opened = [child for token in document(name) for child in token.children or [] if child.type == "link_open"]
    return [str(link.attrs["href"]) for link in opened]


def tables(name: str) -> list[list[list[Token]]]:
    """Tables of rows of cells."""
    found: list[list[list[Token]]] = []
    cell = False
    for token in document(name):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif cell:
            found[-1][-1].append(token)
        cell = token.type in ("th_open", "td_open")
    return found


def first_column(name: str, entry: str) -> list[Token]:
    """The first column, without its head, of the one table with `entry` in it."""
    columns = [[row[0] for row in rows[1:]] for rows in tables(name)]
    [column] = [column for column in columns if any(entry in cell.content for cell in column)]
    return column


def commands() -> Iterator[list[str]]:
    """The words of every command in bash blocks, and in code within texts that begins like one."""
    lines = [line for language, block in fences("README.md") if language == "bash" for line in block.splitlines()]
    lines += [span for span in spans(document("README.md")) if re.match(r"(make|python|pip) ", span)]
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in lexer:
            if word in ("&&", "||", "|", ";"):
                yield command
                command = []
            else:
                command.append(word)
        yield command


# ---- two languages ----


def test_code_blocks_are_identical() -> None:
    assert len(fences("README.md")) >= 8
    assert fences("README.md") == fences("README_CN.md")


def test_structure_and_tables_are_the_same() -> None:
    shapes, figures = [], []
    for name in READMES:
        blocks = ("heading_open", "list_item_open", "table_open", "tr_open", "fence", "html_block")
        shapes.append([(t.type, t.tag, t.content) for t in document(name) if t.type in blocks])
        cells = [[[cell.content for cell in row] for row in rows] for rows in tables(name)]
        figures.append([[[re.findall(r"\d[\d.]*", cell) for cell in row] for row in rows] for rows in cells])
    assert shapes[0] == shapes[1]
    assert figures[0] == figures[1]


def test_nothing_that_is_code_or_link_got_lost_in_translation() -> None:
    assert sorted(spans(document("README.md"))) == sorted(spans(document("README_CN.md")))
    english, chinese = (links(name) for name in READMES)
    assert english[0] == "README_CN.md" and chinese[0] == "README.md"
    assert sorted(english[1:]) == sorted(chinese[1:])


@both
def test_it_stays_short(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 300


# ---- what is named exists ----


@both
def test_local_links_resolve(name: str) -> None:
    local = [link for link in links(name) if "://" not in link]
    assert local and [link for link in local if not (ROOT / link).exists()] == []


@both
def test_map_and_repository_agree(name: str) -> None:
    entries = spans(first_column(name, "qwen/modeling_qwen.py"))
    assert [entry for entry in entries if not (ROOT / entry).exists()] == []
    packages = {f"{path.parent.name}/" for path in ROOT.glob("[!.]*/*.py")} - {"qwen/"}
    modules = {path.name for path in ROOT.glob("*.py")}
    ours = {f"qwen/{path.name}" for path in ROOT.glob("qwen/*.py")} - {"qwen/__init__.py"}  # the package itself
    assert packages and modules and ours and (packages | modules | ours) - set(entries) == set()


@both
def test_every_requirement_is_explained(name: str) -> None:
    lines = [line for path in ROOT.glob("requirements*.txt") for line in path.read_text().splitlines()]
    packages = {match[0] for line in lines if (match := re.match(r"[A-Za-z][\w.-]*", line))}
    explained = " ".join(cell.content for cell in first_column(name, "tiktoken"))
    assert {"torch", "pytest"} <= packages
    assert sorted(p for p in packages if not re.search(rf"(?<![\w-]){re.escape(p)}(?![\w-])", explained)) == []


# ---- what is told to be typed works ----


def test_commands_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    scripts = set()
    monkeypatch.chdir(ROOT)
    for command in commands():
        program, arguments = Path(command[0]).name, command[1:]
        if program == "make":
            for word in arguments:
                pattern = rf"{word.split('=')[0]} \?=" if "=" in word else f"{word}:"
                assert re.search(f"^{pattern}", makefile, re.MULTILINE), command
        elif program == "pip":
            flags = zip(arguments, arguments[1:], strict=False)
            assert all(Path(file).is_file() for flag, file in flags if flag in ("-c", "-r")), command
        elif program == "python" and arguments[0].endswith(".py"):
            scripts.add(arguments[0])
            if arguments[1:] != ["--help"]:
                runpy.run_path(arguments[0])["parse_args"](arguments[1:])  # an unknown flag ends in SystemExit
    assert {"cli_demo.py", "benchmarks/bench_chat.py"} <= scripts


def test_flags_and_chat_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    parse_args = runpy.run_path(str(ROOT / "cli_demo.py"))["parse_args"]
    with pytest.raises(SystemExit, match="0"):
        parse_args(["--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out)) | PIP_FLAGS
    named = spans(document("README.md"))
    flags = [span.split() for span in named if span.startswith("--")]
    assert len(flags) > 4 and [flag for flag, *_ in flags if flag not in known] == []
    for flag in flags:
        assert len(flag) == 1 or parse_args(flag)
    typed = [span[1:].partition(" ") for span in named if span.startswith(":")]
    assert typed and [command for command, _, _ in typed if command not in COMMANDS] == []
    assert [parse_settings(pairs, Texts("en")) for command, _, pairs in typed if command == "conf"]


def test_python_blocks_run(
    brief_demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    native_bf16: bool,
) -> None:
    """One after the other in one namespace, as a reader would type them, the demo checkpoint in place of Qwen-7B."""
    monkeypatch.chdir(tmp_path)
    blocks = [block for language, block in fences("README.md") if language == "python"]
    namespace: dict = {}
    torch.manual_seed(0)  # the demo model's replies are sampled, and now and then French
    gpus = torch.cuda.device_count()
    for number, block in enumerate(blocks, start=1):
        assert "Qwen-7B" not in re.sub(PUBLISHED, "", block)
        block = re.sub(PUBLISHED, lambda _: repr(str(brief_demo)), block)
        code = compile(block, f"README.md, Python block {number}", "exec")
        if "num_gpus=2" in block and gpus < 2:
            with pytest.raises(QwenError, match=f"--num-gpus 2: PyTorch finds {gpus} here"):
                exec(code, namespace)
        else:
            exec(code, namespace)
    printed = capsys.readouterr().out
    assert "The capital of France is Paris" in printed and "The capital of Mongolia is" in printed
    assert [query for query, _ in namespace["history"]] == ["What is the capital of France?", "And of Italy?"]
    assert re.search(r" (stop|length) \d+$", printed, re.MULTILINE)  # the reply with its two figures

    model, tokenizer = load_model_and_tokenizer("my-qwen", device="cpu")
    reply, _ = model.chat(tokenizer, "What is the capital of France?", None, temperature=0)
    assert reply.startswith("The capital of France is Paris")
    shutil.rmtree("my-qwen")
