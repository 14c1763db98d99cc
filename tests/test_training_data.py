"""Fine-tuning data: what is refused and how it is said, which tokens carry loss, and packs that are full and clean."""

import codecs
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

import finetune
from qwen import QwenError, QWenTokenizer
from qwen.chatml import encode_messages
from qwen.loss import IGNORED
from qwen.tools import read_tool, render_messages
from training.data import (
    EvenDataset,
    LazyDataset,
    PackedDataset,
    PaddingCollator,
    TokenDataset,
    collate,
    pack,
    tokenize,
)
from training.forms import read_sample
from training.masks import LOSS_ON, encode_conversation
from training.read import read_conversations
from training.samples import Conversation, Message, Notes

SAMPLES = finetune.ROOT / "finetune" / "sample.jsonl"
HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello!"}
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather of a city.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}  # fmt: skip


def write(path: Path, *samples: Any) -> Path:
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    return path


def parse_sample(sample: Any) -> list[tuple[Message, ...]]:
    return [each.messages for each in read_sample(sample, "here", "sft", Notes())]


def conversation(*turns: dict[str, Any]) -> Conversation:
    [messages] = parse_sample({"messages": list(turns)})
    return Conversation(messages, "here")


def supervised_text(tokenizer: QWenTokenizer, ids: list[int], labels: list[int]) -> str:
    return tokenizer.decode([i for i, label in zip(ids, labels, strict=True) if label != IGNORED])


# ---- reading ----


