"""Translation, tool use, the datasets library and run_all: against sacrebleu's and rouge-score's own figures."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

import golden
from eval import evaluate_mmlu, evaluate_plugin, evaluate_wmt22, run_all
from eval.evaluate_plugin import EvaluatePlugin
from eval.evaluate_wmt22 import EvaluateWmt22
from eval.sources import Origin, read_hub
from eval.task import Sample
from qwen import QwenError, QWenTokenizer

DATA = golden.DATA / "eval"
ENGLISH = ["The cat sat on the mat.", "It rains in the town.", "He bought three red apples.", "We met her at noon."]
ENGLISH += ["The train was late again.", "Nobody knew the answer."]
CHINESE = [
    "猫坐在垫子上。",
    "镇上下雨了。",
    "他买了三个红苹果。",
    "我们中午见到了她。",
    "火车又晚点了。",
    "没有人知道答案。",
]


def arguments(**more: Any) -> Namespace:
    defaults = {"protocol": "standard", "subjects": None, "limit": None, "seed": 1, "version": "20231206"}
    return Namespace(**{**defaults, **more})


# ---- translation ----


@pytest.fixture
def wmt(tmp_path: Path) -> Path:
    for name, lines in (("zh-en.src", CHINESE), ("zh-en.ref", ENGLISH), ("en-zh.src", ENGLISH), ("en-zh.ref", CHINESE)):
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_translation_prompt(wmt: Path) -> None:
    """Five other pairs, the same for the same seed, then the sentence."""
    task = EvaluateWmt22(arguments(data=wmt, subjects=["en-zh"]))
    sample = task.load()[2]
    prompt = task.question(sample)
    *shots, asked = prompt.split("\n\n")
    assert asked == "English phrase: He bought three red apples.\nChinese phrase:"
    expected = {f"English phrase: {e}\nChinese phrase: {c}" for e, c in zip(ENGLISH, CHINESE, strict=True)}
    assert len(shots) == 5 and set(shots) == {shot for shot in expected if "apples" not in shot}
    again = EvaluateWmt22(arguments(data=wmt, subjects=["en-zh"], limit=3)).load()[2]
    other = EvaluateWmt22(arguments(data=wmt, subjects=["en-zh"], seed=2)).load()[2]
    assert task.question(again) == prompt != task.question(other)


def test_bleu_is_sacrebleus(wmt: Path) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    jieba = pytest.importorskip("jieba")
    jieba.setLogLevel("ERROR")
    task = EvaluateWmt22(arguments(data=wmt))
    samples = task.load()
    texts = [*ENGLISH[:3], *(text.replace("at", "by") for text in ENGLISH[3:])]
    texts += [*CHINESE[:3], *(text.replace("了", "过") for text in CHINESE[3:])]
    verdicts = [task.judge(s, {"text": f" {text} "}) for s, text in zip(samples, texts, strict=True)]
    scores = {score.name: score for score in task.scores(samples, verdicts)}
    words = [[" ".join(jieba.cut(text)) for text in side] for side in (texts[6:], CHINESE)]
    assert {name: score.value for name, score in scores.items()} == pytest.approx(
        {
            "zh-en, BLEU": sacrebleu.corpus_bleu(texts[:6], [ENGLISH]).score,
            "en-zh, BLEU of jieba words": sacrebleu.corpus_bleu(words[0], [words[1]]).score,
            "en-zh, BLEU (sacrebleu, tokenize=zh)": sacrebleu.corpus_bleu(texts[6:], [CHINESE], tokenize="zh").score,
        }
    )
    assert all(0 < score.value < 100 and score.stderr > 0 for score in scores.values())


def test_missing_translation_file(tmp_path: Path) -> None:
    with pytest.raises(QwenError, match="zh-en.src is missing: -d takes the directory of WMT22"):
        evaluate_wmt22.main(["-c", "demo", "-d", str(tmp_path)])


# ---- tool use ----

WANTED = {"query": "red cats", "count": 3}
RIGHT = f"Thought: I search.\nAction: search\nAction Input: {json.dumps(WANTED)}\nObservation: none"


@pytest.mark.parametrize(
    ("reply", "right", "published"),
    [
        ('Thought: so.\nAction: search\nAction Input: {"count": 3, "query": "red cats"}', 1, 1),
        ('Thought: so.\nAction: Search \nAction Input: {"query": "blue cats", "count": 3}', 1, 1),
        ('Thought: so.\nAction: draw\nAction Input: {"query": "red cats", "count": 3}', 0, 0),
        ('Action: search\nAction Input: {"query": "red cats", "count": 3}', 1, 0),  # no newline before it
        ("Thought: I know it.\nFinal Answer: cats", 0, 0),
        ("", 0, 0),
    ],
)
def test_right_actions(tokenizer: QWenTokenizer, reply: str, right: int, published: int) -> None:
    """Tool and Rouge-L against rouge-score itself, on the tokens' texts, with keys in order."""
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    pytest.importorskip("json5")
    sample = Sample("positive/0", "positive", {"prompt": "?", "response": RIGHT})
    for protocol, value in (("standard", right), ("qwen2023", published)):
        task = EvaluatePlugin(arguments(data=None, protocol=protocol))
        task.tokenizer = tokenizer
        verdict = task.judge(sample, {"text": reply})
        assert verdict.value == value
        given = json.loads(reply[reply.index("{") :]) if "{" in reply else None
        texts = ["" if x is None else json.dumps(x, sort_keys=True) for x in (WANTED, given)]
        split = [" ".join(tokenizer.decode([i]) for i in tokenizer.encode(text)).split() for text in texts]
        numbers = {word: str(i) for i, word in enumerate(dict.fromkeys(split[0] + split[1]))}  # words it does not cut
        wanted, found = (" ".join(numbers[word] for word in words) for words in split)
        expected = rouge_scorer.RougeScorer(["rougeL"]).score(wanted, found)["rougeL"].fmeasure
        assert verdict.parts["rouge"] == pytest.approx(expected)


