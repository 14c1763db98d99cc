"""The chat page in a real browser, its model behind it, as people use it: type, stop, reload, two tabs, a restart."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.transcript import Transcript, load_transcript, save_transcript

webdriver = pytest.importorskip("selenium.webdriver")
import browser  # noqa: E402
from browser import Keys, Page  # noqa: E402

PROGRAMS = browser.find_chromium()
ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(PROGRAMS is None, reason="no Chromium: apt-get install chromium chromium-driver")

LONG = "say: " + " ".join(str(number) for number in range(150))
PIECES = ["<b>", "</b>", "<img src=x onerror=a>", "![a](b)", "![", "[a]: b", "`", "``", "```", "~~~", "\n", "\n\n",
          "    ", "- ", "> ", "\\", "&lt;", "<!--", "a", " ", "]", "(b)", "<?", "$", "$$"]  # fmt: skip
HTML = '<img src=x onerror="window.pwned=1"> <script>window.pwned=1</script> <b>bold</b>'


@contextlib.contextmanager
def serve(log: Path, *flags: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A running web_demo.py with the demo checkpoint, and its address."""
    port = [] if "--server-port" in flags else ["--server-port", "0"]
    command = [sys.executable, str(ROOT / "tests" / "web_worker.py"), "-c", "demo", *port, *flags]
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    env = os.environ | {"PYTHONPATH": path, "no_proxy": "127.0.0.1"}
    with open(log, "w") as errors:
        process = subprocess.Popen(command, stdout=errors, stderr=subprocess.PIPE, text=True, env=env)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"http://\S+", line):
                yield process, found[0]
                return
        pytest.fail("".join(lines))
    finally:
        process.send_signal(signal.SIGINT)
        with process.stderr:
            rest = process.stderr.read()
        assert process.wait(30) == 0 and "Traceback" not in rest, rest