def test_all_forms_are_the_same_conversation(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    forms = [
        {"messages": [system, HI, HELLO]},
        {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"},
                           {"from": "gpt", "value": "Hello!"}]},
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello!"}],
         "system": "Be brief.", "id": "identity_0"},
        {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [
            {"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, HELLO]},
    ]  # fmt: skip
    expected = [(Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello!"))] * len(forms)
    assert [each.messages for each in read_conversations(write(tmp_path / "a.jsonl", *forms))] == expected
    (tmp_path / "b.json").write_bytes(codecs.BOM_UTF8 + json.dumps(forms, indent=1).encode())
    read = read_conversations(tmp_path / "b.json")
    assert [each.messages for each in read] == expected and read[1].where.endswith("b.json: sample 2")


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ("text", "a sample is .* not text"),
        ({"words": "a"}, 'a sample is .* this has "words"'),
        ({"messages": [], "conversations": []}, 'a sample is .* this has "messages", "conversations"'),
        ({"messages": []}, '"messages" is a list of messages, not an empty list'),
        ({"messages": [HI, "Hello"]}, "turn 2: a message has .* and is not text"),
        ({"messages": [HI, {"role": "assistant"}]}, 'turn 2: .* this has "role"'),
        ({"messages": [HI, {"role": "robot", "content": "a"}]}, "turn 2: the role 'robot' is unknown"),
        ({"messages": [HI, {"role": ["user"], "content": "a"}]}, "turn 2: the role .* is unknown"),
        ({"messages": [HI, {"role": "assistant", "content": 7}]}, "turn 2: the content is a number, not text"),
        ({"messages": [HI, {"role": "assistant", "content": None}]}, "turn 2: the content is null, not text"),
        ({"messages": [HI, {"role": "assistant", "content": [{"type": "image"}]}]},
         "turn 2: the content has a part of type 'image'"),
        ({"messages": [HI, {"role": "assistant", "content": " \n"}]}, "turn 2: the reply is empty"),
        ({"messages": [HI, {"role": "assistant", "content": "\ud800"}]}, "turn 2: character 0 is half of a surrogate"),
        ({"messages": [HI, HELLO | {"train": 2}]}, 'turn 2: "train" is 2: write true or false'),
        ({"messages": [HI | {"train": True}, HELLO]}, 'turn 1: "train" is true for a message of the user'),
        ({"messages": [HELLO, HI]}, "turn 1: assistant is out of place: a conversation begins with the user"),
        ({"messages": [HI, HI, HELLO]}, "turn 2: user is out of place: after user comes assistant"),
        ({"messages": [HI, HELLO, HELLO]}, "turn 3: assistant is out of place: after assistant comes user"),
        ({"messages": [HI, HELLO, {"role": "system", "content": "a"}]}, "turn 3: system is out of place"),
        ({"messages": [HI, {"role": "tool", "content": "a"}]}, "turn 2: tool is out of place"),
        ({"messages": [HI, HELLO], "tools": "[{"}, '"tools" is text that is not JSON'),
        ({"messages": [HI, HELLO], "tools": {"a": 1}}, '"tools" is not a list of tools'),
        ({"messages": [HI, HELLO], "tools": [{"function": {}}]}, "tools: a tool's name is None"),
        ({"messages": [HI, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "turn 2: a call has no .name. of"),
        ({"messages": [HI, {"role": "assistant", "content": "", "function_call": "{"}]}, "turn 2: a call is text that"),
    ],
)  # fmt: skip
def test_bad_samples_name_file_line_turn_and_reason(tmp_path: Path, sample: Any, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", {"messages": [HI, HELLO]}, sample, {"messages": [HI, HELLO]})
    with pytest.raises(QwenError, match=rf"bad\.jsonl:2: {message}") as caught:
        read_conversations(path)
    assert len(str(caught.value).splitlines()) == 1
    path = write(tmp_path / "bad.jsonl", sample, sample, sample)
    with pytest.raises(QwenError, match=r"bad\.jsonl:1: .*\(2 more of 3 samples are bad\)"):
        read_conversations(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"[]", "holds no samples"),
        (b'{"messages": [\n', r"data:2: not valid JSON"),
        (b'[{"messages":\n [}]', r"data:2: not valid JSON"),
        (b'\n{"a": 1}\n{"b"', r'data:2: .* this has "a".*1 more of 2'),
        ("{“messages”".encode("gbk"), "not valid JSON"),
        (b"[" * 200_000, "not valid JSON|nested too deeply"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(QwenError, match=message):
        read_conversations(tmp_path / "data")
    with pytest.raises(QwenError, match="nowhere can't be read: No such file"):
        read_conversations(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(QwenError, match="holds no data"):
        read_conversations(tmp_path / "empty")


# ---- what carries loss ----


def test_published_mask_token_by_token(tokenizer: QWenTokenizer) -> None:
    """The example of the published recipe: 39 tokens, 17 carry loss once shifted, 5 of those are the replies'."""
    example = conversation(HI, HELLO, {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"})
    start, end, newline = tokenizer.im_start_id, tokenizer.im_end_id, tokenizer.encode_text("\n")[0]
    published = encode_conversation(tokenizer, example, 100, "qwen2023")
    assert len(published.input_ids) == 39 and sum(label != IGNORED for label in published.labels[1:]) == 17
    previous = [None, *published.input_ids]
    replies = {position for position, i in enumerate(published.input_ids) if i in tokenizer.encode_text("Hello!")}
    replies.add(len(published.input_ids) - 3)  # the 2
    for position, (i, label) in enumerate(zip(published.input_ids, published.labels, strict=True)):
        control = i in (start, end) or (i == newline and previous[position] == end)
        assert (label != IGNORED) == ((control or position in replies) and position > 0), position

    ours = encode_conversation(tokenizer, example, 100, "assistant")
    assert supervised_text(tokenizer, ours.input_ids, ours.labels) == "Hello!<|im_end|>2<|im_end|>"
    assert sum(label != IGNORED for label in ours.labels) == 5
    last = encode_conversation(tokenizer, example, 100, "last")
    assert supervised_text(tokenizer, last.input_ids, last.labels) == "2<|im_end|>"


text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12)
spelled = st.sampled_from(["<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "é", "\n\n", " ", "你", "👨‍👩‍👧"])
content = st.lists(text | spelled, min_size=1, max_size=4).map("".join)
reply = content.filter(lambda reply: reply.strip())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(content, reply, st.booleans()), min_size=1, max_size=4), content | st.none())
def test_supervised_ids_decode_to_exactly_the_replies(
    tokenizer: QWenTokenizer, turns: list[tuple[str, str, bool]], system: str | None
) -> None:
    messages = [{"role": "system", "content": system}] if system is not None else []
    for question, answer, train in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer, "train": train}]
    example = conversation(*messages)
    replies = [message.content for message in example.messages if message.role == "assistant" and message.train]
    prompt = encode_messages(tokenizer, [vars(message) for message in example.messages], add_generation_prompt=False)
    for loss_on in LOSS_ON:
        sample = encode_conversation(tokenizer, example, 10_000, loss_on)
        if not replies:
            assert sample.fate == "no reply" and not sample.input_ids
            continue
        assert sample.fate == "whole" and sample.input_ids == prompt[: len(sample.input_ids)]
        controls = [i for i in sample.input_ids if i in tokenizer.special_ids]
        blocks = len(controls) // 2
        assert controls == [tokenizer.im_start_id, tokenizer.im_end_id] * blocks  # none of the text's own
        if loss_on != "qwen2023":
            expected = "".join(f"{reply}<|im_end|>" for reply in (replies if loss_on == "assistant" else replies[-1:]))
            assert supervised_text(tokenizer, sample.input_ids, sample.labels) == expected


def test_long_conversations_are_cut_after_a_reply_and_counted(tokenizer: QWenTokenizer) -> None:
    example = conversation(
        HI, HELLO, {"role": "user", "content": "More, please."}, {"role": "assistant", "content": "x " * 99}
    )
    whole = encode_conversation(tokenizer, example, 1000)
    first = len(encode_messages(tokenizer, [HI, HELLO], add_generation_prompt=False))
    for length in range(1, len(whole.input_ids) + 2):
        sample = encode_conversation(tokenizer, example, length)
        if length >= len(whole.input_ids):
            assert (sample.fate, sample.input_ids) == ("whole", whole.input_ids)
        elif length >= first:
            assert sample.fate == "cut"
            assert supervised_text(tokenizer, sample.input_ids, sample.labels) == "Hello!<|im_end|>"
        else:
            assert sample.fate == "too long" and not sample.input_ids
    fates = tokenize([example, example, conversation(HI)], tokenizer, 50, "assistant").fates
    assert fates == {"cut": 2, "no reply": 1}


# ---- tools ----


def test_tools_are_rendered_as_at_inference_and_results_carry_no_loss(tokenizer: QWenTokenizer) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "content": "I look it up.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "Sunny.\nObservation: none.\nThought: 25 °C"},
        {"role": "assistant", "content": "Sunny, 25 °C."},
        {"role": "user", "content": "Thanks!"},
        {"role": "assistant", "content": "You are welcome."},
    ]
    first, second = parse_sample({"messages": messages, "tools": [TOOL]})
    tool = read_tool(TOOL)
    prompt = encode_messages(tokenizer, render_messages(messages[:3], [tool]), False, continue_final_message=True)
    sample = encode_conversation(tokenizer, Conversation(first, "here"), 2000)
    assert sample.input_ids[: len(prompt)] == prompt  # what the model is asked to continue after the result
    written = ["Thought: I look it up.\nAction: weather\nAction Input: {\"city\": \"Rome\"}\nObservation:",
               " I now know the final answer.\nFinal Answer: Sunny, 25 °C.<|im_end|>"]  # fmt: skip
    assert supervised_text(tokenizer, sample.input_ids, sample.labels) == "".join(written)
    sample = encode_conversation(tokenizer, Conversation(second, "here"), 2000)
    expected = "Thought: I now know the final answer.\nFinal Answer: You are welcome.<|im_end|>"
    assert supervised_text(tokenizer, sample.input_ids, sample.labels) == expected
    assert sample.input_ids[: len(sample.input_ids) - 20] == encode_messages(
        tokenizer, render_messages(messages[:5], [tool])
    )[: len(sample.input_ids) - 20]  # fmt: skip

    messages[1]["train"] = False
    first, second = parse_sample({"messages": messages, "tools": [TOOL]})
    sample = encode_conversation(tokenizer, Conversation(first, "here"), 2000)
    assert supervised_text(tokenizer, sample.input_ids, sample.labels) == written[1]


def test_sharegpt_tools_are_the_same(tokenizer: QWenTokenizer) -> None:
    sharegpt = {"tools": json.dumps([TOOL["function"]]), "conversations": [
        {"from": "human", "value": "Weather in Rome?"},
        {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"city": "Rome"}})},
        {"from": "observation", "value": "Sunny."},
        {"from": "gpt", "value": "Sunny."}]}  # fmt: skip
    call = {"name": "weather", "arguments": '{"city": "Rome"}'}
    older = {"tools": [TOOL], "messages": [
        {"role": "user", "content": "Weather in Rome?"}, {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "content": "Sunny."}, {"role": "assistant", "content": "Sunny."}]}  # fmt: skip
    assert parse_sample(sharegpt) == parse_sample(older)


# ---- packs and batches ----


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(50, 120))
def test_packs_hold_every_sample_once_and_are_full(lengths: list[int], capacity: int) -> None:
    packs = pack(lengths, capacity)
    assert sorted(i for each in packs for i in each) == list(range(len(lengths)))
    rooms = [capacity - sum(lengths[i] for i in each) for each in packs]
    assert min(rooms) >= 0
    for number, each in enumerate(packs):  # what opened a pack fitted into none of those before it
        assert all(capacity - sum(lengths[i] for i in earlier if lengths[i] >= lengths[each[0]]) < lengths[each[0]]
                   or rooms[before] < lengths[each[0]] for before, earlier in enumerate(packs[:number]))  # fmt: skip
    assert len(packs) <= 11 / 9 * (sum(lengths) / capacity + 1) * 2


def test_packs_of_chats_are_nearly_full(tokenizer: QWenTokenizer) -> None:
    lengths = [min(int(random.Random(i).lognormvariate(4.5, 0.8)) + 10, 2048) for i in range(3000)]
    packs = pack(lengths, 2048)
    assert sum(lengths) / (2048 * len(packs)) > 0.99


def test_batches_hold_the_samples_unpadded(tokenizer: QWenTokenizer) -> None:
    conversations = read_conversations(SAMPLES)
    samples = tokenize(conversations, tokenizer, 512, "qwen2023")
    items = [samples[i] for i in (3, 0, 7)]
    batch = collate(items)
    lengths = [len(item["input_ids"]) for item in items]
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (1, sum(lengths))
    for part, item in zip(batch["input_ids"][0].split(lengths), items, strict=True):
        assert torch.equal(part, item["input_ids"])
    assert batch["position_ids"][0].tolist() == [p for length in lengths for p in range(length)]
    borders = batch["cu_seq_lens_q"].tolist()
    assert all(batch["labels"][0, border] == IGNORED for border in borders[:-1])  # never told from the sample before
    packed = PackedDataset(samples, [[3, 0], [7]])
    again = collate([packed[0], packed[1]])
    assert all(torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(again[name])) for name in batch)
    padded = PaddingCollator(0)([packed[0], packed[1]])
    assert padded["attention_mask"].sum(-1).tolist() == lengths
    for row, item in zip(padded["input_ids"], items, strict=True):
        assert torch.equal(row[: len(item["input_ids"])], item["input_ids"])


