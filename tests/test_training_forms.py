"""Data as they come: every form and file format, what must not be learned, and all faults of a file."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from training.forms import read_sample
from training.read import Source, find_files
from training.samples import BadSample, Message, Notes

HI, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
EXPECTED = (Message("user", "Hi"), Message("assistant", "Hello!"))


def parse(row: Any, stage: str = "sft", notes: Notes | None = None) -> list[Any]:
    return read_sample(row, "here", stage, notes or Notes())


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [HI, HELLO], "system": "", "tools": None},
        [HI, HELLO],
        {"instruction": "Hi", "input": "", "output": "Hello!"},
        {"prompt": "Hi", "completion": "Hello!"},
        {"query": "Hi", "response": "Hello!"},
        {"messages": [HI | {"content": "\ufeffHi"}, HELLO | {"weight": 1}]},
    ],
)
def test_forms_are_one_conversation(row: Any) -> None:
    assert [each.messages for each in parse(row)] == [EXPECTED]


@pytest.mark.parametrize(
    "switch", [{"weight": 0}, {"loss": False}, {"train": "false"}, {"training": 0.0}, {"masked": True}]
)
def test_a_reply_that_says_so_is_not_learned(switch: dict[str, Any]) -> None:
    [each] = parse({"messages": [HI, HELLO | switch, HI, HELLO]})
    assert [message.train for message in each.messages if message.role == "assistant"] == [False, True]
    notes = Notes()
    assert parse({"messages": [HI, HELLO]} | switch, notes=notes) == [] and "left out" in notes.list_remarks()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [HI, HELLO | {"weight": 0.25}]}, '"weight" is 0.25'),
        ({"messages": [HI, HELLO | {"weight": 0, "train": True}]}, "contradict"),
        ({"messages": [HI, HELLO], "label": False}, "leave those samples out"),
        ({"messages": [HI, HELLO], "rejected_response": "No."}, "give the chosen reply as a conversation"),
        ({"messages": [HI, HELLO], "images": ["a.jpg"]}, "no pictures"),
        ({"messages": [{"role": "system", "content": "a"}, HI, HELLO], "system": "b"}, "differ"),
        ({"messages": [HI, HELLO], "tools": [{"name": "a", "description": "\ud83d"}]}, "half of a surrogate"),
    ],
)  # fmt: skip
def test_what_would_be_learned_wrongly_is_refused_by_name(row: Any, message: str) -> None:
    with pytest.raises(BadSample, match=message):
        parse(row)


def test_fields_that_nobody_reads_are_counted() -> None:
    notes = Notes()
    parse({"messages": [HI, HELLO | {"reasoning_content": "r"}], "source": "s", "id": 1}, notes=notes)
    assert set(notes.remarks) == {'field "reasoning_content" of messages not read', 'field "source" not read'}


def test_preferences_and_verdicts() -> None:
    rows = [
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."},
        {"messages": [HI, HELLO], "rejected_response": "No."},
        {"chosen": [HI, HELLO], "rejected": [HI, HELLO | {"content": "No."}]},
    ]
    for row in rows:
        [each] = parse(row, "dpo")
        assert (each.prompt[-1].content, each.chosen, each.rejected) == ("Hi", "Hello!", "No.")
    for row in ({"prompt": "Hi", "completion": "No.", "label": False}, {"messages": [HI, HELLO], "label": "false"}):
        [each] = parse(row, "kto")
        assert each.prompt[-1].content == "Hi" and not each.good


LINE = json.dumps({"messages": [HI, HELLO]}) + "\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINE.encode()),
        ("a.jsonl", LINE.replace("\n", "\r\n").encode("utf-8-sig")),
        ("a.jsonl", LINE.encode("utf-16")),
        ("a.jsonl.gz", gzip.compress(LINE.encode(), mtime=0)),
        ("a.json", json.dumps({"messages": [HI, HELLO]}, indent=1).encode()),
        ("a.json", json.dumps({"data": [{"messages": [HI, HELLO]}]}).encode()),
        ("a.csv", b"instruction,input,output\nHi,,Hello!\n"),
        ("a.csv", b"sep=;\r\ninstruction;output\r\nHi;Hello!\r\n"),
        ("a.tsv", b"prompt\tcompletion\nHi\tHello!\n"),
    ],
)
def test_file_formats(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    notes = Notes()
    for given in (tmp_path / name, tmp_path, tmp_path / "a.*"):
        assert [each.messages for each in Source(str(given)).samples(notes)] == [EXPECTED], notes.list_faults()


def test_other_encodings_are_told_apart_from_damage(tmp_path: Path) -> None:
    rows = [{"prompt": "你好，今天天气怎么样？", "completion": "今天是晴天，很暖和。"}] * 5
    path = tmp_path / "a.jsonl"
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("gb18030"))
    notes = Notes()
    assert [each.messages[0].content for each in Source(str(path)).samples(notes)] == [rows[0]["prompt"]] * 5
    good = json.dumps(rows[0], ensure_ascii=False).encode()
    path.write_bytes(good + b"\n" + good[:-10] + b'\xe4"}\n' + good + b"\n")
    assert len(list(Source(str(path)).samples(notes))) == 2
    assert f"{path}:2" in notes.list_faults() and "damaged" in notes.list_faults()


def test_all_faults_of_a_file_are_listed_by_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    empty = json.dumps({"messages": [HI, HELLO | {"content": ""}]}) + "\n"
    path.write_text(LINE + empty * 12 + "{\n" + LINE)
    notes = Notes()
    assert len(list(Source(str(path)).samples(notes))) == 2 and notes.bad == 13
    listed = notes.list_faults()
    assert "12 × an empty reply" in listed and "and 2 more" in listed and f"{path}:14: not valid JSON" in listed


def test_texts_beside_data_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "LICENSE.txt").write_text("Free.")
    assert [path.name for path in find_files(str(tmp_path))] == ["LICENSE.txt"]
    (tmp_path / "a.jsonl").write_text(LINE)
    assert [path.name for path in find_files(str(tmp_path))] == ["a.jsonl"]
