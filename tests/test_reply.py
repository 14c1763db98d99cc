"""ReplyDecoder against what it should come to, said in one line: join the bytes, decode, cut, strip."""

import codecs
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import golden
from qwen import QWenTokenizer
from qwen.reply import Reply, ReplyDecoder

TOKENIZER = QWenTokenizer(golden.DATA / "qwen.tiktoken")
IM_END, EXTRA = TOKENIZER.im_end_id, TOKENIZER.special_tokens["<|extra_0|>"]


def whole(ids: list[int], stop_ids: list[int], stop_words: list[str]) -> tuple[str, bool]:
    """The reply of all ids at once, and whether anything stopped it."""
    stopped = any(i in stop_ids for i in ids)
    if stopped:
        ids = ids[: min(ids.index(i) for i in stop_ids if i in ids)]
    data = b"".join(token for i in ids if isinstance(token := TOKENIZER.decoder.get(i), bytes))
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(data)  # not final: half a character is left out
    ends = [(text.find(word) + len(word), text.find(word)) for word in stop_words if word in text]
    return (text[: min(ends)[1]] if ends else text).strip(), stopped or bool(ends)


def run(ids: list[int], stop_ids: list[int], stop_words: list) -> tuple[ReplyDecoder, list[str]]:
    decoder = ReplyDecoder(TOKENIZER, stop_ids, stop_words)
    return decoder, [*(decoder.push(i) for i in ids), decoder.close("length")]


text = st.text(alphabet=st.one_of(st.characters(), st.sampled_from("你好世界😀👨‍👩‍👧é\n \tab:")), max_size=30)
ids_of_text = text.map(TOKENIZER.encode_text)
random_bytes = st.binary(max_size=20).map(lambda data: [TOKENIZER.mergeable_ranks[bytes([b])] for b in data])
random_ids = st.lists(st.integers(0, 151935), max_size=15)
pieces = st.lists(st.one_of(ids_of_text, random_bytes, random_ids, st.just([EXTRA])), max_size=5).map(
    lambda lists: [i for ids in lists for i in ids]
)


@settings(max_examples=300, deadline=None)
@given(pieces, st.lists(st.text("ab: \n好", min_size=1, max_size=4), max_size=3), st.booleans())
def test_stream_equals_whole(ids: list[int], stop_words: list[str], ends: bool) -> None:
    ids = [*ids, IM_END, *TOKENIZER.encode_text("never shown")] if ends else ids
    decoder, shown = run(ids, [IM_END], stop_words)
    expected, stopped = whole(ids, [IM_END], stop_words)
    assert "".join(shown) == decoder.text == expected
    assert (decoder.finish_reason == "length") == (not stopped)


@settings(max_examples=100, deadline=None)
@given(text, st.sampled_from(["Observation: 1", "好世界", "\n\nz", ""]))
def test_stop_words_across_token_borders(content: str, ending: str) -> None:
    """However text is cut into tokens, byte by byte too, the same word stops it at the same place."""
    words = ["Observation:", "好世", "\n\n", content[len(content) // 2 :][:3] or "x"]
    # What the tokenizer makes of it anyway: lone surrogates replaced, and composed.
    content = unicodedata.normalize("NFC", (content + ending).encode("utf-8", "replace").decode())
    natural, _ = run(TOKENIZER.encode_text(content), [], words)
    as_bytes, _ = run([TOKENIZER.mergeable_ranks[bytes([b])] for b in content.encode()], [], words)
    assert natural.text == as_bytes.text


def test_half_a_character_never_shows() -> None:
    ids = TOKENIZER.encode_text("👨‍👩‍👧 🤷🏽 你")
    decoder, shown = run(ids, [], [])
    assert "".join(shown) == "👨‍👩‍👧 🤷🏽 你" and not any("\ufffd" in part for part in shown)
    assert run(TOKENIZER.encode_text("ok 😀")[:-1], [], [])[0].text == "ok"  # cut by length inside a character


def test_stop_words_as_ids() -> None:
    ids = TOKENIZER.encode_text("Yes.\nHuman: and")
    for stop in ("Human:", TOKENIZER.encode_text("Human:"), [33975, 25]):
        decoder, shown = run(ids, [], [stop])
        assert (decoder.text, decoder.finish_reason) == ("Yes.", "stop_word")
    newline = TOKENIZER.encode_text("\n")
    ids = [*TOKENIZER.encode_text("Yes."), *newline, IM_END, 9707]
    decoder, _ = run(ids, [], [[*newline, IM_END]])  # regular and control tokens mixed
    assert (decoder.text, decoder.finish_reason, decoder.tokens) == ("Yes.", "stop", len(ids) - 1)
    decoder, _ = run(ids, [], [IM_END])
    assert (decoder.text, decoder.finish_reason) == ("Yes.", "stop")
    for empty in ("", []):
        with pytest.raises(ValueError, match="a stop word is empty"):
            ReplyDecoder(TOKENIZER, [], [empty])


def test_what_might_be_a_stop_word_is_held_back_until_it_is_not() -> None:
    decoder = ReplyDecoder(TOKENIZER, [], ["Observation:"])
    shown = [decoder.push(i) for i in TOKENIZER.encode_text("An Observ")]
    assert "".join(shown) == "An"
    assert decoder.push(TOKENIZER.encode_text("atory")[0]).startswith(" Observ")


def test_reply_is_a_string_that_says_how_it_ended() -> None:
    reply = Reply("hi", "length", 3, 2)
    assert reply == "hi" and isinstance(reply, str) and f"{reply}!" == "hi!"
    assert (reply.finish_reason, reply.prompt_tokens, reply.completion_tokens) == ("length", 3, 2)