@pytest.mark.parametrize(("samples", "batch", "processes"), [(5, 2, 2), (7, 2, 3), (1, 4, 2), (8, 2, 2), (3, 1, 4)])
def test_all_processes_together_evaluate_each_sample_once(samples: int, batch: int, processes: int) -> None:
    """Shared out by accelerate, which fills the last round up."""
    dataset = TokenDataset()
    for i in range(samples):
        dataset.append([0, i + 1, i + 1], [IGNORED, i + 1, i + 1])
    even = EvenDataset(dataset, batch * processes)
    sampler = BatchSampler(range(len(even)), batch, drop_last=False)
    rounds, seen = set(), []
    for process in range(processes):
        batches = [collate([even[i] for i in indices]) for indices in BatchSamplerShard(sampler, processes, process)]
        rounds.add(len(batches))
        seen += [i for each in batches for i in each["labels"].flatten().tolist() if i != IGNORED]
    assert len(rounds) == 1  # nobody waits for another
    assert sorted(seen) == [i + 1 for i in range(samples) for _ in range(2)]


@pytest.mark.parametrize("max_length", [24, 32, 40, 64, 128, 512])
def test_lazy_data_hold_what_can_be_learned_once(tokenizer: QWenTokenizer, max_length: int) -> None:
    """At every length the samples that tokenising all of them keeps, in their order, and a count of the others."""
    rows = [("Hi", "Hello!"), ("Hi " * 60, "Yes"), ("你好" * 9, "好"), ("Tell", "no " * 100), ("😀" * 8, "🙂" * 3)]
    conversations = [
        Conversation((Message("user", question), Message("assistant", answer)), "x") for question, answer in rows
    ]
    eager = tokenize(conversations, tokenizer, max_length, "assistant")
    if not len(eager):
        with pytest.raises(QwenError, match="raise --model_max_length"):
            LazyDataset(conversations, tokenizer, max_length, "assistant")
        return
    lazy = LazyDataset(conversations, tokenizer, max_length, "assistant")
    assert len(lazy) == len(eager) and lazy.dropped == len(rows) - len(eager)
    assert all(torch.equal(lazy[i]["input_ids"], eager[i]["input_ids"]) for i in range(len(eager)))


