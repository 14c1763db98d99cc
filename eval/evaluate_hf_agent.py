"""Tool use of chat models as code: a plan in words, then Python that calls tools ("HF agent", run mode).

    python eval/evaluate_hf_agent.py -c Qwen/Qwen-7B-Chat

The publisher ran transformers' own 11 problems in 27 phrasings, with stubs for tools; transformers 5 has neither the
agent nor the problems. These 11 problems in 27 phrasings are this project's own, in the same form and for the same
kinds of tools (data/agent_tasks.json), and so is the prompt. A score can be compared with the published one in kind,
not in number.

standard: the share of replies whose code calls the right tools (tool selection), with the right inputs and no further
calls (tool use), and runs to its end with the right result (code). Calls before an error count for the first two.
qwen2023 counts as the published test did: the tools that the plan names, those that the code names, a quarter off for
each that is missing or needless; for the code 1 if the result is right, else 0.3, even where there is no code.

Nothing that the model writes is executed: agent_code.py reads it, and the tools are stubs.
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.agent_code import Outcome, Tool, run_code
from eval.coding import FENCED
from eval.runner import make_parser, run
from eval.scores import mean
from eval.sources import choose_subjects, load_data
from eval.task import Record, Sample, Score, Task, Verdict
from qwen import QwenError
from utils import run_script

TASKS = "agent_tasks.json"
INSTRUCTIONS = """You solve tasks by writing short Python code that calls tools.
A tool is a Python function; below is what each one does and takes. The variables that a task names are already set.
First say in one sentence which tools you need and what for, each name in backticks. Then write the code in one block \
between ``` marks. Assign what each tool returns to a variable: the last one you assign is the result of the task. \
Use nothing but the tools, print and the variables: no imports, no other functions."""
SCORES = ("tool selection", "tool use", "code")
WRONG_RESULT = 0.3  # what the published test gave for code with any other result, and for none


class EvaluateHfAgent(Task):
    name = "hf_agent"
    title = "Tool use, code"
    checkpoint = "Qwen/Qwen-7B-Chat"
    chat = True
    stop_words = ("\nTask:",)  # the next task is not the model's to write

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.data = load_data(TASKS)
        self.tools = {name: Tool(name, **tool) for name, tool in self.data["tools"].items()}

    def load(self) -> list[Sample]:
        if self.args.data is not None:
            raise QwenError(f"the tasks come with this script (eval/data/{TASKS}): leave out -d")
        problems = self.data["problems"]
        samples = []
        for name in choose_subjects(self.args.subjects, problems):
            problem = problems[name]
            for number, task in enumerate(problem["phrasings"][: self.args.limit]):
                row = {"task": task, "inputs": problem["inputs"], "solutions": problem["solutions"]}
                samples.append(Sample(f"{name}/{number}", name, row))
        return samples

    def question(self, sample: Sample) -> str:
        tools = "\n".join(f"- {name}{tool.signature}: {tool.description}" for name, tool in self.tools.items())
        examples = [
            f"Task: {example['task']}\n\n{example['plan']}\n```py\n{example['code']}\n```"
            for example in self.data["examples"]
        ]
        return "\n\n".join([INSTRUCTIONS, f"Tools:\n{tools}", *examples, f"Task: {sample.row['task']}"])

    def judge(self, sample: Sample, record: Record) -> Verdict:
        """`value` and "code": the result is right; the other two scores are parts as well."""
        reply, inputs = record["text"], sample.row["inputs"]
        found = FENCED.search(reply)
        code = textwrap.dedent(found.group(1)) if found else None
        outcome = run_code(code or "", self.tools, inputs)
        solved = [run_code(solution, self.tools, inputs) for solution in sample.row["solutions"]]
        if self.as_published:
            plan = reply[: found.start()] if found else reply
            values = self.published_values(plan, code or "", outcome, solved)
        else:
            values = standard_values(outcome, solved)
        parts = dict(zip(SCORES, values, strict=True))
        note = outcome.error if found else "no code block"
        return Verdict(parts["code"], code, sample.row["solutions"][0], parts, note)

    def published_values(self, plan: str, code: str, outcome: Outcome, solved: Sequence[Outcome]) -> list[float]:
        named = set(re.findall(r"`(\w+)`", plan)) & self.tools.keys()
        used = {name for name in self.tools if name in code}
        right = [tools_of(solution) for solution in solved]
        result = any(outcome.result == solution.result for solution in solved)
        return [quarters_off(named, right), quarters_off(used, right), 1.0 if result else WRONG_RESULT]

    def scores(self, samples: Sequence[Sample], verdicts: Sequence[Verdict]) -> list[Score]:
        return [mean(name, [verdict.parts[name] for verdict in verdicts]) for name in SCORES]


def tools_of(outcome: Outcome) -> set[str]:
    return {call.tool for call in outcome.calls}


def standard_values(outcome: Outcome, solved: Sequence[Outcome]) -> list[float]:
    """1 or 0 for the tools called, for the calls with their inputs, and for the result of code that ran to its end."""
    tools = any(tools_of(outcome) == tools_of(solution) for solution in solved)
    calls = any(set(outcome.calls) == set(solution.calls) for solution in solved)
    result = not outcome.error and any(outcome.result == solution.result for solution in solved)
    return [float(tools), float(calls), float(result)]


def quarters_off(found: set[str], right: Sequence[set[str]]) -> float:
    """1 less a quarter for each tool that is missing or needless, by the solution that is nearest."""
    return max(0.0, max(1 - 0.25 * len(found ^ tools) for tools in right))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser(EvaluateHfAgent, __doc__).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    run(EvaluateHfAgent, parse_args(argv))


if __name__ == "__main__":
    run_script(main)
