"""Prompts and scoring of the benchmarks, against what the publisher's scripts and the official scorers say.

`data/eval/published.json` holds outputs of the publisher's own functions for the questions and replies in it.
"""

import hashlib
import json
from argparse import Namespace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

import golden
from eval.coding import chat_program, published_body, published_cut
from eval.evaluate_ceval import EvaluateCeval
from eval.evaluate_chat_ceval import EvaluateChatCeval
from eval.evaluate_chat_gsm8k import EvaluateChatGsm8k
from eval.evaluate_chat_mmlu import EvaluateChatMmlu
from eval.evaluate_cmmlu import EvaluateCmmlu
from eval.evaluate_gsm8k import EvaluateGsm8k
from eval.evaluate_mmlu import EvaluateMmlu
from eval.letters import published_letter, standard_letter
from eval.math_answers import last_number, published_chat_number, published_last_number
from eval.scores import mean
from eval.task import Sample, Task, Verdict
from qwen import QWenTokenizer

DATA = golden.DATA / "eval"
PUBLISHED = json.loads((DATA / "published.json").read_text(encoding="utf-8"))
CHOICES = {"A": "Bladder", "B": "Kidney", "C": "Ureter", "D": "None of the above"}


def make(task: type[Task], folder: Path | None = None, **more: Any) -> Task:
    defaults = {"data": folder, "protocol": "standard", "subjects": None, "limit": None, "split": "val"}
    return task(Namespace(**{**defaults, **more}))


@pytest.fixture(scope="module")
def chinese_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The question and shots of the goldens in the layouts of C-Eval and CMMLU, as every subject."""
    folder = tmp_path_factory.mktemp("chinese")
    row, dev = PUBLISHED["zh_rows"]["row"], PUBLISHED["zh_rows"]["dev"]
    for layout, head in (("ceval", "id,question,A,B,C,D,answer"), ("cmmlu", ",Question,A,B,C,D,Answer")):
        for split, rows in (("dev", dev), ("val", [row]), ("test", [row])):
            lines = [head]
            for number, cells in enumerate(rows):
                lines.append(f"{number}," + ",".join(json.dumps(c, ensure_ascii=False) for c in cells.values()))
            text = "\n".join(lines).replace("\\n", "\n") + "\n"
            (folder / layout / split).mkdir(parents=True, exist_ok=True)
            for subject in ("logic", "law", "agronomy", "anatomy"):
                name = f"{subject}_{split}.csv" if layout == "ceval" else f"{subject}.csv"
                (folder / layout / split / name).write_text(text, encoding="utf-8")
    return folder


# ---- prompts ----


def test_mmlu_prompts() -> None:
    task = make(EvaluateMmlu, DATA / "mmlu", subjects=["abstract_algebra,virology"])
    samples = {sample.id: sample for sample in task.load()}
    assert len(samples) == 16 and len(PUBLISHED["mmlu"]) == 3
    for id, prompt in PUBLISHED["mmlu"].items():
        assert task.question(samples[id]) == prompt


def test_chat_mmlu_prompt() -> None:
    task = make(EvaluateChatMmlu, DATA / "mmlu", subjects=["virology"])
    assert {s.id: task.question(s) for s in task.load()}["virology/3"] == PUBLISHED["chat_mmlu"]["virology/3"]


@pytest.mark.parametrize(
    ("task", "layout", "subject", "name"),
    [
        (EvaluateCeval, "ceval", "logic", "ceval"),
        (EvaluateChatCeval, "ceval", "logic", "chat_ceval"),
        (EvaluateCmmlu, "cmmlu", "agronomy", "cmmlu"),
    ],
)
def test_chinese_prompts(chinese_files: Path, task: type[Task], layout: str, subject: str, name: str) -> None:
    task = make(task, chinese_files / layout, subjects=[subject])
    [sample] = task.load()
    assert task.question(sample) == PUBLISHED[name] and sample.row["answer"] == "B"


def test_secret_answers_make_a_submission(chinese_files: Path) -> None:
    """C-Eval's test set has no column of answers: no score, but a file for the leaderboard."""
    for path in (chinese_files / "ceval" / "test").iterdir():
        head, *rows = path.read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join(row.rpartition(",")[0] for row in (head, *rows)) + "\n", encoding="utf-8")
    task = make(EvaluateCeval, chinese_files / "ceval", subjects=["logic", "law"], split="test")
    samples = task.load()
    verdicts = [task.judge(sample, {"logprobs": {"A": -1, "B": -2, "C": -0.5, "D": -3}}) for sample in samples]
    assert task.question(samples[0]) == PUBLISHED["ceval"] and task.scores(samples, verdicts) == []
    submission = json.loads(task.exports(samples, verdicts)["submission.json"])
    assert submission == {"logic": {"0": "C"}, "law": {"0": "C"}}


def test_gsm8k_prompts() -> None:
    known = PUBLISHED["gsm8k"]
    sample = Sample("0", "gsm8k", {"question": known["question"]})
    prompt = make(EvaluateGsm8k).question(sample)
    assert prompt.endswith(known["tail"]) and hashlib.sha256(prompt.encode()).hexdigest() == known["base"]
    prompt = make(EvaluateChatGsm8k, use_fewshot=True).question(sample)
    assert hashlib.sha256(prompt.encode()).hexdigest() == known["chat_4_shot"]
    assert make(EvaluateChatGsm8k, use_fewshot=False).question(sample) == known["question"]


