"""Tool use as code: what perfect, wrong, broken and hostile replies score, and that no reply is executed."""

import builtins
import os
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest

from eval import evaluate_hf_agent, run_all
from eval.agent_code import MOST_CHARS, Tool, run_code
from eval.evaluate_hf_agent import SCORES, EvaluateHfAgent
from eval.report import published
from eval.task import Sample
from qwen import QwenError

# a right answer to each problem, as a model would write it: the tools in order, and the code
RIGHT = {
    "review": ("translator text_classifier", """
english = translator(text=review, source_language="German", target_language="English")
print(f"In English: {english}")
label = text_classifier(text=english, labels=["negative", "positive"])
if "positive" in label:
    print("The guest was " + "pleased")"""),
    "photo_aloud": ("image_captioner text_reader", """
caption = image_captioner(photo)
sound = text_reader(caption)"""),
    "photo_question": ("translator image_qa", """
english = translator(question, source_language="italian", target_language="english")
answer = image_qa(image=photo, question=english)
answer"""),
    "page_in_french": ("text_downloader summarizer translator", """
page = text_downloader(url)
# the summary first
french = translator(text=summarizer(text=page), source_language="English", target_language="French")"""),
    "meeting": ("transcriber summarizer", "summary = summarizer(transcriber(audio=recording))"),
    "voice_message": ("transcriber text_qa", """
text = transcriber(message)
text_qa(question=question, text=text)"""),
    "drawing": ("image_generator", """
for prompt in [idea]:
    picture = image_generator(prompt=prompt)"""),
    "retouching": ("image_transformer", "image = image_transformer(prompt=wish, image=portrait)"),
    "film": ("text_downloader summarizer video_generator", """
summary = summarizer(text_downloader(url))
video = video_generator(f"{summary}")
print("Done:", video)"""),
    "interview": ("transcriber translator summarizer text_reader", """
spanish = transcriber(interview)
english = translator(text=spanish, source_language="Spanish", target_language="English")
summary = summarizer(english)
sound = text_reader(summary)"""),
    "mask": ("image_generator image_segmenter", """
painting = image_generator(scene)
mask = image_segmenter(painting, thing)"""),
}  # fmt: skip


def make(protocol: str = "standard", **more: object) -> EvaluateHfAgent:
    return EvaluateHfAgent(Namespace(**{"protocol": protocol, "subjects": None, "limit": None, "data": None, **more}))


def reply(code: str, tools: str = "") -> str:
    plan = " and ".join(f"`{tool}`" for tool in tools.split())
    return f"I use {plan}.\n\n```py\n{code.strip()}\n```\nThat is all."


def scored(text: str, name: str = "photo_aloud", protocol: str = "standard") -> tuple[list[float], str]:
    """The three scores of a reply to a problem, and the note."""
    task = make(protocol, subjects=[name])
    verdict = task.judge(task.load()[0], {"text": text})
    assert verdict.value == verdict.parts["code"]
    return [verdict.parts[score] for score in SCORES], verdict.note


# ---- the tasks ----


def test_tasks() -> None:
    """11 problems in 27 phrasings; every variable is named in every phrasing; every tool is wanted somewhere."""
    task = make()
    samples = task.load()
    assert len(samples) == len({sample.row["task"] for sample in samples}) == 27
    assert len({sample.group for sample in samples}) == 11 and {sample.group for sample in samples} == RIGHT.keys()
    assert all(f"`{name}`" in s.row["task"] for s in samples for name in s.row["inputs"])
    assert {tool for tools, _ in RIGHT.values() for tool in tools.split()} == task.tools.keys()
    assert [s.id for s in make(subjects=["film"], limit=1).load()] == ["film/0"]


def test_prompt() -> None:
    """Every tool with its inputs, solved tasks that are none of the problems, the task at the end."""
    task = make()
    sample = task.load()[0]
    prompt = task.question(sample)
    assert all(f"- {name}(" in prompt for name in task.tools) and "- video_generator(prompt, seconds=2): " in prompt
    assert prompt.endswith(f"Task: {sample.row['task']}") and prompt.count("Task: ") == 5
    assert prompt.count("```py\n") == prompt.count("\n```\n") == 4


def test_examples_follow_the_instructions() -> None:
    """The code of each runs; it calls the tools that its plan names, in backticks."""
    task = make()
    variables = {"link": "a", "question": "b", "poem": "c", "headline": "d", "object": "e", "picture": "f"}
    for example in task.data["examples"]:
        outcome = run_code(example["code"], task.tools, variables)
        assert not outcome.error and all(f"`{call.tool}`" in example["plan"] for call in outcome.calls)


# ---- scores ----


@pytest.mark.parametrize("protocol", ["standard", "qwen2023"])
def test_perfect_replies(protocol: str) -> None:
    task = make(protocol)
    samples = task.load()
    replies = [reply(RIGHT[sample.group][1], RIGHT[sample.group][0]) for sample in samples]
    verdicts = [task.judge(s, {"text": text}) for s, text in zip(samples, replies, strict=True)]
    scores = task.scores(samples, verdicts)
    assert [(score.name, score.value, score.count) for score in scores] == [(name, 100, 27) for name in SCORES]
    assert not any(verdict.note for verdict in verdicts)


