"""Multiple choice: few-shot prompts whose next token is the answer, and questions to a chat model.

A benchmark says where its files are (`Mmlu`, `Ceval`, `Cmmlu`), a script says how it asks (`FewShot`, `ChatChoice`).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from eval.letters import LETTERS, published_letter, read_golds, standard_letter
from eval.scores import by_category, by_group
from eval.sources import Origin, Row, as_text, choose_subjects, load_data, locate, read_hub, read_table
from eval.task import Prompt, Record, Sample, Score, Task, Verdict
from qwen import QwenError, QWenTokenizer

SHOTS = 5


class MultipleChoice(Task):
    """Questions with choices A to D, by subject."""

    origin: Origin
    categories_file = ""
    average = "micro"  # or "macro": every subject counts the same
    header = True  # the CSV files begin with the columns' names
    columns: ClassVar[tuple[str, ...]] = ("question", "A", "B", "C", "D", "answer")
    splits: ClassVar[tuple[str, str]] = ("dev", "test")  # of the shots and of the questions
    chinese = False
    leaderboard = ""  # where answers go whose right ones are secret

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.categories: dict[str, list[str]] = load_data(self.categories_file)
        subjects = dict.fromkeys(name for members in self.categories.values() for name in members)
        self.subjects = choose_subjects(args.subjects, subjects)
        self.shots: dict[str, list[Row]] = {}

    def file(self, split: str, subject: str) -> Path:
        return locate(self.args.data, f"{split}/{subject}_{split}.csv")

    def rows(self, split: str, subject: str) -> list[Row]:
        """Questions of a subject with the keys question, A, B, C, D and answer."""
        if self.args.data is None:
            rows = [self.from_hub(row) for row in read_hub(self.origin, subject, split)]
        else:
            rows = read_table(
                self.file(split, subject), self.columns, self.origin, self.header, as_published=self.as_published
            )
        rows = [dict(zip(("question", *LETTERS, "answer"), map(row.get, self.columns), strict=True)) for row in rows]
        place = str(self.file(split, subject)) if self.args.data else f"{self.origin.hub}, {subject}, {split}"
        for number, (row, gold) in enumerate(zip(rows, read_golds(rows, place), strict=True), start=1):
            row["question"] = as_text(row["question"], f"{place}, row {number}: question")
            row["answer"] = gold
        return rows

    def from_hub(self, row: Row) -> Row:
        return row

    def exports(self, samples: Sequence[Sample], verdicts: Sequence[Verdict]) -> dict[str, str]:
        """Where the right answers are secret: submission.json, as leaderboards take it."""
        if all(sample.row["answer"] for sample in samples):
            return {}
        answers: dict[str, dict[str, str]] = {}
        for sample, verdict in zip(samples, verdicts, strict=True):
            answers.setdefault(sample.group, {})[sample.id.split("/")[-1]] = verdict.answer or ""
        return {"submission.json": json.dumps(answers, indent=2) + "\n"}

    def load(self) -> list[Sample]:
        shots, questions = self.splits
        samples = []
        for subject in self.subjects:
            if not self.chat:
                self.shots[subject] = self.rows(shots, subject)[:SHOTS]
                if not all(row["answer"] for row in self.shots[subject]):
                    raise QwenError(f"{subject}, {shots}: the solved questions have no right answers")
            rows = self.rows(questions, subject)[: self.args.limit]
            samples += [Sample(f"{subject}/{number}", subject, row) for number, row in enumerate(rows)]
        self.check_answers(samples)
        self.name_shots()
        return samples

    def check_answers(self, samples: Sequence[Sample]) -> None:
        """QwenError if some subjects have right answers and others have none; a remark if none has."""
        given = {sample.group: bool(sample.row["answer"]) for sample in samples}
        if any(given.values()) and not all(given.values()):
            without = ", ".join(subject for subject, known in given.items() if not known)
            raise QwenError(f"{without}: no right answers, where other subjects have them: choose with --subjects")
        if not any(given.values()):
            where = f": upload submission.json to {self.leaderboard}" if self.leaderboard else ""
            self.remarks["right_answers"] = f"none in these data{where or ', see submission.json'}"

    def name_shots(self) -> None:
        """The title says how many solved questions there are, where a file has fewer than it should."""
        numbers = [len(rows) for rows in self.shots.values()]
        if numbers and min(numbers) < SHOTS:
            few = f"{min(numbers)}-" if min(numbers) == max(numbers) else f"{min(numbers)}- to {max(numbers)}-"
            self.title = self.title.replace(f"{SHOTS}-", few)
            short = (f"{subject} ({len(rows)})" for subject, rows in self.shots.items() if len(rows) < SHOTS)
            self.remarks["fewer_than_five_solved_questions"] = " ".join(short)

    def scores(self, samples: Sequence[Sample], verdicts: Sequence[Verdict]) -> list[Score]:
        if not all(sample.row["answer"] for sample in samples):
            return []
        return by_category(by_group(samples, verdicts), self.categories, self.average)


class FewShot(MultipleChoice):
    """Five solved questions of the subject, then the question; the likeliest letter is the answer."""

    choices = (" A", " B", " C", " D")
    question_label = "Question: "
    answer_label = "\nAnswer:"
    before_letter = " "  # in a solved question
    crop: ClassVar[int | None] = None  # as published: only so many last tokens of a prompt were read

    def introduction(self, subject: str) -> str:
        return ""

    def render(self, row: Row) -> str:
        lines = [self.question_label + row["question"], *(f"{letter}. {row[letter]}" for letter in LETTERS)]
        return "\n".join(lines) + self.answer_label

    def text(self, sample: Sample, shots: int) -> str:
        examples = self.shots[sample.group][:shots]
        solved = (f"{self.render(row)}{self.before_letter}{row['answer']}\n\n" for row in examples)
        return self.introduction(sample.group) + "".join(solved) + self.render(sample.row)

    def question(self, sample: Sample) -> str:
        return self.text(sample, SHOTS)

    def prompt(self, sample: Sample, tokenizer: QWenTokenizer, longest: int) -> Prompt:
        """A prompt longer than the model was trained for loses whole shots, the last first: never its header."""
        ids = tokenizer.encode_text(self.text(sample, SHOTS))
        if self.as_published:
            if self.crop is not None and len(ids) > self.crop + 1:
                return Prompt(ids[-self.crop :], f"{sample.group}, cropped")
            return Prompt(ids, sample.group)
        shots = SHOTS
        while len(ids) > longest and shots:
            shots -= 1
            ids = tokenizer.encode_text(self.text(sample, shots))
        return Prompt(ids, f"{sample.group}, {shots} shots")

    def judge(self, sample: Sample, record: Record) -> Verdict:
        logprobs = record["logprobs"]
        answer = max(logprobs, key=logprobs.__getitem__).strip()
        return Verdict(float(answer == sample.row["answer"]), answer, sample.row["answer"])


class ChatChoice(MultipleChoice):
    """The question as a message to a chat model, without examples; the letter is read from its reply."""

    checkpoint = "Qwen/Qwen-7B-Chat"
    chat = True
    instruction = ""
    after_question = "\n"

    def question(self, sample: Sample) -> str:
        choices = "".join(f"{letter}. {sample.row[letter]}\n" for letter in LETTERS)
        return self.instruction + sample.row["question"] + self.after_question + choices

    def judge(self, sample: Sample, record: Record) -> Verdict:
        choices = {letter: sample.row[letter] for letter in LETTERS}
        if self.as_published:
            answer = published_letter(record["text"].strip(), choices, sample.row["question"], self.chinese)
        else:
            answer = standard_letter(record["text"], choices)
        return Verdict(float(answer == sample.row["answer"]), answer, sample.row["answer"])


# ---- the benchmarks ----


class Mmlu(MultipleChoice):
    """57 subjects in English; averaged over all 14,042 questions."""

    origin = Origin("MMLU", "https://people.eecs.berkeley.edu/~hendrycks/data.tar", hub="cais/mmlu")
    categories_file = "mmlu_subjects.json"
    header = False

    def from_hub(self, row: Row) -> Row:
        return {"question": row["question"], **dict(zip(LETTERS, row["choices"], strict=True)),
                "answer": LETTERS[row["answer"]]}  # fmt: skip


class Ceval(MultipleChoice):
    """52 subjects in Chinese; averaged over subjects. The answers of its test set are secret."""

    origin = Origin(
        "C-Eval",
        "https://huggingface.co/datasets/ceval/ceval-exam/resolve/main/ceval-exam.zip",
        hub="ceval/ceval-exam",
    )
    categories_file = "ceval_subjects.json"
    leaderboard = "https://cevalbenchmark.com"
    average = "macro"
    chinese = True

    @classmethod
    def add_arguments(cls, parser: argparse._ActionsContainer) -> None:
        parser.add_argument(
            "--split",
            choices=["val", "test"],
            default="val",
            help="the answers of test are secret (default: %(default)s)",
        )

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "split": self.args.split}

    def rows(self, split: str, subject: str) -> list[Row]:
        """`split` test stands for the chosen one; the real test set has no column of answers: they are ""."""
        split = self.args.split if split == "test" else split
        if split != "test" or self.args.data is None:
            return super().rows(split, subject)
        asked = read_table(self.file(split, subject), self.columns[:-1], self.origin, as_published=self.as_published)
        return [{**row, "answer": ""} for row in asked]


class Cmmlu(MultipleChoice):
    """67 subjects in Chinese, some of them about China alone; averaged over subjects."""

    origin = Origin(
        "CMMLU", "https://huggingface.co/datasets/haonan-li/cmmlu/resolve/main/cmmlu_v1_0_1.zip", hub="lmlmcat/cmmlu"
    )
    categories_file = "cmmlu_subjects.json"
    average = "macro"
    columns = ("Question", "A", "B", "C", "D", "Answer")
    chinese = True

    def file(self, split: str, subject: str) -> Path:
        return locate(self.args.data, f"{split}/{subject}.csv")


class ChineseFewShot(FewShot):
    """The Chinese prompt: no introduction, letters without a blank before them."""

    choices = ("A", "B", "C", "D")
    question_label = "问题："
    answer_label = "\n答案："
    before_letter = ""