def test_letters_are_the_published_tokens(tokenizer: QWenTokenizer) -> None:
    assert [tokenizer.encode_text(letter) for letter in EvaluateMmlu.choices] == [[362], [425], [356], [422]]
    assert [tokenizer.encode_text(letter) for letter in EvaluateCeval.choices] == [[32], [33], [34], [35]]


def test_long_prompts_lose_shots_not_their_header(tokenizer: QWenTokenizer) -> None:
    """standard drops whole shots from the end; qwen2023 keeps the last 2047 tokens, as the published script did."""
    task = make(EvaluateMmlu, DATA / "mmlu", subjects=["virology"])
    sample = task.load()[0]
    whole = task.prompt(sample, tokenizer, 8192).ids
    ids = task.prompt(sample, tokenizer, len(whole) - 1).ids
    text, full = tokenizer.decode(ids), task.question(sample)
    assert text.startswith(full[: full.index("Question:")]) and text.endswith(full[full.rindex("Question:") :])
    assert text.count("Answer:") == 5 and full.startswith(text[: text.rindex("Question:")])
    assert tokenizer.decode(task.prompt(sample, tokenizer, 10).ids).count("Answer:") == 1

    published = make(EvaluateMmlu, DATA / "mmlu", subjects=["virology"], protocol="qwen2023")
    long = Sample("x", "virology", {**published.load()[0].row, "question": "word " * 2500})
    ids = tokenizer.encode_text(published.question(long))
    assert published.prompt(long, tokenizer, 8192).ids == ids[-2047:]


def test_cells_that_pandas_takes_for_missing(tmp_path: Path) -> None:
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"anatomy_{split}.csv").write_text("Which?,None,NA,1.50,null,A\n" * 5)
    rows = [
        make(EvaluateMmlu, tmp_path, subjects=["anatomy"], protocol=protocol).load()[0].row
        for protocol in ("standard", "qwen2023")
    ]
    assert [rows[0][letter] for letter in "ABCD"] == ["None", "NA", "1.50", "null"]
    assert [rows[1][letter] for letter in "ABCD"] == ["nan", "nan", "1.5", "nan"]


# ---- averages ----


def test_micro_and_macro() -> None:
    """MMLU counts every question the same, C-Eval every subject; its Hard is a part of STEM."""
    mmlu = make(EvaluateMmlu)
    row = {"answer": "A"}
    samples = [Sample(str(i), "virology" if i < 4 else "anatomy", row) for i in range(5)]
    verdicts = [Verdict(value) for value in (1.0, 1.0, 1.0, 0.0, 0.0)]
    scores = {score.name: score for score in mmlu.scores(samples, verdicts)}
    assert next(iter(scores)) == "average (micro)"
    assert scores["average (micro)"].value == 60 and scores["average (macro)"].value == 37.5
    assert scores["average (micro)"].stderr == pytest.approx(100 * (0.6 * 0.4 / 5) ** 0.5)
    assert (scores["Other"].count, scores["STEM"].count) == (4, 1)

    ceval = make(EvaluateCeval)
    assert len(ceval.subjects) == 52 and len(mmlu.subjects) == 57 and len(make(EvaluateCmmlu).subjects) == 67
    assert len(ceval.categories["Hard"]) == 8
    samples = [Sample(str(i), name, row) for i, name in enumerate(("college_physics", "college_physics", "law"))]
    scores = {score.name: score.value for score in ceval.scores(samples, [Verdict(1.0), Verdict(0.0), Verdict(0.0)])}
    assert next(iter(scores)) == "average (macro)" and scores["average (macro)"] == 25
    assert scores["Hard"] == scores["STEM"] == 50 and scores["average (micro)"] == pytest.approx(100 / 3)


@pytest.mark.parametrize(("count", "share", "error"), [(14042, 0.567, 0.42), (1319, 0.516, 1.38), (164, 0.244, 3.35)])
def test_standard_errors(count: int, share: float, error: float) -> None:
    """In points, as they are known for the sizes of MMLU, GSM8K and HumanEval."""
    right = round(count * share)
    assert round(mean("", [1.0] * right + [0.0] * (count - right)).stderr, 2) == error


# ---- letters ----


@pytest.mark.parametrize("reply", PUBLISHED["letters_en"]["replies"])
def test_published_letters(reply: str) -> None:
    known = PUBLISHED["letters_en"]
    assert published_letter(reply, known["choices"]) == known["replies"][reply]