@pytest.mark.parametrize(
    ("code", "standard", "as_published"),
    [
        ("text_reader(image_captioner(photo))", [1, 1, 1], [1, 1, 1]),
        ("text_reader(photo)", [0, 0, 0], [1, 0.75, 0.3]),  # a tool is missing
        ("text_reader(summarizer(image_captioner(photo)))", [0, 0, 0], [1, 0.75, 0.3]),  # one is needless
        ("c = image_captioner(photo)\ntext_reader(text='photo')", [1, 0, 0], [1, 1, 0.3]),  # a wrong input
        ("c = image_captioner(photo)\nx = text_reader(c)\nimage_captioner(x)", [1, 0, 0], [1, 1, 0.3]),
        ("c = image_captioner(photo)\ntext_reader(c)\ntext_reader('bye')\ntext_reader(c)", [1, 0, 1], [1, 1, 1]),
        ("c = image_captioner(photo)\nx = text_reader(c)\nx = c", [1, 1, 0], [1, 1, 0.3]),  # the wrong result
        ("c = image_captioner(photo)\ntext_reader(c, voice='low')", [0, 0, 0], [1, 1, 0.3]),  # no such input
        ("c = image_captioner(photo)\ntext_reader()", [0, 0, 0], [1, 1, 0.3]),
        ("text_reader(image_captioner(picture))", [0, 0, 0], [1, 1, 0.3]),  # no such variable
        ("text_reader(image_captioner(photo)", [0, 0, 0], [1, 1, 0.3]),  # broken syntax
        ("import PIL\ntext_reader(image_captioner(photo))", [0, 0, 0], [1, 1, 0.3]),
        ("x = text_reader(image_captioner(photo))\nx.save('x.wav')", [1, 1, 0], [1, 1, 1]),  # right until then
        ("x = text_reader(image_captioner(photo))\nwhile True:\n    pass", [1, 1, 0], [1, 1, 1]),
        ("x = text_reader(image_captioner(photo))\neval('x')", [1, 1, 0], [1, 1, 1]),
        ("def f():\n    return text_reader(image_captioner(photo))\nf()", [0, 0, 0], [1, 1, 0.3]),
        ("", [0, 0, 0], [1, 0.5, 0.3]),
    ],
)
def test_scores(code: str, standard: list[float], as_published: list[float]) -> None:
    """Each with the right plan, which only the published counting reads."""
    text = reply(code, "image_captioner text_reader")
    assert scored(text)[0] == standard
    assert scored(text, protocol="qwen2023")[0] == as_published


def test_plans_and_blocks() -> None:
    """Where the code begins and ends, and which tools a plan names."""
    code = "text_reader(image_captioner(photo))"
    assert scored(f"Sure:\n\n  ```python\n  {code}\n```")[0] == [1, 1, 1]
    assert scored(f"```\n{code}")[0] == [1, 1, 1]  # not closed
    assert scored(f"I would write {code}.") == ([0, 0, 0], "no code block")
    assert scored("", protocol="qwen2023")[0] == [0.5, 0.5, 0.3]
    plan = reply(code, "image_captioner image_qa photo")
    assert scored(plan, protocol="qwen2023")[0] == [0.5, 1, 1]  # one is missing, one needless; photo is none
    assert scored(reply(code, "translator summarizer text_qa"), protocol="qwen2023")[0][0] == 0


# ---- the evaluator ----

ECHO = Tool("echo", "", ["text", "times"], {"times": 1})


def test_stubs_record_their_inputs() -> None:
    assert ECHO("A b") == ECHO(text="a B", times=1) == "echo(text: a b; times: 1)"
    assert ECHO(["b", "a"]) == ECHO(["a", "b"]) == "echo(text: a, b; times: 1)" != ECHO("a", 2)
    assert run_code("echo(f'{x}!' + 'y', times=3)", {"echo": ECHO}, {"x": "é"}).result == "echo(text: é!y; times: 3)"


def test_branches_and_loops() -> None:
    code = "for n in ('a', 'b'):\n  if n == 'b':\n    echo(n)\n  else:\n    x = echo(n, 2)\nprint(echo('c'), end='')"
    outcome = run_code(code, {"echo": ECHO}, {})
    values = [ECHO("a", 2), ECHO("b"), ECHO("c")]
    assert [call.value for call in outcome.calls] == values and not outcome.error
    assert outcome.result == values[1]  # what is only printed is no result