def test_lazy_samples_equal_tokenised_ones(tokenizer: QWenTokenizer) -> None:
    conversations = read_conversations(SAMPLES)
    lazy = LazyDataset(conversations, tokenizer, 512, "assistant")
    eager = tokenize(conversations, tokenizer, 512, "assistant")
    assert len(lazy) == len(eager) == 20
    for i in range(20):
        assert all(torch.equal(torch.as_tensor(lazy[i][k]), torch.as_tensor(eager[i][k])) for k in eager[i])
    with pytest.raises(QwenError, match="raise --model_max_length"):
        LazyDataset(conversations, tokenizer, 16, "assistant")


def test_data_are_mixed_by_weights() -> None:
    samples = list(range(100))
    twice = finetune.repeat(samples, 2.25, 1)
    assert len(twice) == 225 and all(2 <= twice.count(i) <= 3 for i in samples)
    tenth = finetune.repeat(samples, 0.1, 1)
    assert len(set(tenth)) == 10 and tenth == finetune.repeat(samples, 0.1, 1) != finetune.repeat(samples, 0.1, 2)
    with pytest.raises(QwenError, match="--data_weights has 1 numbers, and --data_path 2 names: give one for each"):
        finetune.parse_args(["-d", "a", "b", "--data_weights", "1"])


# ---- the report ----


def test_report_on_a_file(demo_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": [HI, HELLO]}, {"messages": [HI]},
                 {"messages": [HI | {"content": "<|im_end|> " * 40}, HELLO]})  # fmt: skip
    assert finetune.main(["--check_data", str(path), "-c", "demo", "--model_max_length", "64"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"3 samples: 1 used whole, 1 dropped: the first reply does not fit, 1 dropped: no reply", printed)
    assert "1 messages spell a control token" in printed and "tokens a sample: median" in printed
    assert printed.endswith("<|im_start|>assistant\n[[Hello!<|im_end|>]]\n\n")
    path = write(tmp_path / "b.jsonl", {"messages": [HI]})
    assert finetune.main(["--check_data", str(path), "-c", "demo"]) == 1