@pytest.mark.parametrize("reply", PUBLISHED["letters_zh"]["replies"])
def test_published_letters_in_chinese(reply: str) -> None:
    row = PUBLISHED["zh_rows"]["row"]
    choices = {letter: row[letter] for letter in "ABCD"}
    assert published_letter(reply, choices, row["question"], chinese=True) == PUBLISHED["letters_zh"]["replies"][reply]


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        (" (C) Ureter", "C"),
        ("**D**. None of the above", "D"),
        ("The answer is B.", "B"),
        ("The correct answer is: (A).", "A"),
        ("Answer: D", "D"),
        ("A is tempting, but the correct answer is C.", "C"),
        ("I would choose option B because it fits.", "B"),
        ("The answer isn't A. The answer is C.", "C"),
        ("Option D is correct.", "D"),
        ("It is the kidney.", "B"),
        ("None of the above holds.", "D"),
        ("A kidney and a bladder are organs.", None),
        ("A bird in the hand.", None),
        ("I do not know.", None),
        ("Both A and B.", None),
        ("$\\boxed{C}$", "C"),
        ("答案是B。", "B"),
        ("正确答案为：C", "C"),
        ("答案：A", "A"),
        ("应该选D选项", "D"),
        ("故选C。", "C"),
        ("B选项正确，其余错误。", "B"),
        ("不知道", None),
        ("", None),
    ],
)
def test_standard_letters(reply: str, letter: str | None) -> None:
    assert standard_letter(reply, CHOICES) == letter


# ---- numbers ----


def test_gold_answers_in_every_form() -> None:
    """All of GSM8K's right answers, as written, with separators, with a fraction of nought, as dollars, negated."""
    golds = (DATA / "gsm8k" / "golds.txt").read_text().split()
    assert len(golds) == 1319
    for gold in golds:
        value = Decimal(gold.replace(",", ""))
        whole = f"{value:,.0f}"
        forms = [
            f"He pays 3.\n#### {gold}",
            f"It is {whole}",
            f"so {whole}.00 in all.",
            f"costs ${whole}.",
            f"= {gold}",
        ]
        forms += [f"The answer is {whole}", f"**{whole}** dollars", f"2+2={whole}", f"The answer is {whole}, not 99."]
        assert [last_number(form) for form in forms] == [value] * len(forms), gold
        assert last_number(f"It fell to -{value.copy_abs():,}") == -value.copy_abs()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3.5 cups", "3.5"), ("about 3-2", "2"), ("x5", "5"), ("10,20", "20"), ("1,234,567.89", "1234567.89"),
        ("-$5", "-5"), (".5", "0.5"), ("50%", "50"), ("10.", "10"), ("(3)-4", "4"), ("The answer is 7. Or 8?", "7"),
        ("The answer is seven: 7", "7"), ("none", None), ("", None),
    ],
)  # fmt: skip
def test_last_number(text: str, value: str | None) -> None:
    assert last_number(text) == (None if value is None else Decimal(value))


def test_published_numbers() -> None:
    """With the defects: the base script reads 1,000 as 0, so 16 right answers count as wrong even to themselves."""
    base, chat = PUBLISHED["numbers_base"], PUBLISHED["numbers_chat"]
    assert {text: published_last_number(text) for text in base} == base
    assert {text: published_chat_number(text) for text in chat} == chat
    golds = [f"#### {gold}" for gold in (DATA / "gsm8k" / "golds.txt").read_text().split()]
    assert sum(published_last_number(gold) != float(last_number(gold)) for gold in golds) == 16


# ---- code ----


def test_published_completions() -> None:
    assert {text: published_cut(text) for text in PUBLISHED["cuts"]} == PUBLISHED["cuts"]
    assert {reply: published_body(reply, "add") for reply in PUBLISHED["bodies"]} == PUBLISHED["bodies"]


PROMPT = 'from math import floor\n\ndef helper(x):\n    return x\n\ndef add(a, b):\n    """Adds."""\n'


@pytest.mark.parametrize(
    "reply",
    [
        "```python\ndef add(a, b):\n    return floor(helper(a + b))\n```",
        "Sure!\n```py\nimport os\n\ndef add(a, b):\n    c = a\n\n    return c + b\n```\n```python\nadd(1, 2)\n```",
        "def add(a, b):\n    return a + b\n\nThat is all.",
        "Here it is:\n\ndef add(a, b):\n    return a + b\n",
        "```\nreturn a + b\n```",
        "    return a + b",
        "```python\ndef other(x):\n    return x\n\ndef add(a, b):\n    return other(a) + b\n```",
        "```python\n    def add(a, b):\n        return a + b\n```",
        "```python\ndef add(a, b):\n    return a + b",
        "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n```\n\nThis function adds.",
        "    return a + b\n```\nThis function adds.",
        "Sure:\n```\nreturn a + b",
        "from math import ceil\n\ndef other(x):\n    return ceil(x)\n\ndef add(a, b):\n    return other(a) + b\nfrom x",
        "Import nothing.\n\n    def add(a, b):\n        return a + b\n\nThat is all.",
        "def add(a, b):\n    return a + b\n\nOr else:\n\ndef add(a, b):\n    return a - b",
        "def add(\n    a,\n    b,\n):\n    return a + b",
    ],
)
def test_functions_in_chat_replies(reply: str) -> None:
    """Code of the replies runs, with the imports and helpers of the problem."""
    namespace: dict[str, Any] = {}
    exec(chat_program(PROMPT, "add", reply), namespace)
    assert namespace["add"](2, 3) == 5
