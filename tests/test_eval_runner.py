"""The runner: batches equal single prompts, a killed run ends in the same files, and so do several processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import golden
from eval import evaluate_chat_gsm8k, evaluate_gsm8k, evaluate_hf_agent, evaluate_humaneval, evaluate_mmlu
from eval.engine import Engine, plan_batches
from eval.run_folder import RunFolder, fingerprint
from eval.task import Prompt
from qwen import QwenError, QWenLMHeadModel, QWenTokenizer
from utils import load_model_and_tokenizer

ROOT = Path(__file__).parent.parent
DATA = golden.DATA / "eval"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: QWenTokenizer) -> Path:
    """A checkpoint of random weights that knows the real vocabulary and is trained, so to say, to 2048 tokens."""
    return golden.random_checkpoint(tmp_path_factory.mktemp("tiny"), tokenizer, 2048)


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> tuple[QWenLMHeadModel, QWenTokenizer]:
    return load_model_and_tokenizer(tiny, device="cpu", dtype="fp32")


def mmlu_flags(checkpoint: Path, output: Path) -> list[str]:
    flags = ["-c", str(checkpoint), "-d", str(DATA / "mmlu"), "-o", str(output), "--device", "cpu", "--dtype", "fp32"]
    return [*flags, "--subjects", "abstract_algebra", "virology", "--batch-size", "2"]


def run_files(output: Path) -> dict[str, bytes]:
    [folder] = output.iterdir()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- batches ----


def test_plan() -> None:
    """Families apart, longest first, every prompt once."""
    prompts = [Prompt(list(range(n)), "ab"[n % 2]) for n in (50, 61, 90, 41, 70, 33)]
    assert plan_batches(prompts, 2) == [(2, 4), (0,), (1, 3), (5,)]
    assert plan_batches(prompts) == [(2, 4, 0), (1, 3, 5)]


def computed(model: QWenLMHeadModel, sizes: list[int]) -> Any:
    """A hook that notes how many tokens each call of the model computes."""
    return model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(args[0].numel()), with_kwargs=True)


def test_batched_equals_unbatched(loaded: tuple[QWenLMHeadModel, QWenTokenizer]) -> None:
    """Choices and greedy texts, five-shot and eight-shot, in fp32; the examples are read once."""
    args = evaluate_mmlu.parse_args(mmlu_flags(Path("demo"), Path("out")))
    task = evaluate_mmlu.EvaluateMmlu(args)
    prompts = [task.prompt(sample, loaded[1], 8192) for sample in task.load()]
    for batch in plan_batches(prompts, 8):
        some, sizes = [prompts[i].ids for i in batch], []
        hook = computed(loaded[0], sizes)
        together = Engine(*loaded, task.choices).answer(some)
        hook.remove()
        assert sum(sizes) < 0.5 * sum(map(len, some))
        for ids, record in list(zip(some, together, strict=True))[::3]:
            [alone] = Engine(*loaded, task.choices).answer([ids])
            assert alone["logprobs"] == pytest.approx(record["logprobs"], abs=1e-3)
            assert max(alone["logprobs"], key=alone["logprobs"].get) == max(
                record["logprobs"], key=record["logprobs"].get
            )

    task = evaluate_gsm8k.EvaluateGsm8k(evaluate_gsm8k.parse_args(["-d", str(DATA / "gsm8k"), "--limit", "3"]))
    prompts = [task.prompt(sample, loaded[1], 8192).ids for sample in task.load()]
    together, alone = (
        Engine(*loaded, stops=task.stops(loaded[1]), max_new_tokens=12).answer(prompts) for _ in range(2)
    )
    assert together == alone


def test_choices_have_the_log_probabilities_of_the_model(loaded: tuple[QWenLMHeadModel, QWenTokenizer]) -> None:
    model, tokenizer = loaded
    prompts = [tokenizer.encode_text(text) for text in ("The answer is", "One two three four", "Blue or green:")]
    for ids, record in zip(prompts, Engine(model, tokenizer, (" A", " B")).answer(prompts), strict=True):
        logprobs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        expected = {choice: logprobs[tokenizer.encode_text(choice)[0]].item() for choice in (" A", " B")}
        assert record == {"logprobs": pytest.approx(expected, abs=1e-4), "prompt_tokens": len(ids)}


@pytest.mark.parametrize("kernels", [True, False])
def test_rows_that_have_ended_leave_the_batch(tiny: Path, kernels: bool) -> None:
    """Replies of very different lengths are those of single prompts, and later steps have fewer rows."""
    model, tokenizer = load_model_and_tokenizer(tiny, device="cpu", dtype="fp32")
    if not kernels:
        model.transformer.cpu_decoder = None
    prompts = [tokenizer.encode_text(text) for text in ("One two three", "A B C", "Red, green,", "Up and", "In")]
    free = [Engine(model, tokenizer, max_new_tokens=12).answer([ids])[0]["text"] for ids in prompts]
    stops = [free[row][at : at + 4] for row, at in ((0, 3), (2, 14), (3, 30))]
    engine = Engine(model, tokenizer, stops=stops, max_new_tokens=12)
    alone = [engine.answer([ids])[0] for ids in prompts]
    lengths = [record["completion_tokens"] for record in alone]
    assert len(set(lengths)) >= 4 and max(lengths) == 12

    sizes: list[int] = []
    hook = computed(model, sizes)
    together = Engine(model, tokenizer, stops=stops, max_new_tokens=12).answer(prompts)
    hook.remove()
    assert together == alone
    assert sizes[1] == sum(length > 1 for length in lengths) and sizes[-1] <= 2 and sorted(sizes, reverse=True) == sizes


def test_memory_that_runs_out_costs_no_answer(loaded: tuple[QWenLMHeadModel, QWenTokenizer]) -> None:
    model, tokenizer = loaded

    def limit(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if args[0].numel() > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    prompts = [tokenizer.encode_text(text) for text in ("One two", "A B C", "Red, green,", "Up and", "In")]
    expected = Engine(model, tokenizer, (" A", " B")).answer(prompts)
    engine = Engine(model, tokenizer, (" A", " B"))
    hook = model.register_forward_pre_hook(limit, with_kwargs=True)
    try:
        found = engine.answer(prompts)
    finally:
        hook.remove()
    for record, wanted in zip(found, expected, strict=True):
        assert record["logprobs"] == pytest.approx(wanted["logprobs"], abs=1e-3)
    assert engine.engine.pool.taken == 0


# ---- runs ----


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an MMLU run in one go."""
    output = tmp_path_factory.mktemp("finished")
    evaluate_mmlu.main(mmlu_flags(tiny, output))
    return run_files(output)


