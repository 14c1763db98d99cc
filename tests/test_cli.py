"""The chat's commands, settings, files and errors, with a real but tiny model whose replies can be dictated."""

import io
import json
import os
import re
import string
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

import golden
from cli.commands import COMMANDS, handle_line
from cli.display import Display, make_console
from cli.session import ChatSession
from cli.settings import COMMON, SETTINGS, parse_value
from cli.terminal import CommandCompleter, find_state_dir, open_line_history
from cli.texts import LANGUAGES, Texts, default_language
from cli.transcript import load_transcript
from qwen import QWenConfig, QWenLMHeadModel, QWenTokenizer
from qwen.chatml import DEFAULT_SYSTEM

Dictate = Callable[[str], None]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> QWenTokenizer:
    """The beginning of Qwen's vocabulary: sampling from all of it would take most of the time here."""
    path = tmp_path_factory.mktemp("vocabulary") / "qwen.tiktoken"
    path.write_bytes(b"".join((golden.DATA / "qwen.tiktoken").read_bytes().splitlines(keepends=True)[:4000]))
    return QWenTokenizer(path)


@pytest.fixture(scope="module")
def model(tokenizer: QWenTokenizer) -> QWenLMHeadModel:
    torch.manual_seed(0)
    model = QWenLMHeadModel(
        QWenConfig(
            vocab_size=tokenizer.eod_id + 208, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, kv_channels=8, seq_length=128, max_position_embeddings=128,
        )
    ).eval()  # fmt: skip
    model.generation_config = GenerationConfig(
        chat_format="chatml", max_window_size=100, do_sample=True, top_p=0.8, max_new_tokens=8,
        eos_token_id=tokenizer.eod_id,
    )  # fmt: skip
    return model


@pytest.fixture
def session(model: QWenLMHeadModel, tokenizer: QWenTokenizer) -> ChatSession:
    display = Display(make_console(io.StringIO(), True), make_console(io.StringIO(), True), rich_replies=False)
    return ChatSession(model, tokenizer, display, Texts("en"), seed=1)


@pytest.fixture
def dictate(model: QWenLMHeadModel, tokenizer: QWenTokenizer) -> Iterator[Dictate]:
    """Makes the model's next reply a given text: only its logits are replaced."""
    ids: list[int] = []

    def hook(module: torch.nn.Module, inputs: tuple, logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, -100).index_fill_(-1, torch.tensor(ids.pop(0)), 100) if ids else logits

    def set_reply(text: str) -> None:
        ids[:] = [*tokenizer.encode_text(text), tokenizer.eod_id]

    handle = model.lm_head.register_forward_hook(hook)
    yield set_reply
    handle.remove()


def notes(session: ChatSession) -> str:
    """What has been said about the chat since the last look, in one line."""
    file = session.display.notes.file
    text = " ".join(file.getvalue().split())
    file.seek(0)
    file.truncate()
    return text


def do(session: ChatSession, *lines: str) -> str:
    for line in lines:
        handle_line(session, line)
    return notes(session)


# ---- messages and replies ----


def test_a_turn(session: ChatSession, dictate: Dictate) -> None:
    dictate("Salut <b>")
    assert do(session, "  Hello  ") == ""
    assert session.history == [("  Hello  ", "Salut <b>")]
    assert session.display.replies.file.getvalue() == "Salut <b>\n"


def test_empty_lines_are_no_messages(session: ChatSession) -> None:
    assert do(session, "", "  ", "\n") == "" and session.history == []


def test_a_doubled_colon_begins_a_message(session: ChatSession, dictate: Dictate) -> None:
    for typed, message in [("::q", ":q"), (" :::q", "::q"), ("\uff1a\uff1aq", "\uff1aq")]:
        dictate("ok")
        do(session, typed)
        assert session.history[-1] == (message, "ok")
    assert not session.leaving


def test_an_empty_reply_is_kept_as_empty(session: ChatSession, dictate: Dictate) -> None:
    dictate("first")
    do(session, "one")
    dictate("")
    assert "empty reply" in do(session, "two")
    assert session.history == [("one", "first"), ("two", "")]