HOSTILE = [
    "import os\nos.system('touch pwned')",
    "__import__('os').system('touch pwned')",
    "from pathlib import Path\nPath('pwned').touch()",
    "open('pwned', 'w')",
    "eval(\"open('pwned', 'w')\")",
    "exec(\"open('pwned', 'w')\")",
    "print.__self__.open('pwned', 'w')",
    "echo.__globals__['ast']",
    "().__class__.__base__.__subclasses__()",
    "f'{echo.__class__}'",
    "f\"{open('pwned', 'w')}\"",
    "[open('pwned', 'w') for _ in (1,)]",
    "(lambda: open('pwned', 'w'))()",
    "@print\ndef f(): pass",
    "class A(open('pwned', 'w')): pass",
    "with open('pwned', 'w'): pass",
    "try:\n    open('pwned', 'w')\nexcept: pass",
    "print(*open('pwned', 'w'))",
    "print(**{'file': open('pwned', 'w')})",
    "x = y = open('pwned', 'w')",
    "assert open('pwned', 'w')",
    "raise SystemExit",
    "exit()",
    "breakpoint()",
    "echo('a', text='b')",
    "echo(text='a', text='b')",
    "echo(self='a')",
    "x = 9 ** 9 ** 9 ** 9",
    "x = 'a' * 10 ** 10",
    "x = f'{1:10000000000}'",
    "x = 1 if True else 2",
    "x = [1, [2]]",
    "'a' in 5",
    "'a' + 5",
    "for c in 'abc': pass",
    "a: int = 1",
    "x = b'a'",
    "x = 'a\0b'",
    "x = '\\ud800'\nx.y",
    "(" * 5000,
    "-" * 9000 + "1",
    "x = " + " + ".join(["'a'"] * 2400),
    "x = " + "9" * 5000,
    "print(1)\n" * MOST_CHARS,
]


@pytest.mark.parametrize("code", HOSTILE)
def test_hostile_replies_do_nothing(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ends in a note; nothing is called, compiled or touched."""

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"called with {args}")

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        for owner, name in ((os, "system"), (subprocess, "Popen"), (builtins, "eval"), (builtins, "exec")):
            patched.setattr(owner, name, never)
        outcome = run_code(code, {"echo": ECHO}, {})
    assert outcome.error and not outcome.calls and not list(tmp_path.iterdir())


def loops(depth: int, body: str) -> str:
    lines = [f"{' ' * n}for v{n} in [1, 2, 3, 4, 5, 6, 7, 8, 9]:" for n in range(depth)]
    return "\n".join([*lines, " " * depth + body])


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (loops(15, "print(1)"), "still running after"),
        ("s = 'ab'\n" + loops(2, "s = f'{s}{s}'"), "a text of more than"),
        ("s = 'ab'\n" + loops(2, "s = s + s"), "a text of more than"),
        ("s = 'ab'\n" + loops(2, "s = echo(s + s)"), "a text of more than"),
        ("x = [" + "1, " * 101 + "]", "a list of lists, or of more than 100"),
        ("while 1:\n  pass", "line 1: While is not for such code"),
        ("print(1)\nx.y", "line 2: Attribute is not for such code"),
        ("exec('1')", "no tool exec"),
        ("echo(1, 2, 3)", "echo: too many positional arguments"),
    ],
)
def test_bounds(code: str, error: str) -> None:
    assert error in run_code(code, {"echo": ECHO}, {}).error


# ---- in the runner ----


def test_published_values_stand_beside() -> None:
    [(weights, values)] = published("hf_agent").items()
    assert values == dict(zip(SCORES, (90.74, 92.59, 74.07), strict=True)) and "transformers' tasks" in weights


def test_data_come_with_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """-d is an error of one sentence, and run_all hands none on."""
    with pytest.raises(QwenError, match="the tasks come with this script"):
        evaluate_hf_agent.main(["-c", "demo", "-d", str(tmp_path)])
    with pytest.raises(QwenError, match="films is no subject of this benchmark; did you mean film"):
        make(subjects=["films"]).load()
    (tmp_path / "result.json").write_text('{"task": "hf_agent"}')
    commands: list[list[str]] = []

    def answer(command: list[str], **options: object) -> Namespace:
        commands.append(command)
        return Namespace(returncode=0, stdout=f"table\n{tmp_path}/result.json\n")

    monkeypatch.setattr(subprocess, "run", answer)
    args = run_all.parse_args(["-c", "demo", "--benchmarks", "hf_agent", "-d", str(tmp_path)])
    assert run_all.run_benchmark("demo", "hf_agent", args) == {"task": "hf_agent"}
    assert Path(commands[0][1]).name == "evaluate_hf_agent.py" and "-d" not in commands[0]


def test_either_of_two_solutions() -> None:
    """The reply may follow one of them, and no mixture."""
    task = make()
    row = {"task": "?", "inputs": {"text": "t"}, "solutions": ["summarizer(text)", "image_generator(text)"]}
    sample = Sample("x/0", "x", row)
    for code, right in (
        ("image_generator(text)", 1),
        ("summarizer(text)", 1),
        ("image_generator(summarizer(text))", 0),
    ):
        assert task.judge(sample, {"text": reply(code)}).parts == dict.fromkeys(SCORES, right)