def test_needless_actions_and_scores() -> None:
    task = EvaluatePlugin(arguments(data=None))
    samples = [Sample(f"negative/{i}", "negative", {"prompt": "?"}) for i in range(2)]
    verdicts = [task.judge(s, {"text": text}) for s, text in zip(samples, (RIGHT, "It is 4."), strict=True)]
    [score] = task.scores(samples, verdicts)
    assert (score.name, score.value, score.count) == ("needless action", 50, 2)


def test_tool_questions_are_read(tmp_path: Path) -> None:
    pytest.importorskip("json5")
    rows = {"positive": {"prompt": "Which?", "response": RIGHT}, "negative": {"prompt": "Hi"}}
    for part, row in rows.items():
        (tmp_path / f"exam_plugin_v20231206_react_{part}.jsonl").write_text(json.dumps(row) + "\n")
    task = EvaluatePlugin(arguments(data=tmp_path))
    assert [(s.id, task.question(s)) for s in task.load()] == [("positive/0", "Which?"), ("negative/0", "Hi")]
    with pytest.raises(QwenError, match="this set is on no hub: download it from https"):
        evaluate_plugin.main(["-c", "demo"])
    with pytest.raises(QwenError, match="exam_plugin_v1_react_positive.jsonl is missing"):
        evaluate_plugin.main(["-c", "demo", "-d", str(tmp_path), "--version", "20230803"])


# ---- the datasets library ----


def test_rows_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set in the hub's layout, here a directory, gives the questions of the official files."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from_files = evaluate_mmlu.EvaluateMmlu(arguments(data=DATA / "mmlu", subjects=["virology"]))
    wanted = from_files.load()
    for split, rows in (("dev", from_files.shots["virology"]), ("test", [sample.row for sample in wanted])):
        folder = tmp_path / "hub" / "virology"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            {"question": r["question"], "subject": "virology", "choices": [r[c] for c in "ABCD"],
             "answer": "ABCD".index(r["answer"])} for r in rows
        ]  # fmt: skip
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = {
        "config_name": "virology",
        "data_files": [{"split": s, "path": f"virology/{s}.jsonl"} for s in ("dev", "test")],
    }
    (tmp_path / "hub" / "README.md").write_text(f"---\nconfigs: {json.dumps([card])}\n---\n")
    task = evaluate_mmlu.EvaluateMmlu(arguments(data=None, subjects=["virology"]))
    task.origin = Origin("MMLU", "x", hub=str(tmp_path / "hub"))
    samples = task.load()
    assert samples == wanted and task.question(samples[3]) == from_files.question(wanted[3])


def test_hub_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    origin = Origin("MMLU", "https://example.org/data.tar", hub=str(tmp_path / "nothing"))
    with pytest.raises(QwenError, match="MMLU could not be loaded .* download it from https://example.org/data.tar"):
        read_hub(origin, "x", "test")


# ---- all of them ----


def test_summary() -> None:
    """A row for each checkpoint, the published weights below, each value under its benchmark."""
    score = {"name": "accuracy", "value": 12.346, "stderr": 1.0, "count": 9}
    results: dict[str, dict[str, Any]] = {"one": {"chat_gsm8k": {"scores": [score]}, "chat_humaneval": {"scores": []}}}
    lines = run_all.summary({**results, "two": {}}, ["chat_gsm8k", "chat_humaneval"]).splitlines()
    assert lines[0] == "| | chat_gsm8k | chat_humaneval |"
    assert lines[2:4] == ["| one | 12.35 ± 1.00 | – |", "| two | – | – |"]
    assert "| published, Qwen-7B-Chat, August 2023 | 41.1 | 24.4 |" in lines
    assert "| published, Qwen-7B-Chat-Int4, August 2023 | 38.1 | 23.8 |" in lines


@pytest.mark.slow  # scripts in processes of their own
def test_run_all(demo_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A benchmark in a process of its own; the second time all answers are there already; a failure is named."""
    (tmp_path / "gsm8k").symlink_to(DATA / "gsm8k")
    flags = ["-c", str(demo_checkpoint), "--benchmarks", "chat_gsm8k", "-d", str(tmp_path), "-o", str(tmp_path / "out")]
    flags += ["--", "--limit", "1", "--max-new-tokens", "3", "--device", "cpu", "--dtype", "fp32"]
    run_all.main(flags)
    out = capfd.readouterr().out
    assert f"| {demo_checkpoint} | 0.00 ± 0.00 |" in out and "| published, Qwen-7B-Chat, 2023-09-25 | 50.3 |" in out
    [journal] = tmp_path.glob("out/*/samples.jsonl")
    answers = journal.read_bytes()
    run_all.main(flags)
    again = capfd.readouterr()
    assert again.out == out and journal.read_bytes() == answers and "sample/s" not in again.err
    with pytest.raises(QwenError, match="chat_mmlu of .* ended with status 1"):
        run_all.main(["-c", str(tmp_path), "--benchmarks", "chat_mmlu", "-d", str(tmp_path)])
    assert "mmlu/test/abstract_algebra_test.csv is missing" in capfd.readouterr().err