@pytest.fixture(scope="module")
def url(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two replies at once, and room for short chats only."""
    log = tmp_path_factory.mktemp("web") / "stdout.txt"
    with serve(log, "--max-users", "2", "--kv-cache-gib", "0.3", "--lang", "en") as (_, url):
        yield url


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def driver(downloads: Path) -> Iterator["webdriver.Chrome"]:
    driver = browser.start_browser(PROGRAMS, downloads)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def other_driver(downloads: Path) -> Iterator["webdriver.Chrome"]:
    driver = browser.start_browser(PROGRAMS, downloads, 360, 740)
    yield driver
    driver.quit()


@pytest.fixture
def page(driver: "webdriver.Chrome", url: str) -> Page:
    return Page(driver, url).open()


def test_a_reply_streams_and_can_be_stopped_and_gone_on_with(page: Page) -> None:
    page.send(LONG)
    first = page.wait(lambda: "0 1 2 3" in page.answer and page.answer)
    longer = page.wait(lambda: len(page.answer) > len(first) + 10 and page.answer)
    assert longer.startswith("0 1 2 3") and page.is_busy
    page.click("#message .stop-button")
    page.wait(lambda: not page.is_busy and "stopped" in page.notes[-1])
    assert "149" not in page.answer
    page.act("Go on")
    page.wait(lambda: page.answer.endswith("148 149"))
    page.wait(lambda: re.fullmatch(r"[\d,]+ tokens, [\d.]+ tokens/s", page.notes[-1]))
    assert page.answer == LONG.removeprefix("say: ")
    assert re.search(r"[\d,]+ of [\d,]+ tokens", page.texts(".gauge")[0])


def test_versions_of_questions_and_replies(page: Page) -> None:
    assert page.ask("say: one") == "one"
    page.act("Regenerate")
    page.wait(lambda: not page.is_busy and page.texts(".branches .count") == ["2 / 2"])
    page.act("Previous version")
    page.wait(lambda: page.texts(".branches .count") == ["1 / 2"])
    page.act("Edit the question", 0)
    page.wait(lambda: page.find(".editor textarea"))
    page.type(".editor textarea", "say: two")
    page.click(".editor .primary")
    page.wait(lambda: not page.is_busy and page.answer == "two" and page.questions == ["say: two"])
    page.act("Previous version", 0)
    page.wait(lambda: page.answer == "one")
    page.act("Edit the reply")
    page.wait(lambda: page.find(".editor textarea"))
    page.type(".editor textarea", "o")
    page.click(".editor .primary")  # the model goes on from what was written for it
    page.wait(lambda: not page.is_busy and page.answer == "one" and "3 / 3" in page.texts(".branches .count"))
    page.act("Delete from here on", 0)
    page.wait(lambda: page.questions == ["say: two"])
    page.click(".toast button")
    page.wait(lambda: page.questions == ["say: one"] and page.answer == "one")


def test_html_is_shown_and_not_run(page: Page) -> None:
    outside = "![p](http://192.0.2.1/p.png) [l](javascript:window.pwned=1) [out](http://192.0.2.1/)"
    fence = "```\n$<script>window.pwned=1</script>$\n```"
    answer = page.ask(f"say: {HTML} {outside}\n\n{fence}\n\n`a <b>`")
    for shown in (answer, page.questions[0]):
        assert HTML in shown and "<script>window.pwned=1</script>" in shown.replace(HTML, "") and "a <b>" in shown
    assert page.find("#chat .message-content script, #chat .message-content img, #chat a[href^=javascript]") == []
    assert page.find("#chat a[href='http://192.0.2.1/']")[0].get_attribute("rel") == "noopener noreferrer"
    assert page.script("window.pwned") is None
    # The browser itself is told to stay: this is what would happen if all else failed.
    page.script("void document.body.insertAdjacentHTML('beforeend', '<img src=\"http://192.0.2.1/evil.png\">')")
    page.wait(lambda: any("Content Security Policy" in entry["message"] for entry in page.driver.get_log("browser")))
    assert [url for url in page.requests() if not url.startswith((page.url, "data:", "blob:"))] == []


def test_no_markdown_makes_html_or_pictures(page: Page) -> None:
    """Gradio's own parser is the judge, over what random pieces of Markdown and HTML come to."""
    choose = random.Random(0).choice
    texts = ["".join(choose(PIECES) for _ in range(12)) for _ in range(150)]
    page.script(
        "(() => { window.chat.tools.items = arguments[0].map((text, i) => ({node: {id: `n${i}`, role: 'user', text}}));"
        "document.querySelector('#show_messages').click() })()".replace("arguments[0]", json.dumps(texts))
    )
    page.wait(lambda: len(page.questions) == len(texts) and "zzz" in page.questions[-1] + "zzz")
    page.wait(lambda: page.script("document.querySelectorAll('#chat .message-content .md > *').length") > 100)
    tags = page.script(
        "[...new Set([...document.querySelectorAll('#chat .message-content .md *')].map(e => e.tagName))]"
    )
    assert not {"IMG", "B", "SCRIPT", "IFRAME"} & set(tags), tags


def test_any_script_and_markdown(page: Page) -> None:
    text = "你好，世界 🎉👩‍👩‍👧 **مرحبا**\n\nשלום עולם\n\n$$x^2 < y$$ and $a_1$ for $5 or $6"
    text += "\n\n```python\nprint('<b> $HOME')\n```"
    answer = page.ask(f"say: {text}")
    assert "你好，世界 🎉👩‍👩‍👧 مرحبا" in answer and "print('<b> $HOME')" in answer and "for $5 or $6" in answer
    assert len(page.find("#chat .bot-row .katex")) == 2
    assert page.find("#chat .bot-row strong") and page.find("#chat .bot-row .copy_code_button")


def test_a_reload_keeps_conversations_and_draft(page: Page) -> None:
    page.ask("say: remember <b>me</b>")
    page.type("#message textarea", "half a thought")
    page.reload()
    page.wait(lambda: page.questions == ["say: remember <b>me</b>"] and page.box == "half a thought")
    page.wait(lambda: page.answer == "remember <b>me</b>")
    assert page.ask("say: more") == "more" and len(page.questions) == 2
    page.click("#conversation_list .new")
    page.wait(lambda: not page.questions)
    assert page.ask("say: second") == "second"
    assert page.texts("#conversation_list .title") == ["say: second", "say: remember <b>me</b>"]
    page.type("#conversation_list input", "more")
    page.wait(lambda: page.texts("#conversation_list .title") == ["say: remember <b>me</b>"])
    page.click("#conversation_list [aria-label=Delete]")
    page.wait(lambda: not page.texts("#conversation_list .title"))
    page.click(".toast button")
    page.wait(lambda: page.texts("#conversation_list .title") == ["say: remember <b>me</b>"])


def test_two_tabs_don_t_overwrite_each_other(page: Page, url: str) -> None:
    page.ask("say: first")
    first_tab = page.driver.current_window_handle
    opened = page.script("sessionStorage.getItem('qwen-chat/open')")
    page.driver.switch_to.new_window("tab")
    try:
        other = Page(page.driver, url).reload()
        other.script("void window.chat.open(arguments[0])", opened)
        other.wait(lambda: other.questions == ["say: first"])
        other.ask("say: of the other tab")
    finally:
        page.driver.close()
        page.driver.switch_to.window(first_tab)
    page.ask("say: of this tab")
    page.reload()
    page.wait(lambda: len(page.questions) == 2)
    kept = page.script("Object.values(window.chat.conversation.nodes).map(node => node.text)")
    assert {"first", "of the other tab", "of this tab"} <= set(kept)


def test_a_full_store_says_so(page: Page) -> None:
    page.script(
        "(() => { let part = 'x'.repeat(2 ** 20); for (let i = 0; part; ) {"
        "try { localStorage.setItem(`fill${i++}`, part) } catch { part = part.slice(part.length / 2 + 1) } } })()"
    )
    page.ask("say: all the same")
    page.wait(lambda: page.find("#tray .banner button"))
    assert "store is full" in page.texts("#tray .banner")[0] and page.answer == "all the same"


HOSTILE = [
    "", "[]", "null", '{"format": "qwen-chat"}', '{"format": "qwen-chats", "version": 1, "conversations": [1]}',
    json.dumps({"format": "qwen-chat", "version": 1, "system": "", "turns": [{"user": 1, "assistant": ""}]}),
    '{"format": "qwen-chat", "version": 1, "system": "s", "turns": [], "conversation": {"id": "__proto__"}}',
    '{"__proto__": {"polluted": 1}, "format": "qwen-chats", "version": 1, "conversations": [{"id": "a", "title": "t",'
    '"system": "", "created": 1, "updated": 1, "renamed": 0, "gone": [], "leaf": "x", "nodes": {"x": {"id": "x", '
    '"parent": "x", "role": "user", "text": "loop", "time": 1, "version": 1}}}]}',
]  # fmt: skip


def test_files_of_conversations(page: Page, downloads: Path, tmp_path: Path) -> None:
    """What is exported, the terminal loads; what the terminal saves is imported; anything else is refused whole."""
    page.ask("say: <b>ü</b> 🎉")
    page.click("#conversation_list [aria-label='Save as JSON']")
    page.click("#conversation_list [aria-label='Save as Markdown']")
    page.wait(lambda: list(downloads.glob("*.md")) and list(downloads.glob("*.json")))
    [exported] = downloads.glob("*.json")
    assert load_transcript(exported).turns == [("say: <b>ü</b> 🎉", "<b>ü</b> 🎉")]
    assert "**You**\n\nsay: <b>ü</b> 🎉" in next(downloads.glob("*.md")).read_text(encoding="utf-8")
    for text in HOSTILE:
        page.script("void window.chat.sidebar.importText(arguments[0])", text)
        assert page.texts(".toast")[-1].startswith("Not imported"), text
    assert page.script("({}).polluted") is None and len(page.texts("#conversation_list .title")) == 1
    save_transcript(tmp_path / "chat.json", Transcript("S", [("<img src=x onerror='window.pwned=1'>", "b")]))
    saved = (tmp_path / "chat.json").read_text(encoding="utf-8")
    for text in (saved, exported.read_text(encoding="utf-8")):
        page.script("void window.chat.sidebar.importText(arguments[0])", text)
    page.wait(lambda: len(page.texts("#conversation_list .title")) == 3)
    assert page.script("window.pwned") is None


def test_files_are_read_as_text_or_refused(page: Page, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes("天气很好，我们去公园散步，孩子们跑来跑去。\n".encode("gb18030") * 4)
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\0\0\0")
    page.find("#message input[type=file]")[0].send_keys(f"{tmp_path / 'notes.txt'}\n{tmp_path / 'photo.png'}")
    page.wait(lambda: page.texts("#tray .chip"))
    assert "notes.txt" in page.texts("#tray .chip")[0] and "tokens" in page.texts("#tray .chip")[0]
    page.wait(lambda: any("photo.png: the file is no text" in text for text in page.texts(".toast")))
    assert page.ask("say: read") and not page.texts("#tray .chip") and page.texts("#chat .user-row .chip")
    assert "天气很好" in page.script("Object.values(window.chat.conversation.nodes)[0].files[0].text")


@pytest.mark.slow
def test_two_browsers_at_once(page: Page, other_driver: "webdriver.Chrome", url: str) -> None:
    other = Page(other_driver, url).open()
    page.send(LONG)
    other.send(LONG.replace("say: ", "say: other "))
    page.wait(lambda: "0 1 2" in page.answer)
    other.wait(lambda: "other 0 1 2" in other.answer)
    assert page.is_busy and other.is_busy and "other" not in page.answer
    # A third one waits for a place, and gets it when a browser leaves.
    page.driver.switch_to.new_window("tab")
    try:
        third = Page(page.driver, url).reload()
        third.send("say: third")
        third.wait(lambda: any("place 1" in note for note in third.notes))
        other_driver.get("about:blank")
        third.wait(lambda: third.answer == "third")
    finally:
        page.driver.close()
        page.driver.switch_to.window(page.driver.window_handles[0])
    page.click("#message .stop-button")
    page.wait(lambda: not page.is_busy)


def test_keys_and_settings(page: Page) -> None:
    page.ask("say: one")
    box = page.find("#message textarea")[0]
    box.send_keys(Keys.ARROW_UP)
    page.wait(lambda: page.find(".editor textarea"))
    page.find(".editor textarea")[0].send_keys(Keys.ESCAPE)
    page.wait(lambda: not page.find(".editor textarea"))
    box.send_keys("a", Keys.SHIFT, Keys.ENTER, Keys.NULL, "b")
    assert page.box == "a\nb"
    page.type("#message textarea", "")
    box.send_keys("?")
    page.wait(lambda: page.find("dialog[open] kbd"))
    page.find("dialog[open] button")[0].click()
    page.click("#head [aria-label=Settings]")
    page.type("#max_new_tokens input[type=number]", "6")
    page.type("#system textarea", "Speak like a pirate.")
    page.ask(LONG)
    page.wait(lambda: "cut at the longest reply" in page.notes[-1])
    assert page.notes[-1].startswith("6 tokens")
    page.reload()
    page.wait(lambda: page.script("document.querySelector('#max_new_tokens input').value") == "6")
    assert page.script("window.chat.conversation.system") == "Speak like a pirate."


@pytest.mark.slow
def test_a_restart_of_the_server_in_the_middle_of_a_reply(
    driver: "webdriver.Chrome", demo_checkpoint: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        flags = ("--server-port", str(free.getsockname()[1]), "--kv-cache-gib", "0.3", "--lang", "en")
    with serve(tmp_path / "first.txt", *flags) as (_, url):
        page = Page(driver, url).open()
        page.send(LONG)
        page.wait(lambda: "0 1 2 3" in page.answer)
        page.type("#message textarea", "a draft")
    page.wait(lambda: "can't be reached" in "".join(page.texts("#tray .banner")))
    assert page.answer.startswith("0 1 2 3") and page.is_busy
    with serve(tmp_path / "second.txt", *flags):
        page.wait(lambda: page.answer.endswith("148 149") and not page.is_busy)
        assert page.answer == LONG.removeprefix("say: ")
        assert not page.texts("#tray .banner") and page.box == "a draft"


@pytest.mark.slow
def test_errors_are_sentences_and_the_next_message_works(page: Page) -> None:
    page.ask("word " * 8000)
    assert re.fullmatch(r"No reply: the prompt has [\d,]+ tokens and .*: shorten it", page.notes[-1])
    assert page.ask("say: fine") == "fine"


def test_a_phone_sees_all_of_it(other_driver: "webdriver.Chrome", url: str) -> None:
    other_driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    )
    page = Page(other_driver, url).open()
    page.ask("say: | a | b |\n|---|---|\n| 1 | 2 |\n\n```\n" + "wide " * 40 + "\n```")
    assert page.script("document.documentElement.scrollWidth") <= 360
    assert page.script("document.documentElement.scrollHeight") <= 740  # only messages scroll
    page.click("#head [aria-label=Conversations]")
    page.wait(lambda: page.find("#conversations.open"))
    page.click("#chat")
    page.wait(lambda: not page.find("#conversations.open"))
    unnamed = page.script(
        "[...document.querySelectorAll('button, input, textarea')].filter(e => e.offsetParent && !(e.textContent || "
        "e.ariaLabel || e.title || e.labels?.length || e.placeholder)).map(e => e.outerHTML)"
    )
    assert unnamed == []


@pytest.mark.slow
def test_who_has_no_password_sees_nothing(demo_checkpoint: Path, tmp_path: Path) -> None:
    with serve(tmp_path / "stdout.txt", "--auth", "user:pass:word") as (_, url):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(url + "gradio_api/info")
        for route in ("chat/reply", "chat/file"):
            asked = urllib.request.Request(url + route, b"{}", {"Content-Type": "application/json"})
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(asked)
        login = urllib.request.Request(url + "login", data=b"username=user&password=pass%3Aword")
        assert json.load(urllib.request.urlopen(login)) == {"success": True}
