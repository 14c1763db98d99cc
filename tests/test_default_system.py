"""A checkpoint's own default system message: where it holds, and that it is kept by whatever is saved."""

import json
from pathlib import Path

import jinja2
import pytest

import golden
from qwen import QwenError, QWenTokenizer
from qwen.chat_template import chat_template, template_system
from qwen.chatml import build_prompt, encode_messages, make_context
from training.masks import encode_conversation
from training.samples import Conversation, Message

HARD = "Say \"it's\" {{ x }} {% y %} \\' \\n\nnewline\ttab 你好 🎉 <|im_end|>"
USER = {"role": "user", "content": "Hi"}


@pytest.fixture
def own() -> QWenTokenizer:
    return QWenTokenizer(golden.DATA / "qwen.tiktoken", default_system="Be brief.")


def test_every_way_to_a_prompt_begins_with_it(own: QWenTokenizer) -> None:
    start = "<|im_start|>system\nBe brief.<|im_end|>\n"
    sample = encode_conversation(
        own, Conversation([Message("user", "Hi"), Message("assistant", "Hello.")], "here"), 1000
    )
    for ids in (
        build_prompt(own, "Hi").ids,
        make_context(own, "Hi", None, None)[1],
        encode_messages(own, [USER]),
        own.apply_chat_template([USER])["input_ids"],
        sample.input_ids,
    ):
        assert own.decode(ids).startswith(start)
    assert own.apply_chat_template([USER], tokenize=False).startswith(start)


def test_a_given_message_wins(own: QWenTokenizer) -> None:
    history = [{"role": "system", "content": "Of the history."}, USER, {"role": "assistant", "content": "Hello."}]
    assert "Of the history." in build_prompt(own, "And?", history).text
    for system in ("You are a helpful assistant.", "", "Given."):
        assert build_prompt(own, "And?", history, system).text.startswith(f"<|im_start|>system\n{system}<|im_end|>")
    with pytest.raises(QwenError, match="system is 5 and should be a text"):
        build_prompt(own, "Hi", system=5)


def test_qwens_own_is_the_default(tokenizer: QWenTokenizer) -> None:
    assert tokenizer.default_system == "You are a helpful assistant."
    assert make_context(tokenizer, "Hi") == make_context(tokenizer, "Hi", system="You are a helpful assistant.")


def test_it_is_saved_and_can_be_edited(own: QWenTokenizer, tmp_path: Path) -> None:
    own.save_pretrained(tmp_path)
    again = QWenTokenizer.from_pretrained(tmp_path)
    assert (again.default_system, again.chat_template) == ("Be brief.", own.chat_template)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"default_system": "Be long."}))
    edited = QWenTokenizer.from_pretrained(tmp_path)
    ids = edited.apply_chat_template([USER])["input_ids"]
    assert edited.decode(ids) == edited.apply_chat_template([USER], tokenize=False)
    assert "Be long." in edited.decode(ids) and "Be brief." not in edited.chat_template
    path.write_text(json.dumps(settings | {"default_system": 5}))
    with pytest.raises(QwenError, match=r"default_system \(in tokenizer_config.json\) is 5 and should be a text"):
        QWenTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("system", ["", "Be brief.", HARD])
def test_any_text_goes_into_the_template_and_back(system: str) -> None:
    template = chat_template(system)
    text = jinja2.Template(template).render(messages=[USER], add_generation_prompt=True)
    told = system.replace("<|im_end|>", "< |im_end|>")  # the template's, so that it ends no message
    assert text == f"<|im_start|>system\n{told}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert template_system(template) == system
    assert template_system(template + "{# mine #}") is None
