"""GSM8K: grade-school word problems, solved in words; the answer is the last number."""

from collections.abc import Sequence

from eval.math_answers import last_number, same_number
from eval.scores import mean
from eval.sources import Origin, Row, load_data, read_hub, read_json_lines
from eval.task import Record, Sample, Score, Task, Verdict
from qwen import QwenError

ORIGIN = Origin(
    "GSM8K",
    "https://github.com/openai/grade-school-math (grade_school_math/data/test.jsonl)",
    hub="openai/gsm8k",
)
CUE = "\nLet's think step by step"


def solved(shot: Row) -> str:
    """A solved problem, as the prompts show it."""
    return f"Question: {shot['question']}{CUE}\n{shot['reasoning']}\nThe answer is {shot['answer']}\n"


def solved_problems(name: str) -> list[str]:
    """The worked examples of a prompt, "base" (8) or "chat" (4): problems of GSM8K's training set."""
    return [solved(shot) for shot in load_data("gsm8k_shots.json")[name]]


class Gsm8k(Task):
    def load(self) -> list[Sample]:
        if self.args.data is None:
            rows, place = read_hub(ORIGIN, "main", "test"), str(ORIGIN.hub)
        else:
            place = self.args.data / "test.jsonl" if self.args.data.is_dir() else self.args.data
            rows = read_json_lines(place, ("question", "answer"), ORIGIN)
        for number, row in enumerate(rows, start=1):
            if last_number(row["answer"]) is None:
                raise QwenError(f"{place}, problem {number}: no number in the right answer {row['answer'][-60:]!r}")
        return [Sample(f"gsm8k/{number}", "gsm8k", row) for number, row in enumerate(rows[: self.args.limit])]

    def judge(self, sample: Sample, record: Record) -> Verdict:
        answer, gold = last_number(record["text"]), last_number(sample.row["answer"])
        return Verdict(float(same_number(answer, gold)), None if answer is None else str(answer), str(gold))

    def scores(self, samples: Sequence[Sample], verdicts: Sequence[Verdict]) -> list[Score]:
        return [mean("accuracy", [verdict.value for verdict in verdicts])]