def test_a_reply_that_is_cut_says_so(session: ChatSession, dictate: Dictate) -> None:
    dictate("one two three four five six")
    assert "cut at max_new_tokens=3" in do(session, ":conf max_new_tokens=3", "count")
    dictate("one")
    assert "cut" not in do(session, "count")
    assert session.history == [("count", "one two three"), ("count", "one")]


def test_a_history_that_is_cut_says_so(session: ChatSession, dictate: Dictate) -> None:
    dictate("ok")
    do(session, "word " * 60)
    dictate("ok")
    assert do(session, "hello") == ""
    dictate("ok")
    assert "first 1 of 2 turns" in do(session, ":conf max_window_size=50", "hello")


def test_seeds_make_a_chat_repeatable(session: ChatSession) -> None:
    do(session, "a", "b", ":regen", "c")
    first = session.history[:]
    assert session.seed == 5
    do(session, ":clear-his", ":seed 1", "a", "b", ":regen", "c")
    assert session.history == first
    do(session, ":clear-his", ":seed 2", "a")
    assert session.history[0] != first[0]


def test_regen_gives_another_answer(session: ChatSession) -> None:
    do(session, "a")
    [(query, answer)] = session.history
    do(session, ":regen")
    assert len(session.history) == 1 and session.history[0][0] == query and session.history[0][1] != answer


def test_without_a_seed_chats_differ(model: QWenLMHeadModel, session: ChatSession) -> None:
    seeds = {ChatSession(model, session.tokenizer, session.display, session.texts).seed for _ in range(5)}
    assert len(seeds) > 1


def test_a_base_model_completes_text(session: ChatSession, dictate: Dictate) -> None:
    do(session, ":conf chat_format=raw")
    dictate("Paris")
    do(session, "The capital of France is")
    assert session.history == [("The capital of France is", "Paris")]
    words = session.tokenizer.encode_text("The capital of France is")
    assert session.stats.tokens_read == len(words)  # without ChatML
    assert "reads no system message" in do(session, ":system")


# ---- errors ----


def check_error_and_recovery(session: ChatSession, line: str, message: str, dictate: Dictate) -> None:
    session.history[:] = [("a", "b")]
    said = do(session, line)
    assert said.count("error:") == 1 and message in said and "Traceback" not in said
    assert session.history == [("a", "b")]


def test_a_prompt_too_long(session: ChatSession, dictate: Dictate) -> None:
    check_error_and_recovery(session, "word " * 600, "at most 512", dictate)
    dictate("fine")
    do(session, "hello")
    assert session.history[-1] == ("hello", "fine")


def test_nan_logits(session: ChatSession, dictate: Dictate) -> None:
    weight = session.model.transformer.ln_f.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    check_error_and_recovery(session, "hello", "NaN", dictate)
    check_error_and_recovery(session, ":regen", "NaN", dictate)
    with torch.no_grad():
        weight.copy_(kept)
    dictate("fine")
    do(session, "hello")
    assert session.history[-1] == ("hello", "fine")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_memory_that_runs_out(session: ChatSession, dictate: Dictate, error: Exception) -> None:
    def fail(*args: object) -> None:
        raise error

    handle = session.model.transformer.register_forward_pre_hook(fail)
    check_error_and_recovery(session, "hello", "memory ran out: :clear-his", dictate)
    handle.remove()


# ---- the table of commands ----


def test_every_command_is_reachable_and_explained(session: ChatSession, dictate: Dictate, tmp_path: Path) -> None:
    help_en = do(session, ":help")
    session.texts = Texts("zh")
    help_zh = do(session, ":h")
    session.texts = Texts("en")
    for name, command in COMMANDS.items():
        for typed in (name, *command.aliases):
            assert re.search(rf"(^|[ ,]):{typed}\b", help_en) and f":{typed}" in help_zh
            session.history[:] = [("question", "answer")]
            dictate("ok")
            argument = f" {tmp_path / 'chat.json'}" if command.required else ""
            assert "error" not in do(session, f":{typed}{argument}")
            if not command.argument:
                assert "takes no argument" in do(session, f":{typed} now")
        assert Texts("en")(f"help_{name}") in help_en
        assert "".join(Texts("zh")(f"help_{name}").split()) in "".join(help_zh.split())


