"""What people bring as benchmarks is read right, or refused in a sentence that names the place."""

import argparse
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from eval.evaluate_ceval import EvaluateCeval
from eval.evaluate_cmmlu import EvaluateCmmlu
from eval.evaluate_gsm8k import EvaluateGsm8k
from eval.evaluate_humaneval import EvaluateHumanEval
from eval.evaluate_mmlu import EvaluateMmlu
from eval.evaluate_ppl import parse_args as parse_perplexity
from eval.evaluate_wmt22 import EvaluateWmt22
from eval.run_folder import check_writable, fingerprint, text_hash
from eval.runner import check_questions, load_samples
from eval.task import Task
from qwen import QwenError

QUESTIONS = [
    ("What is 2 + 2?", "3", "4", "5", "6", "B"), ("Which is a colour?", "Blue", "Dog", "Run", "Nine", "A"),
    ("Which is a pet?", "Rock", "Sea", "Cat", "Air", "C"), ("What is 3 * 3?", "6", "7", "8", "9", "D"),
    ("Which is wet?", "Sand", "Water", "Wood", "Iron", "B"),
]  # fmt: skip
NAMES = ("question", "A", "B", "C", "D", "answer")


def as_csv(rows: list[tuple[Any, ...]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def with_golds(*golds: Any) -> list[tuple[Any, ...]]:
    return [(*row[:5], gold) for row, gold in zip(QUESTIONS, golds, strict=False)]


def make(task: type[Task], data: Path, **more: Any) -> Task:
    """A benchmark over these files, with the settings that all scripts have."""
    given = {"protocol": "standard", "subjects": None, "limit": None, "max_new_tokens": None, "split": "val"} | more
    return task(argparse.Namespace(data=data, **given))


def mmlu(folder: Path, test: str | bytes, dev: str | None = None) -> EvaluateMmlu:
    for split, text in (("dev", as_csv(QUESTIONS) if dev is None else dev), ("test", test)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        content = text if isinstance(text, bytes) else text.encode()
        (folder / split / f"virology_{split}.csv").write_bytes(content)
    return make(EvaluateMmlu, folder, subjects=["virology"])


@pytest.mark.parametrize("golds", [
    "BACDB", "bacdb", [" B", "A ", " c", "D", "b"], ["(B)", "[A]", "C.", "（D）", "B："], [1, 0, 2, 3, 1],
    [2, 1, 3, 4, 2],
])  # fmt: skip
@pytest.mark.parametrize("protocol", ["standard", "qwen2023"])
def test_golds_are_letters(tmp_path: Path, golds: Any, protocol: str) -> None:
    task = mmlu(tmp_path, as_csv(with_golds(*golds)))
    task.args.protocol = protocol
    samples = load_samples(task)
    assert [sample.row["answer"] for sample in samples] == list("BACDB")
    assert [task.judge(sample, {"logprobs": {" A": -2, " B": -1}}).value for sample in samples] == [1, 0, 0, 0, 1]


@pytest.mark.parametrize(("golds", "message"), [
    ("BAxDB", r"virology_test.csv, row 3: the right answer is 'x'"),
    ("BA3DB", r"row 3: the right answer is '3'"),
    (["B", "A", "", "D", "B"], r"row 3: fewer than 6 columns .* or an empty last one"),
    ([1, 2, 3, 1, 2], r"are numbers \(1, 2, 3\), and which stands for A can't be told"),
    ([0, 4, 3, 1, 2], r"which stands for A can't be told"),
])  # fmt: skip
def test_golds_that_are_none(tmp_path: Path, golds: Any, message: str) -> None:
    with pytest.raises(QwenError, match=message):
        mmlu(tmp_path, as_csv(with_golds(*golds))).load()


def test_numbers_that_are_the_texts_of_choices(tmp_path: Path) -> None:
    """Of a number that is always one of the choices nobody can say whether it counts them."""
    rows = [("How many?", "1", "0", "2", "3", gold) for gold in "0123"]
    with pytest.raises(QwenError, match="write the letters A to D"):
        mmlu(tmp_path, as_csv(rows)).load()


@pytest.mark.parametrize("names", [NAMES, ("input", "A", "B", "C", "D", "target"), [n.upper() for n in NAMES]])
def test_header_lines_are_no_questions(tmp_path: Path, names: Any) -> None:
    text = as_csv([tuple(names), *QUESTIONS])
    task = mmlu(tmp_path, "\ufeff" + text, dev=text.replace("\n", "\r\n"))
    [first, *_] = samples = task.load()
    assert len(samples) == 5 and first.row["question"] == "What is 2 + 2?"
    assert task.question(first).count("What is 2 + 2?") == 2 and "\nA. A\n" not in task.question(first)


@pytest.mark.parametrize("more", [("because it is so",), ("x", "y")])
def test_further_columns_are_refused(tmp_path: Path, more: tuple[str, ...]) -> None:
    with pytest.raises(QwenError, match=rf"has {6 + len(more)} columns, not 6"):
        mmlu(tmp_path, as_csv([(*row, *more) for row in QUESTIONS])).load()
    with pytest.raises(QwenError, match="cannot read .*Expected 6 fields in line 2"):
        mmlu(tmp_path, as_csv([QUESTIONS[0], (*QUESTIONS[1], "x")])).load()
    with pytest.raises(QwenError, match="cannot read .*Expected 7 fields in line 3"):
        ceval(tmp_path, [*QUESTIONS[:1], (*QUESTIONS[1], "x")]).load()


@pytest.mark.parametrize(("dev", "test", "message"), [
    ("", None, "virology_dev.csv is empty"), (None, "", "virology_test.csv is empty"),
    (None, as_csv([NAMES]), "virology_test.csv has no rows"),
    (None, as_csv([("", *QUESTIONS[0][1:])]), 'virology_test.csv, row 1: question is ""'),
    (None, "é,a,b,c,d,A".encode("latin-1"), "virology_test.csv .*can't decode byte"),
])  # fmt: skip
def test_files_without_questions(tmp_path: Path, dev: str | None, test: Any, message: str) -> None:
    with pytest.raises(QwenError, match=message):
        mmlu(tmp_path, as_csv(QUESTIONS) if test is None else test, dev).load()


def test_title_counts_the_solved_questions(tmp_path: Path) -> None:
    task = mmlu(tmp_path, as_csv(QUESTIONS), as_csv(QUESTIONS[:2]))
    task.load()
    assert task.title == "MMLU, 2-shot" and task.remarks == {"fewer_than_five_solved_questions": "virology (2)"}
    full = mmlu(tmp_path, as_csv(QUESTIONS))
    full.load()
    assert full.title == "MMLU, 5-shot" and full.remarks == {}


def test_archives_unpack_into_a_directory(tmp_path: Path) -> None:
    """data.tar into data/, the repositories of GSM8K and HumanEval two directories deep."""
    mmlu(tmp_path / "mmlu" / "data", as_csv(QUESTIONS))
    assert len(make(EvaluateMmlu, tmp_path / "mmlu", subjects=["virology"]).load()) == 5
    inner = tmp_path / "gsm8k" / "grade_school_math" / "data"
    inner.mkdir(parents=True)
    (inner / "test.jsonl").write_text('{"question": "x", "answer": "#### 1"}\n')
    assert len(make(EvaluateGsm8k, tmp_path / "gsm8k").load()) == 1
    twice = tmp_path / "gsm8k" / "other"
    twice.mkdir()
    (twice / "test.jsonl").write_text("")
    with pytest.raises(QwenError, match="gsm8k/test.jsonl is missing"):
        make(EvaluateGsm8k, tmp_path / "gsm8k").load()


# ---- Chinese tables ----


def ceval(folder: Path, rows: list[tuple[Any, ...]], split: str = "val", subject: str = "logic") -> EvaluateCeval:
    for each, lines in (("dev", QUESTIONS), (split, rows)):
        (folder / each).mkdir(parents=True, exist_ok=True)
        text = as_csv([("id", *NAMES), *((i, *row) for i, row in enumerate(lines))])
        (folder / each / f"{subject}_{each}.csv").write_text(text)
    return make(EvaluateCeval, folder, subjects=["logic"], split=split)


def test_names_of_columns_in_other_capitals(tmp_path: Path) -> None:
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "virology.csv").write_text(as_csv([NAMES, *QUESTIONS]))
    [first, *_] = make(EvaluateCmmlu, tmp_path, subjects=["virology"]).load()
    assert first.row == dict(zip(NAMES, QUESTIONS[0], strict=True))


def test_secret_answers_are_said_to_be(tmp_path: Path) -> None:
    task = ceval(tmp_path, with_golds(*[""] * 5), "test")
    samples = task.load()
    assert "submission.json to https://cevalbenchmark.com" in task.remarks["right_answers"]
    verdicts = [task.judge(sample, {"logprobs": {"A": -1, "B": -2}}) for sample in samples]
    assert task.scores(samples, verdicts) == [] and "submission.json" in task.exports(samples, verdicts)


def test_one_answer_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(QwenError, match="logic_val.csv, row 4: the right answer is missing"):
        ceval(tmp_path, with_golds("B", "A", "C", "", "B")).load()
    ceval(tmp_path, QUESTIONS)
    (tmp_path / "dev" / "logic_dev.csv").write_text(as_csv([NAMES, *with_golds("", "")]))
    with pytest.raises(QwenError, match="logic, dev: the solved questions have no right answers"):
        make(EvaluateCeval, tmp_path, subjects=["logic"]).load()
    ceval(tmp_path, QUESTIONS)
    task = ceval(tmp_path, with_golds(*[""] * 5), subject="law")
    task.subjects = ["logic", "law"]
    with pytest.raises(QwenError, match="law: no right answers, where other subjects have them"):
        task.load()


# ---- lines of JSON ----


def lines(folder: Path, name: str, *rows: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize(("answer", "gold"), [
    (5, 5), (12.5, 12.5), ("#### 5个", 5), ("We have \\boxed{42} of 100.", 42), ("so 7 left\n#### 1,000", 1000),
])  # fmt: skip
@pytest.mark.parametrize("protocol", ["standard", "qwen2023"])
def test_numbers_that_are_right(tmp_path: Path, answer: Any, gold: float, protocol: str) -> None:
    task = make(EvaluateGsm8k, lines(tmp_path, "test.jsonl", {"question": "x", "answer": answer}), protocol=protocol)
    [sample] = task.load()
    assert float(task.judge(sample, {"text": "The answer is 3"}).gold) == gold


@pytest.mark.parametrize(("row", "message"), [
    ({"question": "x", "answer": None}, "line 2: answer is null"),
    ({"question": None, "answer": 5}, "line 2: question is null"),
    ({"question": " ", "answer": 5}, 'question is " "'), ({"question": ["x"], "answer": 5}, "question is .*x"),
    ({"question": "x", "answer": True}, "answer is true"),
    ({"question": "x", "answer": "#### five"}, "problem 2: no number in the right answer '#### five'"),
])  # fmt: skip
def test_lines_that_ask_nothing(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(QwenError, match=message):
        make(EvaluateGsm8k, lines(tmp_path, "test.jsonl", {"question": "x", "answer": 1}, row)).load()


def test_samples_have_names_of_their_own(tmp_path: Path) -> None:
    row = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(c): pass\n"}
    task = make(EvaluateHumanEval, lines(tmp_path, "HumanEval.jsonl", row, row | {"prompt": "def g():\n"}))
    with pytest.raises(QwenError, match="has HumanEval/0 more than once"):
        load_samples(task)


# ---- translations, perplexity ----


@pytest.mark.parametrize(("source", "reference", "message"), [
    (b"x\nx\nx\n", b"y\ny\n", "zh-en.src has 3 sentences and zh-en.ref has 2"),
    ("café\n".encode("latin-1"), b"y\n", "cannot read .*zh-en.src .*can't decode"), (b"", b"", "zh-en.src is empty"),
])  # fmt: skip
def test_sides_that_don_t_fit(tmp_path: Path, source: bytes, reference: bytes, message: str) -> None:
    (tmp_path / "zh-en.src").write_bytes(source)
    (tmp_path / "zh-en.ref").write_bytes(reference)
    with pytest.raises(QwenError, match=message):
        make(EvaluateWmt22, tmp_path, subjects=["zh-en"], seed=0).load()


def test_one_token_has_no_perplexity(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_perplexity(["--text", "x", "--lengths", "1"])
    assert "--lengths must be 2 or more" in capsys.readouterr().err


# ---- runs ----


def test_the_base_is_part_of_an_adapter(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    (base / "config.json").write_text('{"model_type": "qwen"}')
    (base / "model.safetensors").write_bytes(bytes(100))
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = fingerprint(adapter)
    assert fingerprint(adapter) == before
    (base / "model.safetensors").write_bytes(bytes(99) + b"\1")
    assert fingerprint(adapter) != before


def test_answers_to_other_questions_are_not_scored(tmp_path: Path) -> None:
    task = mmlu(tmp_path, as_csv(QUESTIONS))
    samples = task.load()
    answers = {s.id: {"id": s.id, "question": text_hash(task.question(s))} for s in samples}
    check_questions(task, samples, answers)
    check_questions(task, samples, {s.id: {"id": s.id} for s in samples})  # of runs that kept none
    other = mmlu(tmp_path, as_csv([("Which is dry?", *QUESTIONS[0][1:]), *QUESTIONS[1:]]))
    with pytest.raises(QwenError, match=r"1 of 5 questions are others than those that were answered, virology/0"):
        check_questions(other, other.load(), answers)


def test_outputs_that_can_t_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(QwenError, match=r"--output .*file.* can't be written \("):
            check_writable(path, "--output")
    check_writable(tmp_path / "new" / "deep", "--output")
    assert list((tmp_path / "new" / "deep").iterdir()) == []
