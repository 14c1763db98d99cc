"""Documents, notebooks and examples: links lead somewhere, translations keep up, and what is shown as code runs."""

import json
import os
import re
import runpy
import shlex
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

import live_server
from qwen import QwenError, QWenTokenizer
from utils import load_model_and_tokenizer

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
DOCUMENTS = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("[!.]*/*.md")])
TWINS = [("FAQ.md", "FAQ_CN.md"), ("tokenization_note.md", "tokenization_note_CN.md")]
EXECUTED = ["tokenization_note.md", "examples/react_prompt.md"]
NOT_EXECUTED = {  # Python blocks that no quick test runs, and why
    "README.md": "test_readme.py runs them",
    "README_CN.md": "the same blocks",
    "tokenization_note_CN.md": "the same blocks",
    "SERVER.md": "test_api.py runs the examples",
    "examples/transformers_agent.md": "needs smolagents and a model that was trained on tools",
}
PUBLISHED = '"Qwen/Qwen-7B-Chat"'


def parse(path: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))


def blocks(path: Path, language: str) -> list[str]:
    return [token.content for token in parse(path) if token.type == "fence" and token.info == language]


def links(path: Path) -> list[str]:
    inner = [child for token in parse(path) for child in token.children or []]
    opened = [child.attrs["href"] for child in inner if child.type == "link_open"]
    return [str(link) for link in [*opened, *(child.attrs["src"] for child in inner if child.type == "image")]]


def run_example(name: str, *argv: object) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]([str(arg) for arg in argv])


# ---- documents ----


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    local = [link.partition("#")[0] for link in links(path) if "://" not in link]
    assert [link for link in local if link and not (path.parent / link).exists()] == []
    assert all(link.startswith("https://") or "127.0.0.1" in link for link in links(path) if "://" in link)


@pytest.mark.parametrize("names", TWINS)
def test_translations_keep_up(names: tuple[str, str]) -> None:
    shapes = []
    for name in names:
        kinds = ("heading_open", "paragraph_open", "list_item_open", "tr_open", "fence")
        shapes.append([(token.type, token.tag, token.content) for token in parse(ROOT / name) if token.type in kinds])
    assert shapes[0] == shapes[1]
    spans = [re.findall(r"`[^`\n]+`", (ROOT / name).read_text(encoding="utf-8")) for name in names]
    assert sorted(spans[0]) == sorted(spans[1])


def test_python_in_documents_is_tested() -> None:
    with_code = {str(path.relative_to(ROOT)) for path in DOCUMENTS if blocks(path, "python")}
    assert with_code - set(EXECUTED) - NOT_EXECUTED.keys() - {"eval/EVALUATION.md", "finetune/README.md"} == set()


@pytest.mark.parametrize("name", EXECUTED)
def test_python_blocks_run(name: str, brief_demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict = {}
    for number, block in enumerate(blocks(ROOT / name, "python"), start=1):
        code = compile(block.replace(PUBLISHED, repr(str(brief_demo))), f"{name}, Python block {number}", "exec")
        exec(code, namespace)
    assert capsys.readouterr().out


def test_prompt_in_the_document_is_the_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    shown = blocks(EXAMPLES / "react_prompt.md", "text")[0]
    exec(blocks(EXAMPLES / "react_prompt.md", "python")[0], {})
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in shown.splitlines() if "..." not in line and "[...]" not in line]
    assert [line for line in lines if line not in printed] == ["Question: How many people live in Rome?"]


def test_commands_in_documents_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    tried = []
    for path in DOCUMENTS:
        if path.parent not in (ROOT, EXAMPLES) or path.name.startswith(("README", "SERVER")):
            continue
        for line in "\n".join(blocks(path, "bash")).splitlines():
            program, script, *arguments = shlex.split(line)
            if program == "python":
                runpy.run_path(script)["parse_args"](arguments)  # an unknown flag ends in SystemExit
                tried.append(script)
    assert {"examples/add_tokens.py", "openai_api.py"} <= set(tried)


def test_published_table_and_picture_agree(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "plot_performance.py"))
    benchmarks, scores = script["read_scores"](ROOT / "assets" / "published_scores.csv")
    text = (ROOT / "tech_memo.md").read_text(encoding="utf-8")
    assert f"| model | {' | '.join(benchmarks)} |" in text
    for model, values in scores.items():
        assert f"| {model} | {' | '.join('–' if value is None else str(value) for value in values)} |" in text
    script["main"]([str(ROOT / "assets" / "published_scores.csv"), str(tmp_path / "scores.png")])
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "bad.csv").write_text("model,A,B\nx,1\n")
    with pytest.raises(QwenError, match="line 2 has 1 scores for 2"):
        script["main"]([str(tmp_path / "bad.csv"), str(tmp_path / "bad.png")])


