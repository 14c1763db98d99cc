"""Tool use of chat models in ReAct form: right actions and their inputs, and actions where none is wanted.

    python eval/evaluate_plugin.py -c Qwen/Qwen-7B-Chat -d data --subjects positive negative

The directory holds exam_plugin_v20231206_react_positive.jsonl and ..._react_negative.jsonl, as published at
https://qianwen-res.oss-cn-beijing.aliyuncs.com/opensource_data/exam_plugin_v20231206/. Each line has a `prompt`, which
is the whole user message, and a `response`. --version 20230803 reads the older set, exam_plugin_v1_react_*.jsonl.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.runner import make_parser, run
from eval.scores import mean
from eval.sources import Origin, choose_subjects, read_json_lines
from eval.task import Record, Sample, Score, Task, Verdict
from qwen import QwenError, QWenTokenizer
from qwen.tools import STOP_WORD, parse_reply
from utils import find_checkpoint, run_script

PARTS = ("positive", "negative")
VERSIONS = {"20231206": "exam_plugin_v20231206_react_{part}.jsonl", "20230803": "exam_plugin_v1_react_{part}.jsonl"}
ORIGIN = Origin(
    "the publisher's ReAct set",
    "https://qianwen-res.oss-cn-beijing.aliyuncs.com/opensource_data/exam_plugin_v20231206/",
)


class EvaluatePlugin(Task):
    name = "plugin"
    title = "Tool use, ReAct"
    checkpoint = "Qwen/Qwen-7B-Chat"
    chat = True

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.tokenizer: QWenTokenizer | None = None

    @classmethod
    def add_arguments(cls, parser: argparse._ActionsContainer) -> None:
        parser.add_argument(
            "--version", choices=VERSIONS, default="20231206", help="of the set of questions (default: %(default)s)"
        )

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "version": self.args.version}

    @property
    def stop_words(self) -> tuple[str, ...]:
        """What a tool says is not the model's to write; the published script let it."""
        return () if self.as_published else (STOP_WORD,)

    def load(self) -> list[Sample]:
        if self.args.data is None:
            raise QwenError(f"this set is on no hub: download it from {ORIGIN.where} and name its directory with -d")
        samples = []
        for part in choose_subjects(self.args.subjects, PARTS):
            path = self.args.data / VERSIONS[self.args.version].format(part=part)
            rows = read_json_lines(path, ("prompt", "response") if part == "positive" else ("prompt",), ORIGIN)
            samples += [Sample(f"{part}/{number}", part, row) for number, row in enumerate(rows[: self.args.limit])]
        return samples

    def question(self, sample: Sample) -> str:
        return sample.row["prompt"]

    def judge(self, sample: Sample, record: Record) -> Verdict:
        """positive: the right tool, and Rouge-L of its arguments; negative: 1 for a call where none is wanted."""
        reply = record["text"]
        if sample.group == "negative":
            called = "\nAction: " in reply if self.as_published else bool(calls_of(reply))
            return Verdict(float(called), called, False)
        if self.as_published:
            action, arguments = published_call(reply)
            right, wanted = published_call(sample.row["response"])
            same = "\nAction: " in reply and action.lower() == right.lower()
        else:
            action, arguments = (calls_of(reply) or [(None, "")])[0]
            right, wanted = (calls_of(sample.row["response"]) or [(None, "")])[0]
            same = action is not None and action.strip().lower() == (right or "").strip().lower()
        return Verdict(float(same), action, right, {"rouge": rouge_l(wanted, arguments, self.tokens)})

    def tokens(self, text: str) -> list[str]:
        """The tokens that Rouge-L counts: Qwen's own, of the checkpoint at work."""
        if self.tokenizer is None:
            folder = find_checkpoint(self.args.checkpoint_path, self.args.hub, self.args.revision)
            self.tokenizer = QWenTokenizer.from_pretrained(folder)
        ids = self.tokenizer.encode_text(text)
        words = " ".join(self.tokenizer.decoder[i].decode("utf-8", errors="replace") for i in ids)
        return words.split()

    def scores(self, samples: Sequence[Sample], verdicts: Sequence[Verdict]) -> list[Score]:
        parts: dict[str, list[Verdict]] = {part: [] for part in PARTS}
        for sample, verdict in zip(samples, verdicts, strict=True):
            parts[sample.group].append(verdict)
        result = []
        if parts["positive"]:
            result.append(mean("right action", [v.value for v in parts["positive"]]))
            rouge = [v.parts["rouge"] for v in parts["positive"]]
            result.append(mean("Rouge-L of the action input", rouge, scale=1.0))
        if parts["negative"]:
            result.append(mean("needless action", [v.value for v in parts["negative"]]))
        return result


def calls_of(text: str) -> list[tuple[str, str]]:
    """Name and arguments of the calls in a reply, read as the server reads them."""
    _, calls = parse_reply(text, (), any_name=True, most_calls=1)
    return [(call.name, normal_json(call.arguments)) for call in calls]


def normal_json(text: str) -> str:
    """The same JSON in one form, so that blanks and the order of keys don't count; "" if it is none (nor JSON5)."""
    import json5

    try:
        return json.dumps(json5.loads(text), ensure_ascii=False, sort_keys=True)
    except ValueError:
        return ""


def published_call(text: str) -> tuple[str, str]:
    """Action and input as the published script cut them out: what stands between the marks, wherever they are."""
    text += "\n"

    def between(start: str, end: str) -> str:
        return text[text.find(start) + len(start) : text.find(end)].strip()

    return between("Action:", "Action Input:"), normal_json(between("Action Input:", "Observation:"))


def rouge_l(target: str, prediction: str, tokens: Any) -> float:
    """F-measure of the longest common subsequence, by the package rouge-score."""
    from rouge_score import rouge_scorer

    class Words:
        def tokenize(self, text: str) -> list[str]:
            return tokens(text)

    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words())
    return scorer.score(target, prediction)["rougeL"].fmeasure


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser(EvaluatePlugin, __doc__).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    run(EvaluatePlugin, parse_args(argv))


if __name__ == "__main__":
    run_script(main)