def test_no_two_commands_share_a_name() -> None:
    names = [typed for name, command in COMMANDS.items() for typed in (name, *command.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("typed", [":q", ":quit", ":exit", " :Q ", "\uff1aexit"])
def test_leaving(session: ChatSession, typed: str) -> None:
    do(session, typed)
    assert session.leaving


@pytest.mark.parametrize(("typed", "meant"), [(":hlep", ":help"), (":regne", ":regen"), (":clear-hist", ":clear-his")])
def test_unknown_commands_name_the_nearest(session: ChatSession, typed: str, meant: str) -> None:
    said = do(session, typed)
    assert f"no command {typed}" in said and f"did you mean {meant}" in said
    assert session.history == []


@pytest.mark.parametrize("typed", [":", ":)", ": help me", ":xyzzy", ":\x1b[2J"])
def test_unlike_any_command(session: ChatSession, typed: str) -> None:
    said = do(session, typed)
    assert "no command" in said and "did you mean" not in said and ":: begins a message" in said and "\x1b" not in said


def test_history_undo_and_clear(session: ChatSession) -> None:
    session.history[:] = [("one", "[/b] <i>"), ("two", "\x1b[31m")]
    assert do(session, ":his") == "1> one [/b] <i> 2> two \u241b[31m"
    assert "two" in do(session, ":undo") and session.history == [("one", "[/b] <i>")]
    assert "1" in do(session, ":clh") and session.history == []
    for command in (":undo", ":regen", ":history"):
        assert "no turns" in do(session, command)


def test_seed_command(session: ChatSession) -> None:
    assert "seed 7." in do(session, ":seed 7") and session.seed == 7
    assert "seed 7." in do(session, ":seed")
    for bad in ("-1", "x", "1.5", str(2**32), "9" * 5000):
        assert "from 0 to 4294967295" in do(session, f":seed {bad}") and session.seed == 7
    assert "error" not in do(session, f":seed {2**32 - 1}", "hello") and session.seed == 0


def test_system_message(session: ChatSession, dictate: Dictate) -> None:
    assert "You are a helpful assistant." in do(session, ":system")
    before = session.stats.tokens_read
    dictate("ok")
    do(session, "hi")
    short = session.stats.tokens_read - before
    do(session, ":undo", ":system " + "word " * 20)
    dictate("ok")
    do(session, "hi")
    read = session.stats.tokens_read - before - short
    default, long = (len(session.tokenizer.encode_text(text)) for text in (DEFAULT_SYSTEM, ("word " * 20).strip()))
    assert read == short - default + long


def test_stats(session: ChatSession, dictate: Dictate) -> None:
    assert "no reply yet" in do(session, ":stats")
    dictate("one two three")
    do(session, "hi")
    said = do(session, ":stats")
    assert "4 tokens," in said and "1 replies" in said and "of max_window_size=100" in said and "at most 512" in said


# ---- settings ----


def test_conf_changes_what_generation_reads(session: ChatSession, dictate: Dictate) -> None:
    own = session.model.generation_config.to_dict()
    do(session, ":conf max_new_tokens=2 do_sample=off")
    dictate("a b c d")
    do(session, "go")
    assert session.history == [("go", "a b")]
    do(session, ":conf suppress_tokens=" + json.dumps(session.tokenizer.encode_text("a")), ":regen")
    assert session.history[0][1] != "a b"
    assert session.model.generation_config.to_dict() == own
    do(session, ":reset-conf")
    assert session.config.max_new_tokens == 8 and session.config.do_sample is True


def test_conf_is_greedy_when_told(session: ChatSession) -> None:
    do(session, ":conf temperature=0", "go")
    first = session.history[0]
    do(session, ":regen")
    assert session.history[0] == first


EDGES = {
    "bool": ["true", "off", "1"],
    "ids": ["3", "[3, 4]", "[0]"],
    "id_lists": ["[[3], [4, 5]]"],
    "choice": ["raw", "ChatML"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_transformers_takes_what_conf_takes(session: ChatSession, name: str) -> None:
    setting = SETTINGS[name]
    edges = EDGES.get(setting.kind, [])
    if setting.kind in ("int", "float"):
        low = 1e-3 if setting.open_low else setting.low
        edges = [str(low), str(min(setting.high, 5)), "none" if setting.optional else str(low)]
    for edge in edges:
        do(session, ":reset-conf")
        said = do(session, f":conf max_new_tokens=2 {name}={edge}")
        assert "error" not in said and name in said, said
        assert getattr(session.config, name) == parse_value(edge, setting)
        assert "error" not in do(session, "hi")


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ("top_p=1.5", "top_p must be a number from 0 to 1, or none, not 1.5"),
        ("top_p=-0.1", "from 0 to 1"),
        ("typical_p=0", "above 0, up to 1"),
        ("temperature=nan", "a number, 0 or more"),
        ("temperature=inf", "a number, 0 or more"),
        ("temperature=", "a number"),
        ("temperature=hot", "not hot"),
        ("temperature=__import__('os')", "a number"),
        ("max_new_tokens=0", "a whole number, 1 or more"),
        ("max_new_tokens=1.5", "a whole number"),
        ("do_sample=maybe", "true or false"),
        ("do_sample=none", "true or false"),
        ("chat_format=alpaca", "chatml / raw"),
        ("eos_token_id=[]", "a list of token ids"),
        ("eos_token_id=[true]", "a list of token ids"),
        ("eos_token_id=[-1]", "a list of token ids"),
        ("bad_words_ids=[1]", "a list of lists"),
        ("suppress_tokens=" + "[" * 100_000, "a list of token ids"),
        ("tempreature=1", "did you mean temperature"),
        ("num_beams=4", "no setting num_beams"),
        ("temperature", None),
        ("top_p=0.5 nonsense", "top_p must be"),
        ("=3", "write :conf key=value"),
        ("nonsense", "no setting nonsense"),
    ],
)
def test_conf_refuses(session: ChatSession, typed: str, reason: str | None) -> None:
    before = session.config.to_dict()
    said = do(session, f":conf min_p=0.5 {typed}" if "=" in typed and not typed.startswith("=") else f":conf {typed}")
    assert session.config.to_dict() == before, "all or nothing"
    if reason:
        assert said.startswith("error:") and reason in said
    else:
        assert "a number, 0 or more, or none" in said


def test_conf_shows_what_is_common_and_what_differs(session: ChatSession) -> None:
    said = do(session, ":conf")
    assert all(name in said for name in COMMON) and "min_p" not in said and "checkpoint" not in said
    assert "no effect while do_sample=false" in do(session, ":conf do_sample=false, min_p = 0.1")
    said = do(session, ":conf")
    assert "min_p 0.1 (checkpoint: none)" in said and "do_sample false (checkpoint: true)" in said


# ---- transcripts ----


def test_save_and_load(session: ChatSession, tmp_path: Path) -> None:
    path = tmp_path / "my chat.json"
    turns = [("question\n\u4f60\u597d", "answer \U0001f389 \x1b[0m"), ("", "")]
    session.system, session.history = "Be brief.", turns[:]
    assert "my chat.json" in do(session, f":save {path}")
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "format": "qwen-chat",
        "version": 1,
        "system": "Be brief.",
        "turns": [{"user": query, "assistant": reply} for query, reply in turns],
    }
    do(session, ":clear-his", ":system other", f":load {path}")
    assert (session.system, session.history) == ("Be brief.", turns)
    session.history.append(("more", "text"))
    assert "error" not in do(session, f":save {path}") and len(load_transcript(path).turns) == 3
    assert os.listdir(tmp_path) == ["my chat.json"]


GOOD = {"format": "qwen-chat", "version": 1, "system": "s", "turns": []}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"[]", "lacks"),
        (b'{"turns": []}', "lacks"),
        (json.dumps(GOOD | {"version": 2}).encode(), "version 2"),
        (json.dumps(GOOD | {"system": None}).encode(), "damaged"),
        (json.dumps(GOOD | {"turns": {}}).encode(), "damaged"),
        (json.dumps(GOOD | {"turns": [["a", "b"]]}).encode(), "turn 1"),
        (json.dumps(GOOD | {"turns": [{"user": "a", "assistant": "b"}, {"user": "a"}]}).encode(), "turn 2"),
        (json.dumps(GOOD | {"turns": [{"user": "\ud800", "assistant": "b"}]}).encode(), "turn 1"),
    ],
)
def test_files_that_are_no_transcripts(session: ChatSession, tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    session.history[:] = [("a", "b")]
    for command in (":load", ":save"):
        said = do(session, f"{command} {path}")
        assert said.count("error:") == 1 and reason in said and "x.json" in said
    assert session.history == [("a", "b")]
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("name", ["", "no/such/dir/x.json", "file/x.json", "n" * 300, "nul\0byte", "~nobody-at-all/x"])
def test_paths_that_cannot_be_written_or_read(
    session: ChatSession, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for command in (":load", ":save"):
        for path in {name or ".", name or "/dev/null"}:
            said = do(session, f"{command} {path}")
            assert said.count("error:") == 1 and "Traceback" not in said
    assert "needs a file name" in do(session, ":save")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_full_disk_leaves_the_old_file(session: ChatSession, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "chat.json"
    do(session, f":save {path}")
    before = path.read_bytes()
    session.history[:] = [("a" * 100_000, "b")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # Python ignores SIGXFSZ, so that write() fails
    try:
        said = do(session, f":save {path}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write" in said and path.read_bytes() == before and os.listdir(tmp_path) == ["chat.json"]


def test_a_link_stays_a_link(session: ChatSession, tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to("chat.json")
    do(session, f":save {tmp_path / 'link.json'}")
    assert (tmp_path / "link.json").is_symlink() and load_transcript(tmp_path / "chat.json").turns == []


# ---- texts and input ----


def test_both_languages_say_everything() -> None:
    table = json.loads((Path(__file__).parents[1] / "cli" / "texts.json").read_text(encoding="utf-8"))
    source = "".join(path.read_text(encoding="utf-8") for path in (Path(__file__).parents[1]).glob("cli*/*.py"))
    source += (Path(__file__).parents[1] / "cli_demo.py").read_text(encoding="utf-8")
    for key, entry in table.items():
        assert set(entry) == set(LANGUAGES)
        fields = [{field for _, field, _, _ in string.Formatter().parse(entry[lang]) if field} for lang in LANGUAGES]
        assert fields[0] == fields[1], key
        assert re.search(r"[\u4e00-\u9fff\uff00-\uffef]", entry["zh"]) or key == "kind_bool", key
        built = key.split("_")[0] in ("help", "kind", "argument")
        assert built or f'"{key}"' in source, f"{key} is never shown"


@pytest.mark.parametrize(
    ("environ", "language"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "de_DE", "LC_MESSAGES": "zh_TW"}, "zh"),
        ({"LANG": "zh_CN", "LC_ALL": ""}, "zh"),
    ],
)
def test_language_of_the_locale(environ: dict[str, str], language: str) -> None:
    assert default_language(environ) == language


def test_completion(session: ChatSession, tmp_path: Path) -> None:
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document

    (tmp_path / "chat.json").touch()

    def complete(typed: str) -> set[str]:
        found = CommandCompleter(session).get_completions(Document(typed), CompleteEvent())
        return {typed[: len(typed) + item.start_position] + item.text for item in found}

    assert complete(":") == {f":{name}" for name in COMMANDS}
    assert complete(":re") == {":reset-conf", ":regen"}
    assert complete(":conf do_sample=true top_") == {":conf do_sample=true top_k=", ":conf do_sample=true top_p="}
    assert complete(f":load {tmp_path}/ch") == {f":load {tmp_path}/chat.json"}
    assert complete("") == complete("hello :") == set()


def test_line_history_is_private_and_kept(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    open_line_history(directory).append_string("line one\nline two")
    assert (directory / "cli_history").stat().st_mode & 0o077 == 0
    assert list(open_line_history(directory).load_history_strings()) == ["line one\nline two"]


def test_line_history_without_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for place in (None, tmp_path / "file" / "state"):
        history = open_line_history(place)
        history.append_string("line")
        assert history.get_strings() == ["line"]
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert find_state_dir() == tmp_path / "qwen-7b"