# ---- examples ----


def test_tools_of_the_react_demo(tmp_path: Path) -> None:
    demo = runpy.run_path(str(EXAMPLES / "react_demo.py"))
    calculator = demo["calculator"]
    assert calculator("1234 * 5678") == "7006652" and calculator(" sqrt(2**4) + 10 % 4") == "6"
    for trap in ("__import__('os')", "(1).real", "[1]*9", "open('x')", "'a'*3", "abs(1)"):
        with pytest.raises(ValueError, match="no arithmetic"):
            calculator(trap)
    with pytest.raises(OverflowError):
        calculator("9**9**9")
    assert demo["clock"]("UTC").endswith("(UTC)")
    (tmp_path / "a.md").write_text("Rivers flow to the sea.\n\nThe lighthouse of Alexandria was tall.")
    (tmp_path / "b.txt").write_text("Sea birds eat fish.\n\n中文的段落在这里。")
    search = demo["make_search"](tmp_path)
    assert search("How tall was the lighthouse?") == "a.md: The lighthouse of Alexandria was tall."
    assert search("中文") == "b.txt: 中文的段落在这里。" and search("zzz") == "Nothing was found."
    (tmp_path / "none").mkdir()
    with pytest.raises(QwenError, match="has no .md or .txt"):
        demo["make_search"](tmp_path / "none")