def test_result(finished: dict[str, bytes]) -> None:
    result = json.loads(finished["result.json"])
    assert result["counts"] == {"samples": 16, "no_answer_found": 0, "cut_at_max_new_tokens": 0}
    [average] = [score for score in result["scores"] if score["name"] == "average (micro)"]
    records = [json.loads(line) for line in finished["samples.jsonl"].splitlines()]
    golds = {}
    for subject in ("abstract_algebra", "virology"):
        lines = (DATA / "mmlu" / "test" / f"{subject}_test.csv").read_text().splitlines()
        golds |= {f"{subject}/{i}": line[-1] for i, line in enumerate(lines)}
    right = sum(max(r["logprobs"], key=r["logprobs"].get).strip() == golds[r["id"]] for r in records)
    assert [r["id"] for r in records] == list(golds) and average["value"] == 100 * right / 16
    assert result["settings"]["dtype"] == "fp32" and "torch" in result["versions"]
    assert result["published"]["Qwen-7B, August 2023"]["average (micro)"] == 56.7


def test_killed_run_goes_on(tiny: Path, tmp_path: Path, finished: dict[str, bytes]) -> None:
    """Killed at some moment after its first answers, once more in the middle of a line; then the same bytes."""
    flags = mmlu_flags(tiny, tmp_path)
    command = [sys.executable, "eval/evaluate_mmlu.py", *flags, "--resume"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("*/samples.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    [journal] = tmp_path.glob("*/samples.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    assert 0 < len(lines) < 16
    journal.write_bytes(b"".join(lines) + b'{"id": "virology/7", "prompt": "x", "logpr')
    with pytest.raises(QwenError, match="answers of this model and these settings already: add --resume"):
        evaluate_mmlu.main(flags)
    evaluate_mmlu.main([*flags, "--resume"])
    assert run_files(tmp_path) == finished


def test_two_processes_make_the_same_result(tiny: Path, tmp_path: Path, finished: dict[str, bytes]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "eval/evaluate_mmlu.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [*command, *mmlu_flags(tiny, tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("average (micro)") == 1
    assert run_files(tmp_path) == finished


def test_rescore_needs_no_model(tmp_path: Path, finished: dict[str, bytes], capsys: pytest.CaptureFixture[str]) -> None:
    """Scores follow the answers on disk; the checkpoint is not touched."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name, content in finished.items():
        (folder / name).write_bytes(content)
    flags = [*mmlu_flags(tmp_path / "no checkpoint", tmp_path), "--rescore", str(folder), "--log-samples"]
    evaluate_mmlu.main(flags)
    before, after = json.loads(finished["result.json"]), json.loads((folder / "result.json").read_text())
    assert after == before
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(log) == 16 and {"question", "read", "right", "value"} <= log[0].keys()
    records = [json.loads(line) for line in finished["samples.jsonl"].splitlines()]
    for record, entry in zip(records, log, strict=True):
        record["logprobs"] = dict.fromkeys(record["logprobs"], -9.0) | {f" {entry['right']}": -1.0}
    (folder / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    evaluate_mmlu.main(flags)
    assert "| average (micro) | 100.00 | 0.00 | 16 | 56.7 |" in capsys.readouterr().out
    with pytest.raises(QwenError, match="is a run of mmlu, not of gsm8k"):
        evaluate_gsm8k.main(["--rescore", str(folder)])
    with pytest.raises(QwenError, match="is no folder of a run"):
        evaluate_mmlu.main(["--rescore", str(tmp_path)])


def test_tool_use_as_code(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random weights select no tool; replies that are right, in their place, score full marks."""
    flags = ["-c", str(tiny), "-o", str(tmp_path), "--subjects", "drawing", "film", "--max-new-tokens", "4"]
    evaluate_hf_agent.main([*flags, "--device", "cpu", "--dtype", "fp32", "--log-samples"])
    assert "| code | 0.000 | 0.000 | 3 | 74.07 |" in capsys.readouterr().out
    [folder] = tmp_path.iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert result["counts"] == {"samples": 3, "no_answer_found": 3, "cut_at_max_new_tokens": 3}
    codes = {"drawing": "image_generator(idea)", "film": "video_generator(summarizer(text_downloader(url)))"}
    records = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    texts = [f"```py\n{codes[record['id'].split('/')[0]]}\n```" for record in records]
    lines = [json.dumps(record | {"text": text}) + "\n" for record, text in zip(records, texts, strict=True)]
    (folder / "samples.jsonl").write_text("".join(lines))
    evaluate_hf_agent.main([*flags, "--rescore", str(folder)])
    out = capsys.readouterr().out
    assert "| tool selection | 100.00 | 0.00 | 3 | 90.74 |" in out and "| code | 100.00 | 0.00 | 3 | 74.07 |" in out


def test_answers_to_other_prompts_are_not_kept(tiny: Path, tmp_path: Path) -> None:
    """The data changed between two runs: only the questions that did are asked again."""
    problems = [json.loads(line) for line in (DATA / "gsm8k" / "test.jsonl").read_text().splitlines()[:2]]
    data, output = tmp_path / "test.jsonl", tmp_path / "out"
    flags = ["-c", str(tiny), "-d", str(data), "-o", str(output), "--device", "cpu", "--dtype", "fp32"]
    flags += ["--max-new-tokens", "4", "--batch-size", "1"]
    data.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    evaluate_chat_gsm8k.main(flags)
    [journal] = output.glob("*/samples.jsonl")
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [record["finish_reason"] for record in records] == ["length"] * 2
    records = [record | {"text": "kept"} for record in records]
    journal.write_text("".join(json.dumps(record) + "\n" for record in records))
    problems[1]["question"] = "What is 2 plus 3?"
    data.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    evaluate_chat_gsm8k.main([*flags, "--resume"])
    texts = [json.loads(line)["text"] for line in journal.read_text().splitlines()]
    assert texts[0] == "kept" and texts[1] != "kept"


def test_humaneval_runs_no_code_unasked(
    demo_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Completions keep their indentation; without the flag there is no score; allowed later, --rescore runs them."""
    row = {"task_id": "T/0", "entry_point": "two", "prompt": "def one():\n    return 1\n\ndef two():\n"}
    row["test"] = "def check(f):\n    assert f() == 2\n"
    data = tmp_path / "HumanEval.jsonl"
    data.write_text(json.dumps(row) + "\n")
    flags = ["-c", str(demo_checkpoint), "-d", str(tmp_path), "-o", str(tmp_path / "out"), "--max-new-tokens", "16"]
    evaluate_humaneval.main([*flags, "--device", "cpu", "--dtype", "fp32"])
    out = capsys.readouterr().out
    assert "pass@1" not in out and "not run" in out
    [folder] = (tmp_path / "out").iterdir()
    [record] = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert record["text"].startswith("    return 2")
    [completion] = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert completion == {"task_id": "T/0", "completion": record["text"]}
    evaluate_humaneval.main([*flags, "--rescore", str(folder), "--allow-code-execution"])
    assert "| pass@1 | 100.00 | 0.00 | 1 | 24.4 |" in capsys.readouterr().out


# ---- folders ----


def test_models_and_settings_have_folders_of_their_own(tmp_path: Path) -> None:
    settings = {"protocol": "standard", "weights": "a", "dtype": "bf16"}
    one = RunFolder.of_settings(tmp_path, "mmlu", "x/model", settings)
    assert one.path.name.startswith("mmlu-x-model-standard-")
    others = [{**settings, "weights": "b"}, {**settings, "dtype": "fp32"}, {**settings, "protocol": "qwen2023"}]
    assert len({one.path, *(RunFolder.of_settings(tmp_path, "mmlu", "x/model", s).path for s in others)}) == 4


def test_fingerprint(tmp_path: Path) -> None:
    """Of contents, not of names and dates: a copy is the same model, a changed weight another."""
    copy, other = tmp_path / "copy", tmp_path / "other"
    for folder in (tmp_path / "model", copy, other):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(300_000))
    os.utime(copy / "config.json", (0, 0))
    (other / "model.safetensors").write_bytes(bytes(299_999) + b"\1")
    assert fingerprint(tmp_path / "model") == fingerprint(copy) != fingerprint(other)


# ---- mistakes ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--subjects", "virolgy"], "virolgy is no subject of this benchmark; did you mean virology"),
        (
            ["--subjects", "anatomy"],
            "anatomy_dev.csv is missing: -d takes the directory of MMLU as unpacked from",
        ),
        (["--resume", "--overwrite"], "leave one of them out"),
        (["--tp", "2"], "--tp is not for evaluation"),
    ],
)
def test_mistakes(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(QwenError, match=message):
        evaluate_mmlu.main([*mmlu_flags(Path("demo"), tmp_path)[:6], *flags])


def test_broken_files(tmp_path: Path) -> None:
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"virology_{split}.csv").write_text("Which?,a,b,c,d,A\nWhich?,a,b\n")
    with pytest.raises(QwenError, match=r"virology_dev.csv, row 2: fewer than 6 columns"):
        evaluate_mmlu.main(["-c", "demo", "-d", str(tmp_path), "--subjects", "virology"])
    (tmp_path / "test.jsonl").write_text('{"question": "x", "answer": "#### 1"}\n{"question": \n')
    with pytest.raises(QwenError, match=r"test.jsonl, line 2: no JSON"):
        evaluate_gsm8k.main(["-c", "demo", "-d", str(tmp_path)])
    (tmp_path / "test.jsonl").write_text('{"question": "x"}\n')
    with pytest.raises(QwenError, match=r"test.jsonl, line 1: no field answer"):
        evaluate_gsm8k.main(["-c", "demo", "-d", str(tmp_path)])


def test_from_any_directory_a_mistake_is_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "eval" / "evaluate_mmlu.py"), "-c", "demo", "-d", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("evaluate_mmlu.py: error: nowhere/dev/") and done.stderr.count("\n") == 1