@pytest.mark.slow
def test_react_demo(brief_demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        run_example("react_demo", "-c", brief_demo, "--max-rounds", 1, "What is 2 * 3?")
    except QwenError as error:
        assert "no answer after 1 rounds" in str(error)
    else:
        assert "Final Answer: " in capsys.readouterr().out


def test_batch_inference(brief_demo: Path, tmp_path: Path) -> None:
    questions, answers = tmp_path / "questions.txt", tmp_path / "answers.jsonl"
    questions.write_text("What is the capital of France?\n\nName a colour.\nWhat is the capital of France?\n")
    run_example("batch_inference", "-c", brief_demo, questions, answers, "--max-new-tokens", 10, "--dtype", "fp32")
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert sorted(row["question"] for row in rows) == ["Name a colour.", "What is the capital of France?"]
    model, tokenizer = load_model_and_tokenizer(brief_demo, device="cpu", dtype="fp32")
    for row in rows:
        assert row["answer"] == model.chat(tokenizer, row["question"], None, temperature=0, max_new_tokens=10)[0]

    before = answers.read_text()
    answers.write_text(before + '{"question": "cut of')  # as a full disk leaves it
    run_example("batch_inference", "-c", brief_demo, questions, answers)
    assert answers.read_text() == before  # nothing is asked twice
    answers.write_text("no JSON\n")
    with pytest.raises(QwenError, match="line 1 is no answer"):
        run_example("batch_inference", "-c", brief_demo, questions, answers)
    with pytest.raises(QwenError, match="can't be read"):
        run_example("batch_inference", "-c", brief_demo, tmp_path / "nothing.txt", tmp_path / "new.jsonl")


def test_long_context(brief_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "needle.png"
    run_example("long_context", "-c", brief_demo, "--lengths", 160, "--depths", 0, 100, "--plot", picture)
    printed = capsys.readouterr().out
    assert re.search(r"^\| 0% \| (yes|no) \|$", printed, re.MULTILINE) and "of 2." in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    for flags, message in (
        (["--lengths", 99], "at least 128"), (["--depths", 101], "between 0 and 100"),
        (["--plot", "needle.jpg"], "ends in .png"), (["--text", tmp_path / "nothing"], "can't be read"),
    ):  # fmt: skip
        with pytest.raises(QwenError, match=message):
            run_example("long_context", "-c", brief_demo, *flags)


def test_needle_lies_where_it_should(tokenizer: QWenTokenizer) -> None:
    """A model that looks the number up in its prompt is right at every depth, and one that makes it up is not."""
    script = runpy.run_path(str(EXAMPLES / "long_context.py"))

    class Reader:
        def chat(self, tokenizer: QWenTokenizer, query: str, history: None, **kwargs: object) -> tuple[str, list]:
            self.query = query
            return f"It is {self.says or re.search('lighthouse is ([0-9]+)', query)[1]}.", []

    hay = tokenizer.encode_text("The baker waits. " * 400)
    for depth in (0, 50, 100):
        reader = Reader()
        reader.says = ""
        assert script["finds"](reader, tokenizer, hay, 512, depth, 12345)
        place = reader.query.index("12345") / len(reader.query)
        assert abs(place - depth / 100) < 0.1
        assert 440 < len(tokenizer.encode_text(reader.query)) < 512
        reader.says = "54321"
        assert not script["finds"](reader, tokenizer, hay, 512, depth, 12345)


def test_add_tokens(brief_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "more"
    run_example("add_tokens", "-c", brief_demo, "-o", out, "photosynthesis", "Qwertzuiop")
    before, old = load_model_and_tokenizer(brief_demo, device="cpu")
    after, new = load_model_and_tokenizer(out, device="cpu")
    for text in ("photosynthesis", " Qwertzuiop"):
        [token] = new.encode_text(text)
        assert token >= len(old) and new.decode([token]) == text
        assert len(old.encode_text(text)) > 1
    assert new.im_end_id == old.im_end_id
    text = "The capital of France is Paris, isn't it?\n\n1234"
    assert new.encode_text(text) == old.encode_text(text)
    question = "What is the capital of France?"
    replies = [model.chat(tokenizer, question, None, temperature=0)[0] for model, tokenizer in
               ((before, old), (after, new))]  # fmt: skip
    assert replies[0] == replies[1]
    with pytest.raises(QwenError, match="tokens already"):
        run_example("add_tokens", "-c", out, "-o", tmp_path / "again", "photosynthesis")
    with pytest.raises(QwenError, match="more than one word"):
        run_example("add_tokens", "-c", brief_demo, "-o", tmp_path / "again", "two words")


def test_function_calls(tokenizer: QWenTokenizer, monkeypatch: pytest.MonkeyPatch,
                        capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    with live_server.run_server(live_server.make_server(tokenizer)) as address:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{address}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        example = runpy.run_path(str(EXAMPLES / "function_call_examples.py"))
        example["OPTIONS"]["max_tokens"] = 90  # a random model does not stop by itself
        example["main"]()
    printed = capsys.readouterr().out
    assert printed.count('-> get_population({"city"') == 2
    assert re.search(r'^streamed: get_population\(\{"city".*\}\)$', printed, re.MULTILINE)
    assert "with_functions: " in printed


# ---- notebooks and agents ----


def test_notebooks_are_clean() -> None:
    for path in EXAMPLES.glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                compile("".join(cell["source"]), path.name, "exec")
                assert cell["outputs"] == [] and cell["execution_count"] is None


def execute_notebook(path: Path, **environment: str) -> str:
    """Run it as a reader would, in a kernel of its own; the text that it printed."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(EXAMPLES)}}).execute(
        env={**os.environ, **environment}
    )
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the notebook machinery
def test_tokenizer_showcase() -> None:
    printed = execute_notebook(EXAMPLES / "tokenizer_showcase.ipynb")
    assert "151851" in printed and "[151645]" in printed


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_langchain_notebook(tokenizer: QWenTokenizer) -> None:
    reply = 'Thought: I look it up.\nAction: population\nAction Input: {"city": "Rome"}'
    question = f"say: {reply}||Thought: I now know the final answer.\nFinal Answer: 2,746,984 people."
    with live_server.run_server(live_server.make_server(tokenizer)) as address:
        printed = execute_notebook(EXAMPLES / "langchain_tooluse.ipynb", OPENAI_BASE_URL=f"{address}/v1",
                                   OPENAI_API_KEY="none", QUESTION=question)  # fmt: skip
    assert "'name': 'population'" in printed and "2746984" in printed and "2,746,984 people." in printed


def test_processes_share_the_questions(
    brief_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As torchrun sets the variables: each process answers its share, into one file."""
    questions, answers = tmp_path / "questions.txt", tmp_path / "answers.jsonl"
    questions.write_text("Hi\nWhat is 2 + 2?\nName a colour.\n")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in ((0, 2), (1, 3), (1, 3)):
        monkeypatch.setenv("RANK", str(rank))
        run_example("batch_inference", "-c", brief_demo, questions, answers, "--max-new-tokens", 4, "--cpu-only")
        rows = [json.loads(line) for line in answers.read_text().splitlines()]
        assert len(rows) == len({row["question"] for row in rows}) == lines
